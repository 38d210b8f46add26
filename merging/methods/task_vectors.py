"""Generalised task arithmetic: thin out each task vector, agree on signs or not, add what is left to the base.

θ = θ₀ + λ · Σ wᵢ τ̃ᵢ, where the methods differ in how τ̃ᵢ is made from τᵢ = θᵢ − θ₀ and in whether entries must agree with
an elected sign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from merging.errors import MergeError
from merging.inputs import Chunk, Final, Inputs, Trim, Values, coarse_bin, fine_cut
from merging.methods.registry import PerModel, Range, Search, method

#: Changes one model's task vector on one chunk in place: (values, start).
Thin = Callable[[Values, int], None]
Weights = Annotated[PerModel[float], "factor of the task vector"]
Densities = Annotated[
    PerModel[Annotated[float, Range(0, 1)]], "share of the task vector's entries that stays", Search(0.1, 1)
]
#: Of a keep probability that spreads by ε = 0.15 and must stay in (0, 1).
SpreadDensities = Annotated[
    PerModel[Annotated[float, Range(0, 1)]], "share of the task vector's entries that stays", Search(0.2, 0.8)
]
Outliers = Annotated[PerModel[Annotated[float, Range(0, 1)]], "share of the entries, the largest, that is dropped"]
Spread = Annotated[PerModel[Annotated[float, Range(0, 1)]], "the keep probability goes from density − ε to density + ε"]
Normalize = Annotated[bool, "divide by the sum of the weights"]
Lambda = Annotated[float, "factor of what is added to the base"]
RestoreNorm = Annotated[bool, "scale what is left of a task vector to its l1 norm"]
Rescale = Annotated[bool, "scale what is left of a task vector, as `rescale_by` says"]
Saliency = Annotated[Literal["magnitude", "stats"], "entries rank by |τ|, or by ½hτ² with statistics h"]
RescaleBy = Annotated[Literal["probability", "norm"], "1 / keep probability, or to the l1 norm before"]


@method("task_arithmetic", title="Task arithmetic", base="required", source="arXiv 2212.04089")
def task_arithmetic(x: Inputs, *, weight: Weights, normalize: Normalize = False, lambda_: Lambda = 1.0) -> Final:
    """θ₀ + λ Σ wᵢτᵢ, with `normalize` divided by Σ wᵢ."""
    return x.add_deltas(_scaled(weight, normalize, lambda_))


def _ties_survey(
    x: Inputs, totals: Sequence[NDArray[np.int64]], *, density: list[float], scope: str, saliency: str, **_: Any
) -> Any:
    """Two stages over the whole model: the coarse histogram of each task vector, then the fine one of its cut's bin."""
    ranks = _ranks(x, saliency)
    together = [i for i, known in enumerate(x.known) if known or saliency == "magnitude"]
    if scope != "global" or len(totals) == 2 or not together:
        return None
    if not totals:
        counts = np.zeros((len(density), 1 << 15), np.int64)
        for chunk in x.chunks(statistics=ranks.by_statistics):
            scores = ranks(chunk)
            for i in together:
                x.kernels.histogram(scores[i], counts[i])
        return counts
    counts = np.zeros((len(density), 1 << 16), np.int64)
    highs = [coarse_bin(row, _count(share, int(row.sum())))[0] for row, share in zip(totals[0], density, strict=True)]
    for chunk in x.chunks(statistics=ranks.by_statistics):
        scores = ranks(chunk)
        for i in together:
            x.kernels.fine_histogram(scores[i], highs[i], counts[i])
    return counts


