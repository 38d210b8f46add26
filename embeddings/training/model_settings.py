"""ModelSettings: what `model:` in a training configuration says: a backbone, and how it turns tokens into a vector.

model: ../models/minilm
model: {path: owner/name, revision: main, pooling: mean, lora: {r: 32, alpha: 32}, dtype: bfloat16}
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from merging.errors import CuveeError
from merging.fields import choice, flag, given, located, looked_for, mapping, number, text, text_of, texts
from merging.node import Node
from merging.setting import refuse_unknown_keys

POOLINGS = ("mean", "cls", "lasttoken")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters instead of full fine-tuning.

    Attributes:
        targets: "all-linear", or the ends of module names.
    """

    r: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"


@dataclass(frozen=True)
class ModelSettings:
    """The backbone and how it turns tokens into a vector.

    Attributes:
        path: an absolute folder, or a hub id.
        pooling: "mean", "cls" or "lasttoken"; None: as the folder says, else the kind of backbone.
        normalize: None: as the folder says, else true.
        bidirectional: a decoder's tokens see those after them too.
        append_eos: a decoder's texts end with EOS, where the tokenizer adds none.
        dtype: of the arithmetic; the weights that are trained are float32 always.
    """

    path: str
    revision: str | None = None
    pooling: str | None = None
    normalize: bool | None = None
    bidirectional: bool = False
    append_eos: bool = True
    dtype: str = "float32"
    trust_remote_code: bool = False
    lora: LoraSettings | None = None
    gradient_checkpointing: bool = False
    where: str = field(default="", compare=False)


def model_settings(root: Node, near: Path) -> ModelSettings:
    """What `model:` names, a path or a mapping; CuveeError where it is absent."""
    model = given(root, "model")
    if model is None:
        raise CuveeError("has no 'model'", where=root.where, mend="write 'model: FOLDER', or a hub id")
    if not isinstance(model.value, dict):
        return ModelSettings(_model_path(model, near), where=model.where)
    refuse_unknown_keys(model, [each.name for each in fields(ModelSettings) if each.name != "where"], "'model'")
    path = given(model, "path")
    if path is None:
        raise CuveeError("'model' has no 'path'", where=model.where, mend="add 'path:', a folder or a hub id")
    return ModelSettings(
        path=_model_path(path, near),
        revision=text(model, "revision", None),
        pooling=choice(model, "pooling", POOLINGS, None),
        normalize=flag(model, "normalize", None),
        bidirectional=flag(model, "bidirectional", ModelSettings.bidirectional),
        append_eos=flag(model, "append_eos", ModelSettings.append_eos),
        dtype=choice(model, "dtype", DTYPES, ModelSettings.dtype),
        trust_remote_code=flag(model, "trust_remote_code", ModelSettings.trust_remote_code),
        lora=_lora(model),
        gradient_checkpointing=flag(model, "gradient_checkpointing", ModelSettings.gradient_checkpointing),
        where=path.where,
    )


def _model_path(path: Node, near: Path) -> str:
    name = text_of(path, "model")
    found = located(name, near, Path.is_dir)
    if found is None and (name.startswith((".", "/", "~")) or name.count("/") > 1):  # no hub id
        raise CuveeError(f"no such model: {name}", where=path.where, mend=looked_for(near))
    return found or name


def _lora(model: Node) -> LoraSettings | None:
    lora = mapping(model, "lora", "{r: 32}")
    if lora is None:
        return None
    refuse_unknown_keys(lora, [each.name for each in fields(LoraSettings)], "'lora'")
    targets: str | tuple[str, ...] = tuple(name for name, _ in texts(lora, "targets")) or LoraSettings.targets
    return LoraSettings(
        r=number(lora, "r", LoraSettings.r, low=1, whole=True),
        alpha=number(lora, "alpha", LoraSettings.alpha, above=0),
        dropout=number(lora, "dropout", LoraSettings.dropout, low=0, high=1),
        targets=LoraSettings.targets if targets == (LoraSettings.targets,) else targets,
    )
