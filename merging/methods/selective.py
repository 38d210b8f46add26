"""Methods that choose, coordinate by coordinate, what to take over from which model."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from merging.inputs import Chunk, Final, Inputs, Trim, Values
from merging.methods.registry import Range, Search, method

Positive = Annotated[float, Range(low=0)]
Epsilon = Annotated[Positive, "entries up to this size count as not moved", Search(1e-6, 1e-3, log=True)]


@method("nearswap", title="NearSwap", base="required", models=(1, 1), source="mergekit's `nearswap`")
def nearswap(
    x: Inputs, *, t: Annotated[Positive, "how far a coordinate moves at most", Search(1e-5, 0.1, log=True)]
) -> Final:
    """Moves each coordinate of the base towards the other model by min(1, t / |difference|) of the way."""

    def formula(xp: Any, base: Values, models: Values) -> Values:
        share = xp.clip(t / xp.clip(xp.abs(models[0] - base), 1e-6, None), None, 1.0)
        return share * models[0] + (1 - share) * base

    return x.map(formula)


@method("sce", title="SCE", base="required", source="arXiv 2408.07990")
def sce(
    x: Inputs, *, select_topk: Annotated[float, Range(0, 1), "share of the coordinates that is selected"] = 1.0
) -> Final:
    """Select the coordinates of highest variance between task vectors, weigh models by energy, erase minority signs.

    `select_topk` is the share kept of the coordinates whose variance is not zero. A model's weight is the mean square of what
    is left of its task vector.
    """
    kernels, count = x.kernels, len(x.models)

    def variance(chunk: Chunk) -> Values:
        deltas = chunk.deltas()
        centred = deltas - deltas.mean(0)
        return (centred * centred).mean(0)

    trim = None
    if select_topk < 1:
        varied = int(x.total(lambda chunk: int((variance(chunk) != 0).sum())))
        ((cut,),) = x.cuts(lambda chunk: [variance(chunk)], [[int(varied * select_topk)]])
        trim = Trim(kernels, cut)

    def selected(chunk: Chunk) -> Values:
        if trim is None:
            return chunk.deltas()
        spread = variance(chunk)  # has made the deltas in place
        trim(spread, chunk.start)
        chunk.models *= spread > 0
        return chunk.models

    energy = x.total(lambda chunk: np.diag(kernels.gram(selected(chunk)))) / max(1, x.numel)
    total = float(np.sum(energy))
    weights = kernels.vector(energy / total if total >= 1e-6 else np.full(count, 1 / count))

    def run(chunk: Chunk) -> Values:
        deltas = selected(chunk)
        positive = deltas.sum(0) >= 0
        agrees = ((deltas > 0) & positive) | ((deltas < 0) & ~positive)
        shares = agrees * weights[:, None]
        merged = (deltas * shares).sum(0) / kernels.xp.clip(shares.sum(0), 1e-6, None)
        return merged + chunk.base

    return Final(run)


@method("arcee_fusion", title="Arcee Fusion", base="required", models=(1, 1), source="mergekit's `arcee_fusion`")
def arcee_fusion(x: Inputs) -> Final:
    """Takes over the other model's value where |difference| × row divergence reaches median + 1.5 × interquartile range.

    The row divergence is KL(softmax(θ₁) ‖ softmax(θ₀)) along the last dimension. Quantiles are exact, where mergekit samples
    a million values of a larger tensor.
    """
    _kernels, xp = x.kernels, x.kernels.xp

    def importance(chunk: Chunk) -> Values:
        rows, base = (xp.asarray(v, dtype=xp.float64).reshape(-1, x.columns) for v in (chunk.models[0], chunk.base))
        p, q = _softmax(xp, rows) + 1e-8, _softmax(xp, base) + 1e-8
        divergence = (p * xp.log(p / q)).sum(-1)[:, None]  # (rows, 1); near zero, where float32 is noise
        return xp.asarray((xp.abs(rows - base) * divergence).reshape(-1), dtype=xp.float32)

    # A divergence can be under zero by rounding, and magnitudes would fold it over: order by the value, shifted to be positive.
    lowest = min((float(importance(c).min()) for c in x.chunks(x.columns)), default=0.0)
    shift = max(0.0, -lowest)
    ranks = [x.numel - int(q * (x.numel - 1)) for q in (0.25, 0.5, 0.75)]
    ((*cuts,),) = x.cuts(lambda chunk: [importance(chunk) + shift], [ranks], x.columns)
    first, median, third = (_value(cut.threshold) for cut in cuts)
    threshold = median + 1.5 * (third - first)

    def run(chunk: Chunk) -> Values:
        chosen = importance(chunk) + shift >= threshold
        return chunk.base + chunk.deltas()[0] * chosen

    return Final(run, x.columns)


@method("ram", title="Reinforced Agent Merging", base="required", source="arXiv 2601.13572")
def ram(x: Inputs, *, epsilon: Epsilon = 1e-5) -> Final:
    """Adds, per coordinate, the mean of the task vectors' entries over `epsilon`: a lone one whole, shared ones averaged."""

    def formula(xp: Any, base: Values, models: Values) -> Values:
        moved, counts = _moved(models - base, epsilon)
        return base + moved.sum(0) / xp.clip(counts, 1, None)

    return x.map(formula)


@method("ramplus_tl", title="Reinforced Agent Merging Plus (tensor-local)", base="required", source="arXiv 2601.13572")
def ramplus_tl(
    x: Inputs,
    *,
    r: Annotated[float, "how strongly a lone entry is boosted", Search(0, 1)] = 0.1,
    alpha: Annotated[Positive, "entries shared / entries alone count up to this", Search(0.05, 2, log=True)] = 0.2,
    epsilon: Epsilon = 1e-5,
) -> Final:
    """As `ram`, a lone entry of model i times 1 + r·clip(sharedᵢ / uniqueᵢ, 0, alpha), counted in this tensor."""

    def overlaps(chunk: Chunk) -> np.ndarray:
        moved, counts = _moved(chunk.deltas(), epsilon)
        return np.asarray(
            [[int(((m != 0) & (counts > 1)).sum()), int(((m != 0) & (counts == 1)).sum())] for m in moved]
        )

    shared, unique = (x.total(overlaps) if x.numel else np.zeros((len(x.models), 2))).T
    boost = x.kernels.vector(1 + r * np.clip(shared / np.maximum(unique, 1), 0, alpha))

    def formula(xp: Any, base: Values, models: Values) -> Values:
        moved, counts = _moved(models - base, epsilon)
        lone = (moved * boost[:, None]).sum(0)
        return base + xp.where(counts == 1, lone, moved.sum(0) / xp.clip(counts, 1, None))

    return x.map(formula)


def _moved(deltas: Values, epsilon: float) -> tuple[Values, Values]:
    """Task vectors with the entries up to `epsilon` zeroed (k, n), and how many models moved each coordinate (n,)."""
    moves = abs(deltas) > epsilon
    return deltas * moves, moves.sum(0)


def _softmax(xp: Any, rows: Values) -> Values:
    powers = xp.exp(rows - xp.amax(rows, -1)[:, None])
    return powers / powers.sum(-1)[:, None]


def _value(bits: int) -> float:
    return float(np.array([bits], np.uint32).view(np.float32)[0])