@method(
    "ties",
    title="TIES",
    base="required",
    source="arXiv 2306.01708",
    survey=_ties_survey,
    statistics=("moments", "fisher"),
    statistics_if=("saliency", "stats"),
)
def ties(
    x: Inputs,
    *,
    weight: Weights,
    density: Densities = 1.0,  # type: ignore[assignment]
    normalize: Normalize = True,
    lambda_: Lambda = 1.0,
    rescale: RestoreNorm = False,
    scope: Annotated[Literal["tensor", "global"], "what the largest entries are chosen from"] = "tensor",
    saliency: Saliency = "magnitude",
) -> Final:
    """Trim each task vector to its `density` largest entries, elect signs, add the entries that agree.

    `scope: tensor` keeps max(1, ⌊density·n⌋) entries of each tensor, ties at the threshold by position; `scope: global` keeps
    whatever reaches the threshold of the flattened model, as the authors' code does. With `normalize`, each coordinate is
    divided by the weights that agree there; `rescale` restores each trimmed vector's l1 norm (mergekit's option).

    `saliency: stats` keeps the entries whose loss hurts their own model most: the largest ½hτ², h the second moments of the
    layer's inputs or the Fisher diagonal (`cuvee stats`). A tensor without statistics is trimmed by magnitude, and for
    `scope: global` by itself.
    """
    ranks = _ranks(x, saliency)
    alone = [saliency == "stats" and not known for known in x.known]
    thins: list[Thin] = []
    if scope != "global" or any(alone):
        thins = _magnitude(x, [(_count(share, x.numel), 0) for share in density], ranks)
    if scope == "global" and not all(alone):
        together = [
            _threshold(x, fine_cut(fine, high << 16, rest).threshold)
            for coarse, fine, share in zip(x.surveys[0], x.surveys[1], density, strict=True)
            for high, rest in [coarse_bin(coarse, _count(share, int(coarse.sum())))]
        ]
        thins = [thins[i] if own else together[i] for i, own in enumerate(alone)]
    return _add(x, weight, thins, elect=True, normalize=normalize, lambda_=lambda_, restore_norm=rescale, ranks=ranks)


@method("breadcrumbs", title="Model Breadcrumbs", base="required", source="arXiv 2312.06795")
def breadcrumbs(
    x: Inputs,
    *,
    weight: Weights,
    density: Densities = 1.0,  # type: ignore[assignment]
    gamma: Outliers = 0.01,  # type: ignore[assignment]
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    rescale: RestoreNorm = False,
) -> Final:
    """Drop each task vector's `gamma` largest entries and its smallest, down to `density`, then task arithmetic."""
    thins = _band(x, density, gamma)
    return _add(x, weight, thins, elect=False, normalize=normalize, lambda_=lambda_, restore_norm=rescale)


@method("breadcrumbs_ties", title="Model Breadcrumbs with TIES", base="required", source="arXiv 2312.06795")
def breadcrumbs_ties(
    x: Inputs,
    *,
    weight: Weights,
    density: Densities = 1.0,  # type: ignore[assignment]
    gamma: Outliers = 0.01,  # type: ignore[assignment]
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    rescale: RestoreNorm = False,
) -> Final:
    """As `breadcrumbs`, with TIES' sign election."""
    thins = _band(x, density, gamma)
    return _add(x, weight, thins, elect=True, normalize=normalize, lambda_=lambda_, restore_norm=rescale)


@method(
    "dare_linear",
    title="DARE linear",
    base="required",
    source="arXiv 2311.03099",
    statistics=("moments", "fisher"),
    statistics_if=("saliency", "stats"),
)
def dare_linear(
    x: Inputs,
    *,
    weight: Weights,
    density: Densities = 1.0,  # type: ignore[assignment]
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    rescale: Rescale = True,
    rescale_by: RescaleBy = "probability",
    saliency: Annotated[
        Literal["random", "stats"], "what is dropped: entries at random, or the least salient"
    ] = "random",
) -> Final:
    """Drop each entry with probability 1 − density, divide the rest by density, then task arithmetic.

    `rescale_by: norm` is mergekit's rule: times what restores the vector's l1 norm in this tensor.

    `saliency: stats` leaves nothing to chance: the 1 − density share of the entries with the smallest ½hτ² goes, h the second
    moments of the layer's inputs or the Fisher diagonal (`cuvee stats`), |τ| in tensors without. What is left is rescaled as
    ever; since it is the largest part and no fair sample, 1 / density overshoots: `rescale: false` or `rescale_by: norm` do not.
    """
    return _dare(x, weight, density, False, normalize, lambda_, rescale, rescale_by, saliency)


@method(
    "dare_ties",
    title="DARE TIES",
    base="required",
    source="arXiv 2311.03099",
    statistics=("moments", "fisher"),
    statistics_if=("saliency", "stats"),
)
def dare_ties(
    x: Inputs,
    *,
    weight: Weights,
    density: Densities = 1.0,  # type: ignore[assignment]
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    rescale: Rescale = True,
    rescale_by: RescaleBy = "probability",
    saliency: Annotated[
        Literal["random", "stats"], "what is dropped: entries at random, or the least salient"
    ] = "random",
) -> Final:
    """As `dare_linear`, with TIES' sign election."""
    return _dare(x, weight, density, True, normalize, lambda_, rescale, rescale_by, saliency)


