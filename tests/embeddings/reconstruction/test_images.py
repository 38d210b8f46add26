"""Images in a batch: read without torchvision, and put where the model's own processor and `get_rope_index` put them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from embeddings.images.reader import ImageReader, image_reader, positions
from embeddings.reconstruction.batch import EOS, SOURCE, Row, stack
from embeddings.reconstruction.images import attached
from embeddings.reconstruction.patches import new_head, patch_loss, with_masked_patches
from embeddings.reconstruction.reader import Reader
from merging.errors import CuveeError
from tests.embeddings.reconstruction import vision

EOS_ID = 0


@pytest.fixture(scope="module", params=vision.KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.vision_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def reader(folder: Path) -> ImageReader:
    return opened(folder)


def opened(folder: Path) -> ImageReader:
    found = image_reader(folder, vision.config_of(folder), vision.tokenizer(), str(folder))
    assert found is not None
    return found


def module(folder: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()


def batch_of(reader: ImageReader, pictures: list[Any], *, pad_left: bool = False) -> Any:
    rows = []
    for number, picture in enumerate(pictures):
        text = np.arange(20, 23 + number)
        ids = np.concatenate(
            [text[:number], [] if picture is None else reader.ids(reader.tokens(picture)), text, [EOS_ID]]
        )
        segments = np.r_[np.full(len(ids) - 1, SOURCE), EOS]
        rows.append(Row(ids.astype(np.int64), segments, np.full(len(ids), -1)))
    batch = stack(rows, "bidirectional", pad_id=EOS_ID, pad_left=pad_left)
    own = Reader(None, EOS_ID, 5, EOS_ID, processor=reader)
    return attached(batch, [picture for picture in pictures if picture is not None], own)


def pictures(reader: ImageReader, tmp_path: Path) -> list[Any]:
    sizes = ((32, 32), (64, 16), (16, 48))
    found = [reader.read(vision.picture(tmp_path / f"{size}.png", 0, size)) for size in sizes]
    return [found[0], None, *found[1:]]


def test_pixels_and_tokens_are_those_of_the_processor(folder: Path, reader: ImageReader, tmp_path: Path) -> None:
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    file = vision.picture(tmp_path / "a.png", 1, (48, 16))
    with Image.open(file) as image:
        theirs = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[image], return_tensors="np")
    ours = reader.read(file)
    assert reader.tokens_of_size(48, 16, "") == reader.tokens(ours)
    np.testing.assert_array_equal(ours.pixels, theirs["pixel_values"])
    assert [ours.grid] == [tuple(row) for row in theirs["image_grid_thw"].tolist()]
    ids = reader.ids(reader.tokens(ours))
    assert (ids == reader.image_id).sum() == np.prod(ours.grid) // 4 == reader.tokens(ours)
    assert (ids[0], ids[-1]) == (reader.start_id, reader.end_id)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_as_the_processor_has_it(reader: ImageReader, tmp_path: Path, mode: str) -> None:
    from PIL import Image

    file = tmp_path / "a.png"
    with Image.open(vision.picture(tmp_path / "whole.png", 1)) as image:
        drawn = image.convert(mode)
        if mode == "P":
            drawn.save(file, transparency=bytes(range(256)))
        else:
            drawn.putalpha(Image.linear_gradient("L").resize(image.size))
            drawn.save(file)
    with Image.open(file) as image:
        theirs = reader.image_processor(images=[image], return_tensors="np")
    np.testing.assert_array_equal(reader.read(file).pixels, theirs["pixel_values"])


@pytest.mark.parametrize("pad_left", [False, True])
def test_positions_are_those_of_get_rope_index(
    folder: Path, reader: ImageReader, tmp_path: Path, pad_left: bool
) -> None:
    batch = batch_of(reader, pictures(reader, tmp_path), pad_left=pad_left)
    kinds = (batch.ids == reader.image_id).int()
    real = batch.segments != 0
    wanted, _ = module(folder).model.get_rope_index(batch.ids, kinds, batch.images.grids, attention_mask=real.int())
    assert torch.equal(batch.inputs["position_ids"], wanted)
    assert torch.equal(batch.inputs["position_ids"][:, 1], wanted[:1, 1].expand(3, -1))  # without an image


def test_positions_equal_a_loop_token_by_token() -> None:
    """Two images of different shapes in one row, video-like depth, another row without any."""
    image, merge = 7, 2
    grids = np.array([[1, 4, 6], [2, 2, 4]])
    rows = [[1, *[image] * 6, 2, 3, *[image] * 4, 4], [5, 6, 7 + 1, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]]
    rows[1] = rows[1][: len(rows[0])]
    ids = np.array(rows)
    wanted = np.zeros((3, *ids.shape), np.int64)
    for row in range(2):
        place, token, left = 0, 0, list(grids) if row == 0 else []
        while token < ids.shape[1]:
            if ids[row, token] != image:
                wanted[:, row, token] = place
                place, token = place + 1, token + 1
                continue
            time, height, width = left.pop(0)
            for t in range(time):
                for y in range(height // merge):
                    for x in range(width // merge):
                        wanted[:, row, token] = place + t, place + y, place + x
                        token += 1
            place += max(height, width) // merge
    found = positions(ids, np.ones(ids.shape, bool), grids, image_id=image, merge=merge)
    np.testing.assert_array_equal(found, wanted)


def test_masked_patches_are_grey_and_the_loss_equals_a_float64_loop(reader: ImageReader, tmp_path: Path) -> None:
    before = batch_of(reader, pictures(reader, tmp_path))
    after = with_masked_patches(before, reader, 0.3, np.random.default_rng(0))
    again = with_masked_patches(before, reader, 0.3, np.random.default_rng(0))
    assert torch.equal(after.images.pixels, again.images.pixels)
    hidden = torch.randn(*before.ids.shape, 8, generator=torch.Generator().manual_seed(0))
    values = before.images.pixels.shape[1]
    head = new_head(8, 4 * values)
    torch.nn.init.normal_(head.bias)
    head.requires_grad_(False)
    weight, bias = head.weight.double(), head.bias.double()
    token, squares, masked_of = 0, [], []
    for row in range(len(before.ids)):
        for place in range(before.ids.shape[1]):
            if before.ids[row, place] != reader.image_id:
                continue
            own = slice(4 * token, 4 * token + 4)
            was, now = before.images.pixels[own], after.images.pixels[own]
            if not torch.equal(was, now):
                assert not now.any()
                painted = weight @ hidden[row, place].double() + bias
                squares.extend(((painted - was.flatten().double()) ** 2).tolist())
                masked_of.append(row)
            token += 1
    assert np.unique(masked_of, return_counts=True)[1].tolist() == [
        max(1, round(0.3 * int(grid.prod()) // 4)) for grid in before.images.grids
    ]
    loss = patch_loss(head, hidden, after.images)
    assert float(loss) == pytest.approx(float(np.mean(squares)), rel=1e-5)


def test_a_batch_without_images_or_share_stays_as_it_is(reader: ImageReader, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    texts = batch_of(reader, [None, None])
    assert with_masked_patches(texts, reader, 0.3, draw) is texts
    batch = batch_of(reader, pictures(reader, tmp_path))
    assert with_masked_patches(batch, reader, 0.0, draw) is batch
    assert float(patch_loss(new_head(4, 8), torch.ones(1, 2, 4), batch.images)) == 0


def test_what_is_no_image_is_told_with_its_file(reader: ImageReader, tmp_path: Path) -> None:
    file = tmp_path / "broken.png"
    file.write_bytes(vision.picture(tmp_path / "whole.png").read_bytes()[:80])
    with pytest.raises(CuveeError, match=r"broken\.png: is no image that can be read"):
        reader.read(file)


def test_a_model_of_another_shape_or_without_a_processor_reads_texts_alone(folder: Path, tmp_path: Path) -> None:
    config = vision.config_of(folder)
    assert image_reader(folder, {**config, "vision_config": {"image_size": 3}}, None, "m") is None
    assert image_reader(tmp_path, config, None, "m") is None


def test_an_image_processor_that_cannot_be_loaded_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{}")
    found = image_reader(tmp_path, vision.config_of(folder), None, "m")
    assert found is not None
    with pytest.raises(CuveeError, match="m: its image processor cannot be loaded"):
        found.read(vision.picture(tmp_path / "a.png"))


def test_saved_beside_a_tokenizer_it_opens_again(folder: Path, reader: ImageReader, tmp_path: Path) -> None:
    reader.save_pretrained(tmp_path)
    again = image_reader(tmp_path, vision.config_of(folder), reader.tokenizer, "again")
    assert again is not None
    file = vision.picture(tmp_path / "a.png")
    np.testing.assert_array_equal(again.read(file).pixels, reader.read(file).pixels)
    assert again.read(file).grid == reader.read(file).grid
