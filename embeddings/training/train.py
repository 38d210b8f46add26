"""Training one model: a schedule's steps over data sets, one after another; killed and run again, it goes on.

While it is at work, its checkpoint and its metrics lie in a folder of their own; the model appears in `out` when it is
done. AdamW, a learning rate that rises linearly over the warm-up and falls linearly to zero, no weight decay on biases
and norms: as transformers' Trainer, so that results can be compared.
"""

from __future__ import annotations

import os
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from embeddings.training import checkpointing, schedule, step
from embeddings.training.batch import build_batch, objectives
from embeddings.training.config import TrainingConfig
from embeddings.training.curves import write_curves
from embeddings.training.data import TrainingSet
from embeddings.training.metrics import Metrics, Sink, last_loss
from embeddings.training.optimizer import adamw, rate
from embeddings.training.schedule import Part, Schedule
from embeddings.training.team import ALONE, Team
from merging import lineage
from merging.errors import CuveeError
from merging.output import staged
from merging.progress import Work

if TYPE_CHECKING:
    import torch

    from embeddings.training.backbone import Backbone

#: Scores of the model as it is, by task.
Evaluate = Callable[["Backbone"], Mapping[str, float]]

METRICS, ROWS = "metrics.jsonl", "rows.npz"
#: Steps between two lines of the metrics.
LOG_EVERY = 10
_LAST = 50  # steps whose mean loss is the run's
_PACKAGES = ("torch", "transformers", "sentence-transformers", "numpy")
#: Settings that change no member's weights …
AFTER_TRAINING = ("merge", "merge_weights", "search", "core", "save_every", "evaluate")
#: … and those that a member's rows stand for.
_OF_THE_RUN = (*AFTER_TRAINING, "bags", "data", "images")


@dataclass(frozen=True)
class Job:
    """One model to train.

    Attributes:
        name: in progress, logs and errors.
        rows: by data set, (rows,) indices of what it is trained on; each once an epoch.
        share: of the configuration's steps, if that counts steps and not epochs.
        seed: of order and dropout.
        work: where checkpoint and metrics lie while it is trained.
        out: where the model goes.
    """

    name: str
    rows: Mapping[str, NDArray[np.int64]]
    share: float
    seed: int
    work: Path
    out: Path

    @property
    def digest(self) -> str:
        """Of the rows."""
        digest = xxhash.xxh3_128()
        for name, rows in sorted(self.rows.items()):
            digest.update(name.encode() + np.ascontiguousarray(rows, np.int64).tobytes())
        return str(digest.hexdigest())


@dataclass(frozen=True)
class Trained:
    """What a training took and came to.

    Attributes:
        steps: of the optimiser.
        rows: that went through the model, counted as often as they did.
        seconds: of the training's steps, in all sessions.
        loss: mean of the last steps.
    """

    steps: int
    rows: int
    seconds: float
    loss: float


def train(
    config: TrainingConfig,
    sets: Sequence[TrainingSet],
    job: Job,
    open_backbone: Callable[[], Backbone],
    *,
    force: bool = False,
    progress: Work | None = None,
    evaluate: Evaluate | None = None,
    sinks: Callable[[], Sequence[Sink]] = tuple,
    content: Mapping[str, Any] | None = None,
    team: Team = ALONE,
) -> Trained:
    """Trains a model and writes it to `job.out`, unless that was done already; a checkpoint is gone on from.

    Args:
        open_backbone: opens the model that training starts from.
        force: train again what is there.
        evaluate: called every `config.evaluate.every` steps.
        sinks: who is told of the metrics besides the file; asked when training begins.
        content: of cuvee.json besides what is known here.
        team: of processes that call this with the same; the first of them writes.

    Raises:
        CuveeError: the folder holds a model made otherwise, a setting that cannot be, or a loss that is not finite.
    """
    progress = progress or (lambda what, done, total: None)
    plan = schedule_of(config, sets, job)
    made_by = _made_by(config, sets, job)
    if job.out.exists() and not force:
        done = _known(job.out, made_by)
        progress(f"train {job.name}", done.steps, done.steps)
        return done
    losses = objectives(config, sets)
    backbone = open_backbone()
    optimizer = adamw(backbone, config.learning_rate, config.weight_decay)
    folder = job.work / "checkpoint"
    state = checkpointing.load_together(folder, backbone, optimizer, team) if not force else None
    if state is not None and state["made_by"] != made_by:
        mend = "choose another folder, or add --force to begin anew"
        raise CuveeError("holds the checkpoint of another training", where=str(job.work), mend=mend)
    state = state or {"step": 0, "rows": 0, "seconds": 0.0, "made_by": made_by}
    metrics = Metrics(job.work / METRICS, from_step=state["step"], sinks=sinks()) if not team.rank else None
    session = _Session(config, sets, losses, plan, job, backbone, optimizer, metrics, progress, evaluate, team)
    done = session.run(state)
    if team.rank:
        return done
    with staged(job.out, force=force) as staging:
        backbone.save(staging)
        shutil.copyfile(job.work / METRICS, staging / METRICS)
        write_curves(staging / METRICS)
        write_row_numbers(staging / ROWS, job.rows)
        numbers = {"steps": done.steps, "rows": done.rows, "seconds": round(done.seconds, 1), "loss": done.loss}
        _write_lineage(staging, {**(content or {}), "training": numbers, "made_by": made_by})
    shutil.rmtree(job.work, ignore_errors=True)
    return done


