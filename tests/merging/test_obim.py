"""OBIM: every coordinate is one model's or the base's, and goes to whom it should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import merging
from merging.inputs import SMALL
from tests.oracles.importance import obim_owners
from tests.oracles.thinning import Array, task_vector

DENSITIES = st.sampled_from([None, 0.0, 0.01, 0.25, 1 / 3, 0.5, 0.75, 1.0])
SHAPES = st.sampled_from([(), (1,), (9,), (6, 7), (1, 40), (40, 1), (3, 2, 2, 3), (30, 70)])


@st.composite
def merges(draw: Any) -> tuple[Array, list[Array], list[Array | None], dict[str, Any]]:
    """Base, models, statistics and parameters on a grid: float32 is exact, equal saliencies are met and decided."""
    shape, count, seed = draw(SHAPES), draw(st.integers(1, 4)), draw(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    base = np.asarray(rng.integers(-16, 17, shape) / 8, np.float32)
    models = [np.asarray(base + rng.integers(-3, 4, shape) / 8, np.float32) for _ in range(count)]
    statistics: list[Array | None] = []
    for _ in range(count):
        kind = draw(st.sampled_from(["fisher", "moments", "none"]))
        own = (1, *shape[1:]) if kind == "moments" and len(shape) > 1 else shape
        squares = np.asarray(4.0 ** rng.integers(-2, 3, own) * (rng.random(own) > 0.2), np.float32)  # of exact roots
        statistics.append(None if kind == "none" else squares)
    parameters = {
        "density": [draw(DENSITIES) for _ in range(count)],
        "lambda": draw(st.sampled_from([1.0, 0.5, -2.0])),
        "saliency": draw(st.sampled_from(["stats", "magnitude"])),
        "scope": draw(st.sampled_from(["tensor", "row", "global"])),
        "quota": draw(st.sampled_from(["refill", "drop_collisions"])),
        "order": draw(st.sampled_from(["listed", "interleaved"])),
    }
    if parameters["scope"] == "global" and parameters["saliency"] == "stats" and any(s is None for s in statistics):
        statistics = [s if s is not None else np.ones(shape, np.float32) for s in statistics]
    return base, models, statistics, parameters


@settings(max_examples=150, deadline=None)
@given(merges(), st.sampled_from([None, 16, 1000]))
def test_equals_the_oracle_where_everything_ties(case: Any, chunk: int | None) -> None:
    base, models, statistics, parameters = case
    result = merging.apply("obim", base, models, statistics=statistics, chunk=chunk, **parameters)
    owners = obim_owners(base, models, statistics=statistics, **parameters)
    expected = base.astype(np.float64)
    for i, model in enumerate(models, 1):
        expected = expected + np.where(owners == i, parameters["lambda"] * task_vector(model, base), 0.0)
    np.testing.assert_array_equal(result, expected.astype(np.float32))


@settings(max_examples=100, deadline=None)
@given(merges(), st.integers(0, 10**6))
def test_every_coordinate_is_the_base_plus_one_models_task_vector_or_the_base(case: Any, seed: int) -> None:
    base, models, statistics, parameters = case
    rng = np.random.default_rng(seed)
    models = [np.asarray(model + 0.01 * rng.normal(size=model.shape), np.float32) for model in models]
    result = merging.apply("obim", base, models, statistics=statistics, **parameters)
    factor = np.float32(parameters["lambda"])
    candidates = [base, *(base + factor * (model - base) for model in models)]
    assert np.logical_or.reduce([result == candidate for candidate in candidates]).all()


@settings(max_examples=50, deadline=None)
@given(merges())
def test_one_model_of_density_1_comes_back(case: Any) -> None:
    base, models, statistics, parameters = case
    parameters |= {"density": [1.0] * len(models), "lambda": 1.0, "order": "listed"}
    result = merging.apply("obim", base, models, statistics=statistics, **parameters)
    moved = models[0] != base
    np.testing.assert_array_equal(result[moved], models[0][moved])


@pytest.mark.parametrize("shape", [(SMALL + 5,), (700, 611)], ids=str)
@pytest.mark.parametrize("order", ["listed", "interleaved"])
@pytest.mark.parametrize("backend", ["compiled", "reference", "torch"])
def test_large_tensors_are_drafted_as_small_ones_are(shape: tuple[int, ...], order: str, backend: str) -> None:
    """Streamed in passes, with one byte an element held; on a grid, so that most saliencies are met many times."""
    if backend == "torch":
        pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    base = np.zeros(shape, np.float32)
    models = [np.asarray(rng.integers(-9, 10, shape) / 8, np.float32) for _ in range(3)]
    own = (1, *shape[1:]) if len(shape) > 1 else shape
    statistics = [np.asarray(4.0 ** rng.integers(-1, 2, own), np.float32) for _ in range(2)]
    parameters: dict[str, Any] = {"density": [0.3, None, 0.5], "order": order}
    result = merging.apply(
        "obim", base, models, statistics=[*statistics, None], backend=backend, chunk=100_000, **parameters
    )
    owners = fast_owners(models, [*statistics, None], [0.3, 1 / 3, 0.5], 8 if order == "interleaved" else 1)
    expected = np.select([owners == i + 1 for i in range(3)], models, np.float32(0))
    np.testing.assert_array_equal(result, expected)


def fast_owners(models: list[Array], statistics: list[Array | None], shares: list[float], rounds: int) -> Array:
    """As the oracle, which loops over elements, by sorting."""
    taus = [model.ravel().astype(np.float64) for model in models]
    size = models[0].size
    weights = [1.0 if s is None else np.sqrt(np.broadcast_to(s, models[0].shape).ravel()) for s in statistics]
    owners = np.zeros(size, np.int64)
    for r in range(rounds):
        for i, share in enumerate(shares):
            quota = int(share * size)
            due = int(quota * ((r + 1) / rounds)) - int(quota * (r / rounds))
            score = np.where(owners == 0, np.abs(taus[i]) * weights[i], 0.0)
            best = np.argsort(-score, kind="stable")[:due]
            owners[best[score[best] > 0]] = i + 1
    return owners.reshape(models[0].shape)


def test_saliency_decides_and_not_the_magnitude() -> None:
    base = np.zeros((1, 4), np.float32)
    models = [np.float32([[1, 2, 3, 4]]), np.float32([[1, 1, 1, 1]])]
    important = [np.float32([[100, 1, 0, 0]]), np.float32([[0, 0, 1, 1]])]
    assert merging.apply("obim", base, models, statistics=important).tolist() == [[1, 2, 1, 1]]
    assert merging.apply("obim", base, models, saliency="magnitude").tolist() == [[1, 1, 3, 4]]


def test_who_is_listed_first_claims_first() -> None:
    base = np.zeros(6, np.float32)
    first, second = np.float32([6, 5, 4, 3, 2, 1]), np.float32([60, 50, 40, 30, 20, 10])
    own = {"saliency": "magnitude", "density": 0.5}
    assert merging.apply("obim", base, [first, second], **own).tolist() == [6, 5, 4, 30, 20, 10]
    assert merging.apply("obim", base, [second, first], **own).tolist() == [60, 50, 40, 3, 2, 1]
    dropped = merging.apply("obim", base, [first, second], quota="drop_collisions", **own)
    assert dropped.tolist() == [6, 5, 4, 0, 0, 0]  # both want the same, and the second goes without


def test_interleaved_models_take_their_best_in_turn() -> None:
    base = np.zeros(32, np.float32)
    falling = np.arange(32, 0, -1).astype(np.float32)
    result = merging.apply(
        "obim", base, [falling, 100 * falling], saliency="magnitude", density=0.5, order="interleaved"
    )
    owners = np.where(result > 50, 2, 1)
    assert owners.tolist() == [1, 1, 2, 2] * 8  # eight rounds, two entries each a round


@settings(max_examples=60, deadline=None)
@given(merges())
def test_quotas_are_kept(case: Any) -> None:
    base, models, statistics, parameters = case
    if parameters["scope"] == "global":
        parameters["scope"] = "tensor"  # whose threshold may let more through
    owners = obim_owners(base, models, statistics=statistics, **parameters)
    size = base.size if parameters["scope"] == "tensor" or base.ndim < 2 else base[0].size
    rows = base.size // size
    for i, density in enumerate(parameters["density"], 1):
        share = 1 / len(models) if density is None else density
        assert (owners == i).sum() <= rows * (max(1, int(share * size)) if share > 0 else 0)
