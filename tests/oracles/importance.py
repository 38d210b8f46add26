"""Fisher merging, DF-Merge, RegMean and OBIM once more: slowly, plainly, in float64, written from the formulas.

Sources: Fisher arXiv 2111.09832, DF-Merge 2504.18992, RegMean 2212.09849, OBIM 2502.12217 as the project reconstructs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.oracles.thinning import Array, per_model, task_vector

Statistics = Sequence[Any]  # of each model an array, or None

ROUNDS = 8  # of OBIM's interleaved order


def fisher(
    base: None, models: list[Array], *, statistics: Statistics, weight: Any = 1.0, normalize: bool = True,
    floor: float = 1e-6, floor_is: str = "relative"
) -> Array:  # fmt: skip
    """Σ wFθ / Σ wF; the plain weighted mean where no F says anything, or a model has none. One tensor is all."""
    weights = per_model(weight, len(models))
    wide = [np.asarray(model, np.float64) for model in models]
    mean = sum(w * model for w, model in zip(weights, wide, strict=True)) / sum(weights)
    if any(each is None for each in statistics):
        return np.asarray(mean)
    total, divisor = np.zeros(mean.shape), np.zeros(mean.shape)
    size = max(1, mean.size)
    everything = [np.broadcast_to(np.asarray(own, np.float64), mean.shape) for own in statistics]
    squares = [float((information**2).sum()) for information in everything]
    known = [each for each in squares if each > 0]
    usual = sum(known) / len(known) if known else float(size)  # where a model's F says nothing
    for w, model, information, square in zip(weights, wide, everything, squares, strict=True):
        norm = math.sqrt(square or usual)
        factor = w / norm if normalize else w
        least = floor * norm / math.sqrt(size) if floor_is == "relative" else floor
        total = total + factor * np.maximum(information, least) * model
        divisor = divisor + factor * np.maximum(information, least)
    return np.where(divisor > 0, total / np.where(divisor > 0, divisor, 1), mean)


def df_merge(
    base: Array,
    models: list[Array],
    *,
    statistics: Statistics,
    weight: Any,
    fisher: str = "scaled",
    floor: float = 1e-12,
) -> Array:
    """θ₀ + M · Σ Fλτ / Σ F, coordinate by coordinate; θ₀ + Σ λτ where no F says anything, or a model has none."""
    start = np.asarray(base, np.float64)
    taus = [task_vector(model, base) for model in models]
    weights = per_model(weight, len(models))
    if any(each is None for each in statistics):
        statistics = [np.ones(start.shape)] * len(models)
    wide = [np.broadcast_to(np.asarray(own, np.float64), start.shape) + floor for own in statistics]
    result = np.empty(start.shape)
    for place in np.ndindex(*start.shape):
        told = [own[place] for own in wide]
        if sum(told) == 0:
            told = [1.0] * len(models)
        moved = sum(f * w * tau[place] for f, w, tau in zip(told, weights, taus, strict=True))
        result[place] = start[place] + len(models) * moved / sum(told)
    return result


def regmean(
    base: None, models: list[Array], *, statistics: Statistics, weight: Any = 1.0, alpha: float = 0.9,
    damping: float = 1e-6, axis: int = 1
) -> Array:  # fmt: skip
    """The paper's W = (Σ G)⁻¹ Σ GW for W (inputs, outputs), the off-diagonals of G × alpha, a ridge on the diagonal."""
    weights = per_model(weight, len(models))
    weights = [w / sum(weights) for w in weights]
    wide = [np.asarray(model, np.float64) for model in models]
    if any(each is None for each in statistics) or not wide[0].size:
        return np.asarray(sum(w * model for w, model in zip(weights, wide, strict=True)))
    matrices = [np.asarray(each, np.float64) for each in statistics]
    shrunk = [np.where(np.eye(len(g), dtype=bool), g, alpha * g) for g in matrices]
    mean_diagonal = sum(w * np.trace(g) for w, g in zip(weights, shrunk, strict=True)) / len(matrices[0])
    if mean_diagonal <= 0:
        return np.asarray(sum(w * model for w, model in zip(weights, wide, strict=True)))
    ridged = [g + damping * mean_diagonal * np.eye(len(g)) for g in shrunk]
    papers = [model if axis == 0 else model.T for model in wide]  # (inputs, outputs)
    right = sum(w * (g @ model) for w, g, model in zip(weights, ridged, papers, strict=True))
    merged = np.linalg.solve(sum(w * g for w, g in zip(weights, ridged, strict=True)), right)
    return np.asarray(merged if axis == 0 else merged.T)


