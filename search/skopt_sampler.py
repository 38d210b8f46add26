"""SkoptSampler: scikit-optimize as a sampler of Optuna, so that its trials lie in the same storage as all others."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from search.one_proposal import OneProposal


class SkoptSampler(OneProposal):
    """scikit-optimize by its ask and tell: a Gaussian process, Matérn 5/2, expected improvement with ξ = 0.01.

    One proposal; floors, failed trials and those at work are not known to it.
    """

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scikit-learn about scikit-optimize's age, and of fits that end early
            from skopt import Optimizer
            from skopt.space import Categorical, Integer, Real

            dimensions: list[Any] = []
            varied = [d for d in self.space.dimensions if d.name in search_space]
            for d in varied:
                prior = "log-uniform" if d.log else "uniform"
                if d.choices:
                    dimensions.append(Categorical(list(d.choices)))
                elif d.whole:
                    dimensions.append(Integer(int(d.low or 0), int(d.high or 0), prior=prior))
                else:
                    dimensions.append(Real(d.low, d.high, prior=prior))
            optimizer = Optimizer(
                dimensions,
                base_estimator="GP",
                n_initial_points=1,
                acq_func="EI",
                acq_func_kwargs={"xi": 0.01},
                acq_optimizer="auto",  # by gradients, but of choices alone
                random_state=self.seed,
            )
            done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            rows = [[other.params[d.name] for d in varied] for other in done]
            optimizer.tell(rows, [-float(other.value or 0.0) for other in done])
            return dict(zip((d.name for d in varied), map(_plain, optimizer.ask()), strict=True))


def _plain(value: Any) -> Any:
    """A Python value of one of numpy's."""
    return value.item() if isinstance(value, np.generic) else value
