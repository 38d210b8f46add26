"""What every registered merge method promises, on small tensors in memory; a method of your own must pass it too.

A method listed in `SETTINGS` is compared with its float64 oracle; any other is held to the promises that need none:
repeatable, independent of chunks and backends, inputs untouched, shapes kept, mistakes refused in one line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import merging
from merging.errors import CuveeError
from merging.methods import METHODS, REQUIRED, Method
from tests.oracles.merge_methods import ORACLES, RANDOM, oracle
from tests.oracles.settings import SETTINGS, count_of, masks_of, parameters_of, statistics_of
from tests.oracles.thinning import Array, keep_probability, task_vector

SHAPES = [(), (1,), (7,), (3, 5), (5, 1), (4, 3, 2, 2), (0,), (3, 0), (3, 1500)]
SMALL_CHUNK = 1024  # elements: the last of the shapes has longer rows

#: Bit for bit the same in any chunks: nothing but comparisons and exact counts crosses the elements of a tensor.
ELEMENTWISE = {
    "linear", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della",
    "della_linear", "nearswap", "ram", "ramplus_tl", "obim", "df_merge",
}  # fmt: skip

#: Two inputs play different parts, each model draws its own mask, or who is listed first claims first.
ASYMMETRIC = {"slerp", "arcee_fusion", "nearswap", "obim", *RANDOM}

#: Scaling all inputs scales the result; not so with a softmax (arcee_fusion) or thresholds in the units of the weights.
NOT_HOMOGENEOUS = {"arcee_fusion", "nearswap", "ram", "ramplus_tl"}

#: Recipes under which models that are all the same come out again, whatever the base. Not listed, because they move
#: from the base towards one model only part of the way: slerp, arcee_fusion, nearswap.
GIVES_THE_MODEL_BACK: dict[str, dict[str, Any]] = {
    "linear": {"weight": [0.2, 0.5, 1.7]},
    "task_arithmetic": {"weight": [0.2, 0.5, 1.7], "normalize": True},
    "ties": {"weight": [0.2, 0.5, 1.7]},
    "breadcrumbs": {"weight": [0.2, 0.5, 1.7], "normalize": True},  # density 1: no outliers are taken away either
    "breadcrumbs_ties": {"weight": [0.2, 0.5, 1.7], "normalize": True},
    "dare_linear": {"weight": [0.2, 0.5, 1.7], "normalize": True},  # density 1: no draw
    "dare_ties": {"weight": [0.2, 0.5, 1.7], "normalize": True},
    "della_linear": {"weight": [0.2, 0.5, 1.7], "normalize": True},
    "della": {"weight": [0.2, 0.5, 1.7]},
    "nuslerp": {"weight": [0.2, 0.5]},
    "multislerp": {"weight": [0.2, 0.5, 1.7]},
    "karcher": {},
    "model_stock": {},  # cosine 1: the ratio is 1
    "sce": {},
    "ram": {"epsilon": 0.0},  # everything is shared
    "ramplus_tl": {"epsilon": 0.0},
    "fisher": {"weight": [0.2, 0.5, 1.7]},
    "df_merge": {"weight": 1 / 3},
    "regmean": {"weight": [0.2, 0.5, 1.7]},
    "obim": {"density": [1.0, 0.3, 0.2]},  # the first claims all
}


# ---- inputs ----


def normal(shape: tuple[int, ...], count: int, seed: int = 0) -> tuple[Array, list[Array]]:
    """A base and models around it: normal numbers, a fifth of each model's entries unchanged."""
    rng = np.random.default_rng([seed, count, *shape])
    base = rng.normal(size=shape)
    changes = [0.4 * rng.normal(size=shape) * (rng.random(shape) > 0.2) for _ in range(count)]
    return np.asarray(base, np.float32), [np.asarray(base + change, np.float32) for change in changes]


def grid(shape: tuple[int, ...], count: int, seed: int) -> tuple[Array, list[Array]]:
    """As `normal`, in eighths: float32 is exact, magnitudes are often equal, weighted sums are often zero."""
    rng = np.random.default_rng([seed, count, *shape])
    base = rng.integers(-16, 17, shape) / 8
    models = [base + rng.integers(-3, 4, shape) / 8 for _ in range(count)]
    return np.asarray(base, np.float32), [np.asarray(model, np.float32) for model in models]


