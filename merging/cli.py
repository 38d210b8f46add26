"""The commands `cuvee merge`, `inspect` and `methods`: parse, call, print."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

# Not typer's check of what may be read: what is wrong with a file is told in one line by whoever reads it.
Out = Annotated[Optional[Path], typer.Argument(help="The folder to make.", show_default=False, readable=False)]
RecipeFile = Annotated[Optional[Path], typer.Argument(help="mergekit's YAML.", show_default=False, readable=False)]
Lineage = Annotated[
    Optional[Path], typer.Option("--from", help="Make the output of this cuvee.json again.", readable=False)
]
Seed = Annotated[Optional[int], typer.Option(help="Of every random draw; 0 by default.", show_default=False)]
Device = Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1 …; cpu by default.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and plan; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")]


def register(app: typer.Typer) -> None:
    """Adds this package's commands to the front door."""
    app.command()(merge)
    app.command()(inspect)
    app.command()(methods)


def merge(
    recipe: RecipeFile = None,
    out: Out = None,
    seed: Seed = None,
    device: Device = None,
    threads: Annotated[Optional[int], typer.Option(min=1, help="Workers; by default one a core.")] = None,
    shard_size: Annotated[Optional[str], typer.Option(help="Of a file at most, such as 5GB or 500MB.")] = None,
    from_: Lineage = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="For what mergekit must do.")] = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Merge checkpoints into one."""
    from merging import engine
    from merging.errors import CuveeError
    from merging.progress import bytes_bar

    if from_ is not None and out is None:
        recipe, out = None, recipe
    if (recipe is None) == (from_ is None) or out is None:
        raise CuveeError("wants a recipe and an output folder", where="cuvee merge", mend="cuvee merge RECIPE.yml OUT")
    options: dict[str, Any] = {"seed": seed, "device": device, "threads": threads}
    options["shard_size"] = parse_size(shard_size) if shard_size else None
    options = {name: value for name, value in options.items() if value is not None}
    options |= {"force": force, "dry_run": dry_run, "trust_remote_code": trust_remote_code, "note": say}
    gc.disable()  # a plan is many small objects and no cycles: looking for some takes a quarter of the time
    with bytes_bar("merging") as progress:
        options["progress"] = progress
        if from_ is not None:
            result = engine.remake(from_, out, **options)
        else:
            assert recipe is not None
            result = engine.merge_file(recipe, out, **options)
    verb = "would merge" if dry_run else "merged"
    say(
        f"{verb} {len(result['models'])} models by {result['method']} into {out}: "
        f"{result.get('parameters', 0) / 1e6:,.1f} M parameters in {result['seconds']:.1f} s"
    )
    finish(result, as_json)


def inspect(
    models: Annotated[list[str], typer.Argument(help="Folders or hub ids, with +ADAPTER where there is one.")],
    base: Annotated[
        Optional[str], typer.Option(help="Measure task vectors from this model.", show_default=False)
    ] = None,
    groups: Annotated[bool, typer.Option("--groups/--no-groups", help="Show each layer group too.")] = True,
    threads: Annotated[Optional[int], typer.Option(min=1, help="Workers; by default one a core.")] = None,
    as_json: Json = False,
) -> None:
    """Show what differs between checkpoints: norms, angles, sign conflicts, density, damage."""
    from merging import inspection
    from merging.progress import bytes_bar

    with bytes_bar("reading") as progress:
        result = inspection.inspect(models, base, threads=threads, progress=progress)
    if not as_json:
        inspection.show(result, groups=groups)
    finish(result, as_json)


def methods(
    name: Annotated[Optional[str], typer.Argument(help="One method, in full.", show_default=False)] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/methods.md.")] = False,
    as_json: Json = False,
) -> None:
    """List the merge methods and their parameters."""
    from merging import methods_table

    if markdown:
        print(methods_table.markdown(), end="")
    elif as_json:
        finish(methods_table.entries(name), as_json)
    else:
        methods_table.show(name)


def parse_size(text: str) -> int:
    """Bytes from "5GB", "500MB", "2 GiB" or a number.

    Raises:
        CuveeError: anything else.
    """
    from merging.errors import CuveeError

    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().rstrip("BbKkMmGgIi ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise CuveeError(f"'{text}' is no size", where="--shard-size", mend="write 5GB or 500MB")
    return size


def say(line: str) -> None:
    """One line for the user, on standard error."""
    from merging.errors import printable

    print(printable(line), file=sys.stderr, flush=True)


@contextmanager
def resumable(keeps: bool = True) -> Iterator[None]:
    """Lets Ctrl-C say that the same command goes on, for work whose finished parts are on the disk.

    Args:
        keeps: whether they are: not in a plan, and not where `--force` does everything again.

    Raises:
        Interrupted: instead of KeyboardInterrupt.
    """
    from merging.errors import Interrupted

    try:
        yield
    except KeyboardInterrupt:
        if not keeps:
            raise
        raise Interrupted("the same command goes on from what is saved") from None


def finish(result: dict[str, Any], as_json: bool) -> None:
    """The promised last line of standard output."""
    if as_json:
        print(json.dumps(result), flush=True)  # plain ASCII: names that are no UTF-8 get through too
