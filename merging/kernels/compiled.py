"""The chunk kernels that pay, compiled by numba; the rest are numpy's own.

Every kernel has one eager signature and a cache on disk, so a run pays the compiler once per machine, and none uses fast
math: each gives `reference`'s float32 results bit for bit. They release the interpreter lock.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from numba import boolean, float32, float64, int64, uint8, uint16, uint32, uint64, void
from numba.extending import intrinsic
from numpy.typing import NDArray

from merging.kernels import reference
from merging.kernels.reference import (
    Bytes,
    Floats,
    cholesky,
    empty,
    host_buffer,
    l1,
    narrow,
    no_owners,
    on_host,
    rank_probabilities,
    row_gram,
    solve,
    to_host,
    uniform_bits,
    vector,
    wide,
    xp,
)

__all__ = [
    "blend", "blend_deltas", "cholesky", "claim", "combine", "drop", "drop_above", "drop_by_rank", "drop_owned", "elect", "empty",
    "fine_histogram", "finite", "gram", "histogram", "host_buffer", "keep_above", "keep_largest_in_rows", "keep_where",
    "l1", "load", "narrow", "no_owners", "on_host", "row_gram", "saliency", "select", "sign_counts", "solve",
    "split_ties", "store", "take", "to_host", "uniform_bits", "vector", "weigh", "weigh_deltas", "wide", "xp",
]  # fmt: skip

_LANE = 1024  # elements per inner block: the temporaries of a block stay in the first-level cache


def _compile(signature: Any, **options: Any) -> Any:
    """A decorator: the function is compiled, or loaded from the cache, when it is first called.

    A merge needs few of the kernels, and each costs some 20 ms to load.
    """

    def decorate(function: Any) -> Any:
        @functools.cache
        def compiled() -> Any:
            return numba.njit([signature], nogil=True, cache=True, error_model="numpy", **options)(function)

        return functools.wraps(function)(lambda *arguments: compiled()(*arguments))

    return decorate


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
        block = out[start : start + _LANE]
        row, w = values[0, start : start + _LANE], weights[0]
        for i in range(block.size):
            block[i] = row[i] * w
        for k in range(1, weights.size):
            row, w = values[k, start : start + _LANE], weights[k]
            for i in range(block.size):
                block[i] += row[i] * w


@intrinsic
def _as_float(context, bits):
    """uint32 bits as the float32 that they are."""
    return float32(uint32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], context.get_value_type(float32)
    )


@numba.njit(inline="always")
def _wide(bits):
    return _as_float(np.uint32(np.uint32(bits) << np.uint32(16)))


@_compile(boolean(float32[::1], float32[:, ::1], float32[::1], boolean, int64, float32[::1], uint32[::1]))
def _blend(factors, models, base, of_deltas, start, out, bits):
    """Three rows at a time, added from left to right: one after the other in the same roundings, in fewer passes."""
    top = np.uint32(0)
    head = (factors.size - 1) % 3 + 1
    zero = np.zeros(_LANE, np.float32)  # x − 0 is x to the bit
    for first in range(0, out.size, _LANE):
        block, own = out[first : first + _LANE], bits[first : first + _LANE]
        begin = start + first
        end = begin + block.size
        origin = base[begin:end] if of_deltas else zero[: block.size]
        a, b, c = models[0, begin:end], models[head // 2, begin:end], models[head - 1, begin:end]
        u, v, w = factors[0], factors[head // 2], factors[head - 1]
        if head == 1:
            for i in range(block.size):
                block[i] = (a[i] - origin[i]) * u
        elif head == 2:
            for i in range(block.size):
                block[i] = (a[i] - origin[i]) * u + (c[i] - origin[i]) * w
        else:
            for i in range(block.size):
                block[i] = (a[i] - origin[i]) * u + (b[i] - origin[i]) * v + (c[i] - origin[i]) * w
        for k in range(head, factors.size, 3):
            a, b, c = models[k, begin:end], models[k + 1, begin:end], models[k + 2, begin:end]
            u, v, w = factors[k], factors[k + 1], factors[k + 2]
            for i in range(block.size):
                block[i] = block[i] + (a[i] - origin[i]) * u + (b[i] - origin[i]) * v + (c[i] - origin[i]) * w
        if of_deltas:
            for i in range(block.size):
                block[i] += origin[i]
        for i in range(own.size):
            top = max(top, np.uint32(own[i] & np.uint32(0x7FFFFFFF)))
    return top < 0x7F800000


@_compile(boolean(float32[::1], uint16[:, ::1], float32[::1], float32, int64, float32[::1], uint32[::1]))
def _blend_bf16(factors, deltas, base, scale, start, out, bits):
    top = np.uint32(0)
    head = (factors.size - 1) % 3 + 1
    for first in range(0, out.size, _LANE):
        block, own = out[first : first + _LANE], bits[first : first + _LANE]
        begin = start + first
        end = begin + block.size
        a, b, c = deltas[0, begin:end], deltas[head // 2, begin:end], deltas[head - 1, begin:end]
        u, v, w = factors[0], factors[head // 2], factors[head - 1]
        if head == 1:
            for i in range(block.size):
                block[i] = _wide(a[i]) * u
        elif head == 2:
            for i in range(block.size):
                block[i] = _wide(a[i]) * u + _wide(c[i]) * w
        else:
            for i in range(block.size):
                block[i] = _wide(a[i]) * u + _wide(b[i]) * v + _wide(c[i]) * w
        for k in range(head, factors.size, 3):
            a, b, c = deltas[k, begin:end], deltas[k + 1, begin:end], deltas[k + 2, begin:end]
            u, v, w = factors[k], factors[k + 1], factors[k + 2]
            for i in range(block.size):
                block[i] = block[i] + _wide(a[i]) * u + _wide(b[i]) * v + _wide(c[i]) * w
        origin = base[begin:end]
        for i in range(block.size):
            block[i] += origin[i] * scale
        for i in range(own.size):
            top = max(top, np.uint32(own[i] & np.uint32(0x7FFFFFFF)))
    return top < 0x7F800000


def blend(factors: Floats, models: Floats, base: Floats | None, start: int, out: Floats) -> bool:
    of_deltas = base is not None
    return bool(_blend(factors, models, base if of_deltas else factors, of_deltas, start, out, out.view(np.uint32)))


def blend_deltas(factors: Floats, deltas: NDArray[Any], base: Floats, scale: float, start: int, out: Floats) -> bool:
    if deltas.dtype != np.uint16:
        return reference.blend_deltas(factors, deltas, base, scale, start, out)
    return bool(_blend_bf16(factors, deltas, base, np.float32(scale), start, out, out.view(np.uint32)))


@_compile(float64[:, ::1](float32[:, ::1]), fastmath={"reassoc", "contract"})
def gram(values):
    """As `reference.gram`; float64 sums may be taken in another order."""
    count, size = values.shape
    total = np.zeros((count, count))
    for start in range(0, size, _LANE):
        for i in range(count):
            left = values[i, start : start + _LANE]
            for j in range(i, count):
                right = values[j, start : start + _LANE]
                inner = 0.0
                for n in range(left.size):
                    inner += np.float64(left[n]) * np.float64(right[n])
                total[i, j] += inner
    for i in range(count):
        for j in range(i):
            total[i, j] = total[j, i]
    return total


@_compile(void(uint32[::1], int64[::1]))
def _histogram(bits, counts):
    for i in range(bits.size):
        counts[(bits[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(16)] += 1


@_compile(void(uint32[::1], uint32, int64[::1]))
def _fine_histogram(bits, high, counts):
    first, last = np.uint32(high << np.uint32(16)), np.uint32(high << np.uint32(16)) + np.uint32(0xFFFF)
    for start in range(0, bits.size, 64):
        block = bits[start : start + 64]
        hits = 0
        for i in range(block.size):
            b = np.uint32(block[i] & np.uint32(0x7FFFFFFF))
            hits += (b >= first) & (b <= last)
        if hits:
            for i in range(block.size):
                b = np.uint32(block[i] & np.uint32(0x7FFFFFFF))
                if (b >= first) & (b <= last):
                    counts[b & np.uint32(0xFFFF)] += 1


def histogram(values: Floats, counts: NDArray[np.int64]) -> None:
    _histogram(values.view(np.uint32), counts)


def fine_histogram(values: Floats, high: int, counts: NDArray[np.int64]) -> None:
    _fine_histogram(values.view(np.uint32), np.uint32(high), counts)


@numba.njit
def _radix_select(bits, k, counts, left, cut):
    """Radix selection by 11, 10 and 10 bits: count, go on with the entries of the digit where the k-th largest lies."""
    size = bits.size
    cut[0] = 0
    for c in range(size):
        left[c] = bits[c] & np.uint32(0x7FFFFFFF)
    for shift in (20, 10, 0):
        counts[:] = 0
        mask = np.uint32(2047 if shift == 20 else 1023)
        for c in range(size):
            counts[(left[c] >> np.uint32(shift)) & mask] += 1
        digit = 2047
        while digit > 0 and counts[digit] < k:
            k -= counts[digit]
            digit -= 1
        cut[0] = (cut[0] << np.int64(11 if shift == 20 else 10)) | digit
        kept = 0
        for c in range(size):  # without a branch: what is not wanted is overwritten by the next
            entry = left[c]
            left[kept] = entry
            kept += np.int64(((entry >> np.uint32(shift)) & mask) == np.uint32(digit))
        size = kept
    cut[1], cut[2] = k, size


@_compile(void(uint32[::1], int64, int64[::1]))
def _select(bits, k, cut):
    _radix_select(bits, k, np.empty(2048, np.int64), np.empty(bits.size + 1, np.uint32), cut)


def select(values: Floats, k: int) -> tuple[int, int, int]:
    if k <= 0:
        return 0x7FFFFFFF, 0, 0
    cut = np.zeros(3, np.int64)
    _select(values.view(np.uint32), k, cut)
    threshold, kept, equal = cut.tolist()
    return threshold, kept, equal


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
    for start in range(0, bits.size, _LANE):
        block = bits[start : start + _LANE]
        ties = np.uint32(0)
        for i in range(block.size):
            ties += np.uint32(np.uint32(block[i] & np.uint32(0x7FFFFFFF)) == threshold)
        if remaining == 0 or ties <= remaining:  # the whole block goes one way
            if (remaining > 0) != keep_first:
                for i in range(block.size):
                    tied = np.uint32(block[i] & np.uint32(0x7FFFFFFF)) == threshold
                    block[i] = np.uint32(0) if tied else block[i]
            remaining = max(remaining - np.int64(ties), 0)
        else:
            for i in range(block.size):
                if np.uint32(block[i] & np.uint32(0x7FFFFFFF)) == threshold:
                    if (remaining > 0) != keep_first:
                        block[i] = np.uint32(0)
                    remaining = max(remaining - 1, 0)
    return remaining


def keep_above(values: Floats, threshold: int) -> None:
    _keep_above(values.view(np.uint32), np.uint32(threshold))


def drop_above(values: Floats, threshold: int) -> None:
    _drop_above(values.view(np.uint32), np.uint32(threshold))


def split_ties(values: Floats, threshold: int, remaining: int, keep_first: bool) -> int:
    return int(_split_ties(values.view(np.uint32), np.uint32(threshold), remaining, keep_first))


@numba.njit(inline="always")
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


@numba.njit(inline="always")
def _insertion_sort(pairs):
    """Finishes a nearly sorted row; False if it is not nearly sorted after all."""
    budget = 8 * pairs.size
    for c in range(1, pairs.size):
        pair = pairs[c]
        place = c
        while place > 0 and pairs[place - 1] > pair:
            pairs[place] = pairs[place - 1]
            place -= 1
        if place != c:
            pairs[place] = pair
            budget -= c - place
            if budget < 0:
                return False
    return True


@_compile(void(uint32[::1], float32[::1], int64, uint32[::1], float32[::1], uint64, uint64))
def _drop_by_rank(bits, values, columns, thresholds, scales, key, start):
    """Sorts each row's (magnitude, position) pairs; then keeps or zeroes rank by rank.

    A map that grows with the magnitude, and spreads what looks like a normal distribution evenly, puts two bins on a pair:
    one counting pass leaves few pairs out of order. A row that looks different is sorted by comparison.
    """
    last = 2 * columns - 1
    pairs = np.empty(columns, np.uint64)
    bins = np.empty(columns, np.uint32)
    counts = np.empty(last + 1, np.uint32)
    draws = np.empty(columns, np.uint32)
    for row in range(bits.size // columns):
        own = bits[row * columns : (row + 1) * columns]
        target = values[row * columns : (row + 1) * columns]
        first = start + np.uint64(row * columns)
        for c in range(columns):
            draws[c] = np.uint32(_bits(key, first + np.uint64(c)))
        total = np.float32(0)
        for c in range(0, columns, 16):
            total += abs(target[c])
        scale = np.float32(0.4) * np.float32((columns + 15) // 16) / total if total > 0 else np.float32(1)
        for c in range(columns):  # each operation is monotone, rounding included
            t = np.float32(1) + abs(target[c]) * scale
            place = np.float32(last) * (np.float32(1) - np.float32(1) / (t * t))
            bins[c] = np.uint32(place if place < last else np.float32(last))
        counts[:] = 0
        for c in range(columns):
            counts[bins[c]] += 1
        position = np.uint32(0)
        for d in range(last + 1):
            count = counts[d]
            counts[d] = position
            position += count
        for c in range(columns):
            d = bins[c]
            pairs[counts[d]] = (np.uint64(own[c] & np.uint32(0x7FFFFFFF)) << np.uint64(32)) | np.uint64(c)
            counts[d] += 1
        if not _insertion_sort(pairs):
            pairs.sort()
        for rank in range(columns):
            i = np.int64(pairs[rank] & np.uint64(0xFFFFFFFF))
            target[i] *= scales[rank] * np.float32(
                draws[i] < thresholds[rank]
            )  # no branch: half of them would be guessed wrong


def drop_by_rank(values: Floats, columns: int, low: float, high: float, rescale: bool, key: int, start: int) -> None:
    keep = rank_probabilities(columns, low, high)
    thresholds = (keep * 2.0**32).astype(np.uint32)
    scales = (1.0 / keep).astype(np.float32) if rescale else np.ones(columns, np.float32)
    _drop_by_rank(values.view(np.uint32), values, columns, thresholds, scales, np.uint64(key), np.uint64(start))


@_compile(void(float32[:, ::1], float32[::1], boolean, float32[::1]))
def elect(deltas, weights, normalize, out):
    total = np.empty(_LANE, np.float32)
    divisor = np.empty(_LANE, np.float32)
    for start in range(0, out.size, _LANE):
        block = out[start : start + _LANE]
        row, w = deltas[0, start : start + _LANE], weights[0]
        for i in range(block.size):
            total[i] = row[i] * w
        for k in range(1, weights.size):
            row, w = deltas[k, start : start + _LANE], weights[k]
            for i in range(block.size):
                total[i] += row[i] * w
        for i in range(block.size):
            block[i] = np.float32(0)
            divisor[i] = np.float32(0)
        for k in range(weights.size):
            row, w = deltas[k, start : start + _LANE], weights[k]
            for i in range(block.size):
                d = row[i] * w
                agrees = ((total[i] >= 0) & (d > 0)) | ((total[i] < 0) & (d < 0))
                block[i] += d if agrees else np.float32(0)
                divisor[i] += w if agrees else np.float32(0)
        if normalize:
            for i in range(block.size):
                block[i] /= np.float32(1) if divisor[i] == 0 else divisor[i]


@_compile(void(float32[:, ::1], int64[:, ::1]))
def sign_counts(values, counts):
    count, size = values.shape
    total = np.empty(_LANE, np.float32)
    for start in range(0, size, _LANE):
        length = min(_LANE, size - start)
        row = values[0, start : start + _LANE]
        for i in range(length):
            total[i] = row[i]
        for k in range(1, count):
            row = values[k, start : start + _LANE]
            for i in range(length):
                total[i] += row[i]
        for k in range(count):
            row = values[k, start : start + _LANE]
            moved = np.uint32(0)  # 32 bits, so that the loops count in vectors
            against = np.uint32(0)
            for i in range(length):
                moved += np.uint32(row[i] != 0)
                upward = total[i] >= 0
                against += np.uint32((upward & (row[i] < 0)) | (~upward & (row[i] > 0)))
            counts[k, k] += moved
            counts[k, count] += against
            for other in range(k + 1, count):
                second = values[other, start : start + _LANE]
                opposite = np.uint32(0)
                for i in range(length):
                    v, w = row[i], second[i]
                    opposite += np.uint32(((v > 0) & (w < 0)) | ((v < 0) & (w > 0)))
                counts[k, other] += opposite


@_compile(void(float32[::1], float32[::1]))
def saliency(deltas, importance):
    smallest = np.float32(1e-45)  # rounds to the smallest number above 0
    for i in range(deltas.size):
        score = np.sqrt(importance[i]) * deltas[i]
        importance[i] = smallest if (score == 0) & (deltas[i] != 0) else score


@_compile(void(float32[::1], float32[::1]))
def keep_where(values, kept):
    for i in range(values.size):
        values[i] = values[i] if kept[i] != 0 else np.float32(0)


@_compile(void(float32[::1], uint8[::1]))
def drop_owned(values, owners):
    for i in range(values.size):
        values[i] = values[i] if owners[i] == 0 else np.float32(0)


@_compile(void(float32[::1], uint8[::1], uint8))
def _claim(values, owners, owner):
    for i in range(values.size):
        owners[i] = owner if values[i] != 0 else owners[i]


def claim(values: Floats, owners: Bytes, owner: int) -> None:
    _claim(values, owners, np.uint8(owner))


@_compile(void(uint32[::1], int64, int64))
def _keep_largest_in_rows(bits, columns, k):
    counts = np.empty(2048, np.int64)
    left = np.empty(columns + 1, np.uint32)
    cut = np.empty(3, np.int64)
    for start in range(0, bits.size, columns):
        row = bits[start : start + columns]
        _radix_select(row, k, counts, left, cut)
        threshold, room = np.uint32(cut[0]), cut[1]
        for c in range(columns):
            magnitude = np.uint32(row[c] & np.uint32(0x7FFFFFFF))
            tied = magnitude == threshold
            row[c] = row[c] if (magnitude > threshold) | (tied & (room > 0)) else np.uint32(0)
            room -= np.int64(tied)


def keep_largest_in_rows(values: Floats, columns: int, k: int) -> None:
    if k <= 0:
        values[:] = 0.0
    elif k < columns:
        _keep_largest_in_rows(values.view(np.uint32), columns, k)


@_compile(void(float32[::1], float32[:, ::1], float32, uint8[::1], float32[::1]))
def _take(base, deltas, factor, owners, out):
    for start in range(0, out.size, _LANE):
        block, origin, own = out[start : start + _LANE], base[start : start + _LANE], owners[start : start + _LANE]
        for i in range(block.size):
            block[i] = origin[i]
        for k in range(deltas.shape[0]):
            row, owner = deltas[k, start : start + _LANE], np.uint8(k + 1)
            for i in range(block.size):
                block[i] = origin[i] + row[i] * factor if own[i] == owner else block[i]


def take(base: Floats, deltas: Floats, factor: float, owners: Bytes, out: Floats) -> None:
    _take(base, deltas, np.float32(factor), owners, out)


@_compile(void(float32[:, ::1], float32[:, ::1], float32[::1], float32[::1], float32, float32[::1]))
def _weigh(values, importance, factors, shares, floor, out):
    divisor = np.empty(_LANE, np.float32)
    mean = np.empty(_LANE, np.float32)
    for start in range(0, out.size, _LANE):
        block = out[start : start + _LANE]
        block[:] = np.float32(0)
        divisor[:] = np.float32(0)
        mean[:] = np.float32(0)
        for k in range(factors.size):
            row, important = values[k, start : start + _LANE], importance[k, start : start + _LANE]
            factor, share = factors[k], shares[k]
            for i in range(block.size):
                weight = (important[i] if important[i] > floor else floor) * factor
                block[i] += weight * row[i]
                divisor[i] += weight
                mean[i] += share * row[i]
        for i in range(block.size):
            block[i] = block[i] / divisor[i] if divisor[i] > 0 else mean[i]


def weigh(values: Floats, importance: Floats, factors: Floats, shares: Floats, floor: float, out: Floats) -> None:
    _weigh(values, importance, factors, shares, np.float32(floor), out)


@_compile(void(float32[::1], float32[:, ::1], float32[:, ::1], float32[::1], float32, float32[::1]))
def _weigh_deltas(base, deltas, importance, weights, floor, out):
    divisor = np.empty(_LANE, np.float32)
    plain = np.empty(_LANE, np.float32)
    count = np.float32(weights.size)
    for start in range(0, out.size, _LANE):
        block, origin = out[start : start + _LANE], base[start : start + _LANE]
        block[:] = np.float32(0)
        divisor[:] = np.float32(0)
        plain[:] = np.float32(0)
        for k in range(weights.size):
            row, important = deltas[k, start : start + _LANE], importance[k, start : start + _LANE]
            weight = weights[k]
            for i in range(block.size):
                share = important[i] + floor
                scaled = row[i] * weight
                block[i] += share * scaled
                divisor[i] += share
                plain[i] += scaled
        for i in range(block.size):
            block[i] = (block[i] / divisor[i] * count if divisor[i] > 0 else plain[i]) + origin[i]


def weigh_deltas(base: Floats, deltas: Floats, importance: Floats, weights: Floats, floor: float, out: Floats) -> None:
    _weigh_deltas(base, deltas, importance, weights, np.float32(floor), out)
