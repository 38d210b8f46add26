"""Schedules: which rows of which data sets come next; one registry.

A schedule is a sequence of steps, computed where it is asked for: step n is the same whatever was asked before, so
resuming is starting at n. In memory is the order of one epoch's rows, 4 bytes a row (12 with `mixed`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merging.errors import CuveeError
from merging.registries import find, load_installed

#: Types of the first stage of `two_stage`.
RETRIEVAL_TYPES = ("Retrieval", "Reranking", "BitextMining")
#: Batches that `mgs` takes into a step, where there are so many tasks.
TASKS_A_STEP = 4


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of one data set that are trained on together: they are each other's in-batch negatives.

    Attributes:
        dataset: its index.
        rows: (rows,) indices into it.
    """

    dataset: int
    rows: NDArray[np.int64]


#: What one step of the optimiser takes in: one part with most schedules.
Step = tuple[Part, ...]


@dataclass(frozen=True)
class Corpus:
    """What schedules are made from: a value for each data set, in the same order.

    Attributes:
        sizes: rows.
        types: "Retrieval", "STS", …
        batch_sizes: rows of a batch.
        weights: of its rows taken in an epoch: 0.5 half of them, drawn anew each epoch; 2 each row twice.
        seed: of every draw; at least 0.
    """

    sizes: tuple[int, ...]
    types: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def taken(self, dataset: int) -> int:
        """Rows that an epoch draws from a data set; at least one where there is a row and a weight."""
        size, weight = self.sizes[dataset], self.weights[dataset]
        return max(1, round(size * weight)) if size and weight else 0

    def batches(self, dataset: int) -> int:
        """Batches of an epoch. The tail is dropped, but a data set smaller than a batch makes one short batch."""
        taken = self.taken(dataset)
        return max(taken // self.batch_sizes[dataset], min(taken, 1))

    def rows(self, dataset: int, epoch: int) -> NDArray[np.int32]:
        """(taken,) row indices of an epoch in random order: none comes twice before every one has come once."""
        rng, size, taken = self.random(1, epoch, dataset), self.sizes[dataset], self.taken(dataset)
        rows = np.empty(taken, np.int32)
        for start in range(0, taken, max(size, 1)):
            order = np.arange(size, dtype=np.int32)
            rng.shuffle(order)
            rows[start : start + size] = order[: taken - start]
        return rows

    def random(self, *key: int) -> np.random.Generator:
        """Draws that depend on the seed and the key alone."""
        return np.random.default_rng([self.seed, *key])

    @cached_property
    def tasks(self) -> tuple[int, ...]:
        """A number for the task of each data set: of its type, or of itself if all are of one type."""
        names = list(dict.fromkeys(self.types))
        return tuple(map(names.index, self.types)) if len(names) > 1 else tuple(range(len(self.types)))


class Stage(ABC):
    """Steps that repeat epoch by epoch, each in a new order.

    Attributes:
        per_epoch: steps of an epoch.
        short: data sets whose only batch is a short one.
    """

    per_epoch: int
    short: tuple[int, ...] = ()

    @abstractmethod
    def epoch(self, number: int) -> Callable[[int], Step]:
        """The steps of an epoch: a function of 0 … per_epoch − 1."""


class Schedule(Sequence[Step]):
    """Stages one after the other, each for its share of the steps.

    Args:
        length: steps in all.

    Attributes:
        corpus: what it was made from.
        steps_per_epoch: of all the stages together.
    """

    def __init__(self, corpus: Corpus, stages: Sequence[Stage], length: int) -> None:
        per_epoch = np.cumsum([0, *(stage.per_epoch for stage in stages)])
        self.corpus, self.stages = corpus, tuple(stages)
        self.steps_per_epoch = int(per_epoch[-1])
        self._ends = [round(int(end) * length / self.steps_per_epoch) for end in per_epoch]
        self._current: tuple[int, int, Callable[[int], Step]] | None = None  # stage, epoch, its steps

    @property
    def short(self) -> tuple[int, ...]:
        """The data sets of which there is only one batch in an epoch, and a short one."""
        return tuple(dataset for stage in self.stages for dataset in stage.short)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, step: Any) -> Any:
        """The step of that number. Cheapest in order: the first of an epoch draws the epoch."""
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(len(self)))]
        step = step + len(self) if step < 0 else step
        if not 0 <= step < len(self):
            raise IndexError(step)
        stage = int(np.searchsorted(self._ends, step, side="right")) - 1
        epoch, within = divmod(step - self._ends[stage], self.stages[stage].per_epoch)
        current = self._current  # a local name: another thread may put its own
        if current is None or current[:2] != (stage, epoch):
            self._current = current = (stage, epoch, self.stages[stage].epoch(epoch))
        return current[2](within)


