"""Fisher merging and RegMean: properties that hold whatever the numbers, and RegMean against least squares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import merging
from tests.oracles.thinning import Array

PATIENT = settings(max_examples=25, deadline=None)
SHAPES = st.sampled_from([(), (1,), (9,), (6, 7), (1, 40), (40, 1), (3, 2, 2, 3), (70, 30)])
SEEDS = st.integers(0, 10**6)


def some_models(shape: tuple[int, ...], count: int, seed: int) -> list[Array]:
    rng = np.random.default_rng([seed, count])
    return [np.asarray(rng.normal(size=shape), np.float32) for _ in range(count)]


def some_fishers(shape: tuple[int, ...], count: int, seed: int) -> list[Array]:
    """Over six orders of magnitude, a tenth 0."""
    rng = np.random.default_rng([seed, count, 1])
    found = [10.0 ** rng.uniform(-5, 1, shape) * (rng.random(shape) > 0.1) for _ in range(count)]
    return [np.asarray(each, np.float32) for each in found]


def some_grams(inputs: int, count: int, seed: int, rows: int = 200) -> tuple[list[Array], list[Array]]:
    """Inputs (rows, inputs) of each model, correlated, and the mean of x xᵀ over them."""
    rng = np.random.default_rng([seed, count, 2])
    mixed = [
        rng.normal(size=(rows, inputs)) @ (np.eye(inputs) + 0.3 * rng.normal(size=(inputs, inputs)))
        for _ in range(count)
    ]
    return mixed, [np.asarray(x.T @ x / rows, np.float32) for x in mixed]


def closeness(models: list[Array]) -> dict[str, float]:
    return {"rtol": 0, "atol": 4 * 2.0**-23 * max([1e-30, *(float(np.abs(m).max(initial=0)) for m in models)])}


# ---- Fisher ----


@PATIENT
@given(SHAPES, st.integers(1, 4), SEEDS, st.booleans(), st.randoms(use_true_random=False))
def test_fisher_does_not_mind_the_order(
    shape: tuple[int, ...], count: int, seed: int, normalize: bool, random: Any
) -> None:
    models, fishers = some_models(shape, count, seed), some_fishers(shape, count, seed)
    order = random.sample(range(count), count)
    weights = [0.5 + i for i in range(count)]
    first, second = (
        merging.apply(
            "fisher",
            None,
            [models[i] for i in way],
            statistics=[fishers[i] for i in way],
            weight=[weights[i] for i in way],
            normalize=normalize,
        )
        for way in (range(count), order)
    )
    np.testing.assert_allclose(first, second, **closeness(models))


@PATIENT
@given(SHAPES, st.integers(1, 4), SEEDS, st.lists(st.floats(1e-6, 1e6), min_size=4, max_size=4))
def test_fisher_of_another_scale_changes_nothing(
    shape: tuple[int, ...], count: int, seed: int, scales: list[float]
) -> None:
    """Normalised, not even where each model's has its own scale; nor does the floor know a scale."""
    models, fishers = some_models(shape, count, seed), some_fishers(shape, count, seed)
    scaled = [np.float32(scale) * each for scale, each in zip(scales, fishers, strict=False)]
    alike = [np.float32(scales[0]) * each for each in fishers]
    first = merging.apply("fisher", None, models, statistics=fishers)
    second = merging.apply("fisher", None, models, statistics=scaled)
    np.testing.assert_allclose(first, second, **closeness(models))
    first = merging.apply("fisher", None, models, statistics=fishers, normalize=False)
    second = merging.apply("fisher", None, models, statistics=alike, normalize=False)
    np.testing.assert_allclose(first, second, **closeness(models))


@PATIENT
@given(SHAPES, st.integers(1, 4), SEEDS)
def test_equal_fishers_give_the_mean(shape: tuple[int, ...], count: int, seed: int) -> None:
    models, fisher = some_models(shape, count, seed), some_fishers(shape, 1, seed)[0]
    weights = [0.5 + i for i in range(count)]
    merged = merging.apply("fisher", None, models, statistics=[fisher] * count, weight=weights)
    np.testing.assert_allclose(merged, merging.apply("linear", None, models, weight=weights), **closeness(models))


