"""The front door: gathers the command groups into `cuvee`, and turns a user's mistake into one line."""

from __future__ import annotations

import sys

import typer

import embeddings.cli
import merging.cli
from merging.errors import CuveeError

app = typer.Typer(
    help="Several fine-tuned checkpoints in, one good model out.", no_args_is_help=True, pretty_exceptions_enable=False
)
merging.cli.register(app)
embeddings.cli.register(app)


@app.callback(invoke_without_command=True)
def _front(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        from merging.lineage import cuvee_version

        typer.echo(cuvee_version())
        raise typer.Exit


def main() -> None:
    """Runs the command line. Exit status: 0 done, 2 the user's mistake, 130 interrupted, 1 anything else."""
    try:
        app()
    except CuveeError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
