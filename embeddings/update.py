"""Updates: a model learns new data and keeps what it knew, at a fraction of a new training (BOOM, arXiv 2602.05787).

An update model is trained from the base on the new data and a core set of the old, and merged into the existing model,
both with equal weight. The result has a core set of its own, the old one and as large a share of the new data, so that
updates chain. Its folder is laid out as that of `cuvee train`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embeddings import bag, training_config
from embeddings.model import only_our_words
from embeddings.train import Job, Progress
from embeddings.training_config import DataSettings, TrainingConfig
from embeddings.training_data import TrainingSet, write_rows
from merging import lineage
from merging.errors import CuveeError
from merging.sources import ModelRef

_UPDATE, _UPDATE_DRAW = "update", 3
_MERGE = "multislerp"


@dataclass(frozen=True)
class Past:
    """What is known of a model that is to be updated.

    Attributes:
        model: its folder or hub id.
        config: how it was trained; of the update only the data differ.
        core: its core set's data.yml or table; None if it kept none.
        rows: of all the data it has seen.
        percent: of its data that is in the core set.
    """

    model: str
    config: TrainingConfig
    core: Path | None
    rows: int | None
    percent: float


def update_model(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    core: str | Path | None = None,
    config: str | Path | None = None,
    seed: int | None = None,
    options: bag.Options | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    note: bag.Note | None = None,
) -> dict[str, Any]:
    """Trains the update model on new data and core set, and merges it into `model`.

    Args:
        model: what `cuvee train` or `update` made, its run's folder or the model's own; or any other with `base`.
        data: the new data: a table, or a YAML with a `data:` list.
        out: the run's folder.
        base, core, config: what training starts from, old data, settings; by default what the model's lineage says.

    Returns:
        What `cuvee update --json` prints; `cost_full_retraining` is None where nobody knows how much the old data were.

    Raises:
        CuveeError: a model without lineage and no `base`, data that cannot be, or a folder that holds something else.
    """
    began = time.perf_counter()
    out, options = Path(out).absolute(), options or bag.Options()
    progress, note = progress or (lambda what, done, total: None), note or (lambda line: None)
    past = read_past(model, base, core, config)
    settings = _settings(past, training_config.data_settings(data), seed)
    if dry_run:
        return {**bag.plan(settings, out, options=options, progress=progress), "command": "update"}
    bag.claim(out, "update", settings, force=options.force, more={"updates": _identity(past.model)})
    if past.core is None:
        note("no core set is known: what the model learned before is kept by the merge alone")
    with only_our_words():
        sets = bag.read_sets(settings, out, options, progress, note)
        job = _job(sets, settings, out)
        done = bag.train_member(settings, sets, job, options, progress, out)
        new = [each for each in sets if each.name not in _names_of(past.core)]
        _keep_core(settings, sets, new, past, out / bag.CORE)
        seen = None if past.rows is None else past.rows + sum(map(len, new))
        content = {
            **bag.training_lineage(settings, out, sets, {_UPDATE: done}),
            "rows_in_all": seen,
            "updated_model": past.model,
        }
        bag.merge_models(
            [Path(past.model), job.out],
            [1.0, 1.0],
            out,
            config=settings,
            method=_MERGE,
            parameters={},
            where=str(model),
            content=content,
            progress=progress,
        )
    full = None if seen is None else round(seen * (settings.epochs or 1))
    return bag.finish(out, "update", settings, options, began, {_UPDATE: done}, content, {"cost_full_retraining": full})


def read_past(
    model: str | Path, base: str | None = None, core: str | Path | None = None, config: str | Path | None = None
) -> Past:
    """What a model's lineage says, and what the user says instead.

    Raises:
        CuveeError: there is no lineage, and no `base`; or its core set is gone.
    """
    folder = _model_folder(Path(model))
    trained = _lineage(folder)
    if not trained and base is None:
        mend = "say --base, what it was fine-tuned from, and --core, some of its old data"
        raise CuveeError("does not say what it was trained from", where=str(model), mend=mend)
    if config is not None:
        settings = training_config.load(config)
    elif trained:
        settings = training_config.parse(str(trained["config_text"]), str(trained["config_where"]))
    else:
        settings = TrainingConfig(model=training_config.ModelSettings(str(base)), data=())
    if base is not None:
        settings = replace(settings, model=replace(settings.model, path=_absolute(base)))
    kept = trained.get("core") or {}
    where = Path(core) if core is not None else Path(kept["folder"]) / "data.yml" if kept else None
    if where is not None and not where.is_file():
        mend = "give it by --core, or train anew"
        raise CuveeError("the core set is gone", where=str(where), mend=mend)
    rows = trained.get("rows_in_all")
    return Past(str(folder), settings, where, rows, float(kept.get("percent", settings.core)))


def _model_folder(model: Path) -> Path:
    """A run's folder stands for the model in it; a name that is no folder is a hub id."""
    if (model / bag.MODEL / lineage.FILE).is_file() and not (model / "config.json").is_file():
        return (model / bag.MODEL).absolute()
    return model.absolute() if model.is_dir() else model


def _lineage(folder: Path) -> dict[str, Any]:
    if not (folder / lineage.FILE).is_file():
        return {}
    trained = lineage.read(folder).get("trained")
    return trained if isinstance(trained, dict) else {}


def _absolute(ref: str) -> str:
    return os.path.abspath(ref) if os.path.isdir(ref) else ref


def _identity(model: str) -> str:
    """The digest of a model's weights."""
    from merging.checkpoint import Checkpoint

    with Checkpoint.open(ModelRef.parse(model)) as checkpoint:
        return lineage.weights_digest(checkpoint)


def _settings(past: Past, new: Sequence[DataSettings], seed: int | None) -> TrainingConfig:
    """The model's own settings on new data and core set, in one model; names that clash get a number."""
    old = training_config.data_settings(past.core) if past.core is not None else ()
    taken = {each.name for each in old}
    renamed = []
    for each in new:
        name, number = each.name, 2
        while name in taken:
            name, number = f"{each.name}-{number}", number + 1
        taken.add(name)
        renamed.append(replace(each, name=name))
    config = replace(past.config, data=(*old, *renamed), bags=(), evaluate=None)
    return config if seed is None else replace(config, seed=seed)


def _names_of(core: Path | None) -> set[str]:
    return {each.name for each in training_config.data_settings(core)} if core is not None else set()


def _job(sets: Sequence[TrainingSet], config: TrainingConfig, out: Path) -> Job:
    rows = {each.name: np.arange(len(each), dtype=np.int64) for each in sets}
    return Job(_UPDATE, rows, 1.0, config.seed, out / bag.WORK / _UPDATE, out / bag.MEMBERS / _UPDATE)


def _keep_core(
    config: TrainingConfig, sets: Sequence[TrainingSet], new: Sequence[TrainingSet], past: Past, folder: Path
) -> None:
    """The old core set and the same share of the new data."""
    if (folder / "data.yml").is_file() or not past.percent:
        return
    rows: dict[str, Any] = {each.name: np.arange(len(each)) for each in sets}
    rows |= bag.draw(new, past.percent, (config.seed, _UPDATE_DRAW))
    write_rows(sets, rows, folder)
