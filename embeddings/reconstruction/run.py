"""A pre-training from its configuration to an embedding model: stages one after the other, then the export.

Its folder is that of `run_folder`, and the same command on it makes only what is missing.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from embeddings.reconstruction.cocoa import Bridge, WarmUp
from embeddings.reconstruction.config import PretrainingConfig, StageSettings
from embeddings.reconstruction.contrastive import check_contrastive, train_contrastive
from embeddings.reconstruction.data import HeldOut, Material, Pairs, Sides, Texts, hold_out, read_sets
from embeddings.reconstruction.export import check_export, linked_copy, write_embedding_model
from embeddings.reconstruction.image_rows import ImageRows, read_images
from embeddings.reconstruction.llm_ql import QueryLikelihood
from embeddings.reconstruction.measure import Measure
from embeddings.reconstruction.objective import Objective
from embeddings.reconstruction.reader import Reader
from embeddings.reconstruction.retromae import RetroMAE
from embeddings.reconstruction.run_folder import (
    COMMAND,
    CONTRASTIVE,
    DATA,
    LANGUAGE_MODEL,
    METRICS,
    MODEL,
    STAGES,
    WORK,
    check_claim,
    claim,
)
from embeddings.reconstruction.train import Job, plan_of, train
from embeddings.training import metrics
from embeddings.training.config import ModelSettings
from embeddings.training.data import TrainingSet
from embeddings.training.metrics import Sink, sinks
from embeddings.training.options import Options, refuse_device
from embeddings.training.run_folder import at_work
from embeddings.training.train import Trained
from merging import lineage
from merging.errors import CuveeError
from merging.loading import only_our_words
from merging.output import write_whole
from merging.progress import Work

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
#: Objectives whose models look to both sides.
_BIDIRECTIONAL = ("cocoa", "retromae")

Note = Callable[[str], None]


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
    check_claim(run, config, force=options.force)
    with at_work(run), only_our_words():
        claim(run, config, force=options.force)
        opened = _Opened(config, options.device)
        material = _read(config, opened.reader(), run / DATA, progress, note, fresh=options.force)
        check_contrastive(config, material.sets, run / MODEL, run / CONTRASTIVE, force=options.force)
        jobs = _jobs(config, material, run)
        content = {"base": config.model.path, "objective": config.objective, "config": config.plain()}
        trained: dict[str, Trained] = {}
        start = config.model
        for job in jobs:
            trained[job.stage.name] = train(
                job,
                lambda start=start, job=job: opened.start(start, job.seed),  # type: ignore[misc]
                progress=progress,
                note=note,
                sinks=lambda: _sinks(options, run),
                content=content,
            )
            start = replace(config.model, path=str(job.out), revision=None)
        opened.close()
        last = jobs[-1].out
        if not (run / LANGUAGE_MODEL).exists():
            linked_copy(last, run / LANGUAGE_MODEL)
        if not (run / MODEL).exists():
            own = {"command": COMMAND, **content, "stages": {name: asdict(done) for name, done in trained.items()}}
            write_embedding_model(
                run / LANGUAGE_MODEL,
                run / MODEL,
                config.model,
                bidirectional=config.objective in _BIDIRECTIONAL,
                max_length=config.max_length,
                content=own,
            )
        after = train_contrastive(config, run / MODEL, run / CONTRASTIVE, options=options, progress=progress, note=note)
        return _finish(config, run, options, began, trained, material, after)


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
        opened = _Opened(config, options.device)
        material = _read(config, opened.reader(), Path(scratch), progress, lambda line: None)
        check_contrastive(config, material.sets, run / MODEL, run / CONTRASTIVE, force=options.force)
        jobs = _jobs(config, material, run)
        for job in jobs:
            _try_out(job)
        plans = {job.stage.name: plan_of(job.stage, job.materials, job.seed) for job in jobs}
        return {
            "command": COMMAND,
            "dry_run": True,
            "objective": config.objective,
            "out": str(run),
            "seed": config.seed,
            "device": options.device,
            "cuvee_version": lineage.cuvee_version(),
            "members": {name: {"steps": len(steps)} for name, steps in plans.items()},
            "steps": sum(map(len, plans.values())),
            "cost": sum(len(part.rows) for steps in plans.values() for step in steps for part in step),
            "rows": {found.name: len(found) for found in material.all},
            "held_out": len(material.held),
        }


@dataclass(frozen=True)
class _Read:
    """The data of a run."""

    sets: Sequence[TrainingSet]
    images: Sequence[ImageRows]
    held: HeldOut
    reader: Reader

    @property
    def all(self) -> Sequence[TrainingSet | ImageRows]:
        return [*self.sets, *self.images]


class _Opened:
    """The models of a run, one at a time; what is read by the first is also what its training begins with."""

    def __init__(self, config: PretrainingConfig, device: str) -> None:
        self._config, self._device = config, device
        self._first: Reconstructor | None = self._open(config.model, config.seed)
        _refuse_lengths(config, self._first.places)
        where = config.model.where or config.where
        check_export(self._first, bidirectional=config.objective in _BIDIRECTIONAL, where=where)

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


def _read(
    config: PretrainingConfig, reader: Reader, cache: Path, progress: Work, note: Note, *, fresh: bool = False
) -> _Read:
    sets = read_sets(config, reader, cache, progress, fresh=fresh)
    images = read_images(config.images, reader, cache, config.seed, progress, fresh=fresh) if config.images else []
    found = _Read(sets, images, hold_out(config, sets, images), reader)
    for line in (line for each in found.all for line in each.notes):
        note(line)
    return found


def _jobs(config: PretrainingConfig, data: _Read, run: Path) -> list[Job]:
    """The training of each stage; the weights of one follow from those before it too."""
    jobs: list[Job] = []
    before, past = 0, ""
    for stage in config.stages:
        reader = replace(data.reader, pack=stage.pack, max_length=_lengths(config, stage))
        materials = _materials(config, stage, data, reader)
        objective = _OBJECTIVES[stage.name](**stage.parameters)
        rows = _sides(config, data)
        pattern = "bidirectional" if config.objective in _BIDIRECTIONAL else "causal"
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


def _materials(config: PretrainingConfig, stage: StageSettings, data: _Read, reader: Reader) -> list[Material]:
    of_texts, held = stage.name in _OF_TEXTS, data.held.rows
    found: list[Material] = [
        Texts(each, held[each.name])
        if of_texts
        else Pairs(each, data.reader, held[each.name], stage.reads, config.max_length)
        for each in data.sets
    ]
    return [*found, *(each.of_stage(reader, held[each.name], warm_up=of_texts) for each in data.images)]


def _sides(config: PretrainingConfig, data: _Read) -> list[Sides]:
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


def _made_by(config: PretrainingConfig, stage: StageSettings, data: _Read, past: str) -> dict[str, Any]:
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


def _try_out(job: Job) -> None:
    """Raises what a stage's first batch would raise."""
    first = plan_of(job.stage, job.materials, job.seed)[0][0]
    material, draw = job.materials[first.dataset], np.random.default_rng(0)
    job.objective.collate([material.example(int(material.units[first.rows[0]]), draw)], job.reader, draw)


def _sinks(options: Options, run: Path) -> list[Sink]:
    return sinks(options.logs, run, COMMAND)


def _finish(
    config: PretrainingConfig,
    run: Path,
    options: Options,
    began: float,
    trained: Mapping[str, Trained],
    data: _Read,
    after: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Writes the run's cuvee.json; what the command prints."""
    shutil.rmtree(run / WORK, ignore_errors=True)
    rows, seconds = sum(done.rows for done in trained.values()), sum(done.seconds for done in trained.values())
    measured = [line for line in metrics.read(run / METRICS) if "held_out" in line]
    summary: dict[str, Any] = {
        "command": COMMAND,
        "objective": config.objective,
        "out": str(run),
        "model": str(run / MODEL),
        "seconds": round(time.perf_counter() - began, 1),
        "seed": config.seed,
        "device": options.device,
        "cuvee_version": lineage.cuvee_version(),
        "members": {name: asdict(done) for name, done in trained.items()},
        "steps": sum(done.steps for done in trained.values()),
        "pairs_per_second": round(rows / seconds, 1) if seconds else 0.0,
        "loss": list(trained.values())[-1].loss,
        "cost": rows,
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
