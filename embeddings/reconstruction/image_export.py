"""What makes an embedding model of texts one of images too: its processor's files, a template, and what they may be mixed to.

sentence-transformers 5.4 and newer hands whatever it embeds to the processor's chat template as messages. The template that
is written here says what training saw: images first, then the text, and nothing around them; the tokenizer appends EOS.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from embeddings.reconstruction.images import ImageReader, image_reader
from embeddings.training import decoder
from merging.checkpoint import read_json
from merging.loading import only_our_words

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
#: Folder and class of each, by the names that both 5.4 and newer know.
_MODULES = (
    ("", "sentence_transformers.models.Transformer"),
    ("1_Pooling", "sentence_transformers.models.Pooling"),
    ("2_Normalize", "sentence_transformers.models.Normalize"),
)
_MODALITIES = ("text", "image", "image+text", "message")
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

model = SentenceTransformer("{name}")
model.encode(["a red heart", Image.open("heart.png"), {{"image": Image.open("heart.png"), "text": "what is it?"}}])
```
"""


def reads_images(language_model: Path) -> bool:
    """Whether the folder's model is one of images and texts, with the files of its processor."""
    return image_reader(language_model, read_json(language_model / "config.json"), None, "") is not None


def write_image_model(
    language_model: Path, out: Path, *, bidirectional: bool, longest: int, where: str, name: str
) -> None:
    """Writes a sentence-transformers folder of a vision–language model, file by file.

    Its own processor cannot be made without torchvision, which writing it does not need.

    Args:
        longest: tokens of a text at most; an image's come on top.
        where: the model's place in the configuration, for errors.
        name: what the card calls it.

    Raises:
        CuveeError: its architecture cannot look to both sides, or its tokenizer cannot append EOS.
    """
    import transformers
    from sentence_transformers.sentence_transformer.modules import Pooling

    config = read_json(language_model / "config.json")
    options = {"local_files_only": True}
    with only_our_words():
        model = transformers.AutoModel.from_pretrained(str(language_model), use_safetensors=True, **options).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(language_model), **options)
        reader = image_reader(language_model, config, tokenizer, where)
        assert reader is not None
        if bidirectional:
            decoder.make_bidirectional(SimpleNamespace(model=model), where)
        decoder.append_eos(tokenizer, where)
        tokenizer.padding_side = "right"
        tokenizer.chat_template = None
        out.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(out)
        reader.save_pretrained(out)
        # Where an image's tokens are cut nothing works.
        tokenizer.model_max_length = longest + most_tokens(out, reader.merge)
        tokenizer.save_pretrained(out)
        for folder, _ in _MODULES[1:]:
            (out / folder).mkdir()
        Pooling(model.config.get_text_config().hidden_size, "lasttoken").save(str(out / _MODULES[1][0]))
    _drop_own_template(out)
    how = {"method": "forward", "method_output_name": "last_hidden_state"}
    modalities: dict[str, Any] = dict.fromkeys(_MODALITIES, how)
    modalities["message"] = {**how, "format": "structured"}
    _write(
        out / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": modalities,
            "module_output_name": "token_embeddings",
            "unpad_inputs": False,  # its positions do not bear it
        },
    )
    _write(
        out / "modules.json",
        [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(_MODULES)],
    )
    (out / "chat_template.jinja").write_text(template(reader), encoding="utf-8")
    (out / "README.md").write_text(_CARD.format(kind=config.get("model_type"), name=name), encoding="utf-8")


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


def _drop_own_template(out: Path) -> None:
    """The model's, wherever it is written."""
    (out / "chat_template.json").unlink(missing_ok=True)
    file = out / "processor_config.json"
    if file.is_file():
        content = read_json(file)
        content.pop("chat_template", None)
        _write(file, content)


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
