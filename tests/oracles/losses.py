"""Every loss once more: loops over pairs in float64, written from its formula.

An oracle is `oracle(queries, candidates, positive, allowed, scores, **parameters)` over numpy arrays and returns a float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def oracle(
    name: str,
    queries: Array,
    candidates: Array,
    positive: Array,
    allowed: Array,
    scores: Array | None = None,
    *,
    matryoshka: Iterable[int] = (),
    matryoshka_weights: Iterable[float] = (),
    false_negative_margin: float | None = None,
    false_negative_mode: str = "absolute",
    **parameters: Any,
) -> float:
    """The loss `name`. Raises KeyError for a loss without an oracle."""
    queries, candidates = np.asarray(queries, np.float64), np.asarray(candidates, np.float64)
    if false_negative_margin is not None:
        allowed = _without_false_negatives(
            queries, candidates, positive, allowed, false_negative_margin, false_negative_mode
        )
    widths = list(matryoshka) or [queries.shape[1]]
    weights = list(matryoshka_weights) or [1.0] * len(widths)
    return sum(
        weight * ORACLES[name](queries[:, :width], candidates[:, :width], positive, allowed, scores, **parameters)
        for width, weight in zip(widths, weights, strict=True)
    )


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def log_sum_exp(values: Iterable[float]) -> float:
    """−inf of nothing."""
    values = list(values)
    if not values:
        return -math.inf
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _without_false_negatives(q: Array, c: Array, positive: Array, allowed: Array, margin: float, mode: str) -> Array:
    kept = allowed.copy()
    for i in range(len(q)):
        lowest = min(cosine(q[i], c[j]) for j in range(len(c)) if positive[i, j])
        limit = lowest - (margin if mode == "absolute" else margin * abs(lowest))
        for j in range(len(c)):
            if not positive[i, j] and cosine(q[i], c[j]) > limit:
                kept[i, j] = False
    return kept


# ---- positives against negatives ----


def _contrast(each: Callable[[list[float], list[float]], float]) -> Callable[..., float]:
    """From a function of the logits of a query's positives and negatives."""

    def loss(
        q: Array,
        c: Array,
        positive: Array,
        allowed: Array,
        scores: None,
        *,
        temperature: float,
        symmetric: bool = False,
    ) -> float:
        logits = [[cosine(a, b) / temperature for b in c] for a in q]
        forward = []
        for i in range(len(q)):
            answers = [logits[i][j] for j in range(len(c)) if positive[i, j]]
            forward.append(each(answers, [logits[i][j] for j in range(len(c)) if allowed[i, j] and not positive[i, j]]))
        if not symmetric:
            return mean(forward)
        backward = []
        for j in range(len(c)):
            answers = [logits[i][j] for i in range(len(q)) if positive[i, j]]
            others = [logits[i][j] for i in range(len(q)) if allowed[i, j] and not positive[i, j]]
            if answers:
                backward.append(each(answers, others))
        return (mean(forward) + mean(backward)) / 2

    return loss


def _infonce(positives: list[float], negatives: list[float]) -> float:
    return mean(log_sum_exp([p, *negatives]) - p for p in positives)


def _disj(positives: list[float], negatives: list[float]) -> float:
    return log_sum_exp([*positives, *negatives]) - log_sum_exp(positives)


def _conj(positives: list[float], negatives: list[float]) -> float:
    return sum(log_sum_exp([*positives, *negatives]) - p for p in positives)


# ---- graded pairs ----


def _by_order(similarity: Callable[[Array, Array], float]) -> Callable[..., float]:
    def loss(q: Array, c: Array, positive: Array, allowed: Array, scores: Array, *, scale: float) -> float:
        s = [scale * similarity(a, b) for a, b in zip(q, c, strict=True)]
        pairs = [(i, j) for i in range(len(q)) for j in range(len(q)) if scores[i] > scores[j]]
        return log_sum_exp([0.0, *(s[j] - s[i] for i, j in pairs)])

    return loss


def _angle(a: Array, b: Array) -> float:
    """|Re + Im| of ⟨a, b⟩ with the halves of a vector as real and imaginary parts, both of length 1."""
    a, b = (np.append(x, np.zeros(len(x) % 2)) for x in (a, b))
    half = len(a) // 2
    x, y = (v[:half] + 1j * v[half:] for v in (a / np.linalg.norm(a), b / np.linalg.norm(b)))
    product = np.sum(x * y.conj())
    return float(abs(product.real + product.imag))


def _contrastive(q: Array, c: Array, positive: Array, allowed: Array, scores: Array, *, margin: float) -> float:
    distances = [1 - cosine(a, b) for a, b in zip(q, c, strict=True)]
    return mean(0.5 * (y * d**2 + (1 - y) * max(0.0, margin - d) ** 2) for y, d in zip(scores, distances, strict=True))


# ---- a teacher's scores ----


def _distill_kl(
    q: Array,
    c: Array,
    positive: Array,
    allowed: Array,
    scores: Array,
    *,
    temperature: float,
    teacher_temperature: float = 1.0,
    rescale: bool = False,
) -> float:
    divergences = []
    for i in range(len(q)):
        scored = [j for j in range(len(c)) if not math.isnan(scores[i, j])]
        if len(scored) < 2:
            continue
        student = {j: cosine(q[i], c[j]) / temperature for j in scored}
        teacher = {j: scores[i, j] / teacher_temperature for j in scored}
        of_student, of_teacher = log_sum_exp(student.values()), log_sum_exp(teacher.values())
        log_p = {j: teacher[j] - of_teacher for j in scored}
        divergences.append(sum(math.exp(log_p[j]) * (log_p[j] - (student[j] - of_student)) for j in scored))
    return mean(divergences or [0.0]) * (temperature**2 if rescale else 1)


def _margin_mse(q: Array, c: Array, positive: Array, allowed: Array, scores: Array, *, scale: float) -> float:
    squares = []
    for i in range(len(q)):
        scored = [j for j in range(len(c)) if not math.isnan(scores[i, j])]
        for j in (j for j in scored if positive[i, j]):
            for k in (k for k in scored if not positive[i, k]):
                margin = scale * (cosine(q[i], c[j]) - cosine(q[i], c[k]))
                squares.append((margin - (scores[i, j] - scores[i, k])) ** 2)
    return mean(squares or [0.0])


ORACLES: dict[str, Callable[..., float]] = {
    "infonce": _contrast(_infonce),
    "disj": _contrast(_disj),
    "conj": _contrast(_conj),
    "cosent": _by_order(cosine),
    "angle": _by_order(_angle),
    "contrastive": _contrastive,
    "distill_kl": _distill_kl,
    "margin_mse": _margin_mse,
}
