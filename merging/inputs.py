"""Inputs: what a merge method sees of one tensor — every model's values as a stream of chunks, and reductions over it.

A method makes as many passes as it needs (`gram`, `cuts`, `total` …), then returns a `Final`: a function from a chunk to the
merged values of that chunk. Nothing here knows whether the values come from a file, from memory or lie on a GPU, and
no pass holds more than one chunk, whatever the size of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

#: A chunk's values: float32, on whatever device the kernels run (numpy or torch).
Values: TypeAlias = Any
CACHE_BYTES = 3 << 20  # what one chunk of all models takes on the CPU: small enough for the cache, worth its overhead
SMALL = 1 << 18  # elements up to which all models' vectors of a tensor may be held at once


class Tensor(Protocol):
    """One model's values of one tensor."""

    def load(self, start: int, stop: int, values: Values, workspace: Workspace) -> bool:
        """Fills `values` (stop − start,) with those elements as float32. False if any is NaN or infinite."""


class Statistic(Protocol):
    """What is known of one model's weights in one tensor, see `merging.weight_statistics`."""

    kind: str  # "fisher", "moments" or "gram"

    def load(self, start: int, stop: int, values: Values, workspace: Workspace) -> None:
        """Fills `values` (stop − start,) with the importance of those elements: at least 0, finite; not of a Gram matrix."""

    def gram(self) -> tuple[NDArray[np.float32], int]:
        """A Gram matrix of the layer's inputs (inputs, inputs), and the axis of the tensor over which the inputs run."""


