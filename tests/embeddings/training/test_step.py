"""A step's loss and gradient: by chunks, with a gradient cache and for several tasks the same as the plain path."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embeddings.training import step
from embeddings.training.backbone import Backbone
from embeddings.training.batch import Batch, Objective, build_batch, objectives
from embeddings.training.config import load
from embeddings.training.schedule import Part
from embeddings.training.surgery import modular_gradient_surgery
from tests.embeddings.runs import config_of, opened, sets_of, triplets, write_config

ALL = """\
  - {file: word.jsonl}
  - {file: intent.jsonl, type: Classification, negatives: 2}
  - {file: pairs.jsonl, type: STS}
  - {file: taught.jsonl}
"""


@dataclass(frozen=True)
class Setup:
    backbone: Backbone
    batch: Batch
    objectives: list[Objective]
    rows: dict[int, Batch]  # each data set's part alone


@pytest.fixture(scope="module")
def setup(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("step")
    config = config_of(folder, minilm, "loss: {matryoshka: [384, 64]}\n", ALL)
    sets = sets_of(config, folder / "cache")
    found = objectives(config, sets)
    parts = tuple(Part(i, np.arange(6 + i)) for i in range(4))
    alone = {i: build_batch((parts[i],), sets, found) for i in range(4)}
    return Setup(opened(config), build_batch(parts, sets, found), found, alone)


def gradient(backbone: Backbone) -> torch.Tensor:
    """Of all parameters, one after another; and none is left."""
    found = [parameter.grad.flatten() for parameter in backbone.parameters() if parameter.grad is not None]
    assert len(found) == len(list(backbone.parameters()))
    for parameter in backbone.parameters():
        parameter.grad = None
    return torch.cat(found)


def plainly(setup: Setup, batch: Batch, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """All texts in one forward pass of the whole model, in their order, padded to the longest."""
    model = copy.deepcopy(setup.backbone.transformer).to(dtype).eval()
    width = max(map(len, batch.tokens))
    ids = torch.zeros(len(batch.tokens), width, dtype=torch.int64)
    for place, tokens in enumerate(batch.tokens):
        ids[place, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
    vectors = model({"input_ids": ids, "attention_mask": (ids != 0).long()})["sentence_embedding"]
    total = torch.zeros((), dtype=dtype)
    for part in batch.parts:
        loss = setup.objectives[part.dataset].loss(vectors[part.queries], vectors[part.candidates], part.targets("cpu"))
        total = total + loss * part.rows / sum(each.rows for each in batch.parts)
    total.backward()
    names = [name for name, _ in setup.backbone.named_parameters()]
    by_name = dict(model.named_parameters())
    return float(total.detach()), torch.cat([by_name[name].grad.flatten() for name in names]).double()


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of the norm."""
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("budget", [step.CPU_CHUNK, 40])
@pytest.mark.parametrize("cache", [False, True])
def test_gradients_are_the_plain_paths_to_float32_rounding(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, budget: int, cache: bool
) -> None:
    monkeypatch.setattr(step, "CPU_CHUNK", budget)
    exact_loss, exact = plainly(setup, setup.batch, torch.float64)
    _, plain = plainly(setup, setup.batch, torch.float32)
    setup.backbone.transformer.eval()
    loss, parts = step.loss_and_gradient(
        setup.backbone, setup.batch, setup.objectives, seed=3, cache_tokens=budget if cache else 0
    )
    ours = gradient(setup.backbone)
    assert float(loss) == pytest.approx(exact_loss, rel=1e-5)
    assert len(parts) == 4 and loss.requires_grad is False
    assert off(ours, exact) < max(3 * off(plain, exact), 1e-6)
    assert off(ours, exact) < 1e-4


def test_with_a_gradient_cache_the_same_is_dropped(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "CPU_CHUNK", 64)
    setup.backbone.transformer.train()
    found = []
    for seed, cache in ((7, 0), (7, 64), (8, 64), (7, 0)):
        loss, _ = step.loss_and_gradient(setup.backbone, setup.batch, setup.objectives, seed=seed, cache_tokens=cache)
        found.append((float(loss), gradient(setup.backbone)))
    setup.backbone.transformer.eval()
    (loss, plain), (cached_loss, cached), (other_loss, other), (again_loss, again) = found
    assert cached_loss == pytest.approx(loss, rel=1e-6) and off(cached, plain) < 1e-5
    assert other_loss != pytest.approx(loss, rel=1e-3) and off(other, plain) > 0.1
    assert again_loss == loss and torch.equal(again, plain)


