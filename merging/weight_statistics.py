"""What is known of one model's weights in one tensor, as a merge method reads it: by elements, or as a Gram matrix."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from merging.errors import MergeError
from merging.inputs import Statistic, Values, Workspace

if TYPE_CHECKING:
    from merging.statistics.folder import Statistics

Floats = NDArray[np.float32]
_INFINITY = np.uint32(0x7F800000)


def of_folder(folder: Statistics, name: str, shape: tuple[int, ...]) -> Statistic | None:
    """What a folder of statistics holds of a weight, by its stored name; None where it holds nothing of it.

    Raises:
        MergeError: it does not fit the weight's shape, or is not what statistics can be.
    """
    if name not in folder.names:
        return None
    where = f"{folder.path}: '{name}'"
    refuse_misfit(folder.kind, folder.shape(name), folder.axes.get(name, 1), shape, where)
    if folder.kind == "fisher":
        return FolderFisher(folder, name)
    return of_array(folder.array(name), shape, folder.kind, folder.axes.get(name, 1), where)


def of_array(values: Floats, shape: tuple[int, ...], kind: str, axis: int = 1, where: str = "statistics") -> Statistic:
    """Statistics that lie in memory.

    Args:
        values: for Fisher and moments what broadcasts against the weight, for a Gram matrix (inputs, inputs).
        shape: of the weight.
        axis: of the weight, over which the layer's inputs run.

    Raises:
        MergeError: as `of_folder`.
    """
    values = np.asarray(values, np.float32)
    refuse_misfit(kind, values.shape, axis, shape, where)
    if kind == "gram":
        return Gram(values, axis, where)
    return Repeated(values, shape, kind, where)


def refuse_misfit(kind: str, own: tuple[int, ...], axis: int, shape: tuple[int, ...], where: str) -> None:
    """Raises MergeError where statistics of shape `own` cannot be those of a weight of `shape`."""
    if kind == "gram":
        fits = axis < len(shape) == 2 and own == (shape[axis], shape[axis])
    else:
        fits = len(own) == len(shape) and all(n in (1, m) for n, m in zip(own, shape, strict=True))
    if not fits:
        mend = "make the statistics anew from this model"
        raise MergeError(
            f"statistics of shape {list(own)} do not fit a weight of {list(shape)}", where=where, mend=mend
        )


class FolderFisher:
    """A Fisher diagonal, streamed from its file."""

    kind = "fisher"

    def __init__(self, folder: Statistics, name: str) -> None:
        self._folder, self._name = folder, name

    def load(self, start: int, stop: int, values: Values, workspace: Workspace) -> None:
        host = values if workspace.kernels.on_host else workspace.raw(4 * (stop - start)).view(np.float32)
        self._folder.read(self._name, start, stop, host)
        refuse_impossible(host, f"{self._folder.path}: '{self._name}'")
        if host is not values:
            workspace.kernels.load(host.view(np.uint8), "F32", values)

    def gram(self) -> tuple[Floats, int]:
        raise AssertionError("a Fisher diagonal is no Gram matrix")


class Repeated:
    """Values in memory that repeat along the axes where their length is 1: of every element of the weight, its own."""

    def __init__(self, values: Floats, shape: tuple[int, ...], kind: str, where: str) -> None:
        refuse_impossible(values, where)
        self.kind = kind
        # As (before, own, after): runs of `after` equal elements, the whole again `before` times.
        long = [axis for axis, (n, m) in enumerate(zip(values.shape, shape, strict=True)) if n == m and m > 1]
        first, last = (long[0], long[-1]) if long else (0, -1)
        if any(values.shape[axis] != shape[axis] for axis in range(first, last + 1)):
            values = np.broadcast_to(values, shape)
            first, last = 0, len(shape) - 1
        self._values = np.ascontiguousarray(values).reshape(-1) if values.size else np.ones(1, np.float32)
        self._run = math.prod(shape[last + 1 :])

    def load(self, start: int, stop: int, values: Values, workspace: Workspace) -> None:
        on_host = workspace.kernels.on_host
        host = values if on_host else workspace.raw(4 * (stop - start)).view(np.float32)
        fill_repeated(self._values, self._run, start, host)
        if not on_host:
            workspace.kernels.load(host.view(np.uint8), "F32", values)

    def gram(self) -> tuple[Floats, int]:
        raise AssertionError("second moments are no Gram matrix")


class Gram:
    """A Gram matrix of a linear layer's inputs."""

    kind = "gram"

    def __init__(self, matrix: Floats, axis: int, where: str) -> None:
        if not np.isfinite(matrix).all() or (np.diagonal(matrix) < 0).any():
            raise MergeError("holds NaN, infinite or impossible values", where=where, mend="make the statistics anew")
        self._matrix, self._axis = matrix, axis

    def load(self, start: int, stop: int, values: Values, workspace: Workspace) -> None:
        raise AssertionError("a Gram matrix has no elements of the weight")

    def gram(self) -> tuple[Floats, int]:
        return self._matrix, self._axis


def fill_repeated(values: Floats, run: int, start: int, out: Floats) -> None:
    """Elements start … start + n of the endless sequence of `values`, each `run` times in a row, over and over. out (n,)."""
    if run > 1:
        first = start // run
        repeated = np.repeat(_cycled(values, first, (start + len(out) - 1) // run - first + 1), run)
        out[:] = repeated[start - first * run :][: len(out)]
    else:
        period, n = len(values), len(out)
        head = min(-start % period, n)
        out[:head] = values[start % period :][:head]
        rows = (n - head) // period
        out[head : head + rows * period].reshape(rows, period)[:] = values
        out[head + rows * period :] = values[: n - head - rows * period]


def _cycled(values: Floats, start: int, count: int) -> Floats:
    return values[np.arange(start, start + count) % len(values)]


def refuse_impossible(values: Floats, where: str) -> None:
    """Raises MergeError where importance is negative, NaN or infinite: of what is possible, the bits say so at once."""
    if (
        values.size
        and np.ascontiguousarray(values).view(np.uint32).max() >= _INFINITY
        and not (np.isfinite(values).all() and values.min() >= 0)
    ):
        raise MergeError("holds NaN, infinite or negative values", where=where, mend="make the statistics anew")
