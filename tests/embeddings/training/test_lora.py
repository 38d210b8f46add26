"""LoRA on a backbone against peft, and against the merging of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embeddings.model import open_model
from embeddings.training.backbone import Backbone
from embeddings.training.config import LoraSettings
from merging.errors import CuveeError
from tests.embeddings.training.test_backbone import TEXTS, close, embed, gradients, opened, plain


def moved(backbone: Backbone) -> Backbone:
    """As if it had been trained: B is no longer zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return backbone


@pytest.fixture(scope="module")
def adapted(minilm: Path) -> Backbone:
    return moved(opened(minilm, lora=LoraSettings(r=4, alpha=8)))


def test_it_begins_at_the_model_and_trains_the_factors_only(minilm: Path) -> None:
    backbone = opened(minilm, lora=LoraSettings(r=4))
    close(embed(backbone), embed(opened(minilm)))
    names = list(backbone.state())
    assert len(names) == 2 * 6 * 6 and all(".lora_" in name for name in names)
    assert sum(gradient.abs().sum() > 0 for gradient in gradients(backbone).values()) == 36  # B; A's come next
    again = opened(minilm, lora=LoraSettings(r=4))
    assert all(torch.equal(value, again.state()[name]) for name, value in backbone.state().items())


def test_a_saved_folder_is_merged_and_training_goes_on_as_before(
    adapted: Backbone, minilm: Path, tmp_path: Path
) -> None:
    weights = {name: value.clone() for name, value in adapted.transformer.named_parameters()}
    vectors = embed(adapted)
    adapted.save(tmp_path / "saved")
    close(plain(tmp_path / "saved"), vectors)
    assert abs(plain(tmp_path / "saved") - plain(minilm)).max() > 0.01
    after = dict(adapted.transformer.named_parameters())
    assert weights.keys() == after.keys() and all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(embed(adapted), vectors)
    assert len(list(adapted.parameters())) == 72


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft calls it
def test_the_saved_adapter_is_one_for_peft_and_for_merging(adapted: Backbone, minilm: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from sentence_transformers import SentenceTransformer

    adapted.save(tmp_path / "saved")
    expected = embed(adapted)
    close(open_model(f"{minilm}+{tmp_path / 'saved' / 'adapter'}").transformer.encode(TEXTS), expected, 1e-5)
    close(
        embed(opened(Path(f"{minilm}+{tmp_path / 'saved' / 'adapter'}"))), expected, 1e-5
    )  # where the next one begins
    by_peft: Any = SentenceTransformer(str(minilm), device="cpu")
    by_peft[0].model = PeftModel.from_pretrained(by_peft[0].model, tmp_path / "saved" / "adapter")
    close(by_peft.encode(TEXTS), expected, 1e-5)


def test_a_saved_state_holds_the_factors(adapted: Backbone, minilm: Path) -> None:
    other = opened(minilm, lora=LoraSettings(r=4, alpha=8))
    other.load_state(adapted.state())
    assert torch.equal(embed(other), embed(adapted))
    with pytest.raises(CuveeError, match=r"the tensor '0\.model"):
        opened(minilm).load_state(adapted.state())


def test_layers_are_chosen_by_name(minilm: Path) -> None:
    backbone = opened(minilm, lora=LoraSettings(r=2, targets=("query", "value")))
    modules = {name.split(".lora_")[0].split(".")[-1] for name in backbone.state()}
    assert modules == {"query", "value"} and len(backbone.state()) == 2 * 2 * 6
    with pytest.raises(CuveeError, match=r"config.yml:1: LoRA fits none of its layers: .*choose among .*query"):
        opened(minilm, lora=LoraSettings(targets=("q_proj",)))


def test_recomputed_activations_give_the_same_gradients(minilm: Path) -> None:
    settings = LoraSettings(r=4, dropout=0.1)
    expected = gradients(moved(opened(minilm, lora=settings)))
    got = gradients(moved(opened(minilm, lora=settings, gradient_checkpointing=True)))
    for name, gradient in expected.items():
        np.testing.assert_allclose(got[name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)
