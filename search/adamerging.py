"""AdaMerging: gradient descent on the coefficients of task arithmetic, by what the model thinks of unlabelled inputs.

    θ(λ) = θ₀ + lambda · Σ λᵢ,ₗ τᵢ,ₗ        λ = 0.3 to begin with, kept within its bounds
    λ ← Adam(λ, ∂loss/∂λ)                  loss = −objective, on a batch of each task's inputs; rate 1e-3, 500 steps

The loss's gradient by the weights comes by a backward pass through the objective's module, that by the coefficients from
its inner products with the task vectors (`LiveMerge.gradient`). A row of the study is the objective's score on all inputs,
every few steps. Batches are drawn by the seed and the number of the step, and the state is saved: a run that was killed
goes on to the same coefficients (on a GPU but for the order in which its kernels add).

Source: arXiv 2310.02575, layer-wise, and the authors' code. There λ is clamped in the forward pass, where a coefficient that
has left its bounds gets no gradient any more; here it is put back to the bound after each step, and may come back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from merging.errors import CuveeError
from search.candidates import Candidates
from search.choose import Trial
from search.config import SearchConfig
from search.descent import Descent, Vector
from search.design import COCKTAIL, design
from search.objective import Goal
from search.space import GROUPINGS, Space
from search.study import Study, attempt

if TYPE_CHECKING:
    import torch

    from merging.live import LiveMerge

STATE = "adamerging.json"
START, TRIALS = 0.3, 21
_METHOD, _WEIGHT = "task_arithmetic", "weight"
#: Seconds after which the state is saved between trials.
SAVE_EVERY = 30.0


@runtime_checkable
class Smooth(Protocol):
    """An objective whose score has a gradient by the weights of its module.

    Attributes:
        whole: only all inputs of a task together have a score; else that of some is the same but for chance.
    """

    whole: bool

    def sizes(self) -> Mapping[str, int]:
        """How many inputs each task has, once prepared."""

    def smooth(self, task: str, items: Sequence[int]) -> torch.Tensor:
        """A task's score on some of its inputs, 0-dimensional, with its graph."""


def begin(config: SearchConfig, space: Space) -> list[dict[str, Any]]:
    """Where the descent begins: the first of the start points, 0.3 for every coefficient where there is none.

    Raises:
        CuveeError: what is to be searched cannot be by gradients.
    """
    other_engine = "choose another engine"
    if config.method.name != _METHOD:
        what = f"AdaMerging is a search of '{_METHOD}', not of '{config.method.name}'"
        raise CuveeError(what, where=config.at("method"), mend=other_engine)
    other = next((d.parameter for d in space.dimensions if d.parameter != _WEIGHT or d.choices), None)
    if other is not None:
        raise CuveeError(f"'{other}' has no gradient", where=config.at("vary"), mend=f"fix it, or {other_engine}")
    if space.fixed.get("normalize"):
        raise CuveeError("AdaMerging's weights are not divided by their sum", where=config.at("vary"))
    mixture = next((start for start in config.start if start.kind == COCKTAIL), None)
    if mixture is not None:
        what = "a descent begins at one point, and a cocktail is known after the models have scored"
        raise CuveeError(what, where=mixture.where, mend="start: [{weight: [0.2, 0.5]}], or [uniform]")
    if config.goal.aggregate == "worst":
        what = "the worst of the tasks has no gradient for the others"
        raise CuveeError(what, where=config.at("objective"), mend="aggregate: mean")
    if not isinstance(config.make_objective(), Smooth):
        what = f"the objective '{config.objective}' has no gradient"
        raise CuveeError(what, where=config.at("objective"), mend=f"choose entropy, pim or loss, or {other_engine}")
    if "start" in config.lines:
        return design(space, config.start, config.seed)[:1]
    return [{d.name: d.clipped(START) for d in space.dimensions}]


