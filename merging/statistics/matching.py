"""Which tensor of the checkpoint a loaded model's parameter is: told by its values, since names change while loading.

Loaders add and strip prefixes, rename modules, tie weights, and fill what a file lacks with random numbers, all without
a word. Only values tell: a parameter is the stored tensor of the same shape with the same numbers; of several such the
one whose name is most like its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from merging.checkpoint import DTYPE_BYTES, FLOATING, Checkpoint, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 20  # elements compared at a time
_FIRST = 256  # elements that tell most tensors apart


def stored_names(parameters: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, str]:
    """The stored tensor of each parameter, by the parameter's name; without those that no stored tensor equals.

    Args:
        parameters: on the processor, in whatever floating dtype the file's values were rounded to.
    """
    by_shape: dict[tuple[int, ...], dict[str, TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        if info.dtype in FLOATING:
            by_shape.setdefault(info.shape, {})[name] = info
    found: dict[str, str] = {}
    for name, parameter in parameters.items():
        candidates = by_shape.get(tuple(parameter.shape), {})
        match = next(
            (own for own in _likeliest(name, candidates) if _equal(parameter, checkpoint, candidates[own])), None
        )
        if match is not None:
            found[name] = match
            del candidates[match]
    return found


def _likeliest(name: str, candidates: Iterable[str]) -> list[str]:
    """Those with the longest common end first, by whole parts; then those with most parts in common."""
    own = _parts(name)

    def unlike(candidate: str) -> tuple[int, int, int]:
        other = _parts(candidate)
        common = 0
        for a, b in zip(reversed(own), reversed(other), strict=False):
            if a != b:
                break
            common += 1
        return -common, -len(set(own) & set(other)), abs(len(own) - len(other))

    return sorted(candidates, key=unlike)


def _parts(name: str) -> list[str]:
    return name.replace("/", ".").split(".")


def _equal(parameter: Tensor, checkpoint: Checkpoint, info: TensorInfo) -> bool:
    flat = parameter.detach().reshape(-1)
    start, size = 0, _FIRST
    while start < info.numel:
        stop = min(start + size, info.numel)
        if not _same(flat[start:stop], _read(checkpoint, info, start, stop)):
            return False
        start, size = stop, _BLOCK
    return True


def _same(values: Tensor, stored: Tensor) -> bool:
    import torch

    return bool(torch.equal(values, stored.to(values.dtype)))


def _read(checkpoint: Checkpoint, info: TensorInfo, start: int, stop: int) -> Tensor:
    """Elements of a stored tensor in the dtype that they are stored in."""
    import torch

    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[info.dtype]
    size = DTYPE_BYTES[info.dtype]
    raw = np.empty((stop - start) * size, np.uint8)
    checkpoint.read_into(info, start * size, raw.data)
    return torch.from_numpy(raw).view(dtype)
