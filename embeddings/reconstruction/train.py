"""One stage of a pre-training: steps of reconstruction from one language model to the next; killed and run again, it goes on.

While it is at work its checkpoint lies in a folder of its own; the language model appears in `out` when it is done. The
optimiser and its rate are those of `cuvee train`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embeddings.reconstruction.batch import Batch, Counts
from embeddings.reconstruction.config import StageSettings
from embeddings.reconstruction.data import Material
from embeddings.reconstruction.measure import Measure
from embeddings.reconstruction.objective import Objective
from embeddings.reconstruction.reader import Reader
from embeddings.training import checkpointing, metrics, schedule
from embeddings.training.metrics import Metrics, Sink
from embeddings.training.optimizer import adamw, rate
from embeddings.training.schedule import Part, Schedule
from embeddings.training.team import ALONE, Team
from embeddings.training.train import LOG_EVERY, Trained
from merging import lineage
from merging.errors import CuveeError
from merging.output import staged
from merging.progress import Work

if TYPE_CHECKING:
    import torch

    from embeddings.reconstruction.model import Reconstructor

_LAST = 50  # steps whose mean loss is the stage's
_PACKAGES = ("torch", "transformers", "numpy")


@dataclass(frozen=True)
class Job:
    """One stage to train.

    Attributes:
        materials: what it reads, a data set each.
        reader: of the model.
        measure: of what is held out.
        made_by: all that the weights follow from; plain, as JSON gives it back.
        before: steps of the stages before it: in the metrics, steps are counted through.
        seed: of order, masks and dropout.
        measure_every, save_every: steps; 0: not on the way.
        metrics: the run's file.
        work: where the checkpoint lies while it is trained.
        out: where the language model goes.
        where: the configuration's line of the learning rate, for errors.
    """

    stage: StageSettings
    objective: Objective
    materials: Sequence[Material]
    reader: Reader
    measure: Measure
    made_by: Mapping[str, Any]
    before: int
    seed: int
    measure_every: int
    save_every: int
    metrics: Path
    work: Path
    out: Path
    where: str


def plan_of(stage: StageSettings, materials: Sequence[Material], seed: int) -> Schedule:
    """The steps of a stage: batches of one data set each, all of them shuffled."""
    return schedule.build(
        "batch_level",
        [len(material.units) for material in materials],
        [material.type for material in materials],
        [material.settings.batch_size or stage.batch_size for material in materials],
        [material.settings.weight for material in materials],
        epochs=stage.epochs,
        steps=stage.steps,
        seed=seed,
        where=stage.where,
    )


def train(
    job: Job,
    open_model: Callable[[], Reconstructor],
    *,
    progress: Work,
    note: Callable[[str], None],
    sinks: Callable[[], Sequence[Sink]] = tuple,
    content: Mapping[str, Any] | None = None,
    team: Team = ALONE,
) -> Trained:
    """Trains a stage and writes its language model to `job.out`, unless that was done; a checkpoint is gone on from.

    Args:
        open_model: opens what the stage begins with.
        note: told what is measured.
        sinks: who is told of the metrics besides the file; asked when training begins.
        content: of cuvee.json besides what is known here.
        team: of processes that call this with the same; the first of them writes and tells.

    Raises:
        CuveeError: the folder holds another stage's model, or a loss that is not finite.
    """
    if job.out.exists():
        done = known(job.out, job.made_by)
        progress(f"pretrain {job.stage.name}", done.steps, done.steps)
        return done
    model = open_model()
    optimizer = adamw(model, job.stage.learning_rate, job.stage.weight_decay)
    state = checkpointing.load_together(job.work / "checkpoint", model, optimizer, team)
    if state is not None and state["made_by"] != job.made_by:
        mend = "choose another folder, or add --force to begin anew"
        raise CuveeError("holds the checkpoint of another training", where=str(job.work), mend=mend)
    state = state or {"step": 0, "rows": 0, "tokens": 0, "seconds": 0.0, "last": [], "made_by": dict(job.made_by)}
    written = Metrics(job.metrics, from_step=job.before + state["step"], sinks=sinks()) if not team.rank else None
    done = _Session(job, model, optimizer, written, progress, note, team).run(state)
    if team.rank:
        return done
    with staged(job.out) as staging:
        model.save_language_model(staging)
        versions = lineage.versions(*_PACKAGES)
        told = {
            "training": asdict(done),
            "made_by": job.made_by,
            "versions": versions,
            "working_directory": os.getcwd(),
        }
        lineage.write(staging, {"command": "pretrain", "stage": job.stage.name, **(content or {}), **told})
    shutil.rmtree(job.work, ignore_errors=True)
    return done


def known(out: Path, made_by: Mapping[str, Any]) -> Trained:
    """What a finished stage came to.

    Raises:
        CuveeError: it was another one.
    """
    past = lineage.read(out)
    if past.get("made_by") != made_by:
        mend = "choose another folder, or add --force to train again"
        raise CuveeError("was trained on other data or with other settings", where=str(out), mend=mend)
    return Trained(**past["training"])


@dataclass
class _Session:
    """The steps from a checkpoint to the end."""

    job: Job
    model: Reconstructor
    optimizer: torch.optim.Optimizer
    metrics: Metrics | None
    progress: Work
    note: Callable[[str], None]
    team: Team

    def run(self, state: dict[str, Any]) -> Trained:
        job, stage = self.job, self.job.stage
        plan = plan_of(stage, job.materials, job.seed)
        total, first = len(plan), state["step"]
        earlier, began = state["seconds"], time.perf_counter()
        window, last = _Window.of(state.get("window")), list(state["last"])
        if self.team.rank:  # what was added up before is the first process's
            window, last = _Window(), [0.0] * len(last)
        rows, tokens = state["rows"], state["tokens"]
        self.model.module.train()
        if not first:
            self._measure(0)
        batches = self._batches(plan, first) if first < total else {}
        for number in range(first, total):
            self.progress(f"pretrain {stage.name}", number, total)
            now = rate(number, total, stage.learning_rate, stage.warmup)
            whole = self._whole(batches)
            numbers, norm = self._step(batches, whole, number, now)
            rows += sum(len(part.rows) for part in plan[number])
            tokens += whole.tokens
            names = sorted({job.materials[part.dataset].name for part in plan[number]})
            batches = self._batches(plan, number + 1) if number + 1 < total else {}  # while a GPU is at the step
            self._refuse_not_finite(norm := float(norm), names, number)
            window.add(numbers, whole.tokens)
            last = [*last, *([numbers.get("loss", 0.0)] if whole.predictions else [])][-_LAST:]
            done, seconds = number + 1, earlier + time.perf_counter() - began
            if done % LOG_EVERY == 0 or done == total:
                line = {"grad_norm": round(norm, 5), "learning_rate": now}
                self._write({"step": job.before + done, "stage": stage.name, **window.line(self.team), **line})
                window = _Window()
            if done == total or (job.measure_every and done % job.measure_every == 0):
                self._measure(done)
            if job.save_every and done % job.save_every == 0 and done < total:
                kept = {"step": done, "rows": rows, "tokens": tokens, "seconds": seconds}
                state |= {**kept, "last": self._added_up(last), "window": window.state(self.team)}
                if not self.team.rank:
                    checkpointing.save(job.work / "checkpoint", self.model, self.optimizer, state)
        self.progress(f"pretrain {stage.name}", total, total)
        self.model.module.eval()
        loss = round(float(np.mean(self._added_up(last))), 6) if last else nan
        return Trained(total, rows, round(earlier + time.perf_counter() - began, 1), loss)

    def _batches(self, plan: Schedule, number: int) -> dict[int, Batch]:
        """This process's parts of a step, by their places in it: as many rows each as go through the model at once.

        Drawn by seed, step and place alone, so that it does not matter which process has a part.
        """
        job, team = self.job, self.team
        draw = np.random.default_rng([job.seed, 4, number])
        examples = [example for part in plan[number] for example in self._examples(part, draw)]
        size = min(job.stage.micro_batch or len(examples), -(-len(examples) // team.size))

        def length(example: Any) -> int:
            return len(example.source) + len(example.target or ())

        if size < len(examples):  # those of like length together: less padding
            examples.sort(key=length)
        parts = [examples[start : start + size] for start in range(0, len(examples), size)]
        return {
            place: job.objective.collate(parts[place], job.reader, np.random.default_rng([job.seed, 5, number, place]))
            for place in team.share([sum(map(length, part)) for part in parts])
        }

    def _whole(self, batches: Mapping[int, Batch]) -> Counts:
        """What a step's means are over: its parts in all processes."""
        import torch

        counts = torch.tensor(sum((batch.counts for batch in batches.values()), Counts()).values())
        self.team.add_up(counts)
        return Counts(*counts.tolist())

    def _examples(self, part: Part, draw: np.random.Generator) -> Iterator[Any]:
        material = self.job.materials[part.dataset]
        return (material.example(int(material.units[row]), draw) for row in part.rows)

    def _step(
        self, batches: Mapping[int, Batch], whole: Counts, number: int, learning_rate: float
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """One step of the optimiser: what these parts add to its numbers, means over all that is predicted, and the
        gradient's norm before it was clipped; scalars on the device.
        """
        import torch

        self.optimizer.zero_grad(set_to_none=True)
        device = self.model.device
        numbers: dict[str, Any] = {}
        devices = [device.index or 0] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            for place, batch in batches.items():
                if not len(batch.labels):  # texts of one token: nothing is before it to predict it
                    continue
                # Dropout knows no generator but the global one: a resumed run drops what the other would have.
                torch.manual_seed(((self.job.seed * 1_000_003 + number) % (1 << 40) << 12) + place)
                outcome = self.job.objective.loss(self.model, batch.to(device), whole)
                outcome.loss.backward()
                for name, value in {"loss": outcome.loss.detach(), **outcome.numbers}.items():
                    numbers[name] = numbers.get(name, 0.0) + value
        parameters = list(self.model.parameters())
        self.team.add_up_gradients(parameters)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        limit = self.job.stage.gradient_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        self.optimizer.step()
        return numbers, norm

    def _measure(self, done: int) -> None:
        """Writes what is measured, once: a run that was killed just afterwards finds it in the file."""
        if self.team.rank:
            return
        job = self.job
        step, name = job.before + done, job.stage.name
        if any(line.get("stage") == name and line["step"] == step and "held_out" in line for line in self._lines()):
            return
        found = job.measure(self.model)
        if found:
            self._write({"step": step, "stage": name, "held_out": found})
            self.note(_told(name, done, found))

    def _added_up(self, values: Sequence[Any]) -> list[float]:
        """Values of as many steps, each the sum over the processes."""
        return [sum(each) for each in zip(*self.team.gathered([float(value) for value in values]), strict=True)]

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(line)

    def _lines(self) -> list[dict[str, Any]]:
        return metrics.read(self.job.metrics)

    def _refuse_not_finite(self, norm: float, names: Sequence[str], number: int) -> None:
        if not np.isfinite(norm) and not self.team.rank:
            raise CuveeError(
                f"loss or gradient are not finite at step {number + 1} of {self.job.stage.name}, on {', '.join(names)}",
                where=self.job.where,
                mend="lower the learning rate, or look at the data",
            )


@dataclass
class _Window:
    """Steps since the last line of the metrics."""

    sums: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, state: Mapping[str, Any] | None) -> _Window:
        """With the steps before the checkpoint that is gone on from."""
        return cls(dict(state["sums"]), dict(state["counts"])) if state else cls()

    def state(self, team: Team) -> dict[str, Any]:
        """Of all processes: sums of what they add to each step, and in how many steps there was something."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for own, steps in team.gathered(({name: float(value) for name, value in self.sums.items()}, self.counts)):
            for name, value in own.items():
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = max(counts.get(name, 0), steps[name])
        return {"sums": sums, "counts": counts}

    def add(self, numbers: Mapping[str, Any], tokens: int) -> None:
        self.tokens += tokens
        for name, value in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double()
            self.counts[name] = self.counts.get(name, 0) + 1

    def line(self, team: Team) -> dict[str, Any]:
        found = self.state(team)
        means = {name: round(value / found["counts"][name], 6) for name, value in found["sums"].items()}
        seconds = time.perf_counter() - self.began
        return {**means, "tokens_per_second": round(self.tokens / seconds, 1)}


def _told(stage: str, done: int, found: Mapping[str, float]) -> str:
    """A line for the user."""
    shown = [f"loss {found['loss']:.3f}"] if "loss" in found else []
    shown += [f"{found['accuracy']:.1%} of the tokens"] if "accuracy" in found else []
    shown += [f"{found['blind_accuracy']:.1%} from EOS alone"] if "blind_accuracy" in found else []
    shown += [f"rank {found['rank']:.1f}"] if "rank" in found else []
    return f"{stage}, step {done}, held out: {', '.join(shown)}"
