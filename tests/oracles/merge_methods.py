"""Every merge method once more: slowly, plainly, in float64, written from its formula.

An oracle is `oracle(base, models, **parameters)`: `base` one array or None, `models` a list of arrays of one shape, the
parameters those of the recipe (one value for all models or a list with one value per model; `lambda_` stands for
`lambda`). It returns a float64 array. `ORACLES` maps a method's name to its oracle; `oracle(name, base, models, …)`
looks it up.

The random methods take their keep masks from the caller (`masks`, one boolean array per model): what is checked is what
is computed from a draw. `keep_probability` says what each entry's draw should have been.

Sources: Task Arithmetic arXiv 2212.04089, TIES 2306.01708, DARE 2311.03099, DELLA 2406.11617, Breadcrumbs 2312.06795,
Model Soups 2203.05482, Model Stock 2403.19522, SCE 2408.07990, RAM 2601.13572; the others as mergekit 0.1.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tests.oracles.importance import Statistics, df_merge, fisher, keep_salient, obim, reach_salient, regmean
from tests.oracles.thinning import (
    Array,
    agreeing,
    consensus_sum,
    divided_by_probability,
    global_threshold,
    keep_largest,
    keep_probability,
    keep_without_outliers,
    largest_first,
    per_model,
    plain_sum,
    restored_norm,
    task_vector,
)


def oracle(name: str, base: Array | None, models: Sequence[Array], **parameters: Any) -> Array:
    """The float64 result of method `name`. Raises KeyError for a method without an oracle."""
    if "lambda" in parameters:
        parameters["lambda_"] = parameters.pop("lambda")
    return ORACLES[name](base, list(models), **parameters)


# ---- elementary ----


def linear(base: None, models: list[Array], *, weight: Any, normalize: bool = True) -> Array:
    """Σ wθ, the weights divided by their sum if `normalize`."""
    weights = per_model(weight, len(models))
    if normalize:
        weights = [w / sum(weights) for w in weights]
    result = np.zeros(models[0].shape)
    for w, model in zip(weights, models, strict=True):
        result = result + w * np.asarray(model, dtype=np.float64)
    return result


def _added(base: Array, taus: list[Array], elect: bool, *, weight: Any, normalize: bool, lambda_: float = 1.0) -> Array:
    """θ₀ + λ · the sum of what is left of the task vectors: the one end of all methods of this family."""
    mixed = (consensus_sum if elect else plain_sum)(taus, per_model(weight, len(taus)), normalize)
    return np.asarray(base, dtype=np.float64) + lambda_ * mixed


def task_arithmetic(base: Array, models: list[Array], *, normalize: bool = False, **adding: Any) -> Array:
    """θ₀ + λ Σ wτ."""
    return _added(base, [task_vector(model, base) for model in models], False, normalize=normalize, **adding)


def ties(
    base: Array, models: list[Array], *, density: Any = 1.0, normalize: bool = True, rescale: bool = False,
    scope: str = "tensor", saliency: str = "magnitude", statistics: Statistics | None = None, **adding: Any
) -> Array:  # fmt: skip
    """Trim by magnitude, elect the sign of the weighted sum, add what agrees. `scope` global: one tensor is all."""
    trimmed = []
    for i, (model, share) in enumerate(zip(models, per_model(density, len(models)), strict=True)):
        tau = task_vector(model, base)
        keep = keep_largest(tau, share) if scope == "tensor" else np.abs(tau) >= global_threshold([tau], share)
        if saliency == "stats" and statistics is not None:
            keep = (keep_salient if scope == "tensor" else reach_salient)(tau, statistics[i], share)
        trimmed.append(restored_norm(tau, keep) if rescale else np.where(keep, tau, 0.0))
    return _added(base, trimmed, True, normalize=normalize, **adding)


def ties_global(
    base: Mapping[str, Array], models: Sequence[Mapping[str, Array]], *, density: Any = 1.0, normalize: bool = True,
    **adding: Any
) -> dict[str, Array]:  # fmt: skip
    """TIES as its authors' code trims it: what reaches the k-th largest magnitude of the flattened model is kept."""
    taus = [{name: task_vector(model[name], base[name]) for name in base} for model in models]
    shares = per_model(density, len(models))
    thresholds = [global_threshold(list(tau.values()), share) for tau, share in zip(taus, shares, strict=True)]
    result = {}
    for name in base:
        trimmed = []
        for tau, threshold in zip(taus, thresholds, strict=True):
            trimmed.append(np.where(np.abs(tau[name]) >= threshold, tau[name], 0.0))
        result[name] = _added(base[name], trimmed, True, normalize=normalize, **adding)
    return result