def inputs_of(method: Method, shape: tuple[int, ...], seed: int = 0, base: bool = True) -> tuple[Any, list[Array]]:
    """Base (None for a method that knows none, or on request) and models."""
    start, models = normal(shape, count_of(method), seed)
    return (start if base and method.base != "none" else None), models


def apply(name: str, base: Array | None, models: list[Array], **options: Any) -> Array:
    """`merging.apply`, with statistics for the methods that take them."""
    return merging.apply(name, base, models, **{"statistics": statistics_of(name, models), **options})


def expected(method: Method, base: Array | None, models: list[Array], seed: int = 0, **parameters: Any) -> Array:
    """The oracle's result, for a random method given the masks that were drawn."""
    if method.statistics:
        parameters = {"statistics": statistics_of(method.name, models), **parameters}
    if method.name in RANDOM:
        drawn = parameters.get("saliency", "random") == "random"
        masks = masks_of(method.name, base, models, seed, **parameters) if drawn else []
        parameters = {**parameters, "masks": masks}
    return oracle(method.name, base, models, **parameters)


def assert_close(result: Array, truth: Array, models: list[Array], base: Array | None, **parameters: Any) -> None:
    """To a few roundings of float32, relative to the largest number that enters or leaves."""
    assert result.dtype == np.float32
    assert result.shape == truth.shape
    if not truth.size:
        return
    weights = parameters.get("weight", 1.0)
    size = sum(map(abs, weights)) if isinstance(weights, list) else abs(weights) * len(models)
    largest = max(float(np.abs(array).max()) for array in [*models, truth, *([] if base is None else [base])])
    np.testing.assert_allclose(result, truth, rtol=0, atol=4 * 2.0**-23 * max(1.0, size) * largest)


def every(wanted: Callable[[Method], bool] = lambda method: True) -> pytest.MarkDecorator:
    """Parametrises a test over the registered methods, or those of them that are `wanted`."""
    chosen = [pytest.param(method, id=name) for name, method in METHODS.items() if wanted(method)]
    return pytest.mark.parametrize("method", chosen)


def has_oracle(method: Method) -> bool:
    return method.name in SETTINGS


# ---- the entry itself ----


@every()
def test_entry_says_all_that_others_need(method: Method) -> None:
    assert method.title
    assert method.source
    assert method.summary
    assert METHODS[method.name] is method
    assert method.base in ("required", "optional", "none")
    assert 1 <= method.min_models <= (method.max_models or method.min_models)
    for parameter in method.parameters.values():
        if parameter.default not in (REQUIRED, None) and parameter.type in (int, float):
            assert parameter.low is None or parameter.low <= parameter.default
            assert parameter.high is None or parameter.default <= parameter.high
        if parameter.choices and parameter.default is not REQUIRED:
            assert parameter.default in parameter.choices
    if method.statistics_at is not None:
        scale, option, value = method.statistics_at
        assert method.statistics
        assert method.parameters[scale].per_model
        assert value in method.parameters[option].choices


def test_every_built_in_method_has_an_oracle_and_settings() -> None:
    built_in = {name for name, method in METHODS.items() if method.function.__module__.startswith("merging.methods")}
    assert built_in == set(ORACLES) == set(SETTINGS)


# ---- the truth ----


@every(has_oracle)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_float64_oracle(method: Method, shape: tuple[int, ...]) -> None:
    for parameters in SETTINGS[method.name]:
        base, models = inputs_of(method, shape)
        result = apply(method.name, base, models, seed=5, **parameters)
        assert_close(result, expected(method, base, models, 5, **parameters), models, base, **parameters)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.base == "optional"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_float64_oracle_without_a_base(name: str, shape: tuple[int, ...]) -> None:
    for parameters in SETTINGS[name]:
        _, models = inputs_of(METHODS[name], shape)
        assert_close(
            apply(name, None, models, **parameters), oracle(name, None, models, **parameters), models, None,
            **parameters,
        )  # fmt: skip


