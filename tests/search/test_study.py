from __future__ import annotations

import fcntl
import resource
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from merging.errors import CuveeError
from merging.methods import registry
from search.design import DEFAULT, design
from search.objective import Goal, Scores
from search.space import Vary, make_space
from search.study import JOURNAL, SQLITE, Settings, open_study, work

SPACE = make_space(registry.get("task_arithmetic"), 2, {})
SETTINGS = Settings(SPACE, "random", 0, design(SPACE, DEFAULT, 0), trials=10)


def tasks(coefficients: Mapping[str, Any]) -> Scores:
    first, second = coefficients["weight"]
    return Scores(tasks={"a": 1 - (first - 0.2) ** 2, "b": 1 - (second - 0.9) ** 2 - 0.1 * first})


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_a_study_keeps_its_trials_and_goes_on(tmp_path: Path, storage: str) -> None:
    work(open_study(replace(SETTINGS, trials=4), tmp_path, storage), tasks)
    again = open_study(SETTINGS, tmp_path, storage)
    assert [trial.point for trial in again.trials()] == list(SETTINGS.design[:4])
    work(again, tasks)
    assert len(again.trials()) == 10
    assert all(trial.tasks.keys() == {"a", "b"} for trial in again.trials())
    assert again.trials()[0].values == ((again.trials()[0].tasks["a"] + again.trials()[0].tasks["b"]) / 2,)


@pytest.mark.parametrize("name", ["what?", "per%20cent", "c#"])
def test_a_folder_s_name_is_any(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    work(open_study(replace(SETTINGS, trials=2), folder, "sqlite"), tasks)
    assert (folder / SQLITE).stat().st_size and [*tmp_path.iterdir()] == [folder]
    assert len(open_study(SETTINGS, folder, "sqlite").trials()) == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"engine": "tpe"}, "engine"),
        ({"seed": 1}, "seed"),
        ({"space": make_space(registry.get("task_arithmetic"), 2, {"lambda": Vary(low=0, high=1)})}, "space"),
        ({"goal": Goal("worst")}, "goal"),
        ({"identity": {"models": ["x"]}}, "models"),
    ],
)
def test_another_study_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    open_study(SETTINGS, tmp_path)
    with pytest.raises(CuveeError, match=rf"holds a study of another {told}( \([^)]+\))?; .*--force"):
        open_study(replace(SETTINGS, **change), tmp_path)


def test_failed_trials_are_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    calls = []

    def sometimes(coefficients: Mapping[str, Any]) -> Scores:
        calls.append(coefficients)
        if len(calls) == 2:
            raise ValueError("out of luck")
        return Scores(float("nan") if len(calls) == 4 else 0.5)

    study = open_study(SETTINGS, tmp_path)
    work(study, sometimes)
    errors = {trial.number: trial.error for trial in study.trials() if trial.error}
    assert errors == {1: "ValueError: out of luck", 3: "objective: the objective gave nan, which is no score"}
    assert len(study.trials()) == 10


def test_nothing_but_failures_ends_the_search(tmp_path: Path) -> None:
    def never(coefficients: Mapping[str, Any]) -> Scores:
        raise CuveeError("is broken", where="score.py")

    with pytest.raises(CuveeError, match="8 trials in a row failed, the last one: score"):
        work(open_study(SETTINGS, tmp_path), never)
    study = open_study(SETTINGS, tmp_path)
    work(study, tasks)
    assert [bool(trial.error) for trial in study.trials()] == [True] * 8 + [False] * 2


def test_half_a_line_of_a_killed_writer_does_not_spoil_the_journal(tmp_path: Path) -> None:
    work(open_study(replace(SETTINGS, trials=3), tmp_path), tasks)
    with open(tmp_path / JOURNAL, "ab") as journal:
        journal.write(b'{"op_code":5,"worker_id":"x')
    work(open_study(replace(SETTINGS, trials=5), tmp_path), tasks)
    assert len(open_study(SETTINGS, tmp_path).trials()) == 5


def test_half_a_line_of_a_killed_worker_does_not_spoil_what_another_writes(tmp_path: Path) -> None:
    work(open_study(replace(SETTINGS, trials=3), tmp_path), tasks)
    other = open_study(replace(SETTINGS, trials=5), tmp_path)
    with open(tmp_path / JOURNAL, "ab") as journal:
        journal.write(b'{"op_code":5,"worker_id":"x')
    work(other, tasks)
    assert len(other.trials()) == len(open_study(SETTINGS, tmp_path).trials()) == 5


