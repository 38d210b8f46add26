"""DF-Merge in memory: for every coefficient vector the Fisher information of the scaled models anew, then the merge.

1. For each model i the weights of a network of its own become θ₀ + λᵢτᵢ, and its Fisher diagonal Fᵢ is taken on the same
   examples, read and tokenised once.
2. The module's weights become θ₀ + M · Σ Fᵢλᵢτᵢ / Σ Fᵢ.

Source: arXiv 2504.18992.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from merging import methods, recipe_statistics
from merging.checkpoint import Checkpoint
from merging.errors import CuveeError, MergeError
from merging.inputs import Values, Workspace
from merging.live import LiveMerge, Ref, weights_of
from merging.live_rewriting import Rewriting
from merging.plan import Step
from merging.recipe import Recipe
from merging.sources import ModelRef, StatsRef
from merging.views import View

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from merging.statistics.again import FisherAgain
    from merging.statistics.network import Network

#: Options of `stats:` that decide about the network that reads the examples.
_OF_NETWORK = ("head", "dtype", "max_length", "device")
_FROZEN = None  # in place of a scale: of the model as it is


class LiveDF(LiveMerge):
    """A `LiveMerge` of `df_merge` that takes its statistics itself.

    Held beside what `LiveMerge` holds, in bytes a weight: 4 for the network that reads the examples (one for all models, if
    their options are alike), 4 for each model's Fisher, 8 for the sums while one is taken, and the gradients of one micro-batch.

    Args:
        module, base, models, parameters, dtype, storage, device, seed, threads, backend: see `LiveMerge`.
        stats: of each model what a recipe says of statistics to be made on the way: `{"data": FILE, "examples": 30, …}`.
        trust_remote_code: run Python code that comes with the base.
        note: takes lines for the log.

    Raises:
        CuveeError: as `LiveMerge`; data or a base of which no Fisher information can be taken.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        base: Ref,
        models: Sequence[Ref],
        *,
        stats: Sequence[Mapping[str, Any]],
        parameters: Mapping[str, Any] | None = None,
        groups: Callable[[str], str] | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        storage: Literal["memory", "mapped"] = "memory",
        device: str = "cpu",
        seed: int = 0,
        threads: int | None = None,
        backend: str = "auto",
        trust_remote_code: bool = False,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        stats = [{**each, "data": os.path.abspath(os.path.expanduser(each["data"]))} for each in stats]
        super().__init__(
            module, base, models, method="df_merge", parameters=parameters, groups=groups, dtype=dtype, storage=storage,
            device=device, stats=stats, seed=seed, threads=threads, backend=backend,
        )  # fmt: skip
        self._trusted, self._say = trust_remote_code, note
        options = [
            recipe_statistics.options_of(StatsRef(None, each), self._method, seed=seed, device=device) for each in stats
        ]
        self._options = [{key: value for key, value in each.items() if key != "kind"} for each in options]
        probes: dict[str, _Probe] = {}
        self._scaled: list[tuple[_Probe, FisherAgain]] = []
        for own in self._options:
            key = repr([own.get(name) for name in _OF_NETWORK])
            if key not in probes:  # one for all models whose examples are read alike
                probes[key] = self._probe(self._network(self._base, own))
            self._scaled.append((probes[key], self._fisher_of(probes[key].network, own)))
        self._taken: list[_Taken] = [_Taken() for _ in self._options]

    def _attach(self, trial: Recipe, base: View, seed: int) -> None:
        """Nothing yet: statistics depend on the coefficients."""

    def _prepare(self, recipe: Recipe) -> None:
        scales = recipe.scales(self._method) or (_FROZEN,) * self.models
        for model, scale in enumerate(scales):
            if self._taken[model].of is None or self._taken[model].scale != scale:
                self._taken[model] = _Taken()
                self._give()  # so that the old one is gone before there is a new one
                self._taken[model] = _Taken(scale, self._fisher(model, scale))
        self._give()

    def _give(self) -> None:
        """Lets the method see what has been taken."""
        held = self._rewriting.held
        for step in self._merged():
            known = [(taken.of or {}).get(step.name) for taken in self._taken]
            own = tuple(None if values is None else HeldFisher(values) for values in known)
            held[step.name] = replace(held[step.name], statistics=own)

    def _fisher(self, model: int, scale: float | None) -> dict[str, Values]:
        """By the plan's name the Fisher diagonal of a model, at a scale or as it is: (n,) float32 where models are held."""
        if scale is _FROZEN:
            network = self._network(self._views[model].ref, self._options[model])
            found = self._fisher_of(network, self._options[model])()
            names = {step.name: step.models[model][1].name for step in self._merged()}
        else:
            probe, take = self._scaled[model]
            steps = tuple(self._alone(step, model, scale) for step in self._plan.steps)
            probe.rewriting.rewrite(replace(self._plan, steps=steps))
            found = take()
            names = {step.name: step.base[1].name for step in self._merged() if step.base}
        for name, own in found.items():
            if not bool(own.isfinite().all()):
                what = f"the Fisher information of '{name}' is not finite"
                raise MergeError(what, where=str(self._views[model].ref), mend="compute it in float32")
        return {name: self._rewriting.flat(found[stored]) for name, stored in names.items() if stored in found}

    def _alone(self, step: Step, model: int, scale: float) -> Step:
        """θ₀ + s·τ of one model."""
        if step.action != "merge" or not self._complete(step):
            return step
        weights = [scale if i == model else 0.0 for i in range(self.models)]
        sums = {"weight": weights, "normalize": False, "lambda_": 1.0}
        return replace(step, method=methods.get("task_arithmetic"), parameters=sums, statistics=False)

    def _network(self, ref: ModelRef, options: Mapping[str, Any]) -> Network:
        from merging.statistics.network import open_network

        own = {name: options[name] for name in _OF_NETWORK if name in options}
        return open_network(ref, trust_remote_code=self._trusted, **own)

    def _fisher_of(self, network: Network, options: Mapping[str, Any]) -> FisherAgain:
        from merging.statistics.again import FisherAgain

        own = {name: value for name, value in options.items() if name not in _OF_NETWORK}
        return FisherAgain(network, **own, note=self._say)

    def _probe(self, network: Network) -> _Probe:
        """Raises CuveeError where it reads weights that the module has not."""
        from merging.statistics.matching import unread

        with Checkpoint.open(self._base) as checkpoint:
            weights = weights_of(network.module, self._base, checkpoint)
        names = {step.base[1].name: step.name for step in self._plan.steps if step.base}
        odd = next((name for name in weights if name not in names and not unread(name)), None)
        if odd is not None:
            what = f"the head '{network.head}' of the statistics reads '{odd}', which the module that is merged has not"
            raise CuveeError(what, where=str(self._base), mend="name in 'stats' the head that the objective has")
        return _Probe(
            network, self._rewriting.onto({names[name]: own for name, own in weights.items() if name in names})
        )


class HeldFisher:
    """A Fisher diagonal in memory, (n,) float32 where the kernels work."""

    kind = "fisher"

    def __init__(self, values: Values) -> None:
        self._values = values

    def load(self, start: int, stop: int, values: Values, workspace: Workspace) -> None:
        values[:] = self._values[start:stop]

    def gram(self) -> tuple[NDArray[np.float32], int]:
        raise AssertionError("a Fisher diagonal is no Gram matrix")


class _Probe(NamedTuple):
    """A network of the base, and what gives it the weights of scaled models."""

    network: Network
    rewriting: Rewriting


@dataclass(frozen=True)
class _Taken:
    """A model's Fisher diagonal by the plan's names, and at which scale; None: none yet."""

    scale: float | None = _FROZEN
    of: Mapping[str, Values] | None = None
