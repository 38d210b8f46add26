"""A comparison as a table: Markdown for a page, and what fits into a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from embeddings.evaluation.comparison import OVER_TASKS, Comparison, Difference, Row, shown
from merging.errors import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_COLUMNS = 3  # models side by side at most
_HEAD, _NAME = 10, 30  # characters of a task's name in a line, of a model's


def markdown(comparison: Comparison) -> str:
    """A table of GitHub's Markdown: a row a task, a column a model, the best in bold."""
    head = ["task", "metric", *comparison.models]
    lines = [_line(head), _line(["---", "---", *("---:" for _ in comparison.models)])]
    for row in comparison.rows:
        name = row.name if row.kind == "task" else f"*{_title(row)}*"
        lines.append(_line([name, row.metric, *(_cell(row, m, lambda text: f"**{text}**") for m in comparison.models)]))
    return "\n".join([*lines, "", f"{_caption(comparison)}.", ""])


def tables(comparison: Comparison, *, width: int = 100, stars: bool = False) -> list[RenderableType]:
    """The same for a terminal of so many columns.

    Up to three models are columns, with every interval. More of them are rows, in as many tables as the width asks for:
    a difference that is beyond the noise is an arrow, and that of the mean over tasks has its interval; the others stand
    in the other forms.

    Args:
        stars: mark the best by a star, for where bold is not seen.
    """
    wide = len(comparison.models) <= _COLUMNS
    return [_by_task(comparison, stars)] if wide else _by_model(comparison, width, stars)


def _by_task(comparison: Comparison, stars: bool) -> Table:
    """A row a task, a column a model; differences within the noise are dim."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(title="Scores", caption=escape(_caption(comparison, stars)))
    made.add_column("task")
    made.add_column("metric")
    for model in comparison.models:
        made.add_column(escape(printable(model)), justify="right", overflow="fold")
    last = ""
    for row in comparison.rows:
        section = row.group if row.kind == "task" else row.kind
        if last not in ("", section):
            made.add_section()
        last = section
        cells = [_cell(row, m, lambda text: _best(text, stars), dim="[dim]{}[/dim]") for m in comparison.models]
        made.add_row(escape(printable(_title(row))), row.metric, *cells)
    return made


def _by_model(comparison: Comparison, width: int, stars: bool) -> list[RenderableType]:
    """A row a model, a column a task or mean; what does not fit into the width goes on in the next table."""
    from rich import box
    from rich.cells import cell_len
    from rich.constrain import Constrain
    from rich.markup import escape, render
    from rich.table import Table
    from rich.text import Text

    names = ["\n".join(wrap(printable(model), min(_NAME, max(8, width // 3)))) for model in comparison.models]
    columns = [(_head(row), [_short_cell(row, m, stars) for m in comparison.models]) for row in comparison.rows]
    last = next((row for row in comparison.rows if row.name == OVER_TASKS), comparison.rows[0])
    columns.append((f"{_head(last)}\n− first", [_gap_cell(last, m) for m in comparison.models]))
    tasks = sum(row.kind == "task" for row in comparison.rows)

    def wide(texts: Sequence[str]) -> int:
        return max(cell_len(line) for text in texts for line in text.splitlines()) + 2

    widths = [wide([head, *(render(cell).plain for cell in cells)]) for head, cells in columns]
    space = width - wide(names)
    made: list[RenderableType] = []
    for start, end in _blocks(widths, space, tasks):
        part = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
        part.add_column("model", no_wrap=True)
        for head, _ in columns[start:end]:
            part.add_column(escape(head), justify="right", no_wrap=True)
        for i, name in enumerate(names):
            part.add_row(escape(name), *(cells[i] for _, cells in columns[start:end]))
        made += [part, ""]
    return [*made, Constrain(Text(_caption(comparison, stars, arrows=True)), width)]


def _blocks(widths: Sequence[int], space: int, tasks: int) -> list[tuple[int, int]]:
    """Columns from and to, as many as there is space for; tasks and means apart where they do not fit side by side."""
    if sum(widths) <= space:
        return [(0, len(widths))]
    blocks, start = [], 0
    for end in range(1, len(widths) + 1):
        if end == len(widths) or end == tasks or sum(widths[start : end + 1]) > space:
            blocks.append((start, end))
            start = end
    return blocks


def _short_cell(row: Row, model: str, stars: bool) -> str:
    """The score alone; ▲ or ▼ where it differs from the first model's beyond the noise."""
    if model not in row.scores:
        return "– "
    gap = row.differences.get(model)
    arrow = ("▲" if gap.value > 0 else "▼") if gap is not None and gap.beyond_noise else " "
    text = shown(row.scores[model])
    return (_best(text, stars) if model in row.best else text) + arrow


def _gap_cell(row: Row, model: str) -> str:
    gap = row.differences.get(model)
    return "" if gap is None else _gap(gap) if gap.beyond_noise else f"[dim]{_gap(gap)}[/dim]"


def _head(row: Row) -> str:
    """A row's title as the head of a narrow column: broken where a word of the name ends."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[-_. ])", "\n", printable(_title(row))).splitlines()
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1] + word.rstrip()) > _HEAD:
            lines.append("")
        lines[-1] += word
        while len(lines[-1].rstrip()) > _HEAD:
            lines[-1:] = [lines[-1][:_HEAD], lines[-1][_HEAD:]]
    return "\n".join(line.rstrip() for line in lines)


def _best(text: str, stars: bool) -> str:
    return f"[bold]{text}[/bold]" + ("*" if stars else "")


def _title(row: Row) -> str:
    return {"task": "{}", "group": "mean of {}", "type": "mean of {}", "mean": "{}"}[row.kind].format(row.name)


def _cell(row: Row, model: str, bold: Callable[[str], str], dim: str = "{}") -> str:
    if model not in row.scores:
        return "–"
    text = shown(row.scores[model])
    text = bold(text) if model in row.best else text
    gap = row.differences.get(model)
    if gap is None:
        return text
    told = f"({_gap(gap)})"
    return f"{text} {told if gap.beyond_noise else dim.format(told)}"


def _gap(gap: Difference) -> str:
    told = f"{100 * gap.value:+.2f}"
    if gap.low is not None and gap.high is not None:
        told = f"{told}; {100 * gap.low:+.2f} to {100 * gap.high:+.2f}"
    return told


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(printable(cell).replace("|", "\\|") for cell in cells) + " |"


def _caption(comparison: Comparison, stars: bool = False, *, arrows: bool = False) -> str:
    if len(comparison.models) < 2:
        return "Main scores times 100"
    first = printable(comparison.models[0])
    gap = "▲ or ▼ where the difference to {} is beyond its" if arrows else "then the difference to {} and its"
    told = (
        f"Main scores times 100, the best {'with a star' if stars else 'in bold'}; {gap.format(first)} 95 % interval by paired "
        "bootstrap over queries or examples"
    )
    without = [f"{printable(row.name)} ({row.remark})" for row in comparison.rows if row.remark]
    return f"{told}. No interval for {', '.join(without)}, nor for means that they are in" if without else told
