"""What the layers do with their parameters: from what goes in and the gradient of what comes out to gradients by row.

Known are Linear, Conv1D (GPT-2's), Embedding, LayerNorm, every RMSNorm, Conv1d and Conv2d.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from merging.statistics.squares import Outer, Rows, Term, Whole

if TYPE_CHECKING:
    from torch import Tensor, nn

#: From the gradient of what a layer gave to the term of each of its parameters.
Terms = Mapping[str, Callable[["Tensor"], Term]]
#: Of a layer, what it was given, what it gave, and the unit of each row. None: these rows are not its leading axis.
Uses = Callable[[Any, "Tensor", "Tensor", "Tensor"], "Terms | None"]


def uses_of(layer: nn.Module) -> Uses | None:
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
    if type(layer).__name__.endswith(("RMSNorm", "LayerNorm", "NoNorm")):
        weight = getattr(layer, "weight", None)
        others = {key for key, _ in layer.named_parameters(recurse=False)} - {"weight", "bias"}
        return _scale if weight is not None and weight.ndim == 1 and not others else None
    return None


def is_table(layer: nn.Module) -> bool:
    from torch import nn

    return isinstance(layer, nn.Embedding)


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


def _exactly(tensor: Tensor) -> Tensor:
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