@PATIENT
@given(SHAPES, SEEDS)
def test_fisher_lies_between_the_models(shape: tuple[int, ...], seed: int) -> None:
    models, fishers = some_models(shape, 3, seed), some_fishers(shape, 3, seed)
    merged = merging.apply("fisher", None, models, statistics=fishers).astype(np.float64)
    slack = closeness(models)["atol"]
    assert (merged >= np.min(models, axis=0) - slack).all()
    assert (merged <= np.max(models, axis=0) + slack).all()


def test_where_one_model_alone_cares_it_gets_its_way() -> None:
    models = [np.float32([1, 1, 1]), np.float32([5, 5, 5])]
    fishers = [np.float32([1, 0, 0]), np.float32([0, 1, 0])]
    assert merging.apply("fisher", None, models, statistics=fishers, floor=0.0).tolist() == [1, 5, 3]


def test_a_floor_above_all_fishers_gives_the_mean_and_says_so() -> None:
    models, fishers = some_models((5, 4), 3, 0), some_fishers((5, 4), 3, 0)
    notes: list[str] = []
    absolute = {"floor": 100.0, "floor_is": "absolute", "normalize": False}
    merged = merging.apply("fisher", None, models, statistics=fishers, note=notes.append, **absolute)
    np.testing.assert_allclose(merged, np.mean(models, axis=0), **closeness(models))
    assert notes and "set a smaller 'floor'" in notes[0]


def test_what_no_text_has_touched_is_averaged_and_not_the_model_with_the_smallest_fisher() -> None:
    models = [np.float32([1, 1, 1]), np.float32([5, 5, 5])]
    fishers = [np.float32([1, 2, 0]), np.float32([1e-4, 1e-4, 0])]
    assert merging.apply("fisher", None, models, statistics=fishers)[2] == 3
    assert (
        merging.apply("fisher", None, models, statistics=fishers, floor_is="absolute")[2] > 4.99
    )  # the authors' floor


def test_tensors_of_which_a_model_has_no_fisher_are_averaged() -> None:
    models, fishers = some_models((5, 4), 2, 0), some_fishers((5, 4), 2, 0)
    notes: list[str] = []
    merged = merging.apply("fisher", None, models, statistics=[fishers[0], None], weight=[1, 3], note=notes.append)
    np.testing.assert_allclose(merged, merging.apply("linear", None, models, weight=[1, 3]), **closeness(models))
    assert notes == ["averaged, because only some of the models have its Fisher"]
    assert merging.apply("fisher", None, models, statistics=[None, None], note=notes.append) is not None
    assert len(notes) == 1


# ---- RegMean ----


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("alpha", [1.0, 0.9])
def test_regmean_is_least_squares_on_the_stacked_inputs(axis: int, alpha: float) -> None:
    """alpha 1: the weight that best does what each model does on its own inputs; below, as if they were less correlated."""
    models = some_models((30, 12), 3, 0)
    inputs, grams = some_grams(12, 3, 0)
    given = [model.T.copy() for model in models] if axis == 0 else models
    merged = merging.apply("regmean", None, given, statistics=grams, axis=axis, alpha=alpha, damping=0.0)
    if alpha < 1:  # inputs whose Gram matrix is the shrunk one
        shrunk = [np.where(np.eye(12, dtype=bool), g, alpha * g).astype(np.float64) for g in grams]
        inputs = [np.linalg.cholesky(g).T * np.sqrt(200) for g in shrunk]
    outputs = [x @ model.T.astype(np.float64) for x, model in zip(inputs, models, strict=True)]
    best, *_ = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(outputs), rcond=None)
    np.testing.assert_allclose(merged, best if axis == 0 else best.T, rtol=0, atol=2e-5)