def _crumbs(base: Array, models: list[Array], density: Any, gamma: Any, rescale: bool) -> list[Array]:
    count, taus = len(models), []
    for model, share, outliers in zip(models, per_model(density, count), per_model(gamma, count), strict=True):
        tau = task_vector(model, base)
        keep = keep_without_outliers(tau, share, outliers)
        taus.append(restored_norm(tau, keep) if rescale else np.where(keep, tau, 0.0))
    return taus


def breadcrumbs(
    base: Array, models: list[Array], *, density: Any = 1.0, gamma: Any = 0.01, normalize: bool = False,
    rescale: bool = False, **adding: Any
) -> Array:  # fmt: skip
    """Task arithmetic on task vectors without their outliers and their smallest entries."""
    return _added(base, _crumbs(base, models, density, gamma, rescale), False, normalize=normalize, **adding)


def breadcrumbs_ties(
    base: Array, models: list[Array], *, density: Any = 1.0, gamma: Any = 0.01, normalize: bool = False,
    rescale: bool = False, **adding: Any
) -> Array:  # fmt: skip
    """As `breadcrumbs`, with the sign election of TIES."""
    return _added(base, _crumbs(base, models, density, gamma, rescale), True, normalize=normalize, **adding)


# ---- random: the masks are the caller's ----


def _dropped(
    base: Array, models: list[Array], masks: Sequence[Array], density: Any, epsilon: Any, rescale: bool, rescale_by: str,
    saliency: str = "random", statistics: Statistics | None = None,
) -> list[Array]:  # fmt: skip
    if saliency == "stats" and statistics is not None:  # nothing is drawn
        taus = [task_vector(model, base) for model in models]
        shares = per_model(density, len(models))
        masks = [keep_salient(*each) for each in zip(taus, statistics, shares, strict=True)]
    count, taus = len(models), []
    epsilons: Sequence[float | None] = [None] * count if epsilon is None else per_model(epsilon, count)
    for model, keep, share, spread in zip(models, masks, per_model(density, count), epsilons, strict=True):
        tau = task_vector(model, base)
        if not rescale:
            taus.append(np.where(keep, tau, 0.0))
        elif rescale_by == "norm":
            taus.append(restored_norm(tau, keep))
        else:
            taus.append(divided_by_probability(tau, keep, keep_probability(tau, share, spread)))
    return taus


def dare_linear(
    base: Array, models: list[Array], *, masks: Sequence[Array], density: Any = 1.0, normalize: bool = False,
    rescale: bool = True, rescale_by: str = "probability", saliency: str = "random",
    statistics: Statistics | None = None, **adding: Any
) -> Array:  # fmt: skip
    """Drop entries at random, rescale the rest, then task arithmetic."""
    taus = _dropped(base, models, masks, density, None, rescale, rescale_by, saliency, statistics)
    return _added(base, taus, False, normalize=normalize, **adding)


def dare_ties(
    base: Array, models: list[Array], *, masks: Sequence[Array], density: Any = 1.0, normalize: bool = False,
    rescale: bool = True, rescale_by: str = "probability", saliency: str = "random",
    statistics: Statistics | None = None, **adding: Any
) -> Array:  # fmt: skip
    """Drop entries at random, rescale the rest, then the sign election of TIES."""
    taus = _dropped(base, models, masks, density, None, rescale, rescale_by, saliency, statistics)
    return _added(base, taus, True, normalize=normalize, **adding)


def della_linear(
    base: Array, models: list[Array], *, masks: Sequence[Array], density: Any = 1.0, epsilon: Any = 0.15,
    normalize: bool = False, rescale: bool = True, rescale_by: str = "probability", **adding: Any
) -> Array:  # fmt: skip
    """As `dare_linear`, larger entries kept with higher probability."""
    taus = _dropped(base, models, masks, density, epsilon, rescale, rescale_by)
    return _added(base, taus, False, normalize=normalize, **adding)


def della(
    base: Array, models: list[Array], *, masks: Sequence[Array], density: Any = 1.0, epsilon: Any = 0.15,
    normalize: bool = True, rescale: bool = True, rescale_by: str = "probability", **adding: Any
) -> Array:  # fmt: skip
    """As `dare_ties`, larger entries kept with higher probability."""
    taus = _dropped(base, models, masks, density, epsilon, rescale, rescale_by)
    return _added(base, taus, True, normalize=normalize, **adding)


