"""The embedding model of a vision–language model: what training saw is what the folder gives, of texts and of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer

from embeddings.reconstruction.example import Example
from embeddings.reconstruction.export import write_embedding_model
from embeddings.reconstruction.measure import embed
from embeddings.reconstruction.model import Reconstructor, open_reconstructor
from embeddings.training.config import ModelSettings
from tests.embeddings.reconstruction import vision

LENGTHS = {"query": 24, "document": 24}


@pytest.fixture(scope="module", params=vision.KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reconstructor:
    folder = vision.vision_model(tmp_path_factory.mktemp(request.param), request.param)
    return open_reconstructor(ModelSettings(str(folder)))


@pytest.fixture(scope="module")
def out(model: Reconstructor) -> Path:
    folder = Path(model.base)
    out = folder / "out"
    write_embedding_model(folder, out, ModelSettings(str(folder)), bidirectional=True, max_length=LENGTHS, content={})
    return out


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.picture(tmp_path_factory.mktemp("pictures") / "a.png", 3, (48, 32))


def ours(model: Reconstructor, texts: list[str], images: list[Path | None]) -> Any:
    """As they are measured while the model learns."""
    sources = model.reader().ids(texts)
    examples = [Example(ids, image=image) for ids, image in zip(sources, images, strict=True)]
    with torch.inference_mode():
        return embed(model, examples, model.reader(), "bidirectional").numpy()


def theirs(out: Path, rows: list[tuple[str, Any]], image_id: int) -> Any:
    """The folder's tokenizer, weights and settings, put together by hand: what needs no torchvision.

    Args:
        rows: what the folder's template made of a message, and the picture in it.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    network = transformers.AutoModel.from_pretrained(out).eval()
    vectors = []
    for text, picture in rows:
        if picture is not None:
            text = text.replace("<|image_pad|>", "<|image_pad|>" * (len(picture.pixels) // 4))
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        images = {} if picture is None else {"pixel_values": torch.from_numpy(picture.pixels)}
        if picture is not None:
            images |= {"image_grid_thw": torch.tensor([picture.grid]), "mm_token_type_ids": (ids == image_id).int()}
        with torch.inference_mode():
            state = network(input_ids=ids, attention_mask=torch.ones_like(ids), **images).last_hidden_state[0, -1]
        vectors.append(torch.nn.functional.normalize(state, dim=0).numpy())
    return np.stack(vectors)


def rendered(out: Path, *parts: dict[str, str]) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    message = {"role": "user", "content": list(parts)}
    text: str = tokenizer.apply_chat_template([message], tokenize=False)
    return text


def test_what_training_saw_is_what_the_folder_gives(model: Reconstructor, out: Path, picture: Path) -> None:
    words, image = {"type": "text", "text": "what is it? "}, {"type": "image", "image": "…"}
    assert rendered(out, words) == "what is it? "
    assert rendered(out, words, image) == "<|vision_start|><|image_pad|><|vision_end|>what is it? "
    read = model.processor.read(picture)
    made = [(rendered(out, words), None), (rendered(out, image), read), (rendered(out, words, image), read)]
    wanted = ours(model, ["what is it? ", "", "what is it? "], [None, picture, picture])
    np.testing.assert_allclose(theirs(out, made, model.processor.image_id), wanted, atol=1e-5)


def test_it_looks_to_both_sides_only_where_it_was_trained_to(model: Reconstructor, out: Path, tmp_path: Path) -> None:
    folder = Path(model.base)
    causal = tmp_path / "causal"
    write_embedding_model(
        folder, causal, ModelSettings(str(folder)), bidirectional=False, max_length=LENGTHS, content={}
    )
    settings = [json.loads((each / "config.json").read_text())["text_config"] for each in (out, causal)]
    assert [each.get("is_causal", True) for each in settings] == [False, True]
    with torch.inference_mode():
        wanted = embed(model, [Example(model.reader().ids(["a red"])[0])], model.reader(), "causal").numpy()
    np.testing.assert_allclose(theirs(causal, [("a red", None)], -1), wanted, atol=1e-5)


def test_plain_sentence_transformers_embeds_images(model: Reconstructor, out: Path, picture: Path) -> None:
    pytest.importorskip("torchvision", reason="transformers' processor of Qwen2-VL needs torchvision")
    from PIL import Image

    plain = SentenceTransformer(str(out), device="cpu")
    with Image.open(picture) as image:
        theirs = plain.encode(["a red square", image.convert("RGB"), {"image": image.convert("RGB"), "text": "what?"}])
    wanted = ours(model, ["a red square", "", "what?"], [None, picture, picture])
    np.testing.assert_allclose(theirs, wanted, atol=0.02)  # torchvision resizes a little differently


def test_the_card_says_the_line_that_is_needed(out: Path) -> None:
    assert (
        'pip install "sentence-transformers[image]" "transformers>=5.2" torchvision' in (out / "README.md").read_text()
    )
    longest = json.loads((out / "tokenizer_config.json").read_text())["model_max_length"]
    assert longest == 24 + 32 * 32 // 16**2 + 2
