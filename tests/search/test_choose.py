from __future__ import annotations

import numpy as np

from merging.methods import registry
from search.choose import OBSERVED, POSTERIOR, Trial, best, front
from search.space import make_space

SPACE = make_space(registry.get("task_arithmetic"), 2, {})


def trial(number: int, *values: float, x: float = 0.0, y: float = 0.0, floor: float = 0.0) -> Trial:
    point = {"weight.0": x, "weight.1": y}
    return Trial(number, point, values, feasible=floor <= 0, violation=max(0.0, floor), error="" if values else "broke")


def test_the_best_observed_and_of_equals_the_first() -> None:
    trials = [trial(0, 0.5), trial(1), trial(2, 0.9), trial(3, 0.9)]
    assert best(SPACE, trials) is trials[2]
    assert best(SPACE, [trial(0)]) is None


def test_a_point_below_a_floor_is_chosen_only_where_there_is_no_other() -> None:
    assert best(SPACE, [trial(0, 0.9, floor=0.1), trial(1, 0.2)]).number == 1  # type: ignore[union-attr]
    assert best(SPACE, [trial(0, 0.9, floor=0.2), trial(1, 0.2, floor=0.1)]).number == 1  # type: ignore[union-attr]


def test_the_front_equals_a_loop() -> None:
    values = np.random.default_rng(0).integers(0, 6, (60, 3)).astype(float)
    trials = [trial(i, *row) for i, row in enumerate(values.tolist())]
    expected = []
    for i, mine in enumerate(values):
        dominated = any((other >= mine).all() and (other > mine).any() for other in values)
        if not dominated and not any((earlier == mine).all() for earlier in values[:i]):
            expected.append(i)
    assert [t.number for t in front(trials)] == expected
    chosen = best(SPACE, trials)
    assert chosen is not None and sum(chosen.values) == values.sum(1).max()


def test_with_noise_the_posterior_mean_chooses_better_than_the_highest_score() -> None:
    lost = {OBSERVED: 0.0, POSTERIOR: 0.0}
    for seed in range(8):
        random = np.random.default_rng(seed)
        places = random.uniform(0, 1, (25, 2))
        truth = 1 - ((places - 0.5) ** 2).sum(1)
        scores = truth + 0.05 * random.standard_normal(25)
        trials = [
            trial(i, float(s), x=float(x), y=float(y)) for i, (s, (x, y)) in enumerate(zip(scores, places, strict=True))
        ]
        for rule in lost:
            chosen = best(SPACE, trials, rule)
            assert chosen is not None
            lost[rule] += float(truth.max() - truth[chosen.number])
    assert lost[POSTERIOR] < 0.8 * lost[OBSERVED]
