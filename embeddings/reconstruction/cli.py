"""The command `cuvee pretrain`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embeddings.training.cli import Force, Log, Seed
from merging.cli import DryRun, Json

if TYPE_CHECKING:
    from embeddings.training.options import Options

Config = Annotated[Path, typer.Argument(help="The configuration, a YAML.", readable=False)]
Run = Annotated[Path, typer.Argument(help="The run's folder; what is in it is not made again.", readable=False)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")]


def register(app: typer.Typer) -> None:
    """Adds this package's command to the front door."""
    group = typer.Typer(
        help="Teach a decoder to put a text into its EOS embedding, by reconstruction, before contrastive training."
    )
    group.command()(cocoa)
    group.command("llm-ql")(llm_ql)
    group.command()(retromae)
    app.add_typer(group, name="pretrain")


def cocoa(
    config: Config,
    run: Run,
    device: Device = "cpu",
    seed: Seed = None,
    log: Log = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """CoCoA: look both ways, then tell a text's pair again from its EOS (arXiv 2603.01471)."""
    _pretrain("cocoa", config, run, seed, _options(device, force, log), dry_run, as_json)


def llm_ql(
    config: Config,
    run: Run,
    device: Device = "cpu",
    seed: Seed = None,
    log: Log = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """LLM-QL: tell the query from the EOS of a corrupted document (arXiv 2504.05216)."""
    _pretrain("llm-ql", config, run, seed, _options(device, force, log), dry_run, as_json)


def retromae(
    config: Config,
    run: Run,
    device: Device = "cpu",
    seed: Seed = None,
    log: Log = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """In RetroMAE's manner: tell a text again from the EOS of a corrupted copy (arXiv 2205.12035)."""
    _pretrain("retromae", config, run, seed, _options(device, force, log), dry_run, as_json)


def _pretrain(
    objective: str, config: Path, run: Path, seed: int | None, options: Options, dry_run: bool, as_json: bool
) -> None:
    from merging.loading import wait_passively

    wait_passively()
    from embeddings.reconstruction import config as pretraining_config
    from embeddings.training import metrics
    from merging.cli import finish, resumable, say
    from merging.progress import work_bars

    metrics.refuse_unknown(options.logs)
    settings = pretraining_config.load(config, objective).seeded(seed)
    from embeddings.reconstruction.run import plan, pretrain_run

    with work_bars() as progress, resumable(not (options.force or dry_run)):
        if dry_run:
            result = plan(settings, run, options=options, progress=progress)
        else:
            result = pretrain_run(settings, run, options=options, progress=progress, note=say)
    if not as_json:
        _tell(result)
    finish(result, as_json)


def _options(device: str, force: bool, log: list[str] | None) -> Options:
    from embeddings.training.options import Options

    return Options(device=device, force=force, logs=tuple(log or ()))


def _tell(result: dict[str, Any]) -> None:
    """What was done and what it cost, in one line."""
    from merging.cli import say

    if result.get("dry_run"):
        stages = ", ".join(f"{name} in {own['steps']:,} steps" for name, own in result["members"].items())
        say(f"would train {stages}: {result['cost']:,} rows; {result['held_out']:,} held out")
        return
    rate = f"{result['pairs_per_second']:g} rows a second"
    say(f"{result['model']}: {result['steps']:,} steps, {result['cost']:,} rows, {rate}, loss {result['loss']:.4f}")
