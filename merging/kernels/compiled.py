"""The chunk kernels that pay, compiled by numba; the rest are numpy's own.

Every kernel has one eager signature and a cache on disk, so a run pays the compiler once per machine, and none uses fast
math: each gives `reference`'s float32 results bit for bit. They release the interpreter lock.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import boolean, float32, int64, uint16, uint32, uint64, void
from numpy.typing import NDArray

from merging.kernels import reference
from merging.kernels.reference import (
    Floats,
    empty,
    gram,
    l1,
    on_host,
    rank_probabilities,
    row_gram,
    to_host,
    uniform_bits,
    vector,
    xp,
)

__all__ = [
    "combine", "drop", "drop_above", "drop_by_rank", "elect", "empty", "fine_histogram", "finite", "gram",
    "histogram", "keep_above", "l1", "load", "on_host", "row_gram", "split_ties", "store", "to_host", "uniform_bits", "vector", "xp",
]  # fmt: skip

_LANE = 1024  # elements per inner block: the temporaries of a block stay in the first-level cache


def _compile(*signatures: Any) -> Any:
    return numba.njit(list(signatures), nogil=True, cache=True, boundscheck=False, error_model="numpy")


@_compile(boolean(uint16[::1], uint32[::1]))
def _load_bf16(raw, bits):
    top = np.uint16(0)
    for i in range(raw.size):
        top = max(top, np.uint16(raw[i] & np.uint16(0x7FFF)))
        bits[i] = np.uint32(raw[i]) << np.uint32(16)
    return top < 0x7F80


@_compile(boolean(uint32[::1]))
def _finite(bits):
    top = np.uint32(0)
    for i in range(bits.size):
        top = max(top, np.uint32(bits[i] & np.uint32(0x7FFFFFFF)))
    return top < 0x7F800000


@_compile(boolean(uint32[::1], uint16[::1]))
def _store_bf16(bits, raw):
    top = np.uint32(0)
    for i in range(bits.size):
        b = bits[i]
        rounded = np.uint32(np.uint32(b + np.uint32(0x7FFF)) + np.uint32(np.uint32(b >> np.uint32(16)) & np.uint32(1)))
        top = max(top, max(np.uint32(b & np.uint32(0x7FFFFFFF)), np.uint32(rounded & np.uint32(0x7FFFFFFF))))
        raw[i] = np.uint16(rounded >> np.uint32(16))
    return top < 0x7F800000


def load(raw: NDArray[np.uint8], dtype: str, values: Floats) -> bool:
    if dtype == "BF16":
        return bool(_load_bf16(raw.view(np.uint16), values.view(np.uint32)))
    if dtype == "F32" and raw.ctypes.data == values.ctypes.data:  # read in place, nothing to convert
        return finite(values)
    return reference.load(raw, dtype, values)


def finite(values: Floats) -> bool:
    return bool(_finite(values.view(np.uint32)))


def store(values: Floats, dtype: str, raw: NDArray[np.uint8]) -> bool:
    if dtype == "BF16":
        return bool(_store_bf16(values.view(np.uint32), raw.view(np.uint16)))
    return reference.store(values, dtype, raw)


@_compile(void(float32[::1], float32[:, ::1], float32[::1]))
def combine(weights, values, out):
    for start in range(0, out.size, _LANE):
        stop = min(start + _LANE, out.size)
        for i in range(start, stop):
            out[i] = values[0, i] * weights[0]
        for k in range(1, weights.size):
            w = weights[k]
            for i in range(start, stop):
                out[i] += values[k, i] * w


@_compile(int64[::1](uint32[::1]))
def _histogram(bits):
    counts = np.zeros((4, 1 << 15), np.int64)  # four tables: equal neighbours do not wait for each other's store
    whole = bits.size - bits.size % 4
    for i in range(0, whole, 4):
        counts[0, (bits[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(16)] += 1
        counts[1, (bits[i + 1] & np.uint32(0x7FFFFFFF)) >> np.uint32(16)] += 1
        counts[2, (bits[i + 2] & np.uint32(0x7FFFFFFF)) >> np.uint32(16)] += 1
        counts[3, (bits[i + 3] & np.uint32(0x7FFFFFFF)) >> np.uint32(16)] += 1
    for i in range(whole, bits.size):
        counts[0, (bits[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(16)] += 1
    return counts.sum(axis=0)


@_compile(int64[::1](uint32[::1], uint32))
def _fine_histogram(bits, high):
    counts = np.zeros(1 << 16, np.int64)
    for i in range(bits.size):
        b = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        if b >> np.uint32(16) == high:
            counts[b & np.uint32(0xFFFF)] += 1
    return counts


def histogram(values: Floats) -> NDArray[np.int64]:
    return _histogram(values.view(np.uint32))


def fine_histogram(values: Floats, high: int) -> NDArray[np.int64]:
    return _fine_histogram(values.view(np.uint32), np.uint32(high))


@_compile(void(uint32[::1], uint32))
def _keep_above(bits, threshold):
    for i in range(bits.size):
        bits[i] = bits[i] if np.uint32(bits[i] & np.uint32(0x7FFFFFFF)) >= threshold else np.uint32(0)


@_compile(void(uint32[::1], uint32))
def _drop_above(bits, threshold):
    for i in range(bits.size):
        bits[i] = bits[i] if np.uint32(bits[i] & np.uint32(0x7FFFFFFF)) <= threshold else np.uint32(0)


@_compile(int64(uint32[::1], uint32, int64, boolean))
def _split_ties(bits, threshold, remaining, keep_first):
    for i in range(bits.size):
        if np.uint32(bits[i] & np.uint32(0x7FFFFFFF)) == threshold:
            if (remaining > 0) != keep_first:
                bits[i] = np.uint32(0)
            remaining = max(remaining - 1, 0)
    return remaining


def keep_above(values: Floats, threshold: int) -> None:
    _keep_above(values.view(np.uint32), np.uint32(threshold))


def drop_above(values: Floats, threshold: int) -> None:
    _drop_above(values.view(np.uint32), np.uint32(threshold))


def split_ties(values: Floats, threshold: int, remaining: int, keep_first: bool) -> int:
    return int(_split_ties(values.view(np.uint32), np.uint32(threshold), remaining, keep_first))


@numba.njit(uint64(uint64, uint64), inline="always")
def _bits(key, index):
    z = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) >> np.uint64(32)


@_compile(void(float32[::1], uint64, float32, uint64, uint64))
def _drop(values, threshold, scale, key, start):
    for i in range(values.size):
        kept = _bits(key, start + np.uint64(i)) < threshold
        values[i] = values[i] * (scale if kept else np.float32(0))


def drop(values: Floats, keep: float, scale: float, key: int, start: int) -> None:
    _drop(values, np.uint64(round(keep * 2**32)), np.float32(scale), np.uint64(key), np.uint64(start))


@_compile(void(uint32[::1], int64, uint64[::1], float32[::1], uint64, uint64))
def _drop_by_rank(bits, columns, thresholds, scales, key, start):
    """A stable radix sort of each row's (magnitude, position) pairs; rank by rank, keep or zero."""
    pairs = np.empty(columns, np.uint64)
    other = np.empty(columns, np.uint64)
    counts = np.empty((3, 2048), np.int64)
    values = bits.view(np.float32)
    for row in range(bits.size // columns):
        offset = row * columns
        counts[:] = 0
        for c in range(columns):
            b = np.uint64(bits[offset + c] & np.uint32(0x7FFFFFFF))
            pairs[c] = (b << np.uint64(32)) | np.uint64(c)
            counts[0, b & np.uint64(2047)] += 1
            counts[1, (b >> np.uint64(11)) & np.uint64(2047)] += 1
            counts[2, b >> np.uint64(22)] += 1
        for digit in range(3):
            position = 0
            for d in range(2048):
                position, counts[digit, d] = position + counts[digit, d], position
            shift = np.uint64(32 + 11 * digit)
            for c in range(columns):
                d = (pairs[c] >> shift) & np.uint64(2047)
                other[counts[digit, d]] = pairs[c]
                counts[digit, d] += 1
            pairs, other = other, pairs
        for rank in range(columns):
            i = offset + np.int64(pairs[rank] & np.uint64(0xFFFFFFFF))
            kept = _bits(key, start + np.uint64(i)) < thresholds[rank]
            values[i] = values[i] * (scales[rank] if kept else np.float32(0))


def drop_by_rank(values: Floats, columns: int, low: float, high: float, rescale: bool, key: int, start: int) -> None:
    keep = rank_probabilities(columns, low, high)
    thresholds = (keep * 2.0**32).astype(np.uint64)
    scales = (1.0 / keep).astype(np.float32) if rescale else np.ones(columns, np.float32)
    _drop_by_rank(values.view(np.uint32), columns, thresholds, scales, np.uint64(key), np.uint64(start))


@_compile(void(float32[:, ::1], float32[::1], boolean, float32[::1]))
def _elect(deltas, weights, normalize, out):
    total = np.empty(_LANE, np.float32)
    divisor = np.empty(_LANE, np.float32)
    for start in range(0, out.size, _LANE):
        n = min(_LANE, out.size - start)
        for i in range(n):
            total[i] = deltas[0, start + i] * weights[0]
            divisor[i] = np.float32(0)
            out[start + i] = np.float32(0)
        for k in range(1, weights.size):
            for i in range(n):
                total[i] += deltas[k, start + i] * weights[k]
        for k in range(weights.size):
            w = weights[k]
            for i in range(n):
                d = deltas[k, start + i] * w
                agrees = (d > 0) if total[i] >= 0 else (d < 0)
                out[start + i] += d if agrees else np.float32(0)
                divisor[i] += w if agrees else np.float32(0)
        if normalize:
            for i in range(n):
                out[start + i] /= np.float32(1) if divisor[i] == 0 else divisor[i]


def elect(deltas: Floats, weights: Floats, normalize: bool, out: Floats) -> None:
    _elect(deltas, weights, normalize, out)


