"""LoRA on a backbone, by peft: factors put into the model in place, merged into its weights while it is saved.

Source: arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.errors import CuveeError

if TYPE_CHECKING:
    from embeddings.training.config import LoraSettings

_SHOWN = 8  # names of layers in an error


def add_lora(model: Any, settings: LoraSettings, where: str, seed: int) -> None:
    """Freezes the model and puts factors into the layers that the settings name; B is zero, so vectors stay the same.

    Args:
        model: a transformers model.
        seed: of the factors A.

    Raises:
        CuveeError: peft is not installed, or none of the model's layers has such a name.
    """
    import torch

    try:
        from peft import LoraConfig
    except ImportError as error:
        raise CuveeError("LoRA needs peft", where=where, mend="pip install 'cuvee[lora]'") from error
    from transformers.pytorch_utils import Conv1D

    every = isinstance(settings.targets, str)
    has_pooler = getattr(model, "pooler", None) is not None
    options: dict[str, Any] = {
        "r": settings.r,
        "lora_alpha": int(settings.alpha) if float(settings.alpha).is_integer() else settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": settings.targets if every else list(settings.targets),
        "exclude_modules": r"pooler\..*" if every and has_pooler else None,  # no vector depends on it
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.modules()),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model.add_adapter(LoraConfig(**options))
        except ValueError as error:
            raise CuveeError(
                f"LoRA fits none of its layers: {settings.targets}",
                where=where,
                mend=f"choose among {', '.join(_linear_names(model))}",
            ) from error


def is_adapted(model: Any) -> bool:
    """Whether `add_lora` was here."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def save_adapter(model: Any, folder: Path, *, base: str) -> None:
    """Writes the factors as peft does: adapter_config.json and adapter_model.safetensors."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    model.save_pretrained(folder)


@contextmanager
def merged_in(model: Any) -> Iterator[None]:
    """For a while a plain model with the factors merged into its weights, in float32; afterwards exactly as before."""
    if not is_adapted(model):
        yield
        return
    import torch
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    kept = {}
    try:
        with torch.no_grad():
            for name, layer in layers.items():
                plain = layer.get_base_layer()
                kept[name] = plain.weight.data
                plain.weight.data = plain.weight.data + layer.get_delta_weight("default")
                _put(model, name, plain)
        model._hf_peft_config_loaded = False
        yield
    finally:
        model._hf_peft_config_loaded = True
        for name, weight in kept.items():
            layers[name].get_base_layer().weight.data = weight
            _put(model, name, layers[name])


def _put(model: Any, name: str, module: Any) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _linear_names(model: Any) -> list[str]:
    import torch

    names = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return sorted(names)[:_SHOWN]
