"""Which tensor of the checkpoint a loaded model's parameter is: told by its values, since names change while loading.

Loaders add and strip prefixes, rename modules, tie weights, and fill what a file lacks with random numbers, all without
a word. Only values tell: a parameter is the stored tensor of the same shape with the same numbers; of several such the
one whose name is most like its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from merging.checkpoint import DTYPE_BYTES, FLOATING, Checkpoint, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 20  # elements compared at a time
_FIRST = 256  # elements that tell most tensors apart


@dataclass(frozen=True)
class Piece:
    """A stored tensor that is a part of a parameter: experts that are loaded into one tensor, projections side by side.

    Attributes:
        name: of the stored tensor.
        part: where in the parameter it lies, an index.
        turned: the stored tensor is the transpose of that part.
    """

    name: str
    part: tuple[int | slice, ...] = ()
    turned: bool = False

    def of(self, values: Tensor) -> Tensor:
        """What of a tensor of the parameter's shape belongs to the stored tensor, in its shape."""
        own = values[self.part] if self.part else values
        return own.T if self.turned else own


@dataclass(frozen=True)
class Matches:
    """Where the parameters of a model are stored.

    Attributes:
        names: stored name by parameter name, of those that are stored as they are.
        pieces: by parameter name, what is stored of it in another way: in parts, or once more under a second name.
    """

    names: Mapping[str, str]
    pieces: Mapping[str, tuple[Piece, ...]]


def match(parameters: Mapping[str, Tensor], checkpoint: Checkpoint, tied: Mapping[str, str] | None = None) -> Matches:
    """Finds the stored tensors of parameters; a stored tensor belongs to one parameter only.

    Args:
        parameters: on the processor, in whatever floating dtype the file's values were rounded to.
        tied: second names of parameters, and which of `parameters` they are.
    """
    by_shape: dict[tuple[int, ...], dict[str, TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        if info.dtype in FLOATING:
            by_shape.setdefault(info.shape, {})[name] = info

    def take(name: str, parameter: Tensor) -> str | None:
        candidates = by_shape.get(tuple(parameter.shape), {})
        found = next(
            (own for own in _likeliest(name, candidates) if _equal(parameter, checkpoint, candidates[own])), None
        )
        if found is not None:
            del candidates[found]
        return found

    names = {name: found for name, own in parameters.items() if (found := take(name, own)) is not None}
    pieces: dict[str, tuple[Piece, ...]] = {}
    for second, first in (tied or {}).items():
        if first in names and (found := take(second, parameters[first])) is not None:
            pieces[first] = (*pieces.get(first, ()), Piece(found))
    left = {name: info for own in by_shape.values() for name, info in own.items()}
    for name, parameter in parameters.items():
        if name not in names and parameter.dim() > 1 and (parts := _assembled(parameter, checkpoint, left)):
            pieces[name] = parts
            for part in parts:
                del left[part.name]
    return Matches(names, pieces)


def _assembled(parameter: Tensor, checkpoint: Checkpoint, left: Mapping[str, TensorInfo]) -> tuple[Piece, ...]:
    """The stored matrices that a parameter was put together from, one after another along either axis; () for none."""
    found: list[Piece] = []
    for place in range(len(parameter)) if parameter.dim() == 3 else (None,):
        matrix = parameter if place is None else parameter[place]
        if matrix.dim() != 2:
            return ()
        used = {piece.name for piece in found}
        parts = next((p for way in _WAYS if (p := _side_by_side(matrix, checkpoint, left, used, *way))), None)
        if parts is None:
            return ()
        found += [Piece(p.name, p.part if place is None else (place, *p.part), p.turned) for p in parts]
    return tuple(found)


#: The axis along which stored matrices lie side by side, and whether they are turned.
_WAYS = ((0, False), (0, True), (1, False), (1, True))


def _side_by_side(
    matrix: Tensor, checkpoint: Checkpoint, left: Mapping[str, TensorInfo], used: set[str], axis: int, turned: bool
) -> list[Piece] | None:
    found: list[Piece] = []
    start = 0
    while start < matrix.shape[axis]:
        rest = matrix.narrow(axis, start, matrix.shape[axis] - start)
        for name, info in left.items():
            shape = info.shape[::-1] if turned else info.shape
            fits = len(shape) == 2 and shape[axis] <= rest.shape[axis] and shape[1 - axis] == rest.shape[1 - axis]
            if not fits or name in used:
                continue
            own = rest.narrow(axis, 0, shape[axis])
            if _equal(own.T if turned else own, checkpoint, info):
                part = slice(start, start + shape[axis])
                found.append(Piece(name, (part,) if axis == 0 else (slice(None), part), turned))
                used = used | {name}
                start += shape[axis]
                break
        else:
            return None
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
    first = parameter.detach()[(0,) * max(0, parameter.dim() - 1)] if parameter.numel() else parameter
    if not _same(first.reshape(-1)[:_FIRST], _read(checkpoint, info, 0, min(_FIRST, first.numel()))):
        return False
    flat = parameter.detach().reshape(-1)
    start, size = 0, _BLOCK
    while start < info.numel:
        stop = min(start + size, info.numel)
        if not _same(flat[start:stop], _read(checkpoint, info, start, stop)):
            return False
        start = stop
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