def test_a_journal_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    study = open_study(SETTINGS, tmp_path)

    def full(coefficients: Mapping[str, Any]) -> Scores:
        size = (tmp_path / JOURNAL).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))  # as on a disk with room for half a line
        return Scores(0.5)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CuveeError, match=f"{JOURNAL}: cannot write: File too large"):
            work(study, full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = open_study(SETTINGS, tmp_path)
    work(again, tasks, orphans=again.orphans())
    assert len(again.trials()) == 10 and not any(trial.error for trial in again.trials())


def test_a_trial_that_was_left_draws_its_point_while_nobody_else_draws(tmp_path: Path) -> None:
    study = open_study(replace(SETTINGS, design=[]), tmp_path)
    study.optuna._storage.create_new_trial(study.optuna._study_id)
    taken: list[Any] = []
    taker = threading.Thread(target=lambda: taken.append(study.take(0).params))
    with open(tmp_path / ".ask", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        taker.start()
        taker.join(0.5)
        assert not taken
    taker.join()
    assert taken[0].keys() == {"weight.0", "weight.1"}


def test_no_gain_and_seconds_end_a_search(tmp_path: Path) -> None:
    study = open_study(replace(SETTINGS, trials=50, no_gain=4), tmp_path)
    work(study, lambda coefficients: Scores(-len(study.trials())))
    assert len(study.trials()) == 5 and study.ended() == "no_gain"
    timed = open_study(replace(SETTINGS, trials=50, seconds=1e-9), tmp_path)
    assert timed.ended() == "seconds"


def test_floors_are_constraints(tmp_path: Path) -> None:
    study = open_study(replace(SETTINGS, goal=Goal(floors={"a": 0.9})), tmp_path)
    work(study, tasks)
    for trial in study.trials():
        assert trial.feasible == (trial.tasks["a"] >= 0.9)
    assert {trial.feasible for trial in study.trials()} == {True, False}


def test_without_a_point_that_keeps_the_floors_a_gain_is_to_come_nearer(tmp_path: Path) -> None:
    study = open_study(replace(SETTINGS, trials=30, no_gain=4, goal=Goal(floors={"room": 0.0})), tmp_path)
    work(study, lambda coefficients: Scores(1.0, {"room": min(len(study.trials()), 3) - 9.0}))
    assert len(study.trials()) == 8 and study.ended() == "no_gain", "trial 3 is the last that comes nearer"


def test_several_objectives(tmp_path: Path) -> None:
    front = replace(SETTINGS, goal=Goal(front=("a", "b")), trials=9, engine="tpe")
    study = open_study(front, tmp_path)
    work(study, tasks)
    assert all(trial.values == (trial.tasks["a"], trial.tasks["b"]) for trial in study.trials())
    with pytest.raises(CuveeError, match="'cma' searches for one objective, not 2"):
        open_study(replace(front, engine="cma"), tmp_path / "other")


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        (Goal(), [0.5]),
        (Goal("worst"), [0.2]),
        (Goal("weighted", {"a": 3, "b": 1}), [0.35]),
        (Goal(front=("b", "a")), [0.8, 0.2]),
    ],
)
def test_what_is_maximised(goal: Goal, expected: list[float]) -> None:
    assert goal.values(Scores(tasks={"a": 0.2, "b": 0.8})) == pytest.approx(expected)


def test_what_stands_beside_the_tasks_is_never_the_worst() -> None:
    scores = Scores(tasks={"a": 0.2, "b": 0.8, "a.valid": 0.1}, beside=("a.valid",))
    assert Goal("worst").values(scores) == [0.2] and Goal().values(scores) == [0.5]
    assert Goal("worst", floors={"a.valid": 0.3}).violations(scores) == {"a.valid": pytest.approx(0.2)}


def test_a_missing_task_is_told() -> None:
    with pytest.raises(CuveeError, match="no score of the task 'c'; given: a"):
        Goal(front=("a", "c")).values(Scores(tasks={"a": 1.0}))


FEW = make_space(
    registry.get("task_arithmetic"),
    2,
    {"weight": Vary(choices=(0.0, 0.3, 0.6, 1.0), per="model"), "lambda": Vary(value=1.0)},
)


@pytest.mark.parametrize("engine", ["gp", "tpe", "skopt", "qmc", "random"])
def test_a_space_of_few_points_is_tried_once_over(tmp_path: Path, engine: str) -> None:
    settings = replace(SETTINGS, space=FEW, engine=engine, design=design(FEW, DEFAULT, 0), trials=40)

    def scores(coefficients: Mapping[str, Any]) -> Scores:
        return Scores(float("nan")) if coefficients["weight"] == [0.3, 0.6] else tasks(coefficients)

    def points(folder: str, *halves: Settings) -> list[Any]:
        (tmp_path / folder).mkdir()
        for half in halves:
            study = open_study(half, tmp_path / folder)
            work(study, scores)
        assert study.ended() == "space"
        return [tuple(trial.point.values()) for trial in study.trials()]

    found = points("one", settings)
    assert len(found) == len(set(found)) == 16
    assert points("two", replace(settings, trials=11), settings) == found


def test_a_space_of_many_points_is_not_listed() -> None:
    free = make_space(registry.get("task_arithmetic"), 2, {"weight": Vary(low=0, high=1, per="model")})
    assert free.points() is None
    choices = Vary(choices=tuple(i / 9 for i in range(10)), per="model")
    assert (
        make_space(registry.get("task_arithmetic"), 4, {"weight": choices, "lambda": Vary(value=1.0)}).points() is None
    )
    fixed = {"weight": Vary(choices=(0.0, 1.0), per="model"), "lambda": Vary(low=0.5, high=0.5)}
    few = make_space(registry.get("task_arithmetic"), 2, fixed).points()
    assert few is not None and len(list(few)) == 4
