"""Weighted means, and the mean pulled towards the base."""

from __future__ import annotations

from itertools import combinations
from typing import Annotated

import numpy as np

from merging.errors import MergeError
from merging.inputs import Chunk, Final, Inputs, Values
from merging.methods.registry import PerModel, method


def shares(weights: list[float]) -> list[float]:
    """Weights divided by their sum.

    Raises:
        MergeError: they sum to zero.
    """
    total = sum(weights)
    if abs(total) < 1e-12:
        raise MergeError(f"the weights {weights} sum to zero", mend="change them, or set 'normalize: false'")
    return [weight / total for weight in weights]


@method("linear", title="Linear", base="none", source="arXiv 2203.05482 (model soups)")
def linear(
    x: Inputs,
    *,
    weight: Annotated[PerModel[float], "factor of the model"],
    normalize: Annotated[bool, "divide by the sum of the weights"] = True,
) -> Final:
    """Σ wᵢθᵢ, the weights divided by their sum if `normalize`."""
    return x.combine(shares(weight) if normalize else weight)


@method("model_stock", title="Model Stock", base="required", models=(2, None), source="arXiv 2403.19522")
def model_stock(x: Inputs, *, filter_wise: Annotated[bool, "one ratio t for each row"] = False) -> Final:
    """t·mean(θᵢ) + (1 − t)·θ₀ with t = M·cosφ / (1 + (M − 1)·cosφ), cosφ the mean cosine between task vectors.

    With `filter_wise`, t is taken for each row of the last dimension by itself. Where the denominator vanishes the base is
    kept, as mergekit does.
    """
    count = len(x.models)
    if not filter_wise:
        t = float(_ratio(x.gram(deltas=True)))
        return x.add_deltas([t / count] * count)
    ratios = _ratio(x.row_grams(x.columns, deltas=True)).astype(np.float32)  # (rows,)

    def run(chunk: Chunk) -> Values:
        rows = slice(chunk.start // x.columns, chunk.stop // x.columns)
        mean = chunk.deltas().reshape(count, -1, x.columns).sum(0) / count  # (rows, columns)
        mean *= x.kernels.vector(ratios[rows])[:, None]
        return mean.reshape(-1) + chunk.base

    return Final(run, x.columns)


def _ratio(gram: np.ndarray) -> np.ndarray:
    """Interpolation ratio from the task vectors' inner products (k, k, …): (…)."""
    count = len(gram)
    norms = np.sqrt(np.einsum("ii...->i...", gram))
    cosines = [
        np.clip(gram[i, j] / np.maximum(norms[i] * norms[j], 1e-6), -1, 1) for i, j in combinations(range(count), 2)
    ]
    cosine = np.mean(cosines, axis=0)
    denominator = 1 + (count - 1) * cosine
    singular = np.abs(denominator) < 1e-6
    return np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, denominator))