DYADIC = st.sampled_from([-1.0, -0.5, 0.25, 0.5, 1.0, 2.0])
DENSITY = st.sampled_from([0.0, 0.01, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.9, 0.99, 1.0])
GRID_SHAPES = st.sampled_from([(), (1,), (2,), (9,), (6, 7), (1, 40), (40, 1), (3, 2, 2, 3), (2100,)])


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties", "dare_ties", "della", "task_arithmetic"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_equal_magnitudes_and_sums_of_zero_go_as_documented(name: str, data: st.DataObject) -> None:
    """On a grid where float32 is exact, so every tie and every sum of zero is met and decided as the oracle does."""
    count = data.draw(st.integers(1, 4), "models")
    base, models = grid(data.draw(GRID_SHAPES, "shape"), count, data.draw(st.integers(0, 10**6), "seed"))
    parameters: dict[str, Any] = {
        "weight": [data.draw(DYADIC, "weight") for _ in range(count)],
        "normalize": data.draw(st.booleans(), "normalize"),
        "lambda": data.draw(st.sampled_from([0.5, 1.0, -2.0]), "lambda"),
    }
    if name != "task_arithmetic":
        parameters["density"] = [data.draw(DENSITY, "density") for _ in range(count)]
        parameters["rescale"] = False
    if name.startswith("breadcrumbs"):
        parameters["gamma"] = [data.draw(DENSITY, "gamma") for _ in range(count)]
    if name == "ties":
        parameters["scope"] = data.draw(st.sampled_from(["tensor", "global"]), "scope")
    if name == "della":
        parameters["epsilon"] = 0.005
    chunk = data.draw(st.sampled_from([None, 16, SMALL_CHUNK]), "chunk")
    result = apply(name, base, models, chunk=chunk, **parameters)
    assert_close(result, expected(METHODS[name], base, models, **parameters), models, base, **parameters)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), GRID_SHAPES, DENSITY, st.sampled_from([None, 16]))
def test_sce_selects_equal_variances_by_position(seed: int, shape: tuple[int, ...], share: float, chunk: Any) -> None:
    base, models = grid(shape, 4, seed)  # of four models on a grid the variances are exact
    result = apply("sce", base, models, select_topk=share, chunk=chunk)
    assert_close(result, oracle("sce", base, models, select_topk=share), models, base)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), GRID_SHAPES, st.sampled_from(["ram", "ramplus_tl"]))
def test_ram_counts_only_what_exceeds_epsilon(seed: int, shape: tuple[int, ...], name: str) -> None:
    base, models = grid(shape, 3, seed)
    result = apply(name, base, models, epsilon=0.25)  # of the changes 0, 1/8, 2/8, 3/8 only the last counts
    assert_close(result, oracle(name, base, models, epsilon=0.25), models, base)


def test_arcee_fusion_selects_as_float64_does_at_the_size_of_fine_tuning() -> None:
    """Changes of 1e-4 move a row's softmax so little that its divergence drowns in float32 rounding."""
    rng = np.random.default_rng(0)
    base = np.asarray(0.05 * rng.normal(size=(60, 384)), np.float32)
    model = np.asarray(base + 1e-4 * rng.normal(size=base.shape), np.float32)
    taken = apply("arcee_fusion", base, [model]) == model
    should = oracle("arcee_fusion", base, [model]) == model
    assert 0.03 < should.mean() < 0.1
    assert np.mean(taken != should) < 1e-4


# ---- properties ----


@pytest.mark.parametrize("name", GIVES_THE_MODEL_BACK)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_identical_models_give_the_model_back(name: str, shape: tuple[int, ...]) -> None:
    base, (model, *_) = inputs_of(METHODS[name], shape)
    models = [model] * count_of(METHODS[name])
    parameters = GIVES_THE_MODEL_BACK[name]
    assert_close(apply(name, base, models, **parameters), model.astype(np.float64), models, base, **parameters)


@every(lambda method: has_oracle(method) and method.base != "none")
def test_what_no_model_changed_stays(method: Method) -> None:
    base, _ = normal((5, 40), 1)
    models = [base.copy() for _ in range(count_of(method))]
    for parameters in SETTINGS[method.name]:
        result = apply(method.name, base, models, **parameters)
        assert_close(result, base.astype(np.float64), models, base)


@every(lambda method: has_oracle(method) and method.name not in ASYMMETRIC)
def test_order_of_the_models_does_not_matter(method: Method) -> None:
    count = count_of(method)
    for parameters in SETTINGS[method.name]:
        base, models = inputs_of(method, (9, 40))
        order = np.random.default_rng(1).permutation(count) if count > 2 else [1, 0]
        turned = {key: [v[i] for i in order] if isinstance(v, list) else v for key, v in parameters.items()}
        first = apply(method.name, base, models, **parameters)
        if (statistics := statistics_of(method.name, models)) is not None:
            turned["statistics"] = [statistics[i] for i in order]
        second = apply(method.name, base, [models[i] for i in order], **turned)
        assert_close(second, first.astype(np.float64), models, base, **parameters)


