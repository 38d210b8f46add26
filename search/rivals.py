"""Rivals: engines that do not propose points but go their own way to one, by gradients or in closed form."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from merging.errors import CuveeError
from merging.output import write_whole
from search import adamerging
from search.candidates import Candidates
from search.choose import Trial
from search.cocktail import alone, mixed
from search.config import SearchConfig
from search.space import Space
from search.study import Study, attempt

COCKTAIL_FILE = "lm_cocktail.json"
#: What they leave in the search's folder.
MADE = (adamerging.STATE, COCKTAIL_FILE)


class Work(Protocol):
    """As `search.study.work`."""

    def __call__(
        self,
        study: Study,
        candidates: Candidates,
        config: SearchConfig,
        *,
        orphans: Sequence[int] = (),
        told: Callable[[Trial], None] = ...,
    ) -> None: ...


@dataclass(frozen=True)
class Rival:
    """How one of them goes.

    Attributes:
        begin: checks that it can search that space, and says the points to start with.
        trials: by default.
    """

    begin: Callable[[SearchConfig, Space], list[dict[str, Any]]]
    work: Work
    trials: int


def get(config: SearchConfig, workers: int = 1) -> Rival | None:
    """That of a configuration; None where its engine proposes points.

    Raises:
        CuveeError: it goes alone.
    """
    found = _RIVALS.get(config.engine)
    if found is not None and workers > 1:
        what = f"'{config.engine}' goes from step to step, so no two workers can share it"
        raise CuveeError(what, where="--workers", mend="leave it out")
    return found


def begin_cocktail(config: SearchConfig, space: Space) -> list[dict[str, Any]]:
    """Nothing: its one point is found by its work.

    Raises:
        CuveeError: a space without a weight of each model, more than one trial, or points to start with.
    """
    where = config.at("vary") if "vary" in config.lines else config.at("method")
    alone(space, where)
    if config.trials not in (None, 1):
        raise CuveeError("LM-Cocktail is one trial", where=config.at("trials"), mend="leave 'trials' out")
    if "start" in config.lines:
        what = "LM-Cocktail has no start: its one point follows from what each model scores"
        raise CuveeError(what, where=config.at("start"), mend="leave 'start' out")
    return []


def work_cocktail(
    study: Study,
    candidates: Candidates,
    config: SearchConfig,
    *,
    orphans: Sequence[int] = (),
    told: Callable[[Trial], None] = lambda trial: None,
) -> None:
    """Scores each model alone, then the mixture of them all; what each lost lies in `lm_cocktail.json`.

    Raises:
        CuveeError: a model has no score.
    """
    space, began = study.settings.space, time.perf_counter()
    losses = []
    for source, point in zip(config.models, alone(space), strict=True):
        try:
            values = config.goal.values(candidates(space.coefficients(point)))
        except Exception as error:
            reason = error.what if isinstance(error, CuveeError) else f"{type(error).__name__}: {error}"
            raise CuveeError(f"has no score: {reason}", where=str(source.model)) from error
        losses.append(-sum(values) / len(values))
    point = mixed(space, losses, config.tuning["temperature"])
    models = [str(source.model) for source in config.models]
    text = json.dumps({"models": models, "losses": losses, "point": point}, indent=2)
    write_whole(study.folder / COCKTAIL_FILE, text + "\n")
    trial = study.take(orphans[0]) if orphans else study.put(point)
    if trial is not None:
        told(attempt(study, trial, candidates, began))


_RIVALS = {
    "adamerging": Rival(adamerging.begin, adamerging.work, adamerging.TRIALS),
    "lm_cocktail": Rival(begin_cocktail, work_cocktail, 1),
}
