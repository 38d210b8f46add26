"""Small language models with random weights of the architectures that reconstruction is for, and rows for them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embeddings.reconstruction.model import Reconstructor

VOCABULARY = 64
PAD, BOS, EOS_ID, MASK, FIRST_WORD = 0, 1, 2, 3, 5
WORDS = [f"w{number}" for number in range(FIRST_WORD, VOCABULARY - 6)]
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS_ID,
    "initializer_range": 0.2,  # at the usual 0.02 random layers hardly move what goes through them
}
_QWEN2 = {key: value for key, value in _SIZES.items() if key != "head_dim"}
_GEMMA = {**_SIZES, "sliding_window": 4, "query_pre_attn_scalar": 8}
_VISION = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
_VISION_TOKENS = {
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}
_TEXT = {**_QWEN2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}

#: By name: classes of configuration and model in transformers, and the sizes.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _SIZES),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_SIZES, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _QWEN2),
    "qwen2-windows": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {**_QWEN2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_SIZES, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_GEMMA, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_GEMMA, "sliding_window_pattern": 2}),
    # Of these alone the logits tell where a sequence begins: rotary positions are relative.
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            **{name: _SIZES[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "initializer_range")},
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
        },
    ),
    "qwen2-vl": (
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": _TEXT,
            "vision_config": {**_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
            **_VISION_TOKENS,
        },
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": _TEXT,
            "vision_config": {
                **_VISION,
                "hidden_size": 32,
                "intermediate_size": 48,
                "out_hidden_size": 32,
                "window_size": 32,
                "fullatt_block_indexes": [1],
            },
            **_VISION_TOKENS,
        },
    ),
}
TEXT_MODELS = tuple(name for name in ARCHITECTURES if not name.endswith("-vl"))
#: Those with layers that see a few tokens only.
WINDOWED = ("mistral", "qwen2-windows", "gemma2", "gemma3")


def module(name: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """A model of transformers, in evaluation mode; Gemma 2 with eager attention always."""
    import transformers

    config_class, model_class, sizes = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**sizes)
    config._attn_implementation = "eager" if name == "gemma2" and attention == "sdpa" else attention
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, model_class)(config).eval()


def tokenizer(*, bos: bool = True, padding_side: str = "right") -> Any:
    """Words between white space; it adds BOS if it is to, and never EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": PAD, "<s>": BOS, "</s>": EOS_ID, "_": MASK, "<unk>": 4}
    backend = Tokenizer(
        models.WordLevel(special | {word: FIRST_WORD + i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side=padding_side,
    )


def reconstructor(name: str, attention: str = "sdpa", *, dtype: str = "float32", side: str = "right") -> Reconstructor:
    """A small model of the architecture, to be trained on: a copy of one that is made and tried out once."""
    return copy.deepcopy(_reconstructor(name, attention, dtype, side))


@functools.cache
def _reconstructor(name: str, attention: str, dtype: str, side: str) -> Reconstructor:
    return Reconstructor(module(name, attention), tokenizer(padding_side=side), dtype=dtype, base=name)


def folder(name: str, path: Path) -> Path:
    """Model and tokenizer as a checkpoint."""
    module(name).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def texts(count: int, seed: int = 0, low: int = 2, high: int = 9) -> list[str]:
    """Texts of random words of the tokenizer's."""
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(low, high))) for _ in range(count)]


def words(ids: Sequence[int]) -> list[str]:
    """The words of ids that are words."""
    return [WORDS[number - FIRST_WORD] for number in ids if number >= FIRST_WORD]
