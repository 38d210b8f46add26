"""How the task-vector methods thin out, rescale and elect: plain pieces in float64 for the oracles.

Conventions, the same for every method:

- A task vector is the float32 difference of the float32 inputs, as the definition says: what is selected by magnitude
  is selected among float32 numbers. All arithmetic after that is float64.
- Among entries of equal magnitude the one with the lowest flat index counts as the larger, wherever the k largest are
  kept or the smallest dropped (`ties`, `breadcrumbs`, `sce`). `della` ranks ascending, equals in flat order.
- The sign of a weighted sum of zero is plus; an entry that is zero agrees with no sign.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def per_model(value: float | Sequence[float], count: int) -> list[float]:
    """One float per model, from one value for all of them or a list."""
    if isinstance(value, (int, float)):
        return [float(value)] * count
    assert len(value) == count, f"{len(value)} values for {count} models"
    return [float(entry) for entry in value]


def task_vector(model: Array, base: Array) -> Array:
    """float32(model − base), in the shape of both, returned as float64."""
    difference = np.asarray(model, dtype=np.float32) - np.asarray(base, dtype=np.float32)
    return np.asarray(difference, dtype=np.float64)


def largest_first(tau: Array) -> Array:
    """Flat indices by falling magnitude; among equals the lowest index first. Shape (n,)."""
    return np.argsort(-np.abs(tau.ravel()), kind="stable")


def keep_largest(tau: Array, density: float) -> Array:
    """Boolean mask of the k = max(1, int(density · n)) largest magnitudes; all from density 1 on, none at 0."""
    if density >= 1:
        return np.ones(tau.shape, dtype=bool)
    keep = np.zeros(tau.size, dtype=bool)
    if density > 0 and tau.size:
        k = max(1, int(density * tau.size))
        keep[largest_first(tau)[:k]] = True
    return keep.reshape(tau.shape)


def keep_without_outliers(tau: Array, density: float, gamma: float) -> Array:
    """Boolean mask of Model Breadcrumbs: without the int(gamma · n) largest, then without the smallest.

    Ascending ranks [n_bottom, n_bottom + target) stay, where target = int(density · n) and
    n_bottom = max(0, n − target − n_top): the density wins over gamma.
    """
    if density >= 1:
        return np.ones(tau.shape, dtype=bool)
    n = tau.size
    target = int(density * n)
    n_top = int(gamma * n)
    n_bottom = max(0, n - target - n_top)
    ascending = largest_first(tau)[::-1]
    keep = np.zeros(n, dtype=bool)
    keep[ascending[n_bottom : n_bottom + target]] = True
    return keep.reshape(tau.shape)


def keep_probability(tau: Array, density: float, epsilon: float | None = None) -> Array:
    """Probability with which each entry is kept; `epsilon` None for DARE, a number for DELLA. In the shape of `tau`.

    DELLA: (density − ε) + 2ε · (rank − 1)/(n − 1), rank ascending by magnitude within the entry's row. A row is what
    the first dimension indexes; a tensor of fewer than two dimensions is one row. A row of one entry has no ranks: it
    is kept with the density itself.
    """
    if density >= 1:
        return np.ones(tau.shape)
    if density <= 0:
        return np.zeros(tau.shape)
    if epsilon is None or tau.size == 0:
        return np.full(tau.shape, float(density))
    rows = tau.reshape(tau.shape[0], -1) if tau.ndim >= 2 else tau.reshape(1, -1)
    probability = np.empty(rows.shape)
    for r, row in enumerate(rows):
        n = len(row)
        if n == 1:
            probability[r, 0] = density
            continue
        for rank, column in enumerate(np.argsort(np.abs(row), kind="stable")):  # rank counts from 0 here
            probability[r, column] = (density - epsilon) + 2 * epsilon * (rank / (n - 1))
    return probability.reshape(tau.shape)


def global_threshold(taus: Sequence[Array], density: float) -> float:
    """The k-th largest magnitude of one model's whole flattened task vector, k = max(1, int(density · n))."""
    if density >= 1:
        return 0.0
    flat = np.concatenate([np.abs(tau).ravel() for tau in taus])
    if density <= 0 or flat.size == 0:
        return math.inf
    return float(np.sort(flat)[::-1][max(1, int(density * flat.size)) - 1])


def restored_norm(tau: Array, keep: Array) -> Array:
    """The kept entries times the factor that gives them the l1 norm of `tau`, where both norms are at least 1e-7."""
    kept = np.where(keep, tau, 0.0)
    before, after = float(np.abs(tau).sum()), float(np.abs(kept).sum())
    return kept if before < 1e-7 or after < 1e-7 else kept * (before / after)


def divided_by_probability(tau: Array, keep: Array, probability: Array) -> Array:
    """Each kept entry divided by the probability with which it was kept."""
    return np.where(keep, tau / np.where(keep, probability, 1.0), 0.0)


def agreeing(weighted: Sequence[Array]) -> list[Array]:
    """For each model the boolean mask of entries whose sign is the sign of the sum over the models."""
    total = np.zeros(weighted[0].shape)
    for entry in weighted:
        total = total + entry
    majority = np.where(total >= 0, 1.0, -1.0)
    return [np.sign(entry) == majority for entry in weighted]


def consensus_sum(taus: Sequence[Array], weights: Sequence[float], normalize: bool) -> Array:
    """Σ of the weighted entries that agree with the elected sign, if `normalize` over the sum of their weights."""
    weighted = [weight * tau for weight, tau in zip(weights, taus, strict=True)]
    total, divisor = np.zeros(taus[0].shape), np.zeros(taus[0].shape)
    for entry, weight, agrees in zip(weighted, weights, agreeing(weighted), strict=True):
        total = total + np.where(agrees, entry, 0.0)
        divisor = divisor + np.where(agrees, weight, 0.0)
    return total / np.where(divisor == 0, 1.0, divisor) if normalize else total


def plain_sum(taus: Sequence[Array], weights: Sequence[float], normalize: bool) -> Array:
    """Σ wτ, divided by Σ w if `normalize` (by 1 if that sum is below 1e-8)."""
    total = np.zeros(taus[0].shape)
    for tau, weight in zip(taus, weights, strict=True):
        total = total + weight * tau
    divisor = sum(weights)
    return total / (1.0 if abs(divisor) < 1e-8 else divisor) if normalize else total
