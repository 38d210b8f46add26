"""The command `cuvee pretrain`: parse, call, print."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embeddings.training.cli import Device, Force, Log, Processes, Seed, carry_out, options_of
from merging.cli import DryRun, Json

if TYPE_CHECKING:
    from embeddings.training.options import Options
    from merging.progress import Work

Config = Annotated[Path, typer.Argument(help="The configuration, a YAML.", readable=False)]
Run = Annotated[Path, typer.Argument(help="The run's folder; what is in it is not made again.", readable=False)]

_HELP: Mapping[str, str] = {
    "cocoa": "CoCoA: look both ways, then tell a text's pair again from its EOS (arXiv 2603.01471).",
    "llm-ql": "LLM-QL: tell the query from the EOS of a corrupted document (arXiv 2504.05216).",
    "retromae": "In RetroMAE's manner: tell a text again from the EOS of a corrupted copy (arXiv 2205.12035).",
}


def register(app: typer.Typer) -> None:
    """Adds this package's command to the front door."""
    group = typer.Typer(
        help="Teach a decoder to put a text into its EOS embedding, by reconstruction, before contrastive training."
    )
    for objective, text in _HELP.items():
        group.command(objective, help=text)(_command(objective))
    app.add_typer(group, name="pretrain")


def _command(objective: str) -> Callable[..., None]:
    def pretrain(
        config: Config,
        run: Run,
        device: Device = "cpu",
        seed: Seed = None,
        processes: Processes = 1,
        log: Log = None,
        force: Force = False,
        dry_run: DryRun = False,
        as_json: Json = False,
    ) -> None:
        from merging.loading import wait_passively

        wait_passively()
        from embeddings.reconstruction import config as pretraining_config
        from embeddings.training import metrics
        from merging.cli import say

        metrics.refuse_unknown(log or ())
        settings = pretraining_config.load(config, objective).seeded(seed)
        from embeddings.reconstruction.run import plan, pretrain_run

        def job(options: Options, progress: Work) -> dict[str, Any]:
            if dry_run:
                return plan(settings, run, options=options, progress=progress)
            return pretrain_run(settings, run, options=options, progress=progress, note=say)

        carry_out(job, options_of(device, "1", processes, force, log, dry_run), force or dry_run, as_json, _tell)

    return pretrain


def _tell(result: dict[str, Any]) -> None:
    """What was done and what it cost, in one line."""
    from merging.cli import say

    if result.get("dry_run"):
        stages = ", ".join(f"{name} in {own['steps']:,} steps" for name, own in result["members"].items())
        say(f"would train {stages}: {result['cost']:,} rows; {result['held_out']:,} held out")
        return
    rate = f"{result['pairs_per_second']:g} rows a second"
    say(f"{result['model']}: {result['steps']:,} steps, {result['cost']:,} rows, {rate}, loss {result['loss']:.4f}")
