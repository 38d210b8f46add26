"""The stages of a pre-training: what each reads, learns by and is made by; trained here, by a team, or in processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from embeddings.reconstruction.cocoa import Bridge, WarmUp
from embeddings.reconstruction.config import PretrainingConfig, StageSettings
from embeddings.reconstruction.data import HeldOut, Material, Pairs, Sides, Texts, hold_out, read_sets
from embeddings.reconstruction.export import check_export
from embeddings.reconstruction.image_rows import ImageRows, read_image_rows
from embeddings.reconstruction.llm_ql import QueryLikelihood
from embeddings.reconstruction.measure import Measure
from embeddings.reconstruction.objective import Objective
from embeddings.reconstruction.reader import Reader
from embeddings.reconstruction.retromae import RetroMAE
from embeddings.reconstruction.run_folder import COMMAND, DATA, METRICS, STAGES, WORK
from embeddings.reconstruction.train import Job, plan_of, train
from embeddings.training.config import ModelSettings
from embeddings.training.curves import drawing
from embeddings.training.data import TrainingSet
from embeddings.training.disk import disk_errors
from embeddings.training.metrics import Sink, sinks
from embeddings.training.options import Options
from embeddings.training.team import ALONE, Team
from embeddings.training.train import Trained
from merging.errors import CuveeError
from merging.loading import only_our_words
from merging.progress import Note, Work

if TYPE_CHECKING:
    from embeddings.reconstruction.model import Reconstructor

_OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
    "warm_up": WarmUp,
    "bridge": Bridge,
    "query_likelihood": QueryLikelihood,
    "retromae": RetroMAE,
}
#: Stages of single texts; the others are of pairs.
_OF_TEXTS = ("warm_up", "retromae")


@dataclass(frozen=True)
class Stages:
    """The stages of a run, and how this process trains them."""

    config: PretrainingConfig
    run: Path
    opened: Opened
    jobs: Sequence[Job]
    options: Options
    progress: Work
    note: Note

    def train(self, name: str, team: Team = ALONE) -> Trained:
        """Trains a stage from what the one before it left, unless it is done."""
        place = next(place for place, job in enumerate(self.jobs) if job.stage.name == name)
        job, start = self.jobs[place], self.config.model
        if place:
            start = replace(start, path=str(self.jobs[place - 1].out), revision=None)

        def listeners() -> Sequence[Sink]:
            return [*sinks(self.options.logs, self.run, COMMAND), drawing(self.run / METRICS)]

        return train(
            job,
            lambda: self.opened.start(start, job.seed),
            progress=self.progress,
            note=self.note,
            sinks=listeners,
            content=lineage_of(self.config),
            team=team,
        )


def train_stages(stages: Stages) -> dict[str, Trained]:
    """Trains what is not done, one stage after the other: here, with those of the team, or in processes of their own."""
    options, missing = stages.options, [job.stage.name for job in stages.jobs if not job.out.exists()]
    if missing and options.processes > 1:
        from embeddings.training.workers import Task, train_side_by_side

        stages.opened.close()
        for name in missing:
            task = Task(name, partial(_train_in_process, stages.config, stages.run, name))
            train_side_by_side([task], stages.run, replace(options, workers=1), stages.progress, stages.note)
    elif options.team.size > 1:
        for name in missing:
            stages.train(options.team.told(name), options.team)
        options.team.told(None)
    found = {job.stage.name: stages.train(job.stage.name) for job in stages.jobs}
    stages.opened.close()
    return found


def help_train(config: PretrainingConfig, run: Path, options: Options) -> None:
    """Trains what the first process of the team does, together with it."""
    stages: Stages | None = None
    with disk_errors(run), only_our_words():
        while (name := options.team.told(None)) is not None:
            stages = stages or _as_read(config, run, options, lambda *_: None, lambda line: None)
            stages.train(name, options.team)


def _train_in_process(
    config: PretrainingConfig, run: Path, name: str, options: Options, progress: Work, note: Note
) -> None:
    """A task of `workers`."""
    _as_read(config, run, options, progress, note).train(name, options.team)


def _as_read(config: PretrainingConfig, run: Path, options: Options, progress: Work, note: Note) -> Stages:
    """The stages of a run whose first process has read the data."""
    opened = Opened(config, options.device)
    data = read_data(config, opened.reader(), run / DATA, lambda *_: None, lambda line: None)
    return Stages(config, run, opened, jobs_of(config, data, run), options, progress, note)


def lineage_of(config: PretrainingConfig) -> dict[str, Any]:
    """What a model's lineage says of where it comes from."""
    return {"base": config.model.path, "objective": config.objective, "config": config.plain()}


@dataclass(frozen=True)
class Data:
    """The data of a run."""

    sets: Sequence[TrainingSet]
    images: Sequence[ImageRows]
    held: HeldOut
    reader: Reader

    @property
    def all(self) -> Sequence[TrainingSet | ImageRows]:
        return [*self.sets, *self.images]


