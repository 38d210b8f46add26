"""The commands `cuvee train` and `update`: parse, call, print."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from merging.cli import DryRun, Json

if TYPE_CHECKING:
    from embeddings.training.options import Options
    from merging.progress import Work

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; cuda gives each process a GPU of its own.")]
Seed = Annotated[
    Optional[int], typer.Option(min=0, max=2**32 - 1, help="Instead of the configuration's.", show_default=False)
]
Workers = Annotated[
    str,
    typer.Option(
        help="Members trained side by side; ray, or ray:4: as tasks of Ray.",
        metavar="N",
        callback=lambda text: _check_workers(text),
    ),
]
Processes = Annotated[int, typer.Option(min=1, help="That train one model together, on a GPU each.")]
Log = Annotated[Optional[list[str]], typer.Option(help="Also to tensorboard or wandb.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Train again what is there.")]


def register(app: typer.Typer) -> None:
    """Adds this module's commands to the front door."""
    app.command()(train)
    app.command()(update)


def train(
    config: Annotated[Path, typer.Argument(help="The configuration, a YAML.", readable=False)],
    run: Annotated[Path, typer.Argument(help="The run's folder; what is in it is not made again.", readable=False)],
    device: Device = "cpu",
    seed: Seed = None,
    workers: Workers = "1",
    processes: Processes = 1,
    log: Log = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train an embedding model, or several on bags of the data that are merged into one."""
    from embeddings.training import config as training_config
    from embeddings.training import metrics
    from merging.loading import wait_passively

    wait_passively()
    metrics.refuse_unknown(log or ())
    settings = training_config.load(config)
    settings = settings if seed is None else replace(settings, seed=seed)
    from embeddings.training import bag
    from merging.cli import say

    def job(options: Options, progress: Work) -> dict[str, Any]:
        if dry_run:
            return bag.plan(settings, run, options=options, progress=progress, note=say)
        return bag.train_run(settings, run, options=options, progress=progress, note=say)

    carry_out(job, options_of(device, workers, processes, force, log, dry_run), force or dry_run, as_json, _tell)


def update(
    model: Annotated[Path, typer.Argument(help="A model of `cuvee train` or `update`, or any with --base and --core.")],
    data: Annotated[Path, typer.Option(help="The new data: a table, or a YAML with a data: list.")],
    out: Annotated[Path, typer.Option(help="The run's folder; the new model is in its model/.", readable=False)],
    base: Annotated[Optional[str], typer.Option(help="What training starts from.", show_default=False)] = None,
    core: Annotated[Optional[Path], typer.Option(help="Some old data: a table or a YAML.", show_default=False)] = None,
    config: Annotated[
        Optional[Path], typer.Option(help="Settings of the training, instead of the model's own.", show_default=False)
    ] = None,
    device: Device = "cpu",
    seed: Seed = None,
    processes: Processes = 1,
    log: Log = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Teach a model new data and keep what it knew, at a fraction of a new training."""
    from merging.loading import wait_passively

    wait_passively()
    from embeddings.training import metrics
    from embeddings.training.update import update_model
    from merging.cli import say

    metrics.refuse_unknown(log or ())
    said = {"base": base, "core": core, "config": config, "seed": seed, "dry_run": dry_run, "note": say}

    def job(options: Options, progress: Work) -> dict[str, Any]:
        return update_model(model, data, out, **said, options=options, progress=progress)  # type: ignore[arg-type]

    carry_out(job, options_of(device, "1", processes, force, log, dry_run), force or dry_run, as_json, _tell)


def carry_out(
    job: Callable[[Options, Work], dict[str, Any]],
    options: Optional[Options],
    anew: bool,
    as_json: bool,
    tell: Callable[[dict[str, Any]], None],
) -> None:
    """Does the work under its bars and prints what came of it; in a process of a team that is not the first, nothing."""
    from merging.cli import finish, resumable
    from merging.progress import work_bars

    if options is None:
        return
    with work_bars() as progress, resumable(not anew):
        result = job(options, progress)
    if result:
        if not as_json:
            tell(result)
        finish(result, as_json)


def options_of(
    device: str, workers: str, processes: int, force: bool, log: Optional[list[str]], dry_run: bool
) -> Optional[Options]:
    """How the run is carried out; None where another process of those that were launched tells what it would do."""
    import os

    from embeddings.training import team
    from embeddings.training.options import Options

    count = int(workers.removeprefix("ray").lstrip(":") or 0)
    options = Options(device, count, force, tuple(log or ()), processes, ray=workers.startswith("ray"))
    if not team.is_launched():
        return options
    if dry_run:
        return options if os.environ["RANK"] == "0" else None
    ours, own = team.join_launched(device)
    return replace(options, team=ours, device=own)


def _check_workers(text: str) -> str:
    if not re.fullmatch(r"ray|(ray:)?[1-9][0-9]{0,3}", text):
        raise typer.BadParameter(f"'{text}' is no number from 1, ray, or ray:4")
    return text


def _tell(result: dict[str, Any]) -> None:
    """What was done and what it cost, in one line each."""
    from merging.cli import say

    if result.get("dry_run"):
        counted = {"model": len(result["members"]), "step": result["steps"], "row": result["cost"]}
        models, steps, rows = (f"{count:,} {noun}{'s' * (count != 1)}" for noun, count in counted.items())
        say(f"would train {models} in {steps}: {rows}")
        return
    rate = f"{result['pairs_per_second']:g} rows a second"
    say(f"{result['model']}: {result['steps']} steps, {result['cost']:,} rows, {rate}, loss {result['loss']:.4f}")
    if found := result.get("weights"):
        score = found["best"]["score"]
        shown = f"{score:.4f}" if isinstance(score, float) else ", ".join(f"{each:.4f}" for each in score)
        say(f"weights by search: best {shown} of {found['trials']} trials")
    if full := result.get("cost_full_retraining"):
        say(f"an update for {result['cost'] / full:.0%} of a full retraining ({full:,} rows)")
