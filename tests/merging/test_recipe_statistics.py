"""Statistics in a recipe: read, refused in one line where they do not belong, computed on the way, remembered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import merging
from merging import Recipe, methods
from merging.errors import CuveeError, RecipeError
from merging.lineage import FILE
from merging.statistics import open_statistics
from tests.checkpoints import Raw, bf16, floats, read_model, some, tiny, write_model
from tests.commands import run
from tests.handmade_statistics import write_stats
from tests.oracles.merge_methods import oracle

FISHER, OBIM, TIES, LINEAR = (methods.get(name) for name in ("fisher", "obim", "ties", "linear"))


def written(tmp_path: Path, method: str = "fisher", kind: str = "fisher", count: int = 2, **keys: Any) -> Path:
    """A recipe of tiny models and their statistics; returns its path."""
    entries = []
    for i in range(1, count + 1):
        model = write_model(tmp_path / f"model{i}", tiny(i))
        write_stats(tmp_path / f"stats{i}", model, kind, seed=i)
        entries.append({"model": f"model{i}", "stats": f"stats{i}"})
    content = {"merge_method": method, "models": entries, **keys}
    if methods.get(method).base == "required":
        write_model(tmp_path / "base", tiny(0))
        content["base_model"] = "base"
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def changed(file: Path, **of_first: Any) -> Path:
    """The recipe with other entries of its first model."""
    content = yaml.safe_load(file.read_text())
    content["models"][0] |= of_first
    content["models"][0] = {key: value for key, value in content["models"][0].items() if value is not None}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


# ---- what a recipe may say ----


def test_folders_and_data_go_through_yaml_and_back() -> None:
    text = (
        "merge_method: fisher\nmodels:\n- {model: a, stats: s/a}\n- {model: b, stats: {data: x.jsonl, examples: 4}}\n"
    )
    recipe = Recipe.parse(text)
    first, second = (source.stats for source in recipe.models)
    assert first and first.path == "s/a" and not first.options and first.where == "recipe:3"
    assert second and second.path is None and second.options == {"data": "x.jsonl", "examples": 4}
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert recipe.check(FISHER) == []


@pytest.mark.parametrize(
    ("stats", "said"),
    [
        ("[a]", "r:2: 'stats' must be a folder that 'cuvee stats' has made, not a list; write 'stats: FOLDER', or"),
        ("''", "not empty text"),
        ("{examples: 4}", "r:2: 'stats' names no data; add 'data: FILE'"),
        ("{data: x, exmaples: 4}", "r:2: 'exmaples' is no key of 'stats'; did you mean 'examples'?"),
        ("{data: x, examples: many}", "r:2: 'examples' of 'stats' must be a whole number, not 'many'"),
        ("{data: x, examples: true}", "must be a whole number"),
        ("{data: [x]}", "'data' of 'stats' must be text, not a list"),
        ("{data: x, columns: 3}", "'columns' of 'stats' must be a mapping"),
        ("{data: x, kind: gram}", "r:2: 'fisher' cannot use statistics of kind 'gram'; it takes 'fisher'"),
    ],
)
def test_mistakes_are_told_with_their_line(stats: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(f"merge_method: fisher\nmodels: [{{model: a, stats: {stats}}}]\n", "r").check(FISHER)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_model_of_a_method_by_statistics_needs_them() -> None:
    text = "merge_method: {}\nbase_model: o\nmodels:\n- {{model: a, stats: s}}\n- model: b\n{}"
    with pytest.raises(
        RecipeError, match="r:5: 'fisher' needs statistics of every model, and 'b' has none; add 'stats:"
    ):
        Recipe.parse(text.format("fisher", ""), "r").check(FISHER)
    with pytest.raises(RecipeError, match="--kind moments"):
        Recipe.parse(text.format("obim", ""), "r").check(OBIM)
    assert (
        "takes them with 'saliency: stats'"
        in Recipe.parse(text.format("obim", "parameters: {saliency: magnitude}"), "r").check(OBIM)[0]
    )
    by_tensor = "parameters: {weight: 1, saliency: [{filter: mlp, value: stats}, {value: magnitude}]}"
    with pytest.raises(RecipeError, match="'ties' needs statistics of every model, and 'b' has none"):
        Recipe.parse(text.format("ties", by_tensor), "r").check(TIES)


def test_statistics_that_nobody_reads_are_told() -> None:
    text = "merge_method: {}\nbase_model: o\nmodels: [{{model: a, stats: s}}]\nparameters: {{weight: 1}}\n"
    assert Recipe.parse(text.format("ties"), "r").check(TIES) == [
        "r:3: 'stats' are ignored: 'ties' takes them with 'saliency: stats'"
    ]
    assert "r:3: 'stats' are ignored: 'linear' takes none" in Recipe.parse(text.format("linear"), "r").check(LINEAR)
    with_base = "merge_method: obim\nbase_model: o\nmodels:\n- {model: a, stats: s}\n- {model: o, stats: t}\n"
    assert Recipe.parse(with_base, "r").check(OBIM)[-1].startswith("r:5: the statistics of the base are ignored")


def test_mergekit_knows_none() -> None:
    recipe = Recipe.parse("merge_method: slerp\nmodels: [{model: a, stats: s}]\n", "r")
    with pytest.raises(RecipeError, match="r:2: mergekit, which runs this merge, knows no 'stats'; remove it"):
        recipe.check(methods.get("slerp"), mergekit_only=True)


def test_what_only_mergekit_could_do_is_refused_for_methods_it_has_not(tmp_path: Path) -> None:
    file = written(tmp_path, tokenizer={"source": "union", "pad_to_multiple_of": 8})
    finished = run("merge", file, tmp_path / "out")
    assert finished.code == 2
    assert "mergekit would have to run this merge, because it pads the vocabulary, and has no 'fisher'" in finished.err


# ---- the merge ----


@pytest.mark.parametrize("method", ["fisher", "obim", "regmean"])
@pytest.mark.parametrize("threads", [1, 3])
def test_folders_on_disk_give_what_arrays_in_memory_give(method: str, threads: int, tmp_path: Path) -> None:
    kind = methods.get(method).statistics[0]
    out = tmp_path / "out"
    merging.engine.merge_file(written(tmp_path, method, kind, 3), out, threads=threads)
    models = [{n: floats(t) for n, t in read_model(tmp_path / f"model{i}").items()} for i in (1, 2, 3)]
    stats = [open_statistics(tmp_path / f"stats{i}") for i in (1, 2, 3)]
    parameters: dict[str, Any] = {}
    units = [1.0] * 3
    if method == "fisher":  # whose norm is over the whole model
        everything = [np.concatenate([s.array(n).reshape(-1) for n in s.names]).astype(np.float64) for s in stats]
        units = [float(np.sqrt((each**2).mean())) for each in everything]
        parameters = {"normalize": False, "floor_is": "absolute"}
    base = {n: floats(t) for n, t in read_model(tmp_path / "base").items()} if method == "obim" else None
    for name, tensor in read_model(out).items():
        arrays = [s.array(name) / unit if name in s else None for s, unit in zip(stats, units, strict=True)]
        exact = oracle(method, base[name] if base else None, [m[name] for m in models], statistics=arrays, **parameters)
        np.testing.assert_allclose(floats(tensor), exact, rtol=0, atol=2e-6)


def test_bfloat16_models_and_adapters_of_tied_names(tmp_path: Path) -> None:
    """A statistic goes by the stored name of the tensor, whatever prefix the other models have."""
    plain = {"layer.dense.weight": bf16(some((8, 4), 1)), "embeddings.weight": bf16(some((9, 4), 2))}
    prefixed = {f"bert.{name}": bf16(some(floats_shape, 3 + i)) for i, (name, floats_shape) in enumerate(
        [("layer.dense.weight", (8, 4)), ("embeddings.weight", (9, 4))]
    )}  # fmt: skip
    for name, tensors in (("a", plain), ("b", prefixed)):
        write_stats(tmp_path / f"stats-{name}", write_model(tmp_path / name, tensors), "fisher", seed=ord(name))
    recipe = Recipe(
        "fisher", [{"model": str(tmp_path / n), "stats": str(tmp_path / f"stats-{n}")} for n in "ab"],
        parameters={"normalize": False, "floor_is": "absolute"}, out_dtype="float32",
    )  # fmt: skip
    merging.merge(recipe, tmp_path / "out")
    result = read_model(tmp_path / "out")
    for name in plain:
        stats = [
            open_statistics(tmp_path / "stats-a").array(name),
            open_statistics(tmp_path / "stats-b").array(f"bert.{name}"),
        ]
        models = [floats(read_model(tmp_path / "a")[name]), floats(read_model(tmp_path / "b")[f"bert.{name}"])]
        exact = oracle("fisher", None, models, statistics=stats, normalize=False, floor_is="absolute")
        np.testing.assert_allclose(floats(result[name]), exact, rtol=0, atol=2e-6)


def test_lineage_names_them_and_the_merge_can_be_made_again(tmp_path: Path) -> None:
    file = written(tmp_path)
    assert run("merge", file, tmp_path / "out").code == 0
    past = json.loads((tmp_path / "out" / FILE).read_text())
    for i, entry in enumerate(past["inputs"], 1):
        told = entry["statistics"]
        assert told["kind"] == "fisher" and told["examples"] == 7
        assert told["digest"] == open_statistics(tmp_path / f"stats{i}").digest
    again = run("merge", "--from", tmp_path / "out", tmp_path / "again", "--json")
    assert again.code == 0, again.err
    assert again.json["digest"] == past["output"]
    write_stats(tmp_path / "stats2", tmp_path / "model2", "fisher", seed=99)
    finished = run("merge", "--from", tmp_path / "out", tmp_path / "third")
    assert finished.code == 2
    assert "stats2: statistics have changed since that merge; restore them, or merge anew" in finished.err


# ---- statistics that do not belong ----


def refusal(file: Path, out: Path) -> str:
    finished = run("merge", file, out)
    assert finished.code == 2, finished.err
    assert not out.exists()
    assert finished.err.count("\n") == 1
    return finished.err


def test_statistics_of_another_model_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    file = changed(written(tmp_path), stats="stats2")
    said = refusal(file, tmp_path / "out")
    assert "recipe.yml:" in said and "were made from other weights" in said and "model2" in said
    assert run("merge", file, tmp_path / "out", "--dry-run").code == 2


def test_a_change_that_the_fingerprint_misses_is_found_before_the_result_is_in_place(tmp_path: Path) -> None:
    """The fingerprint sees the first 4 KiB of each tensor; the digest all of it."""
    weight = some((60, 50), 1)
    write_model(tmp_path / "a", {"w": weight})
    write_stats(tmp_path / "stats", tmp_path / "a", "fisher")
    weight[-1, -1] += 1
    write_model(tmp_path / "a", {"w": weight})
    recipe = Recipe("fisher", [{"model": str(tmp_path / "a"), "stats": str(tmp_path / "stats")}])
    merging.merge(recipe, tmp_path / "out", dry_run=True)
    with pytest.raises(CuveeError, match="the statistics were made from other weights"):
        merging.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_kinds_missing_folders_and_misfits_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path)
    write_stats(tmp_path / "moments", tmp_path / "model1", "moments")
    assert "'fisher' takes fisher, and" in refusal(changed(file, stats="moments"), tmp_path / "out")
    assert "no such folder of statistics" in refusal(changed(file, stats="nowhere"), tmp_path / "out")
    assert "recipe.yml:4" in refusal(file, tmp_path / "out")
    assert "holds no cuvee.json" in refusal(changed(file, stats="model1"), tmp_path / "out")
    shapes = {"layer.0.dense.weight": np.ones((4, 5), np.float32)}
    write_stats(tmp_path / "misfit", tmp_path / "model1", "fisher", shapes)
    assert "statistics of shape [4, 5] do not fit a weight of [4, 4]" in refusal(
        changed(file, stats="misfit"), tmp_path / "out"
    )
    negative = {"layer.0.dense.weight": -np.ones((4, 4), np.float32)}
    write_stats(tmp_path / "negative", tmp_path / "model1", "fisher", negative)
    write_stats(
        tmp_path / "stats2", tmp_path / "model2", "fisher", {"layer.0.dense.weight": np.ones((4, 4), np.float32)}
    )
    assert "holds NaN, infinite or negative values" in refusal(changed(file, stats="negative"), tmp_path / "out")


def test_the_methods_notes_are_told_with_the_tensors_names(tmp_path: Path) -> None:
    file = written(tmp_path, count=2)
    write_stats(tmp_path / "some", tmp_path / "model1", "fisher", {"layer.0.dense.weight": np.ones((4, 4), np.float32)})
    finished = run("merge", changed(file, stats="some"), tmp_path / "out")
    assert finished.code == 0
    said = "averaged, because only some of the models have its Fisher: 'embeddings.weight', 'layer.0.norm.bias', "
    assert said in finished.err and " and 1 more\n" in finished.err


# ---- computed on the way ----


def moved(tensor: Raw) -> Raw:
    return Raw("F32", tensor.shape, (floats(tensor) * np.float32(1.01)).tobytes()) if tensor.dtype == "F32" else tensor


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    rows = [{"query": f"what is {word}", "positive": f"{word} is a word"} for word in ("ice", "salt", "rust", "dew")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_data_are_turned_into_statistics_once(minilm: Path, texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    stats = {"data": "texts.jsonl", "examples": 3}
    (tmp_path / "base").symlink_to(minilm)
    write_model(tmp_path / "moved", {n: moved(t) for n, t in read_model(minilm).items()}, {})
    for file in minilm.rglob("*.json"):
        if not (target := tmp_path / "moved" / file.relative_to(minilm)).exists() or target.name == "config.json":
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    recipe = {"merge_method": "obim", "base_model": "base", "models": [{"model": "moved", "stats": stats}]}
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe))
    notes: list[str] = []

    def merged(**options: Any) -> dict[str, Any]:
        notes.clear()
        return merging.engine.merge_file(file, tmp_path / "out", threads=1, note=notes.append, **options)

    merged(dry_run=True)
    assert not (tmp_path / "out.stats").exists()
    first = merged()
    assert any(note.startswith("computing moments statistics") for note in notes)
    (folder,) = (tmp_path / "out.stats").iterdir()
    assert open_statistics(folder).examples == 3
    told = json.loads((tmp_path / "out" / FILE).read_text())["inputs"][0]["statistics"]
    assert told["digest"] == open_statistics(folder).digest
    second = merged(force=True)
    assert not notes
    assert second["digest"] == first["digest"]
    stats["device"] = "cpu:0"
    file.write_text(yaml.safe_dump(recipe))
    assert merged(force=True)["digest"] == first["digest"]
    assert not notes, "processes side by side, on a device each, share them"
    texts.write_text(texts.read_text() + '{"query": "a", "positive": "b"}\n')
    merged(force=True, dry_run=True)
    assert not notes
    merged(force=True)
    assert any(note.startswith("computing moments statistics") for note in notes)  # of other data, others


def test_data_that_are_missing_are_told_first(tmp_path: Path) -> None:
    file = changed(written(tmp_path), stats={"data": "nowhere.jsonl"})
    said = refusal(file, tmp_path / "out")
    assert "recipe.yml:4" in said and "no such file of texts" in said


# ---- adapters, threads ----


@pytest.mark.parametrize("method", ["fisher", "obim", "regmean", "ties"])
def test_statistics_of_a_model_with_an_adapter_are_those_of_its_merged_weights(method: str, tmp_path: Path) -> None:
    weights = {"layer.dense.weight": some((700, 300), 1), "layer.norm.bias": some((30,), 2)}
    base = write_model(tmp_path / "base", weights)
    down, up = some((2, 300), 3), some((700, 2), 4)
    adapter = {"base_model.model.layer.dense.lora_A.weight": down, "base_model.model.layer.dense.lora_B.weight": up}
    folder = write_model(tmp_path / "adapter", adapter, {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    (folder / "config.json").rename(folder / "adapter_config.json")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    other = {"layer.dense.weight": some((700, 300), 5), "layer.norm.bias": some((30,), 6)}
    models = [f"{base}+{folder}", str(write_model(tmp_path / "other", other))]
    kind = methods.get(method).statistics[0]
    stats = [write_stats(tmp_path / f"stats{i}", model, kind, seed=i) for i, model in enumerate(models)]
    parameters: dict[str, Any] = {"damping": 0.01} if method == "regmean" else {}
    parameters = {"weight": 1.0, "density": 0.3, "saliency": "stats"} if method == "ties" else parameters
    recipe = Recipe(
        method,
        [{"model": model, "stats": str(each.path)} for model, each in zip(models, stats, strict=True)],
        str(base) if methods.get(method).base == "required" else None,
        parameters or None,
    )
    if method == "fisher":
        parameters = {"normalize": False, "floor_is": "absolute"}
        recipe = Recipe(method, recipe.models, parameters=parameters)
    merging.merge(recipe, tmp_path / "out")
    merged = {**weights, "layer.dense.weight": weights["layer.dense.weight"] + np.float32(2) * (up @ down)}
    for name, tensor in read_model(tmp_path / "out").items():
        arrays = [each.array(name) if name in each else None for each in stats]
        start = weights[name] if methods.get(method).base == "required" else None
        exact = oracle(method, start, [merged[name], other[name]], statistics=arrays, **parameters)
        wrong = ~np.isclose(floats(tensor), exact, rtol=0, atol=2e-5)
        assert wrong.mean() < 1e-4  # the product of the factors is rounded otherwise: who wins at a cut may differ
    adapter["base_model.model.layer.dense.lora_B.weight"] = up + 1
    write_model(folder, adapter)
    (folder / "model.safetensors").replace(folder / "adapter_model.safetensors")
    with pytest.raises(CuveeError, match="were made from other weights"):
        merging.merge(recipe, tmp_path / "out2")


@pytest.mark.parametrize("method", ["fisher", "obim"])
def test_threads_change_no_byte(method: str, tmp_path: Path) -> None:
    """Nor in the norm over the whole model, a sum of floats that come from any thread."""
    kind = methods.get(method).statistics[0]
    file = written(tmp_path, method, kind, 3)
    digests = {
        merging.engine.merge_file(file, tmp_path / f"out{i}", threads=i)["digest"] for i in (1, 2, 3, 4)
    }  # fmt: skip
    assert len(digests) == 1
