"""Bootstrap of a task's score over its queries or examples, so that a difference between models can be told from noise.

Two models are compared on the same draws: `replicates` of both, with the same seed, and the interval of what they differ
by. Each statistic is the metric itself, computed anew on every resample, not a mean that stands in for it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merging.errors import CuveeError

Array = NDArray[np.float64]
Statistic = Callable[[Mapping[str, NDArray[Any]], Array], Array]
"""From an examples' columns and weights (resamples, examples), how often each is drawn, to scores (resamples,)."""

RESAMPLES = 2000
_CELLS = 1 << 22  # of the matrix of weights that is held at a time: 32 MB


@dataclass(frozen=True)
class Examples:
    """What one score, of one split and language of a task, was computed from.

    Attributes:
        statistic: a key of `STATISTICS`.
        ids: one an example: the queries' ids, or the rows' numbers.
        columns: what the statistic needs, each of shape (examples,) or (examples, repetitions).
        part: the split and the language of the task, say "test/default".
    """

    statistic: str
    ids: tuple[str, ...]
    columns: Mapping[str, NDArray[Any]] = field(repr=False)
    part: str = ""

    @property
    def score(self) -> float:
        """The statistic of the examples themselves."""
        return float(STATISTICS[self.statistic](self.columns, np.ones((1, len(self.ids))))[0])


def replicates(parts: Sequence[Examples], *, seed: int = 0, resamples: int = RESAMPLES) -> Array:
    """Scores (resamples,) of a task whose score is the mean over its parts, each resampled by itself.

    The draws depend on the seed, each part's name and its number of examples only, so those of two models are paired.
    """
    total = np.zeros(resamples)
    for part in parts:
        statistic = STATISTICS[part.statistic]
        seeds = (seed, zlib.crc32(part.part.encode()))
        total += np.concatenate([statistic(part.columns, w) for w in weights(len(part.ids), resamples, seeds)])
    return total / max(len(parts), 1)


def paired(one: Sequence[Examples], other: Sequence[Examples]) -> bool:
    """Whether two models' examples are the same ones, in the same order."""
    return bool(one) and [(p.part, p.statistic, p.ids) for p in one] == [(p.part, p.statistic, p.ids) for p in other]


