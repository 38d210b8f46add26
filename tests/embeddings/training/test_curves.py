"""Curves: what a run's metrics look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from embeddings.training import curves
from embeddings.training.curves import CURVES, drawing, picture, write_curves
from embeddings.training.metrics import Metrics

Line = dict[str, Any]


def held(step: int, stage: str, **numbers: float) -> Line:
    return {"step": step, "stage": stage, "held_out": numbers}


LINES: list[Line] = [
    held(0, "warm_up", loss=5.0, rank=3.0),
    {"step": 10, "stage": "warm_up", "loss": 4.0, "accuracy": 0.1, "grad_norm": 7.0},
    {"step": 20, "stage": "warm_up", "loss": 3.0, "accuracy": 0.2, "grad_norm": 7.0},
    held(20, "warm_up", loss=3.5, rank=4.0),
    held(20, "bridge", loss=6.0, rank=4.0, blind_loss=8.0),
    {"step": 30, "stage": "bridge", "loss": 5.0, "accuracy": 0.1},
    {"step": 40, "stage": "bridge", "loss": 2.0, "accuracy": 0.4},
    held(40, "bridge", loss=2.5, rank=9.0, blind_loss=4.0),
]


def panels(lines: list[Line]) -> dict[str, Axes]:
    drawn = picture(lines)
    assert drawn is not None
    return {axis.get_title(): axis for axis in drawn.axes}


def legend(axis: Axes) -> list[str]:
    return [own.get_text() for own in axis.get_legend().get_texts()]


def test_a_line_goes_through_what_the_metrics_say_and_not_from_stage_to_stage() -> None:
    axis = panels(LINES)["loss"]
    assert legend(axis) == ["trained on", "held out", "held out, from EOS alone"]
    lines = [(own.get_color(), own.get_marker(), own.get_xydata().tolist()) for own in axis.get_lines()]
    assert lines[:5] == [
        ("C0", "", [[10, 4], [20, 3]]),
        ("C0", "", [[30, 5], [40, 2]]),
        ("C1", ".", [[0, 5], [20, 3.5]]),
        ("C1", ".", [[20, 6], [40, 2.5]]),
        ("C2", ".", [[20, 8], [40, 4]]),
    ]
    (border,) = lines[5:]
    assert [x for x, _ in border[2]] == [20, 20]
    assert [(own.get_position()[0], own.get_text()) for own in axis.texts] == [(0, " warm up"), (20, " bridge")]


def test_panels_are_those_that_there_is_something_for() -> None:
    assert list(panels(LINES)) == ["loss", "share of tokens told right", "effective rank of the embeddings"]
    own = [{"step": 10, "loss": 1.0, "losses": {"a <b> & $c$": 2.0, "_d": 1.0}}, {"step": 10, "scores": {"word": 0.5}}]
    found = panels(own)
    assert list(found) == ["loss", "score"]
    assert legend(found["loss"]) == ["trained on", r"a <b> & \$c\$", " _d"]
    assert picture([]) is None and picture([{"step": 1, "grad_norm": 2.0}]) is None


def test_what_is_no_number_is_not_drawn() -> None:
    own = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")}, {"step": 3, "loss": 2.0}]
    (line,) = panels(own)["loss"].get_lines()
    assert line.get_xydata().tolist() == [[3, 2]] and line.get_marker() == "."
    assert picture(own[:2]) is None


def test_of_many_series_the_first_have_a_name() -> None:
    own = [{"step": 10, "loss": 1.0, "losses": {f"set {i:02}": i + 0.5 for i in range(12)}}]
    told = legend(panels(own)["loss"])
    assert told == ["trained on", *(f"set {i:02}" for i in range(7)), "5 more"]


def test_it_is_drawn_when_something_was_measured_and_is_the_same_file_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "_EVERY", -1.0)
    file = tmp_path / "metrics.jsonl"
    written = Metrics(file, sinks=[drawing(file)])
    written.write(LINES[1])
    assert not (tmp_path / CURVES).exists()
    for line in LINES:
        written.write(line)
    first = (tmp_path / CURVES).read_text("utf-8")
    assert "held out, from EOS alone" in first
    (tmp_path / CURVES).unlink()
    write_curves(file)
    assert (tmp_path / CURVES).read_text("utf-8") == first
    assert {own.name for own in tmp_path.iterdir()} == {"metrics.jsonl", CURVES}
    monkeypatch.setattr(curves, "_EVERY", 60.0)
    (tmp_path / CURVES).unlink()
    drawing(file)(LINES[0])
    assert not (tmp_path / CURVES).exists()


def test_without_a_number_there_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "grad_norm": 1.0}) + "\n", encoding="utf-8")
    write_curves(tmp_path / "metrics.jsonl")
    write_curves(tmp_path / "nowhere.jsonl")
    assert [own.name for own in tmp_path.iterdir()] == ["metrics.jsonl"]
