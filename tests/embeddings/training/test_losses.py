"""Losses against sentence-transformers' own, on the same embeddings."""

from __future__ import annotations

from typing import Any

import pytest

from embeddings.training import losses
from embeddings.training.losses import Targets

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")
try:
    from sentence_transformers.sentence_transformer import losses as theirs
except ImportError:  # before they were moved there
    from sentence_transformers import losses as theirs

cosine_similarity = torch.nn.functional.cosine_similarity

ROWS, NEGATIVES, DIMENSIONS = 7, 3, 24


def embeddings(columns: int) -> list[Any]:
    """Columns of embeddings, not normalised, with gradients."""
    random = torch.Generator().manual_seed(5)
    shared = torch.randn(ROWS, DIMENSIONS, generator=random)
    return [
        (3 * (shared + torch.randn(shared.shape, generator=random))).detach().requires_grad_() for _ in range(columns)
    ]


def in_batch(columns: int) -> Targets:
    """Candidate i of the first column answers query i; all others are negatives."""
    positive = torch.eye(ROWS, dtype=torch.bool).repeat(1, 1)
    positive = torch.cat([positive, torch.zeros(ROWS, ROWS * (columns - 1), dtype=torch.bool)], dim=1)
    return Targets(positive, torch.ones_like(positive))


def own(columns: int, scores: Any = None) -> Targets:
    """Each query only with the candidates of its row."""
    allowed = torch.eye(ROWS, dtype=torch.bool).repeat(1, columns)
    first = in_batch(columns).positive
    if scores is not None:
        full = torch.full(allowed.shape, torch.nan)
        for column in range(columns):
            full[range(ROWS), range(column * ROWS, (column + 1) * ROWS)] = scores[:, column]
        scores = full
    return Targets(first, allowed, scores)


