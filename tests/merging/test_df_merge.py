"""DF-Merge: what it is at its corners, and that statistics of scaled models are those of the recipe's scale and base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import merging
from merging import CuveeError, Recipe, methods
from merging.errors import RecipeError
from merging.lineage import FILE
from merging.sources import ModelRef
from merging.statistics import open_statistics
from merging.views import View, fingerprint
from tests.checkpoints import floats, read_model, tiny, write_model
from tests.commands import run
from tests.handmade_statistics import write_stats
from tests.oracles.merge_methods import oracle
from tests.oracles.thinning import Array

DF = methods.get("df_merge")
PATIENT = settings(max_examples=25, deadline=None)
SHAPES = st.sampled_from([(), (1,), (9,), (6, 7), (1, 40), (3, 2, 2, 3), (70, 30)])
SEEDS = st.integers(0, 10**6)
LAMBDAS = st.lists(st.floats(0, 1), min_size=4, max_size=4)


def some(shape: tuple[int, ...], count: int, seed: int) -> tuple[Array, list[Array], list[Array]]:
    """A base, models, and Fishers over six orders of magnitude."""
    rng = np.random.default_rng([seed, count])
    base = np.asarray(rng.normal(size=shape), np.float32)
    models = [np.asarray(base + 0.1 * rng.normal(size=shape), np.float32) for _ in range(count)]
    return base, models, [np.asarray(10.0 ** rng.uniform(-5, 1, shape), np.float32) for _ in range(count)]


def merged(base: Array, models: list[Array], statistics: Any, weight: Any, **parameters: Any) -> Array:
    return merging.apply("df_merge", base, models, statistics=statistics, weight=weight, **parameters)


def close(one: Array, other: Array) -> None:
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


# ---- the formula ----


@PATIENT
@given(SHAPES, st.integers(1, 4), SEEDS, LAMBDAS)
def test_equal_fishers_give_task_arithmetic(
    shape: tuple[int, ...], count: int, seed: int, weights: list[float]
) -> None:
    base, models, (fisher, *_) = some(shape, count, seed)
    weights = weights[:count]
    sums = merging.apply("task_arithmetic", base, models, weight=weights)
    close(merged(base, models, [fisher] * count, weights), sums)
    close(merged(base, models, [None] * count, weights), sums)
    close(merged(base, models, [fisher * 0] * count, weights, floor=0.0), sums)


@PATIENT
@given(SHAPES, st.integers(1, 4), SEEDS)
def test_equal_fishers_and_one_share_each_give_the_mean(shape: tuple[int, ...], count: int, seed: int) -> None:
    base, models, (fisher, *_) = some(shape, count, seed)
    close(merged(base, models, [fisher] * count, 1 / count), np.mean(models, axis=0, dtype=np.float64))


@PATIENT
@given(SHAPES, st.integers(1, 4), SEEDS)
def test_one_share_each_and_frozen_fishers_give_fisher_merging(shape: tuple[int, ...], count: int, seed: int) -> None:
    base, models, fishers = some(shape, count, seed)
    plain = {"normalize": False, "floor": 0.0, "floor_is": "absolute"}
    expected = merging.apply("fisher", None, models, statistics=fishers, **plain)
    close(merged(base, models, fishers, 1 / count, fisher="frozen"), expected)


@PATIENT
@given(SHAPES, SEEDS)
def test_nothing_of_every_model_is_the_base(shape: tuple[int, ...], seed: int) -> None:
    base, models, fishers = some(shape, 3, seed)
    np.testing.assert_array_equal(merged(base, models, fishers, 0.0), base)


def test_of_a_tensor_that_only_some_fishers_know_all_count_alike() -> None:
    base, models, fishers = some((5, 4), 2, 0)
    notes: list[str] = []
    result = merged(base, models, [fishers[0], None], [0.3, 0.9], note=notes.append)
    close(result, merging.apply("task_arithmetic", base, models, weight=[0.3, 0.9]))
    assert notes == ["merged with equal Fisher, because only some of the models have its Fisher"]


def test_what_a_recipe_says_of_scales() -> None:
    models = "- {model: a, stats: s, parameters: {weight: 0.3}}\n- {model: b, stats: t}\n"
    text = f"merge_method: df_merge\nbase_model: o\nmodels:\n{models}"
    both = Recipe.parse(f"{text}parameters: {{weight: 0.5}}\n")
    both.check(DF)
    assert both.scales(DF) == (0.3, 0.5)
    assert Recipe.parse(f"{text}parameters: {{weight: 0.5, fisher: frozen}}\n").scales(DF) is None
    by_tensor = Recipe.parse(f"{text}parameters: {{weight: [{{filter: mlp, value: 0.1}}, {{value: 0.5}}]}}\n", "r")
    with pytest.raises(
        RecipeError, match=r"r:6: 'weight', at which statistics are taken, differs by tensor; give each"
    ):
        by_tensor.check(DF)
    with pytest.raises(RecipeError, match="'fisher' cannot differ by tensor"):
        Recipe.parse(f"{text}parameters: {{weight: 0.5, fisher: [{{filter: a, value: frozen}}]}}\n").check(DF)
    with pytest.raises(RecipeError, match=r"'weight' is 1.5, outside \[0, 1\]"):
        Recipe.parse(f"{text}parameters: {{weight: 1.5}}\n").check(DF)
    assert Recipe.parse(text.replace("df_merge", "fisher")).scales(methods.get("fisher")) is None


# ---- statistics that belong to a scale and a base ----


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base, models `a` and `b`, and handmade Fishers `a-0.4`, `b-0.7` … at scales, or `a-none` of the model itself."""
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, tiny(seed))
    for name, scale in (("a", 0.4), ("b", 0.7), ("a", None), ("b", None), ("a", 1.0)):
        handmade(tmp_path, name, scale)
    return tmp_path


