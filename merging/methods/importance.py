"""Means weighted by importance: coordinate by coordinate by the Fisher diagonal, layer by layer by the inputs' Gram matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from merging.inputs import Chunk, Final, Inputs, Values
from merging.methods.averages import shares
from merging.methods.registry import PerModel, Range, method

Weights = Annotated[PerModel[Annotated[float, Range(low=0)]], "factor of the model's importance"]

_BLOCK = 1024  # rows of a Gram matrix that are widened to float64 at once
_ROWS = 256  # rows of a weight that are solved for at once: enough to pay for the widening
_ILL = 1e8  # condition from which on the user is told


def _fisher_survey(x: Inputs, totals: Sequence[NDArray[np.float64]], *, floor: float, **_: Any) -> Any:
    """Of each model Σ F² and how many F lie under the floor, and how many there are: (3, k)."""
    if totals or not all(x.known):
        return None
    found = np.zeros((3, len(x.models)))
    for chunk in x.chunks(statistics=True, weights=False):
        for i, row in enumerate(chunk.statistics):
            found[0, i] += x.kernels.gram(row[None])[0, 0]
            found[1, i] += int((row < floor).sum())
    found[2] = x.numel
    return found


@method("fisher", title="Fisher", source="arXiv 2111.09832", survey=_fisher_survey, statistics=("fisher",))
def fisher(
    x: Inputs,
    *,
    weight: Weights = 1.0,  # type: ignore[assignment]
    normalize: Annotated[bool, "divide each model's weight by the norm of its Fisher"] = True,
    floor: Annotated[float, Range(low=0), "a smaller Fisher counts as this"] = 1e-6,
    floor_is: Annotated[
        Literal["relative", "absolute"], "a share of the model's root mean square Fisher, or F as it is"
    ] = "relative",
) -> Final:
    """Σ wᵢFᵢθᵢ / Σ wᵢFᵢ, Fᵢ the diagonal of the Fisher information of model i (`cuvee stats --kind fisher`).

    With `normalize` wᵢ is divided by ‖Fᵢ‖₂ over the whole model, as in the authors' code, so that no model's Fisher drowns the
    others'. `floor_is: absolute` is their floor, under F as it is; divided by norms that differ, it gives what no text has
    touched (most rows of an embedding) to the model with the smallest norm. `relative` (ours) is the same share of every
    model's root mean square: the scale of F changes nothing then, and what nobody cares about is averaged. Where all F are
    0, and in tensors of which a model has no Fisher, the plain mean weighted by wᵢ. Equal F for all gives `linear`.
    """
    mean = shares(weight)
    if not all(x.known):
        if any(x.known):
            x.note("averaged, because only some of the models have its Fisher")
        return x.combine(mean)
    squares, under, count = x.surveys[0]
    if floor_is == "absolute" and (under > 0.999 * count).any():
        x.note(f"nearly all of a model's Fisher lies under the floor of {floor:g}: set a smaller 'floor'", True)
    told = squares > 0  # of the others nothing is known, not even a scale: they get the mean one
    squares = np.where(told, squares, squares[told].mean() if told.any() else count)
    norms = np.sqrt(squares)
    units = np.sqrt(squares / count) if floor_is == "relative" else np.ones(len(mean))
    factors = np.asarray(weight) * units / (norms if normalize else 1.0)
    scaled = x.kernels.vector(factors / factors.max())  # only their ratios matter; these cannot overflow
    means, shrink = x.kernels.vector(mean), x.kernels.vector(1 / units)[:, None]

    def run(chunk: Chunk) -> Values:
        if floor_is == "relative":
            chunk.statistics *= shrink
        x.kernels.weigh(chunk.models, chunk.statistics, scaled, means, floor, chunk.out)
        return chunk.out

    return Final(run, statistics=True)


@method(
    "df_merge",
    title="DF-Merge",
    base="required",
    source="arXiv 2504.18992",
    statistics=("fisher",),
    statistics_at=("weight", "fisher", "scaled"),
    statistics_examples=30,
)
def df_merge(
    x: Inputs,
    *,
    weight: Annotated[PerModel[Annotated[float, Range(0, 1)]], "factor λ of the task vector"],
    fisher: Annotated[Literal["scaled", "frozen"], "of θ₀ + λᵢτᵢ, or of the models themselves"] = "scaled",
    floor: Annotated[float, Range(low=0), "added to every Fisher"] = 1e-12,
) -> Final:
    """θ₀ + M · Σ Fᵢλᵢτᵢ / Σ Fᵢ, Fᵢ the diagonal of the Fisher information of θ₀ + λᵢτᵢ (`cuvee stats --base --scale`).

    Each model is first scaled back towards the base, and its Fisher is that of the scaled model; neither the λ nor the F are
    normalised, as in the authors' code. M is the number of models: with equal F the result is `task_arithmetic`, and with
    λ = 1/M the mean. With λ = 1/M and `fisher: frozen`, F of the models as they are, it is Fisher merging. Where all F are 0,
    and in tensors of which a model has no Fisher, F counts as equal.
    """
    if not all(x.known):
        if any(x.known):
            x.note("merged with equal Fisher, because only some of the models have its Fisher")
        return x.add_deltas(weight)
    weights = x.kernels.vector(weight)

    def run(chunk: Chunk) -> Values:
        x.kernels.weigh_deltas(chunk.base, chunk.deltas(), chunk.statistics, weights, floor, chunk.out)
        return chunk.out

    return Final(run, statistics=True)


@method("regmean", title="RegMean", source="arXiv 2212.09849", statistics=("gram",))
def regmean(
    x: Inputs,
    *,
    weight: Weights = 1.0,  # type: ignore[assignment]
    alpha: Annotated[float, Range(0, 1), "factor of the Gram matrices' off-diagonal entries"] = 0.9,
    damping: Annotated[float, Range(low=0), "share of the mean diagonal that is added to the diagonal"] = 1e-6,
) -> Final:
    """Linear layers: W = (Σ wᵢWᵢGᵢ)(Σ wᵢGᵢ)⁻¹, Gᵢ the Gram matrix of the layer's inputs in model i; all else averaged.

    The W that is nearest to all models in what their layers put out on their own inputs. Weights are (outputs, inputs) here,
    the transpose of the paper's; GPT-2's (inputs, outputs) are seen. Gᵢ is the mean over the input rows that
    `cuvee stats --kind gram` has read, where the paper sums: a model counts by wᵢ, not by how many texts it was shown.

    `alpha` shrinks the off-diagonal entries (0.9 in the authors' code, 0.1 for some encoders); 0 weighs each input by itself,
    1 is plain least squares. `damping` pulls towards the average what the inputs leave open. Solved by Cholesky in float64;
    where Σ wᵢGᵢ is not positive definite the damping grows tenfold until it is.
    """
    mean = shares(weight)
    if not all(x.known) or not x.numel:
        if any(x.known):
            x.note("averaged, because only some of the models have its Gram matrix")
        return x.combine(mean)
    grams = [statistic.gram()[0] for statistic in x.statistics if statistic]
    axis = x.statistics[0].gram()[1] if x.statistics[0] else 1
    system = _solvable(x, grams, mean, alpha, damping)
    if system is None:
        return x.combine(mean)
    factor, pull = system
    inputs, rows = x.shape[axis], _ROWS if x.kernels.on_host else 16 * _ROWS

    def run(chunk: Chunk) -> Values:
        # (k, outputs, inputs)
        weights = chunk.models.reshape(len(mean), -1, x.shape[1])
        weights = weights.swapaxes(1, 2) if axis == 0 else weights
        first = x.kernels.wide(weights[0])
        right = x.kernels.xp.zeros_like(first)
        for own, gram, share in zip(weights[1:], grams[1:], mean[1:], strict=True):
            apart = (x.kernels.wide(own) - first) * share
            diagonal = x.kernels.wide(np.diagonal(gram))
            right += apart * (diagonal * (1 - alpha) + pull)
            for start in range(0, inputs, _BLOCK):
                block = slice(start, start + _BLOCK)
                right += (apart[:, block] * alpha) @ x.kernels.wide(gram[block])
        merged = first + x.kernels.solve(factor, right)
        return (merged.T if axis == 0 else merged).reshape(-1)

    return Final(run, x.numel if axis == 0 else inputs * min(rows, x.shape[0]))


def _solvable(
    x: Inputs, grams: Sequence[NDArray[np.float32]], mean: Sequence[float], alpha: float, damping: float
) -> tuple[Any, float] | None:
    """The factor of Σ wᵢĜᵢ with its damping, and that damping; None where no model has seen any input but 0."""
    total = x.kernels.wide(np.zeros(grams[0].shape))
    for gram, share in zip(grams, mean, strict=True):
        for start in range(0, len(gram), _BLOCK):
            block = slice(start, start + _BLOCK)
            total[block] += x.kernels.wide(gram[block]) * share
    diagonal = x.kernels.xp.diagonal(total) + 0.0  # a copy
    scale = float(diagonal.mean())
    if scale <= 0:
        return None
    total *= alpha
    pull = damping * scale
    places = np.arange(len(grams[0]))
    while True:
        matrix = total + 0.0
        matrix[places, places] = diagonal + pull
        found = x.kernels.cholesky(matrix)
        if found is not None:
            break
        pull = max(10 * pull, 1e-12 * scale)
    if pull > damping * scale:
        x.note("solved with more damping, because the Gram matrices are not positive definite")
    elif found[1] > _ILL:
        x.note(f"ill-conditioned (over {_ILL:.0e}): 'damping' decides what the inputs leave open")
    return found[0], pull
