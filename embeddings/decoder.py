"""Decoders as embedding models: EOS at the end, attention to both sides, texts without a chat template around them.

Each change is made where the folder's own files keep it (config.json, tokenizer.json, sentence_bert_config.json), so that
it holds when plain `SentenceTransformer(path)` loads the folder.
"""

from __future__ import annotations

import tempfile
from typing import Any

from merging.errors import CuveeError

_PROBE = "a few words, and then some more"


def looks_ahead(module: Any) -> bool:
    """Whether a token's vector depends on the tokens after it; found out by trying, not by the architecture's name.

    Args:
        module: sentence-transformers' Transformer.
    """
    import torch

    model = module.model
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=model.device)  # ids that every vocabulary has
    before = model.training
    model.eval()
    with torch.inference_mode():
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True)[0]  # (2, 4, hidden)
    model.train(before)
    return not torch.allclose(hidden[0, 0], hidden[1, 0], atol=1e-6)


def make_bidirectional(module: Any, where: str) -> None:
    """Lets every token see all others, by `is_causal: false` in the model's config; nothing where it does already.

    Raises:
        CuveeError: the architecture does not heed it.
    """
    if looks_ahead(module):
        return
    module.model.config.is_causal = False
    if not looks_ahead(module):
        what = f"{type(module.model).__name__} cannot be made bidirectional with this version of transformers"
        raise CuveeError(what, where=where, mend="update transformers (5.2 or newer), or leave 'bidirectional' out")


def add_padding(module: Any, where: str) -> None:
    """Pads with EOS where the tokenizer has no token to pad with; what is padded is masked.

    Raises:
        CuveeError: it has no EOS either.
    """
    tokenizer = module.processor
    if tokenizer.eos_token is None:
        raise CuveeError("its tokenizer has no token to pad with", where=where, mend="give it a pad_token")
    tokenizer.pad_token = tokenizer.eos_token


def read_plain_texts(module: Any) -> None:
    """Texts as they are, where sentence-transformers would put them into the tokenizer's chat template.

    Padded on the right: on the left, as generation wants it, learned positions (GPT-2's) would begin with the padding.
    """
    module.processor.padding_side = "right"
    if "text" in module.modality_config and len(module.modality_config) > 1:
        module.modality_config = {"text": module.modality_config["text"]}
        module.input_formatter.supported_modalities = ["text"]


def append_eos(tokenizer: Any, where: str) -> None:
    """Ends every text with EOS, cut ones too; nothing where the tokenizer does so already.

    Raises:
        CuveeError: it has no EOS, or forgets it when saved.
    """
    eos = tokenizer.eos_token
    if eos is None:
        raise CuveeError("its tokenizer has no EOS to append", where=where, mend="say 'append_eos: false'")
    if _ends_with_eos(tokenizer):
        return
    from tokenizers.processors import Sequence, TemplateProcessing

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        end = TemplateProcessing(
            single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, tokenizer.eos_token_id)]
        )
        own = backend.post_processor
        backend.post_processor = end if own is None else Sequence([own, end])
    if not _ends_with_eos(tokenizer) or not _ends_with_eos(_saved_and_loaded(tokenizer)):
        what = f"EOS cannot be appended by its tokenizer ({type(tokenizer).__name__})"
        raise CuveeError(what, where=where, mend="say 'append_eos: false'")


def _ends_with_eos(tokenizer: Any) -> bool:
    return bool(tokenizer(_PROBE)["input_ids"][-1] == tokenizer.eos_token_id)


def _saved_and_loaded(tokenizer: Any) -> Any:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="cuvee-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)