@method("della_linear", title="DELLA linear", base="required", source="arXiv 2406.11617")
def della_linear(
    x: Inputs,
    *,
    weight: Weights,
    density: SpreadDensities = 1.0,  # type: ignore[assignment]
    epsilon: Spread = 0.15,  # type: ignore[assignment]
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    rescale: Rescale = True,
    rescale_by: RescaleBy = "probability",
) -> Final:
    """Drop entries at random, the large less often: keep probability density − ε … density + ε by rank in the row.

    A row is what belongs to one index of the first dimension; a vector is one row. Each kept entry is divided by its own
    keep probability, as the authors do; `rescale_by: norm` is mergekit's rule.
    """
    thins = _by_rank(x, density, epsilon, rescale and rescale_by == "probability")
    restore = rescale and rescale_by == "norm"
    return _add(x, weight, thins, False, normalize, lambda_, restore, columns=x.filter_size)


@method("della", title="DELLA", base="required", source="arXiv 2406.11617")
def della(
    x: Inputs,
    *,
    weight: Weights,
    density: SpreadDensities = 1.0,  # type: ignore[assignment]
    epsilon: Spread = 0.15,  # type: ignore[assignment]
    normalize: Normalize = True,
    lambda_: Lambda = 1.0,
    rescale: Rescale = True,
    rescale_by: RescaleBy = "probability",
) -> Final:
    """As `della_linear`, with TIES' sign election."""
    thins = _by_rank(x, density, epsilon, rescale and rescale_by == "probability")
    restore = rescale and rescale_by == "norm"
    return _add(x, weight, thins, True, normalize, lambda_, restore, columns=x.filter_size)


# ---- ways to thin a task vector ----


class _Ranks:
    """What entries are ranked by on a chunk: (k, n), the task vectors, or `√h·τ` in place of the statistics h."""

    def __init__(self, x: Inputs, by_statistics: bool) -> None:
        self._x, self.by_statistics = x, by_statistics

    def __call__(self, chunk: Chunk) -> Values:
        deltas = chunk.deltas()
        return self._x.saliency(chunk) if self.by_statistics else deltas


def _ranks(x: Inputs, saliency: str) -> _Ranks:
    return _Ranks(x, saliency == "stats" and any(x.known))


def _keep_all(values: Values, start: int) -> None:
    """Density 1: nothing is dropped."""


def _count(density: float, numel: int) -> int:
    """How many entries a density keeps: at least one, unless it is 0."""
    return max(1, int(density * numel)) if density > 0 and numel else 0


def _threshold(x: Inputs, threshold: int) -> Thin:
    return lambda values, start: x.kernels.keep_above(values, threshold)


def _magnitude(x: Inputs, kept: Sequence[tuple[int, int]], ranks: _Ranks | None = None) -> list[Thin]:
    """Keep the magnitudes ranked inner … outer (largest first) of each task vector: one (outer, inner) a model."""
    if all(outer >= x.numel and inner == 0 for outer, inner in kept):
        return [_keep_all] * len(kept)
    ranks = ranks or _Ranks(x, False)
    largest = [[outer, inner] if inner else [outer] for outer, inner in kept]
    cuts = x.cuts(ranks, largest, statistics=ranks.by_statistics)
    thins: list[Thin] = []
    for (outer, inner), row in zip(kept, cuts, strict=True):
        trim = Trim(x.kernels, row[0], row[1] if inner else None)
        thins.append(_keep_all if outer >= x.numel and inner == 0 else trim)
    return thins


def _band(x: Inputs, density: Sequence[float], gamma: Sequence[float]) -> list[Thin]:
    """mergekit's counts: ⌊density·n⌋ entries stay; fewer than ⌊gamma·n⌋ outliers go where the density demands it."""
    ranks = []
    for share, outliers in zip(density, gamma, strict=True):
        target = int(share * x.numel)
        bottom = max(0, x.numel - target - int(outliers * x.numel))
        ranks.append((x.numel, 0) if share >= 1 else (x.numel - bottom, x.numel - bottom - target))
    return _magnitude(x, ranks)


def _random(x: Inputs, density: Sequence[float], rescale: bool) -> list[Thin]:
    def thin(index: int, keep: float) -> Thin:
        if keep >= 1:
            return _keep_all
        scale = 1 / keep if rescale and keep > 0 else 1.0
        key = x.key(index)
        return lambda values, start: x.kernels.drop(values, keep, scale, key, start)

    return [thin(index, keep) for index, keep in enumerate(density)]


