"""Picture: a search at a glance: what its trials scored, by task too, and at which coefficients.

Of a front the scores are drawn against each other, else over the trials, with equal weights as a line to beat. Of up to nine
coefficients each has a panel of its own, of more a row in which the colour is the score; of more than a hundred the best
trial's alone are drawn. The same trials give the same file.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import TYPE_CHECKING, Any, TypeAlias

from merging import figures
from search import choose
from search.choose import Trial
from search.space import MANY, Dimension, Space

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

PICTURE = "search.svg"
_OWN_PANEL = 9  # coefficients at most that have one each
_TASKS = 8  # at most that have a line each
_ROWS = 16  # coefficients one below the other, before there is a second column
_ACROSS = 3  # panels, columns
_BLUE, _DARK, _ORANGE, _RED, _GREY = "#3b75af", "#22333b", "#e08214", "#c0392b", "#8a8f94"
_MARKS: Mapping[str, Mapping[str, Any]] = {
    "proposed": {"marker": "o", "s": 24, "color": _BLUE},
    "given to begin with": {"marker": "D", "s": 22, "facecolors": "white", "edgecolors": _BLUE},
    "below a floor": {"marker": "o", "s": 24, "facecolors": "white", "edgecolors": _GREY},
    "failed": {"marker": "x", "s": 30, "color": _RED},
}

Draw: TypeAlias = "Callable[[Axes], None]"


@dataclass(frozen=True)
class _Seen:
    """The trials of a search, as all panels see them.

    Attributes:
        models: what they are called.
        starts: so many of the first trials were given.
        front: the tasks, where there are several objectives.
        chosen: whose model is taken.
        scores: by number of a trial that did not fail; of a front the means.
        low: what is below stands there, so that a ruined merge does not press all others into a line.
    """

    space: Space
    trials: Sequence[Trial]
    models: Sequence[str]
    starts: int
    front: Sequence[str]
    chosen: Trial | None
    scores: Mapping[int, float]
    low: float

    @property
    def scored(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.values]

    @property
    def failed(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.values]

    @property
    def what(self) -> str:
        return "mean of the tasks" if self.front else "score"

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for trial in self.trials for task in trial.tasks))

    @property
    def equal(self) -> Trial | None:
        return choose.of_equal_weights(self.space, self.trials)

    def height(self, trial: Trial) -> float:
        return max(self.low, self.scores[trial.number])

    def kinds(self) -> Iterator[tuple[str, list[Trial]]]:
        """Trials that are marked alike, by what they are called."""
        found: dict[str, list[Trial]] = {kind: [] for kind in _MARKS}
        for trial in self.trials:
            kind = "given to begin with" if trial.number < self.starts else "proposed"
            kind = kind if trial.feasible else "below a floor"
            found[kind if trial.values else "failed"].append(trial)
        return ((kind, trials) for kind, trials in found.items() if trials)

    def name(self, dimension: Dimension) -> str:
        """What a coefficient is called: `weight of a, layer.3`."""
        model = "" if dimension.model is None else f" of {self.models[dimension.model]}"
        return figures.literal(f"{dimension.parameter}{model}{f', {dimension.group}' if dimension.group else ''}")


def picture(
    space: Space,
    trials: Sequence[Trial],
    models: Sequence[str],
    *,
    starts: int = 0,
    front: Sequence[str] = (),
    chosen: Trial | None = None,
) -> str:
    """The SVG of a search.

    Args:
        trials: that ended, by number; one at least.
        models: what they are called.
        starts: so many of the first trials were given, the others are proposals.
        front: the tasks, where there are several objectives.
        chosen: whose model is taken; None: the best observed.
    """
    scores = {trial.number: sum(trial.values) / len(trial.values) for trial in trials if trial.values}
    low = _lowest_in_view(list(scores.values()))
    seen = _Seen(space, trials, models, starts, front, chosen or choose.best(space, trials), scores, low)
    with figures.quietly():
        return figures.svg(_figure(seen))


def _lowest_in_view(scores: Sequence[float]) -> float:
    """Three times as far below the median as the best is above it, where the lowest score is more than twice as far as that."""
    if not scores:
        return 0.0
    middle, lowest = statistics.median(scores), min(scores)
    above = max(scores) - middle
    return middle - 3 * above if 0 < 6 * above < middle - lowest else lowest


def _figure(seen: _Seen) -> Figure:
    from matplotlib.figure import Figure

    pairs = list(combinations(range(len(seen.front)), 2))
    panels: list[Draw] = [lambda axis, x=x, y=y: _front(axis, seen, x, y) for x, y in pairs]  # type: ignore[misc]
    panels.append(lambda axis: _history(axis, seen))
    if not pairs and seen.scored and 2 <= len(seen.tasks) <= _TASKS:
        panels.append(lambda axis: _by_task(axis, seen))
    below, inches = _coefficients(seen)
    down = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 3.6 * down + inches), layout="constrained")
    above, under = figure.subfigures(2, 1, squeeze=False, height_ratios=(3.6 * down, inches)).flat
    _fill(above.subplots(down, min(2, len(panels)), squeeze=False).flat, panels)
    below(under)
    return figure


def _history(axis: Axes, seen: _Seen) -> None:
    """Scores over the trials, the best so far, and that of equal weights."""
    _mark(axis, seen, lambda trial: trial.number)
    numbers, best = [], list[float]()
    for trial in seen.scored:
        if trial.feasible:
            numbers.append(trial.number)
            best.append(max([*best[-1:], seen.height(trial)]))
    if numbers:
        numbers, best = [*numbers, seen.trials[-1].number], [*best, best[-1]]
        axis.step(numbers, best, where="post", color=_DARK, linewidth=1.2, zorder=1, label="the best so far")
    if seen.equal is not None:
        told = f"equal weights: {seen.scores[seen.equal.number]:.4f}"
        axis.axhline(seen.height(seen.equal), color=_ORANGE, linestyle="--", linewidth=1.2, zorder=1, label=told)
    _over_trials(axis, seen.what)


def _by_task(axis: Axes, seen: _Seen) -> None:
    """What the best trial so far gains by task over equal weights, or over the first trial where there are none."""
    against = seen.equal or seen.scored[0]
    best: list[Trial] = []
    for trial in seen.scored:
        best.append(max([*best[-1:], trial], key=lambda own: (own.feasible, seen.scores[own.number])))
    numbers = [trial.number for trial in seen.scored]
    for task in seen.tasks:
        gains = [trial.tasks.get(task, math.nan) - against.tasks.get(task, math.nan) for trial in best]
        label = figures.literal(f"{task}: {best[-1].tasks.get(task, math.nan):.4f}")
        axis.step(numbers, gains, where="post", marker="." if len(numbers) == 1 else "", label=label)
    axis.axhline(0, color=_ORANGE, linestyle="--", linewidth=1.2, zorder=1)
    _over_trials(axis, f"the best so far, gain over {'equal weights' if seen.equal else 'the first trial'}")


def _front(axis: Axes, seen: _Seen, x: int, y: int) -> None:
    """Two of the objectives against each other; of two the front is a line, of three its points have a ring."""
    lows = [_lowest_in_view([trial.values[axis] for trial in seen.scored]) for axis in (x, y)]

    def place(trial: Trial) -> tuple[float, float]:
        return max(lows[0], trial.values[x]), max(lows[1], trial.values[y])

    for kind, trials in seen.kinds():
        places = [place(trial) for trial in trials if trial.values]
        label = kind if places else f"{len(trials)} failed"
        _scatter(axis, places or [(math.nan, math.nan)], label=label, zorder=2, **_MARKS[kind])
    front = sorted(map(place, choose.front(seen.trials)))
    if front and len(seen.front) == 2:
        axis.step(*zip(*front, strict=True), where="pre", color=_DARK, linewidth=1.2, zorder=1, label="front")
    elif front:
        _scatter(axis, front, s=90, facecolors="none", edgecolors=_DARK, label="front")
    if seen.chosen:
        _star(axis, [place(seen.chosen)])
    axis.set_xlabel(figures.literal(seen.front[x]))
    axis.set_ylabel(figures.literal(seen.front[y]))
    _legend(axis)


def _coefficients(seen: _Seen) -> tuple[Callable[[SubFigure], None], float]:
    """What draws the coefficients, and the inches that it needs."""
    count = len(seen.space.dimensions)
    if count > MANY:
        return lambda part: _chosen_alone(part.subplots(), seen), 4.0
    if count > _OWN_PANEL:
        across = min(_ACROSS, -(-count // _ROWS))
        down = -(-count // across)
        return lambda part: _rows(part, seen, across, down), 0.8 + 0.18 * down
    across = min(_ACROSS, count)
    return lambda part: _panels(part, seen, across), 2.7 * -(-count // across)


def _panels(part: SubFigure, seen: _Seen, across: int) -> None:
    """Scores over each coefficient."""
    dimensions = seen.space.dimensions
    axes = part.subplots(-(-len(dimensions) // across), across, squeeze=False, sharey=True).flat
    _fill(axes, [lambda axis, own=own: _panel(axis, seen, own) for own in dimensions])  # type: ignore[misc]
    for axis in part.axes[::across]:
        axis.set_ylabel(seen.what)


def _panel(axis: Axes, seen: _Seen, dimension: Dimension) -> None:
    choices = [figures.literal(str(choice)) for choice in dimension.choices]
    _mark(axis, seen, lambda trial: _value(dimension, trial))
    if choices:
        axis.set_xticks(range(len(choices)), choices)
        axis.set_xlim(-0.5, len(choices) - 0.5)
    else:
        _between_bounds(axis, dimension)
    axis.set_xlabel(seen.name(dimension))
    axis.grid(alpha=0.3)


def _between_bounds(axis: Axes, dimension: Dimension) -> None:
    """All that a number may be, so that one sees which trials lie at the edge."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = float(dimension.low or 0.0), float(dimension.high or 0.0)
    if low == high:
        return
    if dimension.log:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlim(low * (low / high) ** 0.04, high * (high / low) ** 0.04)
    else:
        axis.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))