def scores_of(tau: Array, own: Any) -> Array:
    """½hτ² flattened; |τ| without statistics; −1 where the model did not move, which is never claimed."""
    flat = tau.ravel()
    score = (
        np.abs(flat) if own is None else 0.5 * np.broadcast_to(np.asarray(own, np.float64), tau.shape).ravel() * flat**2
    )
    return np.where(flat == 0, -1.0, score)


def obim_owners(
    base: Array, models: list[Array], *, statistics: Statistics | None = None, density: Any = None,
    saliency: str = "stats", scope: str = "tensor", quota: str = "refill", order: str = "listed", **_: Any
) -> Array:  # fmt: skip
    """Whose each coordinate is, 0 the base's; in the shape of the base."""
    count = len(models)
    shares = [1 / count if d is None else d for d in (density if isinstance(density, list) else [density] * count)]
    taus = [task_vector(model, base) for model in models]
    known = [None] * count if saliency == "magnitude" or statistics is None else list(statistics)
    scores = [scores_of(tau, own) for tau, own in zip(taus, known, strict=True)]
    rounds = ROUNDS if order == "interleaved" else 1
    owners = np.zeros(taus[0].size, np.int64)
    by_threshold = scope == "global" and (saliency == "magnitude" or any(own is not None for own in known))
    rows = taus[0].shape[0] if scope == "row" and taus[0].ndim > 1 else 1
    for places in np.arange(owners.size).reshape(rows, -1) if owners.size else ():
        for r in range(rounds):
            for i, share in enumerate(shares):
                whole = max(1, int(share * len(places))) if share > 0 else 0
                before, upto = int(whole * (r / rounds)), int(whole * ((r + 1) / rounds))
                mine = scores[i][places]
                if quota == "refill":
                    mine, upto = np.where(owners[places] == 0, mine, -1.0), upto - before
                ranked = np.argsort(-mine, kind="stable")  # equals by position
                chosen = ranked[:upto]
                if by_threshold and upto:
                    chosen = np.flatnonzero(mine >= mine[ranked[upto - 1]])
                for j in chosen:
                    if mine[j] >= 0 and owners[places[j]] == 0:
                        owners[places[j]] = i + 1
    return owners.reshape(np.shape(base))


def obim(base: Array, models: list[Array], *, lambda_: float = 1.0, **claiming: Any) -> Array:
    """θ₀ + λ · the owner's task vector."""
    result = np.asarray(base, np.float64)
    owners = obim_owners(base, models, **claiming)
    for i, model in enumerate(models, 1):
        result = result + np.where(owners == i, lambda_ * task_vector(model, base), 0.0)
    return result


def keep_salient(tau: Array, own: Any, density: float) -> Array:
    """Boolean mask of the k = max(1, int(density · n)) entries with the largest ½hτ², equals by position."""
    if density >= 1:
        return np.ones(tau.shape, dtype=bool)
    keep = np.zeros(tau.size, dtype=bool)
    if density > 0 and tau.size:
        keep[np.argsort(-scores_of(tau, own), kind="stable")[: max(1, int(density * tau.size))]] = True
    return keep.reshape(tau.shape)


def reach_salient(tau: Array, own: Any, density: float) -> Array:
    """As `keep_salient` over the whole model, of which this tensor is all: whatever reaches the threshold."""
    if own is None or density >= 1 or not tau.size:
        return keep_salient(tau, own, density)
    kept = scores_of(tau, own)[keep_salient(tau, own, density).ravel()]
    return (scores_of(tau, own) >= (kept.min() if kept.size else np.inf)).reshape(tau.shape)
