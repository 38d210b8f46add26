"""`weights: search`: the weights of a run's merge are those that score best on validation, and a study stays behind."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from embeddings.training.bag import plan, train_run
from embeddings.training.config import TrainingConfig, load, parse
from embeddings.training.update import update_model
from merging import lineage
from merging.engine import merge_file
from merging.errors import CuveeError
from tests.commands import start
from tests.embeddings.runs import config_of, pairs, rows_of, same_weights, table
from tests.embeddings.training.test_bag import stamps

pytest.importorskip("mteb")

BAGS = "bags: [50, 100]\nepochs: 1\nsave_every: 0\ncore: 25\nevaluate: {suite: own, tasks: [words], every: 1000}\n"
SEARCH = "weights: {search: {trials: 3, engine: random, objective: {suite: own, tasks: [words, sentences]}}}\n"


def write_own(folder: Path) -> None:
    """A suite of two small tasks."""
    table(folder / "words.jsonl", rows_of("word", 24, 200))
    table(folder / "sentences.jsonl", pairs(16))
    for name, kind in (("words", "Retrieval"), ("sentences", "STS")):
        task = {"type": kind, "files": {"validation": f"{name}.jsonl"}}
        (folder / f"{name}.yml").write_text(yaml.safe_dump(task), "utf-8")


@pytest.fixture(scope="module")
def config(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    folder = tmp_path_factory.mktemp("searched")
    write_own(folder / "own")
    return config_of(folder, minilm, BAGS + SEARCH)


@pytest.fixture(scope="module")
def done(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    run = tmp_path_factory.mktemp("run") / "run"
    yield run, train_run(config, run)
    shutil.rmtree(run)


def trials(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "search" / "trials.jsonl").read_text("utf-8").splitlines()]


def said_otherwise(config: TrainingConfig, old: str, new: str) -> TrainingConfig:
    file = Path(config.where).with_name("other.yml")
    assert old in config.text
    file.write_text(config.text.replace(old, new), "utf-8")
    return load(file)


def test_the_model_is_the_best_merge_that_was_tried(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, result = done
    rows = trials(run)
    assert [row["state"] for row in rows] == ["COMPLETE"] * 3
    assert rows[0]["point"] == pytest.approx({"weight.0": 1 / 3, "weight.1": 2 / 3}), "by size first"
    best = max(rows, key=lambda row: row["values"])
    found = result["weights"]
    assert found["best"]["score"] == best["values"][0] and found["scores"].keys() == {"words", "sentences"}
    merge_file(run / "search" / "best.yml", tmp_path / "again")
    assert same_weights(run / "model", tmp_path / "again")
    assert not (run / "search" / "model").exists(), "one copy is enough"
    shutil.rmtree(tmp_path)


def test_lineage_says_so(done: tuple[Path, dict[str, Any]]) -> None:
    run, result = done
    trained = lineage.read(run / "model")["trained"]
    assert trained["weights"] == result["weights"] == lineage.read(run)["weights"]
    assert trained["config"]["merge_weights"] == "search" and trained["config"]["search"]["said"]["trials"] == 3


def test_run_again_nothing_is_made_again(done: tuple[Path, dict[str, Any]], config: TrainingConfig) -> None:
    run, result = done
    before = stamps(run)
    assert train_run(config, run)["weights"] == result["weights"]
    assert stamps(run) == before


def test_a_killed_search_goes_on_to_the_same_model(
    done: tuple[Path, dict[str, Any]], config: TrainingConfig, tmp_path: Path
) -> None:
    whole, result = done
    run = Path(
        shutil.copytree(whole, tmp_path / "run", symlinks=True, ignore=shutil.ignore_patterns("search*", "model"))
    )
    members = stamps(run / "members")
    train = start("train", config.where, run)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not ((run / "search" / "trials.jsonl").is_file() and trials(run)):
        time.sleep(0.005)
    train.kill()
    assert train.wait().code == -signal.SIGKILL
    assert 1 <= len(trials(run)) < 3 and not (run / "model").exists()
    again = start("train", config.where, run, "--json").wait()
    assert again.code == 0, again.err
    assert [(row["point"], row["values"]) for row in trials(run)] == [
        (row["point"], row["values"]) for row in trials(whole)
    ]
    assert again.json["weights"]["best"] == result["weights"]["best"]
    assert same_weights(run / "model", whole / "model")
    assert stamps(run / "members") == members, "no member is trained again"
    assert not (run / "search" / ".scratch").exists()
    shutil.rmtree(tmp_path)


def test_a_longer_search_goes_on_and_another_begins_anew(
    done: tuple[Path, dict[str, Any]], config: TrainingConfig, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(done[0], tmp_path / "run", symlinks=True))
    train_run(config, run)  # its models' paths are others: another search
    before, members = trials(run), stamps(run / "members")
    longer = train_run(said_otherwise(config, "trials: 3", "trials: 4"), run)
    assert trials(run)[:3] == before and longer["weights"]["trials"] == 4
    train_run(said_otherwise(config, "[words, sentences]", "[words]"), run)
    assert len(trials(run)) == 3 and trials(run)[0]["tasks"].keys() == {"words"}
    assert stamps(run / "members") == members
    shutil.rmtree(tmp_path)


def test_an_update_searches_too(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    new = table(tmp_path / "new.jsonl", rows_of("word", 8, 60))
    result = update_model(done[0], new, tmp_path / "out")
    assert result["weights"]["trials"] == 3 and len(result["weights"]["best"]["coefficients"]["weight"]) == 2
    models = yaml.safe_load((tmp_path / "out" / "search" / "best.yml").read_text("utf-8"))["models"]
    assert [Path(each["model"]).name for each in models] == ["model", "update"]
    shutil.rmtree(tmp_path)


def test_by_default_it_scores_on_what_is_evaluated_else_on_what_is_trained(config: TrainingConfig) -> None:
    plain = said_otherwise(config, SEARCH, "weights: search\n")
    assert plain.search is not None and plain.search.said["trials"] == 20
    assert plain.search.said["objective"]["tasks"] == ["words"]
    shipped = parse("model: owner/name\ndata: [{suite: shipped, task: [word, code]}]\nbags: [50, 100]\nweights: search")
    assert shipped.search is not None and shipped.search.said["objective"] == {
        **{"suite": "shipped", "tasks": ["word", "code"], "split": "validation"}
    }


def test_that_it_chooses_by_test_rows_is_said_before_the_training(config: TrainingConfig, tmp_path: Path) -> None:
    table(tmp_path / "own" / "words.jsonl", rows_of("word", 24, 200))
    task = {"type": "Retrieval", "files": {"test": "words.jsonl"}}
    (tmp_path / "own" / "words.yml").write_text(yaml.safe_dump(task), "utf-8")
    objective = f"objective: {{suite: {tmp_path / 'own'}, tasks: [words], split: test}}"
    by_test = said_otherwise(config, "objective: {suite: own, tasks: [words, sentences]}", objective)
    told: list[str] = []
    plan(by_test, tmp_path / "run", note=told.append)
    assert len(told) == 1 and told[0].startswith("the search of weights scores on test rows (words)")

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(by_test, tmp_path / "run", note=stop)
    assert not (tmp_path / "run").exists()


def test_data_that_no_trial_could_be_scored_on_is_told_before_the_training(
    config: TrainingConfig, tmp_path: Path
) -> None:
    table(tmp_path / "texts.jsonl", [{"text": "a"}, {"text": "b"}])
    objective = f"objective: {{score: {{data: {tmp_path / 'texts.jsonl'}, prototypes: [a, b]}}}}"
    unlabelled = said_otherwise(config, "objective: {suite: own, tasks: [words, sentences]}", objective)
    with pytest.raises(CuveeError, match="label"):
        plan(unlabelled, tmp_path / "run")


def test_an_engine_that_goes_its_own_way_has_its_own_number_of_trials_and_start(config: TrainingConfig) -> None:
    found = said_otherwise(config, SEARCH, "weights: {search: {engine: lm_cocktail}}\n")
    assert found.search is not None
    said = yaml.safe_load(found.search.text("linear", {}, ["a", "b"], [0.5, 0.5], None, 0))
    assert "trials" not in said and "start" not in said


def test_configurations_of_before_are_the_same_runs(config: TrainingConfig) -> None:
    assert "search" not in replace(config, search=None, merge_weights="size").plain()
    assert said_otherwise(config, SEARCH, "merge_weights: equal\n") == said_otherwise(
        config, SEARCH, "weights: equal\n"
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("weights: serch", r"config.yml:5: 'serch' is no choice for 'weights'.*search"),
        ("weights: search", r"config.yml:5: a search of weights needs data to score on; add 'evaluate"),
        (
            "evaluate: {suite: shipped, tasks: [word], split: test}\nweights: search",
            r"config.yml:6: a search of weights would choose by the test rows that 'evaluate' names; .*'validation'",
        ),
        ("weights: {search: {trails: 3}}", r"config.yml:5: .*'trails'.*'trials'"),
        ("weights: size\nmerge_weights: size", r"config.yml:6: .*are the same; keep 'weights'"),
        ("weights:\n  search:\n    trials: 0\n    objective: suite", r"config.yml:7: 'trials' is 0"),
        ("weights:\n  search:\n    engine: gpp\n    objective: suite", r"config.yml:7: .*'gpp'.*'gp'"),
        (
            "weights:\n  search:\n    engine: adamerging\n    objective: suite",
            r"config.yml:5: AdaMerging is a search of 'task_arithmetic'",
        ),
        (
            "merge: task_arithmetic\nweights:\n  search:\n    engine: adamerging\n    objective: suite",
            r"config.yml:9: the objective 'suite' has no gradient",
        ),
        (
            "weights:\n  search:\n    engine: lm_cocktail\n    objective: suite\n    trials: 9",
            r"config.yml:9: LM-Cocktail is one trial",
        ),
        ("weights:\n  search:\n    objective: {suite: nowhere}", r"config.yml:7: no such suite: nowhere"),
        ("weights:\n  search:\n    objective: suite\n    vary: {wait: 1}", r"config.yml:8: 'wait' is no parameter"),
        ("weights:\n  search:\n    objective: suite\n    start: [{weight: [1, 1, 1]}]", r"config.yml:8: .*a list of 2"),
        (
            "merge: model_stock\nweights: {search: {objective: suite}}",
            r"config.yml:6: 'model_stock' takes no weight of a model",
        ),
        ("merge: passthrough\nweights: {search: {objective: suite}}", r"config.yml:6: .*mergekit's 'passthrough'"),
    ],
)
def test_mistakes_are_told_at_their_line(more: str, said: str, tmp_path: Path) -> None:
    table(tmp_path / "word.jsonl", rows_of("word", 4))
    text = f"model: owner/name\ndata:\n- file: word.jsonl\nbags: [50, 100]\n{more}\n"
    with pytest.raises(CuveeError, match=said):
        parse(text, str(tmp_path / "config.yml"))
