"""Scalars, gradients and conditions: what they say about a tensor, and that mergekit says the same."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.errors import RecipeError
from merging.methods.registry import Parameter
from merging.node import Node, read
from merging.setting import Setting

PATIENT = settings(deadline=None)  # a busy machine is no failure

FLOAT, INT, BOOL, TEXT = (Parameter("p", kind) for kind in (float, int, bool, str))

positions = st.floats(0, 1)
numbers = st.floats(-10, 10) | st.integers(-10, 10)
filters = st.sampled_from([None, "*", "mlp", "attn", "layers.1.", "norm", ""])
names = st.sampled_from(["model.layers.1.mlp.up", "model.layers.11.attn.q", "model.norm", "lm_head"])


def setting(value: Any) -> Setting:
    return Setting.of("p", Node.of(value))


def conditions(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    single = values | st.lists(values, min_size=1, max_size=5)
    entry = st.fixed_dictionaries({"value": single}, optional={"filter": filters})
    return single | entry | st.lists(entry, min_size=1, max_size=4)


def refusal(value: Any, parameter: Parameter = FLOAT) -> str:
    with pytest.raises(RecipeError) as error:
        Setting.of(parameter.name, Node.of(value, "r.yml:7")).read_as(parameter)
    return str(error.value)


@PATIENT
@given(st.lists(numbers, min_size=2, max_size=6), positions)
def test_a_gradient_is_piecewise_linear(ends: list[float], t: float) -> None:
    width = 1 / (len(ends) - 1)
    expected = sum(end * max(0.0, 1 - abs(t - i * width) / width) for i, end in enumerate(ends))  # hat functions
    assert setting(ends).at("x", t) == pytest.approx(expected, abs=1e-9)


@PATIENT
@given(st.lists(st.booleans(), min_size=1, max_size=6), positions)
def test_of_switches_one_is_taken(ends: list[bool], t: float) -> None:
    assert setting(ends).at("x", t) is ends[int(t * (len(ends) - 1))]


def test_the_first_condition_whose_filter_is_part_of_the_name_holds() -> None:
    rules = setting(
        [{"filter": "mlp", "value": 1}, {"filter": "layers.1", "value": [0, 1]}, {"filter": "*", "value": 3}]
    )
    assert [rules.at(name, 0.5) for name in ("layers.1.mlp", "layers.1.attn", "norm")] == [1, 0.5, 3]
    assert setting({"filter": "mlp", "value": 1}).at("norm", 0) is None


@PATIENT
@given(conditions(numbers | st.sampled_from(["1e-5", "2", "-.5"])), names, positions)
def test_numbers_equal_mergekits(config: Any, value: Any, name: str, t: float) -> None:
    assert setting(value).read_as(FLOAT).at(name, t) == mergekits(config, value, name, t, float)


@PATIENT
@given(conditions(st.booleans()), names, positions)
def test_switches_equal_mergekits(config: Any, value: Any, name: str, t: float) -> None:
    assert setting(value).read_as(BOOL).at(name, t) == mergekits(config, value, name, t, bool)


@PATIENT
@given(conditions(st.sampled_from(["sum", "count", "1e-5"])), names, positions)
def test_texts_equal_mergekits(config: Any, value: Any, name: str, t: float) -> None:
    assert setting(value).read_as(TEXT).at(name, t) == mergekits(config, value, name, t, str)


def mergekits(config: Any, value: Any, name: str, t: float, kind: type) -> Any:
    import pydantic

    if isinstance(value, dict):
        value = config.ConditionalParameter(**value)
    elif isinstance(value, list) and isinstance(value[0], dict):
        value = [config.ConditionalParameter(**entry) for entry in value]
    return config.evaluate_setting(name, value, t, validate=pydantic.TypeAdapter(kind).validate_python)


@pytest.fixture(scope="module")
def config() -> Any:
    """mergekit's own; some seconds to import."""
    with warnings.catch_warnings():  # of its many imports
        warnings.simplefilter("ignore")
        return importlib.import_module("mergekit.config")


