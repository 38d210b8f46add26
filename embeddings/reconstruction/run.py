"""A pre-training from its configuration to an embedding model: stages one after the other, then the export.

Its folder is that of `run_folder`, and the same command on it makes only what is missing.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embeddings.reconstruction.config import PretrainingConfig
from embeddings.reconstruction.contrastive import check_contrastive, train_contrastive
from embeddings.reconstruction.export import linked_copy, write_embedding_model
from embeddings.reconstruction.run_folder import (
    COMMAND,
    CONTRASTIVE,
    DATA,
    LANGUAGE_MODEL,
    METRICS,
    MODEL,
    WORK,
    check_claim,
    claim,
)
from embeddings.reconstruction.stages import (
    Data,
    Opened,
    Stages,
    help_train,
    jobs_of,
    lineage_of,
    read_data,
    train_stages,
    try_out,
)
from embeddings.reconstruction.train import plan_of
from embeddings.training import metrics
from embeddings.training.curves import write_curves
from embeddings.training.options import Options, refuse_device
from embeddings.training.run_folder import at_work, planned_of, summary_of
from embeddings.training.train import Trained
from merging import lineage
from merging.loading import only_our_words
from merging.output import write_whole
from merging.progress import Note, Work


def pretrain_run(
    config: PretrainingConfig,
    run: str | Path,
    *,
    options: Options | None = None,
    progress: Work | None = None,
    note: Note | None = None,
) -> dict[str, Any]:
    """Trains the stages of a configuration and writes what came of them; what is done already is not done again.

    Returns:
        What `cuvee pretrain --json` prints.

    Raises:
        CuveeError: data or settings that cannot be, or a folder that holds another run.
    """
    began = time.perf_counter()
    run, options = Path(run).absolute(), options or Options()
    progress, note = progress or (lambda what, done, total: None), note or (lambda line: None)
    refuse_device(options)
    if options.team.rank:
        return _help(config, run, options)
    check_claim(run, config, force=options.force)
    with at_work(run), only_our_words():
        claim(run, config, force=options.force)
        opened = Opened(config, "cpu" if options.processes > 1 else options.device)
        data = read_data(config, opened.reader(), run / DATA, progress, note, fresh=options.force)
        images = data.reader.processor
        check_contrastive(config, data.sets, images, run / MODEL, run / CONTRASTIVE, force=options.force)
        jobs = jobs_of(config, data, run)
        trained = train_stages(Stages(config, run, opened, jobs, options, progress, note))
        write_curves(run / METRICS)
        if not (run / LANGUAGE_MODEL).exists():
            linked_copy(jobs[-1].out, run / LANGUAGE_MODEL)
        if not (run / MODEL).exists():
            stages = {name: asdict(done) for name, done in trained.items()}
            write_embedding_model(
                run / LANGUAGE_MODEL,
                run / MODEL,
                config.model,
                bidirectional=config.bidirectional,
                max_length=config.max_length,
                content={"command": COMMAND, **lineage_of(config), "stages": stages},
            )
        after = train_contrastive(config, run / MODEL, run / CONTRASTIVE, options=options, progress=progress, note=note)
        if after is None:
            options.team.leave()
        return _finish(config, run, options, began, trained, data, after)


def _help(config: PretrainingConfig, run: Path, options: Options) -> dict[str, Any]:
    """What a process of a team does that is not the first: it trains with it."""
    help_train(config, run, options)
    out = run / CONTRASTIVE
    after = train_contrastive(
        config, run / MODEL, out, options=options, progress=lambda *_: None, note=lambda line: None
    )
    if after is None:
        options.team.leave()
    return {}


def plan(
    config: PretrainingConfig, run: str | Path, *, options: Options | None = None, progress: Work | None = None
) -> dict[str, Any]:
    """What `pretrain_run` would do, after all of the data was read and checked and the model opened; nothing is written.

    Raises:
        CuveeError: as `pretrain_run`.
    """
    options, progress = options or Options(), progress or (lambda what, done, total: None)
    run = Path(run).absolute()
    refuse_device(options)
    check_claim(run, config, force=options.force)
    with tempfile.TemporaryDirectory() as scratch, only_our_words():
        opened = Opened(config, options.device)
        data = read_data(config, opened.reader(), Path(scratch), progress, lambda line: None)
        images = data.reader.processor
        check_contrastive(config, data.sets, images, run / MODEL, run / CONTRASTIVE, force=options.force)
        jobs = jobs_of(config, data, run)
        for job in jobs:
            try_out(job)
        plans = {job.stage.name: plan_of(job.stage, job.materials, job.seed) for job in jobs}
        planned = planned_of(COMMAND, run, config.seed, options, plans, data.all)
        return {**planned, "objective": config.objective, "held_out": len(data.held)}


def _finish(
    config: PretrainingConfig,
    run: Path,
    options: Options,
    began: float,
    trained: Mapping[str, Trained],
    data: Data,
    after: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Writes the run's cuvee.json; what the command prints."""
    shutil.rmtree(run / WORK, ignore_errors=True)
    measured = [line for line in metrics.read(run / METRICS) if "held_out" in line]
    summary = {
        **summary_of(COMMAND, run, config.seed, options, began, trained),
        "objective": config.objective,
        "loss": list(trained.values())[-1].loss,
        "held_out": measured[-1]["held_out"] if measured else {},
        **({"contrastive": dict(after), "model": after["model"]} if after else {}),
    }
    told = {
        found.name: {
            "digest": found.digest,
            "rows": len(found),
            "held_out": len(data.held.rows[found.name]),
            **({"revision": found.settings.revision} if found.settings.hub is not None else {}),
        }
        for found in data.all
    }
    content = {**summary, "base": config.model.path, "config": config.plain(), "data": told, "state": "done"}
    write_whole(run / lineage.FILE, lineage.text(content))
    return summary
