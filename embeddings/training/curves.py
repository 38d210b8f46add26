"""Curves: a run's metrics as one picture, an SVG that needs nothing to be looked at, in light or dark surroundings.

A panel each for losses, tokens told right, ranks, the spread of embeddings, and scores, as far as they were measured, over
the steps; the stages of a pre-training are marked, and no line goes from one into the next. The same metrics, the same file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, isfinite, log10
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from embeddings.training import metrics
from embeddings.training.metrics import Sink
from merging.output import write_whole

CURVES = "curves.svg"


@dataclass(frozen=True)
class Series:
    """One number over the steps.

    Attributes:
        points: step and value, by stage.
        measured: at a few steps, each of which gets a mark.
    """

    label: str
    points: Mapping[str, Sequence[tuple[float, float]]]
    measured: bool

    @property
    def values(self) -> list[float]:
        return [value for points in self.points.values() for _, value in points]


@dataclass(frozen=True)
class _Panel:
    """What is drawn together.

    Attributes:
        names: of metrics, with what they are called; one that ends with "/" stands for all that begin so.
        from_zero: whether its axis begins at 0.
    """

    title: str
    names: Mapping[str, str]
    from_zero: bool = False


_HELD = "held_out/"
_PANELS = (
    _Panel(
        "loss",
        {
            "loss": "trained on",
            f"{_HELD}loss": "held out",
            f"{_HELD}blind_loss": "held out, from EOS alone",
            "losses/": "",
        },
    ),
    _Panel(
        "share of tokens told right",
        {
            "accuracy": "trained on",
            f"{_HELD}accuracy": "held out",
            f"{_HELD}blind_accuracy": "held out, from EOS alone",
            f"{_HELD}exact": "whole texts",
            f"{_HELD}blind_exact": "whole texts, from EOS alone",
        },
        from_zero=True,
    ),
    _Panel(
        "effective rank of the embeddings", {f"{_HELD}rank": "as they are", f"{_HELD}rank_centred": "centred"}, True
    ),
    _Panel("spread of the embeddings", {f"{_HELD}alignment": "alignment", f"{_HELD}uniformity": "uniformity"}),
    _Panel("score", {"scores/": ""}),
)
#: What a line with it was measured for.
_MEASURED = ("held_out", "scores")

_WIDE, _HIGH, _GAP = 430, 216, 18  # of a panel
_LEFT, _RIGHT, _BOTTOM = 46, 12, 30  # of its axes
_LINE = 15  # of a legend
_CHARACTER = 6.1  # width, at the size of the small text
_SHOWN = 8  # series of a panel with a colour of their own
_POINTS = 300  # of a line; more are averaged
_LIGHT = ("#0069b0", "#c74e00", "#008a63", "#a3478a")
_DARK = ("#5ab4f2", "#ff9d4d", "#35c79a", "#e58fcb")
_STYLE = """\
text {{ font: 11px system-ui, sans-serif; fill: {quiet}; }}
.title {{ font-weight: 600; font-size: 12px; fill: {ink}; }}
.ground {{ fill: {ground}; }}
.grid {{ stroke: {grid}; }}
.stage {{ stroke: {quiet}; stroke-dasharray: 2 3; }}
.other {{ stroke: {grid}; fill: {grid}; }}
.line {{ fill: none; stroke-width: 1.6; stroke-linejoin: round; }}
"""
_THEMES = (
    {"ground": "#ffffff", "ink": "#1b1f24", "quiet": "#59626e", "grid": "#dde1e6", "colours": _LIGHT},
    {"ground": "#14171c", "ink": "#e8ebef", "quiet": "#9aa4b1", "grid": "#343b45", "colours": _DARK},
)


def write_curves(file: Path) -> None:
    """Draws a metrics file as `curves.svg` beside it, whole or not at all; nothing where it has nothing to show."""
    drawn = picture(metrics.read(file))
    if drawn:
        write_whole(file.with_name(CURVES), drawn)


def drawing(file: Path) -> Sink:
    """Who draws the curves anew whenever something was measured.

    Args:
        file: the metrics, in which the line is that it is told of.
    """

    def listen(line: Mapping[str, Any]) -> None:
        if any(key in line for key in _MEASURED):
            write_curves(file)

    return listen


def picture(lines: Iterable[Mapping[str, Any]]) -> str:
    """An SVG of a run's lines; "" where they have no number that is drawn.

    Args:
        lines: as `metrics.read` gives them.
    """
    every = list(lines)
    panels = [(panel, found) for panel in _PANELS if (found := series_of(panel, every))]
    if not panels:
        return ""
    stages = _stages(every)
    columns = min(2, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    drawn, top = [], _GAP
    for row in rows:
        legend = max(_legend_lines(series) for _, series in row) * _LINE
        for place, (panel, series) in enumerate(row):
            left = _GAP + place * (_WIDE + _GAP)
            drawn.append(f'<g transform="translate({left} {top})">{_panel(panel, series, stages, legend)}</g>')
        top += _HIGH + legend + _GAP
    width = _GAP + columns * (_WIDE + _GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" width="{width}" height="{top}" role="img">'
        f"<title>{escape(', '.join(panel.title for panel, _ in panels))}, over steps</title>"
        f'<style>{_style()}</style><rect class="ground" width="{width}" height="{top}"/>\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )


def series_of(panel: _Panel, lines: Sequence[Mapping[str, Any]]) -> list[Series]:
    """What a panel shows of the lines, in its order; of what is no finite number nothing."""
    found: dict[str, _Gathered] = {}
    for line in lines:
        measured = any(key in line for key in _MEASURED)
        for name, value in metrics.numbers(line).items():
            label = _label(panel, name)
            if label and isfinite(value):
                own = found.setdefault(name, _Gathered(label, measured))
                own.points.setdefault(str(line.get("stage", "")), []).append((float(line["step"]), value))
    order = list(panel.names)
    names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    return [Series(found[name].label, found[name].points, found[name].measured) for name in names]


@dataclass
class _Gathered:
    label: str
    measured: bool
    points: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def _label(panel: _Panel, name: str) -> str:
    """What the panel calls it; "" for what is not its."""
    if name in panel.names:
        return panel.names[name]
    kind = next((kind for kind in panel.names if kind.endswith("/") and name.startswith(kind)), "")
    return name.removeprefix(kind) if kind else ""


def _stages(lines: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Where each stage begins and ends; steps are counted through, so one begins where the one before it ended."""
    ends: dict[str, float] = {}
    for line in lines:
        name = str(line.get("stage", ""))
        ends[name] = max(ends.get(name, 0.0), float(line["step"]))
    begins = [0.0, *ends.values()]
    return {name: (begin, end) for (name, end), begin in zip(ends.items(), begins, strict=False)}


