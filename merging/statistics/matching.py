"""Which tensor of the checkpoint a loaded model's parameter is: told by its values, since names change while loading.

Loaders add and strip prefixes, rename modules, tie weights, and fill what a file lacks with random numbers, all without
a word. Only values tell: a parameter is the stored tensor of the same shape with the same numbers; of several such the
one whose name is most like its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from merging.checkpoint import DTYPE_BYTES, FLOATING, Checkpoint, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 20  # elements compared at a time
_FIRST = 256  # elements that tell most tensors apart
_PARTS = re.compile(r"[^./]+[./]?")
_CORNER = 8  # elements that a matrix is looked up by


@dataclass(frozen=True)
class Piece:
    """What a parameter and a stored tensor have in common, where they are not the same.

    Either the stored tensor is a part of the parameter (experts that are loaded into one tensor, projections side by
    side), or the parameter is some rows of the stored tensor (a projection that is loaded as several).

    Attributes:
        name: of the stored tensor.
        part: where in the parameter the stored tensor lies, an index; () for the whole.
        turned: the stored tensor is the transpose of that part.
        start: the first row of the stored tensor that the parameter is; None for the other case.
        shape: of the stored tensor, in that case.
    """

    name: str
    part: tuple[int | slice, ...] = ()
    turned: bool = False
    start: int | None = None
    shape: tuple[int, ...] = ()

    def of(self, values: Tensor) -> Tensor:
        """The stored tensor that is a part of a parameter, as a view of it."""
        assert self.start is None
        own = values[self.part] if self.part else values
        return own.T if self.turned else own

    def put(self, values: Tensor, found: dict[str, Tensor]) -> None:
        """Puts what of a tensor of the parameter's shape belongs to the stored tensor under its name, in its shape."""
        if self.start is None:
            found[self.name] = self.of(values)
        else:
            if self.name not in found:
                found[self.name] = values.new_zeros(self.shape)
            found[self.name][self.start : self.start + len(values)] = values

    @property
    def same_inputs(self) -> bool:
        """Of a linear layer's weight: whether both read the same inputs."""
        return not self.turned and len(self.part) < 2 and all(isinstance(own, slice) for own in self.part)


@dataclass(frozen=True)
class Matches:
    """Where the parameters of a model are stored.

    Attributes:
        names: stored name by parameter name, of those that are stored as they are.
        pieces: by parameter name, what is stored of it in another way: in parts, or once more under a second name.
    """

    names: Mapping[str, str]
    pieces: Mapping[str, tuple[Piece, ...]]


def unread(parameter: str) -> bool:
    """Whether a module may have it without weights in its file, since nobody reads what it gives."""
    return "pooler" in parameter


def match(
    parameters: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    tied: Mapping[str, str] | None = None,
    *,
    rows: bool = False,
) -> Matches:
    """Finds the stored tensors of parameters; a stored tensor belongs to one parameter only.

    Args:
        parameters: on the processor, in whatever floating dtype the file's values were rounded to.
        tied: second names of parameters, and which of `parameters` they are.
        rows: also find parameters that are some rows of a stored tensor; without, every piece is a view of a parameter.
    """
    left = _Left(checkpoint)
    names = {name: found for name, own in parameters.items() if (found := left.take(name, own)) is not None}
    pieces: dict[str, tuple[Piece, ...]] = {}
    for second, first in (tied or {}).items():
        if first in names and (found := left.take(second, parameters[first])) is not None:
            pieces[first] = (*pieces.get(first, ()), Piece(found))
    for name, parameter in parameters.items():
        if name not in names and (parts := _assembled(parameter, left)):
            pieces[name] = parts
    if rows:
        rest = {name: own for name, own in parameters.items() if name not in names and name not in pieces}
        pieces |= left.take_rows(rest)
    return Matches(names, pieces)


