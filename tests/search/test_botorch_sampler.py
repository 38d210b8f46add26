"""What the engine `botorch` knows besides the scores: floors, fronts, categoricals, and what others have at work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("botorch", reason="botorch is not installed: extra 'botorch'")
import torch

from merging.methods import registry
from search.botorch_sampler import propose
from search.objective import Goal, Scores
from search.space import Vary, make_space
from search.study import Settings, Study, open_study, work

START = [[0.0, 0.1], [0.2, 0.9], [0.9, 0.2], [0.5, 0.5], [1.0, 1.0], [0.1, 0.4], [0.7, 0.8], [0.35, 0.2]]


def searched(
    folder: Path, score: Callable[[float, float], dict[str, float]], goal: Goal, trials: int, **vary: Vary
) -> Study:
    space = make_space(registry.get("task_arithmetic"), 2, vary)
    start = [{**{d.name: d.default for d in space.dimensions}, "weight.0": a, "weight.1": b} for a, b in START]
    study = open_study(Settings(space, "botorch", 0, start, trials, goal), folder)
    work(study, lambda coefficients: Scores(None, score(*coefficients["weight"])))
    return study


def places(rows: list[list[float]]) -> Any:
    return torch.tensor(rows, dtype=torch.double).reshape(len(rows), -1)


def test_it_finds_the_top_of_a_bowl(tmp_path: Path) -> None:
    study = searched(tmp_path, lambda a, b: {"t": -((a - 0.3) ** 2) - (b - 0.8) ** 2}, Goal(), 16)
    assert max(trial.values[0] for trial in study.trials()) > -1e-3


def test_it_keeps_to_the_floors(tmp_path: Path) -> None:
    # The best point lies beyond the floor: without it b would be 1, with it a + b ≤ 1.
    goal = Goal("weighted", {"t": 1.0}, floors={"room": 0.0})
    study = searched(tmp_path, lambda a, b: {"t": b - (a - 0.5) ** 2, "room": 1 - a - b}, goal, 16)
    found = [trial for trial in study.trials() if trial.feasible]
    best = max(found, key=lambda trial: trial.values[0])
    assert best.values[0] > 0.70 and len(found) > 6  # 0.75 at (0, 1) and its like
    assert sum(trial.feasible for trial in study.trials()[8:]) >= 4


def test_it_goes_on_where_no_point_keeps_the_floors(tmp_path: Path) -> None:
    study = searched(tmp_path, lambda a, b: {"t": a, "room": b - 3}, Goal(floors={"room": 0.0}), 11)
    assert len(study.trials()) == 11 and not any(trial.error for trial in study.trials())


def test_it_fills_a_front(tmp_path: Path) -> None:
    goal = Goal(front=("one", "other"))
    study = searched(tmp_path, lambda a, b: {"one": a - 2 * b, "other": -(a**2) - b}, goal, 16)
    new = study.trials()[8:]
    assert sum(trial.point["weight.1"] < 0.05 for trial in new) >= 5  # where the front lies
    assert len({round(trial.point["weight.0"], 1) for trial in new}) >= 4


def test_it_goes_round_what_others_have_at_work() -> None:
    rows = places(START)
    values = -((rows - 0.4) ** 2).sum(1, keepdim=True)
    first = propose(rows, values, rows[:, :0], rows[:0], 0)
    second = propose(rows, values, rows[:, :0], first[None], 0)
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(first, propose(rows, values, rows[:, :0], rows[:0], 0))


@pytest.mark.parametrize("same", [0.0, 1e9])
def test_scores_that_are_all_the_same_are_no_failure(same: float) -> None:
    rows = places(START)
    found = propose(rows, torch.full((len(rows), 1), same, dtype=torch.double), rows[:, :0], rows[:0], 0)
    assert ((found >= 0) & (found <= 1)).all()


def test_the_scale_of_the_scores_changes_nothing() -> None:
    rows = places(START)
    values = -((rows - 0.4) ** 2).sum(1, keepdim=True)
    found = [propose(rows, scale * values + 5, rows[:, :0], rows[:0], 0) for scale in (1.0, 2.0**-12)]
    assert (found[0] - found[1]).abs().max() < 1e-3


def test_choices_are_proposed_as_they_are(tmp_path: Path) -> None:
    def score(coefficients: Mapping[str, Any]) -> Scores:
        return Scores(coefficients["weight"][0] - (coefficients["normalize"] is True))

    space = make_space(registry.get("task_arithmetic"), 2, {"normalize": Vary(choices=(True, False))})
    start = [{"weight.0": a, "weight.1": b, "normalize": a < 0.5} for a, b in START]
    study = open_study(Settings(space, "botorch", 0, start, 13), tmp_path)
    work(study, score)
    assert [trial.point["normalize"] for trial in study.trials()[8:]].count(False) >= 4


def test_the_user_s_random_numbers_stay_theirs() -> None:
    rows = places(START)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    propose(rows, rows[:, :1], rows[:, :0], rows[:0], 0)
    assert torch.equal(torch.rand(3), expected)
