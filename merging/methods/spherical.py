"""Spherical means. All of them stay in the span of their inputs, so one pass for the inner products fixes the result's
coefficients (in float64, whatever the size of the tensor), and one pass applies them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from merging.inputs import Chunk, Final, Inputs, Values
from merging.methods.averages import shares
from merging.methods.registry import PerModel, Range, method

Weights = Annotated[PerModel[float], "share of the model"]

_COLINEAR = 2.0**-23  # 1 − cos² of vectors that float32 cannot tell from parallel ones
# The cosine from which on there is no one arc: along it, unequal lengths would be blown up without bound.
_OPPOSITE = -0.9995


@method("slerp", title="SLERP", base="required", models=(1, 1), source="Shoemake 1985; mergekit's `slerp`")
def slerp(x: Inputs, *, t: Annotated[float, "0 is the base, 1 the other model"]) -> Final:
    """Along the great circle from the base (t = 0) to the other model (t = 1); straight where |cos| > 0.9995."""
    gram = x.gram(with_base=True)
    norm = np.sqrt(np.diag(gram))
    norm[norm <= 1e-8] = 1.0
    cosine = float(np.clip(gram[0, 1] / (norm[0] * norm[1]), -1, 1))
    weights = (1 - t, t)
    if abs(cosine) <= 0.9995:
        angle = math.acos(cosine)
        weights = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
    factors = x.kernels.vector(weights)

    def run(chunk: Chunk) -> Values:
        x.kernels.combine(factors, chunk.stack, chunk.out)
        return chunk.out

    return Final(run)


@method("nuslerp", title="NuSLERP", base="optional", models=(2, 2), source="mergekit's `nuslerp`")
def nuslerp(
    x: Inputs,
    *,
    weight: Weights,
    nuslerp_row_wise: Annotated[bool, "vectors along the first dimension (without nuslerp_flatten)"] = False,
    nuslerp_flatten: Annotated[bool, "the whole tensor is one vector"] = True,
) -> Final:
    """SLERP of two models, or with a base of their task vectors, at t = w₂ / (w₁ + w₂).

    Over the whole tensor by default; with `nuslerp_flatten: false` for each vector along the last dimension, and with
    `nuslerp_row_wise: true` as well, along the first (mergekit's names).
    """
    total = sum(weight)
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    deltas = x.base is not None
    if nuslerp_flatten or len(x.shape) < 2:
        first, second = (float(w) for w in _arc(x.gram(deltas=deltas), t))
        return x.add_deltas([first, second]) if deltas else x.combine([first, second])

    along_first = nuslerp_row_wise
    columns = x.filter_size if along_first else x.columns
    gram = x.column_grams(columns, deltas) if along_first else x.row_grams(columns, deltas)
    factors = np.stack(_arc(gram, t)).astype(np.float32)  # (2, columns or rows)

    def run(chunk: Chunk) -> Values:
        values = (chunk.deltas() if deltas else chunk.models).reshape(2, -1, columns)
        if along_first:
            first, second = (x.kernels.vector(f)[None, :] for f in factors)
        else:
            rows = slice(chunk.start // columns, chunk.stop // columns)
            first, second = (x.kernels.vector(f[rows])[:, None] for f in factors)
        merged = (values[0] * first + values[1] * second).reshape(-1)
        return merged + chunk.base if deltas else merged

    return Final(run, columns)


@method(
    "multislerp",
    title="Multi-SLERP",
    base="optional",
    source="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
)
def multislerp(
    x: Inputs,
    *,
    weight: Weights,
    normalize_weights: Annotated[bool, "divide the weights by their sum"] = True,
    eps: Annotated[float, Range(low=0), "lengths under this count as 0"] = 1e-8,
) -> Final:
    """(Σ wᵢ‖vᵢ‖)·m̂, with m̂ the direction of Σ wᵢvᵢ/‖vᵢ‖; vᵢ the models, or with a base their task vectors.

    The definition interpolates in the tangent space at m̂, where the weighted sum of the vectors is zero, which leaves the
    closed form above. Where the directions cancel, the plain weighted mean of the vᵢ; a tensor that no model changed stays.
    """
    weights = np.asarray(shares(weight) if normalize_weights else weight)
    deltas = x.base is not None
    gram = x.gram(deltas=deltas)
    norms = np.sqrt(np.diag(gram))
    directions = weights / (norms + eps)
    length = math.sqrt(max(0.0, float(directions @ gram @ directions)))
    coefficients = weights if length < eps else directions * (float(norms @ weights) / length)
    return x.add_deltas(list(coefficients)) if deltas else x.combine(list(coefficients))


@method("karcher", title="Karcher mean", base="none", source="arXiv 2603.04972; mergekit's `karcher`")
def karcher(
    x: Inputs,
    *,
    weight: Weights = 1.0,  # type: ignore[assignment]
    max_iter: Annotated[int, Range(low=0), "steps at most"] = 10,
    tol: Annotated[float, Range(low=0), "a shorter step is the last"] = 1e-5,
) -> Final:
    """The Riemannian centre of mass of the models' directions, times their mean norm.

    Iterates mean ← exp(mean, Σ wᵢ·log(mean, uᵢ)) until the step is under `tol`. `weight` (ours; mergekit weighs equally) is
    divided by its sum.
    """
    weights = np.asarray(shares(weight))
    gram = x.gram()
    norms = np.sqrt(np.diag(gram))
    valid = norms > tol
    if not valid.any():
        return x.combine([0.0] * len(norms))
    inverse = np.where(valid, 1 / np.where(valid, norms, 1.0), 0.0)
    mean = _centre(
        gram * np.outer(inverse, inverse), np.where(valid, weights, 0.0) / weights[valid].sum(), max_iter, tol
    )
    return x.combine(list(mean * inverse * float(weights @ norms)))


def _centre(gram: NDArray[np.float64], weights: NDArray[np.float64], max_iter: int, tol: float) -> NDArray[np.float64]:
    """Karcher mean of unit vectors with inner products `gram` (k, k), as coefficients of those vectors (k,)."""

    def norm(c: NDArray[np.float64]) -> float:
        return math.sqrt(max(0.0, float(c @ gram @ c)))

    mean = weights.copy()
    length = norm(mean)
    if length < tol:
        mean, length = np.eye(len(weights))[np.flatnonzero(weights)[0]], 1.0
    mean = mean / length
    for _ in range(max_iter):
        dots = np.clip(gram @ mean, -1, 1)
        angles = np.arccos(dots)
        far = (angles >= tol) & (weights != 0)
        factors = np.where(far, weights * angles / np.where(far, np.sin(angles), 1.0), 0.0)
        tangent = factors - float(factors @ dots) * mean
        step = norm(tangent)
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / norm(mean)
    return np.asarray(mean)


def _arc(gram: NDArray[np.float64], t: float) -> Sequence[NDArray[np.float64]]:
    """Coefficients of two vectors at `t` of the arc between them, from inner products (2, 2, …): two of (…)."""
    norms = np.maximum(np.sqrt(np.einsum("ii...->i...", gram)), 1e-7)
    cosine = np.clip(gram[0, 1] / (norms[0] * norms[1]), -1, 1)
    straight = (1 - cosine**2 <= _COLINEAR) | (cosine < _OPPOSITE)
    angle = np.arccos(np.where(straight, 0.0, cosine))
    sine = np.sin(angle)
    return (
        np.where(straight, 1 - t, np.sin((1 - t) * angle) / sine),
        np.where(straight, t, np.sin(t * angle) / sine),
    )
