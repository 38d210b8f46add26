"""The experiment's records as a table. A record is one arm, or one round of a strategy, with one seed. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Record:
    """One arm with one seed, after one round.

    Attributes:
        round: 0 of static arms, else 1 to 3.
        rows: pair-passes that it cost, up to this round.
        learning_rate: that was chosen; None of the base.
        edge: the chosen learning rate is the lowest ("low") or highest ("high") of several.
        test: scores in [0, 1] by task.
        spread: of a merge, mean cosine between the members' task vectors, and the length of its own over their mean.
    """

    arm: str
    title: str
    seed: int
    round: int
    rows: float
    learning_rate: float | None
    edge: str
    test: Mapping[str, float]
    spread: Mapping[str, float] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def chosen_rate(validation: Mapping[float, float]) -> tuple[float, str]:
    """The learning rate with the best validation score, the lower of equals, and whether it is at the grid's edge."""
    best = max(sorted(validation), key=lambda rate: validation[rate])
    if len(validation) < 2:
        return best, ""
    return best, {min(validation): "low", max(validation): "high"}.get(best, "")


def mean(scores: Mapping[str, float], tasks: Iterable[str]) -> float | None:
    """Over those of the tasks that were scored; None if none was."""
    known = [scores[task] for task in tasks if task in scores]
    return statistics.fmean(known) if known else None


def static_table(records: Sequence[Record], groups: Mapping[str, Sequence[str]], corpus: int) -> str:
    """Markdown, a row an arm: mean ± standard deviation over seeds, and the gap to `full`, seed by seed."""
    records = [record for record in records if record.round == 0]
    head = ["arm", "passes", "pair-passes", "lr", *groups, *(f"{group} − full" for group in groups), "cos τ"]
    full = {record.seed: record for record in records if record.arm == "full"}
    lines = [head, ["---", *("---:" for _ in head[1:])]]
    for own in _by_arm(records):
        scores = [[mean(record.test, tasks) for record in own] for tasks in groups.values()]
        gaps = [
            [_minus(mean(r.test, tasks), mean(full[r.seed].test, tasks)) for r in own if r.seed in full]
            for tasks in groups.values()
        ]
        rows = statistics.fmean(record.rows for record in own)
        cosines = [record.spread["cosine"] for record in own if "cosine" in record.spread]
        lines.append(
            [
                *(own[0].title, f"{rows / corpus:.2f}", f"{rows:,.0f}", _rates(own), *map(points, scores)),
                *(("" if own[0].arm == "full" else points(gap, signed=True)) for gap in gaps),
                f"{statistics.fmean(cosines):.2f}" if cosines else "",
            ]
        )
    return markdown(lines)


def rounds_table(
    records: Sequence[Record], rounds: Sequence[Sequence[str]], groups: Mapping[str, Sequence[str]], corpus: int
) -> str:
    """Markdown, a row a strategy: after each round the mean over old and over new tasks, after the last all groups."""
    records = [record for record in records if record.round]
    last = max((record.round for record in records), default=0)
    old = ["" if number == 1 else f"old {number}" for number in range(1, last + 1)]
    heads = [name for number in range(1, last + 1) for name in (old[number - 1], f"new {number}") if name]
    head = ["strategy", "passes", "pair-passes", "lr", *heads, *groups]
    lines = [head, ["---", *("---:" for _ in head[1:])]]
    for own in _by_arm(records):
        by_round = {number: [r for r in own if r.round == number] for number in range(1, last + 1)}
        cells = []
        for number, of_round in by_round.items():
            before = [task for each in rounds[: number - 1] for task in each]
            parts = [before, rounds[number - 1]] if number > 1 else [rounds[0]]
            cells += [points([mean(record.test, tasks) for record in of_round]) for tasks in parts]
        end = by_round[max(record.round for record in own)]
        whole = [points([mean(record.test, tasks) for record in end]) for tasks in groups.values()]
        rows = statistics.fmean(record.rows for record in end)
        lines.append([own[0].title, f"{rows / corpus:.2f}", f"{rows:,.0f}", _rates(end), *cells, *whole])
    return markdown(lines)


def task_table(records: Sequence[Record]) -> str:
    """Markdown, a row an arm (of strategies the last round), a column a task; means over seeds."""
    tasks = list(dict.fromkeys(task for record in records for task in record.test))
    lines = [["", *tasks], ["---", *("---:" for _ in tasks)]]
    for own in _by_arm(records):
        end = max(record.round for record in own)
        ends = [record for record in own if record.round == end]
        lines.append([own[0].title, *(points([r.test.get(task) for r in ends], spread=False) for task in tasks)])
    return markdown(lines)


def _by_arm(records: Sequence[Record]) -> list[list[Record]]:
    names = dict.fromkeys(record.arm for record in records)
    return [[record for record in records if record.arm == name] for name in names]


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def points(values: Sequence[float | None], *, signed: bool = False, spread: bool = True) -> str:
    """In points of 100, with the standard deviation where there are several."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return ""
    show: Callable[[float], str] = "{:+.2f}".format if signed else "{:.2f}".format
    around = f" ± {statistics.stdev(known):.2f}" if spread and len(known) > 1 else ""
    return f"{show(statistics.fmean(known))}{around}"


def _rates(records: Sequence[Record]) -> str:
    """The learning rate; an arrow where it is at the edge of the grid, so that a better one may lie beyond."""
    rates = {record.learning_rate: record.edge for record in records if record.learning_rate is not None}
    return ", ".join(f"{rate:g}{ {'low': ' ↓', 'high': ' ↑'}.get(edge, '') }" for rate, edge in rates.items())


def markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
