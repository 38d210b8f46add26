"""The chunk kernels on numpy: the definition that the compiled and the device kernels must match.

A chunk is a stretch of one tensor's elements, small enough for the cache. `values` are float32 arrays, changed in place
where the docstring says so; magnitudes are compared as integers, for which the bits of a non-negative float32 sort like
its value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
MAGNITUDE = np.uint32(0x7FFFFFFF)
INFINITY = np.uint32(0x7F800000)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
SMALLEST = np.uint32(1).view(np.float32)  # above 0
on_host = True
xp: Any = np


def empty(shape: tuple[int, ...]) -> Floats:
    return np.empty(shape, np.float32)


def host_buffer(nbytes: int) -> NDArray[np.uint8]:
    """Memory for bytes on their way from and to files."""
    return np.empty(nbytes, np.uint8)


def to_host(values: Any) -> NDArray[Any]:
    return np.asarray(values)


def load(raw: NDArray[np.uint8], dtype: str, values: Floats) -> bool:
    """Converts stored bytes to float32. False if any value is NaN or infinite.

    Args:
        raw: the bytes, (n · size,).
        dtype: as safetensors names it.
        values: (n,), filled.
    """
    if dtype == "BF16":
        np.left_shift(raw.view(np.uint16), np.uint32(16), out=values.view(np.uint32), dtype=np.uint32)
    else:
        values[:] = raw.view(_NUMPY[dtype])
    return finite(values)


_NUMPY = {
    "F32": np.float32, "F16": np.float16, "F64": np.float64, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "BOOL": np.bool_,
}  # fmt: skip


def finite(values: Floats) -> bool:
    """Whether no value is NaN or infinite."""
    return bool((values.view(np.uint32) & MAGNITUDE).max(initial=0) < INFINITY)


def store(values: Floats, dtype: str, raw: NDArray[np.uint8]) -> bool:
    """Rounds float32 to the stored dtype, to nearest even. False if a result is NaN or infinite.

    Args:
        values: (n,).
        raw: the bytes to fill, (n · size,).
    """
    if dtype == "BF16":
        bits = values.view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        raw.view(np.uint16)[:] = (bits + (odd + np.uint32(0x7FFF))) >> np.uint32(16)
        return bool((raw.view(np.uint16) & np.uint16(0x7FFF)).max(initial=0) < 0x7F80) and finite(values)
    with np.errstate(over="ignore"):
        stored: NDArray[Any] = raw.view(_NUMPY[dtype])
        stored[:] = values
    return bool(np.isfinite(stored).all())


def gram(values: Floats) -> NDArray[np.float64]:
    """Inner products of the rows of (k, n), accumulated in float64: (k, k)."""
    wide = values.astype(np.float64)
    return np.asarray(wide @ wide.T)


def row_gram(values: Floats, axis: int) -> NDArray[np.float64]:
    """Inner products of the k matrices of (k, rows, columns) along `axis` (1 rows, 2 columns): (k, k, other axis)."""
    wide = values.astype(np.float64)
    return np.asarray(np.einsum("irc,jrc->ijr" if axis == 2 else "irc,jrc->ijc", wide, wide))


def combine(weights: Floats, values: Floats, out: Floats) -> None:
    """out = Σ weights[k] · values[k], added in the order of k. values (k, n), out (n,)."""
    np.multiply(values[0], weights[0], out=out)
    for weight, row in zip(weights[1:], values[1:], strict=True):
        out += row * weight


def blend(factors: Floats, models: Floats, base: Floats | None, start: int, out: Floats) -> bool:
    """One pass for a whole weighted sum: Σ factors[k]·models[k], or with a base base + Σ factors[k]·(models[k] − base).

    Adds as `combine` does, so both give the same bits. False if a result is NaN or infinite.

    Args:
        models, base: (k, N) and (N,); of both, elements start … start + n.
        out: (n,), filled.
    """
    part = slice(start, start + len(out))
    if base is None:
        combine(factors, models[:, part], out)
    else:
        combine(factors, models[:, part] - base[part], out)
        out += base[part]
    return finite(out)


def blend_deltas(factors: Floats, deltas: NDArray[Any], base: Floats, scale: float, start: int, out: Floats) -> bool:
    """As `blend` from task vectors: scale·base + Σ factors[k]·deltas[k]. deltas (k, N) float32, or bfloat16 as uint16."""
    part = slice(start, start + len(out))
    rows = deltas[:, part]
    if rows.dtype == np.uint16:
        rows = np.left_shift(rows, np.uint32(16), dtype=np.uint32).view(np.float32)
    combine(factors, rows, out)
    out += base[part] * np.float32(scale)
    return finite(out)


def histogram(values: Floats, counts: NDArray[np.int64]) -> None:
    """Adds to `counts` (32768,) by the upper 15 bits of the magnitude."""
    counts += np.bincount((values.view(np.uint32) & MAGNITUDE) >> np.uint32(16), minlength=1 << 15)


def fine_histogram(values: Floats, high: int, counts: NDArray[np.int64]) -> None:
    """Adds to `counts` (65536,), by the lower 16 bits, the magnitudes whose upper 15 bits are `high`."""
    bits = values.view(np.uint32) & MAGNITUDE
    counts += np.bincount(bits[bits >> np.uint32(16) == high] & np.uint32(0xFFFF), minlength=1 << 16)


def select(values: Floats, k: int) -> tuple[int, int, int]:
    """Where to cut a whole vector (n,) to keep its k largest magnitudes.

    Returns:
        The k-th largest magnitude (bits), how many of those equal to it are kept, and how many are equal to it.
    """
    if k <= 0:
        return 0x7FFFFFFF, 0, 0
    magnitudes = values.view(np.uint32) & MAGNITUDE
    threshold = np.partition(magnitudes, len(values) - k)[len(values) - k]
    larger, equal = np.count_nonzero(magnitudes > threshold), np.count_nonzero(magnitudes == threshold)
    return int(threshold), k - int(larger), int(equal)


def keep_above(values: Floats, threshold: int) -> None:
    """Zeroes, in place, what has a magnitude under `threshold` (bits)."""
    values[(values.view(np.uint32) & MAGNITUDE) < threshold] = 0.0


def drop_above(values: Floats, threshold: int) -> None:
    """Zeroes, in place, what has a magnitude over `threshold` (bits)."""
    values[(values.view(np.uint32) & MAGNITUDE) > threshold] = 0.0


def split_ties(values: Floats, threshold: int, remaining: int, keep_first: bool) -> int:
    """Among magnitudes equal to `threshold`, the first `remaining` count as larger; returns how many are left over.

    In place: zeroes the others if `keep_first`, else zeroes those first ones.
    """
    ties = np.flatnonzero((values.view(np.uint32) & MAGNITUDE) == threshold)
    values[ties[remaining:] if keep_first else ties[:remaining]] = 0.0
    return max(0, remaining - len(ties))


def uniform_bits(key: int, start: int, count: int) -> NDArray[np.uint64]:
    """32 random bits for each element start … start + count − 1 of stream `key`: a counter through splitmix64.

    The bits of an element depend on nothing but its index and the key, whatever the chunks, threads or device.
    """
    with np.errstate(over="ignore"):
        z = (np.arange(start, start + count, dtype=np.uint64) + np.uint64(1)) * GOLDEN + np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray((z ^ (z >> np.uint64(31))) >> np.uint64(32))


def drop(values: Floats, keep: float, scale: float, key: int, start: int) -> None:
    """In place: keeps each value with probability `keep`, times `scale`, and zeroes the rest."""
    mask = uniform_bits(key, start, len(values)) < np.uint64(round(keep * 2**32))
    values *= mask * np.float32(scale)


def drop_by_rank(values: Floats, columns: int, low: float, high: float, rescale: bool, key: int, start: int) -> None:
    """In place, for each row of `columns` values: keeps each with a probability that grows with its magnitude's rank.

    The smallest is kept with probability `low`, the largest with `high`, linearly in rank between; equal magnitudes rank
    by position. With `rescale`, a kept value is divided by its own probability. Source: DELLA, arXiv 2406.11617.
    """
    bits = uniform_bits(key, start, len(values)).reshape(-1, columns)
    rows = values.reshape(-1, columns)
    order = np.argsort(np.abs(rows), axis=1, kind="stable")
    by_rank = rank_probabilities(columns, low, high)
    keep = np.empty(rows.shape, np.float64)
    np.put_along_axis(keep, order, np.broadcast_to(by_rank, rows.shape), axis=1)
    mask = bits < (keep * 2.0**32).astype(np.uint64)
    rows *= np.where(mask, (1.0 / keep).astype(np.float32) if rescale else np.float32(1), np.float32(0))


def rank_probabilities(columns: int, low: float, high: float) -> NDArray[np.float64]:
    """Keep probability of each rank, smallest magnitude first: (columns,). A lone entry has the middle one."""
    if columns == 1:
        return np.array([(low + high) / 2])
    return low + (high - low) * (np.arange(columns, dtype=np.float64) / (columns - 1))


def elect(deltas: Floats, weights: Floats, normalize: bool, out: Floats) -> None:
    """Weighted sum of what agrees with the elected sign. deltas (k, n), changed; weights (k,); out (n,).

    The sign of the weighted sum wins, a sum of zero counts as positive, a zero entry never agrees. With `normalize`
    the sum is divided by the weights of those that agree (0 → 1). Source: TIES, arXiv 2306.01708.
    """
    deltas *= weights[:, None]
    total = deltas[0].copy()
    for row in deltas[1:]:
        total += row
    positive = total >= 0
    out[:] = 0.0
    divisor = np.zeros_like(out)
    for row, weight in zip(deltas, weights, strict=True):
        agrees = np.where(positive, row > 0, row < 0)
        out += np.where(agrees, row, np.float32(0))
        divisor += np.where(agrees, weight, np.float32(0))
    if normalize:
        out /= np.where(divisor == 0, np.float32(1), divisor)


def sign_counts(values: Floats, counts: NDArray[np.int64]) -> None:
    """Adds to `counts` (k, k + 1) what the signs of the rows of (k, n) say, coordinate by coordinate.

    On the diagonal: entries that are not 0; above it, at (i, j): where one of the rows is positive and the other negative;
    in the last column: entries whose sign is not that of the sum of all rows, a sum of 0 counting as positive.
    """
    positive, negative = values > 0, values < 0
    total = values[0].copy()
    for row in values[1:]:
        total += row
    counts[:, -1] += np.count_nonzero(np.where(total >= 0, negative, positive), axis=1)
    for i, row in enumerate(values):
        counts[i, i] += np.count_nonzero(row)
        for j in range(i + 1, len(values)):
            counts[i, j] += np.count_nonzero((positive[i] & negative[j]) | (negative[i] & positive[j]))


# ---- by importance ----


def no_owners(count: int) -> Bytes:
    """An owner for each of `count` elements: nobody, 0."""
    return np.zeros(count, np.uint8)


def saliency(deltas: Floats, importance: Floats) -> None:
    """In place of the importance h (n,): τ·√h, whose magnitude ranks as ½hτ² does, within the range of float32.

    What is not 0 but too small for float32 becomes its smallest number: 0 stands for what did not move.
    """
    np.sqrt(importance, out=importance)
    importance *= deltas
    importance[(importance == 0) & (deltas != 0)] = SMALLEST


def keep_where(values: Floats, kept: Floats) -> None:
    """Zeroes, in place, where `kept` is 0."""
    values[kept == 0] = 0.0


def drop_owned(values: Floats, owners: Bytes) -> None:
    """Zeroes, in place, what has an owner."""
    values[owners != 0] = 0.0


def claim(values: Floats, owners: Bytes, owner: int) -> None:
    """Gives to `owner`, in place, what is not 0."""
    owners[values != 0] = owner


def keep_largest_in_rows(values: Floats, columns: int, k: int) -> None:
    """In place: keeps the k largest magnitudes of each row of `columns` values, among equals the first."""
    if k <= 0:
        values[:] = 0.0
        return
    if k >= columns:
        return
    rows = values.reshape(-1, columns)
    magnitudes = rows.view(np.uint32) & MAGNITUDE
    threshold = np.partition(magnitudes, columns - k, axis=1)[:, columns - k, None]
    larger, equal = magnitudes > threshold, magnitudes == threshold
    room = k - larger.sum(axis=1, keepdims=True)
    rows[~(larger | (equal & (equal.cumsum(axis=1) <= room)))] = 0.0


def take(base: Floats, deltas: Floats, factor: float, owners: Bytes, out: Floats) -> None:
    """out = base + factor · the owner's row of deltas (k, n), the base where nobody owns. Source: arXiv 2502.12217."""
    out[:] = base
    for owner, row in enumerate(deltas, 1):
        np.add(base, row * np.float32(factor), out=out, where=owners == owner)


