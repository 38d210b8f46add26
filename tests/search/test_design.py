from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from merging.errors import CuveeError
from merging.methods import registry
from search.design import DEFAULT, POINTS, Start, design
from search.space import Vary, make_space

SPACE = make_space(registry.get("task_arithmetic"), 4, {})


def test_uniform_weights_first_then_sobol() -> None:
    points = design(SPACE, DEFAULT, seed=0)
    assert len(points) == POINTS
    assert [set(point.values()) for point in points[:2]] == [{0.25}, {0.5}]
    assert points == design(SPACE, DEFAULT, seed=0) != design(SPACE, DEFAULT, seed=1)
    assert all(0 <= value <= 1 for point in points for value in point.values())


def test_random_starts_are_independent_uniform_draws_of_the_seed() -> None:
    space = make_space(registry.get("task_arithmetic"), 4, {"weight": Vary(low=0.1, high=0.9, per="model")})
    points = design(space, (Start("random", 2000),), 3)
    values = np.array([list(point.values()) for point in points])
    assert points == design(space, (Start("random", 2000),), 3) and points[:9] != design(
        space, (Start("random", 9),), 4
    )
    assert values.min() >= 0.1 and values.max() <= 0.9
    assert values.mean(0) == pytest.approx([0.5] * 4, abs=0.02)
    assert values.var(0) == pytest.approx([0.8**2 / 12] * 4, rel=0.08)
    assert np.abs(np.corrcoef(values.T) - np.eye(4)).max() < 0.08
    assert len(design(space, (Start("uniform"), Start("random")), 0)) == POINTS


def test_one_uniform_point_where_weights_are_divided_by_their_sum() -> None:
    space = make_space(registry.get("task_arithmetic"), 4, {"normalize": Vary(value=True)})
    assert [set(p.values()) for p in design(space, (Start("uniform"),), 0)] == [{0.25}]


def test_only_weights_are_shares_and_of_choices_the_nearest() -> None:
    vary = {"weight": Vary(choices=(0.0, 0.25, 0.5, 1.0), per="model"), "density": Vary(low=0.2, high=1, per="model")}
    space = make_space(registry.get("dare_linear"), 3, vary)
    points = design(space, (Start("uniform"),), 0)
    assert [{p[f"weight.{i}"] for i in range(3)} for p in points] == [{0.25}, {0.5}]
    assert all(p[f"density.{i}"] == 1.0 for p in points for i in range(3))
    space = make_space(registry.get("obim"), 4, {"density": Vary(low=0, high=1, per="model")})
    assert set(design(space, (Start("uniform"),), 0)[0].values()) == {0.25}, "as it has no density of its own"


@pytest.mark.parametrize(("method", "count"), [("linear", 1), ("ties", 1), ("multislerp", 1), ("dare_linear", 2)])
def test_so_too_where_the_method_divides_them_by_itself(method: str, count: int) -> None:
    entry = registry.get(method)
    assert len(design(make_space(entry, 4, {}), (Start("uniform"),), 0)) == count
    name = next(name for name in entry.parameters if name.startswith("normalize"))
    vary = make_space(entry, 4, {"weight": Vary(low=0, high=1, per="model"), name: Vary(choices=(False, True))})
    assert len(design(vary, (Start("uniform"),), 0)) == count
    fixed = make_space(entry, 4, {"weight": Vary(low=0, high=1, per="model"), name: Vary(value=False)})
    assert len(design(fixed, (Start("uniform"),), 0)) == 2


def test_the_users_points_come_in_order_and_only_once() -> None:
    first = Start("point", values={"weight": [0.1, 0.2, 0.3, 0.4]})
    points = design(SPACE, (first, Start("point", values={"weight": 0.25}), Start("uniform"), first), 0)
    assert [list(point.values()) for point in points] == [[0.1, 0.2, 0.3, 0.4], [0.25] * 4, [0.5] * 4]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"weigth": 1}, "did you mean 'weight'"),
        ({"weight": [1, 2]}, "a list of 4"),
        ({"weight": 1.5}, "outside"),
        ({"weight": "much"}, "must be a number"),
    ],
)
def test_a_point_that_the_space_does_not_hold_is_told_at_its_line(values: dict[str, object], told: str) -> None:
    with pytest.raises(CuveeError, match=f"^search.yml:7: .*{told}"):
        design(SPACE, (Start("point", values=values, where="search.yml:7"),), 0)


def test_a_previous_study_gives_its_best_points(tmp_path: Path) -> None:
    rows = [
        {
            "state": "COMPLETE",
            "feasible": share < 0.8,
            "values": [share],
            "point": {f"weight.{i}": share for i in range(3)},
        }
        for share in (0.1, 0.7, 0.9, 0.5)
    ]
    lines = [json.dumps(row) for row in [*rows, {"state": "FAIL"}]]
    (tmp_path / "trials.jsonl").write_text("\n".join(lines) + "\n")
    points = design(SPACE, (Start("study", study=str(tmp_path)),), 0)
    assert [point["weight.0"] for point in points] == [0.7, 0.5, 0.1, 0.9]
    assert points[0]["weight.3"] == 0.5, "what did not vary there is in the middle"
    layers = make_space(
        registry.get("task_arithmetic"), 4, {"weight": Vary(low=0, high=1, per="layers")}, ["a.0.w", "b"]
    )
    finer = design(layers, (Start("study", study=str(tmp_path)),), 0)
    assert [[p[d.name] for d in layers.dimensions if d.group == layers.dimensions[0].group] for p in finer] == [
        list(point.values()) for point in points
    ], "each layer begins with its model's weight"
    (tmp_path / "trials.jsonl").write_text("")
    with pytest.raises(CuveeError, match="is a study of which no trial succeeded"):
        design(SPACE, (Start("study", study=str(tmp_path)),), 0)
    with pytest.raises(CuveeError, match="holds no study"):
        design(SPACE, (Start("study", study=str(tmp_path / "none")),), 0)