class NonFinite(Exception):
    """A model's tensor holds NaN or infinity. `index` is the model's place, −1 the base's."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class Workspace:
    """One worker's kernels and buffers, reused from tensor to tensor.

    Args:
        kernels: see `merging.kernels`.
        capacity: floats in all that one chunk may take.
    """

    def __init__(self, kernels: Any, capacity: int = CACHE_BYTES // 4) -> None:
        self.kernels, self.capacity = kernels, capacity
        self._floats: Values = None
        self._raw = kernels.host_buffer(0)

    def floats(self, count: int) -> Values:
        """A flat buffer of at least `count` float32."""
        if self._floats is None or len(self._floats) < count:
            self._floats = self.kernels.empty((count,))
        return self._floats

    def raw(self, nbytes: int) -> NDArray[np.uint8]:
        """A host buffer of exactly `nbytes` bytes."""
        if len(self._raw) < nbytes:
            self._raw = self.kernels.host_buffer(max(nbytes, 1 << 18))
        return np.asarray(self._raw[:nbytes])


@dataclass
class Chunk:
    """Elements start … stop of one tensor. `models` (k, n) and `base` (n,) may be changed in place; `out` (n,) is free.

    `statistics` (k, n), where they were asked for, are the models' importances of these elements, 1 for a model that has none
    of this tensor; they may be changed too. A method that takes every coordinate from one model leaves in `owners` (n,)
    whose it is: 0 for the base's, i for the i-th model's.
    """

    start: int
    stop: int
    models: Values
    base: Values | None
    stack: Values  # (k + 1, n): the base, where there is one, above the models; else the models
    out: Values
    statistics: Values = None
    owners: Values = None

    def deltas(self) -> Values:
        """The task vectors θᵢ − θ₀ (k, n), computed in place of the models."""
        self.models -= self.base
        return self.models


@dataclass(frozen=True)
class Final:
    """The last pass: `run` turns a chunk, made of whole rows of `columns` elements, into its merged values.

    `statistics`: whether the chunks come with the models' statistics. `factors` (k,), where all that `run` does is a weighted
    sum: Σ factorsᵢθᵢ, or θ₀ + Σ factorsᵢτᵢ (`of_deltas`); whoever holds the models in memory may then take it in one pass.
    """

    run: Callable[[Chunk], Values]
    columns: int = 1
    statistics: bool = False
    factors: Values = None
    of_deltas: bool = False


@dataclass(frozen=True)
class Cut:
    """The k largest magnitudes of a vector: all above `threshold` (float32 bits), and the first `keep` of `ties` equal to it."""

    threshold: int
    keep: int
    ties: int


class Inputs:
    """All models' values of one tensor.

    Args:
        workspace: the worker's buffers and kernels.
        models: k ≥ 1 tensors.
        base: the base's tensor, or None.
        shape: of the tensor, the same for all.
        key: from an index of a model to the key of its random stream for this tensor.
        surveys: what the method's survey gathered over the whole model, a list with one array a stage.
        whole_rows: chunks must hold whole rows, because an input is computed by rows (a LoRA correction).
        statistics: of each model, or None where it has none of this tensor; empty where the recipe names none.
        note: called with what the user should know, and whether it holds of the whole model; else of this tensor. In words
            that are the same for every tensor: each is told once.
    """

    def __init__(
        self,
        workspace: Workspace,
        models: Sequence[Tensor],
        base: Tensor | None,
        shape: tuple[int, ...],
        key: Callable[[int], int],
        surveys: Sequence[NDArray[Any]] = (),
        whole_rows: bool = False,
        statistics: Sequence[Statistic | None] = (),
        note: Callable[[str, bool], None] = lambda text, of_all: None,
    ) -> None:
        self.workspace, self.models, self.base, self.shape, self.key = workspace, models, base, shape, key
        self.surveys = surveys
        self.kernels = workspace.kernels
        self.numel = math.prod(shape)
        #: Length of a row: of the last dimension, and of all but the first (a filter's weights).
        self.columns = shape[-1] if shape else 1
        self.filter_size = math.prod(shape[1:]) if len(shape) > 1 else self.numel
        self.statistics = statistics
        self._note = note
        self._whole_rows = whole_rows

    # ---- passes ----

    def chunks(
        self,
        columns: int = 1,
        models: Sequence[int] | None = None,
        statistics: bool = False,
        weights: bool = True,
    ) -> Iterator[Chunk]:
        """Goes over the tensor once, in order; every chunk holds whole rows of `columns` elements.

        Args:
            models: read these alone, and the base; by default all.
            statistics: read the models' statistics too.
            weights: read the models and the base; else what the chunk says of them is undefined.

        Raises:
            NonFinite: a value is NaN or infinite.
        """
        columns = max(columns, self.filter_size if self._whole_rows else 1, 1)
        chosen = range(len(self.models)) if models is None else models
        count, has_base = len(chosen), self.base is not None
        rows = count + has_base
        held = rows + 1 + (count if statistics else 0)
        size = max(1, self.workspace.capacity // (held * columns)) * columns
        buffer = self.workspace.floats(min(size, self.numel) * held)
        for start in range(0, self.numel, size):
            stop = min(start + size, self.numel)
            n = stop - start
            stack = buffer[: rows * n].reshape(rows, n)
            out = buffer[rows * n : (rows + 1) * n]
            if weights and self.base is not None and not self.base.load(start, stop, stack[0], self.workspace):
                raise NonFinite(-1)
            for row, index in enumerate(chosen, int(has_base)):
                if weights and not self.models[index].load(start, stop, stack[row], self.workspace):
                    raise NonFinite(index)
            chunk = Chunk(start, stop, stack[int(has_base) :], stack[0] if has_base else None, stack, out)
            if statistics:
                chunk.statistics = buffer[(rows + 1) * n : held * n].reshape(count, n)
                for row, index in enumerate(chosen):
                    self._load_statistic(index, start, stop, chunk.statistics[row])
            yield chunk

    def _load_statistic(self, index: int, start: int, stop: int, values: Values) -> None:
        statistic = self.statistics[index] if self.statistics else None
        if statistic is None:
            values[:] = 1.0
        else:
            statistic.load(start, stop, values, self.workspace)

    def gram(self, deltas: bool = False, with_base: bool = False) -> NDArray[np.float64]:
        """Inner products, in float64, of the models, of their task vectors, or of base and models: (k, k)."""
        size = len(self.models) + with_base
        total = np.zeros((size, size))
        for chunk in self.chunks():
            values = chunk.stack if with_base else chunk.deltas() if deltas else chunk.models
            total += self.kernels.gram(values)
        return total

    def row_grams(self, columns: int, deltas: bool) -> NDArray[np.float64]:
        """As `gram`, for each row of `columns` elements by itself: (k, k, rows)."""
        parts = [
            self.kernels.row_gram((c.deltas() if deltas else c.models).reshape(len(self.models), -1, columns), 2)
            for c in self.chunks(columns)
        ]
        return np.concatenate(parts, axis=2) if parts else np.zeros((len(self.models), len(self.models), 0))

    def column_grams(self, columns: int, deltas: bool) -> NDArray[np.float64]:
        """As `gram`, for each column of the tensor seen as rows of `columns` elements: (k, k, columns)."""
        total = np.zeros((len(self.models), len(self.models), columns))
        for c in self.chunks(columns):
            values = c.deltas() if deltas else c.models
            total += self.kernels.row_gram(values.reshape(len(self.models), -1, columns), 1)
        return total

    @property
    def known(self) -> list[bool]:
        """Of each model, whether there are statistics of this tensor."""
        return [bool(self.statistics) and self.statistics[i] is not None for i in range(len(self.models))]

    def saliency(self, chunk: Chunk) -> Values:
        """√h·τ (k, n) of a chunk read with its statistics h, after `deltas()`, in their place: ranks as ½hτ² does.

        Where a model has no statistics its task vector comes back: saliency is the magnitude.
        """
        for deltas, importance in zip(chunk.models, chunk.statistics, strict=True):
            self.kernels.saliency(deltas, importance)
        return chunk.statistics

    def note(self, text: str, of_all: bool = False) -> None:
        """Tells the user something of this tensor, or `of_all` of the model; each text once, with the tensors' names."""
        self._note(text, of_all)

    def total(self, function: Callable[[Chunk], Any], columns: int = 1, statistics: bool = False) -> Any:
        """The sum over all chunks of what `function` returns (numbers or host arrays)."""
        return sum((function(chunk) for chunk in self.chunks(columns, statistics=statistics)), start=0.0)

    def cuts(
        self,
        values: Callable[[Chunk], Sequence[Values]],
        largest: Sequence[Sequence[int]],
        columns: int = 1,
        models: Sequence[int] | None = None,
        statistics: bool = False,
    ) -> list[list[Cut]]:
        """Exact selection without a sort: where to cut to keep the k largest magnitudes.

        Two passes that count by the upper and the lower bits of the magnitude; one where the vectors fit in memory.

        Args:
            values: from a chunk to one float32 vector for each entry of `largest`; it may work in place.
            largest: for each of the vectors, the ks, each between 0 and numel.
            columns, models, statistics: as in `chunks`.
        """
        kernels = self.kernels
        if self.numel <= SMALL:
            whole = kernels.empty((len(largest), self.numel))
            for chunk in self.chunks(columns, models, statistics):
                for row, vector in zip(whole, values(chunk), strict=True):
                    row[chunk.start : chunk.stop] = vector
            return [[Cut(*kernels.select(row, k)) for k in ks] for row, ks in zip(whole, largest, strict=True)]
        coarse = np.zeros((len(largest), 1 << 15), np.int64)
        for chunk in self.chunks(columns, models, statistics):
            for counts, vector in zip(coarse, values(chunk), strict=True):
                kernels.histogram(vector, counts)
        bins = [[coarse_bin(counts, k) for k in ks] for counts, ks in zip(coarse, largest, strict=True)]
        fine = {(i, high): np.zeros(1 << 16, np.int64) for i, row in enumerate(bins) for high, _ in row}
        for chunk in self.chunks(columns, models, statistics):
            vectors = values(chunk)
            for (i, high), counts in fine.items():
                kernels.fine_histogram(vectors[i], high, counts)
        return [[fine_cut(fine[i, high], high << 16, rest) for high, rest in row] for i, row in enumerate(bins)]

    # ---- final passes ----

    def combine(self, weights: Sequence[float]) -> Final:
        """Σ wᵢθᵢ."""
        factors = self._vector(weights)

        def run(chunk: Chunk) -> Values:
            self.kernels.combine(factors, chunk.models, chunk.out)
            return chunk.out

        return Final(run, factors=factors)

    def add_deltas(self, weights: Sequence[float]) -> Final:
        """θ₀ + Σ wᵢτᵢ."""
        factors = self._vector(weights)

        def run(chunk: Chunk) -> Values:
            self.kernels.combine(factors, chunk.deltas(), chunk.out)
            chunk.out += chunk.base
            return chunk.out

        return Final(run, factors=factors, of_deltas=True)

    def map(self, formula: Callable[..., Values]) -> Final:
        """Elementwise: `formula(xp, base, models)`, base (n,) or None and models (k, n), in numpy or torch alike (`xp`)."""
        return Final(lambda chunk: formula(self.kernels.xp, chunk.base, chunk.models))

    def apply(self, final: Final) -> Iterator[tuple[Chunk, Values]]:
        """Runs the last pass: each chunk and its merged values."""
        for chunk in self.chunks(final.columns, statistics=final.statistics):
            yield chunk, self.kernels.narrow(final.run(chunk))

    def _vector(self, weights: Sequence[float]) -> Values:
        return self.kernels.vector(weights)


