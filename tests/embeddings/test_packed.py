"""pack_linears: the same numbers from weights laid out otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from embeddings.packed import PackedTwin, pack_linears

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


def test_a_twin_follows_the_weights_and_leaves_the_module_as_it_is(minilm: Path) -> None:
    plain = SentenceTransformer(str(minilm), device="cpu")
    before = list(plain.modules())
    twin = PackedTwin(plain)
    if twin.module is plain:
        pytest.skip("linear layers are not packed on this machine")
    assert list(plain.modules()) == before and dict(plain.named_parameters()).keys()
    np.testing.assert_allclose(twin.module.encode(TEXTS), plain.encode(TEXTS), atol=2e-6)
    first = plain.encode(TEXTS)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.02)
    twin.refresh()
    after = plain.encode(TEXTS)
    assert np.abs(after - first).max() > 1e-4
    np.testing.assert_allclose(twin.module.encode(TEXTS), after, atol=2e-6)
    packed = SentenceTransformer(str(minilm), device="cpu")
    packed.load_state_dict(plain.state_dict())
    pack_linears(packed)
    assert np.array_equal(twin.module.encode(TEXTS), packed.encode(TEXTS)), "to the bit what a packed model gives"


def test_the_twin_of_what_cannot_be_packed_is_the_module() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2, dtype=torch.bfloat16))
    assert PackedTwin(module).module is module
