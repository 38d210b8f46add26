"""Members: the models of a run, trained one after another, side by side, or by a team of processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embeddings.training.config import TrainingConfig
from embeddings.training.curves import drawing
from embeddings.training.data import TrainingSet, load_sets
from embeddings.training.disk import disk_errors
from embeddings.training.draws import Member, draw_members
from embeddings.training.image_sets import load_image_sets
from embeddings.training.metrics import Sink, sinks
from embeddings.training.options import Options
from embeddings.training.run_folder import DATA, MEMBERS, MODEL, WORK
from embeddings.training.team import ALONE
from embeddings.training.train import METRICS, Job, Trained, train
from merging.loading import only_our_words
from merging.progress import Note, Work

if TYPE_CHECKING:
    from embeddings.training.backbone import Backbone


def jobs_by_name(config: TrainingConfig, sets: Sequence[TrainingSet], run: Path) -> dict[str, Job]:
    """The training of each member."""
    return {member.name: _job(member, run, bool(config.bags)) for member in draw_members(config, sets)}


def train_jobs(
    config: TrainingConfig,
    sets: Sequence[TrainingSet],
    jobs: Mapping[str, Job],
    run: Path,
    options: Options,
    progress: Work,
) -> dict[str, Trained]:
    """Trains what is not done: here, with those of the team, or in processes of its own."""
    missing = [job for job in jobs.values() if options.force or not job.out.exists()]
    if missing and (options.ray or options.processes > 1 or (options.workers > 1 and len(missing) > 1)):
        from embeddings.training import ray_members, workers

        tasks = [workers.Task(job.name, partial(_train_in_process, config, run, job)) for job in missing]
        carry_out = ray_members.train_by_ray if options.ray else workers.train_side_by_side
        carry_out(tasks, run, options, progress)
        options = replace(options, force=False)
    elif options.team.size > 1:
        for job in missing:
            train_member(config, sets, options.team.told(job), options, progress, run)
        options.team.told(None)
        options.team.leave()
        options = replace(options, force=False, team=ALONE)
    return {name: train_member(config, sets, job, options, progress, run) for name, job in jobs.items()}


def help_train(config: TrainingConfig, run: Path, options: Options) -> dict[str, Any]:
    """Trains what the first process of the team does, together with it."""
    sets: Sequence[TrainingSet] | None = None
    with disk_errors(run), only_our_words():
        while (job := options.team.told(None)) is not None:
            sets = sets or _what_was_read(config, run, options)
            train_member(config, sets, job, options, lambda *_: None, run)
    options.team.leave()
    return {}


def _train_in_process(
    config: TrainingConfig, run: Path, job: Job, options: Options, progress: Work, note: Note
) -> Trained:
    """A task of `workers`."""
    return train_member(config, _what_was_read(config, run, options), job, options, progress, run)


def _what_was_read(config: TrainingConfig, run: Path, options: Options) -> Sequence[TrainingSet]:
    return read_sets(config, run, replace(options, force=False), lambda *_: None, lambda line: None)


def train_member(
    config: TrainingConfig,
    sets: Sequence[TrainingSet],
    job: Job,
    options: Options,
    progress: Work,
    run: Path,
) -> Trained:
    """Trains one member."""
    from embeddings.training.monitor import scorer

    watches = (options.force or not job.out.exists()) and not options.team.rank

    def listeners() -> list[Sink]:
        return [*sinks(options.logs, run, job.name), drawing(job.work / METRICS)]

    return train(
        config,
        sets,
        job,
        lambda: open_backbone(config, options.device, job.seed),
        force=options.force,
        progress=progress,
        evaluate=scorer(config.evaluate, options.device) if watches and config.evaluate else None,
        sinks=listeners,
        content={"base": config.model.path, "config": config.plain(), "device": options.device},
        team=options.team,
    )


def read_sets(config: TrainingConfig, run: Path, options: Options, progress: Work, note: Note) -> list[TrainingSet]:
    """The data as arrays, from the run's cache or their sources."""
    tokenizer = Tokenizer(config)
    sets = load_sets(
        config,
        tokenizer,
        run / DATA,
        progress,
        transformer=lambda: tokenizer.backbone.transformer,
        fresh=options.force,
    )
    if config.images:
        reader = tokenizer.backbone.images
        sets += load_image_sets(config, tokenizer, reader, run / DATA, progress, fresh=options.force)
    for line in (line for each in sets for line in each.notes):
        note(line)
    return sets


class Tokenizer:
    """`data.Tokenize` by the configuration's backbone, which is opened when it is needed first."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self._backbone: Backbone | None = None

    @property
    def backbone(self) -> Backbone:
        if self._backbone is None:
            self._backbone = open_backbone(self._config, "cpu", 0)
        return self._backbone

    @property
    def digest(self) -> str:
        return self.backbone.tokenizer_digest

    def prompt_of(self, side: str | None) -> str | None:
        return self.backbone.prompt_of(side)

    def __call__(self, texts: list[str], side: str, prompt: str | None) -> list[list[int]]:
        return self.backbone.tokenize(texts, side, prompt)


def open_backbone(config: TrainingConfig, device: str, seed: int) -> Backbone:
    """What every member starts from."""
    from embeddings.training import backbone

    where = config.model.where or config.where
    return backbone.open_backbone(config.model, max_length=config.max_length, device=device, where=where, seed=seed)


def _job(member: Member, run: Path, bagged: bool) -> Job:
    out = run / MEMBERS / member.name if bagged else run / MODEL
    return Job(member.name, member.rows, member.percent / 100, member.seed, run / WORK / member.name, out)
