"""Statistics of a model that is scaled back towards its base: those of the same model, merged and written."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import merging
from merging import CuveeError, Recipe
from merging.sources import ModelRef
from merging.statistics import collect, combine, open_statistics
from merging.views import View, fingerprint
from tests.architectures import Family, build
from tests.checkpoints import read_model, write_model
from tests.commands import run, start
from tests.merging.statistics.models import sentences, with_tokenizer

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    folder = tmp_path_factory.mktemp("zoo")

    def family(name: str) -> Family:
        if (folder / name).exists():
            raise AssertionError("each is built once")
        found = build(name, folder / name, specialists=2, spread=0.2)
        for path in (found.base, *found.specialists):
            with_tokenizer(path)
        return found

    return family


@pytest.fixture(scope="module")
def bert(zoo: Callable[[str], Family]) -> Family:
    return zoo("bert")


@pytest.fixture(scope="module")
def gpt2(zoo: Callable[[str], Family]) -> Family:
    return zoo("gpt2")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(sentences(12)) + "\n")
    return file


def merged(family: Family, scale: float, out: Path) -> Path:
    entry = {"model": str(family.specialists[0]), "parameters": {"weight": scale}}
    merging.merge(Recipe("task_arithmetic", [entry], str(family.base), dtype="float32"), out)
    with_tokenizer(out)
    return out


def same(one: Path, other: Path) -> None:
    first, second = open_statistics(one), open_statistics(other)
    assert set(first.names) == set(second.names) and first.names
    for name in first.names:
        np.testing.assert_array_equal(first.array(name), second.array(name), err_msg=name)
    assert first.rows == second.rows and first.axes == second.axes


@pytest.mark.parametrize("kind", ["fisher", "moments", "gram"])
def test_they_are_those_of_the_merged_model(kind: str, bert: Family, data: Path, tmp_path: Path) -> None:
    collect(
        str(bert.specialists[0]), data, kind, tmp_path / "scaled", base=str(bert.base), scale=0.4, candidates=3
    )  # fmt: skip
    collect(str(merged(bert, 0.4, tmp_path / "model")), data, kind, tmp_path / "direct", candidates=3)
    same(tmp_path / "scaled", tmp_path / "direct")


def test_a_tied_head_counts_in_full(gpt2: Family, data: Path, tmp_path: Path) -> None:
    collect(str(gpt2.specialists[0]), data, "fisher", tmp_path / "scaled", base=str(gpt2.base), scale=0.7)
    collect(str(merged(gpt2, 0.7, tmp_path / "model")), data, "fisher", tmp_path / "direct")
    same(tmp_path / "scaled", tmp_path / "direct")


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_none_of_it_is_the_base_and_all_of_it_the_model(scale: float, bert: Family, data: Path, tmp_path: Path) -> None:
    model = bert.specialists[0] if scale else bert.base
    collect(
        str(bert.specialists[0]), data, "fisher", tmp_path / "s", base=str(bert.base), scale=scale, candidates=3
    )  # fmt: skip
    collect(str(model), data, "fisher", tmp_path / "m", candidates=3)
    one, other = open_statistics(tmp_path / "s"), open_statistics(tmp_path / "m")
    for name in other.names:
        largest = float(other.array(name).max(initial=0))
        np.testing.assert_allclose(one.array(name), other.array(name), rtol=1e-3, atol=1e-5 * largest + 1e-12)


def test_a_killed_run_leaves_nothing_that_the_next_does_not_clear(bert: Family, data: Path, tmp_path: Path) -> None:
    """The scaled model lies beside the statistics, not in TMPDIR."""
    out = tmp_path / "deeper" / "s"
    command = (
        "stats", bert.specialists[0], "--base", bert.base, "--scale", "0.4", "--kind", "fisher", "--data", data,
        "--candidates", "3", "--out", out,
    )  # fmt: skip
    left: list[Path] = []
    job = start(*command)
    deadline = time.monotonic() + 60
    while not left and not out.exists() and time.monotonic() < deadline:
        left = list(out.parent.glob(".s.partial-*/new/model/config.json"))
    job.kill()
    job.wait()
    assert left and left[0].exists(), "the kill came while it was there"
    assert run(*command).code == 0
    assert [each.name for each in out.parent.iterdir()] == ["s"]


def test_a_disk_without_room_for_it_is_told_at_once(
    bert: Family, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(
        CuveeError, match=r"the scaled model and its statistics take 0\.0 GB, the disk has 0\.0 GB free"
    ):
        collect(str(bert.specialists[0]), data, "fisher", tmp_path / "s", base=str(bert.base), scale=0.4)
    with pytest.raises(CuveeError, match=r"the statistics take 0\.0 GB"):
        collect(str(bert.specialists[0]), data, "fisher", tmp_path / "s")
    assert [each.name for each in tmp_path.iterdir()] == [data.name]


def test_what_the_folder_says(bert: Family, data: Path, tmp_path: Path) -> None:
    told = run(
        "stats", bert.specialists[0], "--base", bert.base, "--scale", "0.4", "--kind", "fisher", "--data", data,
        "--candidates", "3", "--out", tmp_path / "s", "--json",
    )  # fmt: skip
    assert told.code == 0, told.err
    found = open_statistics(tmp_path / "s")
    view, base = (View.open(ModelRef(str(path))) for path in (bert.specialists[0], bert.base))
    assert found.scale == 0.4
    assert (found.model_digest, found.fingerprint) == (view.digest(), fingerprint(view))
    assert found.base is not None
    assert (found.base["digest"], found.base["fingerprint"]) == (base.digest(), fingerprint(base))
    assert found.manifest["model"]["ref"] == str(bert.specialists[0]) and found.base["ref"] == str(bert.base)
    assert set(found.names) <= read_model(bert.specialists[0]).keys()


def test_names_are_the_models_own(bert: Family, data: Path, tmp_path: Path) -> None:
    """A model whose file puts a prefix before every name is scaled as well, and its statistics have the prefix."""
    other = tmp_path / "other"
    tensors = {f"bert.{name}": tensor for name, tensor in read_model(bert.specialists[0]).items()}
    write_model(other, tensors, json.loads((bert.specialists[0] / "config.json").read_text()))
    for name, model in (("s", other), ("t", bert.specialists[0])):
        collect(str(model), data, "fisher", tmp_path / name, base=str(bert.base), scale=0.5, candidates=3)
    prefixed, plain = open_statistics(tmp_path / "s"), open_statistics(tmp_path / "t")
    assert set(prefixed.names) == {f"bert.{name}" for name in plain.names}
    for name in plain.names:
        np.testing.assert_array_equal(prefixed.array(f"bert.{name}"), plain.array(name))


def test_parts_at_one_scale_combine_and_at_two_do_not(bert: Family, data: Path, tmp_path: Path) -> None:
    model, base = str(bert.specialists[0]), str(bert.base)

    def part(i: int, scale: float | None, out: str) -> Path:
        how: dict[str, Any] = {} if scale is None else {"base": base, "scale": scale}
        collect(model, data, "moments", tmp_path / out, part=(i, 2), **how)
        return tmp_path / out

    first = part(1, 0.4, "1")
    combine([first, part(2, 0.4, "2")], tmp_path / "both")
    both = open_statistics(tmp_path / "both")
    assert both.scale == 0.4 and both.base == open_statistics(first).base
    collect(model, data, "moments", tmp_path / "whole", base=base, scale=0.4)
    for name in both.names:
        np.testing.assert_allclose(both.array(name), open_statistics(tmp_path / "whole").array(name), rtol=1e-5)
    with pytest.raises(CuveeError, match=r"was made with scale 0.5, and .* with 0.4"):
        combine([first, part(2, 0.5, "3")], tmp_path / "no")
    with pytest.raises(CuveeError, match=r"was made with scale None, and .* with 0.4"):
        combine([first, part(2, None, "4")], tmp_path / "no")


def test_a_dry_run_merges_nothing(bert: Family, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging.engine, "merge", None)
    collect(
        str(bert.specialists[0]), data, "fisher", tmp_path / "s", base=str(bert.base), scale=0.4, candidates=3,
        dry_run=True,
    )  # fmt: skip
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (["--scale", "0.4"], "--scale: wants the base that the model is scaled to; add --base BASE"),
        (["--base", "b"], "--base: wants the share of the task vector that is left; add --scale 0.4"),
        (["--base", "b", "--scale", "nan"], "--scale: nan is no number"),
        (["--base", "nowhere", "--scale", "1"], "nowhere"),
    ],
)
def test_half_of_it_is_refused(how: list[str], said: str, bert: Family, data: Path, tmp_path: Path) -> None:
    done = run("stats", bert.specialists[0], *how, "--kind", "fisher", "--data", data, "--out", tmp_path / "s")
    assert done.code == 2 and said in done.err, done.err
    assert done.err.count("\n") == 1


def test_a_base_of_another_kind_is_refused(bert: Family, gpt2: Family, data: Path, tmp_path: Path) -> None:
    """'missing: keep' would else mix the tensors of both."""
    options = {"base": str(gpt2.base), "scale": 0.4, "candidates": 3}
    with pytest.raises(CuveeError, match="has hardly a tensor in common with"):
        collect(str(bert.specialists[0]), data, "fisher", tmp_path / "s", **options)