@dataclass
class _Session:
    """The steps from a checkpoint to the end."""

    config: TrainingConfig
    sets: Sequence[TrainingSet]
    objectives: Sequence[Any]
    plan: Schedule
    job: Job
    backbone: Backbone
    optimizer: torch.optim.Optimizer
    metrics: Metrics | None
    progress: Work
    evaluate: Evaluate | None
    team: Team

    def run(self, state: dict[str, Any]) -> Trained:
        config, total = self.config, len(self.plan)
        compute = partial(step.loss_and_gradient, team=self.team)
        if config.schedule == "mgs":
            compute = partial(step.surgical_loss_and_gradient, tasks=self.plan.corpus.tasks, team=self.team)
        earlier, began, window = state["seconds"], time.perf_counter(), _Window(state.get("window"))
        rows = state["rows"]
        self.backbone.transformer.train()
        for number in range(state["step"], total):
            self.progress(f"train {self.job.name}", number, total)
            batch = build_batch(self._rows_of(self.plan[number]), self.sets, self.objectives)
            seed = (self.job.seed * 1_000_003 + number) % (1 << 40)
            self.optimizer.zero_grad(set_to_none=True)
            loss, parts = compute(self.backbone, batch, self.objectives, seed=seed, cache_tokens=config.gradient_cache)
            names = [self.sets[part.dataset].name for part in batch.parts]
            norm = self._update(number)
            if not self.team.rank:
                self._refuse_not_finite(float(loss), norm, names, number)
            rows += batch.rows
            window.add(float(loss), parts, names, batch.rows)
            done, seconds = number + 1, earlier + time.perf_counter() - began
            if done % LOG_EVERY == 0 or done == total:
                self._tell({"step": done, **window.line(), "grad_norm": norm, "learning_rate": self._rate(number)})
                window = _Window()
            self._evaluate(done)
            if config.save_every and done % config.save_every == 0 and done < total and not self.team.rank:
                state |= {"step": done, "rows": rows, "seconds": seconds, "window": window.state()}
                checkpointing.save(self.job.work / "checkpoint", self.backbone, self.optimizer, state)
        self.progress(f"train {self.job.name}", total, total)
        self.backbone.transformer.eval()
        seconds = earlier + time.perf_counter() - began
        loss = nan if self.team.rank else last_loss(self.job.work / METRICS, _LAST)
        return Trained(total, rows, seconds, loss)

    def _rows_of(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """The schedule counts rows of the bag; the sets those of the data."""
        return tuple(Part(p.dataset, self.job.rows[self.sets[p.dataset].name][p.rows]) for p in parts)

    def _rate(self, number: int) -> float:
        return rate(number, len(self.plan), self.config.learning_rate, self.config.warmup)

    def _update(self, number: int) -> float:
        """One step of the optimiser; the gradient's norm before it was clipped."""
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(number)
        limit = self.config.gradient_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(list(self.backbone.parameters()), limit)
        self.optimizer.step()
        return round(float(norm), 5)

    def _evaluate(self, done: int) -> None:
        settings = self.config.evaluate
        if self.team.rank or self.evaluate is None or settings is None:
            return
        if not (done % settings.every == 0 or done == len(self.plan)):
            return
        self.backbone.transformer.eval()
        self._tell({"step": done, "scores": dict(self.evaluate(self.backbone))})
        self.backbone.transformer.train()

    def _tell(self, line: Mapping[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(line)

    def _refuse_not_finite(self, loss: float, norm: float, names: Sequence[str], number: int) -> None:
        if not (np.isfinite(loss) and np.isfinite(norm)):
            what = "gradient" if np.isfinite(loss) else "loss"
            raise CuveeError(
                f"the {what} is not finite at step {number + 1}, on {', '.join(names)}",
                where=self.config.at("learning_rate"),
                mend="lower the learning rate, or look at the data",
            )


class _Window:
    """Steps since the last line of the metrics.

    Args:
        state: of those before the checkpoint that is gone on from.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._began, self._rows = time.perf_counter(), 0
        self._losses: list[float] = list(state["losses"]) if state else []
        self._by_set: dict[str, list[float]] = (
            {name: list(own) for name, own in state["by_set"].items()} if state else {}
        )

    def state(self) -> dict[str, Any]:
        return {"losses": self._losses, "by_set": self._by_set}

    def add(self, loss: float, parts: Sequence[float], names: Sequence[str], rows: int) -> None:
        self._losses.append(loss)
        self._rows += rows
        for name, own in zip(names, parts, strict=True):
            self._by_set.setdefault(name, []).append(own)

    def line(self) -> dict[str, Any]:
        return {
            "loss": round(float(np.mean(self._losses)), 6),
            "losses": {name: round(float(np.mean(own)), 6) for name, own in self._by_set.items()},
            "pairs_per_second": round(self._rows / (time.perf_counter() - self._began), 2),
        }


def schedule_of(config: TrainingConfig, sets: Sequence[TrainingSet], job: Job) -> Schedule:
    """The steps of a job."""
    steps = None if config.steps is None else max(1, round(config.steps * job.share))
    return schedule.build(
        config.schedule,
        [len(job.rows[each.name]) for each in sets],
        [each.type for each in sets],
        [each.settings.batch_size or config.batch_size for each in sets],
        [each.settings.weight for each in sets],
        epochs=config.epochs,
        steps=steps,
        seed=job.seed,
        where=config.at("schedule"),
    )


def _made_by(config: TrainingConfig, sets: Sequence[TrainingSet], job: Job) -> dict[str, Any]:
    """All that the model's weights follow from; plain, as JSON gives it back."""
    import json

    settings = {key: value for key, value in config.plain().items() if key not in _OF_THE_RUN}
    data = {
        each.name: {
            "digest": each.digest,
            "type": each.type,
            "weight": each.settings.weight,
            "batch_size": each.settings.batch_size,
            "prompt": None if each.settings.prompt is None else dict(each.settings.prompt),
            "loss": None if each.settings.loss is None else vars(replace(each.settings.loss, where="")),
            "rows": len(job.rows[each.name]),
        }
        for each in sets
    }
    content = {"settings": settings, "data": data, "rows": job.digest, "seed": job.seed, "share": job.share}
    plain: dict[str, Any] = json.loads(json.dumps(content, default=dict))
    return plain


def write_row_numbers(file: Path, rows: Mapping[str, NDArray[np.int64]]) -> None:
    """What `np.load` reads, by data set; np.savez itself takes no array that is named as one of its arguments, "file"."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, numbers in rows.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, numbers, allow_pickle=False)


def _known(out: Path, made_by: Mapping[str, Any]) -> Trained:
    """What a finished training came to.

    Raises:
        CuveeError: it was another one.
    """
    past = lineage.read(out)
    if past.get("made_by") != made_by:
        mend = "choose another folder, or add --force to train again"
        raise CuveeError("was trained on other data or with other settings", where=str(out), mend=mend)
    numbers = past["training"]
    return Trained(int(numbers["steps"]), int(numbers["rows"]), float(numbers["seconds"]), float(numbers["loss"]))


def _write_lineage(folder: Path, content: Mapping[str, Any]) -> None:
    versions = lineage.versions(*_PACKAGES)
    lineage.write(folder, {"command": "train", **content, "versions": versions, "working_directory": os.getcwd()})
