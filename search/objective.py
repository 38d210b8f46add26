"""Objective: a merged model in, scores by task out; and what a study makes of the scores. Higher is better, always.

Objectives are found by name in a registry, which other packages add to by an entry point `cuvee.objectives`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from merging import registries
from merging.errors import CuveeError
from merging.node import Node
from merging.sources import ModelRef

if TYPE_CHECKING:
    import torch

#: More explode: four objectives take Optuna's Gaussian process 2.5 GB, six over 17 GB.
MAX_OBJECTIVES = 3
TOTAL = "total"


@dataclass(frozen=True)
class Scores:
    """What one model scores; higher is better.

    Attributes:
        total: the objective's own number; None where there is no other than the tasks'.
        tasks: by name.
        beside: the names of those that are told and may have a floor, but count in no mean, nor as the worst.
    """

    total: float | None = None
    tasks: Mapping[str, float] = field(default_factory=dict)
    beside: Collection[str] = ()


@dataclass(frozen=True)
class Candidate:
    """A merged model to score.

    Attributes:
        coefficients: the method's parameters, see `Space.coefficients`.
        folder: where it lies, loadable like any output of `cuvee merge`; gone after the trial. None where the objective has
            it as the weights of its module.
    """

    coefficients: Mapping[str, Any]
    folder: Path | None = None


class Objective(Protocol):
    """Scores models, one after another, in one process."""

    def data(self) -> Mapping[str, str]:
        """By name the digest of what scores follow from besides the model; a study goes on only with the same."""

    def check(self, model: ModelRef) -> Sequence[str]:
        """Reads what there is to read but the model's weights, so that a mistake is told before the first trial.

        Args:
            model: as of `prepare`.

        Returns:
            Lines for the user, on what is possible and hardly meant.

        Raises:
            CuveeError: what `prepare` would raise, as far as it shows without the model.
        """

    def prepare(self, model: ModelRef, device: str) -> torch.nn.Module | None:
        """Loads what all trials share; called once, before the first.

        Args:
            model: what every candidate looks like: the base, or the first model where there is none.

        Returns:
            A module opened from `model`, whose weights are the candidate's whenever the objective is called
            (`merging.live` rewrites them); None: each candidate is to be merged into a folder.
        """

    def __call__(self, candidate: Candidate, /) -> Scores: ...


@runtime_checkable
class NamesTasks(Protocol):
    """An objective that knows before the first trial which tasks it has scores of."""

    def task_names(self) -> Collection[str]:
        """By which `Scores.tasks` will have them."""


#: From the settings under the objective's name, and the folder near which files are looked for.
Make: TypeAlias = Callable[[Node, Path], Objective]


@dataclass(frozen=True)
class ObjectiveKind:
    """An entry of the registry.

    Attributes:
        make: checks its settings, each mistake with its line, and loads nothing.
    """

    name: str
    title: str
    make: Make


OBJECTIVES: dict[str, ObjectiveKind] = {}
_GROUP = "cuvee.objectives"
_OURS = (
    "function",
    "entropy",
    "pim",
    "loss",
    "agreement",
    "perplexity",
)  # modules of search.objectives, which register themselves


def objective(name: str, title: str) -> Callable[[Make], Make]:
    """Registers a function that makes an objective of its settings."""

    def register(make: Make) -> Make:
        OBJECTIVES[name] = ObjectiveKind(name, title, make)
        return make

    return register


def get(name: str, where: str = "") -> ObjectiveKind:
    """The objective of that name.

    Raises:
        CuveeError: no such objective; names the nearest.
    """
    _register_ours()
    return registries.find(name, OBJECTIVES, group=_GROUP, noun="objective", where=where)


def known() -> Mapping[str, ObjectiveKind]:
    """All objectives by name, those of installed packages included."""
    _register_ours()
    registries.load_installed(_GROUP)
    return OBJECTIVES


def _register_ours() -> None:
    for name in _OURS:
        importlib.import_module(f"search.objectives.{name}")


@dataclass(frozen=True)
class Goal:
    """What is maximised.

    Attributes:
        aggregate: "mean", "worst" or "weighted" of the tasks.
        weights: by task, for "weighted"; tasks that are not named do not count.
        floors: the least that a task must score; points below are told to the optimiser as infeasible, and never chosen
            while there is another.
        front: tasks that are objectives of their own, two or three: the answer is a Pareto front.
    """

    aggregate: str = "mean"
    weights: Mapping[str, float] = field(default_factory=dict)
    floors: Mapping[str, float] = field(default_factory=dict)
    front: tuple[str, ...] = ()

    def values(self, scores: Scores) -> list[float]:
        """The numbers that a study maximises: one, or one for each task of the front.

        Raises:
            CuveeError: a task is missing, or a number is not finite.
        """
        if self.front:
            found = [self._of(scores, task) for task in self.front]
        elif self.aggregate == "weighted":
            found = [sum(weight * self._of(scores, task) for task, weight in self.weights.items())]
            found[0] /= sum(self.weights.values())
        elif self.aggregate == "mean" and scores.total is not None:
            found = [scores.total]
        elif values := [value for task, value in scores.tasks.items() if task not in scores.beside]:
            found = [min(values) if self.aggregate == "worst" else sum(values) / len(values)]
        elif scores.total is not None:
            found = [scores.total]
        else:
            raise CuveeError("the objective gave no score", where="objective")
        for value in [*found, *scores.tasks.values()]:
            if not math.isfinite(value):
                raise CuveeError(f"the objective gave {value}, which is no score", where="objective")
        return found

    def violations(self, scores: Scores) -> dict[str, float]:
        """By task, how far it is below its floor; 0 or less: it is not."""
        return {task: floor - self._of(scores, task) for task, floor in self.floors.items()}

    def refuse_unknown(self, tasks: Collection[str], where: str) -> None:
        """Raises CuveeError where it names a task that the objective has not: no trial could succeed."""
        unknown = next((task for task in (*self.front, *self.weights, *self.floors) if task not in tasks), None)
        if unknown is not None:
            given = ", ".join(tasks)
            raise CuveeError(f"the objective has no task '{unknown}'", where=where, mend=f"given: {given}")

    def _of(self, scores: Scores, task: str) -> float:
        if task not in scores.tasks:
            given = ", ".join(scores.tasks) or "none"
            raise CuveeError(
                f"the objective gave no score of the task '{task}'", where="objective", mend=f"given: {given}"
            )
        return scores.tasks[task]
