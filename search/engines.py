"""Engines: names to Optuna samplers. What an engine proposes depends on the seed and the trials before, on nothing else.

Optuna's samplers keep a random state and a cache in memory, so that a study that was killed goes on otherwise than it would
have, and every resumed one draws its first random numbers again. `SeededSampler` therefore makes a fresh sampler for each
proposal, seeded by the study's seed and the number of proposals before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, TypeAlias

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from merging import registries
from merging.errors import CuveeError
from search.cocktail import TEMPERATURE, alone, loss_of, mixed
from search.design import COCKTAIL, sobol
from search.space import MANY, Space

STARTUP = 8
Make: TypeAlias = Callable[[Space, int], BaseSampler]


@dataclass(frozen=True)
class Knob:
    """A number that an engine takes: its default, and what it may be."""

    default: float
    low: float | None = None
    above: float | None = None
    whole: bool = False


@dataclass(frozen=True)
class Engine:
    """An optimiser.

    Attributes:
        make: a fresh sampler for one proposal, of the space and a seed; None: Sobol's sequence goes on.
        objectives: how many it takes at most.
        categorical: whether it takes dimensions that are no numbers; else those are drawn apart.
        floors: whether it keeps away from points below a floor; else floors only rule out answers.
        startup: observations that it wants before it proposes by a model; until then points are Sobol's.
        dimensions: how many it takes at most.
        settings: that it takes, by name.
        per: how weights vary where nothing is said, see `search.space.PER`; "": as the method says.
        proposes: False: it goes its own way from point to point (`search.run` knows which).
        starts: False: it takes no points to start with.
        modules: that it imports and an installation may lack; `extra` brings them.
    """

    name: str
    title: str
    make: Make | None
    objectives: int = 3
    categorical: bool = True
    floors: bool = True
    startup: int = STARTUP
    dimensions: int = MANY
    settings: Mapping[str, Knob] = field(default_factory=dict)
    per: str = ""
    proposes: bool = True
    starts: bool = True
    modules: tuple[str, ...] = ()
    extra: str = ""


ENGINES: dict[str, Engine] = {}
_GROUP = "cuvee.engines"


def engine(name: str, title: str, **more: Any) -> Callable[[Make], Make]:
    """Registers `make(space, seed)`; installed packages do so by an entry point `cuvee.engines`.

    Args:
        more: attributes of `Engine`.
    """

    def register(make: Make) -> Make:
        ENGINES[name] = Engine(name, title, make, **more)
        return make

    return register


def get(name: str, where: str = "") -> Engine:
    """The engine of that name.

    Raises:
        CuveeError: no such engine; names the nearest.
    """
    return registries.find(name, ENGINES, group=_GROUP, noun="engine", where=where)


def refuse_unfit(name: str, objectives: int, where: str = "") -> Engine:
    """The engine of that name.

    Raises:
        CuveeError: no such engine, it takes fewer objectives, or it is not installed.
    """
    found = get(name, where)
    if any(find_spec(module) is None for module in found.modules):
        mend = f"pip install 'cuvee[{found.extra}]'"
        raise CuveeError(f"the engine '{name}' is not installed", where=where, mend=mend)
    if objectives > found.objectives:
        mend = "choose gp, botorch, tpe, qmc or random, or aggregate the tasks"
        raise CuveeError(f"'{name}' searches for one objective, not {objectives}", where=where, mend=mend)
    return found


class SeededSampler(BaseSampler):
    """Proposes by a fresh sampler each time; by Sobol's sequence where there is too little to learn from.

    In a space of few points, none is proposed twice while there is another: it would have the same score again.
    """

    def __init__(self, engine: Engine, space: Space, seed: int) -> None:
        self.engine, self.space, self.seed = engine, space, seed
        self.distributions = space.distributions()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All that varies: what Optuna infers is empty until a trial is complete."""
        return {name: kind for name, kind in self.distributions.items() if not kind.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        if proposed := _proposed(trial, search_space):
            return proposed
        if COCKTAIL in trial.user_attrs:
            return _cocktail(study, self.space, trial.user_attrs[COCKTAIL])
        found = self._proposal(study, trial, search_space)
        return _untried(study, trial, self.space, found)

    def _proposal(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        place = trial.number
        complete = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        if self.engine.make is None or complete < self.engine.startup:
            return sobol(self.space, 1, self.seed, skip=place)[0]
        seed = int(np.random.SeedSequence([self.seed, place]).generate_state(1)[0] % 2**31)
        sampler = self.engine.make(self.space, seed)
        taken = search_space
        if not self.engine.categorical:
            taken = {name: kind for name, kind in taken.items() if not isinstance(kind, CategoricalDistribution)}
        found = sampler.sample_relative(study, trial, taken)
        apart = {name: kind for name, kind in search_space.items() if name not in found}
        return {**found, **{name: sampler.sample_independent(study, trial, name, kind) for name, kind in apart.items()}}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError(f"{param_name} is none of the space's dimensions")

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Nothing: no sampler lives that long."""


def _proposed(trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """What Optuna's samplers told other processes of a proposal: a trial that was killed right then has it from there."""
    parts = [value for name, value in sorted(trial.system_attrs.items()) if ":relative_params:" in name]
    try:
        found = json.loads("".join(parts)) if len(parts) == 1 else {}
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.keys() == search_space.keys() else {}


def untried(space: Space, tried: Sequence[FrozenTrial]) -> list[dict[str, Any]] | None:
    """The points of a space of few that are in no trial yet; None of a space of many."""
    points = space.points()
    if points is None:
        return None
    known = {tuple(trial.params.get(d.name) for d in space.dimensions) for trial in tried}
    return [point for point in points if tuple(point.values()) not in known]


def _untried(study: Study, trial: FrozenTrial, space: Space, found: Mapping[str, Any]) -> dict[str, Any]:
    """What was found, or, where that was tried already, the point nearest to it that was not."""
    begun = (TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING)
    others = [own for own in study.get_trials(deepcopy=False, states=begun) if own.number != trial.number]
    free = untried(space, others)
    whole = {d.name: d.default for d in space.dimensions} | dict(found)  # what has one value is not proposed
    if not free or whole in free:
        return dict(found)
    wanted = np.array(space.coordinates(whole))
    nearest = min(free, key=lambda point: float(np.square(np.array(space.coordinates(point)) - wanted).sum()))
    return {name: nearest[name] for name in found}


def _cocktail(study: Study, space: Space, temperature: float) -> dict[str, Any]:
    """By what the models have scored alone, the mean where there are several objectives."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    scored = [(other.params, sum(other.values) / len(other.values)) for other in done]
    return mixed(space, [loss_of(point, scored) for point in alone(space)], temperature)


@engine("gp", "Gaussian process, Matérn 5/2, log expected improvement (Optuna)")
def _gp(space: Space, seed: int) -> BaseSampler:
    return GPSampler(seed=seed, n_startup_trials=1, warn_independent_sampling=False)


@engine("tpe", "tree-structured Parzen estimators (Optuna)")
def _tpe(space: Space, seed: int) -> BaseSampler:
    return TPESampler(seed=seed, n_startup_trials=1)


@engine(
    "cma",
    "CMA-ES from the middle of the space (Optuna, cmaes)",
    objectives=1,
    categorical=False,
    floors=False,
    startup=1,
)
def _cma(space: Space, seed: int) -> BaseSampler:
    if sum(not d.choices and d.low != d.high for d in space.dimensions) < 2:
        return RandomSampler(seed=seed)  # it has no covariance to learn in one dimension
    return CmaEsSampler(seed=seed, n_startup_trials=1, warn_independent_sampling=False)


@engine(
    "skopt",
    "Gaussian process, Matérn 5/2, expected improvement with ξ = 0.01 (scikit-optimize)",
    objectives=1,
    floors=False,
)
def _skopt(space: Space, seed: int) -> BaseSampler:
    from search.skopt_sampler import SkoptSampler

    return SkoptSampler(space, seed)


ENGINES["qmc"] = Engine("qmc", "Sobol's sequence, scrambled", None, floors=False)


@engine("random", "independent uniform draws", floors=False, startup=0)
def _random(space: Space, seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


@engine(
    "botorch",
    "Gaussian process, log noisy expected improvement (BoTorch; extra 'botorch')",
    modules=("botorch",),
    extra="botorch",
)
def _botorch(space: Space, seed: int) -> BaseSampler:
    from search.botorch_sampler import BoTorchSampler

    return BoTorchSampler(space, seed)


ENGINES["adamerging"] = Engine(
    "adamerging",
    "gradient descent on the coefficients of task_arithmetic (AdaMerging); objectives: entropy, pim, loss",
    None,
    objectives=1,
    floors=False,
    dimensions=20_000,
    settings={
        "every": Knob(25, low=1, whole=True),
        "rate": Knob(1e-3, above=0),
        "batch": Knob(16, low=1, whole=True),
    },
    per="layers",
    proposes=False,
)
ENGINES["lm_cocktail"] = Engine(
    "lm_cocktail",
    "the softmax of each model's score on a few examples (LM-Cocktail)",
    None,
    floors=False,
    settings={"temperature": Knob(TEMPERATURE, above=0)},
    proposes=False,
    starts=False,
)