@PATIENT
@given(conditions(numbers | st.booleans() | st.text(max_size=3)))
def test_plain_is_the_inverse_of_of(value: Any) -> None:
    one = setting(value)
    assert setting(one.plain()) == one


@pytest.mark.parametrize(
    ("written", "parameter", "value"),
    [
        *(
            ("1e-5", FLOAT, 1e-5),
            ("1", FLOAT, 1.0),
            ("'0.5'", FLOAT, 0.5),
            ("-.5E+3", FLOAT, -500.0),
            ("1.", FLOAT, 1.0),
        ),
        *(("10", INT, 10), ("10.0", INT, 10), ("1e3", INT, 1000)),
        *(("yes", BOOL, True), ("'false'", BOOL, False), ("0", BOOL, False), ("1", BOOL, True), ("sum", TEXT, "sum")),
    ],
)
def test_yaml_scalars_come_in_the_parameters_type(written: str, parameter: Parameter, value: Any) -> None:
    result = Setting.of("p", read(written, "r.yml")).read_as(parameter).at("x", 0)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "'p' must be a value or a list of values, not nothing"),
        ([], "the list of 'p' is empty; give it at least one value"),
        ([[1]], "'p' must be a value or a list of values, not a list"),
        (float("nan"), "'p' is nan: it must be finite"),
        ([0.0, float("inf")], "'p' is inf: it must be finite"),
        ("nan", "'p' must be a number, not 'nan'"),
        ("1e999", "'p' must be a number, not '1e999'"),
        (10**400, f"'p' must be a number, not {10**400}"),
        ("half", "'p' must be a number, not 'half'"),
        (True, "'p' must be a number, not true"),
        ([0.1, True], "'p' must be a number, not true"),
        ({"filter": "x"}, "a condition of 'p' has no value; add 'value:'"),
        ([{"fliter": "x", "value": 1}], "'fliter' is no key of a condition; did you mean 'filter'?"),
        ([{"value": 1}, 2], "'p' mixes conditions and plain values; write 'value: 2'"),
        (
            {"filter": 3, "value": 1},
            "the filter of 'p' must be text, a part of tensor names, not '3'; put it in quotes",
        ),
        ({"value": {"value": 1}}, "'p' must be a value or a list of values, not a mapping"),
    ],
)
def test_refusals(value: Any, message: str) -> None:
    where, _, what = refusal(value).partition(": ")
    assert where.startswith("r.yml:7")
    assert what == message


@pytest.mark.parametrize("value", [1.5, [0, 1.5], [{"filter": "x", "value": 1.5}, {"value": 0}], {"value": [0, 1.5]}])
def test_every_value_of_gradients_and_conditions_must_be_in_range(value: Any) -> None:
    assert refusal(value, Parameter("density", float, low=0, high=1)).endswith(": 'density' is 1.5, outside [0, 1]")
    assert refusal(value, Parameter("density", float, high=1)).endswith(": 'density' is 1.5; it must be at most 1")


def test_types_and_choices_are_told() -> None:
    scope = Parameter("scope", str, choices=("tensor", "global"))
    assert refusal("globl", scope) == "r.yml:7: 'globl' is no choice for 'scope'; did you mean 'global'?"
    assert refusal("x", scope) == "r.yml:7: 'x' is no choice for 'scope'; choose one of 'tensor', 'global'"
    assert refusal(1, scope) == "r.yml:7: 'scope' must be text, not 1; put it in quotes"
    assert refusal(1.5, INT) == "r.yml:7: 'p' must be a whole number, not 1.5"
    assert refusal(2, BOOL) == "r.yml:7: 'p' must be true or false, not 2"
    assert refusal("maybe", BOOL) == "r.yml:7: 'p' must be true or false, not 'maybe'"
    assert refusal(-1, Parameter("k", int, low=0)) == "r.yml:7: 'k' is -1; it must be at least 0"