def weigh(values: Floats, importance: Floats, factors: Floats, shares: Floats, floor: float, out: Floats) -> None:
    """out = Σ fᵢFᵢθᵢ / Σ fᵢFᵢ, F at least `floor`; Σ sᵢθᵢ where that divisor is 0. values θ, importance F (k, n).

    Source: arXiv 2111.09832, eq. 4.
    """
    divisor = np.zeros_like(out)
    mean = np.zeros_like(out)
    out[:] = 0.0
    for row, important, factor, share in zip(values, importance, factors, shares, strict=True):
        weight = np.maximum(important, np.float32(floor)) * factor
        out += weight * row
        divisor += weight
        mean += share * row
    np.divide(out, divisor, out=mean, where=divisor > 0)
    out[:] = mean


def weigh_deltas(base: Floats, deltas: Floats, importance: Floats, weights: Floats, floor: float, out: Floats) -> None:
    """out = base + k · Σ Fᵢλᵢτᵢ / Σ Fᵢ, `floor` added to every F; base + Σ λᵢτᵢ where that divisor is 0.

    Args:
        deltas: τ (k, n). importance: F (k, n). weights: λ (k,).

    Source: arXiv 2504.18992.
    """
    divisor = np.zeros_like(out)
    plain = np.zeros_like(out)
    out[:] = 0.0
    for row, important, weight in zip(deltas, importance, weights, strict=True):
        share = important + np.float32(floor)
        scaled = row * weight
        out += share * scaled
        divisor += share
        plain += scaled
    np.divide(out, divisor, out=out, where=divisor > 0)
    out *= np.float32(len(deltas))
    np.copyto(out, plain, where=~(divisor > 0))
    out += base


