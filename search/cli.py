"""The command `cuvee search`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from merging.cli import DryRun, Json


def register(app: typer.Typer) -> None:
    """Adds this package's command to the front door."""
    app.command()(search)


def search(
    config: Annotated[Path, typer.Argument(help="What to search for, a YAML.", readable=False)],
    run: Annotated[Path, typer.Argument(help="The search's folder; a search that is in it goes on.", readable=False)],
    workers: Annotated[int, typer.Option(min=1, help="Trials side by side, each in a process of its own.")] = 1,
    until: Annotated[
        Optional[list[str]],
        typer.Option(help="trials=50, seconds=3600 or no_gain=15, instead of the YAML's.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; cuda gives each worker a GPU of its own.")] = "cpu",
    seed: Annotated[
        Optional[int], typer.Option(min=0, max=2**32 - 1, help="Instead of the YAML's.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Begin anew what is there.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Search the coefficients of a merge that score best, and merge by them."""
    from dataclasses import replace

    from search import config as search_config

    settings = search_config.until(until or [], search_config.load(config))
    settings = settings if seed is None else replace(settings, seed=seed)
    from merging.cli import finish, resumable, say
    from merging.progress import work_bars
    from search.run import search_run

    with work_bars() as progress, resumable(not dry_run):
        result = search_run(
            settings,
            run,
            workers=workers,
            device=device,
            force=force,
            dry_run=dry_run,
            progress=progress,
            note=say,
        )
    if not as_json:
        _tell(result)
    finish(result, as_json)


_ENDED = {"seconds": ", the time being up", "no_gain": ", the last of them no better", "space": ", all there are"}


def _tell(result: dict[str, Any]) -> None:
    from merging.cli import say

    varied = f"{len(result['dimensions'])} coefficients of {result['method']}"
    if result.get("dry_run"):
        say(
            f"would search {varied} by {result['engine']} in {result['trials']} trials, {result['start']} of them given"
        )
        return
    score, front = result["best"]["score"], result.get("front")
    if front is None:
        equal = result["equal_weights"]
        shown = f"best {score:.4f}" + (f" (equal weights {equal:.4f})" if equal is not None else "")
    else:
        shown = f"{len(front)} on the front, of the best mean {_named(result)}"
    failed = f", {result['failed']} failed" if result["failed"] else ""
    ended = _ENDED.get(result["ended"], "")
    say(
        f"{varied} in {result['trials']} trials{failed}{ended}: {shown} at trial {result['best']['trial']}; {result['model']}"
    )


def _named(result: dict[str, Any]) -> str:
    """The scores of the point that was taken, by task."""
    tasks = zip(result["tasks"], result["best"]["score"], strict=True)
    return ", ".join(f"{task} {score:.4f}" for task, score in tasks)
