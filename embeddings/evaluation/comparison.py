"""Several models on several tasks side by side: scores, means, the best, and differences to the first model that are real.

    comparison = compare(results, seed=0)
    print(score_table.markdown(comparison))

The means are those of MTEB's leaderboard: over tasks, and over task types of each type's mean over its tasks. A mean over
tasks of which one has no score is none.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.evaluation.bootstrap import RESAMPLES, interval, paired, replicates
from embeddings.evaluation.result import Result

OVER_TASKS, OVER_TYPES = "mean over tasks", "mean over task types"


@dataclass(frozen=True)
class Difference:
    """To the first model's score; `low` and `high` bound its 95 % interval, None where no example tells it."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def beyond_noise(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Row:
    """A task, or a mean over some.

    Attributes:
        kind: "task", "group", "type" or "mean".
        type, metric: "" in a mean where its tasks' differ.
        scores: by model, where there is one.
        differences: by model, of every model but the first.
        remark: of a task: why a difference has no interval; "" where all have one.
    """

    name: str
    kind: str
    group: str = ""
    type: str = ""
    metric: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    differences: Mapping[str, Difference] = field(default_factory=dict)
    remark: str = ""

    @property
    def best(self) -> set[str]:
        """The models whose score, as it is shown, no other's exceeds; none where there is nothing to choose."""
        if len(self.scores) < 2:
            return set()
        top = max(self.scores.values())
        return {model for model, score in self.scores.items() if shown(score) == shown(top)}


@dataclass(frozen=True)
class Comparison:
    models: tuple[str, ...]
    rows: tuple[Row, ...]

    def means(self) -> dict[str, dict[str, float | None]]:
        """Means by model and group; "all" is the mean over tasks, "types" that over task types."""
        names = {OVER_TASKS: "all", OVER_TYPES: "types"}
        rows = [row for row in self.rows if row.kind in ("group", "mean")]
        return {m: {names.get(row.name, row.name): row.scores.get(m) for row in rows} for m in self.models}

    def scores(self) -> dict[str, dict[str, float | None]]:
        """Scores by model and task."""
        rows = [row for row in self.rows if row.kind == "task"]
        return {model: {row.name: row.scores.get(model) for row in rows} for model in self.models}


@dataclass(frozen=True)
class _Cell:
    """A score and its replicates, None where there are none."""

    score: float
    replicates: NDArray[np.float64] | None = None
    examples: int = 0


def compare(results: Sequence[Result], *, seed: int = 0, resamples: int = RESAMPLES) -> Comparison:
    """Gathers results, in their order, into one comparison.

    Args:
        results: one of each model and task; some may be missing.
        seed: of the bootstrap; the same draws for all models.
    """
    models = tuple(dict.fromkeys(result.model for result in results))
    by_group = {g: [r for r in results if r.group == g] for g in dict.fromkeys(result.group for result in results)}
    rows: list[Row] = []
    cells: dict[str, dict[str, _Cell]] = {}  # by task and model
    tasks: dict[str, Result] = {}
    for group in by_group.values():
        for task in dict.fromkeys(result.task for result in group):
            of_task = {result.model: result for result in group if result.task == task}
            tasks[task] = next(iter(of_task.values()))
            cells[task] = _cells(of_task, seed, resamples)
            about = {key: getattr(tasks[task], key) for key in ("group", "type", "metric")}
            row = _row(task, "task", models, cells[task], **about)
            rows.append(replace(row, remark=_remark(row, of_task)))
    groups = {group: [t for t in tasks if tasks[t].group == group] for group in by_group}
    types = {kind: [t for t in tasks if tasks[t].type == kind] for kind in sorted({t.type for t in tasks.values()})}

    def mean_row(name: str, kind: str, of: Sequence[Mapping[str, _Cell]], **about: str) -> Row:
        return _row(
            name, kind, models, {m: _mean([cells_[m] for cells_ in of]) for m in models if _in_all(m, of)}, **about
        )

    if len(groups) > 1:
        rows += [mean_row(g, "group", [cells[t] for t in of], group=g) for g, of in groups.items()]
    if len(types) > 1:
        several = {kind: of for kind, of in types.items() if len(of) > 1}
        rows += [mean_row(kind, "type", [cells[t] for t in of], type=kind) for kind, of in several.items()]
    if len(tasks) > 1:
        rows.append(mean_row(OVER_TASKS, "mean", list(cells.values())))
    if len(types) > 1:
        of_types = [
            {m: _mean([cells[t][m] for t in of]) for m in models if _in_all(m, [cells[t] for t in of])}
            for of in types.values()
        ]
        rows.append(mean_row(OVER_TYPES, "mean", of_types))
    return Comparison(models, tuple(rows))


