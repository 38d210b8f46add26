"""What the linear layers of a model read: second moments or Gram matrices of their inputs, from forward passes alone.

Hooks before every Linear, Conv1D (GPT-2's) and convolution see its inputs; rows of padding are left out. What comes
after the last of them is not computed: an output head that is tied to the embeddings, or any output head's product.
Source: arXiv 2212.09849, section 3 (Gram matrices); arXiv 2502.12217 (second moments).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from merging.statistics.sums import Sum

if TYPE_CHECKING:
    import torch
    from torch import nn

    from merging.statistics.network import Network


_BLOCK = 512  # columns of a Gram matrix at a time


class Ragged(Exception):
    """A layer reads rows of which nobody can say which are padding: it wants batches without any."""


class _Enough(Exception):
    """All layers have been seen."""


@dataclass(frozen=True)
class Layer:
    """A layer whose inputs are looked at.

    Attributes:
        weight: the stored name of its weight.
        axis: of the weight, over which its inputs run.
        kind: "linear" for whatever multiplies rows, "conv" for convolutions.
    """

    module: nn.Module
    weight: str
    axis: int
    kind: str


def layers_of(network: Network) -> list[Layer]:
    """All Linear, Conv1D and convolution layers whose weights the checkpoint has; none that is tied to an embedding."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    names: dict[int, list[str]] = {}
    for name, own in network.parameters().items():
        pieces = [piece.name for piece in network.pieces.get(name, ()) if piece.same_inputs]
        names[id(own)] = [*([network.names[name]] if name in network.names else []), *pieces]
    embedded = {id(m.weight) for m in network.module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    found: list[Layer] = []
    known: dict[str, torch.Tensor] = {}
    for module in network.module.modules():
        weight = getattr(module, "weight", None)
        if weight is None or id(weight) in embedded:
            continue
        for name in names.get(id(weight), ()):
            if known.setdefault(name, weight) is not weight:
                continue  # of a projection that is loaded as several, which read the same, the first
            if isinstance(module, nn.Linear | Conv1D):
                found.append(Layer(module, name, 0 if isinstance(module, Conv1D) else 1, "linear"))
            elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.padding_mode == "zeros":
                found.append(Layer(module, name, 1, "conv"))
    return found


class InputSums:
    """Sums over input rows, by stored weight; to be used as `with InputSums(network, kind) as sums:`.

    Args:
        kind: "moments" or "gram".

    Attributes:
        layers: that are looked at.
        rows: input rows that each weight's layer has read.
    """

    def __init__(self, network: Network, kind: str) -> None:
        assert kind in ("moments", "gram")
        self.network, self.kind = network, kind
        self.layers = [each for each in layers_of(network) if kind == "moments" or each.kind == "linear"]
        self.rows: dict[str, int] = dict.fromkeys((each.weight for each in self.layers), 0)
        self._sums: dict[str, Sum] = {}
        self._handles: list[Any] = []
        self._last: tuple[torch.Tensor | None, torch.Tensor | None, int] = (None, None, 0)
        self._shape = (0, 0)
        self._places: torch.Tensor | None = None  # of the rows that are no padding; None: all

    def __enter__(self) -> InputSums:
        for layer in self.layers:
            self._handles.append(layer.module.register_forward_pre_hook(partial(self._see, layer)))
        head = self._output_head()
        if head is not None:  # after our own hook on it, if there is one
            self._handles.append(head.register_forward_pre_hook(_stop))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def add(self, features: Mapping[str, torch.Tensor]) -> None:
        """Adds the rows of a micro-batch.

        Raises:
            Ragged: the micro-batches must have no padding. The sums are of no use any more.
        """
        import torch

        mask = features["attention_mask"].bool()
        self._shape = (int(mask.shape[0]), int(mask.shape[1]))
        self._places = None if bool(mask.all()) else mask.reshape(-1).nonzero().squeeze(1)
        try:
            with torch.no_grad():
                self.network.forward(features)
        except _Enough:
            pass
        finally:
            self._last = (None, None, 0)

    def means(self) -> dict[str, torch.Tensor]:
        """By weight, float32: the mean over rows, of the shape that the folder wants; without layers that read none."""
        found = {}
        for weight, rows in self.rows.items():  # in the layers' order, also where a run has gone on
            if rows:
                mean = (self._sums[weight].value() / rows).float()
                found[weight] = mean.triu() + mean.triu(1).T if self.kind == "gram" else mean
        return found

    @property
    def axes(self) -> dict[str, int]:
        return {each.weight: each.axis for each in self.layers}

    def state(self) -> dict[str, torch.Tensor]:
        """All that `load` needs to go on from here; not copied."""
        import torch

        state = {f"{weight}:{key}": value for weight, own in self._sums.items() for key, value in own.state().items()}
        return state | {f"{weight}:rows": torch.tensor(self.rows[weight]) for weight in self._sums}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from what `state` gave.

        Raises:
            ValueError: it is of another model.
        """
        weights = {key.rpartition(":")[0] for key in state}
        if not weights <= self.rows.keys():
            raise ValueError("a state of another model")
        for weight in weights:
            own = {key.rpartition(":")[2]: value for key, value in state.items() if key.rpartition(":")[0] == weight}
            self.rows[weight] = int(own.pop("rows"))
            total = self._sums[weight] = Sum(tuple(own["sum"].shape), device=self.network.device)
            total.load(own)

    def _output_head(self) -> nn.Module | None:
        if self.network.head != "lm":
            return None
        head: nn.Module | None = self.network.module.get_output_embeddings()
        return head

    def _see(self, layer: Layer, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        values = inputs[0]
        seen, sums, rows = self._last
        if layer.kind == "conv":
            if self._places is not None:
                raise Ragged
            sums, rows = _convolved(module, values)
        elif values is not seen:  # query, key and value read the same
            own = self._rows(values)
            rows = len(own)
            sums = own.square().sum(0) if self.kind == "moments" else _upper_gram(own)
            self._last = (values, sums, rows)
        assert sums is not None
        if not rows:
            return
        if self.kind == "moments" and layer.kind == "linear":
            sums = sums.unsqueeze(1 - layer.axis)
        if layer.weight not in self._sums:
            self._sums[layer.weight] = Sum(tuple(sums.shape), device=str(sums.device))
        self._sums[layer.weight].add(sums)
        self.rows[layer.weight] += rows

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        """(rows, in) float32, without padding."""
        flat = values.reshape(-1, values.shape[-1])
        if self._places is None or (values.dim() == 2 and len(values) == self._shape[0]):
            return flat.float()  # a pooler's rows are texts
        if values.dim() < 3 or tuple(values.shape[:2]) != self._shape:
            raise Ragged
        if values.dim() > 3:
            return values.flatten(0, 1)[self._places].reshape(-1, values.shape[-1]).float()
        return flat.index_select(0, self._places).float()


def _stop(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    raise _Enough


def _upper_gram(rows: torch.Tensor) -> torch.Tensor:
    """rows^T rows, (in, in); below the diagonal, where it says the same again, only what is quicker done than left out."""
    width = rows.shape[1]
    if width <= _BLOCK:
        return rows.T @ rows
    found = rows.new_zeros((width, width))
    for start in range(0, width, _BLOCK):
        found[start : start + _BLOCK, start:] = rows[:, start : start + _BLOCK].T @ rows[:, start:]
    return found


def _convolved(module: Any, values: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sums over a convolution's positions of x^2 under each of its weights, (1, in, *kernel), and how many positions.

    That is the gradient with respect to its weight where every output counts once. With groups: (out, in, *kernel).
    """
    import torch

    weight, groups = module.weight, module.groups
    with torch.enable_grad():
        one_each = torch.zeros((groups, *weight.shape[1:]), device=weight.device, requires_grad=True)
        outputs = module._conv_forward(values.detach().float().square(), one_each, None)
        (sums,) = torch.autograd.grad(outputs.sum(), one_each)
    positions = outputs.numel() // groups
    return (sums.repeat_interleave(len(weight) // groups, 0) if groups > 1 else sums), positions
