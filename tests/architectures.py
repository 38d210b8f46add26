"""The zoo: small checkpoints of real architectures, a base and specialists of one lineage, with random weights.

Real classes and configurations of transformers, so names, shapes, tied weights and buffers are what users have; only
the sizes are tiny. `build(name, folder, seed)` writes them, `ARCHITECTURES` says what there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 64
WIDTH = 32


@dataclass(frozen=True)
class Architecture:
    """One entry of the zoo.

    name: unique, as people speak of it.
    config: name of the configuration class in transformers.
    model: name of the model class in transformers.
    sizes: arguments of the configuration.
    dtype: in which the checkpoints are stored.
    forward: makes the inputs of a cheap forward pass, or None where it is not cheap.
    declared: `architectures` to write into config.json when that is not the class saved (Qwen3-Embedding's way).
    """

    name: str
    config: str
    model: str
    sizes: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    forward: Callable[[], dict[str, torch.Tensor]] | None = None
    declared: str | None = None

    def model_class(self) -> Any:
        import transformers

        return getattr(transformers, self.model)

    def new(self, seed: int) -> Any:
        """A model with random weights."""
        import transformers

        config = getattr(transformers, self.config)(**self.sizes)
        torch.manual_seed(seed)
        return self.model_class()(config).eval()


@dataclass(frozen=True)
class Family:
    """What `build` wrote: folders of the base and of its specialists."""

    architecture: Architecture
    base: Path
    specialists: tuple[Path, ...]


def build(name: str, folder: Path, seed: int = 0, specialists: int = 3, spread: float = 0.02) -> Family:
    """Write `folder/base` and `folder/specialist0…`: the base plus normal noise of standard deviation `spread`.

    Tied weights stay tied, buffers stay as they are. Integer tensors, were there any, are equal in all of them.
    """
    architecture = ARCHITECTURES[name]
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.random.fork_rng():
        model = architecture.new(seed).to(architecture.dtype)
    start = {key: value.detach().clone() for key, value in model.named_parameters()}  # tied weights are listed once

    def save(path: Path) -> Path:
        model.save_pretrained(path)
        if architecture.declared:
            config = path / "config.json"
            config.write_text(config.read_text().replace(f'"{architecture.model}"', f'"{architecture.declared}"'))
        return path

    base = save(folder / "base")
    paths = []
    for i in range(specialists):
        with torch.no_grad():
            for key, value in model.named_parameters():
                value.copy_(start[key] + spread * torch.randn(value.shape, generator=generator))
        paths.append(save(folder / f"specialist{i}"))
    return Family(architecture, base, tuple(paths))


# ---- inputs of a forward pass ----


def _tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 2]])}


def _encoder_decoder() -> dict[str, torch.Tensor]:
    return {**_tokens(), "decoder_input_ids": torch.tensor([[3, 4, 5]])}


def _image_and_text() -> dict[str, torch.Tensor]:
    return {**_tokens(), "pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)}


def _speech() -> dict[str, torch.Tensor]:
    features = torch.linspace(-1, 1, 8 * 16).reshape(1, 8, 16)
    return {"input_features": features, "decoder_input_ids": torch.tensor([[3, 4, 5]])}


# ---- the zoo ----

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "pad_token_id": 1,
}
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_CLIP_TOWER = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("bert", "BertConfig", "BertModel", _ENCODER, forward=_tokens),
        Architecture("bert-mlm", "BertConfig", "BertForMaskedLM", _ENCODER, torch.bfloat16, forward=_tokens),
        Architecture("roberta", "RobertaConfig", "RobertaModel", _ENCODER, forward=_tokens),
        Architecture(
            "distilbert",
            "DistilBertConfig",
            "DistilBertModel",
            {
                "vocab_size": VOCABULARY,
                "dim": WIDTH,
                "n_layers": 2,
                "n_heads": 2,
                "hidden_dim": 48,
                "max_position_embeddings": 24,
            },
            forward=_tokens,
        ),
        Architecture("mpnet", "MPNetConfig", "MPNetModel", _ENCODER, forward=_tokens),
        Architecture("xlm-roberta", "XLMRobertaConfig", "XLMRobertaModel", _ENCODER, torch.float16, forward=_tokens),
        Architecture(
            "modernbert",
            "ModernBertConfig",
            "ModernBertModel",
            {**_ENCODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
            forward=_tokens,
        ),
        Architecture("t5", "T5Config", "T5ForConditionalGeneration", _T5, forward=_encoder_decoder),
        Architecture("t5-encoder", "T5Config", "T5EncoderModel", _T5, torch.bfloat16, forward=_tokens),
        Architecture(
            "gpt2",
            "GPT2Config",
            "GPT2LMHeadModel",
            {
                "vocab_size": VOCABULARY,
                "n_embd": WIDTH,
                "n_layer": 2,
                "n_head": 2,
                "n_positions": 24,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            forward=_tokens,
        ),
        Architecture("llama", "LlamaConfig", "LlamaForCausalLM", _DECODER, torch.bfloat16, forward=_tokens),
        Architecture(
            "qwen3", "Qwen3Config", "Qwen3ForCausalLM", {**_DECODER, "tie_word_embeddings": True}, forward=_tokens
        ),
        Architecture(
            "qwen3-embedding",
            "Qwen3Config",
            "Qwen3Model",
            _DECODER,
            torch.bfloat16,
            forward=_tokens,
            declared="Qwen3ForCausalLM",
        ),
        Architecture(
            "gemma3",
            "Gemma3TextConfig",
            "Gemma3ForCausalLM",
            {**_DECODER, "sliding_window": 8},
            torch.bfloat16,
            forward=_tokens,
        ),
        Architecture(
            "mixtral",
            "MixtralConfig",
            "MixtralForCausalLM",
            {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
            torch.bfloat16,
            forward=_tokens,
        ),
        Architecture(
            "clip",
            "CLIPConfig",
            "CLIPModel",
            {
                "text_config": {
                    **_CLIP_TOWER,
                    "vocab_size": VOCABULARY,
                    "max_position_embeddings": 24,
                    "projection_dim": 16,
                    "pad_token_id": 1,
                    "bos_token_id": 0,
                    "eos_token_id": 2,
                },
                "vision_config": {**_CLIP_TOWER, "image_size": 16, "patch_size": 8, "projection_dim": 16},
                "projection_dim": 16,
            },
            forward=_image_and_text,
        ),
        Architecture(
            "qwen2-vl",
            "Qwen2VLConfig",
            "Qwen2VLForConditionalGeneration",
            {
                "text_config": {
                    **_DECODER,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
                },
                "vision_config": {
                    "depth": 2,
                    "embed_dim": WIDTH,
                    "hidden_size": WIDTH,
                    "num_heads": 2,
                    "mlp_ratio": 2,
                    "patch_size": 8,
                    "spatial_merge_size": 2,
                    "temporal_patch_size": 2,
                },
                "image_token_id": 60,
                "video_token_id": 61,
                "vision_start_token_id": 62,
                "vision_end_token_id": 63,
            },
            torch.bfloat16,
            forward=_tokens,
        ),
        Architecture(
            "whisper",
            "WhisperConfig",
            "WhisperForConditionalGeneration",
            {
                "vocab_size": VOCABULARY,
                "num_mel_bins": 8,
                "d_model": WIDTH,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 48,
                "decoder_ffn_dim": 48,
                "max_source_positions": 8,
                "max_target_positions": 24,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 1,
                "suppress_tokens": None,
                "begin_suppress_tokens": None,
            },
            forward=_speech,
        ),
    )
}