def _by_rank(x: Inputs, density: Sequence[float], epsilon: Sequence[float], rescale: bool) -> list[Thin]:
    def thin(index: int, keep: float, spread: float) -> Thin:
        if keep >= 1:
            return _keep_all
        if keep > 0 and not (keep - spread > 0 and keep + spread < 1):
            raise MergeError(
                f"density {keep} ± epsilon {spread} leaves (0, 1)",
                mend="choose a smaller 'epsilon' or another 'density'",
            )
        if keep <= 0:
            return _threshold(x, 0x7FFFFFFF)
        key, columns = x.key(index), x.filter_size
        low, high = keep - spread, keep + spread
        return lambda values, start: x.kernels.drop_by_rank(values, columns, low, high, rescale, key, start)

    return [thin(index, *pair) for index, pair in enumerate(zip(density, epsilon, strict=True))]


# ---- adding up ----


def _scaled(weights: Sequence[float], normalize: bool, lambda_: float) -> list[float]:
    total = sum(weights) if normalize else 1.0
    factor = lambda_ / (total if abs(total) >= 1e-8 else 1.0)
    return [weight * factor for weight in weights]


def _dare(
    x: Inputs,
    weight: Sequence[float],
    density: Sequence[float],
    elect: bool,
    normalize: bool,
    lambda_: float,
    rescale: bool,
    rescale_by: str,
    saliency: str,
) -> Final:
    by_probability, restore = rescale and rescale_by == "probability", rescale and rescale_by == "norm"
    if saliency == "random":
        return _add(x, weight, _random(x, density, by_probability), elect, normalize, lambda_, restore)
    ranks = _ranks(x, saliency)
    thins = _magnitude(x, [(_count(share, x.numel), 0) for share in density], ranks)
    scales = [1 / share if by_probability and share > 0 else 1.0 for share in density]
    return _add(x, weight, thins, elect, normalize, lambda_, restore, ranks=ranks, scales=scales)


def _add(
    x: Inputs,
    weight: Sequence[float],
    thins: Sequence[Thin],
    elect: bool,
    normalize: bool,
    lambda_: float,
    restore_norm: bool = False,
    columns: int = 1,
    ranks: _Ranks | None = None,
    scales: Sequence[float] | None = None,
) -> Final:
    """θ₀ + λ Σ wᵢτ̃ᵢ, over the agreeing entries only if `elect`; `restore_norm` scales each τ̃ᵢ to the l1 norm of τᵢ.

    Args:
        ranks: what `thins` thin out, if not the task vectors themselves.
        scales: factors of what is left of each task vector.
    """
    ranks = ranks or _Ranks(x, False)
    if restore_norm:
        scales = _norm_ratios(x, thins, columns, ranks)
    factors = x.kernels.vector(weight if elect else _scaled(weight, normalize, lambda_))

    def run(chunk: Chunk) -> Values:
        _thin_out(x, chunk, ranks(chunk), thins, ranks)
        deltas = chunk.models
        for scale, values in zip(scales or (), deltas, strict=bool(scales)):
            if scale != 1:
                values *= scale
        if elect:
            x.kernels.elect(deltas, factors, normalize, chunk.out)
            if lambda_ != 1:
                chunk.out *= lambda_
        else:
            x.kernels.combine(factors, deltas, chunk.out)
        chunk.out += chunk.base
        return chunk.out

    return Final(run, columns, ranks.by_statistics)


def _thin_out(x: Inputs, chunk: Chunk, scores: Values, thins: Sequence[Thin], ranks: _Ranks) -> None:
    """Leaves of the chunk's task vectors what is left of their scores."""
    for thin, score, values in zip(thins, scores, chunk.models, strict=True):
        thin(score, chunk.start)
        if ranks.by_statistics and thin is not _keep_all:
            x.kernels.keep_where(values, score)


def _norm_ratios(x: Inputs, thins: Sequence[Thin], columns: int, ranks: _Ranks) -> list[float]:
    """What gives each thinned task vector the l1 norm it had before. One more pass; random draws repeat exactly."""

    def norms(chunk: Chunk) -> NDArray[np.float64]:
        scores = ranks(chunk)
        before = [x.kernels.l1(values) for values in chunk.models]
        _thin_out(x, chunk, scores, thins, ranks)
        return np.array([before, [x.kernels.l1(values) for values in chunk.models]])

    if not x.numel:
        return [1.0] * len(thins)
    totals = x.total(norms, columns, ranks.by_statistics)
    return [b / a if min(b, a) >= 1e-7 else 1.0 for b, a in totals.T]  # mergekit's guard