def assert_same(mine: Any, other: Any, inputs: list[Any]) -> None:
    """The losses, and their gradients, to float32 rounding."""
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    for one, two in zip(torch.autograd.grad(mine, inputs), torch.autograd.grad(other, inputs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["infonce", "disj", "conj"])  # the same with one positive a query
@pytest.mark.parametrize("negatives", [0, NEGATIVES])
def test_one_positive_is_multiple_negatives_ranking(name: str, negatives: int) -> None:
    q, *c = embeddings(2 + negatives)
    mine = losses.build(name, {"temperature": 0.05})(q, torch.cat(c), in_batch(1 + negatives))
    other = theirs.MultipleNegativesRankingLoss(None, scale=20.0).compute_loss_from_embeddings([q, *c], None)
    assert_same(mine, other, [q, *c])


@pytest.mark.parametrize("name", ["infonce", "disj", "conj"])
def test_symmetric_is_theirs_with_both_directions(name: str) -> None:
    q, *c = embeddings(2 + NEGATIVES)
    mine = losses.build(name, {"temperature": 0.05, "symmetric": True})(q, torch.cat(c), in_batch(1 + NEGATIVES))
    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    other = theirs.MultipleNegativesRankingLoss(None, scale=20.0, **both).compute_loss_from_embeddings([q, *c], None)
    assert_same(mine, other, [q, *c])


def test_own_negatives_only_is_a_softmax_over_the_row() -> None:
    q, *c = embeddings(2 + NEGATIVES)
    mine = losses.build("infonce", {"temperature": 0.05})(q, torch.cat(c), own(1 + NEGATIVES))
    logits = torch.stack([cosine_similarity(q, column) for column in c], dim=1) / 0.05
    other = torch.nn.functional.cross_entropy(logits, torch.zeros(ROWS, dtype=torch.long))
    assert_same(mine, other, [q, *c])


@pytest.mark.parametrize(("name", "peer"), [("cosent", "CoSENTLoss"), ("angle", "AnglELoss")])
@pytest.mark.parametrize("scale", [20.0, 5.0])
def test_graded_pairs_are_theirs(name: str, peer: str, scale: float) -> None:
    q, c = embeddings(2)
    scores = torch.tensor([0.0, 0.2, 0.2, 0.5, 0.9, 1.0, 1.0])
    targets = Targets(torch.eye(ROWS).bool(), torch.eye(ROWS).bool(), scores)
    mine = losses.build(name, {"scale": scale})(q, c, targets)
    other = getattr(theirs, peer)(None, scale=scale).compute_loss_from_embeddings([q, c], scores)
    assert_same(mine, other, [q, c])


def test_contrastive_is_theirs() -> None:
    q, c = embeddings(2)
    scores = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    targets = Targets(torch.eye(ROWS).bool(), torch.eye(ROWS).bool(), scores)
    mine = losses.build("contrastive", {"margin": 0.8})(q, c, targets)
    other = theirs.ContrastiveLoss(None, margin=0.8).compute_loss_from_embeddings([q, c], scores)
    assert_same(mine, other, [q, c])


def test_distillation_is_theirs_on_cosines() -> None:
    q, *c = embeddings(2 + NEGATIVES)
    scores = 3 * torch.randn(ROWS, 1 + NEGATIVES, generator=torch.Generator().manual_seed(1))
    mine = losses.build("distill_kl", {"temperature": 0.3, "teacher_temperature": 2.0, "rescale": True})(
        q, torch.cat(c), own(1 + NEGATIVES, scores)
    )
    peer = theirs.DistillKLDivLoss(
        None, similarity_fct=cosine_similarity, student_temperature=0.3, teacher_temperature=2.0
    )
    assert_same(mine, peer.compute_loss_from_embeddings([q, *c], scores), [q, *c])


@pytest.mark.parametrize("negatives", [1, NEGATIVES])
def test_margin_mse_is_theirs_on_cosines(negatives: int) -> None:
    q, *c = embeddings(2 + negatives)
    scores = torch.rand(ROWS, 1 + negatives, generator=torch.Generator().manual_seed(1))
    mine = losses.build("margin_mse")(q, torch.cat(c), own(1 + negatives, scores))
    peer = theirs.MarginMSELoss(None, similarity_fct=cosine_similarity)
    assert_same(mine, peer.compute_loss_from_embeddings([q, *c], scores), [q, *c])


def test_false_negatives_are_those_of_their_guided_loss() -> None:
    """GISTEmbed keeps out what a guide finds nearer than the positive less the margin; here the model is its own guide."""
    q, c = embeddings(2)
    targets = in_batch(1)
    mine = losses.build("infonce", {"temperature": 0.05, "false_negative_margin": 0.6})(q, c, targets)
    cosines = torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(c, dim=1).T
    guided = cosines.detach() > cosines.detach().diagonal()[:, None] - 0.6
    out = guided & ~targets.positive
    assert 0 < out.sum() < out.numel() - ROWS
    other = torch.nn.functional.cross_entropy(cosines.masked_fill(out, -torch.inf) / 0.05, torch.arange(ROWS))
    assert_same(mine, other, [q, c])


def test_matryoshka_is_theirs(minilm: Any) -> None:
    """On the real model, from its texts: their loss changes the model's forward, so it wants one."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm), device="cpu").eval()
    texts = [
        ["a cat sat", "two planes", "green tea", "tax law"],
        ["the cat", "aircraft in the sky", "a hot drink", "courts"],
    ]
    features = [
        model.preprocess(column) if hasattr(model, "preprocess") else model.tokenize(column) for column in texts
    ]
    inner = theirs.MultipleNegativesRankingLoss(model, scale=20.0)
    other = theirs.MatryoshkaLoss(model, inner, [384, 128, 32], [1, 0.5, 0.25])(features, None)
    q, c = (model(dict(feature))["sentence_embedding"] for feature in features)
    positive = torch.eye(4, dtype=torch.bool)
    settings = {"temperature": 0.05, "matryoshka": [384, 128, 32], "matryoshka_weights": [1, 0.5, 0.25]}
    mine = losses.build("infonce", settings)(q, c, Targets(positive, torch.ones_like(positive)))
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_several_positives_differ_as_the_paper_says() -> None:
    """disj is content with the nearest positive; conj wants every one; infonce takes each alone."""
    logits = torch.tensor([3.0, 1.0, 0.5, -1.0])  # two positives, two negatives
    q = torch.tensor([[1.0, 0.0]])
    cosines = logits / 5
    c = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    targets = Targets(torch.tensor([[True, True, False, False]]), torch.ones(1, 4, dtype=torch.bool))
    value = {
        name: losses.build(name, {"temperature": 0.2})(q, c, targets).item() for name in ("disj", "conj", "infonce")
    }
    e = logits.exp()
    assert value["disj"] == pytest.approx(-((e[0] + e[1]) / e.sum()).log().item(), rel=1e-5)
    assert value["conj"] == pytest.approx(-((e[0] / e.sum()).log() + (e[1] / e.sum()).log()).item(), rel=1e-5)
    alone = [(e[i] / (e[i] + e[2] + e[3])).log().item() for i in (0, 1)]
    assert value["infonce"] == pytest.approx(-sum(alone) / 2, rel=1e-5)
