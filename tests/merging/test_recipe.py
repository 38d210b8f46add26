"""Recipes: what they say, what they round-trip to, and where every mistake is told."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.errors import RecipeError
from merging.methods.registry import Method, Parameter
from merging.recipe import ModelRef, Recipe, Source

PATIENT = settings(deadline=None)  # a busy machine is no failure


def method(name: str = "ties", base: Any = "required", models: tuple[int, int | None] = (1, None)) -> Method:
    parameters = (
        Parameter("weight", float, per_model=True),
        Parameter("density", float, per_model=True, default=1.0, low=0, high=1),
        Parameter("normalize", bool, default=True),
        Parameter("lambda", float, default=1.0),
        Parameter("max_iter", int, default=10, low=1),
        Parameter("scope", str, default="tensor", choices=("tensor", "global")),
    )
    by_name = {parameter.name: parameter for parameter in parameters}
    return Method(name, name, lambda inputs: None, by_name, base, models[0], models[1], "nowhere")


TIES, LINEAR, SLERP = method(), method("linear", "none"), method("slerp", models=(1, 1))
OPTIONAL = method("multislerp", "optional", (2, None))

GOOD = """\
merge_method: ties
base_model: org/base@v1
models:
  - model: a
    parameters:
      weight: 1
  - model: b+lora
    parameters:
      weight: [0, 0.5, 1]
      density:
        - filter: mlp
          value: 0.1
        - value: 0.9
parameters:
  density: 0.5
  normalize: false
  lambda: 1e-1