# ---- spherical ----


def slerp(base: Array, models: list[Array], *, t: float) -> Array:
    """Along the arc from the base (t = 0) to the model (t = 1); along the chord when |cos| exceeds 0.9995."""
    (model,) = models
    v0, v1 = np.asarray(base, dtype=np.float64), np.asarray(model, dtype=np.float64)
    norm0, norm1 = np.linalg.norm(v0.ravel()), np.linalg.norm(v1.ravel())
    norm0, norm1 = (norm0 if norm0 > 1e-8 else 1.0), (norm1 if norm1 > 1e-8 else 1.0)
    cosine = float(np.clip(np.sum((v0 / norm0) * (v1 / norm1)), -1, 1))
    if abs(cosine) > 0.9995:
        return (1 - t) * v0 + t * v1
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * v0 + math.sin(t * angle) * v1) / math.sin(angle)


def nuslerp(
    base: Array | None,
    models: list[Array],
    *,
    weight: Any,
    nuslerp_row_wise: bool = False,
    nuslerp_flatten: bool = True,
) -> Array:
    """Slerp between two models, or their task vectors when there is a base, at t = w₁ / (w₀ + w₁).

    One angle for the whole tensor when `nuslerp_flatten`; else one for each vector along the first dimension when
    `nuslerp_row_wise`, along the last otherwise. Weights that sum to zero count as equal.
    """
    w0, w1 = per_model(weight, 2)
    t = 0.5 if abs(w0 + w1) < 1e-6 else w1 / (w0 + w1)
    if base is None:
        v0, v1 = (np.asarray(model, dtype=np.float64) for model in models)
    else:
        v0, v1 = (task_vector(model, base) for model in models)
    if v0.ndim == 0 or nuslerp_flatten:
        mixed = _nuslerp_vectors(t, v0.reshape(1, -1), v1.reshape(1, -1)).reshape(v0.shape)
    else:
        axis = 0 if nuslerp_row_wise else -1
        moved0, moved1 = np.moveaxis(v0, axis, -1), np.moveaxis(v1, axis, -1)  # (..., length of the vectors)
        shape = moved0.shape
        mixed = _nuslerp_vectors(t, moved0.reshape(-1, shape[-1]), moved1.reshape(-1, shape[-1])) if v0.size else v0
        mixed = np.moveaxis(mixed.reshape(shape), -1, axis)
    return mixed if base is None else np.asarray(base, dtype=np.float64) + mixed


COLINEAR = 2.0**-23  # up to this 1 − cos² two float32 vectors lie on one line and have no arc between them
OPPOSITE = -0.9995  # the cosine from which on a straight line is taken instead of an arc


def _nuslerp_vectors(t: float, v0: Array, v1: Array) -> Array:
    result = np.empty(v0.shape)
    for i, (a, b) in enumerate(zip(v0, v1, strict=True)):
        cosine = np.sum((a / max(np.linalg.norm(a), 1e-7)) * (b / max(np.linalg.norm(b), 1e-7)))
        cosine = float(np.clip(cosine, -1, 1))
        if 1 - cosine**2 <= COLINEAR or cosine < OPPOSITE:
            result[i] = (1 - t) * a + t * b
        else:
            angle = math.acos(cosine)
            result[i] = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
    return result


def multislerp(
    base: Array | None, models: list[Array], *, weight: Any, normalize_weights: bool = True, eps: float = 1e-8
) -> Array:
    """Barycentre on the sphere, through the tangent space at the weighted mean direction; with the mean of the norms.

    With a base: of the task vectors. Directions that cancel, or vectors that are all zero, fall back to the weighted
    sum (as mergekit does for two models; it refuses three and more).
    """
    weights = per_model(weight, len(models))
    if normalize_weights:
        weights = [w / sum(weights) for w in weights]
    origin = np.zeros(models[0].shape) if base is None else np.asarray(base, dtype=np.float64)
    vectors = [np.asarray(model, dtype=np.float64) if base is None else task_vector(model, base) for model in models]
    norms = [float(np.linalg.norm(vector.ravel())) for vector in vectors]
    units = [vector / (norm + eps) for vector, norm in zip(vectors, norms, strict=True)]

    mean = sum(w * unit for w, unit in zip(weights, units, strict=True))
    length = float(np.linalg.norm(np.ravel(mean)))
    if length < eps:
        return origin + sum(w * vector for w, vector in zip(weights, vectors, strict=True))
    mean = mean / length

    tangent = np.zeros(origin.shape)
    for w, unit in zip(weights, units, strict=True):
        tangent = tangent + w * (unit - np.sum(unit * mean) * mean)
    size = float(np.linalg.norm(tangent.ravel())) + eps
    direction = mean * math.cos(size) + tangent * (math.sin(size) / size)
    return origin + direction * sum(w * norm for w, norm in zip(weights, norms, strict=True))