class Opened:
    """The models of a run, one at a time; what is read by the first is also what its training begins with."""

    def __init__(self, config: PretrainingConfig, device: str) -> None:
        self._config, self._device = config, device
        self._first: Reconstructor | None = self._open(config.model, config.seed)
        _refuse_lengths(config, self._first.places)
        where = config.model.where or config.where
        check_export(self._first, bidirectional=config.bidirectional, where=where)

    def reader(self) -> Reader:
        assert self._first is not None
        return self._first.reader()

    def start(self, settings: ModelSettings, seed: int) -> Reconstructor:
        first, self._first = self._first, None
        if first is not None and settings == self._config.model:
            return first
        del first
        return self._open(settings, seed)

    def close(self) -> None:
        self._first = None

    def _open(self, settings: ModelSettings, seed: int) -> Reconstructor:
        from embeddings.reconstruction.model import open_reconstructor

        config = self._config
        where = config.model.where or config.where
        return open_reconstructor(settings, attention=config.attention, device=self._device, where=where, seed=seed)


def read_data(
    config: PretrainingConfig, reader: Reader, cache: Path, progress: Work, note: Note, *, fresh: bool = False
) -> Data:
    sets = read_sets(config, reader, cache, progress, fresh=fresh)
    images = read_image_rows(config.images, reader, cache, config.seed, progress, fresh=fresh)
    found = Data(sets, images, hold_out(config, sets, images), reader)
    for line in (line for each in found.all for line in each.notes):
        note(line)
    return found


def jobs_of(config: PretrainingConfig, data: Data, run: Path) -> list[Job]:
    """The training of each stage; the weights of one follow from those before it too."""
    jobs: list[Job] = []
    before, past = 0, ""
    pattern, rows = "bidirectional" if config.bidirectional else "causal", _sides(config, data)
    for stage in config.stages:
        reader = replace(data.reader, pack=stage.pack, max_length=_lengths(config, stage))
        materials = _materials(config, stage, data, reader)
        objective = _OBJECTIVES[stage.name](**stage.parameters)
        made_by = _made_by(config, stage, data, past)
        job = Job(
            stage=stage,
            objective=objective,
            materials=materials,
            reader=reader,
            measure=Measure(objective, materials, rows, reader, pattern=pattern, seed=config.seed),
            made_by=made_by,
            before=before,
            seed=config.seed,
            measure_every=config.measure_every,
            save_every=config.save_every,
            metrics=run / METRICS,
            work=run / WORK / stage.name,
            out=run / STAGES / stage.name,
            where=stage.rate_where,
        )
        jobs.append(job)
        before += len(plan_of(stage, materials, config.seed))
        past = str(xxhash.xxh3_128_hexdigest(json.dumps(made_by, sort_keys=True).encode()))
    return jobs


def _materials(config: PretrainingConfig, stage: StageSettings, data: Data, reader: Reader) -> list[Material]:
    of_texts, held = stage.name in _OF_TEXTS, data.held.rows
    found: list[Material] = [
        Texts(each, held[each.name])
        if of_texts
        else Pairs(each, data.reader, held[each.name], stage.reads, config.max_length)
        for each in data.sets
    ]
    return [*found, *(each.of_stage(reader, held[each.name], warm_up=of_texts) for each in data.images)]


def _sides(config: PretrainingConfig, data: Data) -> list[Sides]:
    """What is embedded of what is held out."""
    held, longest = data.held.rows, max(config.max_length.values())
    reader = replace(data.reader, max_length={"source": longest, "target": longest})
    texts: list[Sides] = [Pairs(each, reader, held[each.name], "query", config.max_length) for each in data.sets]
    return [*texts, *(each.of_stage(reader, held[each.name], warm_up=False) for each in data.images)]


def _lengths(config: PretrainingConfig, stage: StageSettings) -> dict[str, int]:
    """Tokens of a source and of a target; those of either side where both are sources."""
    longest = max(config.max_length.values())
    if stage.name in _OF_TEXTS or stage.reads == "both":
        return {"source": longest, "target": longest}
    source, target = ("query", "document") if stage.reads == "query" else ("document", "query")
    return {"source": config.max_length[source], "target": config.max_length[target]}


def _refuse_lengths(config: PretrainingConfig, places: int | None) -> None:
    """Raises CuveeError where a stage's longest sequence has more tokens than the model has places."""
    for stage in config.stages:
        lengths = _lengths(config, stage)
        longest = lengths["source"]
        if stage.name != "warm_up":
            longest += lengths["target"] + (stage.name == "query_likelihood")  # and the query's own EOS
        if places is not None and longest > places:
            what = f"sequences of up to {longest} tokens do not fit into the model's {places} places"
            raise CuveeError(what, where=config.at("max_length"), mend="lower 'max_length'")


def _made_by(config: PretrainingConfig, stage: StageSettings, data: Data, past: str) -> dict[str, Any]:
    """All that a stage's weights follow from; plain, as JSON gives it back."""
    settings = {key: value for key, value in config.plain().items() if key not in ("stages", "data")}
    told = {
        found.name: {
            "digest": found.digest,
            "type": found.type,
            "weight": found.settings.weight,
            "batch_size": found.settings.batch_size,
            "prompt": None if found.settings.prompt is None else dict(found.settings.prompt),
            "held_out": data.held.rows[found.name].tolist(),
        }
        for found in data.all
    }
    own = {key: value for key, value in asdict(stage).items() if key not in ("where", "rate_where")}
    plain: dict[str, Any] = json.loads(json.dumps({"settings": settings, "stage": own, "data": told, "past": past}))
    return plain


def try_out(job: Job) -> None:
    """Raises what a stage's first batch would raise."""
    first = plan_of(job.stage, job.materials, job.seed)[0][0]
    material, draw = job.materials[first.dataset], np.random.default_rng(0)
    job.objective.collate([material.example(int(material.units[first.rows[0]]), draw)], job.reader, draw)
