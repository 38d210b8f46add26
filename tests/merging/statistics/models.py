"""Tiny models with a tokenizer beside them, and texts in their words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.architectures import ARCHITECTURES, VOCABULARY, build

#: Those of the zoo that read texts alone, and what they are for.
HEADS = {
    "bert": "embedding",
    "roberta": "embedding",
    "distilbert": "embedding",
    "mpnet": "embedding",
    "xlm-roberta": "embedding",
    "modernbert": "embedding",
    "t5": "embedding",
    "t5-encoder": "embedding",
    "gpt2": "lm",
    "llama": "lm",
    "qwen3": "lm",
    "gemma3": "lm",
    "mixtral": "lm",
    "qwen2-vl": "lm",
}
WORDS = [f"w{i}" for i in range(VOCABULARY - 8)]


def model(name: str, folder: Path) -> Path:
    """A model of the zoo with random weights, no two of its tensors alike, and a tokenizer."""
    path = build(name, folder, specialists=1).specialists[0]
    with_tokenizer(path)
    return path


def classifier(folder: Path, labels: int, seed: int = 0) -> Path:
    """A BERT that chooses between so many labels; of one, that gives a number."""
    import transformers

    config = transformers.BertConfig(**ARCHITECTURES["bert"].sizes, num_labels=labels)
    with torch.random.fork_rng():
        torch.manual_seed(labels + 1000 * seed)
        own = transformers.BertForSequenceClassification(config)
        for parameter in own.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    own.save_pretrained(folder)
    with_tokenizer(folder)
    return folder


def with_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, with the special tokens that encoders want."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<pad>", "<s>", "</s>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", model_max_length=20
    )
    fast.save_pretrained(folder)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Of 1 to 9 words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 10))) for _ in range(count)]


@contextmanager
def captured(module: torch.nn.Module) -> Iterator[dict[torch.nn.Module, list[torch.Tensor]]]:
    """The inputs of every layer that has a weight matrix, as it is called; to be used with texts one at a time."""
    from transformers.pytorch_utils import Conv1D

    found: dict[torch.nn.Module, list[torch.Tensor]] = {}
    handles = [
        each.register_forward_pre_hook(lambda m, args: found.setdefault(m, []).append(args[0].detach().double()))
        for each in module.modules()
        if isinstance(each, torch.nn.Linear | Conv1D)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def stored(folder: Path) -> dict[str, NDArray[Any]]:
    """All tensors of a folder of one model.safetensors."""
    from safetensors.torch import load_file

    return {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def named(weight: torch.Tensor, tensors: dict[str, NDArray[Any]]) -> str | None:
    """What a weight is called in the file; by its values, every one of which is looked at."""
    array = weight.detach().double().numpy()
    found = [name for name, own in tensors.items() if np.array_equal(own, array)]
    assert len(found) <= 1
    return found[0] if found else None


def reference(folder: Path, module: torch.nn.Module, runs: Sequence[Any]) -> dict[str, NDArray[np.float64]]:
    """By stored weight the Gram matrix of its layer's inputs, (in, in), divided by how many rows it read; in float64.

    Args:
        module: the model; it becomes float64.
        runs: functions that each run one text without padding.
    """
    tensors = stored(folder)
    names = {each: named(each.weight, tensors) for each in module.modules() if hasattr(each, "weight")}
    module.double()
    if hasattr(module, "set_experts_implementation"):
        module.set_experts_implementation("eager")  # the other one knows no float64
    with captured(module) as inputs, torch.no_grad():
        for run in runs:
            run()
    embedded = {id(each.weight) for each in module.modules() if isinstance(each, torch.nn.Embedding)}
    found = {}
    for layer, values in inputs.items():
        if id(layer.weight) in embedded:
            continue
        rows = torch.cat([each.reshape(-1, each.shape[-1]) for each in values])
        if names[layer] is not None:
            found[str(names[layer])] = (rows.T @ rows / len(rows)).numpy()
    return found


def llava(folder: Path) -> Path:
    """A tiny model of images and texts with its processor; needs Pillow."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    text = ARCHITECTURES["llama"].sizes
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8),
        image_token_index=VOCABULARY - 1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = transformers.LlavaForConditionalGeneration(config)
        for parameter in own.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    own.save_pretrained(folder)
    with_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad0>", "<pad1>", "<pad2>", "<image>"]})
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
    return folder
