"""pack_linears: the same numbers from weights laid out otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from embeddings.packed import pack_linears

TEXTS = ["a", "a cat sat on the mat", "What is the capital of Germany? " * 12]


@pytest.fixture(scope="module")
def packed(minilm: Path) -> SentenceTransformer:
    transformer = SentenceTransformer(str(minilm), device="cpu")
    if not pack_linears(transformer):
        pytest.skip("linear layers are not packed on this machine")
    return transformer


def test_vectors_are_those_of_the_plain_model(minilm: Path, packed: SentenceTransformer) -> None:
    plain = SentenceTransformer(str(minilm), device="cpu")
    np.testing.assert_allclose(packed.encode(TEXTS), plain.encode(TEXTS), atol=2e-6)


def test_every_linear_layer_is_packed_and_its_gelu_with_it(packed: SentenceTransformer) -> None:
    assert not [module for module in packed.modules() if type(module) is torch.nn.Linear]
    assert isinstance(packed[0].model.encoder.layer[0].intermediate.intermediate_act_fn, torch.nn.Identity)


def test_a_packed_layer_can_be_asked_for_its_weight(minilm: Path, packed: SentenceTransformer) -> None:
    plain = SentenceTransformer(str(minilm), device="cpu")
    for model in (plain, packed):
        model.layer = model[0].model.encoder.layer[0].attention.self.query
    assert torch.equal(plain.layer.weight, packed.layer.weight)


def test_what_is_no_plain_float32_layer_stays() -> None:
    class Scaled(torch.nn.Linear):
        pass

    hooked = torch.nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    module = torch.nn.Sequential(Scaled(2, 2), torch.nn.Linear(2, 2, dtype=torch.bfloat16), hooked)
    before = list(module)
    assert pack_linears(module) == 0
    assert list(module) == before


def test_an_activation_that_is_not_the_exact_gelu_is_left_alone() -> None:
    class TanhIntermediate(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.intermediate_act_fn = torch.nn.Linear(4, 4), torch.nn.GELU(approximate="tanh")

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.intermediate_act_fn(self.dense(inputs))

    module, inputs = TanhIntermediate(), torch.randn(3, 4)
    with torch.inference_mode():
        expected = module(inputs)
        pack_linears(module)
        torch.testing.assert_close(module(inputs), expected)