def work(
    study: Study,
    candidates: Candidates,
    config: SearchConfig,
    *,
    orphans: Sequence[int] = (),
    told: Callable[[Trial], None] = lambda trial: None,
) -> None:
    """Descends until the study ends; see `search.study.work`.

    Raises:
        CuveeError: a weight of a task that the objective does not have, a gradient that is not finite; the state of a
            descent that has begun is not there.
    """
    space, every = study.settings.space, int(config.tuning["every"])
    file, waiting = study.folder / STATE, list(orphans)
    begun = np.array([study.settings.design[0][d.name] for d in space.dimensions], np.float64)
    descent = Descent.load(file, len(begun))
    if descent is None and (waiting or study.trials()):  # it is saved before the first trial
        what = f"is missing, without which the descent of {len(study.trials())} trials cannot go on"
        raise CuveeError(what, where=str(file), mend="put it back, or add --force to begin anew")
    descent = descent or Descent.begin(begun)
    slopes = Slopes(config, candidates, space)
    low, high = (np.array([getattr(d, end) for d in space.dimensions], np.float64) for end in ("low", "high"))
    since = saved = time.perf_counter()
    while True:
        if descent.steps % every == 0:
            descent.save(file)
            if len(study.trials()) <= descent.steps // every:
                point = {d.name: float(x) for d, x in zip(space.dimensions, descent.place, strict=True)}
                trial = study.take(waiting.pop(0)) if waiting else study.put(point)
                if trial is None:
                    return
                told(attempt(study, trial, candidates, began=since))
                since = time.perf_counter()
        if study.ended() is not None:
            return
        gradient = slopes(descent.place, descent.steps)
        if not np.isfinite(gradient).all():
            what = f"the gradient of the objective is not finite at step {descent.steps}"
            raise CuveeError(what, where=config.at("objective"))
        descent = descent.step(gradient, config.tuning["rate"], low, high)
        if time.perf_counter() - saved >= SAVE_EVERY:
            descent.save(file)
            saved = time.perf_counter()


class Slopes:
    """The gradient of the loss by the coefficients.

    Args:
        space: whose dimensions are weights of `task_arithmetic`.
        candidates: whose objective has a gradient.
    """

    def __init__(self, config: SearchConfig, candidates: Candidates, space: Space) -> None:
        objective, live, module = candidates.objective, candidates.live, candidates.module
        assert live is not None and module is not None and isinstance(objective, Smooth), "see `begin`"
        self._objective: Smooth = objective
        self._live: LiveMerge = live
        self._candidates, self._space, self._config = candidates, space, config
        self._shares = shares(config.goal, list(objective.sizes()), config.at("objective"))
        self._parameters = {n: p for n, p in module.named_parameters() if p.is_floating_point()}
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)

    def __call__(self, place: Vector, step: int) -> Vector:
        """At these coefficients, (dimensions,), on the batches of that step."""
        point = {d.name: float(x) for d, x in zip(self._space.dimensions, place, strict=True)}
        self._candidates.apply(self._space.coefficients(point))
        for parameter in self._parameters.values():
            parameter.grad = None
        sizes = self._objective.sizes()
        for number, (task, share) in enumerate(self._shares.items()):
            count = sizes[task] if self._objective.whole else int(self._config.tuning["batch"])
            items = batch(sizes[task], count, self._config.seed, step, number)
            loss = -share * self._objective.smooth(task, items)
            loss.backward()
        return self._by_coefficient()

    def _by_coefficient(self) -> Vector:
        gradients = {name: own.grad for name, own in self._parameters.items() if own.grad is not None}
        along = self._live.gradient(gradients)
        for parameter in self._parameters.values():
            parameter.grad = None
        vary = self._config.vary.get(_WEIGHT)
        group_of = GROUPINGS.get(vary.per if vary else "", lambda name: None)
        by_group: dict[str | None, Vector] = {}
        for name, values in along.items():
            group = group_of(name)
            by_group[group] = by_group.get(group, 0.0) + values
        factor = float(self._space.fixed.get("lambda", 1.0))
        found = np.zeros(len(self._space.dimensions))
        for i, dimension in enumerate(self._space.dimensions):
            own = by_group.get(dimension.group)  # none where no tensor of the group differs between the models
            if own is not None:
                found[i] = factor * (own.sum() if dimension.model is None else own[dimension.model])
        return found


def batch(size: int, count: int, seed: int, step: int, task: int) -> list[int]:
    """Numbers of `count` of a task's inputs, or of all, drawn without replacement for a step."""
    if count >= size:
        return list(range(size))
    drawn = np.random.default_rng([seed, step, task]).choice(size, count, replace=False)
    return [int(item) for item in drawn]


def shares(goal: Goal, tasks: Sequence[str], where: str) -> dict[str, float]:
    """What each task counts in the loss; they sum to 1.

    Raises:
        CuveeError: a weight is of no task.
    """
    if goal.aggregate != "weighted":
        return dict.fromkeys(tasks, 1 / len(tasks))
    unknown = next((task for task in goal.weights if task not in tasks), None)
    if unknown is not None:
        raise CuveeError(f"the objective has no task '{unknown}'", where=where, mend=f"given: {', '.join(tasks)}")
    total = sum(goal.weights.values())
    return {task: weight / total for task, weight in goal.weights.items() if weight}