def _panel(panel: _Panel, series: Sequence[Series], stages: Mapping[str, tuple[float, float]], legend: int) -> str:
    steps = max(end for _, end in stages.values())
    values = [value for own in series for value in own.values]
    marks = ticks(min([*values, 0.0] if panel.from_zero else values), max(values))
    low, high, top, bottom = marks[0], marks[-1], 34 + legend, _HIGH + legend - _BOTTOM

    def x(step: float) -> float:
        return round(_LEFT + step / (steps or 1) * (_WIDE - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(bottom - (value - low) / (high - low) * (bottom - top), 1)

    parts = [f'<text class="title" x="0" y="11">{escape(panel.title)}</text>', *_legend(series)]
    for mark in marks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDE - _RIGHT}" y1="{y(mark)}" y2="{y(mark)}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(mark) + 4:g}" text-anchor="end">{mark:g}</text>')
    whole = [int(mark) for mark in ticks(0, steps, 5) if mark <= steps and mark == int(mark)]
    parts += [f'<text x="{x(mark)}" y="{bottom + 16}" text-anchor="middle">{mark:,}</text>' for mark in whole]
    parts.append(f'<text x="{_WIDE - _RIGHT}" y="{bottom + 28}" text-anchor="end">step</text>')
    parts += _marks_of_stages(stages, x, top, bottom)
    for number, own in reversed(list(enumerate(series))):
        parts += _curve(own, number, x, y)
    return "".join(parts)


