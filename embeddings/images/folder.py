"""The folder of an embedding model of images and texts: what is written into it, and how it is opened for texts alone.

sentence-transformers 5.4 and newer hands whatever it embeds to the processor's chat template as messages. The template that
is written here says what training saw: images first, then the text, and nothing around them; the tokenizer appends EOS.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from embeddings.images.reader import PROCESSOR_FILES, ImageReader, image_reader
from merging.checkpoint import read_json
from merging.errors import CuveeError

_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content if part.type == 'image' -%}
{{- 'IMAGE' -}}
{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}
{{- part.text -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""
_MODALITIES = ("text", "image", "image+text", "message")
_TEMPLATE_FILE, _SETTINGS = "chat_template.jinja", "sentence_bert_config.json"
_CARD = """\
---
library_name: sentence-transformers
pipeline_tag: feature-extraction
tags: [sentence-transformers, image-feature-extraction]
---
Embeds texts, images, and images with texts into one space. Its processor is that of {kind}, which needs one line more:

    pip install "sentence-transformers[image]" "transformers>=5.2" torchvision

```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
model.encode(["a red heart", Image.open("heart.png"), {{"image": Image.open("heart.png"), "text": "what is it?"}}])
```
"""


def reads_images(folder: Path) -> bool:
    """Whether the folder's model is one of images and texts, with the files of its processor."""
    return reader_of(folder, None, "") is not None


def reader_of(folder: Path, tokenizer: Any, base: str) -> ImageReader | None:
    """`image_reader` of a folder; None too where it has no config.json."""
    file = folder / "config.json"
    return image_reader(folder, read_json(file), tokenizer, base) if file.is_file() else None


def refuse_other_template(folder: Path, ref: str) -> None:
    """Raises CuveeError of an embedding model of images whose template is not the one that is written here."""
    if reads_images(folder) and _adds_texts(folder):
        what = "puts texts of its own around what it embeds, by its chat template, which is not supported"
        raise CuveeError(what, where=ref, mend="take the plain vision–language model that it was made from")


@contextmanager
def as_texts(folder: Path) -> Iterator[Path]:
    """The folder; of a model of images and texts, for a while one of links in which it is a model of texts alone.

    Its own processor cannot be made without torchvision, and is not needed for texts, nor for images that `ImageReader`
    reads. In that folder sentence-transformers finds a tokenizer in its place. One whose template adds to its texts stays
    as it is.
    """
    if not reads_images(folder) or _adds_texts(folder):
        yield folder
        return
    with TemporaryDirectory(prefix="cuvee-texts-") as scratch:
        view = Path(scratch)
        for entry in folder.iterdir():
            if entry.name not in (*PROCESSOR_FILES, _SETTINGS):
                os.symlink(entry.resolve(), view / entry.name)
        _write(view / "processor_config.json", {"processor_class": "AutoTokenizer"})
        if (folder / _SETTINGS).is_file():
            settings = read_json(folder / _SETTINGS)
            texts = {"text": settings["modality_config"]["text"]}
            _write(view / _SETTINGS, {**settings, "modality_config": texts})
        yield view


def add_images(folder: Path, reader: ImageReader, longest: int) -> None:
    """Makes a sentence-transformers folder of a model of texts one of images and texts, and says in its card how to use it.

    Args:
        longest: tokens of a text at most; an image's come on top.
    """
    reader.save_processor(folder)
    (folder / "chat_template.json").unlink(missing_ok=True)
    _without(folder / "processor_config.json", "chat_template")
    (folder / _TEMPLATE_FILE).write_text(template(reader), encoding="utf-8")
    # Where an image's tokens are cut nothing works.
    words = read_json(folder / "tokenizer_config.json")
    words.pop("chat_template", None)
    _write(folder / "tokenizer_config.json", {**words, "model_max_length": longest + most_tokens(folder, reader.merge)})
    settings = read_json(folder / _SETTINGS)
    how = settings["modality_config"]["text"]
    modalities: dict[str, Any] = dict.fromkeys(_MODALITIES, how)
    modalities["message"] = {**how, "format": "structured"}
    plain = {key: value for key, value in settings.items() if key != "max_seq_length"}
    plain["unpad_inputs"] = False  # its positions do not bear it
    _write(folder / _SETTINGS, {**plain, "modality_config": modalities})
    kind = read_json(folder / "config.json").get("model_type")
    (folder / "README.md").write_text(_CARD.format(kind=kind), encoding="utf-8")


def template(reader: ImageReader) -> str:
    """The chat template, with the model's own marks of an image."""
    marks = reader.tokenizer.convert_ids_to_tokens([reader.start_id, reader.image_id, reader.end_id])
    return _TEMPLATE.replace("IMAGE", "".join(marks))


def most_tokens(folder: Path, merge: int) -> int:
    """How many tokens an image can have."""
    found: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            own = read_json(folder / name)
            found |= own.get("image_processor", own)
    size = found.get("size") or {}
    pixels = int(found.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280)  # Qwen2-VL's
    return pixels // (int(found.get("patch_size", 14)) * merge) ** 2 + 2


def _adds_texts(folder: Path) -> bool:
    """Whether it is an embedding model by another template than ours; the marks of an image are the model's own."""
    if not (folder / "modules.json").is_file():
        return False
    before, after = _TEMPLATE.split("IMAGE")
    file = folder / _TEMPLATE_FILE
    own = file.read_text(encoding="utf-8") if file.is_file() else ""
    return not (own.startswith(before) and own.endswith(after))


def _without(file: Path, key: str) -> None:
    if file.is_file():
        content = read_json(file)
        content.pop(key, None)
        _write(file, content)


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
