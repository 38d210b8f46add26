"""BoTorchSampler: proposals by BoTorch's log noisy expected improvement, of a hypervolume where there is a front.

    model        a Gaussian process for each objective and each floor, on the unit cube, noise fitted
    acquisition  qLogNEI; with a front qLogNEHVI; both know floors and what other workers have at work

Source: arXiv 2310.20708 (LogEI and its kin), arXiv 2105.08195 (NEHVI).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search.one_proposal import OneProposal
from search.space import Space

if TYPE_CHECKING:
    from torch import Tensor

_FIT_STEPS, _FIT_GAIN = 20, 1e-6  # to the end a fit takes five times as long, and the lengths differ by hundredths
_SAMPLES, _STARTS, _RAW, _STEPS, _LOOKS = 64, 4, 32, 20, 5  # of the acquisition


class BoTorchSampler(OneProposal):
    """One proposal; failed trials are not known to it. Leaves torch's own random state as it was."""

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        import torch

        varied = replace(self.space, dimensions=tuple(d for d in self.space.dimensions if d.name in search_space))
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        at_work = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        pending = [t for t in at_work if t.number != trial.number and search_space.keys() <= t.params.keys()]
        floors = sorted({name for other in done for name in other.constraints})
        place = propose(
            _places(varied, done),
            torch.tensor([other.values for other in done], dtype=torch.double),
            torch.tensor([[other.constraints[name] for name in floors] for other in done], dtype=torch.double),
            _places(varied, pending),
            self.seed,
        )
        return _point(varied, place.tolist())


def propose(places: Tensor, values: Tensor, below: Tensor, pending: Tensor, seed: int) -> Tensor:
    """Where to look next, (coordinates,), float64 in [0, 1].

    Args:
        places: (trials, coordinates), float64.
        values: (trials, objectives), higher is better.
        below: (trials, floors), above 0 where a floor is not kept.
        pending: (others, coordinates), whose values are not known yet.
    """
    with _aside(seed):
        return _best(places, values, below, pending, seed)


def _best(places: Tensor, values: Tensor, below: Tensor, pending: Tensor, seed: int) -> Tensor:
    import torch
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
    from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
    from botorch.acquisition.objective import LinearMCObjective
    from botorch.models import ModelListGP
    from botorch.optim import optimize_acqf
    from botorch.sampling import SobolQMCNormalSampler

    objectives = values.shape[1]
    # The acquisition smooths by absolute amounts, which are meant for scores that spread by 1.
    outcomes = torch.cat([_spread_by_one(values - values.mean(0)), _spread_by_one(below)], 1)
    models = [_fitted(places, outcomes[:, i : i + 1]) for i in range(outcomes.shape[1])]
    model = models[0] if len(models) == 1 else ModelListGP(*models)
    shared: dict[str, Any] = {
        "X_baseline": places,
        "X_pending": pending if len(pending) else None,
        "sampler": SobolQMCNormalSampler(torch.Size([_SAMPLES]), seed=seed),
        "constraints": [_column(i) for i in range(objectives, outcomes.shape[1])] or None,
        "prune_baseline": True,
    }
    acquisition: Any
    if objectives == 1:
        first = torch.eye(outcomes.shape[1], dtype=torch.double)[0]
        acquisition = qLogNoisyExpectedImprovement(model, objective=LinearMCObjective(first), **shared)
    else:
        own = outcomes[:, :objectives]
        acquisition = qLogNoisyExpectedHypervolumeImprovement(
            model,
            ref_point=(own.min(0).values - 0.1 * (own.max(0).values - own.min(0).values)).tolist(),
            objective=IdentityMCMultiOutputObjective(outcomes=[*range(objectives)]),
            **shared,
        )
    bounds = torch.stack([torch.zeros_like(places[0]), torch.ones_like(places[0])])
    found, _ = optimize_acqf(
        acquisition,
        bounds,
        q=1,
        num_restarts=_STARTS,
        raw_samples=_RAW,
        options={"batch_limit": _STARTS, "maxiter": _STEPS, "maxls": _LOOKS, "seed": seed},
        retry_on_optimization_warning=False,  # the best of the starts is good enough
    )
    return found[0].detach()


def _fitted(places: Tensor, outcome: Tensor) -> Any:
    """A Gaussian process by maximum a posteriori; where that is not found, by its priors."""
    from botorch.exceptions import ModelFittingError
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood

    process = SingleTaskGP(places, outcome, outcome_transform=None)
    try:
        options = {"maxiter": _FIT_STEPS, "ftol": _FIT_GAIN}
        fit_gpytorch_mll(ExactMarginalLogLikelihood(process.likelihood, process), optimizer_kwargs={"options": options})
    except ModelFittingError:
        return SingleTaskGP(places, outcome, outcome_transform=None)
    return process


def _spread_by_one(values: Tensor) -> Tensor:
    spread = (values - values.mean(0)).square().mean(0).sqrt()
    return values / spread.where(spread > 1e-12, spread.new_ones(()))


def _column(number: int) -> Callable[[Tensor], Tensor]:
    return lambda samples: samples[..., number]


def _places(space: Space, trials: Sequence[FrozenTrial]) -> Tensor:
    """(trials, coordinates) in the unit cube."""
    import torch

    return torch.tensor([space.coordinates(other.params) for other in trials], dtype=torch.double)


def _point(space: Space, place: Sequence[float]) -> dict[str, Any]:
    """The value of each dimension; of a categorical the choice whose coordinate is the greatest."""
    found, start = {}, 0
    for dimension in space.dimensions:
        count = len(dimension.choices) or 1
        own = place[start : start + count]
        start += count
        found[dimension.name] = dimension.choices[int(np.argmax(own))] if dimension.choices else dimension.at(own[0])
    return found


@contextmanager
def _aside(seed: int) -> Iterator[None]:
    """Torch's random state, seeded, put back afterwards; warnings of fits that end early are not the user's."""
    import torch

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield
