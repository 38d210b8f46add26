"""The commands `cuvee evaluate` and `quickstart`: parse, call, print."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from embeddings.reconstruction import cli as reconstruction_cli
from embeddings.training import cli as training_cli
from merging.cli import DryRun, Json


def register(app: typer.Typer) -> None:
    """Adds this package's commands to the front door."""
    app.command()(evaluate)
    app.command()(quickstart)
    training_cli.register(app)
    reconstruction_cli.register(app)


def evaluate(
    models: Annotated[
        Optional[list[str]], typer.Argument(help="Folders or hub ids, with +ADAPTER where there is one.")
    ] = None,
    names: Annotated[
        Optional[list[str]],
        typer.Option(
            "--tasks",
            help="Tasks and benchmarks of mteb, tasks of the suite; by commas or given again.",
            show_default=False,
        ),
    ] = None,
    suite: Annotated[
        Optional[list[str]],
        typer.Option(help="A folder of your own tasks, or 'shipped', the default.", show_default=False),
    ] = None,
    out: Annotated[
        Optional[Path], typer.Option(help="The run's folder; what is in it already is not done again.")
    ] = None,
    language: Annotated[Optional[list[str]], typer.Option(help="Only mteb's tasks in it, as 'eng'.")] = None,
    type_: Annotated[Optional[list[str]], typer.Option("--type", help="Only tasks of it, as 'Retrieval'.")] = None,
    split: Annotated[str, typer.Option(help="Of the suites' tasks: test, validation or train.")] = "test",
    revision: Annotated[Optional[str], typer.Option(help="Of models that are hub ids.", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch_size: Annotated[str, typer.Option(help="Texts in a batch, or auto: a budget of tokens.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    truncate_dim: Annotated[
        Optional[int], typer.Option(help="Keep only so many leading dimensions.", show_default=False)
    ] = None,
    prompt: Annotated[
        Optional[list[str]],
        typer.Option(help="NAME=TEXT, of 'query', 'document', a task or a type.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what the tasks draw; 42 is mteb's own.")] = 42,
    cache: Annotated[
        Optional[Path], typer.Option(help="Where vectors are kept; by default with the run.", show_default=False)
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Put the scores into the models' README.md.")] = False,
    check: Annotated[
        Optional[Path], typer.Option(help="Only look for mistakes in a suite.", show_default=False)
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run a model's own code.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Score again what is known.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Score embedding models on tasks of MTEB and on your own, and compare them."""
    from embeddings.evaluation import evaluate as evaluation
    from merging.cli import finish, resumable, say
    from merging.errors import CuveeError
    from merging.progress import work_bars

    if check is not None:
        _check(check, as_json)
        return
    if not models or out is None:
        mend = "cuvee evaluate MODEL… --tasks … --out RUN"
        raise CuveeError("wants models and a run's folder", where="cuvee evaluate", mend=mend)
    settings = evaluation.Settings(
        revision=revision,
        dtype=dtype,
        batch_size=_batch_size(batch_size),
        device=device,
        truncate_dim=truncate_dim,
        prompts=_prompts(prompt or []),
        seed=seed,
        cache=cache,
        trust_remote_code=trust_remote_code,
    )
    with work_bars() as progress, resumable(not (force or dry_run)):
        result, comparison = evaluation.evaluate(
            models,
            out,
            names=[name for text in names or [] for name in re.split(r"\s*,\s*(?![^()]*\))", text) if name],
            suites=[
                None if folder == "shipped" and not Path(folder).exists() else Path(folder) for folder in suite or []
            ],
            languages=language or [],
            types=type_ or [],
            split=split,
            settings=settings,
            force=force,
            dry_run=dry_run,
            write_cards=card,
            progress=progress,
            note=say,
        )
    if dry_run:
        say(f"would score {len(result['models'])} models on {', '.join(result['tasks'])}")
    elif comparison is not None and not as_json:
        _print(comparison)
        if len(comparison.models) > 3:
            say(f"every difference and its interval: {out / 'scores.md'}")
    finish(result, as_json)
    evaluation.refuse_failures(result, say)


def quickstart(
    out: Annotated[Path, typer.Option(help="The run's folder; what is in it already is not made again.")] = Path(
        "quickstart"
    ),
    seed: Annotated[int, typer.Option(help="Of training and of random draws.")] = 0,
    as_json: Json = False,
) -> None:
    """The whole way on small real data: train in bags, merge, update with a new task, evaluate."""
    from embeddings import quickstart as job
    from merging.cli import finish, resumable, say
    from merging.progress import work_bars

    with work_bars() as progress, resumable():
        result, comparison = job.quickstart(out, seed=seed, progress=progress, note=say)
    if not as_json:
        _print(comparison)
        cost, full = result["cost_update"], result["cost_full_retraining"]
        say(f"the update took {cost:,} rows, {cost / full:.0%} of the {full:,} of a full retraining")
        say(f"every difference and its interval: {out / 'evaluation' / 'scores.md'}")
    finish(result, as_json)


def _check(suite: Path, as_json: bool) -> None:
    from embeddings.evaluation.suite_check import check
    from merging.cli import finish, say
    from merging.errors import CuveeError

    findings = check(suite)
    errors = sum(finding.severity == "error" for finding in findings)
    for finding in findings:
        where = f"{finding.file}:{finding.line}" if finding.line else str(finding.file)
        say(f"{where}: {finding.severity}: {finding.message}")
    finish({"command": "evaluate", "check": str(suite), "findings": [vars(f) for f in findings]}, as_json)
    if errors:
        raise CuveeError(f"{errors} of {len(findings)} findings are errors", where=str(suite), mend="mend them")
    say(f"{suite}: no errors, {len(findings)} warnings")


def _batch_size(text: str) -> str | int:
    from merging.errors import CuveeError

    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise CuveeError(f"'{text}' is no batch size", where="--batch-size", mend="give a number or auto")
    return text if text == "auto" else int(text)


def _prompts(given: list[str]) -> dict[str, str] | None:
    from merging.errors import CuveeError

    for text in given:
        if not text.partition("=")[0] or "=" not in text:
            raise CuveeError(f"'{text}' names no prompt", where="--prompt", mend='write --prompt "query=Represent: "')
    return {text.partition("=")[0]: text.partition("=")[2] for text in given} or None


def _print(comparison: Any) -> None:
    from rich.console import Console

    from embeddings.evaluation.score_table import tables

    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 240)
    for table in tables(comparison, width=console.width if terminal else 100, stars=not terminal):
        console.print(table)
