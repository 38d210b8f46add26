"""Export: a pre-trained language model as an embedding model, a folder that plain `SentenceTransformer(folder)` loads.

It pools its last token, the EOS that its tokenizer appends to every text, to length one, and attends as it was trained to:
`is_causal: false` in its config.json where that was to both sides. No code goes along; transformers heeds the setting from 5.2.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from embeddings.training import backbone, decoder
from embeddings.training.config import ModelSettings
from embeddings.training.data_settings import SIDES
from merging import lineage
from merging.errors import CuveeError
from merging.output import staged

if TYPE_CHECKING:
    from embeddings.reconstruction.model import Reconstructor

#: What a model of texts says of itself; `{attention}`: where a token looks, and what that needs.
_CARD = """\
---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, sentence-similarity, feature-extraction]
---
Embeds texts: the last token's state, EOS, at length one. {attention}

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
model.encode(["a text", "another"])
```
"""
_BOTH_SIDES = """Every token sees all others, by `is_causal: false` in config.json, which transformers heeds from 5.2 on and
overlooks before, without a word:

    pip install sentence-transformers "transformers>=5.2"
"""
_CAUSAL = "A token sees those before it."


def check_export(model: Reconstructor, *, bidirectional: bool, where: str) -> None:
    """Finds before a training what `write_embedding_model` would find behind it; the model stays as it is.

    Raises:
        CuveeError: its architecture cannot look to both sides by its configuration, or its tokenizer cannot append EOS.
    """
    try:
        decoder.append_eos(copy.deepcopy(model.tokenizer), where)
    except CuveeError as error:
        raise CuveeError(error.what, where=where, mend="take another model or tokenizer") from None
    if not bidirectional:
        return
    settings = vars(model.module.config.get_text_config())
    try:
        decoder.make_bidirectional(SimpleNamespace(model=model.module.base_model), where)
    except Exception as error:  # every architecture has its own ways to fail
        reason = error.what if isinstance(error, CuveeError) else f"{type(error).__name__}: {error!s:.120}"
        what = f"would be written with a causal mask again ({reason})"
        raise CuveeError(what, where=where, mend="take another model, or run `cuvee pretrain llm-ql`") from error
    finally:
        settings.pop("is_causal", None)


def write_embedding_model(
    language_model: Path,
    out: Path,
    settings: ModelSettings,
    *,
    bidirectional: bool,
    max_length: Mapping[str, int],
    content: Mapping[str, Any],
    force: bool = False,
) -> None:
    """Writes the embedding model of a language model's folder.

    Args:
        settings: of the model that the pre-training began with.
        max_length: tokens by side; the folder reads texts up to the longer of them.
        content: of its cuvee.json.

    Raises:
        CuveeError: its architecture cannot look to both sides, or its tokenizer cannot append EOS.
    """
    longest, where = max(max_length[side] for side in SIDES), settings.where or "model"
    plain = replace(
        settings,
        path=str(language_model),
        revision=None,
        pooling="lasttoken",
        normalize=True,
        bidirectional=bidirectional,
        append_eos=True,
        dtype="float32",
        lora=None,
        gradient_checkpointing=False,
    )
    opened = backbone.open_backbone(plain, max_length=max_length, device="cpu", where=where)
    own = opened.transformer.max_seq_length
    opened.transformer.max_seq_length = longest if own is None else min(own, longest)
    with staged(out, force=force) as staging:
        opened.save(staging)
        if opened.images is None:  # else it has one already
            card = _CARD.format(attention=_BOTH_SIDES if bidirectional else _CAUSAL, name=out.name)
            (staging / "README.md").write_text(card, encoding="utf-8")
        lineage.write(staging, content)


def linked_copy(folder: Path, out: Path, *, force: bool = False) -> None:
    """A copy of a folder whose weights take no room where the disk can link files."""
    with staged(out, force=force) as staging:
        shutil.copytree(folder, staging, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> str:
    if source.endswith(".safetensors"):  # all else people may edit by hand
        with suppress(OSError):
            os.link(source, target)
            return target
    return str(shutil.copy2(source, target))
