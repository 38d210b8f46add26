"""The command `cuvee stats`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from merging.cli import DryRun, Force, Json

Models = Annotated[
    Optional[list[str]],
    typer.Argument(help="A folder or hub id, with +ADAPTER where there is one.", metavar="MODEL", show_default=False),
]
Data = Annotated[
    Optional[list[Path]],
    typer.Option(help="JSONL, CSV, TSV, Parquet or .txt; may be given more than once.", readable=False),
]
Kind = Annotated[Optional[str], typer.Option(help="fisher, moments, gram or score-prior.", show_default=False)]
Columns = Annotated[
    Optional[list[str]],
    typer.Option("--column", help="What the data call a column: text=body, query=q …", show_default=False),
]

#: Options that `score-prior` goes by.
_OF_SCORE_PRIOR = (
    *("models", "data", "kind", "out", "combine", "column", "scores", "seed", "device"),
    *("force", "dry_run", "as_json"),
)


def register(app: typer.Typer) -> None:
    """Adds this module's command to the front door."""
    app.command()(stats)


def stats(
    context: typer.Context,
    models: Models = None,
    data: Data = None,
    kind: Kind = None,
    out: Annotated[Optional[Path], typer.Option(help="The folder to make.", show_default=False, readable=False)] = None,
    examples: Annotated[int, typer.Option(help="Rows to draw from the data.")] = 128,
    part: Annotated[
        str, typer.Option(help="Only the i-th of n parts of these rows, to be combined later: i/n.")
    ] = "1/1",
    base: Annotated[
        Optional[str], typer.Option(help="Of the model scaled towards this one, with --scale.", show_default=False)
    ] = None,
    scale: Annotated[
        Optional[float], typer.Option(help="What is left of the model's task vector: BASE + scale·(MODEL − BASE).")
    ] = None,
    combine: Annotated[
        bool, typer.Option("--combine", help="Combine the folders that stand in the model's place.")
    ] = False,
    column: Columns = None,
    head: Annotated[
        str, typer.Option(help="embedding, classification, regression or lm; auto: as the model is.")
    ] = "auto",
    max_length: Annotated[Optional[int], typer.Option(help="Tokens of a text; by default up to 512.")] = None,
    batch_size: Annotated[Optional[int], typer.Option(help="By default as many as are quick.")] = None,
    temperature: Annotated[float, typer.Option(help="Of fisher's softmax over a query's candidates.")] = 0.05,
    candidates: Annotated[int, typer.Option(help="Of a query, for fisher.")] = 8,
    scores: Annotated[
        Optional[str],
        typer.Option(help="Of score-prior: the least and the greatest score, LOW:HIGH.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of all draws.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, of the model's arithmetic.")] = "float32",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the model's.")] = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure which weights matter to a model, and what its layers read: for merging by importance."""
    from merging.cli import finish, resumable, say
    from merging.loading import wait_passively
    from merging.progress import work_bars

    if combine:
        finish(_combine(models or [], out, force=force), as_json)
        return
    model, out, data, kind = _given(models or [], out, data or [], kind)
    if kind == "score-prior":
        _refuse_unread(context)
        columns, bounds = _columns(column or []), _bounds(scores)
        finish(_score_prior(model, data, out, columns, bounds, seed=seed, force=force, dry_run=dry_run), as_json)
        return
    _refuse_bounds(scores)
    wait_passively()
    from merging.statistics.collect import collect

    options: dict[str, Any] = {"columns": _columns(column or []), "part": _part(part), "progress": None, "note": say}
    options |= {"base": base, "scale": scale}
    options |= {"examples": examples, "head": head, "max_length": max_length, "batch_size": batch_size, "seed": seed}
    options |= {"temperature": temperature, "candidates": candidates, "device": device, "dtype": dtype}
    options |= {"trust_remote_code": trust_remote_code, "force": force, "dry_run": dry_run}
    with work_bars() as progress, resumable(not dry_run):
        options["progress"] = progress
        result = collect(model, data, kind, out, **options)
    verb = "would measure" if dry_run else "measured"
    say(f"{verb} {kind} of {model} on {result['examples']} examples: {out}, {result['seconds']:.1f} s")
    finish(result, as_json)


def _combine(folders: list[str], out: Path | None, *, force: bool) -> dict[str, Any]:
    import time

    from merging.cli import say
    from merging.errors import CuveeError
    from merging.lineage import cuvee_version
    from merging.statistics.folder import combine, open_statistics

    if out is None:
        raise CuveeError("wants --out", where="cuvee stats", mend="cuvee stats --combine A B --out FOLDER")
    began = time.perf_counter()
    result = combine(folders, out, force=force)
    seconds = round(time.perf_counter() - began, 3)
    say(f"combined {len(folders)} folders of {result['kind']}, {result['examples']} examples: {out}, {seconds:.1f} s")
    seed = open_statistics(out).manifest["seed"]
    promised = {"command": "stats", "out": str(out), "seconds": seconds, "seed": seed, "device": "cpu"}
    return {**promised, "cuvee_version": cuvee_version(), **result}


def _score_prior(
    model: str, data: list[Path], out: Path, columns: dict[str, str], bounds: tuple[float, float] | None, **options: Any
) -> dict[str, Any]:
    from merging.cli import say
    from merging.statistics.score_prior import collect_score_prior

    result = collect_score_prior(model, data, out, columns=columns, scores=bounds, **options)
    would = "would write " if options["dry_run"] else ""
    found = f"{would}Beta({result['alpha']:.4f}, {result['beta']:.4f}) of {result['examples']} scores"
    say(f"{found} from {result['scores'][0]:g} to {result['scores'][1]:g}: {out}")
    return result


def _given(
    models: list[str], out: Path | None, data: list[Path], kind: str | None
) -> tuple[str, Path, list[Path], str]:
    from merging.errors import CuveeError

    mend = "cuvee stats MODEL --data FILE --kind fisher|moments|gram|score-prior --out FOLDER"
    if len(models) != 1:
        raise CuveeError("wants a model" if not models else "wants one model", where="cuvee stats", mend=mend)
    for name, value in (("--data", data), ("--kind", kind), ("--out", out)):
        if not value:
            raise CuveeError(f"wants {name}", where="cuvee stats", mend=mend)
    assert out is not None and kind is not None
    return models[0], out, data, kind


def _columns(given: list[str]) -> dict[str, str]:
    from merging.errors import CuveeError

    columns = dict(each.partition("=")[::2] for each in given)
    for name, value in columns.items():
        if not name or not value:
            raise CuveeError(f"'{name}' names no column", where="--column", mend="write text=NAME")
    return columns


def _bounds(given: str | None) -> tuple[float, float] | None:
    from merging.errors import CuveeError
    from merging.tables import as_number

    if given is None:
        return None
    low, high = (as_number(part) for part in (given.partition(":")[::2]))
    if not low < high < float("inf") or low == float("-inf"):
        raise CuveeError(f"'{given}' is no range of scores", where="--scores", mend="write 1:6")
    return low, high


def _refuse_bounds(given: str | None) -> None:
    from merging.errors import CuveeError

    if given is not None:
        raise CuveeError("belongs to --kind score-prior", where="--scores", mend="leave it out")


def _refuse_unread(context: typer.Context) -> None:
    """Raises CuveeError where an option was given that a score prior does not go by: it is of all rows."""
    from merging.errors import CuveeError

    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in _OF_SCORE_PRIOR and source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            what = "a score prior is of all rows, and no text is read"
            raise CuveeError(what, where=option, mend=f"leave {option} out")


def _part(given: str) -> tuple[int, int]:
    from merging.errors import CuveeError

    first, _, second = given.partition("/")
    if not (first.isdecimal() and second.isdecimal()):
        raise CuveeError(f"'{given}' is no part", where="--part", mend="write 1/2 and 2/2")
    return int(first), int(second)
