"""Choose: which trial is the answer: the best observed, the best by a model of the scores, or a Pareto front."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.design import uniform
from search.space import Space

OBSERVED, POSTERIOR = "observed", "posterior"
_ENOUGH = 4  # observations, for a model


@dataclass(frozen=True)
class Trial:
    """A trial that ended.

    Attributes:
        point: by dimension.
        values: what is maximised, one for each objective; () where it failed.
        tasks: scores by task.
        feasible: no task is below its floor.
        error: why it failed; "" where it did not.
        seconds: of merging and scoring.
    """

    number: int
    point: Mapping[str, Any]
    values: tuple[float, ...] = ()
    tasks: Mapping[str, float] = field(default_factory=dict)
    feasible: bool = True
    violation: float = 0.0
    error: str = ""
    seconds: float = 0.0


def best(space: Space, trials: Sequence[Trial], recommend: str = OBSERVED) -> Trial | None:
    """The answer; None where no trial has a score.

    Of points that keep the floors if there are any, else of those nearest to keeping them. With several objectives the one
    of the front with the highest mean. Ties go to the first.

    Args:
        recommend: "observed": the highest score, right where scores repeat exactly; "posterior": the highest mean of a
            Gaussian process on all scores at the points observed, right where they are noisy.
    """
    scored = [trial for trial in trials if trial.values]
    if not scored:
        return None
    allowed = [trial for trial in scored if trial.feasible]
    if not allowed:
        return min(scored, key=lambda trial: (trial.violation, -_mean(trial)))
    if len(allowed[0].values) > 1:
        return max(front(allowed), key=_mean)
    if recommend == POSTERIOR and len(scored) >= _ENOUGH:
        means = dict(zip((t.number for t in scored), posterior_means(space, scored), strict=True))
        return max(allowed, key=lambda trial: means[trial.number])
    return max(allowed, key=_mean)


def of_equal_weights(space: Space, trials: Sequence[Trial]) -> Trial | None:
    """The best trial at a point that gives all models the same weight: what a search has to beat; None where there is none."""
    points = uniform(space)
    found = [trial for trial in trials if trial.values and trial.feasible and trial.point in points]
    return max(found, key=_mean, default=None)


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other beats in one objective without losing in another, in order; of equals the first."""
    scored = [trial for trial in trials if trial.values and trial.feasible]
    values = np.array([trial.values for trial in scored])
    found: list[Trial] = []
    for i, trial in enumerate(scored):
        as_good, better = (values >= values[i]).all(1), (values > values[i]).any(1)
        twin = (values[:i] == values[i]).all(1).any()
        if not (as_good & better).any() and not twin:
            found.append(trial)
    return found


def posterior_means(space: Space, trials: Sequence[Trial]) -> NDArray[np.float64]:
    """The mean of a Gaussian process at the points observed: Matérn 5/2, a length for each dimension, noise fitted.

    Args:
        trials: with one value each.

    Returns:
        (trials,), in units of the score.
    """
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    places = np.array([space.coordinates(trial.point) for trial in trials])
    values = np.array([trial.values[0] for trial in trials])
    kernel = ConstantKernel(1.0, (0.05, 20.0)) * Matern(np.full(places.shape[1], 0.5), (0.05, 20.0), nu=2.5)
    process = GaussianProcessRegressor(
        kernel + WhiteKernel(0.05, (1e-6, 1.0)), normalize_y=True, n_restarts_optimizer=2, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a length at its bound is an answer, too
        process.fit(places, values)
        means: NDArray[np.float64] = process.predict(places)
    return means


def _mean(trial: Trial) -> float:
    return sum(trial.values) / len(trial.values)
