"""Attention patterns against an oracle, entry by entry."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from embeddings.reconstruction import masks
from tests.oracles import attention_patterns as oracle

PATTERNS = (("causal", True), ("bidirectional", True), ("collaborative", True), ("collaborative", False))
EVERY = (*PATTERNS, ("attention_stop", True))


def rows(draw: np.random.Generator, count: int, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Segments and documents, (rows, tokens) each, padded on a side of its own in each row."""
    width, found = 17, []
    for _ in range(count):
        segments: list[int] = []
        documents: list[int] = []
        for document in range(3 if packed else 1):
            own = [oracle.SOURCE] * draw.integers(0, 4) + [oracle.EOS] + [oracle.TARGET] * draw.integers(0, 4)
            segments += own[: width - len(segments)]
            documents += [document] * (len(segments) - len(documents))
        padding = width - len(segments)
        left = padding if draw.random() < 0.5 else 0
        right = padding - left
        found.append(
            (
                [oracle.PADDING] * left + segments + [oracle.PADDING] * right,
                [-1] * left + documents + [-1] * right,
            )
        )
    return tuple(torch.tensor([row[i] for row in found]) for i in (0, 1))  # type: ignore[return-value]


@pytest.mark.parametrize("packed", [False, True], ids=["a sequence a row", "packed"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("pattern", "eos_sees_b"), EVERY)
def test_allowed_equals_the_oracle(pattern: str, eos_sees_b: bool, window: int | None, packed: bool) -> None:
    segments, documents = rows(np.random.default_rng(5), 12, packed)
    found = masks.allowed(
        segments, pattern, documents=documents if packed else None, eos_sees_b=eos_sees_b, window=window
    )
    assert found.shape == (12, 1, 17, 17) and found.dtype == torch.bool
    for own, segment, document in zip(found, segments.tolist(), documents.tolist(), strict=True):
        wanted = oracle.may_look(segment, document, pattern, eos_sees_b=eos_sees_b, window=window)
        np.testing.assert_array_equal(own[0].numpy(), wanted)


@pytest.mark.parametrize(("pattern", "eos_sees_b"), EVERY)
def test_mask_mod_says_entry_by_entry_what_allowed_says(pattern: str, eos_sees_b: bool) -> None:
    segments, documents = rows(np.random.default_rng(6), 3, True)
    options = {"documents": documents, "eos_sees_b": eos_sees_b, "window": 3}
    mod = masks.mask_mod(segments, pattern, **options)  # type: ignore[arg-type]
    wanted = masks.allowed(segments, pattern, **options)  # type: ignore[arg-type]
    for row, q, k in itertools.product(range(3), range(17), range(17)):
        at = (torch.tensor(row), torch.tensor(0), torch.tensor(q), torch.tensor(k))
        assert bool(mod(*at)) == bool(wanted[row, 0, q, k])


def test_collaborative_is_the_papers_table() -> None:
    segments = torch.tensor([[1, 1, 2, 3, 3]])  # A A EOS B B
    published = [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    strict = [*published[:2], [1, 1, 1, 0, 0], *published[3:]]
    assert masks.allowed(segments, "collaborative")[0, 0].int().tolist() == published
    assert masks.allowed(segments, "collaborative", eos_sees_b=False)[0, 0].int().tolist() == strict


def test_attention_stop_is_the_papers_formula() -> None:
    segments = torch.tensor([[1, 1, 1, 2, 3, 3, 3]])
    q, k = torch.arange(7)[:, None], torch.arange(7)
    eos = 3
    assert torch.equal(masks.allowed(segments, "attention_stop")[0, 0], (k <= q) & ~((q > eos) & (k < eos)))


def test_a_padding_token_sees_itself_alone_and_no_one_sees_it() -> None:
    segments = torch.tensor([[0, 1, 2, 3, 0, 0]])
    for pattern in masks.PATTERNS:
        found = masks.allowed(segments, pattern)[0, 0]
        for place in (0, 4, 5):
            alone = torch.eye(6, dtype=torch.bool)[place]
            assert torch.equal(found[place], alone) and torch.equal(found[:, place], alone)


@pytest.mark.parametrize("packed", [False, True], ids=["a sequence a row", "packed"])
def test_positions_equal_the_oracle(packed: bool) -> None:
    segments, documents = rows(np.random.default_rng(7), 12, packed)
    found = masks.positions(segments, documents if packed else None)
    wanted = [oracle.positions(*both) for both in zip(segments.tolist(), documents.tolist(), strict=True)]
    assert found.tolist() == wanted


def test_for_model_is_bool_for_sdpa_and_added_for_eager() -> None:
    allowed = masks.allowed(torch.tensor([[1, 2, 3]]), "causal")
    assert masks.for_model(allowed, "sdpa", torch.float32) is allowed
    added = masks.for_model(allowed, "eager", torch.bfloat16)
    assert added.dtype == torch.bfloat16
    assert torch.equal(added == 0, allowed) and bool((added[~allowed] == torch.finfo(torch.bfloat16).min).all())