def karcher(base: None, models: list[Array], *, weight: Any = 1.0, max_iter: int = 10, tol: float = 1e-5) -> Array:
    """Riemannian centre of mass of the unit directions, times the mean norm.

    Tensors of norm up to `tol` have no direction. `weight` is ours: mergekit weighs equally.
    """
    vectors = [np.asarray(model, dtype=np.float64) for model in models]
    if len(vectors) == 1:
        return vectors[0]
    weights = per_model(weight, len(models))
    weights = [w / sum(weights) for w in weights]
    norms = [float(np.linalg.norm(vector.ravel())) for vector in vectors]
    directed = [i for i, norm in enumerate(norms) if norm > tol]
    if not directed:
        return np.zeros(vectors[0].shape)
    units = [vectors[i] / norms[i] for i in directed]
    shares = [weights[i] / sum(weights[j] for j in directed) for i in directed]
    mean = sum(share * unit for share, unit in zip(shares, units, strict=True))
    length = float(np.linalg.norm(np.ravel(mean)))
    mean = units[0] if length < tol else mean / length
    for _ in range(max_iter):
        tangent = np.zeros(vectors[0].shape)  # weighted sum of the logarithms at `mean`
        for share, unit in zip(shares, units, strict=True):
            cosine = float(np.clip(np.sum(mean * unit), -1, 1))
            angle = math.acos(cosine)
            if angle >= tol:
                tangent = tangent + share * (angle / math.sin(angle)) * (unit - cosine * mean)
        size = float(np.linalg.norm(tangent.ravel()))
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) * tangent / size
        mean = mean / np.linalg.norm(mean.ravel())
    return sum(w * norm for w, norm in zip(weights, norms, strict=True)) * mean


# ---- geometry and statistics of the tensor ----


def model_stock(base: Array, models: list[Array], *, filter_wise: bool = False) -> Array:
    """t · mean(θ) + (1 − t) · θ₀ with t = M cos / (1 + (M − 1) cos), cos the mean over the pairs of models.

    One t for the tensor, or for each vector along the last dimension when `filter_wise`. The product of two norms
    counts as at least 1e-6; where |1 + (M − 1) cos| < 1e-6 the base stays.
    """
    origin = np.asarray(base, dtype=np.float64)
    columns = origin.shape[-1] if filter_wise and origin.ndim else origin.size
    if origin.size == 0:
        return origin
    start = origin.reshape(-1, columns)
    ends = [np.asarray(model, dtype=np.float64).reshape(-1, columns) for model in models]
    taus = [task_vector(model, base).reshape(-1, columns) for model in models]
    count = len(models)
    result = np.empty(start.shape)
    for row in range(len(start)):
        cosines = []
        for i in range(count):
            for j in range(i + 1, count):
                norms = np.linalg.norm(taus[i][row]) * np.linalg.norm(taus[j][row])
                cosine = np.sum(taus[i][row] * taus[j][row]) / max(norms, 1e-6)
                cosines.append(float(np.clip(cosine, -1, 1)))
        cosine = sum(cosines) / len(cosines)
        denominator = 1 + (count - 1) * cosine
        t = 0.0 if abs(denominator) < 1e-6 else count * cosine / denominator
        average = sum(end[row] for end in ends) / count
        result[row] = t * average + (1 - t) * start[row]
    return result.reshape(origin.shape)


def sce(base: Array, models: list[Array], *, select_topk: float = 1.0) -> Array:
    """Select by variance over the models, calculate one weight per model (its mean square), erase minority signs.

    k = int(select_topk · number of entries of non-zero variance); the election is of the plain sum; the divisor is at
    least 1e-6; weights are equal when the mean squares sum to less than 1e-6.
    """
    taus = [task_vector(model, base) for model in models]
    if not taus[0].size:
        return np.asarray(base, dtype=np.float64)
    if select_topk < 1:
        variance = np.var(np.stack(taus), axis=0)
        keep = np.zeros(variance.size, dtype=bool)
        keep[largest_first(variance)[: max(0, int(np.count_nonzero(variance) * select_topk))]] = True
        taus = [np.where(keep.reshape(tau.shape), tau, 0.0) for tau in taus]
    squares = [float(np.mean(tau**2)) for tau in taus]
    total = sum(squares)
    weights = [1 / len(taus)] * len(taus) if abs(total) < 1e-6 else [square / total for square in squares]
    mixed, divisor = np.zeros(taus[0].shape), np.zeros(taus[0].shape)
    for tau, weight, agrees in zip(taus, weights, agreeing(taus), strict=True):
        mixed = mixed + np.where(agrees, weight * tau, 0.0)
        divisor = divisor + np.where(agrees, weight, 0.0)
    return np.asarray(base, dtype=np.float64) + mixed / np.maximum(divisor, 1e-6)


