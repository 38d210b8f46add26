"""The compiled kernels give numpy's bits, on values that take each of their paths."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from merging.kernels import compiled, reference
from tests.commands import ROOT, environment

PATIENT = settings(deadline=None)  # a busy machine is no failure
Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
DISTRIBUTIONS: dict[str, Draw] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "few distinct values": lambda rng, n: np.round(rng.standard_normal(n), 1),
    "mostly zero": lambda rng, n: rng.standard_normal(n) * (rng.random(n) < 0.1),
    "all equal": lambda rng, n: np.full(n, -1.5),
    "all zero": lambda rng, n: np.zeros(n),
    "heavy tails": lambda rng, n: rng.standard_cauchy(n) ** 3,
    "two scales": lambda rng, n: rng.standard_normal(n) * np.where(rng.random(n) < 0.5, 1, 1e-7),
    "subnormal": lambda rng, n: rng.standard_normal(n) * 1e-42,
    "near overflow": lambda rng, n: rng.standard_normal(n).clip(-3, 3) * 1e38,
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 300, 4096])
def test_drop_by_rank(distribution: str, columns: int) -> None:
    values = DISTRIBUTIONS[distribution](np.random.default_rng(columns), 5 * columns).astype(np.float32)
    ours, numpys = values.copy(), values.copy()
    with np.errstate(over="ignore"):
        for kernel, changed in ((compiled, ours), (reference, numpys)):
            kernel.drop_by_rank(changed, columns, 0.2, 0.7, True, key=9, start=3 * columns)
    np.testing.assert_array_equal(ours.view(np.uint32), numpys.view(np.uint32))


@PATIENT
@given(st.integers(1, 5000), st.integers(0, 5000), st.booleans(), st.integers(1, 200), st.integers(0, 99))
def test_split_ties(size: int, remaining: int, keep_first: bool, levels: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(-levels, levels, size, endpoint=True).astype(np.float32)
    threshold = int(np.float32(1).view(np.uint32))
    ours, numpys = values.copy(), values.copy()
    left = compiled.split_ties(ours, threshold, remaining, keep_first)
    assert left == reference.split_ties(numpys, threshold, remaining, keep_first)
    np.testing.assert_array_equal(ours.view(np.uint32), numpys.view(np.uint32))


def test_little_work_is_done_without_numba() -> None:
    code = (
        "import sys, numpy as np; from merging import kernels; k = kernels.load(nbytes=10**6); out = np.empty(3, 'f4'); "
        "k.combine(np.ones(2, 'f4'), np.ones((2, 3), 'f4'), out); print(out.tolist(), 'numba' in sys.modules); "
        "k.histogram(out, np.zeros(1 << 15, 'i8')); print('numba' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "[2.0, 2.0, 2.0] False\nTrue\n"


@PATIENT
@given(st.data(), st.sampled_from(sorted(DISTRIBUTIONS)), st.integers(1, 3000))
def test_select(data: st.DataObject, distribution: str, size: int) -> None:
    values = DISTRIBUTIONS[distribution](np.random.default_rng(size), size).astype(np.float32)
    k = data.draw(st.integers(0, size))
    threshold, kept, equal = compiled.select(values, k)
    assert (threshold, kept, equal) == reference.select(values, k)
    magnitudes = np.sort(np.abs(values))[::-1]
    assert k == 0 or magnitudes[k - 1] == np.uint32(threshold).view(np.float32)
    assert k == 0 or kept == k - np.count_nonzero(magnitudes > magnitudes[k - 1])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("columns", [1, 16, 17, 3000])
def test_kernels_by_importance(distribution: str, columns: int) -> None:
    rng = np.random.default_rng(columns)
    deltas = np.stack([DISTRIBUTIONS[distribution](rng, 3 * columns).astype(np.float32) for _ in range(2)])
    deltas /= np.float32(10 if distribution in ("near overflow", "heavy tails") else 1)
    importance = np.square(deltas[::-1].clip(-1, 1))
    owners = rng.integers(0, 3, 3 * columns).astype(np.uint8)
    results = []
    for kernel in (compiled, reference):
        values, scores, own, out = deltas.copy(), importance.copy(), owners.copy(), np.empty_like(deltas[0])
        kernel.take(values[0], values, 0.7, own, out)
        found = [out.copy()]
        kernel.weigh(values, scores, kernel.vector([1.0, 0.3]), kernel.vector([0.6, 0.4]), 1e-6, out)
        found.append(out)
        kernel.saliency(values[0], scores[0])
        found.append(scores[0].copy())
        kernel.keep_largest_in_rows(scores[0], columns, (columns + 1) // 3)
        kernel.keep_where(values[1], scores[0])
        kernel.drop_owned(scores[0], own)
        kernel.claim(scores[0], own, 2)
        results.append([*found, scores[0], values[1], own])
    for ours, numpys in zip(*results, strict=True):
        np.testing.assert_array_equal(ours.view(np.uint8), numpys.view(np.uint8))


def test_saliency_is_0_only_where_nothing_moved() -> None:
    deltas = np.float32([0, 1e-40, -1e-40, 1, 1, 0])
    for kernel in (compiled, reference):
        importance = np.float32([5, 1e-38, 1e-38, 0, 4, 0])
        kernel.saliency(deltas, importance)
        assert (importance == 0).tolist() == [True, False, False, False, False, True]
        assert importance[4] == 2 and importance[3] == reference.SMALLEST


def test_rows_keep_their_largest_and_among_equals_the_first() -> None:
    for kernel in (compiled, reference):
        values = np.float32([3, -3, 1, 3, 0, 0, 0, 2])
        kernel.keep_largest_in_rows(values, 4, 2)
        assert values.tolist() == [3, -3, 0, 0, 0, 0, 0, 2]