class _Left:
    """The stored tensors that belong to no parameter yet."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._by_shape: dict[tuple[int, ...], dict[str, TensorInfo]] = {}
        for name, info in checkpoint.tensors.items():
            if info.dtype in FLOATING:
                self._by_shape.setdefault(info.shape, {})[name] = info
        self._renamed: dict[tuple[str, str], None] = {}  # beginnings that loading has replaced, so far
        self._corners: dict[tuple[int, bytes], list[TensorInfo]] = {}
        self._corners_dtype: Any = None

    def take(self, name: str, parameter: Tensor) -> str | None:
        """The stored tensor that the parameter is."""
        candidates = self._by_shape.get(tuple(parameter.shape), {})
        for own in self._likeliest(name, candidates):
            if _equal(parameter, self._checkpoint, candidates[own]):
                del candidates[own]
                self._renamed[_beginnings(name, own)] = None
                return own
        return None

    def take_corner(self, matrix: Tensor, axis: int, turned: bool) -> TensorInfo | None:
        """The stored matrix, or its transpose, with which `matrix` begins along that axis."""
        for info in self._of_corner(matrix.T if turned else matrix):
            stored = info.shape if len(info.shape) == 2 else (*info.shape, 1)  # a bias is a column
            shape = stored[::-1] if turned else stored
            if shape[axis] > matrix.shape[axis] or shape[1 - axis] != matrix.shape[1 - axis]:
                continue
            own = matrix.narrow(axis, 0, shape[axis])
            candidates = self._by_shape[info.shape]
            if info.name in candidates and _equal(own.T if turned else own, self._checkpoint, info):
                del candidates[info.name]
                return info
        return None

    def take_rows(self, parameters: Mapping[str, Tensor]) -> dict[str, tuple[Piece, ...]]:
        """Parameters that together are a stored tensor, one below another."""
        found: dict[str, Piece] = {}
        for name, own in parameters.items():
            for stored in self._likeliest(name, self._all()):
                start = self._row_of(own, self._all()[stored])
                if start is not None:
                    found[name] = Piece(stored, start=start, shape=self._all()[stored].shape)
                    break
        covered: dict[str, int] = {}
        for name, piece in found.items():
            covered[piece.name] = covered.get(piece.name, 0) + len(parameters[name])
        return {name: (piece,) for name, piece in found.items() if covered[piece.name] == piece.shape[0]}

    def _all(self) -> dict[str, TensorInfo]:
        return {name: info for own in self._by_shape.values() for name, info in own.items()}

    def _row_of(self, parameter: Tensor, info: TensorInfo) -> int | None:
        """The row of a stored tensor from which on it is the parameter: a multiple of its rows, or the last possible."""
        shape = tuple(parameter.shape)
        if not shape or not parameter.numel() or info.shape[1:] != shape[1:] or info.shape[0] <= shape[0]:
            return None
        starts = [*range(0, info.shape[0] - shape[0] + 1, shape[0]), info.shape[0] - shape[0]]
        row = parameter[0].numel()
        return next((start for start in starts if _equal(parameter, self._checkpoint, info, start * row)), None)

    def give_back(self, info: TensorInfo) -> None:
        self._by_shape[info.shape][info.name] = info

    def _likeliest(self, name: str, candidates: Mapping[str, TensorInfo]) -> Iterator[str]:
        """Its name as other names were changed before; then the rest, the most alike first."""
        tried = set()
        for ours, theirs in self._renamed:
            own = theirs + name[len(ours) :] if name.startswith(ours) else ""
            if own in candidates and own not in tried:
                tried.add(own)
                yield own
        yield from (own for own in _likeliest(name, candidates) if own not in tried)

    def _of_corner(self, matrix: Tensor) -> Iterator[TensorInfo]:
        if self._corners_dtype != matrix.dtype:
            self._corners_dtype = matrix.dtype
            self._corners.clear()
            for own in self._by_shape.values():
                for info in own.values():
                    if len(info.shape) in (1, 2) and info.numel:
                        size = min(_CORNER, (*info.shape, 1)[1])
                        key = _bytes(_read(self._checkpoint, info, 0, size).to(matrix.dtype))
                        self._corners.setdefault((size, key), []).append(info)
        for size in range(min(_CORNER, matrix.shape[1]), 0, -1):
            yield from self._corners.get((size, _bytes(matrix[0, :size])), ())


def _beginnings(ours: str, theirs: str) -> tuple[str, str]:
    """What two names begin with, without the parts that their ends have in common."""
    own, other = _PARTS.findall(ours), _PARTS.findall(theirs)
    while own and other and own[-1].rstrip("./") == other[-1].rstrip("./"):
        own.pop()
        other.pop()
    return "".join(own), "".join(other)


def _bytes(values: Tensor) -> bytes:
    return bytes(values.detach().float().contiguous().numpy().tobytes())


def _assembled(parameter: Tensor, left: _Left) -> tuple[Piece, ...]:
    """The stored matrices that a parameter was put together from, one after another along either axis; () for none."""
    if parameter.dim() not in (1, 2, 3):
        return ()
    taken: list[TensorInfo] = []
    found: list[Piece] = []
    for place in range(len(parameter)) if parameter.dim() == 3 else (None,):
        matrix = parameter.detach() if place is None else parameter.detach()[place]
        matrix, ways = (matrix, _WAYS) if matrix.dim() == 2 else (matrix.unsqueeze(1), _WAYS[:1])
        parts = next((own for way in ways if (own := _side_by_side(matrix, left, taken, *way))), None)
        if parts is None:
            for info in taken:
                left.give_back(info)
            return ()
        found += [Piece(own.name, own.part if place is None else (place, *own.part), own.turned) for own in parts]
    return tuple(found)


#: The axis along which stored matrices lie side by side, and whether they are turned.
_WAYS = ((0, False), (0, True), (1, False), (1, True))


def _side_by_side(matrix: Tensor, left: _Left, taken: list[TensorInfo], axis: int, turned: bool) -> list[Piece] | None:
    own: list[TensorInfo] = []
    found: list[Piece] = []
    start = 0
    while start < matrix.shape[axis]:
        rest = matrix.narrow(axis, start, matrix.shape[axis] - start)
        info = left.take_corner(rest, axis, turned)
        if info is None:
            for each in own:
                left.give_back(each)
            return None
        own.append(info)
        stop = start + (*info.shape, 1)[1 - axis if turned else axis]
        part = slice(start, stop)
        found.append(Piece(info.name, (part,) if axis == 0 else (slice(None), part), turned))
        start = stop
    taken += own
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


def _equal(parameter: Tensor, checkpoint: Checkpoint, info: TensorInfo, begin: int = 0) -> bool:
    """Whether the stored elements from `begin` on are the parameter's."""
    first = parameter.detach()[(0,) * max(0, parameter.dim() - 1)] if parameter.numel() else parameter
    if not _same(first.reshape(-1)[:_FIRST], _read(checkpoint, info, begin, begin + min(_FIRST, first.numel()))):
        return False
    flat = parameter.detach().reshape(-1)
    for start in range(0, flat.numel(), _BLOCK):
        stop = min(start + _BLOCK, flat.numel())
        if not _same(flat[start:stop], _read(checkpoint, info, begin + start, begin + stop)):
            return False
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