def _rows(part: SubFigure, seen: _Seen, across: int, down: int) -> None:
    """A row for each coefficient and a mark within its bounds for each trial, coloured by its score, the best on top."""
    from matplotlib.colors import Normalize

    scored = sorted(seen.scored, key=lambda trial: seen.scores[trial.number])
    heights = [seen.height(trial) for trial in scored] or [0.0]
    scale = Normalize(heights[0], heights[-1])
    axes = list(part.subplots(1, across, squeeze=False).flat)
    dimensions = sorted(seen.space.dimensions, key=_series)
    for place, axis in enumerate(axes):
        column = dimensions[place * down : (place + 1) * down]
        lost = [(_share(own, trial), row) for trial in seen.failed for row, own in enumerate(column)]
        if lost:
            _scatter(axis, lost, marker="x", s=14, linewidths=0.8, color=_RED)
        found = [(_share(own, trial), row) for trial in scored for row, own in enumerate(column)]
        if found:
            colours = [seen.height(trial) for trial in scored for _ in column]
            marks = _scatter(axis, found, c=colours, norm=scale, s=14)
        if seen.chosen:
            _star(axis, [(_share(own, seen.chosen), row) for row, own in enumerate(column)])
        called = [seen.name(own) for own in column]
        if len(set(map(_series, column))) == 1 and column[0].group:  # all of one model: that is said above them
            axis.set_title(called[0].partition(", ")[0], fontsize="small")
            called = [name.partition(", ")[2] for name in called]
        axis.set_yticks(range(len(column)), called, fontsize="x-small")
        axis.set_ylim(down - 0.4, -0.6)
        axis.set_xticks([0, 1], ["lowest", "highest"], fontsize="small")
        axis.grid(alpha=0.3)
    if scored:
        part.colorbar(marks, ax=axes, label=seen.what, fraction=0.02, pad=0.01)