@every(lambda method: has_oracle(method) and method.name not in NOT_HOMOGENEOUS)
@pytest.mark.parametrize("factor", [0.25, 8.0])
def test_scaling_all_inputs_scales_the_result(method: Method, factor: float) -> None:
    for parameters in SETTINGS[method.name]:
        if "eps" in parameters:
            continue
        base, models = inputs_of(method, (9, 40))
        grown = [model * np.float32(factor) for model in models]
        first = apply(method.name, base, models, **parameters)
        second = apply(method.name, None if base is None else base * np.float32(factor), grown, **parameters)
        assert_close(second, first.astype(np.float64) * factor, grown, None, **parameters)


# ---- chunks, backends, repetition ----


@every()
@pytest.mark.parametrize("shape", [(7000,), (3, 5000), (700, 11), (50, 3, 7, 4)], ids=str)
def test_chunks_change_nothing(method: Method, shape: tuple[int, ...]) -> None:
    for parameters in SETTINGS.get(method.name, [parameters_of(method)]):
        base, models = inputs_of(method, shape)
        whole = apply(method.name, base, models, chunk=10**6, **parameters)
        parts = apply(method.name, base, models, chunk=SMALL_CHUNK, **parameters)
        if method.name in ELEMENTWISE and not (parameters.get("rescale") or parameters.get("rescale_by") == "norm"):
            np.testing.assert_array_equal(whole, parts)
        else:
            assert_close(parts, whole.astype(np.float64), models, base, **parameters)


@every()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_equals_reference_bit_for_bit(method: Method, shape: tuple[int, ...]) -> None:
    pytest.importorskip("numba", reason="the compiled kernels need numba")
    for parameters in SETTINGS.get(method.name, [parameters_of(method)]):
        base, models = inputs_of(method, shape)
        reference, compiled = (
            apply(method.name, base, models, backend=backend, **parameters) for backend in ("reference", "compiled")
        )
        assert reference.tobytes() == compiled.tobytes()


@every()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_equals_reference_to_rounding(method: Method, shape: tuple[int, ...]) -> None:
    pytest.importorskip("torch", reason="the device kernels need torch")
    for parameters in SETTINGS.get(method.name, [parameters_of(method)]):
        base, models = inputs_of(method, shape)
        reference, torch = (
            apply(method.name, base, models, backend=backend, **parameters) for backend in ("reference", "torch")
        )
        assert_close(torch, reference.astype(np.float64), models, base, **parameters)


