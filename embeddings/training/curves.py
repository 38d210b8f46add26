"""Curves: a run's metrics as one picture, with a panel each for losses, tokens told right, ranks, spread and scores.

Of each as much as was measured, over the steps; the stages of a pre-training are marked, and no line goes from one into the
next. The same metrics give the same file.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embeddings.training import metrics
from embeddings.training.metrics import Sink
from merging import figures
from merging.output import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = "curves.svg"
_EVERY = 60.0  # seconds between two pictures of a run that is under way


@dataclass(frozen=True)
class Panel:
    """What is drawn together.

    Attributes:
        names: of metrics, with what they are called; one that ends with "/" stands for all that begin so, each called by
            what follows.
        from_zero: whether its axis begins at 0.
    """

    title: str
    names: Mapping[str, str]
    from_zero: bool = False


_HELD = "held_out/"
PANELS = (
    Panel(
        "loss",
        {
            "loss": "trained on",
            f"{_HELD}loss": "held out",
            f"{_HELD}blind_loss": "held out, from EOS alone",
            "losses/": "",
        },
    ),
    Panel(
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
    Panel("effective rank of the embeddings", {f"{_HELD}rank": "as they are", f"{_HELD}rank_centred": "centred"}, True),
    Panel("spread of the embeddings", {f"{_HELD}alignment": "alignment", f"{_HELD}uniformity": "uniformity"}),
    Panel("score", {"scores/": ""}),
)
#: What a line with it was measured for: a few steps, each of which gets a mark.
_MEASURED = ("held_out", "scores")
_SHOWN = 8  # series of a panel with a colour and a name of their own

#: Steps and values by stage.
Points = dict[str, list[tuple[int, float]]]


def write_curves(file: Path) -> None:
    """Draws a metrics file as `curves.svg` beside it, whole or not at all; nothing where it has nothing to show."""
    with figures.quietly():
        drawn = picture(metrics.read(file))
        if drawn is not None:
            write_whole(file.with_name(CURVES), figures.svg(drawn))


def drawing(file: Path) -> Sink:
    """Who draws the curves anew when something was measured, once a minute at most.

    Args:
        file: the metrics, in which the line is that it is told of.
    """
    last = [time.monotonic()]

    def listen(line: Mapping[str, Any]) -> None:
        if any(key in line for key in _MEASURED) and time.monotonic() - last[0] > _EVERY:
            write_curves(file)
            last[0] = time.monotonic()

    return listen


def picture(lines: Iterable[Mapping[str, Any]]) -> Figure | None:
    """A run's lines as curves; None where they have no number that is drawn.

    Args:
        lines: as `metrics.read` gives them.
    """
    from matplotlib.figure import Figure

    lines = list(lines)
    panels = [(panel, found) for panel in PANELS if (found := _series(panel, lines))]
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (panel, series) in zip(axes, panels, strict=False):
        _draw(axis, panel, series)
        _mark_stages(axis, lines)
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure


def _series(panel: Panel, lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, Points]]:
    """What a panel shows of the lines, label and points by the metric's name, in its order; finite numbers alone."""
    found: dict[str, tuple[str, Points]] = {}
    for line in lines:
        for name, value in metrics.numbers(line).items():
            label = _label(panel, name)
            if label and isfinite(value):
                _, points = found.setdefault(name, (label, {}))
                points.setdefault(line.get("stage", ""), []).append((line["step"], value))
    order = list(panel.names)
    return dict(sorted(found.items(), key=lambda own: order.index(own[0]) if own[0] in order else len(order)))


def _label(panel: Panel, name: str) -> str:
    """What the panel calls it; "" for what is not its."""
    if name in panel.names:
        return panel.names[name]
    kind = next((kind for kind in panel.names if kind.endswith("/") and name.startswith(kind)), "")
    return figures.literal(name.removeprefix(kind) if kind else "")


def _draw(axis: Axes, panel: Panel, series: Mapping[str, tuple[str, Points]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, (name, (label, stages)) in enumerate(series.items()):
        colour, called = (f"C{number}", label) if number < _SHOWN else ("lightgrey", "")
        if number == _SHOWN:
            called = f"{len(series) - _SHOWN} more"
        for points in stages.values():
            mark = "." if name.startswith(_MEASURED) or len(points) == 1 else ""
            axis.plot(*zip(*points, strict=True), color=colour, marker=mark, label=called or None)
            called = ""  # once in the legend
    axis.margins(y=0.12)
    axis.set_xlim(left=0)
    if panel.from_zero:
        axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(panel.title, fontsize="medium")
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _mark_stages(axis: Axes, lines: Iterable[Mapping[str, Any]]) -> None:
    """Steps are counted through, so a stage begins where the one before it ended."""
    ends: dict[str, int] = {}
    for line in lines:
        ends[line.get("stage", "")] = line["step"]
    for name, begin in zip(ends, [0, *ends.values()], strict=False):
        if begin:
            axis.axvline(begin, color="grey", linestyle=":")
        if name:
            told, top = f" {name.replace('_', ' ')}", axis.get_xaxis_transform()
            axis.text(begin, 0.99, told, transform=top, va="top", color="grey", size="small", in_layout=False)
