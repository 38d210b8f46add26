"""The bootstrap: its statistics against scipy's and scikit-learn's, its intervals against closed forms and by coverage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embeddings.evaluation import bootstrap
from embeddings.evaluation.bootstrap import Examples, interval, paired, replicates, weights
from merging.errors import CuveeError

RNG = np.random.default_rng(5)


def examples(statistic: str, n: int, part: str = "test/default", **columns: NDArray[Any]) -> Examples:
    return Examples(statistic, tuple(str(i) for i in range(n)), columns, part)


def test_weights_draw_as_many_examples_as_there_are_and_the_same_whatever_the_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = np.concatenate(list(weights(30, 50, 3)))
    assert whole.shape == (50, 30) and (whole.sum(axis=1) == 30).all()
    monkeypatch.setattr(bootstrap, "_CELLS", 70)
    np.testing.assert_array_equal(np.concatenate(list(weights(30, 50, 3))), whole)
    assert not np.array_equal(np.concatenate(list(weights(30, 50, 4))), whole)


def test_no_examples_is_an_error_of_one_line() -> None:
    with pytest.raises(CuveeError, match="no examples"):
        replicates([examples("mean", 0, value=np.zeros(0))])


def _pearson(gold: Any, predicted: Any) -> float:
    from scipy.stats import pearsonr

    return float(pearsonr(gold, predicted)[0])


def _spearman(gold: Any, predicted: Any) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(gold, predicted)[0])


def _kendall(gold: Any, predicted: Any) -> float:
    from scipy.stats import kendalltau

    return float(np.mean([kendalltau(gold, column).statistic for column in np.asarray(predicted).T]))


def _average_precision(gold: Any, predicted: Any) -> float:
    from sklearn.metrics import average_precision_score

    return max(float(average_precision_score(gold, column)) for column in np.asarray(predicted).T)


def _of_columns(score: str, **options: Any) -> Callable[..., float]:
    """Scikit-learn's score, the mean over the columns of the predicted."""

    def oracle(gold: Any, predicted: Any) -> float:
        from sklearn import metrics

        return float(np.mean([getattr(metrics, score)(gold, column, **options) for column in np.asarray(predicted).T]))

    return oracle


def _f1_of_labels(gold: Any, predicted: Any) -> float:
    from sklearn.metrics import f1_score

    each = np.asarray(predicted).reshape(len(gold), -1, 4).swapaxes(0, 1)
    return float(np.mean([f1_score(gold, guess, average="macro", zero_division=0) for guess in each]))


@pytest.mark.parametrize(
    ("statistic", "oracle", "columns"),
    [
        ("mean", lambda value: float(np.mean(value)), {"value": RNG.random(60)}),
        ("mean", lambda value: float(np.mean(value)), {"value": RNG.random((60, 10))}),
        ("pearson", _pearson, {"gold": RNG.integers(0, 6, 60), "predicted": RNG.random(60)}),
        ("spearman", _spearman, {"gold": RNG.integers(0, 6, 60), "predicted": RNG.integers(0, 9, 60) / 9}),
        ("kendall", _kendall, {"gold": RNG.integers(0, 6, 60), "predicted": RNG.integers(0, 30, (60, 3)) / 30}),
        (
            "average_precision",
            _average_precision,
            {"gold": RNG.integers(0, 2, 60), "predicted": RNG.integers(0, 30, (60, 3)) / 30},
        ),
        (
            "mean_average_precision",
            _of_columns("average_precision_score"),
            {"gold": RNG.integers(0, 2, 60), "predicted": RNG.integers(0, 2, (60, 3))},
        ),
        ("r2", _of_columns("r2_score"), {"gold": RNG.integers(0, 6, 60), "predicted": RNG.normal(3, 2, (60, 3))}),
        *(
            (
                f"{score}{suffix}",
                _of_columns(f"{score}_score", average=average, zero_division=0),
                # Classes that some resamples lack, one that is never guessed, one that is only guessed.
                {"gold": RNG.choice([0, 1, 2, 3, 5], 60), "predicted": RNG.choice([0, 1, 2, 4, 5], (60, 3))},
            )
            for score in ("f1", "precision", "recall")
            for suffix, average in (("", "macro"), ("_weighted", "weighted"))
        ),
        (
            "f1_of_labels",
            _f1_of_labels,
            {"gold": RNG.integers(0, 2, (60, 4)), "predicted": (RNG.random((60, 12)) < 0.3).astype(int)},
        ),
    ],
)
def test_a_statistic_equals_its_oracle_on_every_resample(
    statistic: str, oracle: Callable[..., float], columns: dict[str, NDArray[Any]]
) -> None:
    some = examples(statistic, 60, **columns)
    assert some.score == pytest.approx(oracle(**columns), abs=1e-12)
    (drawn,) = weights(60, 25, 1)
    ours = bootstrap.STATISTICS[statistic](some.columns, drawn)
    rows = [np.repeat(np.arange(60), row.astype(int)) for row in drawn]
    theirs = [oracle(**{name: column[row] for name, column in columns.items()}) for row in rows]
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_v_measure_equals_scikit_learns_on_every_resample_of_documents() -> None:
    from sklearn.metrics import v_measure_score

    gold, cluster, count = RNG.integers(0, 5, 80), RNG.integers(-1, 6, (80, 3)), RNG.integers(1, 4, (80, 3))
    some = examples("v_measure", 80, gold=gold, cluster=cluster, count=count)
    (drawn,) = weights(80, 20, 1)
    for row, ours in zip([np.ones(80), *drawn], [some.score, *bootstrap.v_measure(some.columns, drawn)], strict=True):
        theirs = []
        for c in range(3):
            times = (row * count[:, c] * (cluster[:, c] >= 0)).astype(int)
            theirs.append(v_measure_score(np.repeat(gold, times), np.repeat(cluster[:, c], times)))
        assert ours == pytest.approx(np.mean(theirs), abs=1e-12)