dtype: torch.bfloat16
out_dtype: float32
tokenizer: {source: base, pad_to_multiple_of: 8}
chat_template: chatml
missing: keep
"""


def refusal(text: str, method: Method | None = None) -> str:
    with pytest.raises(RecipeError) as error:
        recipe = Recipe.parse(text, "recipe.yml")
        assert method is not None
        recipe.check(method)
    return str(error.value)


def test_a_recipe_is_read() -> None:
    recipe = Recipe.parse(GOOD, "recipe.yml")
    assert recipe.merge_method == "ties"
    assert recipe.base_model == ModelRef("org/base", "v1")
    assert [source.model for source in recipe.models] == [ModelRef("a"), ModelRef("b", adapter="lora")]
    assert [source.where for source in recipe.models] == ["recipe.yml:4", "recipe.yml:7"]
    assert recipe.models[1].parameters["density"].where == "recipe.yml:10"
    assert [condition.where for condition in recipe.models[1].parameters["density"].conditions] == [
        *("recipe.yml:12", "recipe.yml:13")
    ]
    assert (recipe.dtype, recipe.out_dtype, recipe.missing) == ("bfloat16", "float32", "keep")
    assert recipe.tokenizer == {"source": "base", "pad_to_multiple_of": 8}
    assert (recipe.chat_template, recipe.tokenizer_source, recipe.slices, recipe.modules) == (
        "chatml",
        None,
        None,
        None,
    )
    assert (recipe.text, recipe.where) == (GOOD, "recipe.yml")
    assert (recipe.at("dtype"), recipe.at("slices")) == ("recipe.yml:18", "recipe.yml")
    assert recipe.check(TIES) == []


def test_values_follow_model_then_recipe_then_default() -> None:
    recipe = Recipe.parse(GOOD, "recipe.yml")
    shared, per_model = recipe.values(TIES, "layers.3.mlp.up", 0.75)
    assert shared == {"normalize": False, "lambda": 0.1, "max_iter": 10, "scope": "tensor"}
    assert per_model == {"weight": [1.0, 0.75], "density": [0.5, 0.1]}
    assert recipe.values(TIES, "layers.3.attn.q", 0.0)[1] == {"weight": [1.0, 0.0], "density": [0.5, 0.9]}


def test_python_and_yaml_say_the_same() -> None:
    made = Recipe(
        merge_method="ties",
        base_model="org/base@v1",
        models=[
            {"model": "a", "parameters": {"weight": 1}},
            {
                "model": "b+lora",
                "parameters": {"weight": [0, 0.5, 1], "density": [{"filter": "mlp", "value": 0.1}, {"value": 0.9}]},
            },
        ],
        parameters={"density": 0.5, "normalize": False, "lambda": "1e-1"},
        dtype="bfloat16",
        out_dtype="float32",
        tokenizer={"source": "base", "pad_to_multiple_of": 8},
        chat_template="chatml",
        missing="keep",
    )
    assert made == Recipe.parse(GOOD)
    assert made.text == made.to_yaml()
    assert Recipe.parse(made.text) == made


def test_a_recipe_takes_its_own_parts_and_can_be_replaced() -> None:
    recipe = Recipe.parse(GOOD, "recipe.yml")
    again = Recipe("ties", models=recipe.models, base_model=recipe.base_model, parameters=recipe.parameters)
    assert again == Recipe.parse(GOOD[: GOOD.index("dtype")])
    assert dataclasses.replace(recipe, dtype="float16").dtype == "float16"
    assert dataclasses.replace(recipe, dtype="bfloat16") == recipe
    assert Recipe("linear", ["a", {"model": "b"}, Source(ModelRef("c"))]).models == tuple(
        Source(ModelRef(name)) for name in "abc"
    )


scalars = st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
values = scalars | st.lists(scalars, min_size=1, max_size=4)
conditions = st.fixed_dictionaries({"value": values}, optional={"filter": st.none() | st.text(max_size=5)})
parameters = st.dictionaries(
    st.text(min_size=1, max_size=5), values | conditions | st.lists(conditions, min_size=1, max_size=3)
)
paths = st.text(min_size=1, max_size=8).filter(str.strip)
places = st.fixed_dictionaries({"path": paths}, optional={"revision": st.none() | paths})
models = st.fixed_dictionaries({"model": places}, optional={"lora": places, "override_architecture": paths})
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


@PATIENT
@given(
    st.fixed_dictionaries(
        {"merge_method": st.text(min_size=1, max_size=8)},
        optional={
            **{"base_model": models, "parameters": parameters, "chat_template": st.text(max_size=20)},
            **{"dtype": st.sampled_from(["float16", "bfloat16", "torch.float32"]), "out_dtype": st.just("float32")},
            "missing": st.sampled_from(["error", "keep", "drop"]),
        },
    ),
    st.one_of(
        st.fixed_dictionaries(
            {
                "models": st.lists(
                    st.fixed_dictionaries({"model": models}, optional={"parameters": parameters}), min_size=1
                )
            }
        ),
        st.fixed_dictionaries({"slices": st.lists(trees, min_size=1)}),
        st.fixed_dictionaries({"modules": st.dictionaries(st.text(max_size=4), trees, min_size=1)}),
    ),
    st.one_of(
        st.just({}),
        st.fixed_dictionaries({"tokenizer_source": st.text(max_size=8)}),
        st.fixed_dictionaries({"tokenizer": st.fixed_dictionaries({"source": st.text()}, optional={"tokens": trees})}),
    ),
)
def test_canonical_yaml_parses_to_an_equal_recipe(
    head: dict[str, Any], body: dict[str, Any], tokenizer: dict[str, Any]
) -> None:
    recipe = Recipe(**head, **body, **tokenizer)
    text = recipe.to_yaml()
    assert Recipe.parse(text) == recipe
    assert Recipe.parse(text).to_yaml() == text


def test_canonical_yaml_reads_well() -> None:
    assert Recipe.parse(GOOD).to_yaml().splitlines()[:6] == [
        *("merge_method: ties", "base_model: org/base@v1", "models:", "- model: a", "  parameters: {weight: 1}"),
        "- model: b+lora",
    ]


def test_a_file_is_loaded_and_its_lines_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    recipe = Recipe.load("recipe.yml")
    assert recipe == Recipe.parse(GOOD)
    assert recipe.models[1].where == "recipe.yml:7"
    assert Recipe.load(tmp_path / "recipe.yml").where == str(tmp_path / "recipe.yml")


def test_what_is_no_recipes_file_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> str:
        with pytest.raises(RecipeError) as error:
            Recipe.load(name)
        return str(error.value)

    monkeypatch.chdir(tmp_path)
    Path("latin.yml").write_bytes("merge_method: linear\n# Größe\n".encode("latin-1"))
    Path("big.yml").write_bytes(b"#" * (1 << 20) + b"\n")
    Path("empty.yml").write_bytes(b"")
    assert load("none.yml") == "none.yml: no such file"
    assert load(".") == ".: is a folder, not a recipe; give the path of a YAML file"
    assert load("latin.yml") == "latin.yml:2: is not UTF-8 text; save it as UTF-8"
    assert load("big.yml") == "big.yml: is larger than 1 MiB: no recipe; give the path of a YAML file"
    assert load("empty.yml") == "empty.yml: is empty; write at least 'merge_method:' and 'models:'"
    assert load("a\0b") == "a\\x00b: cannot be read: embedded null byte"
    if os.geteuid() != 0:
        Path("empty.yml").chmod(0)
        assert load("empty.yml") == "empty.yml: cannot be read: Permission denied"


HEAD = "merge_method: ties\nbase_model: p\nmodels:\n"
A = "  - model: a\n    parameters: {weight: 1}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "recipe.yml:1: a recipe is a mapping, not a list; write 'merge_method:' and 'models:'"),
        ("merge_method: [", "recipe.yml:1: is not valid YAML: "),
        ("merge_method: ties\nmodel: []\n", "recipe.yml:2: 'model' is no key of a recipe; did you mean 'models'?"),
        ("models: [a]\n", "recipe.yml: a recipe needs 'merge_method'; add 'merge_method: linear', say"),
        (
            "merge_method:\nmodels: [a]\n",
            "recipe.yml:1: a recipe needs 'merge_method'; add 'merge_method: linear', say",
        ),
        ("merge_method: []\nmodels: [a]\n", "recipe.yml:1: 'merge_method' must be text, not a list"),
        ("merge_method: ties\n", "recipe.yml: a recipe needs 'models'; add 'models:' with one entry a model"),
        (
            "merge_method: ties\nmodels:\n",
            "recipe.yml:2: a recipe needs 'models'; add 'models:' with one entry a model",
        ),
        ("merge_method: ties\nmodels: []\n", "recipe.yml:2: 'models' is empty; list what to merge"),
        ("merge_method: ties\nmodels: a\n", "recipe.yml:2: 'models' must be a list, not 'a'"),
        ("merge_method: ties\nmodules: [a]\n", "recipe.yml:2: 'modules' must be a mapping, not a list"),
        (
            "merge_method: ties\nmodels: [a]\nslices: [b]\n",
            "recipe.yml:3: 'models', 'slices' exclude each other; keep one of them",
        ),
        (HEAD + "  - parameters: {}\n", "recipe.yml:4: an entry of 'models' has no 'model'; add 'model: PATH'"),
        (
            HEAD + "  - model: a\n    wieght: 1\n",
            "recipe.yml:5: 'wieght' is no key of a model; known: 'model', 'parameters'",
        ),
        (
            HEAD + "  - model: a\n    parameter: {}\n",
            "recipe.yml:5: 'parameter' is no key of a model; did you mean 'parameters'?",
        ),
        (HEAD + "  - model:\n", "recipe.yml:4: a model must be a folder or a hub id, not nothing"),
        (
            HEAD + "  - model: {model: {pth: a}}\n",
            "recipe.yml:4: 'pth' is no key of a model reference; did you mean 'path'?",
        ),
        (
            HEAD + A + "parameters: 3\n",
            "recipe.yml:6: 'parameters' must be a mapping, not '3'; write 'parameters: {weight: 1.0}'",
        ),
        (
            HEAD + A + "parameters:\n  density:\n",
            "recipe.yml:7: 'density' must be a value or a list of values, not nothing",
        ),
        (HEAD + A + "parameters:\n  density: .nan\n", "recipe.yml:7: 'density' is .nan: it must be finite"),
        (
            HEAD + A + "parameters:\n  density:\n  - fliter: x\n    value: 1\n",
            "recipe.yml:8: 'fliter' is no key of a condition; did",
        ),
        (HEAD + A + "parameters:\n  density:\n  - filter: x\n", "recipe.yml:8: a condition of 'density' has no value"),
        (HEAD + A + "dtype: bf16\n", "recipe.yml:6: 'bf16' is no choice for 'dtype'; did you mean 'bfloat16'?"),
        (
            HEAD + A + "dtype: int8\n",
            "recipe.yml:6: 'int8' is no choice for 'dtype'; choose one of 'float32', 'bfloat16', 'float16'",
        ),
        (
            HEAD + A + "out_dtype: float64\n",
            "recipe.yml:6: 'out_dtype: float64' would add no digit: arithmetic is float32; store as float32",
        ),
        (HEAD + A + "missing: kep\n", "recipe.yml:6: 'kep' is no choice for 'missing'; did you mean 'keep'?"),
        (
            HEAD + A + "tokenizer: base\n",
            "recipe.yml:6: 'tokenizer' must be a mapping, not 'base'; write 'tokenizer: {source: base}'",
        ),
        (
            HEAD + A + "tokenizer: {sorce: base}\n",
            "recipe.yml:6: 'sorce' is no key of 'tokenizer'; did you mean 'source'?",
        ),
        (
            HEAD + A + "tokenizer: {source: base}\ntokenizer_source: base\n",
            "recipe.yml:7: 'tokenizer_source' and 'tokenizer' exclude each other; keep one of them",
        ),
        (HEAD + A + "chat_template: {a: b}\n", "recipe.yml:6: 'chat_template' must be text, not a mapping"),
    ],
    ids=lambda text: text[-30:],
)
def test_what_is_no_recipe(text: str, message: str) -> None:
    assert refusal(text).startswith(message)


@pytest.mark.parametrize(
    ("text", "method", "message"),
    [
        (
            HEAD + "  - model: a\n    parameters:\n      weight: 1\n      desnity: 1\n",
            TIES,
            "recipe.yml:7: 'desnity' is no parameter of 'ties'; did you mean 'density'?",
        ),
        (
            HEAD + A + "parameters:\n  rank: 1\n",
            TIES,
            "recipe.yml:7: 'rank' is no parameter of 'ties'; it takes 'weight', 'density', "
            "'normalize', 'lambda', 'max_iter', 'scope'",
        ),
        (
            HEAD + "  - model: a\n    parameters:\n      weight: 1\n      lambda: 1\n",
            TIES,
            "recipe.yml:7: 'lambda' of 'ties' holds for the whole merge, not for one model; "
            "move it to the recipe's own 'parameters:'",
        ),
        (
            HEAD + A + "  - model: b\n",
            TIES,
            "recipe.yml:6: the model 'b' has no 'weight', which 'ties' needs; "
            "add 'parameters: {weight: 1.0}' under the model",
        ),
        (HEAD + A + "parameters:\n  density: 1.5\n", TIES, "recipe.yml:7: 'density' is 1.5, outside [0, 1]"),
        (HEAD + A + "parameters:\n  density: [0.5, -1]\n", TIES, "recipe.yml:7: 'density' is -1, outside [0, 1]"),
        (
            HEAD + A + "parameters:\n  density:\n  - filter: x\n    value: 2\n",
            TIES,
            "recipe.yml:9: 'density' is 2, outside [0, 1]",
        ),
        (HEAD + A + "parameters:\n  max_iter: 0\n", TIES, "recipe.yml:7: 'max_iter' is 0; it must be at least 1"),
        (
            HEAD + A + "parameters:\n  scope: globl\n",
            TIES,
            "recipe.yml:7: 'globl' is no choice for 'scope'; did you mean 'global'?",
        ),
        (HEAD + A + "parameters:\n  normalize: 3\n", TIES, "recipe.yml:7: 'normalize' must be true or false, not 3"),
        (
            HEAD + "  - model: a\n    parameters: {weight: one}\n",
            TIES,
            "recipe.yml:5: 'weight' must be a number, not 'one'",
        ),
        (
            HEAD + "  - model: p\n    parameters: {density: 7}\n" + A,
            TIES,
            "recipe.yml:5: 'density' is 7, outside [0, 1]",
        ),
        (HEAD + A + A, TIES, "recipe.yml:6: the model 'a' is listed twice; remove this entry, or that at recipe.yml:4"),
        (
            HEAD + A + "  - ./a/\n",
            TIES,
            "recipe.yml:6: the model './a/' is listed twice; remove this entry, or that at recipe.yml:4",
        ),
        (HEAD + "  - p\n", TIES, "recipe.yml:3: the only model is the base itself, 'p'; add models to merge onto it"),
        (
            "models: [a]\n\nmerge_method: ties\n",
            TIES,
            "recipe.yml:3: 'ties' needs a base; add 'base_model:', the model that the others were fine-tuned from",
        ),
        (
            HEAD + A + "  - b\n  - p\n  - c\n",
            SLERP,
            "recipe.yml:3: 'slerp' merges exactly 1 model besides its base, not 3; remove 2",
        ),
        (
            "merge_method: multislerp\nmodels: [a]\n",
            OPTIONAL,
            "recipe.yml:2: 'multislerp' merges at least 2 models, not 1; list 1 more",
        ),
        (
            "merge_method: linear\nmodels: [a, b, c]\n",
            method("linear", "none", (1, 2)),
            "recipe.yml:2: 'linear' merges at most 2 models, not 3; remove 1",
        ),
        (
            "merge_method: linear\nmodels:\n- model: a\n  parameters:\n    weight: 0.3\n- model: b\n"
            "  parameters: {weight: -0.1}\n"
            "- model: c\n  parameters: {weight: -0.2}\n",
            LINEAR,
            "recipe.yml:5: the weights sum to 0 and 'normalize' divides by their sum; "
            "change a weight, or set 'normalize: false'",
        ),
        ("merge_method: linear\nmodels: [a]\nparameters: {weight: 0}\n", LINEAR, "recipe.yml:3: the weights sum to 0"),
        (
            "merge_method: passthrough\nslices: [a]\n",
            LINEAR,
            "recipe.yml:2: 'slices' are for mergekit alone; list 'models' instead",
        ),
    ],
    ids=lambda value: value[-30:] if isinstance(value, str) else value.name,
)
def test_what_does_not_suit_the_method(text: str, method: Method, message: str) -> None:
    assert refusal(text, method).startswith(message)


def test_a_missing_shared_parameter_is_told_at_the_method() -> None:
    needy = Method("nearswap", "", print, {"t": Parameter("t", float)}, "none", 1, None, "")
    assert refusal("models: [a]\nmerge_method: nearswap\n", needy) == (
        "recipe.yml:2: 'nearswap' needs 't'; add 'parameters: {t: 0.5}' to the recipe"
    )


def test_a_mistake_made_in_python_is_told_by_the_way_to_it() -> None:
    recipe = Recipe("ties", ["a", {"model": "b", "parameters": {"desnity": 1}}], base_model="p")
    with pytest.raises(
        RecipeError, match=r"^recipe\.models\[1\]\.parameters\.desnity: 'desnity' is no parameter of 'ties'"
    ):
        recipe.check(TIES)
    with pytest.raises(TypeError):
        Recipe("ties", model=["a"])  # type: ignore[call-arg]


def test_weights_that_are_graded_or_not_normalised_may_sum_to_0() -> None:
    for extra in ("weight: [0, 0]", "weight: [{filter: x, value: 1}, {value: 0}]", "normalize: false, weight: 0"):
        assert Recipe.parse(f"merge_method: linear\nmodels: [a]\nparameters: {{{extra}}}\n").check(LINEAR) == []


def test_notes_are_told_with_their_line() -> None:
    recipe = Recipe.parse(
        "merge_method: linear\nbase_model: p\nmodels: [a]\nparameters:\n  weight: 1\n  int8_mask: true\n", "r.yml"
    )
    assert recipe.check(LINEAR) == [
        "r.yml:6: 'int8_mask' is ignored: no mask is kept in memory",
        "r.yml:2: 'linear' has no base: 'p' only lends its config and tokenizer",
    ]
    recipe = Recipe.parse(HEAD + A + "  - model: p\n    parameters: {weight: 2}\n", "r.yml")
    assert recipe.check(TIES) == [
        "r.yml:6: the parameters of the base 'p' are ignored: it is what others are merged onto"
    ]


def test_for_mergekit_counts_and_required_parameters_are_not_ours_to_judge() -> None:
    assert Recipe.parse("merge_method: passthrough\nslices: [{sources: []}]\n").check(None, mergekit_only=True) == []
    assert Recipe.parse("merge_method: slerp\nmodels: [a]\n").check(SLERP, mergekit_only=True) == []
    with pytest.raises(RecipeError, match="r:3: mergekit, which runs this merge, knows no 'missing'; remove it"):
        Recipe.parse("merge_method: passthrough\nmodels: [a]\nmissing: keep\n", "r").check(None)
    with pytest.raises(RecipeError, match="r:3: 'wieght' is no parameter of 'slerp'; did you mean 'weight'"):
        Recipe.parse("merge_method: slerp\nmodels: [a]\nparameters: {wieght: 1}\n", "r").check(
            SLERP, mergekit_only=True
        )


def test_the_base_takes_part_only_where_a_method_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = Recipe("x", ["a", "./p", "b"], base_model=str(tmp_path / "p"), parameters={"weight": [1, 2]})
    assert [str(source.model) for source in recipe.merged(TIES)] == ["a", "b"]
    assert [str(source.model) for source in recipe.merged(OPTIONAL)] == ["a", "b"]
    assert [str(source.model) for source in recipe.merged(LINEAR)] == ["a", "./p", "b"]
    assert [len(recipe.values(one, "x", 0)[1]["weight"]) for one in (TIES, OPTIONAL, LINEAR)] == [2, 2, 3]


def test_a_required_parameter_that_no_condition_gives_is_told_with_the_tensor() -> None:
    recipe = Recipe.parse(
        HEAD + "  - model: a\n    parameters:\n      weight:\n      - filter: mlp\n        value: 1\n", "r.yml"
    )
    recipe.check(TIES)
    assert recipe.values(TIES, "x.mlp", 0)[1]["weight"] == [1.0]
    with pytest.raises(RecipeError) as error:
        recipe.values(TIES, "x.attn", 0)
    assert (
        str(error.value) == "r.yml:6: no condition of 'weight' matches 'x.attn'; add a last condition without 'filter:'"
    )


def test_a_gradient_of_whole_numbers_gives_whole_numbers() -> None:
    recipe = Recipe("ties", ["a"], base_model="p", parameters={"weight": 1, "max_iter": [1, 10]})
    given = [recipe.values(TIES, "x", t)[0]["max_iter"] for t in (0, 0.3, 0.5, 1)]
    assert given == [1, 4, 6, 10]
    assert {type(value) for value in given} == {int}


def test_filters_that_match_nothing_are_noted() -> None:
    text = HEAD + A + "parameters:\n  density:\n  - filter: atention\n    value: 1\n  - filter: mlp\n    value: 1\n"
    assert Recipe.parse(text, "r.yml").unmatched(["layers.0.attention.q", "layers.0.mlp.up"]) == [
        "r.yml:9: the filter 'atention' matches no tensor; did you mean 'attention'?"
    ]


def test_values_that_never_vary_are_the_same_object_and_cost_nothing() -> None:
    models = [{"model": f"m{i}", "parameters": {"weight": i}} for i in range(8)]
    recipe = Recipe("ties", models, base_model="p")
    first = recipe.values(TIES, "x", 0.0)
    assert recipe.values(TIES, "y", 1.0) is first
    assert recipe.values(LINEAR, "y", 1.0)[1] == first[1]
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(1000):
            recipe.values(TIES, "model.layers.3.mlp.up_proj.weight", 0.5)
        best = min(best, (time.perf_counter() - start) / 1000)
    assert best < 5e-6


@PATIENT
@given(
    st.text(alphabet="merge_thodsplaiczv: \n-[]{}'\"&*#|>!0.1e", max_size=60)
    | st.binary(max_size=60).map(lambda b: b.decode("latin-1"))
)
def test_any_text_is_a_recipe_or_told_in_one_line(text: str) -> None:
    for prefix in ("", "merge_method: ties\nmodels:\n- ", GOOD):
        try:
            Recipe.parse(prefix + text, "recipe.yml").check(TIES)
        except RecipeError as error:
            assert str(error).startswith("recipe.yml")
            assert "\n" not in str(error)


def test_reading_a_recipe_imports_no_method_and_no_array_library() -> None:
    code = "import sys; sys.modules['merging'] = type(sys)('merging'); sys.modules['merging'].__path__ = ['merging'];"
    code += "import merging.recipe; print([m for m in ('numpy', 'torch', 'merging.methods') if m in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
