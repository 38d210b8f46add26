"""Curves: what a run's metrics look like, read back from the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from embeddings.training import curves
from embeddings.training.curves import CURVES, drawing, picture, ticks, write_curves
from embeddings.training.metrics import Metrics

SVG = "{http://www.w3.org/2000/svg}"
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


def panels(svg: str) -> dict[str, ElementTree.Element]:
    return {str(own.findtext(f"{SVG}text")): own for own in ElementTree.fromstring(svg).iter(f"{SVG}g")}


def drawn(panel: ElementTree.Element, label: str) -> list[list[tuple[float, float]]]:
    """The lines of a series, in the picture's own numbers."""
    found = [own for own in panel.iter(f"{SVG}polyline") if own.findtext(f"{SVG}title") == label]
    return [[(float(x), float(y)) for x, y in (at.split(",") for at in own.attrib["points"].split())] for own in found]


def scale(panel: ElementTree.Element) -> tuple[Any, Any]:
    """From the picture's numbers to steps and values, by the labels of its axes."""
    texts = [(own.attrib, str(own.text).replace(",", "")) for own in panel.iter(f"{SVG}text")]
    steps = [(float(at["x"]), float(text)) for at, text in texts if at.get("text-anchor") == "middle"]
    values = [
        (float(at["y"]) - 4, float(text))
        for at, text in texts
        if at.get("text-anchor") == "end" != text and text != "step"
    ]
    return (np.poly1d(np.polyfit(*zip(*own, strict=True), 1)) for own in (steps, values))  # type: ignore[return-value]


def test_a_line_goes_through_what_the_metrics_say_and_not_from_stage_to_stage() -> None:
    loss = panels(picture(LINES))["loss"]
    step, value = scale(loss)
    for label, wanted in {
        "trained on": [[(10, 4), (20, 3)], [(30, 5), (40, 2)]],
        "held out": [[(0, 5), (20, 3.5)], [(20, 6), (40, 2.5)]],
        "held out, from EOS alone": [[(20, 8), (40, 4)]],
    }.items():
        read = [[(step(x), value(y)) for x, y in line] for line in drawn(loss, label)]
        np.testing.assert_allclose(read, wanted, atol=0.1)
    (mark,) = (own for own in loss.iter(f"{SVG}line") if own.get("class") == "stage")
    assert step(float(mark.attrib["x1"])) == pytest.approx(20, abs=0.1)
    assert {"warm up", "bridge"} <= {own.text for own in loss.iter(f"{SVG}text")}


def test_what_was_measured_has_a_mark_with_its_number() -> None:
    rank = panels(picture(LINES))["effective rank of the embeddings"]
    assert [own.findtext(f"{SVG}title") for own in rank.iter(f"{SVG}circle")] == [
        *("as they are, step 0: 3", "as they are, step 20: 4", "as they are, step 20: 4", "as they are, step 40: 9"),
    ]


def test_panels_are_those_that_there_is_something_for() -> None:
    assert list(panels(picture(LINES))) == ["loss", "share of tokens told right", "effective rank of the embeddings"]
    own = [{"step": 10, "loss": 1.0, "losses": {"a <b> & c": 2.0}}, {"step": 10, "scores": {"word": 0.5}}]
    found = panels(picture(own))
    assert list(found) == ["loss", "score"] and "a <b> & c" in [text.text for text in found["loss"].iter(f"{SVG}text")]
    assert picture([]) == "" == picture([{"step": 1, "grad_norm": 2.0}])


def test_what_is_no_number_is_not_drawn() -> None:
    own = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")}, {"step": 3, "loss": 2.0}]
    svg = picture(own)
    assert "nan" not in svg and "inf" not in svg and svg.count("<circle") == 1
    assert picture(own[:2]) == ""


def test_many_points_are_averaged_and_many_series_told_in_a_line() -> None:
    own = [{"step": step, "loss": 1.0, "losses": {f"set {i}": i + 0.5 for i in range(12)}} for step in range(1, 2000)]
    loss = panels(picture(own))["loss"]
    ((line),) = drawn(loss, "trained on")
    assert len(line) == 300 and len({y for _, y in line}) == 1
    assert "and 5 more, in grey" in [text.text for text in loss.iter(f"{SVG}text")]


@pytest.mark.parametrize("low, high", [(0, 1), (0.02, 0.97), (-3.1, -1), (5, 5), (0, 0), (1e-9, 2e-9), (3, 40_000)])
@pytest.mark.parametrize("count", [4, 5])
def test_ticks_hold_both_ends_at_equal_distances(low: float, high: float, count: int) -> None:
    found = ticks(low, high, count)
    assert found[0] <= low and high <= found[-1] and 2 <= len(found) <= count + 3
    np.testing.assert_allclose(np.diff(found), found[1] - found[0])


def test_it_is_drawn_when_something_was_measured_and_is_the_same_file_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    written = Metrics(file, sinks=[drawing(file)])
    written.write(LINES[1])
    assert not (tmp_path / CURVES).exists()
    for line in LINES:
        written.write(line)
    first = (tmp_path / CURVES).read_text("utf-8")
    assert "prefers-color-scheme: dark" in first and ElementTree.fromstring(first).tag == f"{SVG}svg"
    (tmp_path / CURVES).unlink()
    write_curves(file)
    assert (tmp_path / CURVES).read_text("utf-8") == first
    assert {own.name for own in tmp_path.iterdir()} == {"metrics.jsonl", CURVES}


def test_without_a_number_there_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "grad_norm": 1.0}) + "\n", encoding="utf-8")
    write_curves(tmp_path / "metrics.jsonl")
    write_curves(tmp_path / "nowhere.jsonl")
    assert [own.name for own in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_every_colour_is_told_from_its_ground() -> None:
    """Contrast of 3 : 1 at least, as WCAG asks of graphics, in both surroundings."""
    for theme in curves._THEMES:
        for colour in theme["colours"]:
            assert contrast(colour, theme["ground"]) >= 3, colour
        for colour in (theme["ink"], theme["quiet"]):
            assert contrast(colour, theme["ground"]) >= 4.5, colour


def contrast(one: str, other: str) -> float:
    lights = sorted(luminance(each) for each in (one, other))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(colour: str) -> float:
    parts = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