def csv_table(comparison: Comparison) -> str:
    """One line a row and model, with every digit: for spreadsheets and data frames."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["kind", "name", "group", "type", "metric", "model", "score", "difference", "low", "high", "best"])
    for row in comparison.rows:
        for model in comparison.models:
            gap = row.differences.get(model)
            numbers = [row.scores.get(model), *((gap.value, gap.low, gap.high) if gap else (None, None, None))]
            about = [row.kind, row.name, row.group, row.type, row.metric, model]
            writer.writerow([*about, *("" if x is None else repr(x) for x in numbers), int(model in row.best)])
    return text.getvalue()


def plain(comparison: Comparison) -> dict[str, Any]:
    """The same as Python values that JSON can hold."""
    rows = [
        {
            **{key: getattr(row, key) for key in ("name", "kind", "group", "type", "metric", "remark")},
            "scores": {model: row.scores.get(model) for model in comparison.models},
            "differences": {model: vars(gap) for model, gap in row.differences.items()},
            "best": [model for model in comparison.models if model in row.best],
        }
        for row in comparison.rows
    ]
    return {"models": list(comparison.models), "rows": rows}


def shown(score: float) -> str:
    """As every table of ours has it."""
    return f"{100 * score:.2f}"


def _cells(of_task: Mapping[str, Result], seed: int, resamples: int) -> dict[str, _Cell]:
    """By model; with replicates where its examples are the first model's, and all else would be noise."""
    first = next(iter(of_task.values()))
    cells = {}
    for model, result in of_task.items():
        draws = None
        if len(of_task) > 1 and paired(first.examples, result.examples):
            draws = replicates(result.examples, seed=seed, resamples=resamples)
        cells[model] = _Cell(result.score, draws, sum(len(part.ids) for part in result.examples))
    return cells


def _remark(row: Row, of_task: Mapping[str, Result]) -> str:
    if all(gap.low is not None for gap in row.differences.values()):
        return ""
    if not all(result.examples for result in of_task.values()):
        return f"{row.metric} is not computed anew on drawn examples"
    return "the models were scored on different examples"


def _in_all(model: str, cells: Sequence[Mapping[str, _Cell]]) -> bool:
    return all(model in of for of in cells)


def _mean(cells: Sequence[_Cell]) -> _Cell:
    draws = [cell.replicates for cell in cells if cell.replicates is not None]
    mean = np.mean(draws, axis=0) if len(draws) == len(cells) else None
    return _Cell(sum(cell.score for cell in cells) / len(cells), mean, min(cell.examples for cell in cells))


def _row(name: str, kind: str, models: Sequence[str], cells: Mapping[str, _Cell], **about: str) -> Row:
    differences = {}
    if models[0] in cells:
        first = cells[models[0]]
        differences = {m: _difference(first, cells[m]) for m in models[1:] if m in cells}
    return Row(name, kind, scores={m: cell.score for m, cell in cells.items()}, differences=differences, **about)


def _difference(first: _Cell, other: _Cell) -> Difference:
    gap = other.score - first.score
    if first.replicates is None or other.replicates is None:
        return Difference(gap)
    return Difference(gap, *interval(other.replicates - first.replicates, first.examples, gap))