def test_degenerate_resamples_have_a_score() -> None:
    one = np.ones((1, 4))
    constant = {"gold": np.ones(4), "predicted": np.arange(4.0)}
    assert bootstrap.spearman(constant, one) == bootstrap.pearson(constant, one) == 0
    assert bootstrap.average_precision({"gold": np.zeros(4), "predicted": np.arange(4.0)}, one) == 0
    alone = {"gold": np.zeros(4, int), "cluster": np.zeros((4, 1), int), "count": np.ones((4, 1), int)}
    assert bootstrap.v_measure(alone, one) == 1


def test_the_spread_of_a_mean_is_its_closed_form() -> None:
    value = np.random.default_rng(0).gamma(2.0, size=400)
    spread = replicates([examples("mean", 400, value=value)], resamples=20_000).std()
    assert spread == pytest.approx(value.std() / 20, rel=0.02)  # the standard error of the plug-in distribution


def test_the_spread_of_a_paired_difference_is_that_of_the_differences() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(300)  # what makes both models succeed or fail together
    one, other = hard + 0.1 * rng.random(300), hard + 0.1 * rng.random(300)
    draws = [replicates([examples("mean", 300, value=v)], resamples=20_000) for v in (one, other)]
    assert (draws[1] - draws[0]).std() == pytest.approx((other - one).std() / np.sqrt(300), rel=0.02)
    assert (draws[1] - draws[0]).std() < draws[0].std() / 5


def test_the_interval_of_a_normal_mean_is_students() -> None:
    from scipy.stats import t

    value = np.random.default_rng(0).normal(size=12)
    value = (value - value.mean()) / value.std(ddof=1)
    low, high = interval(replicates([examples("mean", 12, value=value)], resamples=100_000), 12)
    half = t.ppf(0.975, 11) / np.sqrt(12)
    assert (low, high) == pytest.approx((-half, half), rel=0.08)  # the draws' own skew is left


@pytest.mark.parametrize(("n", "statistic"), [(15, "mean"), (100, "mean"), (100, "spearman")])
def test_ninety_five_percent_intervals_of_a_difference_hold_the_truth_that_often(n: int, statistic: str) -> None:
    rng = np.random.default_rng(11)
    covered, trials = 0, 400
    noise = (0.6, 0.9)  # of the two models' predictions
    # Bivariate normal: Spearman's rho is 6/π asin(r / 2) of Pearson's r.
    rho = [6 / np.pi * np.arcsin(1 / np.sqrt(1 + s**2) / 2) for s in noise]
    for trial in range(trials):
        gold = rng.normal(size=n)
        if statistic == "mean":  # hits and misses, as accuracy and recall are, and a shared difficulty
            values = [(gold + rng.normal(size=n) < shift).astype(float) for shift in (0.3, 0.0)]
            columns = [{"value": value} for value in values]
        else:
            columns = [{"gold": gold, "predicted": gold + s * rng.normal(size=n)} for s in noise]
        one, other = (replicates([examples(statistic, n, **c)], seed=trial, resamples=500) for c in columns)
        estimate = [examples(statistic, n, **c).score for c in columns]
        low, high = interval(other - one, n, estimate[1] - estimate[0])
        from scipy.stats import norm

        truth = norm.cdf(0) - norm.cdf(0.3 / np.sqrt(2)) if statistic == "mean" else rho[1] - rho[0]
        covered += low <= truth <= high
    assert 0.92 <= covered / trials <= 0.985  # 400 trials tell 0.95 from these with three standard errors to spare


def test_what_the_draws_alone_shift_is_taken_off() -> None:
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 5, 100)
    cluster = np.where(rng.random(100) < 0.6, gold, rng.integers(0, 5, 100))[:, None]
    some = examples("v_measure", 100, gold=gold, cluster=cluster, count=np.ones((100, 1), int))
    values = replicates([some])
    assert values.mean() > some.score + 0.01  # small tables look purer than they are
    low, high = interval(values, 100, some.score)
    assert (low + high) / 2 == pytest.approx(some.score, abs=0.01)


def test_parts_are_resampled_by_themselves_and_count_alike() -> None:
    small, large = np.random.default_rng(0).random(20), np.random.default_rng(1).random(500)
    parts = [examples("mean", 20, "test/en", value=small), examples("mean", 500, "test/de", value=large)]
    values = replicates(parts, resamples=20_000)
    assert values.mean() == pytest.approx((small.mean() + large.mean()) / 2, abs=2e-3)
    assert values.std() == pytest.approx(np.hypot(small.std() / np.sqrt(20), large.std() / np.sqrt(500)) / 2, rel=0.03)


def test_only_the_same_examples_in_the_same_order_are_paired() -> None:
    one, other = examples("mean", 4, value=np.ones(4)), examples("mean", 4, value=np.zeros(4))
    assert paired([one], [other])
    assert not paired([one], [examples("mean", 5, value=np.zeros(5))])
    assert not paired([one], [examples("mean", 4, "validation/default", value=np.zeros(4))])
    assert not paired([one], [Examples("mean", ("3", "2", "1", "0"), {"value": np.ones(4)}, "test/default")])
    assert not paired([], [])
