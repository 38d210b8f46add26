"""The gradient of each example of a batch, from one backward over all of them.

Hooks on the layers see what goes in and the gradient of what comes out, for every row of the batch; the gradient of a
layer's weight for one row is a product of the two, and is never formed whole: `squares` adds up its squares by blocks.
The weights themselves need no gradient, which spares a third of a plain backward.

Known are Linear, Conv1D (GPT-2's), Embedding, LayerNorm, every RMSNorm, Conv1d, Conv2d, and relative position biases
(T5, MPNet). What a model does with its other parameters `PerExample.unknown` tells, and `disagreeing` finds layers
that use theirs in another way than their class says; these need another way to their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from merging.statistics.squares import BUDGET, Outer, Rows, Term, Whole, add_squares, weighted

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merging.statistics.sums import Sum


class PerExample:
    """Hooks on a module, from `with PerExample(module) as own:` to the end of the block.

    Within it the module's parameters need no gradient. The rows of a batch, leading axis of all that the layers are fed,
    belong to units, each with a gradient of its own.

    Attributes:
        parameters: by name, as the module names them; tied ones once.
        unknown: names of those that no known layer holds.
        failed: names of those whose layers were, since the last `recording` began, fed something with another leading
            axis than the rows. Their gradients are left out.
    """

    def __init__(self, module: nn.Module, *, budget: int = BUDGET) -> None:
        self.module, self.budget = module, budget
        self.parameters: dict[str, nn.Parameter] = dict(module.named_parameters())
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._layers = [(layer, uses) for layer in module.modules() if (uses := _uses(layer)) is not None]
        held = {self._names[id(own)] for layer, _ in self._layers for own in layer.parameters(recurse=False)}
        self.unknown = frozenset(self.parameters.keys() - held)
        self.failed: set[str] = set()
        self._skipped: frozenset[str] = frozenset()
        self._units = 0
        self._unit: Tensor | None = None  # (rows,) of the call that is being recorded
        self._expected: dict[str, int] = {}
        self._arrived: dict[str, list[Term]] = {}
        self._take: Callable[[str, list[Term]], None] | None = None
        self._handles: list[Any] = []
        self._bias: tuple[nn.Module, Tensor | None] | None = None

    def __enter__(self) -> PerExample:
        self._needed = {name: own.requires_grad for name, own in self.parameters.items()}
        for own in self.parameters.values():
            own.requires_grad_(False)
        for layer, uses in self._layers:
            if _is_table(layer):
                self._handles.append(layer.register_forward_pre_hook(self._spread))
            self._handles.append(layer.register_forward_hook(partial(self._saw, uses), with_kwargs=True))
        self._restore = [self._watch_bias(layer) for layer in self.module.modules() if _bias_method(layer)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for restore in self._restore:
            restore()
        for name, own in self.parameters.items():
            own.requires_grad_(self._needed[name])
        self._handles.clear()
        self._expected.clear()
        self._arrived.clear()

    @contextmanager
    def recording(self, units: int, skipped: frozenset[str] = frozenset()) -> Iterator[Callable[[Tensor], None]]:
        """Forward passes of a batch of so many units. Those before are forgotten.

        Gives a function to call before each call of the module, with the unit of each of its rows: (rows,).

        Args:
            skipped: parameters to leave out.
        """
        import torch

        def rows(unit: Tensor) -> None:
            self._unit = unit

        self._units, self._skipped = units, skipped
        self._expected.clear()
        self.failed.clear()
        with torch.enable_grad():
            try:
                yield rows
            finally:
                self._unit = None

    def forget(self, names: frozenset[str]) -> None:
        """Leaves these parameters out of what was recorded, too."""
        self._skipped |= names

    def add_squares(
        self, output: Tensor, cotangent: Tensor, sums: Mapping[str, Sum], mix: Tensor | None = None, *, again: bool
    ) -> None:
        """One backward from `output`: to each sum the squares of the units' gradients are added.

        Args:
            output: of what was recorded.
            cotangent: its gradient, of its shape.
            mix: (examples, choices), see `squares`.
            again: whether another backward of the same output follows.
        """

        def take(name: str, terms: list[Term]) -> None:
            add_squares(sums[name], terms, self._units, mix, self.budget)

        self._backward(output, cotangent, take, again=again)

    def disagreeing(
        self, output: Tensor, cotangent: Tensor, weights: Tensor, plain: Mapping[str, Tensor | None], *, again: bool
    ) -> set[str]:
        """Names of those whose gradients, weighted by unit and added up, are not those of a plain backward.

        Weights that differ tell units that were mistaken for each other, too.

        Args:
            weights: (units,).
            plain: the gradients of a plain backward in which each unit had its weight; None for none.
        """
        import torch

        found: dict[str, tuple[Tensor, float]] = {}

        def take(name: str, terms: list[Term]) -> None:
            found[name] = weighted(self.parameters[name].shape, terms, weights)

        self._backward(output, cotangent, take, again=again)
        wrong = set()
        for name, parameter in self.parameters.items():
            if name in self._skipped or name in self.failed:
                continue
            given = plain[name]
            theirs = torch.zeros_like(parameter) if given is None else given
            ours, bound = found.get(name, (torch.zeros_like(parameter), 0.0))
            error = float((ours - theirs.to(ours.dtype)).norm())
            if not error <= _tolerance(parameter.dtype) * (bound + float(theirs.norm())):
                wrong.add(name)
        return wrong

    def _backward(
        self, output: Tensor, cotangent: Tensor, take: Callable[[str, list[Term]], None], *, again: bool
    ) -> None:
        import torch

        self._take, self._arrived = take, {}
        try:
            torch.autograd.backward(output, cotangent, retain_graph=again)
            for name, terms in self._arrived.items():  # where a call's output did not count
                take(name, terms)
        finally:
            self._take, self._arrived = None, {}

    # ---- forward ----

    def _spread(self, layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """Positions that all rows share are looked up once; looked up for each row they have a gradient for each."""
        if self._unit is None or self._bias is not None or len(self._unit) == 1 or not inputs:
            return None
        index = inputs[0]
        if index.ndim == 2 and len(index) == 1:
            return (index.expand(len(self._unit), -1), *inputs[1:])
        return None

    def _saw(
        self,
        uses: Uses,
        layer: nn.Module,
        inputs: tuple[Any, ...],
        named: Mapping[str, Any],
        output: Any,
    ) -> Any:
        import torch

        if self._unit is None or not torch.is_grad_enabled():
            return None
        given = inputs[0] if inputs else next(iter(named.values()))
        if self._bias is not None and _is_table(layer):
            self._bias = (layer, given)
            return None
        terms = uses(layer, given, output, self._unit)
        if terms is None:
            self.failed |= {self._names[id(own)] for own in layer.parameters(recurse=False)}
        first = not output.requires_grad
        if first:
            output = output.detach().requires_grad_().clone()  # what follows may change it in place
        self._expect(layer, terms, output)
        return output if first else None

    def _expect(self, layer: nn.Module, terms: Terms | None, output: Tensor) -> None:
        own = {
            self._names[id(getattr(layer, key))]: term
            for key, term in (terms or {}).items()
            if getattr(layer, key, None) is not None
        }
        own = {name: term for name, term in own.items() if name not in self._skipped}
        if not own:
            return
        for name in own:
            self._expected[name] = self._expected.get(name, 0) + 1
        output.register_hook(partial(self._arrive, own))

    def _watch_bias(self, layer: nn.Module) -> Callable[[], None]:
        """Of a position bias that all rows share, a copy for each row."""
        method = _bias_method(layer)
        own = getattr(layer, method)

        def compute(*arguments: Any, **named: Any) -> Any:
            if self._unit is None:
                return own(*arguments, **named)
            self._bias = (layer, None)
            try:
                bias = own(*arguments, **named)  # (1 or rows, heads, queries, keys)
                table, index = self._bias
            finally:
                self._bias = None
            unit = self._unit
            if index is None or index.ndim != 2 or bias.shape[0] not in (1, len(unit)):
                self.failed |= {self._names[id(each)] for each in layer.relative_attention_bias.parameters()}
                return bias
            bias = bias.detach().expand(len(unit), -1, -1, -1).clone().requires_grad_()
            index = index.reshape(1, -1).expand(len(unit), -1)
            self._expect(table, {"weight": lambda gradient: Rows(index, gradient.flatten(2).mT, unit)}, bias)
            return bias

        setattr(layer, method, compute)
        return partial(delattr, layer, method)

    # ---- backward ----

    def _arrive(self, own: Mapping[str, Callable[[Tensor], Term]], gradient: Tensor) -> None:
        if self._take is None:
            return
        for name, term in own.items():
            if name in self.failed or name in self._skipped:
                continue
            arrived = self._arrived.setdefault(name, [])
            arrived.append(term(gradient))
            if len(arrived) == self._expected[name]:
                self._take(name, self._arrived.pop(name))


# ---- the layers ----

#: From the gradient of what a layer gave to the term of each of its parameters.
Terms = Mapping[str, Callable[["Tensor"], Term]]
#: Of a layer, what it was given, what it gave, and the unit of each row. None: these rows are not its leading axis.
Uses = Callable[[Any, "Tensor", "Tensor", "Tensor"], "Terms | None"]


def _uses(layer: nn.Module) -> Uses | None:
    """What a layer does with its parameters; None where it is none of the known."""
    from torch import nn

    if not any(True for _ in layer.parameters(recurse=False)):
        return None
    if isinstance(layer, nn.Linear):
        return _linear
    if type(layer).__name__ == "Conv1D":
        return partial(_linear, inputs_first=True)
    if isinstance(layer, nn.Embedding):
        return _table if layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse else None
    if isinstance(layer, nn.LayerNorm):
        return _layer_norm if len(layer.normalized_shape) == 1 else None
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return _convolution if plain else None
    if type(layer).__name__.endswith(("RMSNorm", "LayerNorm")):
        weight = getattr(layer, "weight", None)
        others = {key for key, _ in layer.named_parameters(recurse=False)} - {"weight", "bias"}
        return _scale if weight is not None and weight.ndim == 1 and not others else None
    return None


def _is_table(layer: nn.Module) -> bool:
    from torch import nn

    return isinstance(layer, nn.Embedding)


def _bias_method(layer: nn.Module) -> str:
    if not _is_table(getattr(layer, "relative_attention_bias", None)):
        return ""
    return next((name for name in ("compute_bias", "compute_position_bias") if hasattr(layer, name)), "")


def _by_row(tensor: Tensor, unit: Tensor) -> Tensor:
    """(rows, places, last axis)"""
    return tensor.reshape(len(unit), -1, tensor.shape[-1])


def _linear(_: Any, given: Tensor, output: Tensor, unit: Tensor, inputs_first: bool = False) -> Terms | None:
    if given.ndim < 2 or len(given) % len(unit) or output.shape[:-1] != given.shape[:-1]:
        return None
    inputs = _by_row(given.detach(), unit)

    def weight(gradient: Tensor) -> Term:
        outputs = _by_row(gradient, unit)
        return Outer(inputs, outputs, unit) if inputs_first else Outer(outputs, inputs, unit)

    return {"weight": weight, "bias": lambda gradient: Whole(_by_row(gradient, unit), unit)}


def _table(layer: Any, given: Tensor, output: Tensor, unit: Tensor) -> Terms | None:
    if given.ndim == 0 or len(given) % len(unit) or output.shape[:-1] != given.shape:
        return None
    index = given.reshape(len(unit), -1)
    if layer.padding_idx is not None:
        index = index.masked_fill(index == layer.padding_idx, -1)  # as torch: padding never learns
    factor = getattr(layer, "embed_scale", None)  # Gemma, BART: what comes out is multiplied
    return {
        "weight": lambda gradient: Rows(index, _by_row(gradient if factor is None else gradient * factor, unit), unit)
    }


def _layer_norm(layer: Any, given: Tensor, _: Tensor, unit: Tensor) -> Terms | None:
    import torch

    return _scaled(given, unit, lambda inputs: torch.layer_norm(inputs, layer.normalized_shape, None, None, layer.eps))


def _scale(layer: Any, given: Tensor, _: Tensor, unit: Tensor) -> Terms | None:
    """Any layer whose output is linear in its weight, entry by entry: it tells itself what it multiplies."""
    import torch

    def of(inputs: Tensor, weight: float) -> Tensor:
        own = torch.full_like(layer.weight, weight)
        result: Tensor = torch.func.functional_call(layer, {"weight": own}, (inputs,))
        return result

    return _scaled(given, unit, torch.no_grad()(lambda inputs: of(inputs, 1.0) - of(inputs, 0.0)))


def _scaled(given: Tensor, unit: Tensor, normal: Callable[[Tensor], Tensor]) -> Terms | None:
    if given.ndim < 2 or len(given) % len(unit):
        return None
    inputs = given.detach()
    return {
        "weight": lambda gradient: Whole(_by_row(_exactly(gradient) * normal(inputs), unit), unit),
        "bias": lambda gradient: Whole(_by_row(gradient, unit), unit),
    }


def _convolution(layer: Any, given: Tensor, output: Tensor, unit: Tensor) -> Terms | None:
    """A linear layer on the patches of its input."""
    import torch

    if given.ndim != layer.weight.ndim or len(given) % len(unit):
        return None
    images = given.detach() if given.ndim == 4 else given.detach().unsqueeze(2)
    pairs = [layer.kernel_size, layer.dilation, layer.padding, layer.stride]
    if given.ndim == 3:
        pairs = [(alone, pair[0]) for alone, pair in zip((1, 1, 0, 1), pairs, strict=True)]

    def outputs(gradient: Tensor) -> Tensor:
        return gradient.flatten(2).mT.reshape(len(unit), -1, gradient.shape[1])

    def weight(gradient: Tensor) -> Term:
        patches = torch.nn.functional.unfold(images, *pairs).mT  # (batch, places, in * kernel)
        return Outer(outputs(gradient), _by_row(patches, unit), unit)

    return {"weight": weight, "bias": lambda gradient: Whole(outputs(gradient), unit)}


def _tolerance(dtype: Any) -> float:
    """By how much a gradient may be off, of the product of its factors' norms. Parts of a float64 model are float32."""
    import torch

    arithmetic = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else dtype
    if torch.is_autocast_enabled("cpu"):
        arithmetic = torch.get_autocast_dtype("cpu")
    eps = float(torch.finfo(arithmetic).eps)
    return 3 * eps if eps > 1e-4 else 32 * float(torch.finfo(torch.float32).eps)


def _exactly(tensor: Tensor) -> Tensor:
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
