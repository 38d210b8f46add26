"""The tables of `cuvee inspect`, for 100 columns: models by number, deep stacks of layers a few at a time."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

_WIDTH = 100  # of output that goes to a file or a pipe
_ROWS_PER_STACK = 12
_ENTRIES = 20  # of differences shown
_KINDS = 40  # of modules, up to which there is a table of them
_LEGEND = (
    "sign conflict: share of coordinates whose sign is not that of the sum over all models\n"
    "opposite signs: share where one of the two is positive, the other negative"
)


def show_tables(result: Mapping[str, Any], groups: bool = True, console: Console | None = None) -> None:
    """Prints what `inspection.inspect` found: one row a model, the pairs, one row a layer group, what is odd."""
    console = console or Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    names = list(result["models"])
    base = result["base"]
    console.print(_headline(result), style="bold")
    console.print()
    console.print(_overview(result["models"], base, result["paths"]))
    if len(names) > 1:
        what = "task vectors" if base else "weights"
        pairs = [_matrix(f"cosine of {what}", result["models"], "cosine", lambda x: _cosine(x, 4))]
        pairs.append(_matrix("opposite signs", result["models"], "opposite_signs", _percent))
        if not base:
            pairs.append(_matrix("distance / norm", result["models"], "distance", _number, relative=True))
        console.print()
        console.print(Columns(pairs, padding=(0, 4)))
        console.print(_LEGEND, style="dim")
    if groups and result["groups"]:
        console.print()
        console.print(_groups(result["groups"], names, bool(base)))
    for name, owned in result["ownership"].items():
        for table in ownership_tables(name, owned, groups):
            console.print()
            console.print(table)
    if odd := _odd(result):
        console.print()
        for line in odd:
            console.print(Text(line))


def _headline(result: Mapping[str, Any]) -> str:
    count = len(result["models"])
    measured = f"against {escape(result['base']['name'])}" if result["base"] else "by themselves"
    return (
        f"{count} {'model' if count == 1 else 'models'} {measured}: {result['parameters'] / 1e6:,.1f} M parameters "
        f"in {result['tensors']:,} tensors, {result['bytes_read'] / 1e9:,.2f} GB in {result['seconds']:.1f} s"
    )


def _overview(models: Mapping[str, Any], base: Mapping[str, Any] | None, paths: Mapping[str, str]) -> Table:
    every = [*models.values(), *([base] if base else [])]
    damaged = any(entry["nan"] or entry["inf"] for entry in every)
    table = _table("task vectors" if base else "weights")
    table.add_column("")
    table.add_column("model", overflow="ellipsis", no_wrap=True, max_width=44)
    headers = ["norm", *(["/ base"] if base else []), "changed" if base else "not zero", "sign conflict"]
    for header in [*headers, *(["NaN", "Inf"] if damaged else [])]:
        table.add_column(header, justify="right")
    for number, (name, entry) in enumerate(models.items(), 1):
        cells = [_number(entry["norm"])]
        if base:
            cells.append(_optional(entry["relative_norm"], _number))
        cells += [_optional(entry["density"], _percent), _optional(entry["sign_conflict"], _percent)]
        table.add_row(str(number), escape(name), *cells, *([_count(entry["nan"]), _count(entry["inf"])] * damaged))
    if base:
        row = ["", f"{escape(base['name'])} (base)", _number(base["norm"]), "", "", ""]
        table.add_row(*row, *([_count(base["nan"]), _count(base["inf"])] * damaged), style="dim")
    return table


def _matrix(
    title: str, models: Mapping[str, Any], key: str, show: Callable[[float], str], relative: bool = False
) -> Table:
    table = _table(title)
    table.add_column("")
    for number in range(1, len(models) + 1):
        table.add_column(str(number), justify="right", min_width=6)
    for row, entry in enumerate(models.values(), 1):
        cells = []
        for other in models:
            value = entry[key].get(other)
            if relative and value is not None:
                value = value / entry["norm"] if entry["norm"] else None
            cells.append(_optional(value, show) if other in entry[key] else "·")
        table.add_row(str(row), *cells)
    return table


def _groups(groups: Mapping[str, Any], names: Sequence[str], has_base: bool) -> Table:
    key = "relative_norm" if has_base else "norm"
    collapsed = list(collapse(groups))
    several = any(len(members) > 1 for _, members in collapsed)
    note = "; rows of several layers are means" if several else ""
    table = _table(f"{'norm / base' if has_base else 'norm'} by layer group{note}")
    table.add_column("group", overflow="fold", max_width=34)
    for number in range(1, len(names) + 1):
        table.add_column(str(number), justify="right", no_wrap=True)
    means = [("density", "changed" if has_base else "not zero", _percent)]
    if len(names) > 1:
        means += [("cosine", "cosine", _cosine), ("sign_conflict", "conflict", _percent)]
    for _, header, _ in means:
        table.add_column(header, justify="right", no_wrap=True)
    for label, members in collapsed:
        cells = [_optional(_mean(groups[group][name][key] for group in members), _short) for name in names]
        for column, _, show in means:
            values = (_values(groups[group][name][column]) for group in members for name in names)
            cells.append(_optional(_mean(value for some in values for value in some), show))
        table.add_row(escape(label), *cells)
    return table


def ownership_tables(name: str, owned: Mapping[str, Any], groups: bool) -> Iterable[Table]:
    """Whose the coordinates of a merge are: all of them, by layer group, and by kind of module."""
    models = [_last_part(model) for model in owned["models"]]

    def table(title: str, rows: Iterable[tuple[str, Sequence[int]]]) -> Table:
        made = _table(title)
        made.add_column("", overflow="fold", max_width=34)
        for header in ("base", *map(escape, models)):
            made.add_column(header, justify="right", overflow="ellipsis", no_wrap=True)
        for label, counts in rows:
            made.add_row(escape(label), *(_percent(count / max(1, sum(counts))) for count in counts))
        return made

    by_group = [
        (label, [sum(counts) for counts in zip(*(owned["groups"][group] for group in members), strict=True)])
        for label, members in collapse(owned["groups"])
    ]
    yield table(f"whose the coordinates of {name} are", [("all", owned["total"]), *(by_group if groups else [])])
    if groups and len(owned["kinds"]) <= _KINDS:
        yield table("by kind of module", owned["kinds"].items())


def _last_part(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2] or model


def collapse(groups: Iterable[str]) -> Iterable[tuple[str, list[str]]]:
    """Rows of layer groups: (label, groups), the layers of a deep stack so many to a row that a dozen rows are left."""
    stacks: dict[str, list[str]] = {}
    for group in groups:
        match = re.fullmatch(r"(.+)\.\d+", group)
        stacks.setdefault(match[1] if match else f"\0{group}", []).append(group)
    for stack, members in stacks.items():
        size = -(-len(members) // _ROWS_PER_STACK)
        for at in range(0, len(members), size):
            row = members[at : at + size]
            first, last = (group.rpartition(".")[2] for group in (row[0], row[-1]))
            yield (row[0] if len(row) == 1 else f"{stack}.{first}-{last}"), row


def _odd(result: Mapping[str, Any]) -> list[str]:
    """What differs in names, shapes and dtypes, alike tensors together; then what is damaged."""
    together: dict[str, list[str]] = {}
    for difference in result["differences"]:
        together.setdefault(_difference(difference, list(result["paths"])), []).append(difference["tensor"])
    lines = [f"{what} — {_named(tensors)}" for what, tensors in together.items()]
    if len(lines) > _ENTRIES:
        lines[_ENTRIES:] = [f"and {len(lines) - _ENTRIES} more kinds of differences; --json has them all"]
    damaged: dict[str, list[str]] = {}
    for entry in result["damaged"]:
        damaged.setdefault(entry["model"], []).append(entry["tensor"])
    return lines + [f"NaN or infinite values in {model} — {_named(tensors)}" for model, tensors in damaged.items()]


def _difference(difference: Mapping[str, Any], names: Sequence[str]) -> str:
    kind = difference["kind"]
    if kind == "missing":
        missing = difference["models"]
        has = [name for name in names if name not in missing]
        return f"only in {_and(has)}" if len(has) < len(missing) else f"missing in {_and(missing)}"
    if kind == "values":
        return "whole numbers differ"
    by_value: dict[str, list[str]] = {}
    for name, value in difference["values"].items():
        by_value.setdefault(str(value), []).append(name)
    *rare, (common, others) = sorted(by_value.items(), key=lambda item: len(item[1]))
    where = "elsewhere" if len(others) > 1 else f"in {others[0]}"
    return f"{kind}: " + ", ".join(f"{value} in {_and(some)}" for value, some in rare) + f", {common} {where}"


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _named(tensors: Sequence[str]) -> str:
    more = f" and {len(tensors) - 3:,} more" if len(tensors) > 3 else ""
    return ", ".join(tensors[:3]) + more


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=None,
        padding=(0, 2, 0, 0),
        min_width=len(title),
    )


def _values(value: Any) -> Iterable[float | None]:
    return value.values() if isinstance(value, Mapping) else [value]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _optional(value: float | None, show: Callable[[float], str]) -> str:
    return "–" if value is None else show(value)


def _number(value: float, digits: int = 4) -> str:
    if value == 0:
        return "0"
    return f"{value:#.{digits}g}".rstrip(".") if 1e-3 <= value < 10**digits else f"{value:.1e}"


def _short(value: float) -> str:
    return _number(value, 3)


def _cosine(value: float, digits: int = 3) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.000"


def _percent(value: float) -> str:
    return "0 %" if value == 0 else f"{100 * value:.1f} %"


def _count(value: int) -> str:
    return f"{value:,}" if value else "0"
