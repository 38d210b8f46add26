"""What each schedule is by itself: the order of its steps, and what a step is made of."""

from __future__ import annotations

import tracemalloc
from itertools import groupby
from typing import Any

import numpy as np
import pytest

from embeddings.training import schedule
from tests.contracts.test_schedules import build, plain, seen

SETS = [(100, "Retrieval", 10, 1.0), (37, "STS", 4, 1.0), (64, "Reranking", 16, 1.0), (7, "Clustering", 8, 1.0)]


def order_of(made: Any) -> list[int]:
    """The data set of each step."""
    return [part.dataset for step in made for part in step]


def test_batch_level_is_the_papers_algorithm() -> None:
    """Each step from one data set, whole batches and no tail, each row once, the batches of all data sets shuffled."""
    made = build("batch_level", SETS, epochs=1, seed=2)
    assert all(len(step) == 1 for step in made)
    assert np.bincount(order_of(made)).tolist() == [10, 9, 4, 1]
    assert {(part.dataset, len(part.rows)) for step in made for part in step} == {(0, 10), (1, 4), (2, 16), (3, 7)}
    assert max(seen(made).values()) == 1
    assert made.short == (3,)
    assert len(list(groupby(order_of(made)))) > 8  # runs of one data set: interleaved, not in sequence


def test_batch_level_orders_all_pools_alike() -> None:
    """Three batches of one data set and one of another: the lone one is at each place a quarter of the time."""
    places = [
        order_of(build("batch_level", [(3, "STS", 1, 1), (1, "STS", 1, 1)], seed=seed)).index(1) for seed in range(800)
    ]
    counts = np.bincount(places, minlength=4)
    assert np.all(np.abs(counts - 200) < 5 * np.sqrt(800 * 0.25 * 0.75))


def test_rows_of_a_batch_are_drawn_alike() -> None:
    counts = np.zeros((6, 6))
    for seed in range(600):
        rows = [row for step in build("batch_level", [(6, "STS", 2, 1)], seed=seed) for row in step[0].rows]
        counts[np.arange(6), rows] += 1
    assert np.all(np.abs(counts - 100) < 5 * np.sqrt(600 / 6 * 5 / 6))


def test_data_sets_follow_each_other_with_all_their_epochs() -> None:
    made = build("dataset_sequential", SETS, epochs=2)
    assert [(d, len(list(run))) for d, run in groupby(order_of(made))] == [(0, 20), (1, 18), (2, 8), (3, 2)]
    halves = build("dataset_sequential", SETS, steps=12)  # of 24: each data set gives half of its batches
    assert [d for d, _ in groupby(order_of(halves))][:3] == [0, 1, 2]


def test_tasks_follow_each_other_shuffled_within() -> None:
    sets = [(40, "STS", 4, 1), (40, "Retrieval", 4, 1), (40, "STS", 4, 1)]
    order = order_of(build("task_sequential", sets))
    assert sorted(order[:20]) == [0] * 10 + [2] * 10
    assert len(list(groupby(order[:20]))) > 4
    assert order[20:] == [1] * 10


def test_two_stages_are_retrieval_and_the_rest() -> None:
    order = order_of(build("two_stage", SETS, epochs=2))
    assert sorted(order[:28]) == [0] * 20 + [2] * 8
    assert sorted(order[28:]) == [1] * 18 + [3] * 2
    assert order_of(build("two_stage", [(8, "STS", 4, 1)])) == [0, 0]


def test_mixed_batches_have_rows_of_all_data_sets() -> None:
    sets = [(400, "Retrieval", 32, 1), (200, "STS", 32, 1)]
    made = build("mixed", sets, seed=1)
    assert len(made) == 600 // 32
    assert all([part.dataset for part in step] == [0, 1] for step in made)
    assert {sum(len(part.rows) for part in step) for step in made} == {32}
    assert max(seen(made).values()) == 1
    assert len(build("mixed", [(250, "STS", 128, 1)])[0][0].rows) == 128  # never more than was asked for
    uneven = build("mixed", [(320, "STS", 32, 1), (80, "STS", 8, 1)])
    assert len(uneven) == 20  # as many as with batches of one data set


@pytest.mark.parametrize(
    ("sets", "several"),
    [
        ([(64, "Retrieval", 8, 1), (64, "STS", 8, 1), (64, "Clustering", 8, 1)], 3),
        ([(64, "STS", 8, 1), (64, "STS", 8, 1)], 2),  # of one type: each data set is a task
        ([(64, kind, 8, 1) for kind in ("STS", "Retrieval", "Reranking", "Clustering", "Classification")], 4),
    ],
)
def test_mgs_has_a_batch_of_each_of_several_tasks_in_a_step(sets: Any, several: int) -> None:
    made = build("mgs", sets, epochs=2)
    for step in made:
        tasks = [made.corpus.tasks[part.dataset] for part in step]
        assert len(tasks) == several
        assert len(set(tasks)) == several
    assert set(seen(made).values()) == {2}  # every batch once an epoch


def test_mgs_with_one_large_task_still_uses_every_batch_once() -> None:
    sets = [(160, "Retrieval", 8, 1), (16, "STS", 8, 1), (8, "Clustering", 8, 1)]
    made = build("mgs", sets)
    assert len(made) == 23 // 3
    assert set(seen(made).values()) == {1}
    assert sum(len({part.dataset for part in step}) > 1 for step in made) == 3


def test_mgs_shuffles_its_steps() -> None:
    """Ten batches of the second task over fifteen steps: not the first ten, nor the last."""
    made = build("mgs", [(160, "Retrieval", 8, 1), (80, "STS", 8, 1)])
    runs = [list(run) for _, run in groupby(any(part.dataset == 1 for part in step) for step in made)]
    assert len(made) == 15
    assert sum(len(run) for run in runs if run[0]) == 10
    assert len(runs) > 3


def test_weights_take_a_part_or_repeat() -> None:
    half = [seen(build("batch_level", [(40, "STS", 5, 0.5)], seed=seed)) for seed in (0, 1)]
    assert [len(rows) for rows in half] == [20, 20]
    assert set(half[0]) != set(half[1])
    twice = seen(build("batch_level", [(40, "STS", 5, 2.0)]))
    assert len(twice) == 40
    assert set(twice.values()) == {2}
    more = seen(build("batch_level", [(40, "STS", 5, 1.25)]))
    assert sorted(more.values()) == [1] * 30 + [2] * 10


def test_a_step_of_many_epochs_costs_no_more_than_one_of_the_first() -> None:
    made = build("batch_level", SETS, epochs=10_000, seed=3)
    assert plain(made[len(made) - 1]) == plain(build("batch_level", SETS, epochs=10_000, seed=3)[-1])


def test_memory_is_four_bytes_a_row() -> None:
    rows = 2_000_000
    tracemalloc.start()
    made = schedule.build("batch_level", [rows] * 2, ["STS"] * 2, [64] * 2, [1.0] * 2, epochs=3)
    first = made[0]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(first[0].rows) == 64
    assert held < 4.5 * 2 * rows
    assert peak < 7 * 2 * rows
