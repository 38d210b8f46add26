"""What every engine must keep, a third party's too: bounds, its own seed, and the same proposals after a kill."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from merging.methods import registry
from search import engines
from search.design import DEFAULT, design
from search.objective import Scores
from search.space import Space, Vary, make_space
from search.study import Settings, open_study, work

ENGINES = [
    pytest.param(name, marks=pytest.mark.skipif(absent, reason=f"{entry.modules} not installed: extra '{entry.extra}'"))
    for name, entry in engines.ENGINES.items()
    for absent in [any(find_spec(module) is None for module in entry.modules)]
    if entry.proposes
]
TRIALS, KILLED_AT = 12, 9


def mixed_space() -> Space:
    """Continuous, logarithmic and categorical."""
    vary = {"lambda": Vary(low=0.1, high=10, log=True), "normalize": Vary(choices=(True, False))}
    return make_space(registry.get("task_arithmetic"), 2, vary)


def score(coefficients: Mapping[str, Any]) -> Scores:
    first, second = coefficients["weight"]
    bowl = (first - 0.3) ** 2 + (second - 0.8) ** 2 + math.log10(coefficients["lambda"]) ** 2
    return Scores(1 - bowl - 0.1 * coefficients["normalize"])


def settings(engine: str, seed: int = 0, trials: int = TRIALS) -> Settings:
    space = mixed_space()
    return Settings(space, engine, seed, design(space, DEFAULT, seed), trials)


@pytest.fixture(scope="module", params=ENGINES)
def searched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    folder = tmp_path_factory.mktemp("study")
    study = open_study(settings(request.param), folder)
    work(study, score)
    return request.param, study.trials()


def test_points_lie_in_the_space_and_differ(searched: tuple[str, list[Any]]) -> None:
    _, trials = searched
    assert [trial.number for trial in trials] == list(range(TRIALS))
    for trial in trials:
        assert 0 <= trial.point["weight.0"] <= 1 and 0 <= trial.point["weight.1"] <= 1
        assert 0.1 <= trial.point["lambda"] <= 10 and isinstance(trial.point["normalize"], bool)
    assert len({str(trial.point) for trial in trials}) == TRIALS


def test_the_same_trials_after_a_kill(searched: tuple[str, list[Any]], tmp_path: Path) -> None:
    engine, whole = searched
    seen = []

    def killed(coefficients: Mapping[str, Any]) -> Scores:
        seen.append(coefficients)
        if len(seen) == KILLED_AT:
            raise KeyboardInterrupt
        return score(coefficients)

    study = open_study(settings(engine), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        work(study, killed)
    again = open_study(settings(engine), tmp_path)
    assert again.orphans() == [KILLED_AT - 1]
    work(again, score, orphans=again.orphans())
    assert [(t.number, t.point, t.values) for t in again.trials()] == [(t.number, t.point, t.values) for t in whole]


def test_the_same_point_for_a_trial_that_was_killed_before_it_had_one(
    searched: tuple[str, list[Any]], tmp_path: Path
) -> None:
    engine, whole = searched
    study = open_study(settings(engine, trials=KILLED_AT), tmp_path)
    work(study, score)
    study.optuna._storage.create_new_trial(study.optuna._study_id)
    again = open_study(settings(engine, trials=KILLED_AT + 1), tmp_path)
    work(again, score, orphans=again.orphans())
    assert [t.point for t in again.trials()] == [t.point for t in whole[: KILLED_AT + 1]]


def test_another_seed_proposes_otherwise(searched: tuple[str, list[Any]], tmp_path: Path) -> None:
    engine, whole = searched
    study = open_study(settings(engine, seed=1, trials=3), tmp_path)
    work(study, score)
    assert study.trials()[2].point != whole[2].point