def test_the_global_generator_is_left_alone(setup: Setup) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    step.loss_and_gradient(setup.backbone, setup.rows[0], setup.objectives, seed=3)
    gradient(setup.backbone)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("negatives", [0, 2])
def test_infonce_is_multiple_negatives_ranking_loss(minilm: Path, tmp_path: Path, negatives: int) -> None:
    """Through SentenceTransformer itself: tokenizer, padding, model, loss and gradient."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    config_file = write_config(tmp_path, minilm, data=f"  - {{file: triplets.jsonl, negatives: {negatives}}}\n")
    rows = triplets(16, 100)
    config = load(config_file)
    sets = sets_of(config, tmp_path / "cache")
    found = objectives(config, sets)
    backbone = opened(config)
    batch = build_batch((Part(0, np.arange(0, 16, 4)),), sets, found)  # no row's word is another's negative
    loss, _ = step.loss_and_gradient(backbone, batch, found, seed=0)
    model = SentenceTransformer(str(minilm), device="cpu")
    model.max_seq_length = 16
    columns = [[row["query"] for row in rows[::4]], [row["positive"] for row in rows[::4]]]
    columns += [[row["negative"][i] for row in rows[::4]] for i in range(negatives)]
    theirs = MultipleNegativesRankingLoss(model, scale=50.0)
    model.eval()
    expected = theirs([model.preprocess(column) for column in columns], None)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    by_name = dict(model.named_parameters())
    their_gradient = torch.cat([by_name[name].grad.flatten() for name, _ in backbone.named_parameters()])
    assert off(gradient(backbone), their_gradient) < 1e-5


def test_surgery_is_that_of_the_tasks_own_gradients(setup: Setup) -> None:
    """Parts of one task have one gradient: the sum of theirs."""
    backbone = setup.backbone.transformer.eval() and setup.backbone
    tasks = [0, 1, 2, 0]
    alone: dict[int, list[Any]] = {}
    losses = []
    for number, batch in setup.rows.items():
        loss, _ = step.loss_and_gradient(backbone, batch, setup.objectives, seed=0)
        own = [parameter.grad for parameter in backbone.parameters()]
        gradient(backbone)
        task = tasks[number]
        alone[task] = own if task not in alone else [a + b for a, b in zip(alone[task], own, strict=True)]
        losses.append(float(loss))
    expected = modular_gradient_surgery(list(alone.values()), torch.Generator().manual_seed(5))
    for cache in (0, 64):
        loss, parts = step.surgical_loss_and_gradient(
            backbone, setup.batch, setup.objectives, seed=5, tasks=tasks, cache_tokens=cache
        )
        assert parts == pytest.approx(losses, rel=1e-5) and float(loss) == pytest.approx(np.mean(losses), rel=1e-5)
        assert off(gradient(backbone), torch.cat([each.flatten() for each in expected if each is not None])) < 1e-5


def test_a_row_alone_and_one_of_identical_texts_give_numbers(setup: Setup) -> None:
    for number, batch in setup.rows.items():
        part = batch.parts[0]
        lone = Batch(
            batch.tokens,
            (type(part)(number, 1, part.queries[:1], *_first_row(part)),),
        )
        loss, _ = step.loss_and_gradient(setup.backbone, lone, setup.objectives, seed=0)
        assert torch.isfinite(loss) and torch.isfinite(gradient(setup.backbone)).all()


def _first_row(part: Any) -> tuple[Any, ...]:
    own = part.allowed[0] & part.allowed[0]
    keep = np.flatnonzero(own)
    scores = None if part.scores is None else part.scores[:1]
    if scores is not None and scores.ndim == 2:
        scores = scores[:, keep]
    return part.candidates[keep], part.positive[:1, keep], part.allowed[:1, keep], scores
