"""Corrections: what a LoRA adapter does to the rows of one tensor of its base, in float32.

    W + s·B·A                                  LoRA
    m ⊙ (W + s·B·A) / ‖W + s·B·A‖              DoRA; the norm of each output's weights

Any range of rows can be asked for, in any order and by any number of threads; the result does not depend on it.

Source: arXiv 2106.09685 (LoRA), eq. 3; 2402.09353 (DoRA), eq. 5.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from merging.checkpoint import Checkpoint, TensorInfo

Matrix: TypeAlias = NDArray[np.float32]

_CACHE_BYTES = 16 << 20  # factors kept in memory for other threads; each thread keeps those of its tensor besides
_BLOCK_ELEMENTS = 1 << 16  # of the product of the factors that is in memory at once
_NORM_ELEMENTS = 1 << 20  # elements of the weight that are in memory at once while column norms are computed


class Correction:
    """What an adapter does to one tensor of its base.

    Attributes:
        columns: elements of a row of that tensor: the product of all axes but the first (1 where it has one axis).
    """

    columns: int

    def apply(self, weight: Matrix, first_row: int) -> None:
        """Turns rows of the base's tensor into rows of the merged one, in place.

        Args:
            weight: (rows, columns) float32, C-contiguous: rows `first_row`, `first_row` + 1, … of the base's tensor,
                seen as a matrix of its first axis by all others; for a tensor of one axis, (rows,) or (rows, 1).
            first_row: index of the first of these rows in the whole tensor, from 0.
        """
        raise NotImplementedError


class Loaded(NamedTuple):
    """The factors of one tensor: `left` (rows, r), `right` (r, columns)."""

    left: Matrix
    right: Matrix
    magnitude: Matrix | None  # DoRA's m, (outputs,)
    norms: Matrix | None  # ‖W + s·left·right‖ of each column, (columns,), where outputs are columns

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self if array is not None)


@dataclass(frozen=True)
class LowRank(Correction):
    """W + s·left·right, with DoRA's magnitude for each row or each column if there is one.

    left and right are B and A, or A and B transposed where the base stores its weight as (inputs, outputs).
    """

    info: TensorInfo
    a: TensorInfo  # (r, inputs, …)
    b: TensorInfo  # (outputs, r, …)
    transposed: bool
    scale: float
    magnitude: TensorInfo | None
    factors: Factors

    @property
    def columns(self) -> int:  # type: ignore[override]
        return math.prod(self.info.shape[1:])

    def apply(self, weight: Matrix, first_row: int) -> None:
        rows = weight.reshape(-1, self.columns)
        loaded = self.factors.get(self)
        self._add_delta(rows, loaded, first_row)
        if loaded.magnitude is None:
            return
        with np.errstate(divide="ignore", invalid="ignore"):  # a direction of length 0 has none: NaN, as in peft
            if loaded.norms is not None:
                rows *= loaded.magnitude / loaded.norms  # (columns,)
            else:
                length = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64)).astype(np.float32)
                rows *= (loaded.magnitude[first_row : first_row + len(rows)] / length)[:, None]  # (rows, 1)

    def load(self, source: Checkpoint) -> Loaded:
        """Reads the factors, and for DoRA with outputs as columns the whole weight once."""
        a = source.read(self.a).reshape(self.a.shape[0], -1)  # (r, inputs)
        b = source.read(self.b).reshape(self.b.shape[0], -1)  # (outputs, r)
        left, right = (a.T, b.T) if self.transposed else (b, a)
        if self.magnitude is None:
            return Loaded(left, right, None, None)
        loaded = Loaded(left, right, source.read(self.magnitude).reshape(-1), None)
        return loaded._replace(norms=self._column_norms(source, loaded)) if self.transposed else loaded

    def _add_delta(self, rows: Matrix, loaded: Loaded, first_row: int) -> None:
        # Always the same blocks of rows, whatever rows are asked for: BLAS sums in another order in other shapes.
        step = max(1, min(64, _BLOCK_ELEMENTS // max(1, self.columns)))
        done = 0
        while done < len(rows):
            block, inside = divmod(first_row + done, step)
            delta = self.factors.block(self, block)
            if delta is None:
                delta = loaded.left[block * step : (block + 1) * step] @ loaded.right
                delta *= np.float32(self.scale)
                self.factors.keep_block(self, block, delta)
            part = rows[done : done + len(delta) - inside]
            part += delta[inside : inside + len(part)]
            done += len(part)

    def _column_norms(self, source: Checkpoint, loaded: Loaded) -> Matrix:
        count = self.info.shape[0]
        step = max(1, _NORM_ELEMENTS // max(1, self.columns))
        squares = np.zeros(self.columns, np.float64)
        for first in range(0, count, step):
            rows = read_rows(source, self.info, first, min(step, count - first))
            self._add_delta(rows, loaded, first)
            squares += np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        return np.sqrt(squares).astype(np.float32)


@dataclass(frozen=True)
class BiasShift(Correction):
    """bias + s·(bias of B), of an adapter trained with `lora_bias`."""

    bias: TensorInfo
    scale: float
    source: Checkpoint
    columns: int = 1

    def apply(self, weight: Matrix, first_row: int) -> None:
        values = weight.reshape(-1)
        values += self.source.read(self.bias)[first_row : first_row + len(values)] * np.float32(self.scale)


class Factors:
    """Loaded factors of the tensors in work. Thread-safe."""

    def __init__(self, source: Checkpoint) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()  # the least recently used first
        self._own = threading.local()  # each thread's tensor, its factors and its latest block of their product

    def get(self, low_rank: LowRank) -> Loaded:
        name = low_rank.info.name
        if getattr(self._own, "name", None) == name:
            own: Loaded = self._own.loaded
            return own
        with self._lock:  # held while loading: other threads on the same tensor wait instead of reading it again
            if name not in self._loaded:
                self._loaded[name] = low_rank.load(self._source)
                while len(self._loaded) > 1 and sum(entry.nbytes for entry in self._loaded.values()) > _CACHE_BYTES:
                    self._loaded.popitem(last=False)
            self._loaded.move_to_end(name)
            self._own.name, self._own.loaded = name, self._loaded[name]
            return self._loaded[name]

    def block(self, low_rank: LowRank, block: int) -> Matrix | None:
        """This thread's latest block of s·left·right, if it is that one: chunks come in order and may end within it."""
        name, number, delta = getattr(self._own, "block", ("", -1, None))
        return delta if (name, number) == (low_rank.info.name, block) else None

    def keep_block(self, low_rank: LowRank, block: int, delta: Matrix) -> None:
        self._own.block = (low_rank.info.name, block, delta)


def read_rows(source: Checkpoint, info: TensorInfo, first: int, count: int) -> Matrix:
    """Rows `first` … `first + count` - 1 of a tensor as (count, cols) float32, cols all axes but the first."""
    from merging.kernels import reference

    cols = math.prod(info.shape[1:])
    width = info.nbytes // max(1, info.shape[0])  # bytes per row
    raw = np.empty(count * width, np.uint8)
    source.read_into(info, first * width, raw.data)
    values = np.empty(count * cols, np.float32)
    reference.load(raw, info.dtype, values)
    return values.reshape(count, cols)