def handmade(place: Path, name: str, scale: float | None, base: str = "base") -> Path:
    folder = place / f"{name}-{'none' if scale is None else scale}"
    write_stats(folder, place / name, "fisher", seed=ord(name))
    if scale is not None:
        view = View.open(ModelRef(str(place / base)))
        manifest = json.loads((folder / FILE).read_text())
        manifest["settings"] |= {"scale": scale}
        manifest["base"] = {"ref": base, "path": base, "digest": view.digest(), "fingerprint": fingerprint(view)}
        view.close()
        (folder / FILE).write_text(json.dumps(manifest))
    return folder


def recipe(place: Path, a: Any, b: Any, **parameters: Any) -> Path:
    models = [
        {"model": "a", "stats": a, "parameters": {"weight": 0.4}},
        {"model": "b", "stats": b, "parameters": {"weight": 0.7}},
    ]
    content = {"merge_method": "df_merge", "base_model": "base", "models": models, "parameters": parameters}
    file = place / "recipe.yml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


@pytest.mark.parametrize("frozen", [False, True])
def test_statistics_at_the_recipes_weights_are_taken(frozen: bool, place: Path) -> None:
    a, b = ("a-none", "b-none") if frozen else ("a-0.4", "b-0.7")
    file = recipe(place, a, b, **({"fisher": "frozen"} if frozen else {}))
    done = run("merge", file, place / "out")
    assert done.code == 0, done.err
    base, *models = [{n: floats(t) for n, t in read_model(place / each).items()} for each in ("base", "a", "b")]
    stats = [open_statistics(place / each) for each in (a, b)]
    for name, tensor in read_model(place / "out").items():
        exact = oracle(
            "df_merge", base[name], [m[name] for m in models], statistics=[s.array(name) for s in stats],
            weight=[0.4, 0.7],
        )  # fmt: skip
        np.testing.assert_allclose(floats(tensor), exact, rtol=0, atol=2e-6)
    told = json.loads((place / "out" / FILE).read_text())["inputs"]
    assert [entry["statistics"].get("scale") for entry in told if "statistics" in entry] == (
        [None, None] if frozen else [0.4, 0.7]
    )


@pytest.mark.parametrize(
    ("a", "b", "parameters", "said"),
    [
        (
            "a-0.4",
            "b-none",
            {},
            "the statistics were taken of the model itself, and 'weight' is 0.7; write 'stats: {data:",
        ),
        ("a-1.0", "b-0.7", {}, "the statistics were taken at 1 of its task vector, and 'weight' is 0.4"),
        ("a-0.4", "b-none", {"fisher": "frozen"}, "taken at 0.4 of its task vector, not of the model itself"),
    ],
)
def test_statistics_of_another_scale_are_refused(
    a: str, b: str, parameters: dict[str, Any], said: str, place: Path
) -> None:
    for options in ([], ["--dry-run"]):
        done = run("merge", recipe(place, a, b, **parameters), place / "out", *options)
        assert done.code == 2 and said in done.err and "recipe.yml:" in done.err, done.err
        assert done.err.count("\n") == 1
    assert not (place / "out").exists()


