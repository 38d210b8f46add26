"""Tiny vision–language models of Qwen2-VL's shape with tokenizer and image processor, and pictures for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

KINDS = ("Qwen2VL", "Qwen2_5_VL")
CAPTIONS = ("a red square", "a green square", "a blue one, and words behind it")
_SPECIAL = ("<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "_")
_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}
_VISION: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "hidden_size": 32}
_OF_KIND: dict[str, dict[str, Any]] = {
    "Qwen2VL": {"embed_dim": 32, "mlp_ratio": 2},
    "Qwen2_5_VL": {
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    },
}


def tokenizer() -> Any:
    """Bytes and the special tokens; pads and ends with <|endoftext|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(_SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    own.train_from_iterator(CAPTIONS, trainer)
    end = _SPECIAL[0]
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token=end, pad_token=end, padding_side="right")


def vision_model(folder: Path, kind: str = "Qwen2VL", side: int = 32) -> Path:
    """Writes a model of random weights; `side` pixels on either side of a square image."""
    pytest.importorskip("PIL", reason="needs Pillow: pip install 'cuvee[images]'")
    import torch
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    texts = tokenizer()
    ids = dict(
        zip(
            ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
            texts.convert_tokens_to_ids(list(_SPECIAL[1:5])),
            strict=True,
        )
    )
    text = {**_TEXT, "vocab_size": len(texts), "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": None}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config={**_VISION, **_OF_KIND[kind]}, tie_word_embeddings=True, **ids
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    texts.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=8, size={"shortest_edge": side * side, "longest_edge": side * side}
    ).save_pretrained(folder)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def picture(file: Path, seed: int = 0, size: tuple[int, int] = (32, 32)) -> Path:
    """Writes an image of random colours in squares of eight pixels."""
    pillow = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'cuvee[images]'")
    rough = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    pillow.fromarray(rough.repeat(8, 0).repeat(8, 1)).save(file)
    return file