def arcee_importance(base: Array, model: Array) -> Array:
    """|τ| · KL(softmax θ ‖ softmax θ₀) along the last dimension, 1e-8 added to all probabilities."""
    p = _softmax(np.asarray(model, dtype=np.float64)) + 1e-8
    q = _softmax(np.asarray(base, dtype=np.float64)) + 1e-8
    divergence = np.sum(np.atleast_1d(p * np.log(p / q)), axis=-1, keepdims=True)
    importance = np.abs(np.atleast_1d(task_vector(model, base))) * divergence
    return importance.reshape(np.shape(base))


def arcee_threshold(importance: Array) -> float:
    """median + 1.5 · (q₃ − q₁), the quantile q being the entry at int(q · (n − 1)) of the ascending order."""
    ascending = np.sort(importance.ravel())
    q1, median, q3 = (float(ascending[int(q * (ascending.size - 1))]) for q in (0.25, 0.5, 0.75))
    return median + 1.5 * (q3 - q1)


def _softmax(x: Array) -> Array:
    shifted = np.atleast_1d(x)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return (shifted / shifted.sum(axis=-1, keepdims=True)).reshape(np.shape(x))


def arcee_fusion(base: Array, models: list[Array]) -> Array:
    """The model's entries where their importance reaches the threshold, the base's elsewhere."""
    (model,) = models
    origin = np.asarray(base, dtype=np.float64)
    if not origin.size:
        return origin
    importance = arcee_importance(base, model)
    return origin + np.where(importance >= arcee_threshold(importance), task_vector(model, base), 0.0)


def nearswap(base: Array, models: list[Array], *, t: float) -> Array:
    """The closer an entry of the model is to the base's, the more of it is taken: share min(1, t / |difference|)."""
    (model,) = models
    a, b = np.asarray(base, dtype=np.float64), np.asarray(model, dtype=np.float64)
    share = np.clip(t / np.maximum(np.abs(task_vector(model, base)), 1e-6), 0, 1)
    return share * b + (1 - share) * a


def ram(base: Array, models: list[Array], *, epsilon: float = 1e-5) -> Array:
    """An entry that one model alone changed by more than `epsilon` is taken whole, a shared one is averaged."""
    return _ram(base, models, epsilon, boost=lambda shared, unique: 1.0)


def ramplus_tl(base: Array, models: list[Array], *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> Array:
    """As `ram`, a model's unique entries × 1 + r · min(alpha, shared / unique) with its counts in this tensor."""

    def boost(shared: int, unique: int) -> float:
        return 1 + r * (min(shared / unique, alpha) if unique else 0.0)  # without unique entries there is none to boost

    return _ram(base, models, epsilon, boost)


def _ram(base: Array, models: list[Array], epsilon: float, boost: Callable[[int, int], float]) -> Array:
    taus = [task_vector(model, base) for model in models]
    changed = [np.abs(tau) > epsilon for tau in taus]
    count = sum(mask.astype(int) for mask in changed)
    result = np.asarray(base, dtype=np.float64)
    for tau, mask in zip(taus, changed, strict=True):
        unique, shared = mask & (count == 1), mask & (count > 1)
        factor = boost(int(shared.sum()), int(unique.sum()))
        result = result + np.where(unique, factor * tau, 0.0) + np.where(shared, tau / np.maximum(count, 1), 0.0)
    return result


ORACLES: dict[str, Callable[..., Array]] = {
    function.__name__: function
    for function in (
        linear, task_arithmetic, ties, dare_linear, dare_ties, della, della_linear, breadcrumbs, breadcrumbs_ties,
        slerp, nuslerp, multislerp, karcher, model_stock, sce, arcee_fusion, nearswap, ram, ramplus_tl,
        fisher, df_merge, regmean, obim,
    )
}  # fmt: skip

RANDOM = {"dare_linear", "dare_ties", "della", "della_linear"}
"""Methods whose oracle takes `masks`."""
