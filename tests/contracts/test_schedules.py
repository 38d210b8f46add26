"""What every registered schedule promises; one of your own must pass it too."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.training import schedule
from embeddings.training.schedule import SCHEDULES, Part, Schedule, Step
from merging.errors import CuveeError

EVERY = pytest.mark.parametrize("name", SCHEDULES)
TYPES = ("Retrieval", "STS", "Classification", "Reranking")

#: Lists of data sets: rows, type, rows of a batch, weight.
DATASETS = st.lists(
    st.tuples(
        st.integers(0, 90), st.sampled_from(TYPES), st.integers(1, 16), st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.5, 2.0])
    ),
    min_size=1,
    max_size=5,
)


def build(name: str, sets: Any, **options: Any) -> Schedule:
    sizes, types, batch_sizes, weights = zip(*sets, strict=True)
    return schedule.build(name, sizes, types, batch_sizes, weights, **options)


def plain(step: Step) -> list[tuple[int, list[int]]]:
    return [(part.dataset, part.rows.tolist()) for part in step]


def seen(steps: Any) -> Counter[tuple[int, int]]:
    """How often each row of each data set comes."""
    return Counter((part.dataset, row) for step in steps for part in step for row in part.rows.tolist())


SOME = [(70, "Retrieval", 8, 1.0), (33, "STS", 4, 1.0), (5, "STS", 8, 1.0), (40, "Clustering", 8, 0.5)]


@EVERY
def test_entry_says_all_that_others_need(name: str) -> None:
    entry = SCHEDULES[name]
    assert entry.name == name
    assert entry.title
    assert entry.summary
    assert entry.source


@EVERY
@settings(max_examples=60, deadline=None)
@given(sets=DATASETS, epochs=st.sampled_from([0.5, 1.0, 2.0, 2.5]), seed=st.integers(0, 2**40))
def test_any_data_sets_make_steps_of_their_rows(name: str, sets: Any, epochs: float, seed: int) -> None:
    if not any(size and weight for size, _, _, weight in sets):
        with pytest.raises(CuveeError, match="no row to train on"):
            build(name, sets, epochs=epochs, seed=seed)
        return
    made = build(name, sets, epochs=epochs, seed=seed)
    assert len(made) == max(1, round(epochs * made.steps_per_epoch))
    for step in made:
        assert step
        for part in step:
            size, _, _, weight = sets[part.dataset]
            assert part.rows.dtype == np.int64
            assert len(part.rows)
            assert size
            assert weight
            assert part.rows.min() >= 0
            assert part.rows.max() < size


@EVERY
@settings(max_examples=40, deadline=None)
@given(sets=DATASETS.filter(lambda sets: any(size and weight for size, _, _, weight in sets)))
def test_no_row_of_an_epoch_comes_more_often_than_its_weight_says(name: str, sets: Any) -> None:
    made = build(name, sets, epochs=1, seed=3)
    for (dataset, _), times in seen(made).items():
        assert times <= np.ceil(sets[dataset][3])


@EVERY
def test_any_step_is_the_same_whatever_was_asked_before(name: str) -> None:
    """So training goes on after a kill as if nothing had been."""
    through = [plain(step) for step in build(name, SOME, epochs=3, seed=1)]
    resumed = build(name, SOME, epochs=3, seed=1)
    assert [plain(resumed[n]) for n in range(len(resumed) // 2, len(resumed))] == through[len(through) // 2 :]
    backwards = build(name, SOME, epochs=3, seed=1)
    assert [plain(backwards[n]) for n in range(len(backwards) - 1, -1, -1)] == through[::-1]
    assert [plain(step) for step in backwards[2:9:3]] == through[2:9:3]
    assert plain(backwards[-1]) == through[-1]
    for beyond in (len(backwards), -len(backwards) - 1):
        with pytest.raises(IndexError):
            backwards[beyond]


@EVERY
def test_seeds_and_epochs_draw_anew(name: str) -> None:
    steps = build(name, SOME, epochs=1, seed=0).steps_per_epoch
    one, two = ([plain(step) for step in build(name, SOME, epochs=2, seed=seed)] for seed in (0, 1))
    assert sum(a == b for a, b in zip(one, two, strict=True)) <= 2
    assert sum(a == b for a, b in zip(one[:steps], one[steps:], strict=True)) <= 2
    assert one != two


@EVERY
def test_over_the_epochs_every_row_comes_about_as_often(name: str) -> None:
    """Rows of a dropped tail are others each time; half of a data set is another half."""
    counts = seen(build(name, SOME, epochs=60, seed=4))
    for dataset, (size, _, _, weight) in enumerate(SOME):
        times = np.array([counts[dataset, row] for row in range(size)])
        assert times.min() > 0.5 * 60 * weight - 5
        assert times.max() <= 60 * max(weight, 0.75)


@EVERY
def test_steps_may_be_given_instead_of_epochs(name: str) -> None:
    assert len(build(name, SOME, steps=7)) == 7
    assert len(build(name, SOME, steps=700)) == 700
    assert len(build(name, SOME)) == len(build(name, SOME, epochs=1)) == build(name, SOME, steps=1).steps_per_epoch
    per_epoch = build(name, SOME).steps_per_epoch
    same = build(name, SOME, steps=2 * per_epoch, seed=5)
    assert [plain(a) for a in same] == [plain(b) for b in build(name, SOME, epochs=2, seed=5)]


@EVERY
def test_one_row_is_enough(name: str) -> None:
    made = build(name, [(1, "STS", 128, 0.01)], epochs=2)
    assert [plain(step) for step in made] == [[(0, [0])]] * 2


@EVERY
def test_mistakes_are_refused_in_one_line(name: str) -> None:
    good: dict[str, Any] = {"sizes": [9], "types": ["STS"], "batch_sizes": [2], "weights": [1.0]}
    wrong: list[dict[str, Any]] = [
        {"sizes": [0]}, {"sizes": [-1]}, {"sizes": [2**31]}, {"sizes": []}, {"batch_sizes": [0]}, {"weights": [-1.0]},
        {"weights": [0.0]}, {"epochs": 0}, {"epochs": -1}, {"steps": 0}, {"epochs": 1, "steps": 1}, {"seed": -1},
        {"weights": [float("nan")]}, {"weights": [float("inf")]}, {"epochs": float("nan")}, {"epochs": float("inf")},
    ]  # fmt: skip
    for change in wrong:
        with pytest.raises(CuveeError) as caught:
            schedule.build(name, **{**good, **change})
        assert "\n" not in str(caught.value)
    with pytest.raises(CuveeError, match=r"a.yml:2: no schedule 'bach_level'; did you mean 'batch_level'\?"):
        build("bach_level", SOME, where="a.yml:2")


def test_a_schedule_of_ones_own_is_registered_once() -> None:
    before = dict(SCHEDULES)
    try:

        @schedule.schedule("reversed", title="Backwards", source="here")
        def backwards(corpus: schedule.Corpus) -> list[schedule.Stage]:
            """The last data set first."""
            return [schedule.Homogeneous(corpus, [dataset]) for dataset in reversed(range(len(corpus.sizes)))]

        made = build("reversed", SOME)
        assert made[0][0].dataset == 3
        assert isinstance(made[0][0], Part)
        with pytest.raises(CuveeError, match="registered already"):
            schedule.schedule("reversed", title="Backwards", source="here")(backwards)
    finally:
        SCHEDULES.clear()
        SCHEDULES.update(before)