def _chosen_alone(axis: Axes, seen: _Seen) -> None:
    """The coefficients of the trial that is taken, of a model one after the other, and in grey those of the first trial."""
    taken, first = seen.chosen or seen.trials[-1], seen.trials[0]
    for place, (_, run) in enumerate(groupby(sorted(seen.space.dimensions, key=_series), key=_series)):
        own = list(run)
        label = seen.name(own[0]).partition(", ")[0]
        axis.plot([_value(each, first) for each in own], color=_GREY, linewidth=0.8)
        axis.plot([_value(each, taken) for each in own], color=f"C{place}", linewidth=0.8, label=label)
    axis.set_xlabel(f"coefficient, in the order of the tensors; trial {taken.number}, in grey trial {first.number}")
    _legend(axis)


def _mark(axis: Axes, seen: _Seen, place: Callable[[Trial], float]) -> None:
    """Each trial at its place and its score; those that failed at the lower edge."""
    for kind, trials in seen.kinds():
        places = [place(trial) for trial in trials]
        if kind == "failed":
            edge = axis.get_xaxis_transform()
            axis.scatter(places, [0.03] * len(trials), label=kind, zorder=2, transform=edge, **_MARKS[kind])
        else:
            axis.scatter(places, [seen.height(trial) for trial in trials], label=kind, zorder=2, **_MARKS[kind])
    lower = [trial for trial in seen.scored if seen.scores[trial.number] < seen.low]
    if lower:
        heights = [seen.low] * len(lower)
        axis.scatter([place(own) for own in lower], heights, marker="v", s=60, color=_GREY, label="lower yet", zorder=1)
    if seen.chosen:
        _star(axis, [(place(seen.chosen), seen.height(seen.chosen))])


