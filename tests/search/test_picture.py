"""Picture: what a search looks like."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any
from xml.etree import ElementTree

import pytest

from merging.methods import registry
from search.choose import Trial
from search.design import sobol, uniform
from search.picture import picture
from search.space import Space, Vary, make_space

SVG = "{http://www.w3.org/2000/svg}"
FAILED = "#c0392b"
MODELS = ["a", "b", "c"]
EQUAL = "equal weights: "


def space(
    method: str = "task_arithmetic", models: int = 3, names: Sequence[str] = (), most: int = 100, **vary: Vary
) -> Space:
    return make_space(registry.get(method), models, vary, names, most)


def trials(of: Space, count: int, tasks: Sequence[str] = ("sts", "qa"), front: bool = False) -> list[Trial]:
    """Equal weights, then Sobol's points; the third one failed."""
    found = []
    points = [*uniform(of)[:1], *sobol(of, count - 1, 0)]
    for number, point in enumerate(points):
        places = of.coordinates(point)
        scores = {task: 0.7 - 0.1 * (places[0] - 0.3 - 0.4 * i) ** 2 for i, task in enumerate(tasks)}
        values = tuple(scores.values()) if front else (sum(scores.values()) / len(scores),)
        failed = number == 2
        found.append(Trial(number, point, () if failed else values, {} if failed else scores, error="no" * failed))
    return found


def axes(svg: str) -> list[ElementTree.Element]:
    tree = ElementTree.fromstring(svg)
    return [group for group in tree.iter(f"{SVG}g") if re.fullmatch(r"axes_\d+", group.get("id", ""))]


def marks(panel: ElementTree.Element) -> list[str]:
    """The style of each mark that is no legend's."""
    collections = [group for group in panel if group.get("id", "").startswith("PathCollection")]
    return [use.get("style", "") for group in collections for use in group.iter(f"{SVG}use")]


def words(element: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in element.iter(f"{SVG}text")]


def test_every_trial_has_a_mark_and_what_failed_another() -> None:
    of = space()
    drawn = picture(of, trials(of, 12), MODELS, starts=4)
    history, by_task, *coefficients = axes(drawn)
    for panel in (history, *coefficients):
        found = marks(panel)
        assert len(found) == 13, "one each, and the star of the one that is taken"
        assert sum(FAILED in style for style in found) == 1
    assert {"proposed", "given to begin with", "failed", "taken", "the best so far"} <= set(words(history))
    assert [word for word in words(history) if word.startswith(EQUAL)]
    assert [word.partition(":")[0] for word in words(by_task) if word[:3] in ("sts", "qa:")] == ["sts", "qa"]
    assert [word for panel in coefficients for word in words(panel) if "weight" in word] == [
        *("weight of a", "weight of b", "weight of c")
    ]


@pytest.mark.parametrize("models", [1, 2, 12, 100])
def test_the_same_trials_are_the_same_file(models: int) -> None:
    of = space(models=models)
    names = [f"model {i}" for i in range(models)]
    first, second = (picture(of, trials(of, 6), names, starts=2) for _ in range(2))
    assert first == second
    told = " ".join(words(ElementTree.fromstring(first)))
    assert all(f"weight of {name}" in told for name in names)


def test_names_in_any_script_are_written_as_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    """Though the font may lack their letters: whoever looks at the picture has others."""
    of = space(models=2)
    drawn = picture(of, trials(of, 4), ["模型", "_a$b$"])
    assert "weight of 模型" in words(ElementTree.fromstring(drawn)) and "weight of _a$b$" in drawn
    assert capfd.readouterr() == ("", "")


def test_of_many_coefficients_each_has_a_row() -> None:
    names = [f"encoder.layer.{i}.attention.self.query.weight" for i in range(12)]
    of = space(names=names, weight=Vary(low=0.0, high=1.0, per="layers"))
    panels = axes(picture(of, trials(of, 10), MODELS))[2:]
    for panel, model in zip(filter(marks, panels), MODELS, strict=True):
        assert len(marks(panel)) == 12 * 11
        assert f"weight of {model}" in words(panel) and "encoder.layer.11" in words(panel)


def test_of_thousands_the_best_trial_alone_is_drawn() -> None:
    names = [f"tensor.{i}" for i in range(400)]
    of = space(names=names, most=20_000, weight=Vary(low=0.0, high=1.0, per="tensor"))
    *_, below = axes(picture(of, trials(of, 4), MODELS))
    assert not marks(below) and {"weight of a", "weight of b", "weight of c"} <= set(words(below))


def test_choices_logarithms_and_numbers_that_are_whole() -> None:
    of = space("ties", density=Vary(low=0.1, high=1.0, log=True), normalize=Vary(choices=(True, False)))
    *_, density, normalize = axes(picture(of, trials(of, 8), MODELS))
    assert {"density", "0.1", "0.2", "0.5", "1"} <= set(words(density))
    assert {"normalize", "True", "False"} <= set(words(normalize))


@pytest.mark.parametrize("tasks", [("sts", "qa"), ("sts", "qa", "$cost_$")])
def test_of_a_front_the_objectives_are_drawn_against_each_other(tasks: tuple[str, ...]) -> None:
    of = space(models=2)
    done = trials(of, 10, tasks, front=True)
    drawn = picture(of, done, MODELS, front=tasks)
    pairs = len(tasks) * (len(tasks) - 1) // 2
    panels = axes(drawn)
    for panel in panels[:pairs]:
        assert {"front", "1 failed"} <= set(words(panel)) and sum(word in tasks for word in words(panel)) == 2
    assert "mean of the tasks" in words(panels[pairs])


def test_a_ruined_merge_does_not_press_the_others_into_a_line() -> None:
    of = space()
    done = trials(of, 12)
    done[5] = replace(done[5], values=(-50.0,))
    history, *_ = axes(picture(of, done, MODELS))
    lower = sum("#8a8f94" in style for style in marks(history))
    assert "lower yet" in words(history) and len(marks(history)) == 13 + lower > 13
    assert not [word for word in words(history) if word.startswith("−5")]


def test_what_is_below_a_floor_is_neither_the_best_nor_marked_as_the_others() -> None:
    of = space(models=2)
    done = [replace(trial, feasible=trial.number > 3, violation=float(trial.number <= 3)) for trial in trials(of, 9)]
    history, *_ = axes(picture(of, done, MODELS))
    assert "below a floor" in words(history)


def test_where_all_failed_there_is_a_picture_of_that() -> None:
    of = space(models=2)
    done: list[Any] = [replace(trial, values=(), tasks={}, error="no") for trial in islice(trials(of, 5), 5)]
    history, *_ = axes(picture(of, done, MODELS))
    assert len(marks(history)) == 5 and "failed" in words(history) and "taken" not in words(history)
