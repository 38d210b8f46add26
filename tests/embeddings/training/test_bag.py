"""Bags: what each member is given, what a run leaves, and that its merge is the one of `cuvee merge`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embeddings.training.bag import plan, train_run
from embeddings.training.config import TrainingConfig, data_settings, load
from embeddings.training.data import TrainingSet, load_sets, read_texts
from embeddings.training.draws import draw_core, draw_members
from embeddings.training.member_merge import merge_members
from embeddings.training.members import Tokenizer
from embeddings.training.options import Options
from embeddings.training.run_folder import claim
from embeddings.training.train import write_row_numbers
from merging import lineage
from merging.engine import merge_file
from merging.errors import CuveeError
from merging.output import alone
from tests.embeddings.runs import config_of, same_weights, sets_of, weights, write_config

QUIETLY: tuple[Any, ...] = (Options(), lambda *_: None, lambda line: None)
BAGS = "bags: [50, complement, 75]\nepochs: 1\nsave_every: 0\ncore: 25\n"


@pytest.fixture(scope="module")
def config(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    return config_of(tmp_path_factory.mktemp("bag"), minilm, BAGS)


@pytest.fixture(scope="module")
def sets(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> list[TrainingSet]:
    return sets_of(config, tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def run(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("run") / "run"
    train_run(config, folder)
    yield folder
    shutil.rmtree(folder)


# ---- the draws ----


def test_a_bag_is_its_share_of_each_set_without_replacement(config: TrainingConfig, sets: list[TrainingSet]) -> None:
    for percent in (1, 33, 50, 99.9, 100):
        (member,) = draw_members(replace(config, bags=(percent,)), sets)
        for each in sets:
            rows = member.rows[each.name]
            assert len(rows) == max(1, round(len(each) * percent / 100)) == len(np.unique(rows))
            assert rows.dtype == np.int64 and rows.tolist() == sorted(rows) and rows[0] >= 0 and rows[-1] < len(each)


def test_a_complement_is_what_the_member_before_left_out(config: TrainingConfig, sets: list[TrainingSet]) -> None:
    first, rest, third = draw_members(config, sets)
    for each in sets:
        both = np.concatenate([first.rows[each.name], rest.rows[each.name]])
        assert sorted(both) == list(range(len(each)))
    assert [member.name for member in (first, rest, third)] == ["1-50", "2-50", "3-75"]
    assert len({member.seed for member in (first, rest, third)}) == 3


def test_members_are_drawn_independently(config: TrainingConfig, sets: list[TrainingSet]) -> None:
    """Two bags of half share half of their rows on average; so do the core set and a bag."""
    shared, with_core = [], []
    for seed in range(400):
        seeded = replace(config, seed=seed, bags=(50, 50), core=50.0)
        one, other = draw_members(seeded, sets)
        core = draw_core(seeded, sets)
        shared.append(len(np.intersect1d(one.rows["word"], other.rows["word"])))
        with_core.append(len(np.intersect1d(one.rows["word"], core["word"])))
    for counts in (shared, with_core):  # hypergeometric: 16 rows, 8 and 8
        assert abs(np.mean(counts) - 4) < 5 * np.sqrt(8 * 0.5 * 0.5 * 8 / 15 / 400)
        assert len(set(counts)) > 3


def test_draws_follow_from_the_seed_alone(config: TrainingConfig, sets: list[TrainingSet]) -> None:
    def rows(seed: int) -> list[list[int]]:
        return [m.rows[each.name].tolist() for m in draw_members(replace(config, seed=seed), sets) for each in sets]

    assert rows(3) == rows(3) != rows(4)
    bags = replace(config, bags=(50, 80))
    assert draw_members(bags, sets)[0].rows["word"].tolist() == draw_members(config, sets)[0].rows["word"].tolist()


def test_without_bags_one_member_has_all_rows(config: TrainingConfig, sets: list[TrainingSet]) -> None:
    (member,) = draw_members(replace(config, bags=(), seed=7), sets)
    assert all(member.rows[each.name].tolist() == list(range(len(each))) for each in sets)
    assert member.seed == 7


# ---- what a run leaves ----


def test_the_folder_holds_members_merge_core_and_costs(
    run: Path, config: TrainingConfig, sets: list[TrainingSet]
) -> None:
    assert {file.name for file in run.iterdir()} == {
        ".lock", "config.yml", "core", "cuvee.json", "data", "members", "model",
    }  # fmt: skip
    past = json.loads((run / "cuvee.json").read_text("utf-8"))
    assert past["state"] == "done" and past["command"] == "train"
    assert (run / "config.yml").read_text("utf-8") == config.text
    for member in draw_members(config, sets):
        own = np.load(run / "members" / member.name / "rows.npz")
        assert {name: own[name].tolist() for name in own} == {n: r.tolist() for n, r in member.rows.items()}
        told = past["members"][member.name]
        assert told["percent"] == member.percent and told["seed"] == member.seed
        assert told["sizes"] == {name: len(rows) for name, rows in member.rows.items()}
        assert told["rows"] > 0 and told["steps"] > 0
    assert past["cost"] == past["row_passes"] == sum(each["rows"] for each in past["members"].values())
    assert past["rows_in_all"] == 32


def test_the_core_set_reads_back_as_the_rows_it_was_drawn_from(
    run: Path, config: TrainingConfig, sets: list[TrainingSet], tmp_path: Path
) -> None:
    kept = np.load(run / "core" / "rows.npz")
    read = replace(config, data=data_settings(run / "core" / "data.yml")[0])
    again = load_sets(read, Tokenizer(config), tmp_path)
    for before, after in zip(sets, again, strict=True):
        rows = kept[before.name]
        assert len(rows) == len(after) == 4
        assert [read_texts(before, row) for row in rows] == [read_texts(after, row) for row in range(len(after))]
        assert (after.type, after.name) == (before.type, before.name)


def test_the_model_loads_in_sentence_transformers(run: Path) -> None:
    from sentence_transformers import SentenceTransformer

    vectors = SentenceTransformer(str(run / "model"), device="cpu").encode(["one", "two"])
    assert vectors.shape == (2, 384) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_the_merge_is_the_one_of_cuvee_merge(run: Path, tmp_path: Path) -> None:
    members = sorted((run / "members").iterdir())
    lines = "".join(
        f"  - {{model: {m}, parameters: {{weight: {w}}}}}\n" for m, w in zip(members, (50, 50, 75), strict=True)
    )
    (tmp_path / "recipe.yml").write_text(f"merge_method: multislerp\nmodels:\n{lines}dtype: float32\n", "utf-8")
    merge_file(tmp_path / "recipe.yml", tmp_path / "merged")
    ours, theirs = weights(run / "model"), weights(tmp_path / "merged")
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-6, err_msg=name)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(("kind", "shares"), [("size", [2 / 7, 2 / 7, 3 / 7]), ("equal", [1 / 3] * 3)])
def test_weights_are_by_size_or_equal(
    run: Path, config: TrainingConfig, sets: list[TrainingSet], tmp_path: Path, kind: str, shares: list[float]
) -> None:
    """And of mean 1, for methods that do not divide by their sum."""
    text = config.text + f"merge: {{method: task_arithmetic, parameters: {{lambda: 0.5}}}}\nweights: {kind}\n"
    (Path(config.where).parent / "other.yml").write_text(text, "utf-8")
    other = load(Path(config.where).parent / "other.yml")
    (tmp_path / "members").symlink_to(run / "members")
    merge_members(other, draw_members(other, sets), tmp_path, {"form": 1}, *QUIETLY)
    base = weights(Path(config.model.path))
    members = [weights(folder) for folder in sorted((run / "members").iterdir())]
    after = weights(tmp_path / "model")
    for name in members[0]:
        merged = after[name]
        vectors = [share * 3 * (member[name] - base[name]) for share, member in zip(shares, members, strict=True)]
        np.testing.assert_allclose(merged, base[name] + 0.5 * np.sum(vectors, axis=0), rtol=0, atol=2e-6, err_msg=name)
    assert lineage.read(tmp_path / "model")["trained"]["form"] == 1
    shutil.rmtree(tmp_path)


def test_a_base_without_modules_is_kept_for_the_merge(
    run: Path, config: TrainingConfig, sets: list[TrainingSet], minilm: Path, tmp_path: Path
) -> None:
    """A plain encoder: the merge takes its tokenizer and modules from what the members started from."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm / name, bare / name)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "members").symlink_to(run / "members")
    settings = replace(config, model=replace(config.model, path=str(bare)), merge=replace(config.merge, method="ties"))
    merge_members(settings, draw_members(settings, sets), tmp_path / "run", {}, *QUIETLY)
    assert (tmp_path / "run" / "base" / "modules.json").is_file()
    assert (tmp_path / "run" / "model" / "modules.json").is_file()
    shutil.rmtree(tmp_path)