@PATIENT
@given(st.integers(1, 4), SEEDS, st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.randoms(use_true_random=False))
def test_regmean_does_not_mind_the_order(count: int, seed: int, alpha: float, random: Any) -> None:
    models, (_, grams) = some_models((20, 9), count, seed), some_grams(9, count, seed)
    order = random.sample(range(count), count)
    first = merging.apply("regmean", None, models, statistics=grams, alpha=alpha)
    second = merging.apply(
        "regmean", None, [models[i] for i in order], statistics=[grams[i] for i in order], alpha=alpha
    )
    np.testing.assert_allclose(first, second, **closeness([*models, first]))


@PATIENT
@given(st.integers(1, 4), SEEDS, st.floats(1e-4, 1e4))
def test_equal_grams_of_any_scale_give_the_mean(count: int, seed: int, scale: float) -> None:
    models, (_, grams) = some_models((20, 9), count, seed), some_grams(9, 1, seed)
    merged = merging.apply("regmean", None, models, statistics=[grams[0] * np.float32(scale)] * count)
    np.testing.assert_allclose(merged, np.mean(models, axis=0), **closeness(models))


def test_inputs_that_never_came_are_averaged() -> None:
    """Of a layer that has seen one direction of its inputs, the rest is left open: there the damping decides."""
    models = some_models((6, 4), 2, 0)
    seen = [np.diag(np.float32([1, 0, 0, 0])), np.diag(np.float32([3, 0, 0, 0]))]
    merged = merging.apply("regmean", None, models, statistics=seen, damping=1e-6)
    np.testing.assert_allclose(merged[:, 1:], np.mean(models, axis=0)[:, 1:], rtol=0, atol=1e-6)
    np.testing.assert_allclose(merged[:, 0], 0.25 * models[0][:, 0] + 0.75 * models[1][:, 0], rtol=0, atol=1e-5)


def test_ill_conditioned_and_indefinite_layers_are_told() -> None:
    models = some_models((6, 4), 2, 0)
    line = np.ones((4, 1), np.float32)
    notes: list[str] = []
    merging.apply("regmean", None, models, statistics=[line @ line.T] * 2, alpha=1.0, damping=1e-12, note=notes.append)
    assert len(notes) == 1 and notes[0].startswith(("ill-conditioned", "solved with more damping"))
    notes.clear()
    indefinite = np.float32([[1, 2], [2, 1]])
    merged = merging.apply(
        "regmean", None, [m[:, :2] for m in models], statistics=[indefinite] * 2, alpha=1.0, note=notes.append
    )
    assert notes == ["solved with more damping, because the Gram matrices are not positive definite"]
    assert np.isfinite(merged).all()


def test_a_layer_that_read_nothing_but_zeros_is_averaged() -> None:
    models = some_models((6, 4), 2, 0)
    merged = merging.apply("regmean", None, models, statistics=[np.zeros((4, 4), np.float32)] * 2, weight=[1, 3])
    np.testing.assert_allclose(merged, merging.apply("linear", None, models, weight=[1, 3]), **closeness(models))


@pytest.mark.parametrize(
    ("statistics", "what"),
    [
        (None, "needs statistics"),
        ([np.ones((3, 3), np.float32)], "statistics of 1 models are given for 2"),
        ([np.ones((3, 3), np.float32)] * 2, "do not fit"),
        ([np.full((4, 4), np.nan, np.float32)] * 2, "NaN"),
        ([-np.eye(4, dtype=np.float32)] * 2, "impossible"),
    ],
)
def test_impossible_gram_matrices_are_refused(statistics: Any, what: str) -> None:
    with pytest.raises(merging.CuveeError, match=what):
        merging.apply("regmean", None, some_models((6, 4), 2, 0), statistics=statistics)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_impossible_fishers_are_refused(bad: float) -> None:
    fishers = some_fishers((6, 4), 2, 0)
    fishers[1][2, 3] = bad
    with pytest.raises(merging.CuveeError, match="NaN, infinite or negative"):
        merging.apply("fisher", None, some_models((6, 4), 2, 0), statistics=fishers)