def _star(axis: Axes, places: Sequence[tuple[float, float]]) -> None:
    look = {"marker": "*", "s": 130, "color": _ORANGE, "edgecolors": _DARK, "linewidths": 0.7}
    _scatter(axis, places, label="taken", zorder=3, **look)


def _scatter(axis: Axes, places: Sequence[tuple[float, float]], **look: Any) -> Any:
    return axis.scatter([x for x, _ in places], [y for _, y in places], **look)


def _over_trials(axis: Axes, what: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("trial")
    axis.set_ylabel(what)
    axis.grid(alpha=0.3)
    labels = axis.get_legend_handles_labels()[1]
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.08 * -(-len(labels) // 2) * (high - low))  # room for a legend that hides no mark
    axis.legend(fontsize="x-small", loc="upper left", ncols=2, frameon=False)


def _legend(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _fill(axes: Iterator[Axes], panels: Sequence[Draw]) -> None:
    """Draws a panel on each of the axes, and takes away those that are left."""
    for place, axis in enumerate(axes):
        if place < len(panels):
            panels[place](axis)
        else:
            axis.remove()


def _series(dimension: Dimension) -> tuple[str, int]:
    return dimension.parameter, -1 if dimension.model is None else dimension.model


def _value(dimension: Dimension, trial: Trial) -> float:
    """Where a trial is along a coefficient: its value, or the place of its choice."""
    value = trial.point[dimension.name]
    return float(dimension.choices.index(value) if dimension.choices else value)


def _share(dimension: Dimension, trial: Trial) -> float:
    """The same within the bounds, in [0, 1]."""
    if dimension.choices:
        return _value(dimension, trial) / max(len(dimension.choices) - 1, 1)
    return dimension.place(trial.point[dimension.name])[0]