def test_the_whole_task_vector_is_the_model_itself(place: Path) -> None:
    file = recipe(place, "a-1.0", "b-none", fisher="frozen")
    assert run("merge", file, place / "out").code == 0


def test_other_methods_refuse_statistics_of_scaled_models(place: Path) -> None:
    content = {"merge_method": "fisher", "models": [{"model": "a", "stats": "a-0.4"}]}
    (place / "r.yml").write_text(yaml.safe_dump(content))
    done = run("merge", place / "r.yml", place / "out")
    assert done.code == 2 and "at 0.4 of its task vector, not of the model itself" in done.err


def test_statistics_with_another_base_are_refused(place: Path) -> None:
    write_model(place / "other", tiny(9))
    handmade(place, "a", 0.4, base="other")
    done = run("merge", recipe(place, "a-0.4", "b-0.7"), place / "out")
    assert done.code == 2 and "were made with another base (other) than" in done.err


def test_a_base_that_differs_where_the_fingerprint_does_not_look_is_refused_at_the_end(place: Path) -> None:
    manifest = json.loads((place / "a-0.4" / FILE).read_text())
    manifest["base"]["digest"] = "xxh3:0"
    (place / "a-0.4" / FILE).write_text(json.dumps(manifest))
    assert run("merge", recipe(place, "a-0.4", "b-0.7"), place / "out", "--dry-run").code == 0
    done = run("merge", recipe(place, "a-0.4", "b-0.7"), place / "out")
    assert done.code == 2 and "were made with another base" in done.err
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    "broken", [{"base": "x"}, {"base": {"digest": "d"}}, {"settings": {}}, {"settings": {"scale": "0.4"}}]
)
def test_a_manifest_that_contradicts_itself_is_refused(broken: dict[str, Any], place: Path) -> None:
    file = place / "a-0.4" / FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **broken}))
    with pytest.raises(CuveeError, match="or none that can be used; make it anew"):
        open_statistics(place / "a-0.4")


# ---- real models ----


@pytest.fixture
def pairs(tmp_path: Path) -> Callable[[int], Path]:
    """Files of a few rows each."""

    def make(seed: int) -> Path:
        file = tmp_path / f"pairs{seed}.jsonl"
        words = ("ice", "salt", "rust", "dew", "moss", "tax", "lens")[seed:]
        rows = [{"query": f"what is {word}", "positive": f"{word} is a word"} for word in words]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return make


@pytest.mark.slow
def test_data_are_turned_into_statistics_at_the_recipes_own_weight(
    minilm_family: Any, pairs: Callable[[int], Path], tmp_path: Path
) -> None:
    pytest.importorskip("sentence_transformers")

    def file(first: float) -> Recipe:
        models = [
            {
                "model": str(model),
                "stats": {"data": str(pairs(i)), "examples": 3, "candidates": 3},
                "parameters": {"weight": weight},
            }
            for i, (model, weight) in enumerate(zip(minilm_family.specialists, (first, 0.5, 0.5), strict=True))
        ]
        return Recipe("df_merge", models, str(minilm_family.base))

    notes: list[str] = []

    def merged(first: float) -> Any:
        notes.clear()
        found = merging.merge(file(first), tmp_path / "out", force=True, note=notes.append)
        notes[:] = [note for note in notes if note.startswith("computing")]
        return found

    merging.merge(file(0.25), tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out.stats").exists()
    first = merged(0.25)
    assert [" at 0.25 " in notes[0], " at 0.5 " in notes[1]] == [True, True]
    folders = [open_statistics(each) for each in sorted((tmp_path / "out.stats").iterdir())]
    assert sorted(each.scale or 0 for each in folders) == [0.25, 0.5, 0.5]
    assert all(each.base and each.examples == 3 for each in folders)
    assert merged(0.25)["digest"] == first["digest"] and not notes
    assert merged(0.75)["digest"] != first["digest"]
    assert len(notes) == 1 and " at 0.75 " in notes[0]
    assert len(list((tmp_path / "out.stats").iterdir())) == 3, "those of an earlier weight are of no more use"
