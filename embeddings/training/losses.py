"""Losses: pure functions of a batch's embeddings and of what is known about its pairs.

Embeddings need not be normalised: similarity is the cosine. Which candidate is a negative of which query is not decided
here, but in `Targets.allowed`. Every loss takes `matryoshka`, those with positives `false_negative_margin` besides. Where
sentence-transformers has a loss, this is the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from embeddings.training.loss_registry import (
    IN_BATCH_TYPES,
    LOSSES,
    Loss,
    LossEntry,
    Targets,
    check,
    combined,
    default_of,
    get,
    known,
    loss,
    refuse_unfit,
)
from merging.errors import CuveeError
from merging.methods.registry import Range

if TYPE_CHECKING:
    import torch

__all__ = [
    "IN_BATCH_TYPES", "LOSSES", "Loss", "LossEntry", "Targets", "build", "check", "combined", "cosines", "default_of", "get",
    "known", "loss", "refuse_unfit", "without_false_negatives",
]  # fmt: skip


def build(name: str, parameters: Mapping[str, Any] | None = None, where: str = "") -> Loss:
    """A loss with its parameters set.

    Args:
        parameters: by name, plain values or nodes; what is absent has its default.
        where: what an error is told to be in, for values that do not know.

    Raises:
        CuveeError: no such loss or parameter, a value of the wrong type or out of range.
    """
    values = check(name, parameters, where)
    entry = get(name, where)
    dimensions, weights = values.pop("matryoshka"), values.pop("matryoshka_weights")
    margin, mode = values.pop("false_negative_margin", None), values.pop("false_negative_mode", "absolute")

    def run(queries: torch.Tensor, candidates: torch.Tensor, targets: Targets) -> torch.Tensor:
        import torch

        with torch.autocast(queries.device.type, enabled=False):  # a softmax at 1/0.02 wants all the digits
            queries, candidates = _at_least_float32(queries), _at_least_float32(candidates)
            if margin is not None:
                targets = without_false_negatives(queries, candidates, targets, margin, relative=mode == "relative")
            if not dimensions:
                return torch.as_tensor(entry.function(queries, candidates, targets, **values))
            if max(dimensions) > queries.shape[1]:
                what = f"'matryoshka' has {max(dimensions)} dimensions, the embeddings {queries.shape[1]}"
                raise CuveeError(what, where=where)
            parts = [
                weight * entry.function(queries[:, :width], candidates[:, :width], targets, **values)
                for width, weight in zip(dimensions, weights or [1.0] * len(dimensions), strict=True)
            ]
            return torch.stack(parts).sum()

    return run


# ---- what the losses have in common ----


def cosines(queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """(queries, candidates) cosines."""
    from torch.nn.functional import normalize

    return normalize(queries, dim=1) @ normalize(candidates, dim=1).T


def without_false_negatives(
    queries: torch.Tensor, candidates: torch.Tensor, targets: Targets, margin: float, *, relative: bool = False
) -> Targets:
    """The targets without negatives so similar to the query that they are likely to be answers themselves.

    A negative goes if its cosine exceeds p − margin (`relative`: p − margin·|p|) with p the lowest of the query's
    positives. Judged once, on all dimensions, without a gradient.
    Source: arXiv 2407.15831 (NV-Retriever); sentence-transformers' GISTEmbedLoss and mine_hard_negatives.
    """
    import torch

    with torch.no_grad():
        similarity = cosines(queries, candidates)
        lowest = similarity.masked_fill(~targets.positive, torch.inf).amin(1, keepdim=True)
        limit = lowest - margin * (lowest.abs() if relative else 1.0)
        return replace(targets, allowed=targets.allowed & (targets.positive | (similarity <= limit)))


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.element_size() < 4 else tensor


def _log_sum(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(rows,) logsumexp over the masked columns; −∞ where there are none."""
    return logits.masked_fill(~mask, float("-inf")).logsumexp(1)


def _softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + eˣ) to the last digit: torch's own is linear from 20 on."""
    from torch.nn.functional import softplus

    return softplus(x, threshold=40.0)


