"""The front door: gathers the command groups into `cuvee`, and turns a user's mistake into one line."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

import embeddings.cli
import merging.cli
import merging.statistics.cli
import search.cli
from merging.errors import CuveeError, Interrupted

app = typer.Typer(help="Several fine-tuned checkpoints in, one good model out.", pretty_exceptions_enable=False)
merging.cli.register(app)
merging.statistics.cli.register(app)
search.cli.register(app)
embeddings.cli.register(app)


@app.callback(invoke_without_command=True)
def _front(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        from merging.lineage import cuvee_version

        typer.echo(cuvee_version())
        raise typer.Exit


def main() -> None:
    """Runs the command line. Exit status: 0 done, 2 the user's mistake, 130 interrupted, 1 anything else."""
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        code = app(prog_name="cuvee", standalone_mode=False)
    except CuveeError as error:
        _leave(f"error: {error}", 2)
    except Interrupted as stop:
        _leave(f"interrupted: {stop}", 130)
    except (KeyboardInterrupt, typer.Abort):
        _leave("interrupted", 130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # the command line's own: an unknown option, a value out of range
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "cuvee"
        _leave(f"error: {command}: {error.format_message().rstrip('.')}; see {command} --help", 2)
    if code == 130:  # newer typers catch Ctrl-C themselves and leave in silence
        _leave("interrupted", 130)
    sys.exit(code)


def _leave(line: str, code: int) -> NoReturn:
    sys.stderr.write(f"{line}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