def _marks_of_stages(stages: Mapping[str, tuple[float, float]], x: Any, top: int, bottom: int) -> Iterator[str]:
    for number, (name, (begin, end)) in enumerate(stages.items()):
        if number:
            yield f'<line class="stage" x1="{x(begin)}" x2="{x(begin)}" y1="{top - 12}" y2="{bottom}"/>'
        if name and x(end) - x(begin) >= _CHARACTER * len(name):
            yield f'<text x="{x(begin) + 4:g}" y="{top - 4}">{escape(name.replace("_", " "))}</text>'


def _curve(series: Series, number: int, x: Any, y: Any) -> Iterator[str]:
    kind = f"c{number % len(_LIGHT)}" if number < _SHOWN else "other"
    dashed = ' stroke-dasharray="5 3"' if len(_LIGHT) <= number < _SHOWN else ""
    for points in series.points.values():
        thin = points if series.measured else _averaged(points)
        if len(thin) > 1:
            drawn = " ".join(f"{x(step)},{y(value)}" for step, value in thin)
            yield f'<polyline class="line {kind}"{dashed} points="{drawn}"><title>{escape(series.label)}</title></polyline>'
        for step, value in thin if series.measured or len(thin) == 1 else ():
            told = f"{series.label}, step {step:,.0f}: {value:g}"
            yield f'<circle class="{kind}" cx="{x(step)}" cy="{y(value)}" r="2.4"><title>{escape(told)}</title></circle>'


def _legend(series: Sequence[Series]) -> Iterator[str]:
    for number, (own, (line, left)) in enumerate(zip(series, _places(series), strict=False)):
        top = 26 + line * _LINE
        dashed = ' stroke-dasharray="5 3"' if number >= len(_LIGHT) else ""
        kind = f"c{number % len(_LIGHT)}"
        yield f'<line class="line {kind}"{dashed} x1="{left}" x2="{left + 14}" y1="{top - 4}" y2="{top - 4}"/>'
        yield f'<text x="{left + 19}" y="{top}">{escape(own.label)}</text>'
    if len(series) > _SHOWN:
        line, _ = _places(series)[-1]
        yield f'<text x="0" y="{26 + (line + 1) * _LINE}">and {len(series) - _SHOWN} more, in grey</text>'


def _places(series: Sequence[Series]) -> list[tuple[int, int]]:
    """Line and left edge of each label that is shown."""
    found: list[tuple[int, int]] = []
    line = left = 0
    for own in series[:_SHOWN]:
        wide = int(19 + _CHARACTER * len(own.label) + 14)
        if left and left + wide > _WIDE:
            line, left = line + 1, 0
        found.append((line, left))
        left += wide
    return found


def _legend_lines(series: Sequence[Series]) -> int:
    return _places(series)[-1][0] + 1 + (len(series) > _SHOWN)


def _averaged(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Neighbours together, where there are more than can be told apart."""
    if len(points) <= _POINTS:
        return points
    parts = np.array_split(np.asarray(points), _POINTS)
    return [(float(step), float(value)) for step, value in (part.mean(0) for part in parts)]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` + 1 round numbers, at equal distances, that have both within them; two at least."""
    span = high - low or abs(high) or 1.0
    rough = span / count
    power = 10.0 ** floor(log10(rough))
    distance = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * 0.999)
    first, last = floor(low / distance + 1e-9), ceil(high / distance - 1e-9)
    return [round(number * distance, 12) for number in range(first, max(last, first + 1) + 1)]


def _style() -> str:
    light, dark = (_of_theme(theme) for theme in _THEMES)
    return f"{light}@media (prefers-color-scheme: dark) {{\n{dark}}}"


def _of_theme(theme: Mapping[str, Any]) -> str:
    colours = "".join(f".c{i} {{ stroke: {own}; fill: {own}; }}\n" for i, own in enumerate(theme["colours"]))
    return f"{colours}{_STYLE.format(**theme)}"
