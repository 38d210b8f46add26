"""CoCoA's stages on images with texts: what a masked patch, an image and its caption may know of each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embeddings.reconstruction.batch import EOS, SOURCE, TARGET, Batch
from embeddings.reconstruction.cocoa import Bridge, WarmUp
from embeddings.reconstruction.example import Example
from embeddings.reconstruction.images import ImageBatch
from embeddings.reconstruction.llm_ql import QueryLikelihood
from embeddings.reconstruction.model import Reconstructor, open_reconstructor
from embeddings.reconstruction.objective import Objective
from embeddings.reconstruction.retromae import RetroMAE
from embeddings.training.config import LoraSettings, ModelSettings
from merging.errors import CuveeError
from tests.embeddings.reconstruction import vision

OBJECTIVES = (WarmUp(), Bridge(), Bridge(eos_sees_b=False), Bridge(bridge="embedding"))


@pytest.fixture(scope="module", params=vision.KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.vision_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    at = tmp_path_factory.mktemp("pictures")
    return [vision.picture(at / f"{seed}.png", seed, (32, 16 * (1 + seed))) for seed in range(3)]


def opened(folder: Path) -> Reconstructor:
    return open_reconstructor(ModelSettings(str(folder)))


@pytest.fixture(scope="module")
def model(folder: Path) -> Reconstructor:
    return opened(folder)


def rows(model: Reconstructor, files: list[Path]) -> list[Example]:
    reader = model.reader()
    sources, targets = reader.ids(["", "what", "text alone"]), reader.ids(vision.CAPTIONS, "target")
    return [
        Example(source, target, image=file, where=f"row {number}")
        for number, (source, target, file) in enumerate(zip(sources, targets, [*files[:2], None], strict=True))
    ]


def made(model: Reconstructor, files: list[Path], objective: Objective, seed: int = 0) -> Batch:
    return objective.collate(rows(model, files), model.reader(), np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("objective", "side"),
    list(zip(OBJECTIVES, ("right", "left") * 2, strict=True)),
    ids=str,
)
def test_a_few_steps_learn(folder: Path, files: list[Path], objective: Objective, side: str) -> None:
    model = opened(folder)
    model.tokenizer.padding_side = side
    batch = made(model, files, objective)
    assert batch.images is not None and batch.inputs["position_ids"].shape == (3, *batch.ids.shape)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.module.train()
    losses = []
    for _ in range(4):
        outcome = objective.loss(model, batch)
        outcome.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(outcome.loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert ("patch_loss" in outcome.numbers) == isinstance(objective, WarmUp)


@pytest.mark.parametrize(
    "how",
    [{"dtype": "bfloat16"}, {"gradient_checkpointing": True}, {"lora": LoraSettings(r=4)}],
    ids=["bfloat16", "recomputed", "lora"],
)
def test_it_learns_in_every_way_that_a_model_of_texts_does(
    folder: Path, files: list[Path], how: dict[str, Any]
) -> None:
    if "lora" in how:
        pytest.importorskip("peft", reason="needs peft: pip install 'cuvee[lora]'")
    model = open_reconstructor(ModelSettings(str(folder), **how))
    plain = opened(folder)
    for objective in (WarmUp(), Bridge()):
        batch = made(model, files, objective)
        with torch.inference_mode():
            wanted = float(objective.loss(plain, batch).loss)
        model.module.train()
        loss = objective.loss(model, batch).loss
        assert float(loss.detach()) == pytest.approx(wanted, rel=0.02 if "dtype" in how else 1e-4)
        loss.backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert "patch_head.weight" in names and any("lora_" in name for name in names) is ("lora" in how)


def test_padding_changes_no_loss(model: Reconstructor, files: list[Path]) -> None:
    """Rows one by one, and together, padded on either side; what is masked is the same."""
    objective, reader = Bridge(mask=1.0), model.reader()
    alone, predictions = 0.0, 0
    with torch.inference_mode():
        for example in rows(model, files):
            own = objective.loss(model, objective.collate([example], reader, np.random.default_rng(0)))
            alone, predictions = alone + float(own.loss) * own.predictions, predictions + own.predictions
        for left in (False, True):
            batch = objective.collate(rows(model, files), replace(reader, pad_left=left), np.random.default_rng(0))
            assert float(objective.loss(model, batch).loss) == pytest.approx(alone / predictions, rel=1e-4)


def test_the_positions_are_those_that_the_model_makes_itself(model: Reconstructor, files: list[Path]) -> None:
    """Causal attention, which is its own, and no positions given: the same states."""
    batch = replace(made(model, files, WarmUp(patches=0.0)), pattern="causal")
    kinds = (batch.ids == model.processor.image_id).int()
    assert batch.images is not None
    with torch.inference_mode():
        ours = model.hidden(batch)
        theirs = model.module.base_model(
            input_ids=batch.ids,
            attention_mask=(batch.segments != 0).int(),
            mm_token_type_ids=kinds,
            **batch.images.arguments(),
        ).last_hidden_state
    real = batch.segments != 0
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-4)


def test_a_changed_image_changes_no_caption_but_through_eos(model: Reconstructor, files: list[Path]) -> None:
    """The image reaches EOS and the source; with EOS's way closed, no state of the target."""
    batch = made(model, files, Bridge())
    assert isinstance(batch.images, ImageBatch)
    other = replace(batch, images=replace(batch.images, pixels=batch.images.pixels.flip(0)))
    row = 0
    with torch.inference_mode():
        first, second = model.hidden(batch)[row], model.hidden(other)[row]
        segments = batch.segments[row]
        for segment in (SOURCE, EOS, TARGET):
            assert not torch.allclose(first[segments == segment], second[segments == segment], atol=1e-4)
        shut = torch.where(batch.segments == EOS, SOURCE, batch.segments)  # EOS is of the source then
        first, second = (model.hidden(replace(each, segments=shut))[row] for each in (batch, other))
        assert torch.equal(first[segments == TARGET], second[segments == TARGET])
        assert not torch.allclose(first[segments == SOURCE], second[segments == SOURCE], atol=1e-4)


