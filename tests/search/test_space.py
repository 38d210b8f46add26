from __future__ import annotations

import pytest

from merging.errors import CuveeError
from merging.methods import registry
from search.space import Space, Vary, make_space

NAMES = ["embeddings.weight", "layer.0.dense.weight", "layer.0.norm.bias", "layer.1.dense.weight", "layer.1.norm.bias"]


def space(method: str = "task_arithmetic", models: int = 2, **vary: Vary) -> Space:
    return make_space(registry.get(method), models, {n.rstrip("_"): v for n, v in vary.items()}, NAMES)


def names(found: Space) -> list[str]:
    return [dimension.name for dimension in found.dimensions]


def test_the_registry_says_what_varies_by_default() -> None:
    assert names(space()) == ["weight.0", "weight.1"]
    ties = space("ties", 3)
    assert names(ties) == ["weight.0", "weight.1", "weight.2", "density"]
    assert (ties.dimensions[3].low, ties.dimensions[3].high, ties.dimensions[3].default) == (0.1, 1, 1.0)
    assert names(space("slerp", 1)) == ["t"]
    assert names(space("fisher")) == ["weight.0", "weight.1"]


def test_every_method_that_has_a_parameter_has_a_space() -> None:
    for method in registry.known().values():
        if method.parameters:
            assert make_space(method, max(method.min_models, 1), {}).distributions(), method.name
    assert names(space("model_stock")) == ["filter_wise"]
    assert names(space("ramplus_tl")) == ["r", "alpha", "epsilon"]
    with pytest.raises(
        CuveeError, match="'arcee_fusion' has no parameter, so there is nothing to search; choose another"
    ):
        space("arcee_fusion", 1)


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_a_keep_probability_that_spreads_stays_one_all_over_the_space(method: str) -> None:
    spread = registry.get(method).parameters["epsilon"].default
    (density,) = (d for d in space(method).dimensions if d.name == "density")
    assert density.low is not None and density.high is not None
    assert density.low - spread > 0 and density.high + spread < 1
    assert density.low <= density.default <= density.high


def test_a_coefficient_per_model_and_layer_group() -> None:
    found = space(weight=Vary(low=0, high=1, per="layers"))
    assert names(found)[:4] == ["weight.0.embeddings", "weight.1.embeddings", "weight.0.layer.0", "weight.1.layer.0"]
    point = {d.name: place / 10 for place, d in enumerate(found.dimensions)}
    assert found.coefficients(point) == {
        "weight": {"embeddings": [0.0, 0.1], "layer.0": [0.2, 0.3], "layer.1": [0.4, 0.5]}
    }


def test_a_coefficient_per_module_kind_of_a_parameter_of_all_models() -> None:
    found = space(lambda_=Vary(low=0, high=2, per="module"), weight=Vary(value=1.0))
    assert names(found) == ["lambda.embeddings", "lambda.dense", "lambda.norm"]
    assert found.coefficients(dict.fromkeys(names(found), 1.5)) == {
        "weight": 1.0,
        "lambda": {"embeddings": 1.5, "dense": 1.5, "norm": 1.5},
    }


@pytest.mark.parametrize("method", ["linear", "multislerp"])
def test_weights_of_nothing_that_are_divided_by_their_sum_are_equal_ones(method: str) -> None:
    found = space(method)
    nothing = dict.fromkeys(names(found), 0.0)
    assert found.coefficients(nothing)["weight"] == [1.0, 1.0]
    assert found.coefficients({**nothing, "weight.1": 1e-9})["weight"] == [0.0, 1e-9]
    layers = space(method, weight=Vary(low=0, high=1, per="layers"))
    point = {d.name: float(d.group == "layer.0") for d in layers.dimensions}
    weights = layers.coefficients(point)["weight"]
    assert set(map(tuple, weights.values())) == {(1.0, 1.0)}


def test_weights_of_nothing_stay_what_they_are_where_nothing_divides() -> None:
    assert space().coefficients({"weight.0": 0.0, "weight.1": 0.0})["weight"] == [0.0, 0.0]
    chosen = space(normalize=Vary(choices=(True, False)), weight=Vary(low=0, high=1, per="model"))
    for normalize, wanted in ((True, [1.0, 1.0]), (False, [0.0, 0.0])):
        point = {"weight.0": 0.0, "weight.1": 0.0, "normalize": normalize}
        assert chosen.coefficients(point)["weight"] == wanted


def test_what_is_fixed_comes_through() -> None:
    found = space(weight=Vary(low=0, high=1, per="all"), lambda_=Vary(value=0.5), normalize=Vary(choices=(True, False)))
    assert names(found) == ["weight", "normalize"]
    assert found.coefficients({"weight": 0.25, "normalize": True}) == {"weight": 0.25, "normalize": True, "lambda": 0.5}


def test_the_unit_cube_and_back() -> None:
    found = space(lambda_=Vary(low=0.01, high=1, log=True), normalize=Vary(choices=(True, False)))
    point = found.point([0.25, 0.0, 0.9, 0.5])
    assert point == {"weight.0": 0.25, "weight.1": 0.0, "normalize": False, "lambda": pytest.approx(0.1)}
    assert found.coordinates(point) == pytest.approx([0.25, 0.0, 0.0, 1.0, 0.5])
    assert found.point([1.0] * 4)["normalize"] is False


def test_the_space_is_refused_where_nothing_varies_or_too_much() -> None:
    with pytest.raises(CuveeError, match="nothing varies"):
        space(weight=Vary(value=1.0))
    with pytest.raises(CuveeError, match="150 coefficients"):
        space(models=50, weight=Vary(low=0, high=1, per="layers", where="search.yml:3"))