@dataclass(frozen=True)
class ScheduleEntry:
    """A schedule of the registry: `stages` makes its stages from a corpus."""

    name: str
    title: str
    stages: Callable[[Corpus], Sequence[Stage]]
    source: str
    summary: str = field(default="", compare=False)


SCHEDULES: dict[str, ScheduleEntry] = {}
_GROUP = "cuvee.schedules"


def schedule(
    name: str, *, title: str, source: str, replace: bool = False
) -> Callable[[Callable[[Corpus], Sequence[Stage]]], Callable[[Corpus], Sequence[Stage]]]:
    """Registers `function(corpus) -> stages` as a schedule.

    Raises:
        CuveeError: the name is taken and `replace` is not set.
    """

    def register(function: Callable[[Corpus], Sequence[Stage]]) -> Callable[[Corpus], Sequence[Stage]]:
        if name in SCHEDULES and not replace:
            raise CuveeError(f"a schedule '{name}' is registered already", mend="choose another name")
        summary = (function.__doc__ or "").split("\n\n")[0].strip().replace("\n", " ")
        SCHEDULES[name] = ScheduleEntry(name, title, function, source, summary)
        return function

    return register


def get(name: str, where: str = "") -> ScheduleEntry:
    """The schedule of that name, built in or from an installed package's entry point `cuvee.schedules`.

    Raises:
        CuveeError: no such schedule; names the nearest.
    """
    return find(name, SCHEDULES, group=_GROUP, noun="schedule", where=where)


def known() -> dict[str, ScheduleEntry]:
    """All schedules by name, those of installed packages included."""
    load_installed(_GROUP)
    return SCHEDULES


def build(
    name: str,
    sizes: Sequence[int],
    types: Sequence[str],
    batch_sizes: Sequence[int],
    weights: Sequence[float],
    epochs: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    where: str = "",
) -> Schedule:
    """A schedule over data sets, one value each of `sizes`, `types`, `batch_sizes` and `weights`, see `Corpus`.

    Args:
        epochs: over the data; 1 if neither this nor `steps` is given. With 0.5 the first half of an epoch.
        steps: instead of `epochs`. Stages share them by their batches.

    Raises:
        CuveeError: no such schedule, no row at all, both `epochs` and `steps`, or a number out of range.
    """
    entry = get(name, where)
    if epochs is not None and steps is not None:
        raise CuveeError("'epochs' and 'steps' exclude each other", where=where, mend="leave one of them out")
    if not len(sizes) == len(types) == len(batch_sizes) == len(weights):
        raise CuveeError("sizes, types, batch sizes and weights differ in number", where=where)
    if min(batch_sizes, default=1) < 1 or min(sizes, default=0) < 0 or seed < 0:
        raise CuveeError("batch sizes start at 1, sizes and the seed at 0", where=where)
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise CuveeError("weights must be finite and at least 0", where=where)
    amount = (1.0 if epochs is None else epochs) if steps is None else steps
    if not (math.isfinite(amount) and amount > 0):
        raise CuveeError("'epochs' and 'steps' must be greater than 0", where=where)
    if max(sizes, default=0) > np.iinfo(np.int32).max:
        raise CuveeError("a data set has more than 2 147 483 647 rows", where=where, mend="split it")
    corpus = Corpus(tuple(map(int, sizes)), tuple(types), tuple(map(int, batch_sizes)), tuple(weights), int(seed))
    if not any(map(corpus.taken, range(len(sizes)))):
        raise CuveeError("there is no row to train on", where=where)
    stages = [stage for stage in entry.stages(corpus) if stage.per_epoch]
    total = sum(stage.per_epoch for stage in stages)
    length = max(1, round(amount * total)) if steps is None else steps
    return Schedule(corpus, stages, length)