def coarse_bin(counts: NDArray[np.int64], k: int) -> tuple[int, int]:
    """The bin (upper 15 bits of the magnitude) where the k-th largest lies, and which of that bin's largest it is."""
    above = np.cumsum(counts[::-1])
    position = int(np.searchsorted(above, max(k, 1)))
    high = len(counts) - 1 - min(position, len(counts) - 1)
    return high, k - int(above[position] - counts[high] if position < len(counts) else 0)


def fine_cut(counts: NDArray[np.int64], low: int, k: int) -> Cut:
    """The cut that keeps the k largest, from the counts of the magnitudes from `low` on; k = 0 keeps nothing."""
    if k <= 0 or not counts.any():
        return Cut(0x7FFFFFFF, 0, 0)
    blocks = np.add.reduceat(counts, np.arange(0, len(counts), 1024))
    block, k = coarse_bin(blocks, k)
    place, k = coarse_bin(counts[1024 * block : 1024 * (block + 1)], k)
    place += 1024 * block
    return Cut(low + place, k, int(counts[place]))


class Trim:
    """Zeroes, in place and chunk by chunk in order, all but the magnitudes ranked inner … outer of a vector, largest first.

    Ties at a cut go by position: the first count as larger. Holds how many ties are left; a pass starts at element 0.
    """

    def __init__(self, kernels: Any, outer: Cut, inner: Cut | None = None) -> None:
        self._kernels, self._outer, self._inner = kernels, outer, inner
        self._left_outer = self._left_inner = 0

    def __call__(self, values: Values, start: int) -> None:
        kernels, outer, inner = self._kernels, self._outer, self._inner
        if start == 0:
            self._left_outer, self._left_inner = outer.keep, inner.keep if inner else 0
        kernels.keep_above(values, outer.threshold)
        if inner:
            kernels.drop_above(values, inner.threshold)
        if outer.keep < outer.ties:
            self._left_outer = kernels.split_ties(values, outer.threshold, self._left_outer, True)
        if inner and inner.keep:
            self._left_inner = kernels.split_ties(values, inner.threshold, self._left_inner, False)