# ---- run again ----


def stamps(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}


def test_run_again_nothing_is_made_again(run: Path, config: TrainingConfig) -> None:
    before = stamps(run)
    told: list[str] = []
    result = train_run(config, run, progress=lambda what, done, total: told.append(f"{what} {done}/{total}"))
    assert stamps(run) == before and len(before) == 4
    assert result["cost"] == json.loads((run / "cuvee.json").read_text("utf-8"))["cost"]
    assert not any("merge" in line for line in told)


def test_a_member_that_is_missing_is_trained_again_alone(run: Path, config: TrainingConfig, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy", symlinks=True))
    before = stamps(copy)
    shutil.rmtree(copy / "members" / "2-50")
    shutil.rmtree(copy / "model")
    train_run(config, copy)
    after = stamps(copy)
    assert {name for name in after if after[name] != before[name]} == {
        "members/2-50/model.safetensors", "model/model.safetensors",
    }  # fmt: skip
    assert same_weights(copy / "model", run / "model")
    shutil.rmtree(copy)


def test_a_model_is_no_runs_folder(run: Path, config: TrainingConfig) -> None:
    before = (run / "members" / "1-50" / "cuvee.json").read_bytes()
    for force in (False, True):
        with pytest.raises(CuveeError, match=r"1-50: is a model, no run's folder; choose another"):
            train_run(config, run / "members" / "1-50", options=Options(force=force))
    assert (run / "members" / "1-50" / "cuvee.json").read_bytes() == before


def test_a_configuration_that_was_refused_is_mended_in_place(config: TrainingConfig, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("text,label\none,a\ntwo,b\n", "utf-8")
    data = data_settings(tmp_path / "labels.csv")[0]
    with pytest.raises(CuveeError, match=r"labels.csv:2: the row is a text and its label.*add 'type: Classification'"):
        train_run(replace(config, data=data), tmp_path / "run")
    assert plan(config, tmp_path / "run")["steps"] > 0
    claim(tmp_path / "run", "train", config, force=False)
    (tmp_path / "run" / "work").mkdir()  # from now on there is something to lose
    with pytest.raises(CuveeError, match="another configuration"):
        plan(replace(config, seed=9), tmp_path / "run")


def test_row_numbers_of_data_sets_named_as_arguments_of_savez(tmp_path: Path) -> None:
    rows = {name: np.arange(3, dtype=np.int64) for name in ("file", "allow_pickle", "a.b-c")}
    write_row_numbers(tmp_path / "rows.npz", rows)
    kept = np.load(tmp_path / "rows.npz")
    assert {name: kept[name].tolist() for name in kept} == {name: [0, 1, 2] for name in rows}


def test_another_configuration_is_refused_and_forced(run: Path, config: TrainingConfig, tmp_path: Path) -> None:
    other = replace(config, learning_rate=1e-4)
    for refuse in (lambda: train_run(other, run), lambda: plan(other, run)):
        with pytest.raises(CuveeError, match=r"holds a run of another configuration; .*--force"):
            refuse()
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "base").mkdir()
    one = replace(other, bags=(100,))
    train_run(one, copy, options=Options(force=True))
    assert [member.name for member in (copy / "members").iterdir()] == ["1-100"]
    assert not (copy / "base").exists() and json.loads((copy / "cuvee.json").read_text("utf-8"))["state"] == "done"
    shutil.rmtree(copy)


def test_what_comes_after_training_can_be_changed_and_keeps_the_members(
    run: Path, config: TrainingConfig, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    before = stamps(copy)
    other = replace(config, merge=replace(config.merge, method="linear"), core=50.0, save_every=3)
    train_run(other, copy)
    after = stamps(copy)
    assert {name for name in after if after[name] != before[name]} == {"model/model.safetensors"}
    assert not same_weights(copy / "model", run / "model")
    assert lineage.read(copy / "model")["method"] == "linear"
    halves, quarters = (sum(len(rows) for rows in np.load(each / "core" / "rows.npz").values()) for each in (copy, run))
    assert halves > 1.8 * quarters
    shutil.rmtree(copy)


def test_changed_data_are_refused_and_with_force_change_the_core_too(minilm: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, minilm, "steps: 1\n", "  - {file: word.jsonl}\n")
    train_run(config, tmp_path / "run")
    before = (tmp_path / "run" / "core" / "word.jsonl.gz").read_bytes()
    lines = (tmp_path / "word.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "word.jsonl").write_text("".join(lines[1:]), "utf-8")
    with pytest.raises(CuveeError, match="was trained on other data"):
        train_run(config, tmp_path / "run")
    train_run(config, tmp_path / "run", options=Options(force=True))
    assert (tmp_path / "run" / "core" / "word.jsonl.gz").read_bytes() != before
    assert lineage.read(tmp_path / "run" / "model")["trained"]["rows_in_all"] == 15
    shutil.rmtree(tmp_path)


# ---- refused before any work ----


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("bags: [50, 50, 50]\nmerge: slerp\n", r"config.yml:9: .*slerp"),
        ("bags: [50, 50]\nmerge: nearswap\n", r"config.yml:9: .*nearswap"),
        ("bags: [50, 50]\nmerge: {method: ties, parameters: {density: 7}}\n", r"config.yml:9: .*density"),
    ],
)
def test_a_merge_that_cannot_be_is_refused_before_training(minilm: Path, tmp_path: Path, more: str, said: str) -> None:
    config = config_of(tmp_path, minilm, more)
    for run in (train_run, plan):
        with pytest.raises(CuveeError, match=said):
            run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_not_ours_is_left_alone(minilm: Path, tmp_path: Path, run: Path) -> None:
    config = config_of(tmp_path / "config", minilm)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", "utf-8")
    for force in (False, True):
        with pytest.raises(CuveeError, match="mine: is not empty and none of our outputs"):
            train_run(config, tmp_path / "mine", options=Options(force=force))
        with pytest.raises(CuveeError, match="is an output of `cuvee merge`"):
            train_run(config, run / "model", options=Options(force=force))
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert not (run / "model" / ".lock").exists()
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(CuveeError, match="file: is no folder"):
        train_run(config, tmp_path / "file")


def test_two_processes_do_not_work_in_one_folder(run: Path, config: TrainingConfig) -> None:
    with alone(run), pytest.raises(CuveeError, match="another process is at work in it"):
        train_run(config, run)


def test_a_plan_writes_nothing_and_tells_the_cost(minilm: Path, tmp_path: Path, run: Path) -> None:
    file = write_config(tmp_path, minilm, BAGS)
    planned: dict[str, Any] = plan(load(file), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    done = json.loads((run / "cuvee.json").read_text("utf-8"))
    assert planned["cost"] == done["cost"] and planned["steps"] == done["steps"] and planned["rows"]["word"] == 16
