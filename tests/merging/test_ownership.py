"""The ownership map beside a merge: true to the weights, in nobody's way, shown by `cuvee inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import merging
from merging import Recipe
from merging.checkpoint import Checkpoint
from merging.errors import CuveeError
from merging.inspection import inspect
from merging.ownership import COUNTS, FOLDER, OWNERS, module_kind, read_ownership
from tests.checkpoints import floats, read_model, some, tiny, write_model
from tests.commands import run
from tests.handmade_statistics import write_stats


def drafted(tmp_path: Path, out: str = "out", count: int = 2, **parameters: Any) -> Path:
    """An obim merge of tiny models, with integers and a buffer of -inf among the tensors; returns its folder."""
    more = {"ids": np.arange(4), "mask": np.full((3, 3), -np.inf, np.float32), "none": some((0, 3))}
    base = write_model(tmp_path / "base", {**tiny(0), **more})
    entries = []
    for i in range(1, count + 1):
        model = write_model(tmp_path / f"model{i}", {**tiny(i), **more})
        write_stats(tmp_path / f"stats{i}", model, "moments", seed=i)
        entries.append({"model": str(model), "stats": str(tmp_path / f"stats{i}")})
    merging.merge(Recipe("obim", entries, str(base), parameters or None), tmp_path / out)
    return tmp_path / out


@pytest.mark.parametrize(
    "parameters", [{}, {"scope": "row", "density": 0.3}, {"scope": "global", "lambda": 0.5}], ids=str
)
def test_the_map_says_where_each_coordinate_comes_from(parameters: dict[str, Any], tmp_path: Path) -> None:
    out = drafted(tmp_path, **parameters)
    base, *models = (read_model(tmp_path / name) for name in ("base", "model1", "model2"))
    owners = read_model(out / FOLDER)
    counts = json.loads((out / FOLDER / COUNTS).read_text())
    assert counts["models"] == [str(tmp_path / "model1"), str(tmp_path / "model2")]
    assert owners.keys() == counts["counts"].keys() == base.keys() - {"ids"}
    for name, tensor in read_model(out).items():
        if name in ("ids", "mask"):
            assert tensor == base[name]
            continue
        own = np.frombuffer(owners[name].data, np.uint8).reshape(tensor.shape)
        start = floats(base[name])
        expected = start.copy()
        for i, model in enumerate(models, 1):
            moved = start + np.float32(parameters.get("lambda", 1.0)) * (floats(model[name]) - start)
            expected = np.where(own == i, moved, expected)
        np.testing.assert_array_equal(floats(tensor), expected)
        assert counts["counts"][name] == np.bincount(own.reshape(-1), minlength=3).tolist()


def test_it_is_in_nobodys_way(tmp_path: Path) -> None:
    out = drafted(tmp_path)
    assert {file.name for file in (out / FOLDER).iterdir()} == {OWNERS, COUNTS}
    with Checkpoint.open(out) as checkpoint, Checkpoint.open(tmp_path / "base") as base:
        assert checkpoint.tensors.keys() == base.tensors.keys()
    recipe = Recipe("linear", [str(out), str(tmp_path / "base")], parameters={"weight": 1.0})
    merging.merge(recipe, tmp_path / "further")
    assert not (tmp_path / "further" / FOLDER).exists()  # of that merge it would not be true
    again = run("merge", "--from", out, tmp_path / "again")
    assert again.code == 0, again.err
    for name in (OWNERS, COUNTS):
        assert (tmp_path / "again" / FOLDER / name).read_bytes() == (out / FOLDER / name).read_bytes()


def test_threads_and_seeds_change_nothing(tmp_path: Path) -> None:
    out = drafted(tmp_path)
    recipe = Recipe.load(write_text(tmp_path / "r.yml", json.loads((out / "cuvee.json").read_text())["recipe"]))
    merging.merge(recipe, tmp_path / "other", threads=4, seed=9)
    assert (tmp_path / "other" / FOLDER / OWNERS).read_bytes() == (out / FOLDER / OWNERS).read_bytes()


def write_text(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def test_summary_and_inspect_tell_the_shares(tmp_path: Path) -> None:
    out = drafted(tmp_path, density=0.25)
    past = json.loads((out / "cuvee.json").read_text())
    found = inspect([str(out)])["ownership"]["out"]
    total = np.array(found["total"])
    assert past["owned"] == {
        str(tmp_path / f"model{i}"): pytest.approx(total[i] / total.sum()) for i in (1, 2)
    }  # fmt: skip
    for part in ("groups", "kinds", "tensors"):
        assert np.sum(list(found[part].values()), axis=0).tolist() == found["total"]
    assert {"layer.0", "layer.1", "embeddings"} <= found["groups"].keys()
    assert {"dense", "norm"} <= found["kinds"].keys()
    assert inspect([str(tmp_path / "base")])["ownership"] == {}
    shown = run("inspect", out, "--base", tmp_path / "base")
    assert shown.code == 0, shown.err
    squeezed = " ".join(shown.out.split())
    assert "whose the coordinates of out are" in squeezed
    assert "base model1 model2" in squeezed
    assert "by kind of module" in squeezed
    assert max(map(len, shown.out.splitlines())) <= 100
    brief = run("inspect", out, "--no-groups").out
    assert "whose the coordinates" in brief and "by kind" not in brief


def test_maps_that_make_no_sense_are_told(tmp_path: Path) -> None:
    out = drafted(tmp_path)
    for text in ("[]", "{}", '{"models": ["a"], "counts": {"w": [1]}}', '{"models": ["a"], "counts": {"w": [1, -1]}}'):
        (out / FOLDER / COUNTS).write_text(text)
        with pytest.raises(CuveeError, match="ownership"):
            read_ownership(out)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("encoder.layer.3.attention.self.query.weight", "attention.self.query"),
        ("model.layers.11.mlp.down_proj.weight", "mlp.down_proj"),
        ("h.0.ln_1.bias", "ln_1"),
        ("embeddings.word_embeddings.weight", "embeddings.word_embeddings"),
        ("2_Dense/linear.weight", "2_Dense/linear"),
        ("pooler.dense.bias", "pooler.dense"),
    ],
)
def test_kinds_of_modules(name: str, kind: str) -> None:
    assert module_kind(name) == kind
