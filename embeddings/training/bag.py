"""BOOM: members trained on bags of the corpus, merged into one model (arXiv 2602.05787).

A run's folder (`run_folder`) holds all that it made, and the same command on it makes only what is missing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embeddings.training.batch import objectives
from embeddings.training.config import TrainingConfig
from embeddings.training.core_set import keep_core
from embeddings.training.data import TrainingSet
from embeddings.training.draws import Member, draw_members
from embeddings.training.member_merge import look_ahead, merge_members, refuse_recipe
from embeddings.training.members import help_train, jobs_by_name, read_sets, train_jobs
from embeddings.training.options import Options, refuse_device
from embeddings.training.past import add_lineage, training_lineage
from embeddings.training.run_folder import CORE, MODEL, at_work, check_claim, claim, finish, planned_of
from embeddings.training.train import Job, Trained, schedule_of
from merging.loading import only_our_words
from merging.progress import Note, Work


def train_run(
    config: TrainingConfig,
    run: str | Path,
    *,
    options: Options | None = None,
    progress: Work | None = None,
    note: Note | None = None,
) -> dict[str, Any]:
    """Trains the members of a configuration and merges them; what is done already is not done again.

    Returns:
        What `cuvee train --json` prints; nothing in a process that is not the first of its team.

    Raises:
        CuveeError: data or settings that cannot be, or a folder that holds another run.
    """
    began = time.perf_counter()
    run, options = Path(run).absolute(), options or Options()
    progress, note = progress or (lambda what, done, total: None), note or (lambda line: None)
    refuse_device(options)
    if options.team.rank:
        return help_train(config, run, options)
    check_claim(run, "train", config, force=options.force)
    refuse_recipe(config, run)
    look_ahead(config, note)
    with at_work(run), only_our_words():
        claim(run, "train", config, force=options.force)
        sets = read_sets(config, run, options, progress, note)
        members = draw_members(config, sets)
        trained = train_jobs(config, sets, jobs_by_name(config, sets, run), run, options, progress)
        keep_core(config, sets, run / CORE, force=options.force)
        content = {
            **training_lineage(config, run, sets, trained),
            "members": {member.name: _told(member, trained[member.name]) for member in members},
        }
        found = None
        if config.bags:
            found = merge_members(config, members, run, content, options, progress, note)
        else:
            add_lineage(run / MODEL, content)
            if config.search is not None:
                note("one model has no weights to search: that is for bags, and for this model's updates")
        return finish(run, "train", config, options, began, trained, content, {"weights": found} if found else None)


def plan(
    config: TrainingConfig,
    run: str | Path,
    *,
    options: Options | None = None,
    progress: Work | None = None,
    note: Note | None = None,
    jobs: Callable[[Sequence[TrainingSet]], Mapping[str, Job]] | None = None,
) -> dict[str, Any]:
    """What `train_run` would do, after all of the data was read and checked; nothing is written.

    Args:
        jobs: of the data sets, if they are not the configuration's members.

    Raises:
        CuveeError: as `train_run`.
    """
    options, progress = options or Options(), progress or (lambda what, done, total: None)
    refuse_device(options)
    if jobs is None:
        check_claim(Path(run).absolute(), "train", config, force=options.force)
        refuse_recipe(config, Path(run).absolute())
        look_ahead(config, note or (lambda line: None))
    with tempfile.TemporaryDirectory() as scratch, only_our_words():
        sets = read_sets(config, Path(scratch), options, progress, lambda line: None)
        objectives(config, sets)
        named = jobs(sets) if jobs else jobs_by_name(config, sets, Path(run).absolute())
        schedules = {name: schedule_of(config, sets, job) for name, job in named.items()}
        return planned_of("train", Path(run).absolute(), config.seed, options, schedules, sets)


def _told(member: Member, done: Trained) -> dict[str, Any]:
    sizes = {name: len(rows) for name, rows in member.rows.items()}
    return {"percent": member.percent, "seed": member.seed, "sizes": sizes, **asdict(done)}
