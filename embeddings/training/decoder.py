"""Decoders as embedding models: EOS at the end, attention to both sides, texts without a chat template around them.

Each change is made where the folder's own files keep it (config.json, tokenizer.json, sentence_bert_config.json), so that
it holds when plain `SentenceTransformer(path)` loads the folder.
"""

from __future__ import annotations

import json
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
    module.model.config.get_text_config().is_causal = False  # of a vision–language model a part
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
        CuveeError: it has no EOS, or does not do it right, or forgets it when saved.
    """
    eos = tokenizer.eos_token
    if eos is None:
        raise CuveeError("its tokenizer has no EOS to append", where=where, mend="say 'append_eos: false'")
    before = tokenizer(_PROBE)["input_ids"]
    if before[-1:] == [tokenizer.eos_token_id]:
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        own = json.loads(backend.to_str())["post_processor"]
        backend.post_processor = _post_processor(_with_eos(own, eos, tokenizer.eos_token_id))
    wanted = [*before, tokenizer.eos_token_id]
    if not _gives(tokenizer, wanted) or not _gives(_saved_and_loaded(tokenizer), wanted):
        what = f"EOS cannot be appended by its tokenizer ({type(tokenizer).__name__})"
        raise CuveeError(what, where=where, mend="say 'append_eos: false'")


def _with_eos(own: dict[str, Any] | None, eos: str, eos_id: int) -> dict[str, Any]:
    """A post-processor as tokenizer.json has it, with EOS behind what it adds already.

    A template of its own behind another one would be wrong: the second takes what the first added for a text.
    """
    end = {"SpecialToken": {"id": eos, "type_id": 0}}
    token = {"id": eos, "ids": [eos_id], "tokens": [eos]}
    if own is not None and own["type"] == "TemplateProcessing":
        sides = {side: [*own[side], end] for side in ("single", "pair")}
        return {**own, **sides, "special_tokens": {**own["special_tokens"], eos: token}}
    if own is not None and own["type"] == "Sequence":
        *firsts, last = own["processors"]
        if last["type"] == "TemplateProcessing":
            return {**own, "processors": [*firsts, _with_eos(last, eos, eos_id)]}
        return {**own, "processors": [*own["processors"], _with_eos(None, eos, eos_id)]}
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    template = {
        "type": "TemplateProcessing",
        "single": [texts[0], end],
        "pair": [texts[0], end, texts[1], end],
        "special_tokens": {eos: token},
    }
    return template if own is None else {"type": "Sequence", "processors": [own, template]}


def _post_processor(content: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer, models

    carrier = json.loads(Tokenizer(models.WordLevel({}, unk_token="")).to_str())
    return Tokenizer.from_str(json.dumps({**carrier, "post_processor": content})).post_processor


def _gives(tokenizer: Any, ids: list[int]) -> bool:
    """Whether the probe becomes these ids, and its middle alone is lost where it is cut."""
    cut = tokenizer(_PROBE, truncation=True, max_length=len(ids) - 1)["input_ids"]
    return bool(tokenizer(_PROBE)["input_ids"] == ids and cut == [*ids[:-2], ids[-1]])


def _saved_and_loaded(tokenizer: Any) -> Any:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="cuvee-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)