def test_pixels_have_no_gradient_but_through_eos(model: Reconstructor, files: list[Path]) -> None:
    for shut in (False, True):
        batch = made(model, files, Bridge())
        assert isinstance(batch.images, ImageBatch)
        pixels = batch.images.arguments()["pixel_values"].clone().requires_grad_()
        batch = replace(batch, images=replace(batch.images, pixels=pixels))
        if shut:
            batch = replace(batch, segments=torch.where(batch.segments == EOS, SOURCE, batch.segments))
        told = batch.predicted_segments() == TARGET
        after_first = told & (batch.segments[batch.places[:, 0], batch.places[:, 1]] == TARGET)
        places = batch.places[after_first]
        model.logits(model.hidden(batch), places).square().mean().backward()
        assert pixels.grad is not None
        assert bool(pixels.grad.any()) is not shut
        model.module.zero_grad()


def test_patches_are_masked_under_image_tokens_and_words_elsewhere(model: Reconstructor, files: list[Path]) -> None:
    batch = made(model, files, WarmUp())
    assert isinstance(batch.images, ImageBatch) and batch.images.places is not None
    assert (batch.ids[tuple(batch.images.places.T)] == model.processor.image_id).all()
    assert not torch.isin(batch.labels, torch.tensor([model.processor.image_id, model.processor.end_id])).any()


def test_a_checkpoint_keeps_the_head_and_the_model_does_not(folder: Path, files: list[Path], tmp_path: Path) -> None:
    model = opened(folder)
    assert {"patch_head.weight", "patch_head.bias"} <= model.state().keys()
    model.save_language_model(tmp_path)
    again = opened(tmp_path)
    with torch.inference_mode():
        batch = made(model, files, Bridge())
        assert torch.equal(model.hidden(batch), again.hidden(batch))
    assert not [name for name in again.module.state_dict() if "patch_head" in name]


def test_what_reads_texts_alone_says_so(model: Reconstructor, files: list[Path]) -> None:
    draw = np.random.default_rng(0)
    reader = replace(model.reader(), processor=None)
    with pytest.raises(CuveeError, match="row 0: the model reads texts alone"):
        Bridge().collate(rows(model, files), reader, draw)
    for objective in (QueryLikelihood(), RetroMAE()):
        with pytest.raises(CuveeError, match=r"row 0: has an image, and .* reads texts alone"):
            objective.collate(rows(model, files), model.reader(), draw)
