"""Images and their texts as data: read once, mistakes at their row, broken ones left out by option; and a run on them."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embeddings.images.reader import image_reader
from embeddings.images.settings import ImageSettings
from embeddings.reconstruction.config import load, parse
from embeddings.reconstruction.image_rows import ImageRows, read_image_rows
from embeddings.reconstruction.reader import Reader
from embeddings.reconstruction.run import pretrain_run
from merging.errors import CuveeError
from tests.embeddings.reconstruction import vision
from tests.embeddings.reconstruction.runs import metrics
from tests.embeddings.runs import same_weights, table

pytest.importorskip("PIL", reason="needs Pillow: pip install 'cuvee[images]'")

DRAW = np.random.default_rng(0)
COUNT = 16
ENTRY = "images:\n  - {file: images.jsonl%s}\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.vision_model(tmp_path_factory.mktemp("vl"))


def write(place: Path, rows: list[dict[str, Any]] | None = None) -> None:
    """A table of images with captions."""
    (place / "img").mkdir(exist_ok=True)
    own = []
    for number in range(COUNT):
        vision.picture(place / "img" / f"{number}.png", number)
        own.append({"image": f"img/{number}.png", "caption": f"the picture number {number}"})
    table(place / "images.jsonl", own if rows is None else [*own, *rows])


@functools.cache
def reader() -> Reader:
    tokenizer = vision.tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        vision.vision_model(Path(folder))
        processor = image_reader(Path(folder), vision.config_of(Path(folder)), tokenizer, "base")
    return Reader(tokenizer, tokenizer.eos_token_id, 5, tokenizer.pad_token_id, processor=processor)


def read(place: Path, more: str = "") -> ImageRows:
    (place / "base").mkdir(exist_ok=True)
    config = parse("model: base\n" + ENTRY % more, "cocoa", str(place / "config.yml"))
    (found,) = read_image_rows(config.images, reader(), place / "cache", 0, lambda what, done, total: None)
    return found


def test_a_row_is_an_image_and_what_is_told_of_it(tmp_path: Path) -> None:
    write(tmp_path)
    found = read(tmp_path).of_stage(reader(), np.array([3]), warm_up=False)
    assert len(found) == COUNT and 3 not in found.units and len(found.units) == COUNT - 1
    example = found.example(2, DRAW)
    assert example.image == (tmp_path / "img" / "2.png").resolve() and list(example.source) == []
    assert reader().tokenizer.decode(example.target) == "the picture number 2"
    whole = found.of_stage(reader(), np.array([3]), warm_up=True).example(2, DRAW)
    assert whole.target is None and reader().tokenizer.decode(whole.source) == "the picture number 2"
    image, text = found.sides(2)
    assert image.image is not None and not image.source and text.image is None and text.source == whole.source


def test_columns_may_have_other_names_and_a_query_stands_behind_the_image(tmp_path: Path) -> None:
    write(tmp_path)
    row = {"file": "img/0.png", "words": "a square", "ask": "what is it?"}
    table(tmp_path / "images.jsonl", [row])
    found = read(tmp_path, ", columns: {image: file, text: words, query: ask}").of_stage(
        reader(), np.zeros(0, np.int64), warm_up=False
    )
    example = found.example(0, DRAW)
    assert reader().tokenizer.decode(example.source) == "what is it?"
    assert reader().tokenizer.decode(example.target) == "a square"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "img/none.png", "caption": "x"}, "images.jsonl:17: there is no image 'img/none.png'"),
        ({"image": "broken.png", "caption": "x"}, "images.jsonl:17: is no image that can be read"),
        ({"image": "../secret.png", "caption": "x"}, "images.jsonl:17: the image '../secret.png' is not in the folder"),
        ({"image": "/etc/passwd", "caption": "x"}, "images.jsonl:17: the image '/etc/passwd' is not in the folder"),
        ({"image": 5, "caption": "x"}, "images.jsonl:17: 'image' must be a path, not 5"),
        ({"image": "loop.png", "caption": "x"}, "images.jsonl:17: there is no image 'loop.png'"),
        ({"image": "a" * 300, "caption": "x"}, "images.jsonl:17: there is no image 'aaa"),
        ({"image": "wide.png", "caption": "x"}, "images.jsonl:17: the model cannot read it: absolute aspect ratio"),
        ({"image": "img/0.png"}, "images.jsonl:17: has no 'text'"),
        ({"image": "img/0.png", "caption": " "}, "images.jsonl:17: 'text' is empty"),
        ({"image": "img/0.png", "caption": 7}, "images.jsonl:17: 'text' must be text, not 7"),
        ({"caption": "x"}, "images.jsonl:17: has no 'image'"),
    ],
)
def test_mistakes_name_file_and_row(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    place = tmp_path / "data"
    place.mkdir()
    (place / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    (place / "loop.png").symlink_to("loop.png")
    vision.picture(place / "wide.png", 0, (1608, 8))
    vision.picture(tmp_path / "secret.png")
    write(place, [row])
    with pytest.raises(CuveeError) as caught:
        read(place)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "data"
    place.mkdir()
    vision.picture(tmp_path / "secret.png")
    (place / "link.png").symlink_to(tmp_path / "secret.png")
    write(place, [{"image": "link.png", "caption": "x"}])
    with pytest.raises(CuveeError, match="is not in the folder of its table"):
        read(place)


def test_broken_images_are_left_out_by_option_and_counted(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes((vision.picture(tmp_path / "whole.png")).read_bytes()[:60])
    write(tmp_path, [{"image": "broken.png", "caption": "x"}, {"image": "none.png", "caption": "y"}])
    found = read(tmp_path, ", skip_broken: true")
    assert len(found) == COUNT
    (note,) = found.notes
    assert note.startswith("images: 2 of 18 images cannot be read and are left out, first ")
    assert "images.jsonl:17: is no image that can be read" in note
    assert found.digest == read(tmp_path, ", skip_broken: true").digest  # from the cache


def test_an_image_under_several_names_is_one(tmp_path: Path) -> None:
    write(tmp_path, [{"image": "twin.png", "caption": "the twin"}])
    (tmp_path / "twin.png").write_bytes((tmp_path / "img" / "3.png").read_bytes())
    for found in (read(tmp_path), read(tmp_path)):
        assert found.rows[COUNT][0] == found.rows[3][0] and len({image for image, _, _ in found.rows}) == COUNT


def test_what_was_read_is_read_anew_where_an_image_has_changed(tmp_path: Path) -> None:
    write(tmp_path, [{"image": "late.png", "caption": "x"}])
    first = read(tmp_path, ", skip_broken: true")
    image = tmp_path / "img" / "3.png"
    before = os.stat(image)
    vision.picture(image, 99)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    second = read(tmp_path, ", skip_broken: true")
    assert second.digest != first.digest and len(second) == COUNT
    vision.picture(tmp_path / "late.png")  # what was broken is mended
    assert len(read(tmp_path, ", skip_broken: true")) == COUNT + 1
    image.unlink()
    with pytest.raises(CuveeError, match=r"images\.jsonl:4: there is no image 'img/3\.png'"):
        read(tmp_path)


def test_texts_without_a_token_or_with_an_images_mark_are_left_out_and_counted(tmp_path: Path) -> None:
    """A mark would be taken for an image of which there are no patches."""
    wrong = [
        {"image": "img/1.png", "caption": "<|endoftext|>"},
        {"image": "img/2.png", "caption": "a <|image_pad|> of a <|vision_start|>"},
        {"image": "img/3.png", "caption": "x", "question": "<|image_pad|>?"},
    ]
    write(tmp_path, wrong)
    found = read(tmp_path)
    what = "images: 3 of 19 texts have no token, or an image's mark for a word, and are left out, first that of 1.png"
    assert len(found) == COUNT and found.notes == (what,)
    table(tmp_path / "images.jsonl", wrong)
    with pytest.raises(CuveeError, match=r"config\.yml:3: all texts of the data set 'images' have no token, or"):
        read(tmp_path)


def test_a_model_of_texts_is_told_before_an_image_is_read(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path)
    config = parse("model: base\n" + ENTRY % "", "cocoa", str(tmp_path / "config.yml"))
    with pytest.raises(CuveeError, match=r"config\.yml:3: the model reads texts alone; take a vision–language model"):
        read_image_rows(config.images, replace(reader(), processor=None), tmp_path / "cache", 0, lambda *_: None)


def test_a_limit_draws_some_by_the_seed(tmp_path: Path) -> None:
    write(tmp_path)
    found = read(tmp_path, ", limit: 5")
    assert len(found) == 5 and len({image for image, _, _ in found.rows}) == 5


def hub(place: Path, images: list[int]) -> tuple[ImageSettings, ...]:
    """A folder that `datasets` reads, which holds the images."""
    datasets = pytest.importorskip("datasets")
    content = [{"bytes": (place / "img" / f"{number}.png").read_bytes(), "path": None} for number in images]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    columns = {"image": content, "text": [f"text {place}" for place in range(len(images))]}
    for folder in ("hub", "base"):
        (place / folder).mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(place / "hub" / "train.parquet")
    return parse("model: base\nimages: [{hub: hub}]\n", "cocoa", str(place / "config.yml")).images


def test_a_data_set_of_the_hubs_form_keeps_its_images_as_files(tmp_path: Path) -> None:
    write(tmp_path)
    entries = hub(tmp_path, [0, 1, 0])

    def read_hub(cache: str) -> ImageRows:
        (found,) = read_image_rows(entries, reader(), tmp_path / cache, 0, lambda what, done, total: None)
        return found

    found = read_hub("cache")
    assert [text for _, text, _ in found.rows] == ["text 0", "text 1", "text 2"]
    images = [image for image, _, _ in found.rows]
    assert [each.read_bytes() for each in images] == [(tmp_path / f"img/{n}.png").read_bytes() for n in (0, 1, 0)]
    assert images[2] == images[0] and sorted({*images}) == sorted(images[0].parent.glob("*.image"))
    (tmp_path / "cache").rename(tmp_path / "moved")
    assert all(image.is_relative_to(tmp_path / "moved") and image.is_file() for image, _, _ in read_hub("moved").rows)
    hub(tmp_path, [2, 1, 0])
    assert read_hub("moved").digest != found.digest


def test_a_data_set_of_the_hubs_form_names_no_file_but_its_own(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write(tmp_path)
    (tmp_path / "hub").mkdir()
    (tmp_path / "base").mkdir()
    inside = tmp_path / "hub" / "0.png"
    inside.write_bytes((tmp_path / "img" / "0.png").read_bytes())
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    config = parse("model: base\nimages: [{hub: hub}]\n", "cocoa", str(tmp_path / "config.yml"))

    def found(file: Path) -> int:
        row = {"image": [{"bytes": None, "path": str(file)}], "text": ["a text"]}
        datasets.Dataset.from_dict(row, features=features).to_parquet(tmp_path / "hub" / "train.parquet")
        (tables,) = read_image_rows(config.images, reader(), tmp_path / file.name, 0, lambda what, done, total: None)
        return len(tables)

    assert found(inside) == 1
    with pytest.raises(CuveeError, match=r"row 1: the image .*1\.png' is not in the folder of its data set"):
        found(tmp_path / "img" / "1.png")


@pytest.mark.parametrize(
    ("objective", "more", "said"),
    [
        ("llm-ql", "", "config.yml:2: llm-ql reads no images"),
        ("cocoa", "data: [{file: images.jsonl}]\n", "two data sets are named 'images'"),
    ],
)
def test_what_does_not_go_together_is_told_with_its_line(tmp_path: Path, objective: str, more: str, said: str) -> None:
    write(tmp_path)
    (tmp_path / "base").mkdir()
    with pytest.raises(CuveeError) as caught:
        parse("model: base\n" + ENTRY % "" + more, objective, str(tmp_path / "config.yml"))
    assert said in str(caught.value)


def test_a_run_on_images_and_texts_is_the_same_after_any_interruption(model: Path, tmp_path: Path) -> None:
    write(tmp_path)
    table(tmp_path / "pairs.jsonl", [{"query": f"number {n}", "positive": f"the {n}th"} for n in range(24)])
    (tmp_path / "config.yml").write_text(
        f"model: {model}\n" + ENTRY % "" + "data: [{file: pairs.jsonl}]\nbatch_size: 4\nmax_length: 24\nheld_out: 6\n"
        "learning_rate: 1.0e-3\nsave_every: 3\nwarm_up: {steps: 6}\nbridge: {steps: 6}\n",
        encoding="utf-8",
    )
    config = load(tmp_path / "config.yml", "cocoa")
    result = pretrain_run(config, tmp_path / "run")
    assert result["model"] == str(tmp_path / "run" / "model")
    assert (tmp_path / "run" / "model" / "preprocessor_config.json").is_file()  # images, see test_image_export
    lines = metrics(tmp_path / "run")
    assert any("patch_loss" in line for line in lines if line["stage"] == "warm_up")
    assert {"alignment", "rank"} <= lines[-1]["held_out"].keys()
    past = json.loads((tmp_path / "run" / "cuvee.json").read_text("utf-8"))
    assert past["data"]["images"]["rows"] == COUNT

    calls = 0

    def stop(what: str, done: int, total: int) -> None:
        nonlocal calls
        calls += what == "pretrain warm_up" and done == 4
        if what == "pretrain bridge" and done == 4 and calls == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain_run(config, tmp_path / "other", progress=stop)
    pretrain_run(config, tmp_path / "other")
    assert same_weights(tmp_path / "other" / "language_model", tmp_path / "run" / "language_model")
    assert metrics(tmp_path / "other") == lines