@every()
def test_same_call_same_bytes_and_inputs_untouched(method: Method) -> None:
    parameters = parameters_of(method)
    base, models = inputs_of(method, (30, 40))
    before = [array.copy() for array in [*models, *([] if base is None else [base])]]
    for array in [*models, *([] if base is None else [base])]:
        array.setflags(write=False)
    first, second = (apply(method.name, base, models, seed=3, **parameters) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    for array, copy in zip([*models, *([] if base is None else [base])], before, strict=True):
        np.testing.assert_array_equal(array, copy)


# ---- mistakes ----


@every()
def test_mistakes_are_refused_in_one_line(method: Method) -> None:
    base, models = inputs_of(method, (4, 3))
    parameters = parameters_of(method)
    wrong: list[tuple[Array | None, list[Array], dict[str, Any]]] = [
        (base, models, {**parameters, "no_such_parameter": 1.0}),
        (base, [*models[:-1], np.zeros((3, 4), np.float32)], parameters),
        (base, [*models[:-1], np.full((4, 3), np.nan, np.float32)], parameters),
        (base, models[: method.min_models - 1], parameters),
    ]
    if method.base == "required":
        wrong.append((None, models, parameters))
    if method.max_models:
        wrong.append((base, [*models, models[0]], parameters))
    wrong += [
        (base, models, {key: value for key, value in parameters.items() if key != parameter.name})
        for parameter in method.parameters.values()
        if parameter.default is REQUIRED
    ]
    for start, others, given_parameters in wrong:
        with pytest.raises(CuveeError) as caught:
            apply(method.name, start, others, **given_parameters)
        assert "\n" not in str(caught.value)


# ---- random draws ----

DRAWN = pytest.mark.parametrize("name", sorted(RANDOM))


def _draw(name: str, shape: tuple[int, ...], seed: int = 0, **parameters: Any) -> tuple[list[Array], list[Array]]:
    """Task vectors without zeros, and what was kept of them."""
    rng = np.random.default_rng([7, *shape])
    taus = [np.asarray(rng.choice([-1, 1], shape) * (0.01 + rng.random(shape)), np.float32) for _ in range(2)]
    return taus, masks_of(name, np.zeros(shape, np.float32), taus, seed, **parameters)


@DRAWN
@pytest.mark.parametrize("shape", [(200, 300), (40_000,), (3000, 1), (30, 40, 5, 5)], ids=str)
@pytest.mark.parametrize("density", [0.2, 0.5, 0.84])
def test_keep_share_is_the_keep_probability(name: str, shape: tuple[int, ...], density: float) -> None:
    """Overall, and as a trend over the ranks: within five standard deviations."""
    epsilon = 0.15 if name.startswith("della") else None
    taus, masks = _draw(name, shape, density=density)
    for tau, mask in zip(taus, masks, strict=True):
        probability = keep_probability(tau, density, epsilon)
        variance = probability * (1 - probability)
        assert abs(mask.mean() - density) < 5 * np.sqrt(variance.sum()) / mask.size
        for weight in (np.ones(shape), probability - density, np.abs(tau) - np.abs(tau).mean()):
            spread = np.sqrt(np.sum(weight**2 * variance))
            assert abs(np.sum(weight * (mask - probability))) <= 5 * spread


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_mean_over_seeds_is_task_arithmetic(name: str) -> None:
    """Rescaled by the keep probability, each entry's mean over the draws is what it is without dropping."""
    seeds, density, weight = 600, 0.4, [1.0, 0.5, -0.7]
    base, models = normal((6, 8), 3)
    draws = [apply(name, base, models, seed=seed, weight=weight, density=density) for seed in range(seeds)]
    mean = np.mean(np.asarray(draws, np.float64), axis=0)
    variance = np.zeros(base.shape)
    for w, model in zip(weight, models, strict=True):
        tau = task_vector(model, base)
        p = keep_probability(tau, density, 0.15 if name == "della_linear" else None)
        variance = variance + (w * tau) ** 2 * (1 - p) / p
    distance = np.abs(mean - oracle("task_arithmetic", base, models, weight=weight))
    moved = variance > 0
    z = distance[moved] / np.sqrt(variance[moved] / seeds)
    assert z.max() < 5
    assert 0.5 < np.mean(z**2) < 1.6  # neither biased nor less random than said
    assert distance[~moved].max(initial=0) < 1e-6


@DRAWN
def test_tensors_models_and_seeds_draw_independently(name: str) -> None:
    shape = (200, 100)
    streams = []
    for seed, key in [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2**40, "a")]:
        for tau, mask in zip(*_draw(name, shape, seed, key=key, density=0.5), strict=True):
            surprise = mask - keep_probability(tau, 0.5, 0.15 if name.startswith("della") else None)
            streams.append(surprise.ravel() / surprise.std())
    centred = np.array(streams)
    limit = 5 / np.sqrt(centred.shape[1])
    for lag in range(-2, 3):  # a stream must not be another one's, shifted, either
        shifted = np.roll(centred, lag, axis=1)
        correlation = centred @ shifted.T / centred.shape[1]
        if lag == 0:
            np.fill_diagonal(correlation, 0.0)
        assert np.abs(correlation).max() < limit


@DRAWN
def test_masks_depend_on_seed_tensor_and_model_only(name: str) -> None:
    """Not on chunks, backends, weights or the other models."""
    taus, masks = _draw(name, (40, 60), 4, density=0.5)
    for options in ({"chunk": 100}, {"backend": "reference"}):
        for mask, again in zip(masks, _draw(name, (40, 60), 4, density=0.5, **options)[1], strict=True):
            np.testing.assert_array_equal(mask, again)
    (alone,) = masks_of(name, np.zeros((40, 60), np.float32), taus[:1], 4, density=0.5)
    np.testing.assert_array_equal(masks[0], alone)
