"""Metrics: a line at once, none twice after a kill, and whoever else listens."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest

from embeddings.training.metrics import Metrics, last_loss, read, sinks
from merging.errors import CuveeError


def test_each_line_is_there_at_once(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "metrics.jsonl"
    metrics = Metrics(file)
    for step in (10, 20):
        metrics.write({"step": step, "loss": 0.5})
        assert read(file)[-1] == {"step": step, "loss": 0.5}


def test_a_new_run_begins_an_empty_file_and_a_missing_one_has_no_lines(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read(file) == []
    Metrics(file).write({"step": 1})
    Metrics(file)
    assert read(file) == []


@pytest.mark.parametrize("cut", ["", '{"step": 40, "lo', '{"step": 40, "lo\n'])
def test_what_a_resumed_run_does_again_is_dropped(tmp_path: Path, cut: str) -> None:
    """Lines after the checkpoint, and one that the kill cut in two."""
    file = tmp_path / "metrics.jsonl"
    first = Metrics(file)
    for step in (10, 20, 20, 30):
        first.write({"step": step})
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(cut)
    again = Metrics(file, from_step=20)
    assert [line["step"] for line in read(file)] == [10, 20, 20]
    again.write({"step": 30})
    assert [line["step"] for line in read(file)] == [10, 20, 20, 30]
    assert not [left for left in tmp_path.iterdir() if left != file]


def test_the_last_loss_is_the_mean_over_steps_and_not_over_lines(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics = Metrics(file)
    assert last_loss(file, 50) != last_loss(file, 50)  # NaN
    losses = [float(step % 7) for step in range(1, 68)]
    for begin in range(0, 67, 10):
        own = losses[begin : begin + 10]
        metrics.write({"step": begin + len(own), "loss": sum(own) / len(own)})
        metrics.write({"step": begin + len(own), "scores": {}})
    assert last_loss(file, 67) == last_loss(file, 100) == round(sum(losses) / 67, 6)
    assert last_loss(file, 47) == round(sum(losses[20:]) / 47, 6)
    assert last_loss(file, 7) == round(sum(losses[60:]) / 7, 6)


def test_sinks_are_told_every_line(tmp_path: Path) -> None:
    heard: list[Any] = []
    Metrics(tmp_path / "metrics.jsonl", sinks=[heard.append, heard.append]).write({"step": 1, "loss": 2.0})
    assert heard == [{"step": 1, "loss": 2.0}] * 2


def test_an_unknown_or_missing_log_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CuveeError, match=r"--log: 'tensorbord' is no log; choose tensorboard or wandb"):
        sinks(["tensorbord"], tmp_path, "run")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(CuveeError, match=r"--log: wandb is not installed; pip install wandb"):
        sinks(["wandb"], tmp_path, "run")


def test_tensorboard_has_every_number_under_its_path(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="no tensorboard here")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (sink,) = sinks(["tensorboard"], tmp_path, "1-40")
    sink({"step": 10, "loss": 0.5, "losses": {"word": 0.25}, "name": "no number", "flag": True})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "1-40")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "losses/word"}
    assert [(event.step, event.value) for event in events.Scalars("losses/word")] == [(10, 0.25)]


def test_without_tensorboard_nothing_of_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refusing(name: str, *args: Any, **kwargs: Any) -> Any:
        if "tensorboard" in name:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refusing)
    assert sinks([], tmp_path, "run") == []
    with pytest.raises(CuveeError, match="tensorboard is not installed"):
        sinks(["tensorboard"], tmp_path, "run")
