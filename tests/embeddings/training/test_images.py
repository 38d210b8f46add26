"""Images in contrastive training: vectors against a mask of ours and by hand, gradients, runs, core sets, updates, mistakes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from embeddings.images.text import ImageText
from embeddings.model import open_model
from embeddings.reconstruction.config import load as load_pretraining
from embeddings.reconstruction.measure import embed
from embeddings.reconstruction.model import open_reconstructor
from embeddings.reconstruction.objective import Example
from embeddings.reconstruction.run import pretrain_run
from embeddings.training import step
from embeddings.training.backbone import Backbone, open_backbone
from embeddings.training.bag import train_run
from embeddings.training.batch import build_batch, objectives
from embeddings.training.config import ModelSettings, TrainingConfig, load
from embeddings.training.image_sets import ImageTable
from embeddings.training.schedule import Part
from embeddings.training.update import update_model
from merging.errors import CuveeError
from tests.embeddings.reconstruction import vision
from tests.embeddings.runs import metrics, opened, same_weights, sets_of, table, weights

pytest.importorskip("PIL", reason="needs Pillow: pip install 'cuvee[images]'")

LENGTHS = {"query": 24, "document": 24}
SIZES = ((32, 32), (48, 32), (16, 48))
COUNT = 12
ENTRY = "images: [{file: images.jsonl, loss: {name: infonce, symmetric: true, temperature: 0.1}}]\n"
SHORT = "batch_size: 6\nmax_length: 24\nlearning_rate: 1.0e-3\n"


@pytest.fixture(scope="module", params=vision.KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.vision_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.vision_model(tmp_path_factory.mktemp("one"))


def write(place: Path, rows: list[dict[str, Any]] | None = None, start: int = 0) -> Path:
    """A table of images of several shapes with captions; every other one has a question too, and one image comes twice."""
    (place / "img").mkdir(parents=True, exist_ok=True)
    own: list[dict[str, Any]] = []
    for number in range(start, start + COUNT):
        vision.picture(place / "img" / f"{number}.png", number, SIZES[number % 3])
        asked = {"question": "what is it?"} if number % 2 else {}
        own.append({"image": f"img/{number}.png", "caption": f"the picture number {number}", **asked})
    own[5] |= {"image": f"img/{start + 3}.png"}
    table(place / "images.jsonl", [*own, *(rows or [])])
    return place


def config_of(place: Path, model: Path, more: str = "steps: 4\n", entry: str = ENTRY) -> TrainingConfig:
    said = f"model: {{path: {model}, bidirectional: true, pooling: lasttoken}}\n"
    (place / "config.yml").write_text(said + entry + SHORT + more, encoding="utf-8")
    return load(place / "config.yml")


def pictured(backbone: Backbone, image: Path, words: str = "") -> ImageText:
    assert backbone.images is not None
    (ids,) = backbone.tokenize([words], "query")
    before = backbone.images.ids(backbone.images.tokens(backbone.images.read(image)))
    return ImageText(np.array([*before, *ids], np.int32), image)


def mixed(backbone: Backbone, place: Path) -> list[Any]:
    """Texts, images, and images with texts, of several lengths."""
    texts = [np.array(ids, np.int32) for ids in backbone.tokenize(["a red square", "blue"], "document")]
    images = [vision.picture(place / f"{size}.png", 1, size) for size in SIZES]
    asked = pictured(backbone, images[0], "what is it?")
    return [texts[0], pictured(backbone, images[1]), asked, texts[1], pictured(backbone, images[2])]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_vectors_are_those_of_a_reconstruction_with_a_mask_of_ours(
    base: Path, tmp_path: Path, bidirectional: bool, left: bool
) -> None:
    settings = ModelSettings(str(base), pooling="lasttoken", bidirectional=bidirectional)
    backbone = open_backbone(settings, max_length=LENGTHS, device="cpu")
    backbone._pad_left = left
    texts = mixed(backbone, tmp_path)
    model = open_reconstructor(ModelSettings(str(base)))
    reader = model.reader()
    words = ["a red square", "", "what is it?", "blue", ""]
    files = [own.image if isinstance(own, ImageText) else None for own in texts]
    examples = [Example(ids, image=image) for ids, image in zip(reader.ids(words), files, strict=True)]
    pattern = "bidirectional" if bidirectional else "causal"
    with torch.inference_mode():
        wanted = embed(model, examples, reader, pattern)
        torch.testing.assert_close(backbone.vectors(texts), wanted, atol=2e-5, rtol=1e-4)
        alone = torch.cat([backbone.vectors([own]) for own in texts])
    torch.testing.assert_close(alone, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("model", ["base", "out"])
def test_texts_are_embedded_without_torchvision_as_in_training(base: Path, tmp_path: Path, model: str) -> None:
    """By `cuvee evaluate`, and while it is trained; of the plain model and of what training saves."""
    settings = ModelSettings(str(base), pooling="lasttoken", bidirectional=True)
    backbone = open_backbone(settings, max_length=LENGTHS, device="cpu")
    texts = ["a red square", "a blue one, and words behind it"]
    with torch.inference_mode():
        wanted = backbone.vectors([np.array(ids, np.int32) for ids in backbone.tokenize(texts, "query")]).numpy()
    if model == "base":
        found = backbone.transformer.encode(texts)
    else:
        backbone.save(tmp_path / "out")
        found = open_model(tmp_path / "out").transformer.encode(texts)
        again = open_backbone(ModelSettings(str(tmp_path / "out")), max_length=LENGTHS, device="cpu")
        image = vision.picture(tmp_path / "a.png")
        with torch.inference_mode():
            both = [own.vectors([pictured(own, image, "what?")]) for own in (backbone, again)]
        assert torch.equal(*both)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_is_saved_reads_images_in_plain_sentence_transformers(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="transformers' processor of Qwen2-VL needs torchvision")
    from PIL import Image
    from sentence_transformers import SentenceTransformer

    backbone = open_backbone(ModelSettings(str(base), pooling="lasttoken"), max_length=LENGTHS, device="cpu")
    backbone.save(tmp_path / "out")
    file = vision.picture(tmp_path / "a.png", 3, (48, 32))
    with Image.open(file) as image:
        found = SentenceTransformer(str(tmp_path / "out")).encode([{"image": image.convert("RGB"), "text": "what?"}])
    with torch.inference_mode():
        np.testing.assert_allclose(found, backbone.vectors([pictured(backbone, file, "what?")]).numpy(), atol=0.02)


def test_gradients_are_those_of_all_texts_at_once_with_a_cache_or_without(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the vision tower too; and against each image embedded alone, padded by nothing."""
    config = config_of(write(tmp_path), base)
    sets = sets_of(config, tmp_path / "cache")
    goals = objectives(config, sets)
    batch = build_batch([Part(0, np.arange(COUNT))], sets, goals)
    assert sum(isinstance(own, ImageText) for own in batch.tokens) == COUNT - 1
    backbone = opened(config)
    vectors = torch.cat([backbone.vectors([own]) for own in batch.tokens])
    (part,) = batch.parts
    loss = goals[0].loss(vectors[part.queries], vectors[part.candidates], part.targets("cpu"))
    loss.backward()

    def taken() -> dict[str, torch.Tensor]:
        found = {name: value.grad for name, value in backbone.named_parameters() if value.grad is not None}
        for value in backbone.parameters():
            value.grad = None
        return found

    wanted = taken()
    assert any("visual" in name and float(each.norm()) > 0 for name, each in wanted.items())
    for cache in (0, 40):
        monkeypatch.setattr(step, "CPU_CHUNK", 60)
        found, _ = step.loss_and_gradient(backbone, batch, goals, seed=0, cache_tokens=cache)
        torch.testing.assert_close(found, loss.detach(), atol=1e-5, rtol=1e-5)
        gradients = taken()
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], atol=2e-5, rtol=1e-3, msg=name)


