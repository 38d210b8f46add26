"""Updates: a model learns new data and keeps what it knew, at a fraction of a new training (BOOM, arXiv 2602.05787).

An update model is trained from the base on the new data and a core set of the old, and merged into the existing model,
both with equal weight. The result has a core set of its own, the old one and as large a share of the new data, so that
updates chain. Its folder is laid out as that of `cuvee train`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.training import bag
from embeddings.training import config as training_config
from embeddings.training.config import DataSettings, TrainingConfig
from embeddings.training.data import TrainingSet
from embeddings.training.options import refuse_device
from embeddings.training.train import Job
from merging import lineage
from merging.errors import CuveeError
from merging.loading import only_our_words
from merging.progress import Work
from merging.recipe import Recipe
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
    progress: Work | None = None,
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
    refuse_device(options)
    if options.team.rank:
        return bag.help_train(settings, out, options)
    updates = _identity(past.model)
    bag.check_claim(out, "update", settings, force=options.force, more={"updates": updates})
    if dry_run:
        planned = bag.plan(
            settings,
            out,
            options=options,
            progress=progress,
            jobs=lambda sets: {_UPDATE: _job(sets, settings, out, past)},
        )
        return {**planned, "command": "update"}
    if past.core is None:
        note("no core set is known: what the model learned before is kept by the merge alone")
    with bag.at_work(out), only_our_words():
        bag.claim(out, "update", settings, force=options.force, more={"updates": updates})
        sets = bag.read_sets(settings, out, options, progress, note)
        job = _job(sets, settings, out, past)
        done = bag.train_jobs(settings, sets, {_UPDATE: job}, out, options, progress)[_UPDATE]
        old = _names_of(past.core)
        new = [each for each in sets if each.name not in old]
        if past.percent and (options.force or not (out / bag.CORE / "data.yml").is_file()):
            bag.write_core(sets, _core_rows(settings, sets, new, past), out / bag.CORE)
        seen = None if past.rows is None else past.rows + sum(map(len, new))
        content = {
            **bag.training_lineage(_for_all(settings, past, seen), out, sets, {_UPDATE: done}),
            "rows_in_all": seen,
            "updated_model": past.model,
        }
        recipe = Recipe(
            merge_method=_MERGE,
            models=[{"model": str(path), "parameters": {"weight": 1.0}} for path in (past.model, job.out)],
            dtype="float32",
            where=str(model),
        )
        bag.merge_models(recipe, [updates, bag.told_by(job.out)], out, settings.seed, content, progress)
        passes = settings.epochs or done.rows / sum(map(len, sets))
        full = None if seen is None else round(seen * passes)
        more = {"cost_full_retraining": full}
        return bag.finish(out, "update", settings, options, began, {_UPDATE: done}, content, more)


def read_past(
    model: str | Path, base: str | None = None, core: str | Path | None = None, config: str | Path | None = None
) -> Past:
    """What a model's lineage says, and what the user says instead.

    Raises:
        CuveeError: there is no lineage, and no `base`; or its core set is gone.
    """
    folder = _model_folder(Path(model))
    trained = _lineage(folder)
    if not trained and base is None and not folder.is_dir():
        mend = "check the spelling; of a model of the hub, say --base and --core"
        raise CuveeError("no such folder", where=str(model), mend=mend)
    if not trained and base is None:
        mend = "say --base, what it was fine-tuned from, and --core, some of its old data"
        raise CuveeError("does not say what it was trained from", where=str(model), mend=mend)
    if config is not None:
        settings = training_config.load(config)
    elif trained:
        settings = _settings_of(trained, str(folder))
    else:
        settings = TrainingConfig(model=training_config.ModelSettings(str(base)), data=(), where=str(model))
    if base is not None:
        settings = replace(settings, model=replace(settings.model, path=_absolute(base)))
    if os.path.isabs(settings.model.path) and not os.path.isdir(settings.model.path):
        raise CuveeError("the base is gone", where=settings.model.path, mend="say where it is now by --base")
    kept = trained.get("core") or {}
    where = Path(core) if core is not None else _core_of(folder, Path(kept["folder"])) if kept else None
    if where is not None and not where.is_file():
        mend = "give it by --core, or train anew"
        raise CuveeError("the core set is gone", where=str(where), mend=mend)
    rows = trained.get("rows_in_all")
    return Past(str(folder), settings, where, rows, float(kept.get("percent", settings.core)))


def _settings_of(trained: Mapping[str, Any], where: str) -> TrainingConfig:
    """The settings of a lineage; without its data, which may be gone by now.

    Raises:
        CuveeError: they cannot be read.
    """
    try:
        plain = dict(trained["config"])
        model = dict(plain["model"])
        if (adapters := model["lora"]) is not None:
            targets = adapters["targets"]
            fixed = targets if isinstance(targets, str) else tuple(targets)
            model["lora"] = training_config.LoraSettings(**{**adapters, "targets": fixed})
        plain |= {
            "model": training_config.ModelSettings(**model),
            "data": (),
            "loss": training_config.LossSettings(**plain["loss"]),
            "merge": training_config.MergeSettings(**plain["merge"]),
            "bags": (),
            "evaluate": None,
        }
        return TrainingConfig(**plain, where=where, text=str(trained["config_text"]))
    except (KeyError, TypeError, ValueError) as error:
        mend = "give --base and --config"
        raise CuveeError(f"its lineage holds no settings to train with: {error}", where=where, mend=mend) from None


def _core_of(model: Path, folder: Path) -> Path:
    """The core set that a lineage names, or the one that was moved together with the model."""
    moved = model.parent / bag.CORE / "data.yml"
    return moved if moved.is_file() and not (folder / "data.yml").is_file() else folder / "data.yml"


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
    taken = {each.name.lower() for each in old}  # files on some disks know no case
    renamed = []
    for each in new:
        name, number = each.name, 2
        while name.lower() in taken:
            name, number = f"{each.name}-{number}", number + 1
        taken.add(name.lower())
        renamed.append(replace(each, name=name))
    config = replace(past.config, data=(*old, *renamed), bags=(), evaluate=None, core=past.percent)
    return config if seed is None else replace(config, seed=seed)


def _names_of(core: Path | None) -> set[str]:
    return {each.name for each in training_config.data_settings(core)} if core is not None else set()


def _job(sets: Sequence[TrainingSet], config: TrainingConfig, out: Path, past: Past) -> Job:
    """The training on all rows; if the configuration counts steps, on its share of them."""
    rows = {each.name: np.arange(len(each), dtype=np.int64) for each in sets}
    share = sum(map(len, sets)) / past.rows if past.rows else 1.0
    return Job(_UPDATE, rows, share, config.seed, out / bag.WORK / _UPDATE, out / bag.MEMBERS / _UPDATE)


def _for_all(config: TrainingConfig, past: Past, seen: int | None) -> TrainingConfig:
    """The settings as if it had been trained on all rows at once: with as many steps more as there are rows more."""
    if config.steps is None or not past.rows or not seen:
        return config
    return replace(config, steps=max(1, round(config.steps * seen / past.rows)))


def _core_rows(
    config: TrainingConfig, sets: Sequence[TrainingSet], new: Sequence[TrainingSet], past: Past
) -> dict[str, NDArray[np.int64]]:
    """The old core set, and the same share of the new data."""
    rows = {each.name: np.arange(len(each), dtype=np.int64) for each in sets}
    return rows | bag.draw(new, past.percent, (config.seed, _UPDATE_DRAW))
