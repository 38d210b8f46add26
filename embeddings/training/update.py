"""Updates: a model learns new data and keeps what it knew, at a fraction of a new training (BOOM, arXiv 2602.05787).

An update model is trained from the base on the new data and a core set of the old, and merged into the existing model,
both with equal weight. The result has a core set of its own, the old one and as large a share of the new data, so that
updates chain. Its folder is laid out as that of `cuvee train`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from embeddings.images.settings import of_both
from embeddings.training import config as training_config
from embeddings.training.bag import plan
from embeddings.training.config import DataSettings, ImageSettings, TrainingConfig
from embeddings.training.core_set import DATA_FILE, write_core
from embeddings.training.data import TrainingSet
from embeddings.training.draws import Rows, draw_new_core
from embeddings.training.member_merge import Merge, merge_models, told_by
from embeddings.training.members import help_train, read_sets, train_jobs
from embeddings.training.options import Options, refuse_device
from embeddings.training.past import Past, read_past, training_lineage
from embeddings.training.run_folder import CORE, MEMBERS, WORK, at_work, check_claim, claim, finish
from embeddings.training.train import Job
from merging import lineage
from merging.loading import only_our_words
from merging.progress import Note, Work
from merging.sources import ModelRef

_UPDATE = "update"
_MERGE = "multislerp"


def update_model(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    core: str | Path | None = None,
    config: str | Path | None = None,
    seed: int | None = None,
    options: Options | None = None,
    dry_run: bool = False,
    progress: Work | None = None,
    note: Note | None = None,
) -> dict[str, Any]:
    """Trains the update model on new data and core set, and merges it into `model`.

    Args:
        model: what `cuvee train` or `update` made, its run's folder or the model's own; or any other with `base`.
        data: the new data: a table, or a YAML with `data:` and `images:`.
        out: the run's folder.
        base, core, config: what training starts from, old data, settings; by default what the model's lineage says.

    Returns:
        What `cuvee update --json` prints; `cost_full_retraining` is None where nobody knows how much the old data were.

    Raises:
        CuveeError: a model without lineage and no `base`, data that cannot be, or a folder that holds something else.
    """
    began = time.perf_counter()
    out, options = Path(out).absolute(), options or Options()
    progress, note = progress or (lambda what, done, total: None), note or (lambda line: None)
    past = read_past(model, base, core, config)
    settings = _settings(past, *training_config.data_settings(data), seed)
    refuse_device(options)
    if options.team.rank:
        return help_train(settings, out, options)
    updates = _identity(past.model)
    check_claim(out, "update", settings, force=options.force, more={"updates": updates})
    if settings.search is not None:
        settings.search.look(_MERGE, {}, ModelRef.parse(past.model), note)
    if dry_run:
        planned = plan(
            settings,
            out,
            options=options,
            progress=progress,
            jobs=lambda sets: {_UPDATE: _job(sets, settings, out, past)},
        )
        return {**planned, "command": "update"}
    if past.core is None:
        note("no core set is known: what the model learned before is kept by the merge alone")
    with at_work(out), only_our_words():
        claim(out, "update", settings, force=options.force, more={"updates": updates})
        sets = read_sets(settings, out, options, progress, note)
        job = _job(sets, settings, out, past)
        done = train_jobs(settings, sets, {_UPDATE: job}, out, options, progress)[_UPDATE]
        old = {each.name for each in of_both(*_kept(past.core))}
        new = [each for each in sets if each.name not in old]
        if past.percent and (options.force or not (out / CORE / DATA_FILE).is_file()):
            write_core(sets, _core_rows(settings, sets, new, past), out / CORE)
        seen = None if past.rows is None else past.rows + sum(map(len, new))
        content = {
            **training_lineage(_for_all(settings, past, seen), out, sets, {_UPDATE: done}),
            "rows_in_all": seen,
            "updated_model": past.model,
        }
        inputs = (updates, told_by(job.out))
        merge = Merge(_MERGE, (past.model, str(job.out)), (1.0, 1.0), inputs, where=str(model))
        found = merge_models(merge, settings.search, out, settings.seed, content, options, progress, note)
        passes = settings.epochs or done.rows / sum(map(len, sets))
        full = None if seen is None else round(seen * passes)
        more = {"cost_full_retraining": full, **({"weights": found} if found else {})}
        return finish(out, "update", settings, options, began, {_UPDATE: done}, content, more)


def _identity(model: str) -> str:
    """The digest of a model's weights."""
    from merging.checkpoint import Checkpoint

    with Checkpoint.open(ModelRef.parse(model)) as checkpoint:
        return lineage.weights_digest(checkpoint)


def _settings(
    past: Past, new: Sequence[DataSettings], new_images: Sequence[ImageSettings], seed: int | None
) -> TrainingConfig:
    """The model's own settings on new data and core set, in one model; names that clash get a number."""
    old, old_images = _kept(past.core)
    taken = {each.name.lower() for each in of_both(old, old_images)}  # files on some disks know no case

    def renamed(each: DataSettings) -> DataSettings:
        name, number = each.name, 2
        while name.lower() in taken:
            name, number = f"{each.name}-{number}", number + 1
        taken.add(name.lower())
        return replace(each, name=name)

    data = (*old, *map(renamed, new))
    images = (*old_images, *(replace(own, data=renamed(own.data)) for own in new_images))
    search = past.config.search
    if search is not None:  # of two models, by the method of updates
        search = replace(search, said={key: said for key, said in search.said.items() if key not in ("vary", "start")})
        search.check(_MERGE, {}, ("existing", "update"), (0.5, 0.5), None)
    config = replace(past.config, data=data, images=images, bags=(), evaluate=None, search=search, core=past.percent)
    return config if seed is None else replace(config, seed=seed)


def _kept(core: Path | None) -> tuple[tuple[DataSettings, ...], tuple[ImageSettings, ...]]:
    """What a core set names."""
    return training_config.data_settings(core) if core is not None else ((), ())


def _job(sets: Sequence[TrainingSet], config: TrainingConfig, out: Path, past: Past) -> Job:
    """The training on all rows; if the configuration counts steps, on its share of them."""
    rows = {each.name: np.arange(len(each), dtype=np.int64) for each in sets}
    share = sum(map(len, sets)) / past.rows if past.rows else 1.0
    return Job(_UPDATE, rows, share, config.seed, out / WORK / _UPDATE, out / MEMBERS / _UPDATE)


def _for_all(config: TrainingConfig, past: Past, seen: int | None) -> TrainingConfig:
    """The settings as if it had been trained on all rows at once: with as many steps more as there are rows more."""
    if config.steps is None or not past.rows or not seen:
        return config
    return replace(config, steps=max(1, round(config.steps * seen / past.rows)))


def _core_rows(config: TrainingConfig, sets: Sequence[TrainingSet], new: Sequence[TrainingSet], past: Past) -> Rows:
    """The old core set, and the same share of the new data."""
    rows = {each.name: np.arange(len(each), dtype=np.int64) for each in sets}
    return {**rows, **draw_new_core(new, past.percent, config.seed)}
