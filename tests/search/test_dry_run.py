"""What is wrong with a search is told before its first trial, by a dry run too: all that shows without the model's weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import run
from tests.merging.statistics.models import sentences
from tests.search.objectives.test_choices import table
from tests.search.objectives.test_search import classifiers

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classifiers of three classes, and texts with and without labels."""
    folder = tmp_path_factory.mktemp("dry")
    classifiers(folder)
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(sentences(9))]
    table(folder / "good.jsonl", rows)
    table(folder / "bare.jsonl", [{"text": row["text"]} for row in rows])
    table(folder / "high.jsonl", [{**row, "label": 3} for row in rows])
    table(folder / "empty.jsonl", [])
    (folder / "broken.jsonl").write_text("{\n")
    (folder / "labels.odt").write_text("a\nb\n")
    (folder / "score.py").write_text("def one(folder):\n    return 1.0\n")
    (folder / "wrong.py").write_text("import nowhere_at_all\n")
    return folder


def dry(place: Path, objective: Any, **said: Any) -> str:
    """The last line of what a dry run says; "" where it finds nothing wrong."""
    content = {"base_model": "base", "models": ["a", "b"], "objective": objective, **said}
    content = {key: value for key, value in content.items() if value is not None}
    (place / "search.yml").write_text(yaml.safe_dump(content, sort_keys=False))
    done = run("search", place / "search.yml", place / "out", "--dry-run", cwd=place)
    assert done.code in (0, 2) and not (place / "out").exists(), done.err
    return done.err.splitlines()[-1] if done.code else ""


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ({"pim": {"data": "bare.jsonl", "prior": [1, 2]}}, "search.yml:8: 2 shares for 3 choices"),
        ({"pim": {"data": "bare.jsonl", "prior": {"x": 1}}}, "search.yml:8: 'x' is no choice"),
        ({"pim": {"data": "bare.jsonl", "prior": "base"}}, "base: holds no cuvee.json, so it is no score prior"),
        (
            {"loss": "bare.jsonl"},
            "bare.jsonl: row 1 has no label that is a word or a whole number; add a column 'label'",
        ),
        ({"loss": {"data": "good.jsonl", "columns": {"label": "grade"}}}, "good.jsonl:1: has no 'grade'"),
        ({"score": {"data": "high.jsonl"}}, "high.jsonl: the label '3' is no choice; the choices are"),
        ({"score": {"data": "good.jsonl", "scores": [1, 2]}}, "search.yml:6: 2 scores, and the model has 3 choices"),
        ({"entropy": "empty.jsonl"}, "empty.jsonl: holds no row"),
        ({"entropy": "broken.jsonl"}, "broken.jsonl:1: is not JSON"),
        ({"entropy": {"data": "nowhere.jsonl"}}, "search.yml:7: no such file 'nowhere.jsonl'"),
        (
            {"entropy": {"data": "bare.jsonl", "prototypes": "labels.odt"}},
            "search.yml:8: 'labels.odt' is of no known format; known: '.txt', '.jsonl'",
        ),
        ({"perplexity": {"data": "empty.jsonl"}}, "empty.jsonl: holds no row"),
        ({"perplexity": {"data": "bare.jsonl"}}, "base: is no language model"),
        ({"function": "nowhere:one"}, "search.yml:5: 'nowhere' cannot be imported: ModuleNotFoundError"),
        ({"function": "wrong:one"}, "search.yml:5: 'wrong' cannot be imported: ModuleNotFoundError"),
        ({"function": "score:two"}, "search.yml:5: 'score' has no function 'two'"),
    ],
)
def test_what_the_objective_reads(place: Path, objective: Any, told: str) -> None:
    assert told in dry(place, objective)


@pytest.mark.parametrize(
    ("goal", "told"),
    [
        ({"floors": {"z": 0.5}}, "search.yml:5: the objective has no task 'z'; given: x, y"),
        ({"aggregate": {"weighted": {"x": 1, "z": 1}}}, "the objective has no task 'z'"),
        ({"front": ["x", "z"]}, "the objective has no task 'z'"),
        ({"front": ["x", "y"], "floors": {"x": 0.5}}, ""),
    ],
)
def test_tasks_that_the_goal_names(place: Path, goal: dict[str, Any], told: str) -> None:
    assert told in (found := dry(place, {"loss": {"data": {"x": "good.jsonl", "y": "good.jsonl"}}, **goal}))
    assert bool(told) == bool(found)


def test_the_posterior_of_a_front(place: Path) -> None:
    objective = {"loss": {"data": {"x": "good.jsonl", "y": "good.jsonl"}}, "front": ["x", "y"]}
    assert "'recommend: posterior' is of one score" in dry(place, objective, recommend="posterior")


def test_what_is_right_passes(place: Path) -> None:
    for objective in (
        {"pim": {"data": "bare.jsonl", "prior": [1, 2, 3]}},
        {"loss": "good.jsonl"},
        {"score": {"data": {"x": "good.jsonl", "y": {"data": "good.jsonl", "metric": "qwk"}}}},
        {"function": "score:one"},
    ):
        assert dry(place, objective) == ""


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"start": [{"study": "nowhere"}]}, "search.yml:8: 'nowhere' holds no study"),
        (
            {"models": [{"model": name, "stats": {"data": "nowhere.jsonl"}} for name in "ab"]},
            "search.yml:3: no such file of texts: nowhere.jsonl",
        ),
        ({"engine": "adamerging", "base_model": None}, "search.yml:6: 'task_arithmetic' needs a base"),
        ({"method": "ties", "base_model": None}, "search.yml:6: 'ties' needs a base"),
        ({"base_model": None}, "search.yml:1: 'task_arithmetic' needs a base"),
        ({"models": ["base"], "method": None}, "search.yml:2: the base is the only model; add"),
        ({"models": ["a", "a"], "method": None}, "is listed twice; remove this entry, or that at"),
        ({"vary": {"weight": 0.5}}, "search.yml:8: nothing varies in 'task_arithmetic'"),
        ({"vary": {"weight": {"low": 1, "high": 1}}}, "nothing varies in 'task_arithmetic'"),
        ({"engine": {"gp": {"x": 1}}}, "the engine 'gp' takes no settings"),
    ],
)
def test_what_the_search_is_made_of(place: Path, said: dict[str, Any], told: str) -> None:
    objective = {"entropy": "bare.jsonl"} if "engine" in said else {"function": "score:one"}
    more = {"method": "fisher"} if "models" in said and "method" not in said else {}
    assert told in dry(place, objective, **more, **said)


@pytest.mark.skipif(importlib.util.find_spec("botorch") is not None, reason="botorch is installed")
def test_an_engine_that_is_not_installed(place: Path) -> None:
    told = dry(place, {"function": "score:one"}, engine="botorch")
    assert "search.yml:7: the engine 'botorch' is not installed; pip install 'cuvee[botorch]'" in told


def test_the_data_of_a_suite(place: Path, minilm: Path, tmp_path: Path) -> None:
    pytest.importorskip("mteb")
    table(tmp_path / "words.jsonl", [{"query": "a"}])
    (tmp_path / "words.yml").write_text("type: Retrieval\nfiles: {validation: words.jsonl}\n")
    objective = {"suite": str(tmp_path)}
    told = dry(place, objective, base_model=None, models=[str(minilm)], method="linear")
    assert "words.jsonl:1: has no 'positive'" in told
    table(tmp_path / "words.jsonl", [{"query": "a", "positive": "b"}])
    assert "is a classifier" in dry(place, objective)
