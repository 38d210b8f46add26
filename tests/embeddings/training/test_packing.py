"""Packing: texts that share a row have the vectors they have alone, or the model is not packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
)

from embeddings.training import packing
from embeddings.training.backbone import open_backbone
from embeddings.training.config import ModelSettings

SMALL: dict[str, Any] = {
    **{"vocab_size": 120, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "pad_token_id": 0},
}
TEXTS = [np.arange(3, 3 + length, dtype=np.int32) for length in (7, 40, 1, 12, 12, 30, 2)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 80))
def test_every_text_has_a_place_of_its_own(lengths: list[int], width: int) -> None:
    rows, starts = packing.fit(lengths, width)
    taken = np.zeros((max(rows) + 1, width), int)
    for length, row, start in zip(lengths, rows, starts, strict=True):
        assert start + length <= width
        taken[row, start : start + length] += 1
    assert taken.max() == 1
    half_full = (taken.sum(1) * 2 < width).sum()
    assert half_full <= 1  # two such rows would have gone into one


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("model", "config", "causal", "first"),
    [
        (BertModel, BertConfig(**SMALL), False, 0),
        (RobertaModel, RobertaConfig(**{**SMALL, "pad_token_id": 1, "max_position_embeddings": 80}), False, 2),
        (LlamaModel, LlamaConfig(**SMALL), True, 0),
        (GPT2Model, GPT2Config(vocab_size=120, n_embd=16, n_layer=2, n_head=2, pad_token_id=0), True, 0),
    ],
)
def test_packed_texts_have_the_vectors_they_have_alone(
    model: Any, config: Any, causal: bool, first: int, implementation: str
) -> None:
    torch.manual_seed(0)
    config._attn_implementation = implementation
    network = model(config).eval()
    found = packing.find(network, causal=causal, types=False)
    assert found == packing.Packing(causal, first, implementation == "sdpa")
    with torch.inference_mode():
        hidden, places = packing.forward(network, found, TEXTS, types=False)
        for text, place in zip(TEXTS, places, strict=True):
            alone = network(input_ids=torch.tensor(text.astype(np.int64))[None], return_dict=True)[0][0]
            torch.testing.assert_close(hidden[place], alone, atol=2e-5, rtol=1e-4)


def test_relative_positions_hold_within_a_row() -> None:
    torch.manual_seed(0)
    network = MPNetModel(MPNetConfig(**{**SMALL, "pad_token_id": 1}, initializer_range=0.5)).eval()
    assert packing.find(network, causal=False, types=False) == packing.Packing(False, 2, False)


def test_a_model_with_windows_is_not_packed() -> None:
    network = MistralModel(MistralConfig(**SMALL, sliding_window=4)).eval()
    assert packing.find(network, causal=True, types=False) is None


def test_a_model_that_takes_the_mask_for_another_is_not_packed() -> None:
    torch.manual_seed(0)
    network = LlamaModel(LlamaConfig(**SMALL)).eval()
    assert packing.find(network, causal=False, types=False) is None


def test_vectors_and_gradients_of_a_batch_are_those_of_the_padded_one(minilm: Path) -> None:
    backbone = open_backbone(ModelSettings(str(minilm)), max_length={"query": 64, "document": 64}, device="cpu")
    assert backbone.packs
    texts = ["a", "A cat sat on the mat.", "What is the capital of Germany? " * 9, "two words", ""]
    tokens = [np.array(ids, np.int32) for ids in backbone.tokenize(texts, "query")]
    found = []
    for vectors in (backbone.vectors(tokens), backbone.embed(backbone.pad(tokens))):
        backbone.transformer.zero_grad()
        vectors.square().cumsum(1).sum().backward()
        found.append((vectors.detach(), {name: value.grad.clone() for name, value in backbone.named_parameters()}))
    (packed, own), (padded, expected) = found
    torch.testing.assert_close(packed, padded, atol=1e-6, rtol=0)
    for name, gradient in expected.items():
        assert (own[name] - gradient).abs().max() <= 2e-5 * max(1.0, float(gradient.abs().max())), name
