"""The folder of a run: what is in it, whose it is, and how it is claimed and finished.

    members/<number>-<percent>/   a model each, its metrics, rows.npz: by data set, the numbers of its rows
    model/                        the merge; of a run without bags, the one model there is
    base/                         what the members started from, where a merge needs it and its folder has no modules
    core/                         rows kept for later updates: tables, data.yml that names them, rows.npz
    data/                         token ids of all texts
    search/, search.yml           of a search of the merge's weights: its study, and what it was asked
    work/                         of members that are not done
    cuvee.json                    settings, members, costs

The same command on it makes only what is missing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from embeddings.training.config import TrainingConfig
from embeddings.training.disk import disk_errors
from embeddings.training.options import Options
from embeddings.training.schedule import Schedule
from embeddings.training.train import AFTER_TRAINING, Trained
from merging import lineage
from merging.errors import CuveeError
from merging.output import alone, just_begun, write_whole

MODEL, BASE, CORE, MEMBERS, SEARCH, WORK, DATA = "model", "base", "core", "members", "search", "work", "data"
_MADE = (MEMBERS, MODEL, BASE, CORE, SEARCH, WORK)  # of a configuration; `data` serves others too
_CONFIG = "config.yml"


@contextmanager
def at_work(run: Path) -> Iterator[None]:
    """Keeps other processes out of the run's folder, and tells what the disk refuses in one line.

    Raises:
        CuveeError: another process is at work in it, or it cannot be written.
    """
    with disk_errors(run), alone(run):
        yield


def past_of(run: Path) -> dict[str, Any] | None:
    """What the folder says of itself; None where nothing is in it.

    Raises:
        CuveeError: it holds something, and says nothing.
    """
    try:
        if not run.is_dir() or just_begun(run) or not any(run.iterdir()):
            return None
    except OSError as error:
        raise CuveeError(f"cannot be looked into: {error.strerror}", where=str(run)) from None
    if not (run / lineage.FILE).is_file():
        raise CuveeError("is not empty and none of our outputs", where=str(run), mend="choose another folder")
    return lineage.read(run)


def check_claim(
    run: Path, command: str, config: TrainingConfig, *, force: bool, more: Mapping[str, Any] | None = None
) -> bool:
    """Whether the folder is a run of the same configuration; False: it is empty, missing, or `force` says it may go.

    Args:
        more: what else makes a run the same.

    Raises:
        CuveeError: it is something else.
    """
    past = past_of(run)
    if past is None:
        return False
    if past.get("state") == "begun" and not any((run / part).exists() for part in _MADE):
        return False  # its data or settings were refused: mended, they are another configuration
    if past.get("command") != command:
        raise CuveeError(f"is an output of `cuvee {past.get('command')}`", where=str(run), mend="choose another folder")
    if "state" not in past:  # a run in it would take the place of its lineage
        raise CuveeError("is a model, no run's folder", where=str(run), mend="choose another folder")
    same = _members_of(past) == _members_of(_identity(config, more))
    if not same and not force:
        mend = "choose another folder, or add --force to train anew"
        raise CuveeError("holds a run of another configuration", where=str(run), mend=mend)
    return same


def claim(
    run: Path, command: str, config: TrainingConfig, *, force: bool, more: Mapping[str, Any] | None = None
) -> None:
    """As `check_claim`; and the folder is of this configuration from now on, without what was made by another."""
    identity = _identity(config, more)
    stale: Sequence[str] = _MADE
    if check_claim(run, command, config, force=force, more=more):
        past = lineage.read(run)
        if past.get("config") == identity["config"] and (run / _CONFIG).is_file():
            return
        stale = (CORE,) if past["config"].get("core") != config.core else ()
    for part in stale:
        shutil.rmtree(run / part, ignore_errors=True)
    begun = {"command": command, "state": "begun", **identity}
    write_whole(run / lineage.FILE, lineage.text(begun))  # first: what holds it is ours, wherever we are killed
    write_whole(run / _CONFIG, config.text)


def finish(
    run: Path,
    command: str,
    config: TrainingConfig,
    options: Options,
    began: float,
    trained: Mapping[str, Trained],
    content: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the run's cuvee.json; what the command prints, with `more` in it."""
    shutil.rmtree(run / WORK, ignore_errors=True)
    summary = {**summary_of(command, run, config.seed, options, began, trained), **(more or {})}
    same = {key: value for key, value in lineage.read(run).items() if key in ("config", "updates")}
    write_whole(run / lineage.FILE, lineage.text({**summary, **content, **same, "state": "done"}))
    return summary


def summary_of(
    command: str, run: Path, seed: int, options: Options, began: float, trained: Mapping[str, Trained]
) -> dict[str, Any]:
    """What was made, from what, and what it cost.

    Args:
        began: of `time.perf_counter`.
        trained: members or stages; the loss is their mean.
    """
    rows, seconds = sum(t.rows for t in trained.values()), sum(t.seconds for t in trained.values())
    return {
        "command": command,
        "out": str(run),
        "model": str(run / MODEL),
        "seconds": round(time.perf_counter() - began, 1),
        "seed": seed,
        "device": options.device,
        "cuvee_version": lineage.cuvee_version(),
        "members": {name: asdict(done) for name, done in trained.items()},
        "steps": sum(done.steps for done in trained.values()),
        "pairs_per_second": round(rows / seconds, 1) if seconds else 0.0,
        "loss": round(float(np.mean([done.loss for done in trained.values()])), 6),
        "cost": rows,
    }


def planned_of(
    command: str,
    run: Path,
    seed: int,
    options: Options,
    schedules: Mapping[str, Schedule],
    sets: Iterable[Any],
) -> dict[str, Any]:
    """What would be made, from what, and at what cost.

    Args:
        schedules: by member or stage.
        sets: with a name and a number of rows each.
    """
    return {
        "command": command,
        "dry_run": True,
        "out": str(run),
        "seed": seed,
        "device": options.device,
        "cuvee_version": lineage.cuvee_version(),
        "members": {name: {"steps": len(steps)} for name, steps in schedules.items()},
        "steps": sum(map(len, schedules.values())),
        "cost": sum(len(part.rows) for steps in schedules.values() for step in steps for part in step),
        "rows": {each.name: len(each) for each in sets},
    }


def _identity(config: TrainingConfig, more: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"config": config.plain(), **(more or {})}


def _members_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What the members follow from; they stay as they are when they are merged, watched or kept for updates otherwise."""
    config = identity.get("config")
    settings = config if isinstance(config, dict) else {}
    kept = {key: value for key, value in settings.items() if key not in AFTER_TRAINING}
    return {"config": kept, "updates": identity.get("updates")}
