"""The command `cuvee quickstart`: parse, call, print."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Adds this package's commands to the front door."""
    app.command()(quickstart)


def quickstart(
    out: Annotated[Path, typer.Option(help="The run's folder; what is in it already is not made again.")] = Path(
        "quickstart"
    ),
    seed: Annotated[int, typer.Option(help="Of training and of random draws.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Fine-tune three specialists of a small real model, merge them in several ways, and compare all of them."""
    from embeddings import quickstart as job

    result = job.quickstart(out, seed=seed, progress=_progress())
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(title="Scores on the held-out splits", caption=f"all of it lies in {out}")
        for column in ("model", *next(iter(result["scores"].values())), "mean"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for model, cells in job.table_rows(result["scores"]):
            table.add_row(model, *(f"[bold]{text}[/bold]" if best else text for text, best in cells))
        Console().print(table)


def _progress() -> Callable[[str, int, int], None]:
    began: dict[str, float] = {}

    def show(what: str, done: int, total: int) -> None:
        start = began.setdefault(what, time.monotonic())
        spent = time.monotonic() - start
        rate = f", {done / spent:.1f}/s, {spent / done * (total - done):.0f} s left" if done and spent > 0 else ""
        sys.stderr.write(f"\r{what}: {done}/{total}{rate:30}" + ("\n" if done >= total else ""))
        sys.stderr.flush()

    return show
