"""What a training run says of itself on the way: a line of JSON every few steps, and whoever else listens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merging.errors import CuveeError
from merging.output import write_whole

Sink = Callable[[Mapping[str, Any]], None]
"""Called with a line: `step`, and numbers by name."""

SINKS = ("tensorboard", "wandb")


class Metrics:
    """Lines of a JSONL file, each written at once, so that a killed run has told all it knew.

    Args:
        from_step: lines of later steps are dropped: a resumed run takes those steps again.
        sinks: who else is told.
    """

    def __init__(self, file: Path, *, from_step: int = 0, sinks: Sequence[Sink] = ()) -> None:
        self._file, self._sinks = file, sinks
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read(file) if line.get("step", 0) <= from_step] if from_step else []
        write_whole(file, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: Mapping[str, Any]) -> None:
        with open(self._file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        for sink in self._sinks:
            sink(line)


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last one that was cut off by a kill is left out."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def last_loss(file: Path, steps: int) -> float:
    """The mean loss of a run's last steps; NaN where there is none.

    A line counts as often as it has steps among them: the last one of a run may stand for fewer than the others.
    """
    lines = [line for line in read(file) if "loss" in line]
    if not lines:
        return float("nan")
    begin = max(0, lines[-1]["step"] - steps)
    counts = np.diff([begin, *(max(begin, line["step"]) for line in lines)])
    return round(float(np.average([line["loss"] for line in lines], weights=counts)), 6)


def numbers(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """What can be drawn of a line; of what is nested, with the path as name."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            found[f"{prefix}{name}"] = float(value)
    return found


def refuse_unknown(names: Iterable[str]) -> None:
    """Raises CuveeError for a name that `sinks` does not know."""
    for name in names:
        if name not in SINKS:
            raise CuveeError(f"'{name}' is no log", where="--log", mend=f"choose {' or '.join(SINKS)}")


def sinks(names: Sequence[str], folder: Path, run: str) -> list[Sink]:
    """Whom the user wants told: "tensorboard" (into the folder) or "wandb".

    Raises:
        CuveeError: not one of them, or not installed.
    """
    makers: dict[str, Callable[[Path, str], Sink]] = {"tensorboard": _tensorboard, "wandb": _wandb}
    refuse_unknown(names)
    found = []
    for name in names:
        try:
            found.append(makers[name](folder, run))
        except ImportError:
            raise CuveeError(f"{name} is not installed", where="--log", mend=f"pip install {name}") from None
    return found


def _tensorboard(folder: Path, run: str) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard" / run))

    def write(line: Mapping[str, Any]) -> None:
        for name, value in numbers(line).items():
            writer.add_scalar(name, value, line["step"])
        writer.flush()

    return write


def _wandb(folder: Path, run: str) -> Sink:
    import wandb

    session = wandb.init(project="cuvee", name=run, dir=str(folder), reinit="create_new")
    return lambda line: session.log(numbers(line), step=line["step"])