def interval(values: Array, examples: int, estimate: float | None = None, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of replicates (resamples,), widened for few examples and centred on the estimate.

    A plain percentile interval is too narrow by sqrt((n − 1) / n), and a normal's quantile stands where Student's should.
    Drawing twice what was there once lifts some scores (of clusterings) and so shifts their replicates: a trait of the
    draws, not of the models, which is taken off.

    Args:
        examples: how many were resampled; of a mean over tasks, those of the smallest task.
        estimate: what the replicates are of; by default their mean.
        level: the share of intervals that hold the truth, in (0, 1).

    Source: Hesterberg 2015, arXiv 1411.5279, section 3.4 (expanded percentile interval).
    """
    from scipy.stats import norm, t

    low = (1 - level) / 2
    if examples > 1:
        low = float(norm.cdf(t.ppf(low, examples - 1) * np.sqrt(examples / (examples - 1))))
    shift = 0.0 if estimate is None else estimate - float(values.mean())
    first, last = np.quantile(values, [low, 1 - low]) + shift
    return float(first), float(last)


def weights(examples: int, resamples: int, seed: int | Sequence[int] = 0) -> Iterator[Array]:
    """How often each example is drawn: blocks (some resamples, examples) whose rows sum to the number of examples.

    Raises:
        CuveeError: there are no examples.
    """
    if not examples:
        raise CuveeError("there are no examples to draw from", where="bootstrap")
    rng = np.random.default_rng(seed)
    at_once = max(1, _CELLS // examples)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = rng.integers(0, examples, (rows, examples))
        drawn += np.arange(rows)[:, None] * examples
        yield np.bincount(drawn.ravel(), minlength=rows * examples).reshape(rows, examples).astype(float)


def mean(columns: Mapping[str, NDArray[Any]], weights: Array) -> Array:
    """Mean of "value"; of repetitions (examples, repetitions), the mean over them too."""
    value = columns["value"]
    per_example = value if value.ndim == 1 else value.mean(axis=1)
    return np.asarray(weights @ per_example / weights.sum(axis=1))


def pearson(columns: Mapping[str, NDArray[Any]], weights: Array) -> Array:
    """Pearson's correlation of "gold" and "predicted"; 0 where either is constant in a resample."""
    one, other = (columns[name][None].astype(float) for name in ("gold", "predicted"))
    return _correlation(one, other, weights)


def spearman(columns: Mapping[str, NDArray[Any]], weights: Array) -> Array:
    """Spearman's correlation of "gold" and "predicted", ranked anew in each resample, ties by their mean rank."""
    return _correlation(_ranks(columns["gold"], weights), _ranks(columns["predicted"], weights), weights)


def kendall(columns: Mapping[str, NDArray[Any]], weights: Array) -> Array:
    """Kendall's tau-b of "gold" and each column of "predicted" (examples, repetitions), the mean over them."""
    gold, predicted = columns["gold"], columns["predicted"].reshape(len(columns["gold"]), -1)
    size = weights.sum(axis=1)
    pairs = size * (size - 1) / 2
    drawn = weights.astype(np.float32)  # exact: counts below 2^24
    total = np.zeros(len(weights))
    for column in predicted.T:
        agree = (_signs(gold) * _signs(column)).astype(np.float32)  # (examples, examples)
        balance = ((drawn @ agree).astype(float) * weights).sum(axis=1) / 2
        spread = np.sqrt((pairs - _tied(gold, weights)) * (pairs - _tied(column, weights)))
        total += _ratio(balance, spread)
    return np.asarray(total / predicted.shape[1])


def r2(columns: Mapping[str, NDArray[Any]], weights: Array) -> Array:
    """Coefficient of determination of "gold" by each column of "predicted" (examples, repetitions), the mean over them."""
    gold, predicted = columns["gold"].astype(float), columns["predicted"].reshape(len(columns["gold"]), -1)
    centre = (weights @ gold) / weights.sum(axis=1)  # (resamples,)
    spread = (weights * (gold - centre[:, None]) ** 2).sum(axis=1)
    left = weights @ ((predicted - gold[:, None]) ** 2)  # (resamples, repetitions)
    return np.asarray((1 - _ratio(left, np.broadcast_to(spread[:, None], left.shape), nothing=1)).mean(axis=1))


def average_precision(columns: Mapping[str, NDArray[Any]], weights: Array) -> Array:
    """Average precision of the 0/1 column "gold" by the greatest of the rankings in "predicted" (examples, rankings)."""
    predicted = columns["predicted"].reshape(len(columns["gold"]), -1)
    rankings = [_average_precision(columns["gold"], column, weights) for column in predicted.T]
    return np.asarray(np.max(rankings, axis=0))


def mean_average_precision(columns: Mapping[str, NDArray[Any]], weights: Array) -> Array:
    """The same of each column of "predicted" (examples, repetitions), the mean over them."""
    predicted = columns["predicted"].reshape(len(columns["gold"]), -1)
    return np.asarray(np.mean([_average_precision(columns["gold"], each, weights) for each in predicted.T], axis=0))


def of_classes(score: Callable[[Array, Array, Array], Array], *, weighted: bool) -> Statistic:
    """A statistic of classes, averaged over those that a resample has, then over repetitions, as scikit-learn does.

    Columns: "gold" (examples,) and "predicted" (examples, repetitions), classes as whole numbers from 0.

    Args:
        score: from how often each class is rightly guessed, how often it is there, and how often it is guessed, each
            (resamples, classes), to its score.
        weighted: classes count as often as they are there; else each counts once.
    """

    def statistic(columns: Mapping[str, NDArray[Any]], weights: Array) -> Array:
        gold, predicted = columns["gold"], columns["predicted"].reshape(len(columns["gold"]), -1)
        classes = int(max(gold.max(), predicted.max())) + 1
        support = _by_class(weights, gold, classes)
        total = np.zeros(len(weights))
        for guess in predicted.T:
            guessed, right = _by_class(weights, guess, classes), guess == gold
            scores = score(_by_class(weights[:, right], gold[right], classes), support, guessed)
            count = support if weighted else (support + guessed > 0).astype(float)
            total += _ratio((scores * count).sum(axis=1), count.sum(axis=1))
        return np.asarray(total / predicted.shape[1])

    return statistic


def f1_of_labels(columns: Mapping[str, NDArray[Any]], weights: Array) -> Array:
    """Macro-F1 of labels of which an example may have several, the mean over repetitions.

    Columns: "gold" (examples, labels) and "predicted" (examples, repetitions * labels), 0 or 1.
    """
    gold = columns["gold"].astype(float)
    predicted = columns["predicted"].reshape(len(gold), -1, gold.shape[1]).astype(float)
    support = weights @ gold  # (resamples, labels)
    each = [_f1(weights @ (gold * guess), support, weights @ guess) for guess in predicted.swapaxes(0, 1)]
    return np.asarray(np.mean(each, axis=(0, 2)))


def v_measure(columns: Mapping[str, NDArray[Any]], weights: Array) -> Array:
    """V-measure of clusterings, the mean over them; the clusters stay, the documents are drawn.

    Columns: "gold" (documents,) whole numbers; "cluster" (documents, clusterings), −1 where a document is not in one;
    "count" (documents, clusterings), how often it is in it.
    """
    gold, clusters, counts = columns["gold"], columns["cluster"], columns["count"]
    labels = int(gold.max()) + 1
    total = np.zeros(len(weights))
    for cluster, count in zip(clusters.T, counts.T, strict=True):
        inside = cluster >= 0
        width = int(cluster.max()) + 1
        cell = gold[inside] * width + cluster[inside]
        tables = np.zeros((len(weights), labels * width))
        for table, row in zip(tables, weights[:, inside] * count[inside], strict=True):
            table[:] = np.bincount(cell, row, labels * width)
        total += _v_measure(tables.reshape(-1, labels, width))
    return np.asarray(total / clusters.shape[1])


def _f1(right: Array, support: Array, guessed: Array) -> Array:
    return _ratio(2 * right, support + guessed)


def _precision(right: Array, support: Array, guessed: Array) -> Array:
    return _ratio(right, guessed)


def _recall(right: Array, support: Array, guessed: Array) -> Array:
    return _ratio(right, support)


STATISTICS: dict[str, Statistic] = {
    "mean": mean,
    "pearson": pearson,
    "spearman": spearman,
    "kendall": kendall,
    "average_precision": average_precision,
    "mean_average_precision": mean_average_precision,
    "v_measure": v_measure,
    "r2": r2,
    "f1": of_classes(_f1, weighted=False),
    "f1_weighted": of_classes(_f1, weighted=True),
    "precision": of_classes(_precision, weighted=False),
    "precision_weighted": of_classes(_precision, weighted=True),
    "recall": of_classes(_recall, weighted=False),
    "recall_weighted": of_classes(_recall, weighted=True),
    "f1_of_labels": f1_of_labels,
}


def _correlation(one: Array, other: Array, weights: Array) -> Array:
    """Weighted correlation of (1 or resamples, examples) with the same."""
    n = weights.sum(axis=1)
    one = one - ((weights * one).sum(axis=1) / n)[:, None]
    other = other - ((weights * other).sum(axis=1) / n)[:, None]
    covariance = (weights * one * other).sum(axis=1)
    spread = np.sqrt((weights * one**2).sum(axis=1) * (weights * other**2).sum(axis=1))
    return _ratio(covariance, spread)


def _ranks(values: NDArray[Any], weights: Array) -> Array:
    """(resamples, examples): each example's mean rank in each resample, where it counts as often as it is drawn."""
    order = np.argsort(values, kind="stable")
    starts, group = _groups(values[order])
    sizes = np.add.reduceat(weights[:, order], starts, axis=1)  # (resamples, groups of ties)
    ranks = np.cumsum(sizes, axis=1) - (sizes - 1) / 2
    back = np.empty_like(group)
    back[order] = group
    return np.asarray(ranks[:, back])


def _signs(values: NDArray[Any]) -> NDArray[np.int8]:
    return np.asarray(np.sign(np.subtract.outer(values, values)), np.int8)


def _tied(values: NDArray[Any], weights: Array) -> Array:
    """How many pairs of each resample have equal values."""
    order = np.argsort(values, kind="stable")
    sizes = np.add.reduceat(weights[:, order], _groups(values[order])[0], axis=1)
    return np.asarray((sizes * (sizes - 1) / 2).sum(axis=1))


def _average_precision(gold: NDArray[Any], predicted: NDArray[Any], weights: Array) -> Array:
    order = np.argsort(-predicted, kind="stable")
    starts, _ = _groups(predicted[order])
    drawn = weights[:, order]
    found = np.cumsum(np.add.reduceat(drawn * gold[order], starts, axis=1), axis=1)  # (resamples, thresholds)
    seen = np.cumsum(np.add.reduceat(drawn, starts, axis=1), axis=1)
    area = (np.diff(found, axis=1, prepend=0) * _ratio(found, seen)).sum(axis=1)
    return _ratio(area, found[:, -1])


def _by_class(weights: Array, classes: NDArray[Any], count: int) -> Array:
    """(resamples, count): how often each class is drawn, of the classes (examples,) of weights (resamples, examples)."""
    drawn = np.zeros((len(weights), count))
    if len(classes):
        order = np.argsort(classes, kind="stable")
        starts, _ = _groups(classes[order])
        drawn[:, classes[order][starts]] = np.add.reduceat(weights[:, order], starts, axis=1)
    return drawn


def _groups(ordered: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Where each run of equal values starts, and the run that each value is in."""
    new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    return np.flatnonzero(new), np.cumsum(new) - 1


def _v_measure(tables: Array) -> Array:
    """Of contingency tables (resamples, labels, clusters): the harmonic mean of homogeneity and completeness."""
    share = tables / tables.sum(axis=(1, 2), keepdims=True)
    labels, clusters = _entropy(share.sum(axis=2)), _entropy(share.sum(axis=1))
    mutual = labels + clusters - _entropy(share.reshape(len(share), -1))
    homogeneity, completeness = _ratio(mutual, labels, nothing=1), _ratio(mutual, clusters, nothing=1)
    return _ratio(2 * homogeneity * completeness, homogeneity + completeness)


def _entropy(share: Array) -> Array:
    """In nats, of distributions (resamples, cells)."""
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return np.asarray(-(share * logs).sum(axis=1))


def _ratio(part: Array, whole: Array, nothing: float = 0.0) -> Array:
    """part / whole, and `nothing` where there is no whole."""
    return np.asarray(np.divide(part, whole, out=np.full_like(part, nothing), where=whole > 0))