def cholesky(matrix: NDArray[np.float64]) -> tuple[Any, float] | None:
    """Factor of a symmetric matrix, in its place, and an estimate of its condition; None if it is not positive definite."""
    from scipy.linalg import LinAlgError, cho_factor, lapack  # here: it takes time to load, and few methods need it

    norm = float(np.abs(matrix).sum(axis=0).max(initial=0.0))
    try:
        factor, lower = cho_factor(matrix, lower=True, overwrite_a=True, check_finite=False)
    except LinAlgError:
        return None
    reciprocal, _ = lapack.dpocon(factor, norm, uplo="L")
    return (factor, lower), 1 / reciprocal if reciprocal > 0 else np.inf


def solve(factor: Any, right: NDArray[np.float64]) -> NDArray[np.float64]:
    """X in X·S = `right` (rows, n), of the factor of S."""
    from scipy.linalg import cho_solve

    return np.asarray(cho_solve(factor, right.T, check_finite=False).T)


def wide(values: Any) -> NDArray[np.float64]:
    """As float64, where the kernels run."""
    return np.asarray(values, np.float64)


def vector(weights: Any) -> Floats:
    """Coefficients as a float32 vector where the kernels want it."""
    return np.asarray(weights, np.float32)


def l1(values: Floats) -> float:
    """Σ |v|, in float64."""
    return float(np.abs(values).sum(dtype=np.float64))


def narrow(values: Any) -> Floats:
    """As contiguous float32, whatever wider type a formula came out in."""
    return np.ascontiguousarray(values, np.float32)
