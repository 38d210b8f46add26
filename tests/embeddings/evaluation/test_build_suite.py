"""The shipped suite: what the issue asks of it holds, nothing leaks, and the script that made it makes it again."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from embeddings.evaluation import suite, suite_check

ROOT = Path(__file__).parents[3]
SOURCE = ROOT.parent / "shared" / "data"  # the full tasks, where they are at hand


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("build_suite", ROOT / "scripts" / "build_suite.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    monkeypatch.undo()


def test_shipped_suite_has_six_tasks_of_four_types_in_two_groups() -> None:
    tasks = suite.load()
    assert len(tasks) >= 6
    assert len({task.type for task in tasks}) >= 4
    splits = {task.group: set() for task in tasks}
    for task in tasks:
        splits[task.group].add(tuple(task.splits))
    assert splits == {"in-domain": {("test", "validation", "train")}, "out-of-domain": {("test",)}}


def test_shipped_suite_is_small_and_states_licences_that_the_notice_knows() -> None:
    files = [file for file in suite.SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 4e6
    notice = (suite.SHIPPED.parent / "NOTICE.md").read_text(encoding="utf-8")
    for task in suite.load():
        assert task.licence and task.description and task.source
        assert f"suite/{task.name}/" in notice


def test_check_finds_nothing_in_the_shipped_suite() -> None:
    assert [str(finding) for finding in suite_check.check(suite.SHIPPED)] == []


def test_out_of_domain_senses_share_no_definition_with_the_training_rows_of_word(script: ModuleType) -> None:
    tasks = {task.name: task for task in suite.load()}
    trained = {script.plain(row["query"]) for row in tasks["word"].read("train")}
    for row in tasks["sense"].read("test"):
        assert not trained & {script.definition(sense) for sense in (*row["positive"], *row["negative"])}


def test_the_same_source_gives_the_same_bytes(script: ModuleType, tmp_path: Path) -> None:
    if not SOURCE.is_dir():
        pytest.skip("needs the full tasks, which are not distributed")
    names = ("intent", "sentiment", "emoji-german")
    script.build(SOURCE, tmp_path, [task for task in script.shipped_suite() if task.name in names])
    for file in (file for file in tmp_path.rglob("*") if file.is_file()):
        assert file.read_bytes() == (suite.SHIPPED / file.relative_to(tmp_path)).read_bytes(), file.name


def test_full_suite_loads_and_its_samples_are_clean(script: ModuleType, tmp_path: Path) -> None:
    if not SOURCE.is_dir():
        pytest.skip("needs the full tasks, which are not distributed")
    names = ("trec-question-type", "stsb-en", "wordnet-same-sense")
    script.build(SOURCE, tmp_path, [task for task in script.full_suite() if task.name in names])
    assert {task.type for task in suite.load(tmp_path)} == {"Classification", "STS", "PairClassification"}
    assert [str(f) for f in suite_check.check(tmp_path) if f.severity == suite_check.ERROR] == []


def test_leaks_and_repeated_rows_are_left_out(script: ModuleType) -> None:
    splits = {"train": [{"text": "A  b"}, {"text": "c"}, {"text": "c "}, {"text": "d"}], "validation": [{"text": "D"}]}
    clean = script.without_leaks({s: script.distinct(r) for s, r in {**splits, "test": [{"text": "a b"}]}.items()})
    assert [row["text"] for row in clean["train"]] == ["c"]
    assert [row["text"] for row in clean["validation"]] == ["D"]
