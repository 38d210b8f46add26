"""Past: what a model's lineage says of its training, written by a run and read by an update."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embeddings.training import config as training_config
from embeddings.training.config import TrainingConfig
from embeddings.training.core_set import DATA_FILE
from embeddings.training.data import TrainingSet
from embeddings.training.run_folder import CORE, MODEL
from embeddings.training.search_settings import SearchSettings
from embeddings.training.train import Trained
from merging import lineage
from merging.errors import CuveeError
from merging.output import write_whole

_FORM = 1


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


def training_lineage(
    config: TrainingConfig, run: Path, sets: Sequence[TrainingSet], trained: Mapping[str, Trained]
) -> dict[str, Any]:
    """What an update needs to know of a model: where it came from, how it was trained, and its core set."""
    rows = {each.name: len(each) for each in sets}
    data = {each.name: {"digest": each.digest, "rows": rows[each.name], "type": each.type} for each in sets}
    for each in sets:
        if each.settings.hub is not None:
            data[each.name]["revision"] = each.settings.revision
    return {
        "form": _FORM,
        "base": config.model.path,
        "config": config.plain(),
        "config_text": config.text,
        "config_where": os.path.abspath(config.where),
        "core": {"folder": str(run / CORE), "percent": config.core} if config.core else None,
        "data": data,
        "rows_in_all": sum(rows.values()),
        "row_passes": sum(done.rows for done in trained.values()),
    }


def add_lineage(folder: Path, content: Mapping[str, Any]) -> None:
    """More of what a model's cuvee.json says."""
    past = lineage.read(folder)
    merged = {**past, "trained": dict(content)}
    write_whole(folder / lineage.FILE, lineage.text(merged))


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
            "images": (),
            "loss": training_config.LossSettings(**plain["loss"]),
            "merge": training_config.MergeSettings(**plain["merge"]),
            "search": _search_of(plain.get("search"), where),
            "bags": (),
            "evaluate": None,
        }
        return TrainingConfig(**plain, where=where, text=str(trained["config_text"]))
    except (KeyError, TypeError, ValueError) as error:
        mend = "give --base and --config"
        raise CuveeError(f"its lineage holds no settings to train with: {error}", where=where, mend=mend) from None


def _search_of(plain: Mapping[str, Any] | None, where: str) -> SearchSettings | None:
    return None if plain is None else SearchSettings(plain["said"], plain["near"], where)


def _core_of(model: Path, folder: Path) -> Path:
    """The core set that a lineage names, or the one that was moved together with the model."""
    moved = model.parent / CORE / DATA_FILE
    return moved if moved.is_file() and not (folder / DATA_FILE).is_file() else folder / DATA_FILE


def _model_folder(model: Path) -> Path:
    """A run's folder stands for the model in it; a name that is no folder is a hub id."""
    if (model / MODEL / lineage.FILE).is_file() and not (model / "config.json").is_file():
        return (model / MODEL).absolute()
    return model.absolute() if model.is_dir() else model


def _lineage(folder: Path) -> dict[str, Any]:
    if not (folder / lineage.FILE).is_file():
        return {}
    trained = lineage.read(folder).get("trained")
    return trained if isinstance(trained, dict) else {}


def _absolute(ref: str) -> str:
    return os.path.abspath(ref) if os.path.isdir(ref) else ref