# ---- stages ----


class Homogeneous(Stage):
    """Batches of one data set each, those of all the data sets shuffled."""

    def __init__(self, corpus: Corpus, datasets: Sequence[int]) -> None:
        self.corpus, self.datasets = corpus, datasets
        self.short = tuple(d for d in datasets if 0 < corpus.taken(d) < corpus.batch_sizes[d])
        self.per_epoch = sum(map(corpus.batches, datasets))

    def epoch(self, number: int) -> Callable[[int], Step]:
        counts = list(map(self.corpus.batches, self.datasets))
        pool = np.repeat(np.array(self.datasets, np.int32), counts)  # (steps,) the data set of each
        self.corpus.random(0, number, *self.datasets).shuffle(pool)
        take = _batches(self.corpus, self.datasets, number)
        nth = _occurrence(pool)
        return lambda step: (take(int(pool[step]), int(nth[step])),)


class Mixed(Stage):
    """Batches of rows drawn from all the data sets at random, the tail dropped; each of the mean batch size."""

    def __init__(self, corpus: Corpus, datasets: Sequence[int]) -> None:
        self.corpus, self.datasets = corpus, datasets
        taken = sum(map(corpus.taken, datasets))
        batches = sum(corpus.taken(d) / corpus.batch_sizes[d] for d in datasets)  # tails included
        self.size = round(taken / batches) if batches else 1  # so that there are about as many as in `Homogeneous`
        self.per_epoch = max(taken // self.size, min(taken, 1))

    def epoch(self, number: int) -> Callable[[int], Step]:
        counts = list(map(self.corpus.taken, self.datasets))
        rows = np.concatenate([self.corpus.rows(d, number) for d in self.datasets])
        owner = np.repeat(np.array(self.datasets, np.int32), counts)
        order = np.arange(len(rows), dtype=np.int64 if len(rows) > np.iinfo(np.int32).max else np.int32)
        self.corpus.random(0, number, *self.datasets).shuffle(order)

        def step(index: int) -> Step:
            chosen = order[index * self.size : (index + 1) * self.size]
            return tuple(
                Part(int(d), rows[chosen[owner[chosen] == d]].astype(np.int64)) for d in np.unique(owner[chosen])
            )

        return step


class Accumulated(Stage):
    """Several batches a step, each of one data set and as far as possible of different tasks."""

    def __init__(self, corpus: Corpus, datasets: Sequence[int]) -> None:
        self.corpus, self.datasets = corpus, datasets
        self.short = tuple(d for d in datasets if 0 < corpus.taken(d) < corpus.batch_sizes[d])
        self.batches = sum(map(corpus.batches, datasets))
        tasks = {corpus.tasks[d] for d in datasets if corpus.batches(d)}
        self.per_epoch = max(1, self.batches // min(max(2, len(tasks)), TASKS_A_STEP))

    def epoch(self, number: int) -> Callable[[int], Step]:
        rng = self.corpus.random(0, number, *self.datasets)
        pool = np.repeat(np.array(self.datasets, np.int32), list(map(self.corpus.batches, self.datasets)))
        rng.shuffle(pool)
        # Dealt out task by task, a task's batches come to lie in different steps while there are enough of these.
        task = np.array(self.corpus.tasks)[pool]
        turn = rng.permutation(max(self.corpus.tasks) + 1)
        turn[np.bincount(task).argmax()] = -1  # the largest first: the small ones, side by side, spread the widest
        pool = pool[np.argsort(turn[task], kind="stable")]
        take, nth = _batches(self.corpus, self.datasets, number), _occurrence(pool)
        first = rng.permutation(self.per_epoch)

        def step(index: int) -> Step:
            chosen = range(int(first[index]), len(pool), self.per_epoch)
            return tuple(take(int(pool[i]), int(nth[i])) for i in chosen)

        return step


def _batches(corpus: Corpus, datasets: Sequence[int], epoch: int) -> Callable[[int, int], Part]:
    """The nth batch of a data set in an epoch."""
    rows = {d: corpus.rows(d, epoch) for d in datasets}

    def take(dataset: int, nth: int) -> Part:
        size = corpus.batch_sizes[dataset]
        return Part(dataset, rows[dataset][nth * size : (nth + 1) * size].astype(np.int64))

    return take


def _occurrence(values: NDArray[np.int32]) -> NDArray[np.int32]:
    """How often each entry's value came before: [7, 3, 7, 7] → [0, 0, 1, 2]."""
    nth = np.empty(len(values), np.int32)
    for value in np.unique(values):
        (places,) = np.nonzero(values == value)
        nth[places] = np.arange(len(places), dtype=np.int32)
    return nth


# ---- schedules ----


@schedule("batch_level", title="Batch-level shuffling", source="arXiv 2602.05787 (BOOM)")
def batch_level(corpus: Corpus) -> Sequence[Stage]:
    """Every batch from one data set, the batches of all data sets shuffled.

    Shuffle within each data set, cut into batches, drop the tail, pool the batches and shuffle them.
    """
    return [Homogeneous(corpus, range(len(corpus.sizes)))]


@schedule("dataset_sequential", title="Data set after data set", source="arXiv 2602.05787 (BOOM)")
def dataset_sequential(corpus: Corpus) -> Sequence[Stage]:
    """One data set after the other, in the order listed, each for all of its epochs."""
    return [Homogeneous(corpus, [dataset]) for dataset in range(len(corpus.sizes))]


@schedule("task_sequential", title="Task after task", source="arXiv 2602.05787 (BOOM)")
def task_sequential(corpus: Corpus) -> Sequence[Stage]:
    """One type of task after the other, in the order listed; within a type as `batch_level`."""
    return [Homogeneous(corpus, _of_types(corpus, (type_,))) for type_ in dict.fromkeys(corpus.types)]


@schedule("two_stage", title="Two stages", source="arXiv 2602.05787 (BOOM), reconstructed after arXiv 2405.17428")
def two_stage(corpus: Corpus) -> Sequence[Stage]:
    """Retrieval, reranking and bitext first, then all other types; each stage as `batch_level`.

    Reconstructed: no row is seen in both stages, so that the cost is that of the other schedules.
    """
    others = [type_ for type_ in dict.fromkeys(corpus.types) if type_ not in RETRIEVAL_TYPES]
    return [Homogeneous(corpus, _of_types(corpus, types)) for types in (RETRIEVAL_TYPES, others)]


@schedule("mixed", title="Mixed batches", source="the usual shuffling of concatenated data")
def mixed(corpus: Corpus) -> Sequence[Stage]:
    """Rows of all data sets in one batch."""
    return [Mixed(corpus, range(len(corpus.sizes)))]


@schedule("mgs", title="Modular gradient surgery", source="arXiv 2602.02301, as a schedule reconstructed")
def mgs(corpus: Corpus) -> Sequence[Stage]:
    """Batches of two to four tasks a step, whose gradients `embeddings.training.surgery` reconciles.

    A step has several batches of one task only where that task has more batches than there are steps.
    """
    return [Accumulated(corpus, range(len(corpus.sizes)))]


def _of_types(corpus: Corpus, types: Sequence[str]) -> list[int]:
    return [dataset for dataset, type_ in enumerate(corpus.types) if type_ in types]
