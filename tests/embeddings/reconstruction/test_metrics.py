"""What a pre-training comes to, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from embeddings.reconstruction.metrics import Reconstruction, alignment, effective_rank, uniformity


def test_orthogonal_embeddings_have_the_rank_of_their_number() -> None:
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(5 * torch.eye(7)[:3]) == pytest.approx(3)


def test_embeddings_that_point_one_way_have_rank_one_and_centred_none() -> None:
    one = torch.tensor([[0.3, -0.1, 0.9]]).repeat(5, 1)
    assert effective_rank(one) == pytest.approx(1)
    assert effective_rank(one, centred=True) == 0
    assert effective_rank(torch.zeros(3, 4)) == 0


def test_the_rank_of_known_singular_values() -> None:
    singular = np.array([3.0, 2.0, 1.0])
    shares = singular / singular.sum()
    expected = math.exp(-(shares * np.log(shares)).sum())
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    matrix = rotation[:, :3] @ torch.diag(torch.tensor(singular, dtype=torch.float32)) @ rotation[:3]
    assert effective_rank(matrix) > 1
    assert effective_rank(torch.diag(torch.tensor(singular))) == pytest.approx(expected)


def test_centred_is_without_the_mean() -> None:
    spread = torch.randn(20, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spread = spread - spread.mean(0)
    assert effective_rank(spread + 100, centred=True) == pytest.approx(effective_rank(spread), abs=1e-6)
    assert effective_rank(spread + 100) < 1.5


def test_alignment_is_the_squared_distance() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert alignment(x, x) == 0
    assert alignment(x, -x) == 4
    assert alignment(x, x.flip(0)) == pytest.approx(2)


def test_uniformity_is_highest_where_all_are_one() -> None:
    assert uniformity(torch.ones(4, 1)) == 0
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(x) == pytest.approx(-8)  # one pair, at distance 2
    three = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert uniformity(three) == pytest.approx(math.log((math.exp(-8) + 2 * math.exp(-4)) / 3))


def test_reconstruction_counts_tokens_and_whole_sequences() -> None:
    vocabulary, sure = 4, 50.0
    labels = torch.tensor([0, 1, 2, 3, 1])
    told = torch.tensor([0, 1, 2, 0, 1])
    logits = sure * torch.nn.functional.one_hot(told, vocabulary).float()
    found = Reconstruction()
    found.add(logits[:3], labels[:3], torch.tensor([0, 0, 4]))
    found.add(logits[3:], labels[3:], torch.tensor([1, 1]))
    numbers = found.numbers()
    assert numbers["accuracy"] == pytest.approx(4 / 5)
    assert numbers["exact"] == pytest.approx(2 / 3)
    assert numbers["loss"] == pytest.approx(sure / 5, abs=1e-4)
    assert numbers["entropy"] == pytest.approx(0, abs=1e-6)


def test_a_model_that_knows_nothing_has_the_entropy_of_its_vocabulary() -> None:
    found = Reconstruction()
    found.add(torch.zeros(6, 32), torch.arange(6), torch.arange(6))
    numbers = found.numbers()
    assert numbers["loss"] == pytest.approx(math.log(32)) == numbers["entropy"]
    assert Reconstruction().numbers() == {}