def test_rows_are_images_with_what_stands_behind_them_and_a_text(one: Path, tmp_path: Path) -> None:
    (found,) = sets_of(config_of(write(tmp_path), one), tmp_path / "cache")
    images = found.query_tokens
    assert isinstance(images, ImageTable) and (len(found), len(images)) == (COUNT, COUNT - 1)
    assert found.queries[5] == found.queries[3]  # one image, asked the same
    words, reader = vision.tokenizer(), images._reader
    for row in (2, 3):
        own = images[int(found.queries[row])]
        marks = (own.ids == words.convert_tokens_to_ids("<|image_pad|>")).sum()
        assert own.image.name == f"{row}.png" and marks == reader.tokens(reader.read(own.image))
        assert words.decode(own.ids[marks + 2 : -1]) == ("what is it?" if row % 2 else "") and own.ids[-1] == 0
        assert found.document_tokens.text(int(found.positives[row][0])) == f"the picture number {row}"
    assert images.lengths.tolist() == [len(images[i]) for i in range(len(images))]
    (again,) = sets_of(config_of(tmp_path, one), tmp_path / "cache")
    assert again.digest == found.digest and np.array_equal(again.queries, found.queries)


@pytest.mark.parametrize("name", ["jpg", "png", "webp", "tif", "gif"])
def test_a_picture_of_a_camera_is_upright_and_has_as_many_tokens_as_are_read(
    one: Path, tmp_path: Path, name: str
) -> None:
    from PIL import Image

    write(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right
    with Image.open(vision.picture(tmp_path / "lying.png", 5, (16, 64))) as image:
        more = {} if name == "gif" else {"exif": turned}
        image.save(tmp_path / f"turned.{name}", lossless=True, quality=100, **more)
        wanted = image.convert("RGB") if name == "gif" else image.transpose(Image.Transpose.ROTATE_270)
    table(tmp_path / "images.jsonl", [{"image": f"turned.{name}", "caption": "a tower"}])
    (found,) = sets_of(config_of(tmp_path, one), tmp_path / "cache")
    images = found.query_tokens
    assert isinstance(images, ImageTable)
    reader, own = images._reader, images[0]
    read = reader.read(own.image)
    assert (own.ids == reader.image_id).sum() == reader.tokens(read)
    alike = reader.picture(wanted)
    assert read.grid == alike.grid
    np.testing.assert_allclose(read.pixels, alike.pixels, atol=1.5 if name in ("jpg", "gif") else 1e-6)


def test_a_run_on_images_and_texts_is_the_same_after_an_interruption_and_learns(one: Path, tmp_path: Path) -> None:
    write(tmp_path)
    table(tmp_path / "pairs.jsonl", [{"query": f"number {n}", "positive": f"the {n}th"} for n in range(COUNT)])
    config = config_of(tmp_path, one, "steps: 40\nsave_every: 5\ndata: [{file: pairs.jsonl}]\ncore: 50\n")
    result = train_run(config, tmp_path / "run")
    told = [line["losses"] for line in metrics(tmp_path / "run" / "model")]
    assert told[-1]["images"] < 0.7 * told[0]["images"]

    def stop(what: str, done: int, total: int) -> None:
        if done == 12 and what.startswith("train"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(config, tmp_path / "other", progress=stop)
    train_run(config, tmp_path / "other")
    assert same_weights(tmp_path / "other" / "model", tmp_path / "run" / "model")
    assert metrics(tmp_path / "other" / "model") == metrics(tmp_path / "run" / "model")
    assert result["cost"] == 40 * 6
    settings = json.loads((tmp_path / "run" / "model" / "sentence_bert_config.json").read_text("utf-8"))
    assert settings["modality_config"].keys() == {"text", "image", "image+text", "message"}


@pytest.fixture(scope="module")
def trained(one: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run in `run`, whose images are gone."""
    place = tmp_path_factory.mktemp("trained")
    train_run(config_of(write(place), one, "steps: 4\ncore: 50\nbags: [50, 100]\n"), place / "run")
    shutil.rmtree(place / "img")
    yield place
    shutil.rmtree(place)


def test_the_core_set_is_complete_in_itself(trained: Path, one: Path) -> None:
    core = trained / "run" / "core"
    entry = yaml.safe_load((core / "data.yml").read_text("utf-8"))["images"]
    assert [each["file"] for each in entry] == ["images.jsonl.gz"] and entry[0]["loss"]["symmetric"] is True
    (core / "config.yml").write_text(f"model: {one}\nimages: {json.dumps(entry)}\n{SHORT}", "utf-8")
    (found,) = sets_of(load(core / "config.yml"), trained / "cache")
    with np.load(core / "rows.npz") as rows:
        numbers = rows["images"].tolist()
    captions = [found.document_tokens.text(int(own[0])) for own in (found.positives[row] for row in range(len(found)))]
    assert captions == [f"the picture number {number}" for number in numbers]
    (core / "config.yml").unlink()


def test_an_update_learns_new_images_and_keeps_the_old_core(trained: Path, tmp_path: Path) -> None:
    write(tmp_path, start=20)
    (tmp_path / "new.yml").write_text("images: [{file: images.jsonl}]\n", "utf-8")
    result = update_model(trained / "run", tmp_path / "new.yml", tmp_path / "updated")
    past = json.loads((tmp_path / "updated" / "members" / "update" / "cuvee.json").read_text("utf-8"))
    assert {name: own["rows"] for name, own in past["made_by"]["data"].items()} == {"images": 6, "images-2": COUNT}
    assert np.isfinite(np.concatenate([each.ravel() for each in weights(Path(result["model"])).values()])).all()
    names = [
        each["name"]
        for each in yaml.safe_load((tmp_path / "updated" / "core" / "data.yml").read_text("utf-8"))["images"]
    ]
    assert names == ["images", "images-2"]


def test_cocoa_ends_in_contrastive_training_on_its_images(one: Path, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "config.yml").write_text(
        f"model: {one}\nimages: [{{file: images.jsonl}}]\nbatch_size: 4\nmax_length: 24\nheld_out: 2\n"
        "warm_up: {steps: 2}\nbridge: {steps: 2}\ncontrastive: {steps: 3, batch_size: 4, gradient_cache: 64, core: 0}\n",
        encoding="utf-8",
    )
    config = load_pretraining(tmp_path / "config.yml", "cocoa")
    assert config.contrastive is not None and [own.data.name for own in config.contrastive.images] == ["images"]
    result = pretrain_run(config, tmp_path / "run")
    assert result["contrastive"]["steps"] == 3
    out = Path(result["model"])
    assert "torchvision" in (out / "README.md").read_text("utf-8")
    backbone = open_backbone(ModelSettings(str(out)), max_length=LENGTHS, device="cpu")
    first = open_backbone(ModelSettings(str(tmp_path / "run" / "model")), max_length=LENGTHS, device="cpu")
    image = vision.picture(tmp_path / "a.png")
    with torch.inference_mode():
        both = [own.vectors([pictured(own, image)]) for own in (first, backbone)]
    assert float((both[0] - both[1]).abs().max()) > 1e-4  # it has learned


def test_a_contrastive_stage_reads_its_own_images_before_anything_is_trained(one: Path, tmp_path: Path) -> None:
    write(tmp_path, [{"image": "img/none.png", "caption": "x"}])
    table(tmp_path / "whole.jsonl", [{"image": "img/0.png", "caption": f"number {n}"} for n in range(8)])
    (tmp_path / "config.yml").write_text(
        f"model: {one}\nimages: [{{file: whole.jsonl}}]\nbatch_size: 4\nmax_length: 24\nwarm_up: {{steps: 2}}\n"
        "bridge: {steps: 2}\ncontrastive: {steps: 2, images: [{file: images.jsonl}]}\n",
        encoding="utf-8",
    )
    config = load_pretraining(tmp_path / "config.yml", "cocoa")
    with pytest.raises(CuveeError, match=r"images\.jsonl:13: there is no image 'img/none\.png'"):
        pretrain_run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


def test_a_contrastive_stage_with_images_of_a_model_of_texts_is_told_before_anything_is_trained(
    one: Path, tmp_path: Path
) -> None:
    write(tmp_path)
    shutil.copytree(one, tmp_path / "model", ignore=shutil.ignore_patterns("preprocessor_config.json"))
    table(tmp_path / "pairs.jsonl", [{"query": f"number {n}", "positive": f"the {n}th"} for n in range(COUNT)])
    (tmp_path / "config.yml").write_text(
        "model: model\ndata: [{file: pairs.jsonl}]\nbatch_size: 4\nmax_length: 24\nwarm_up: {steps: 2}\n"
        "bridge: {steps: 2}\ncontrastive: {steps: 2, images: [{file: images.jsonl}]}\n",
        encoding="utf-8",
    )
    with pytest.raises(CuveeError, match=r"config\.yml:7: the model reads texts alone"):
        pretrain_run(load_pretraining(tmp_path / "config.yml", "cocoa"), tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


def test_texts_with_an_images_mark_are_left_out_and_counted(one: Path, tmp_path: Path) -> None:
    wrong = [
        {"image": "img/1.png", "caption": "a <|image_pad|> of it"},
        {"image": "img/2.png", "caption": "x", "question": "<|vision_start|>?"},
    ]
    (found,) = sets_of(config_of(write(tmp_path, wrong), one), tmp_path / "cache")
    what = "images: 2 of 14 texts have an image's mark for a word, and are left out, first that of 1.png"
    assert len(found) == COUNT and found.notes == (what,)


def test_a_model_of_texts_is_told_before_an_image_is_read(minilm: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(f"model: {minilm}\n{ENTRY}{SHORT}", "utf-8")
    write(tmp_path, [{"image": "img/none.png", "caption": "x"}])
    with pytest.raises(CuveeError, match=r"config\.yml:2: the model reads texts alone; take a vision–language model"):
        train_run(load(tmp_path / "config.yml"), tmp_path / "run")


def test_a_template_that_adds_texts_is_refused(one: Path, tmp_path: Path) -> None:
    backbone = open_backbone(ModelSettings(str(one)), max_length=LENGTHS, device="cpu")
    backbone.save(tmp_path / "out")
    file = tmp_path / "out" / "chat_template.jinja"
    file.write_text("Represent: " + file.read_text("utf-8"), encoding="utf-8")
    with pytest.raises(CuveeError, match="puts texts of its own around what it embeds") as caught:
        open_backbone(ModelSettings(str(tmp_path / "out")), max_length=LENGTHS, device="cpu")
    assert str(tmp_path / "out") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("data: [{file: images.jsonl}]\n", "two data sets are named 'images'"),
        ("images: [{file: none.jsonl}]\n", "config.yml:2: no such file: none.jsonl"),
        ("images: [{file: images.jsonl, mine: {}}]\n", "config.yml:2: 'mine' is no key of a data set of images"),
        ("images: [{file: images.jsonl, loss: nothing}]\n", "config.yml:2: no loss 'nothing'"),
        ("images: [{file: images.jsonl, loss: cosent}]\n", "config.yml:2: the loss 'cosent' needs scores"),
    ],
)
def test_what_cannot_be_is_told_at_its_line(one: Path, tmp_path: Path, more: str, said: str) -> None:
    write(tmp_path)
    entry = "" if more.startswith("images") else ENTRY
    with pytest.raises(CuveeError) as caught:
        config_of(tmp_path, one, "" if not entry else more, entry or more)
    assert said in str(caught.value)


def test_runs_without_images_are_the_runs_that_they_were(one: Path, tmp_path: Path) -> None:
    config = config_of(write(tmp_path), one)
    assert "images" in config.plain()
    assert "images" not in replace(config, images=()).plain()