#: (rows, columns) logits, positives, allowed → (rows,) losses
_Rowwise = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def _contrast(
    each: _Rowwise,
    queries: torch.Tensor,
    candidates: torch.Tensor,
    targets: Targets,
    temperature: float,
    symmetric: bool,
) -> torch.Tensor:
    """The mean over the queries; if `symmetric`, averaged with the mean over the positives, which seek their queries."""
    logits = cosines(queries, candidates) / temperature
    forward = each(logits, targets.positive, targets.allowed).mean()
    if not symmetric:
        return forward
    sought = targets.positive.any(0)
    return (forward + each(*(x.T[sought] for x in (logits, targets.positive, targets.allowed))).mean()) / 2


# ---- positives against negatives ----

_Temperature = Annotated[float, Range(1e-4, 100), "cosines are divided by it"]
_Symmetric = Annotated[bool, "the mean of both directions: the positives look for their queries too"]


@loss(
    "infonce",
    title="InfoNCE",
    needs="positives",
    default_of=("Retrieval", "BitextMining", "Classification", "Clustering"),
    source="arXiv 1807.03748",
)
def infonce(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    targets: Targets,
    *,
    temperature: _Temperature = 0.02,
    symmetric: _Symmetric = False,
) -> torch.Tensor:
    """−log of the positive's share among itself and the negatives; of several positives each one alone, averaged.

    sentence-transformers' MultipleNegativesRankingLoss with scale 1/temperature where each query has one positive.
    """

    def each(logits: torch.Tensor, positive: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        negatives = _log_sum(logits, allowed & ~positive)[:, None]
        alone = _softplus(negatives - logits).masked_fill(~positive, 0)  # (queries, candidates)
        return alone.sum(1) / positive.sum(1)

    return _contrast(each, queries, candidates, targets, temperature, symmetric)


@loss(
    "disj",
    title="Disj-InfoNCE",
    needs="positives",
    default_of=("Reranking",),
    source="arXiv 2504.05220",
)
def disj(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    targets: Targets,
    *,
    temperature: _Temperature = 0.02,
    symmetric: _Symmetric = False,
) -> torch.Tensor:
    """−log Σ P(d⁺) = logsumexp(all) − logsumexp(positives): any positive will do.

    Computed as log(1 + e^(logsumexp(negatives) − logsumexp(positives))), which is the same without the cancellation.
    """

    def each(logits: torch.Tensor, positive: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        return _softplus(_log_sum(logits, allowed & ~positive) - _log_sum(logits, positive))

    return _contrast(each, queries, candidates, targets, temperature, symmetric)


@loss("conj", title="Conj-InfoNCE", needs="positives", source="arXiv 2504.05220")
def conj(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    targets: Targets,
    *,
    temperature: _Temperature = 0.02,
    symmetric: _Symmetric = False,
) -> torch.Tensor:
    """−Σ log P(d⁺), the softmax over all positives and negatives: every positive must have its share."""

    def each(logits: torch.Tensor, positive: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        return (_log_sum(logits, allowed | positive)[:, None] - logits).masked_fill(~positive, 0).sum(1)

    return _contrast(each, queries, candidates, targets, temperature, symmetric)


# ---- graded pairs ----

_Scale = Annotated[float, Range(1e-3, 1e4), "cosines are multiplied by it"]


@loss(
    "cosent", title="CoSENT", needs="scores", default_of=("STS", "PairClassification"), source="kexue.fm/archives/8847"
)
def cosent(queries: torch.Tensor, candidates: torch.Tensor, targets: Targets, *, scale: _Scale = 20.0) -> torch.Tensor:
    """log(1 + Σ e^(s_j − s_i)) over the pairs i with a higher score than j: sentence-transformers' CoSENTLoss."""
    return _graded("CoSENTLoss", scale, queries, candidates, targets)


@loss("angle", title="AnglE", needs="scores", source="arXiv 2309.12871")
def angle(queries: torch.Tensor, candidates: torch.Tensor, targets: Targets, *, scale: _Scale = 20.0) -> torch.Tensor:
    """CoSENT of the angle in complex space instead of the cosine: sentence-transformers' AnglELoss."""
    return _graded("AnglELoss", scale, queries, candidates, targets)


@loss("contrastive", title="Contrastive", needs="scores", source="Hadsell, Chopra and LeCun, CVPR 2006")
def contrastive(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    targets: Targets,
    *,
    margin: Annotated[float, Range(0, 2), "distance from which on a pair of score 0 costs nothing"] = 0.5,
) -> torch.Tensor:
    """½·(y·d² + (1 − y)·max(0, margin − d)²), d = 1 − cosine, y the score, 0 or 1: sentence-transformers' ContrastiveLoss."""
    from torch.nn.functional import cosine_similarity

    scores = _scores(targets, 1).to(queries.dtype)
    distances = 1 - cosine_similarity(queries, candidates[: len(queries)])
    return (scores * distances**2 + (1 - scores) * (margin - distances).relu() ** 2).mean() / 2


def _graded(name: str, scale: float, queries: torch.Tensor, candidates: torch.Tensor, targets: Targets) -> Any:
    """A loss of sentence-transformers."""
    try:
        from sentence_transformers.sentence_transformer import losses
    except ImportError:  # before they were moved there
        from sentence_transformers import losses
    # Of the model, their first argument, they want no more than its embeddings.
    theirs = getattr(losses, name)(None, scale=scale)
    return theirs.compute_loss_from_embeddings([queries, candidates[: len(queries)]], _scores(targets, 1))


def _scores(targets: Targets, dimensions: int) -> torch.Tensor:
    assert targets.scores is not None and targets.scores.ndim == dimensions, "needs scores of another form"
    return targets.scores


# ---- a teacher's scores ----


@loss("distill_kl", title="Distillation by KL divergence", needs="teacher", source="arXiv 2010.11386")
def distill_kl(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    targets: Targets,
    *,
    temperature: _Temperature = 0.02,
    teacher_temperature: Annotated[float, Range(1e-4, 1e4), "the teacher's scores are divided by it"] = 1.0,
    rescale: Annotated[bool, "times temperature², which undoes a temperature that softens both sides"] = False,
) -> torch.Tensor:
    """KL(teacher ‖ student) of their softmax over the candidates that the teacher scored, averaged over the queries.

    With `rescale` this is sentence-transformers' DistillKLDivLoss on cosines; ours also takes rows of different length.
    A query with fewer than two scores teaches nothing and is not counted.
    """
    scored = ~_scores(targets, 2).isnan()
    rows = scored.sum(1) > 1
    scored = scored[rows]
    student = (cosines(queries[rows], candidates) / temperature).masked_fill(~scored, -1e30).log_softmax(1)
    teacher = (_scores(targets, 2)[rows].to(student.dtype) / teacher_temperature).masked_fill(~scored, -1e30)
    gaps = (teacher.softmax(1) * (teacher.log_softmax(1) - student)).masked_fill(~scored, 0)  # (rows, candidates)
    return gaps.sum() / max(len(scored), 1) * (temperature**2 if rescale else 1.0)


@loss("margin_mse", title="MarginMSE", needs="teacher", source="arXiv 2010.02666")
def margin_mse(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    targets: Targets,
    *,
    scale: Annotated[float, Range(1e-3, 1e4), "cosines are multiplied by it, to reach the teacher's scale"] = 1.0,
) -> torch.Tensor:
    """Mean of (margin − teacher's margin)² over each positive and each other candidate of its query, both scored.

    sentence-transformers' MarginMSELoss on scaled cosines; ours also takes rows of different length.
    """
    teacher = _scores(targets, 2)
    scored = ~teacher.isnan()
    off = scale * cosines(queries, candidates) - teacher.to(queries.dtype).masked_fill(~scored, 0)
    query, positive = (targets.positive & scored).nonzero(as_tuple=True)  # (pairs,)
    other = (scored & ~targets.positive)[query]  # (pairs, candidates)
    gaps = (off[query, positive][:, None] - off[query]).masked_fill(~other, 0)
    return gaps.square().sum() / other.sum().clamp(min=1)
