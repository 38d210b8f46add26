"""Small checkpoints written byte by byte: by none of our code, and by no library that would refuse what tests want."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray


class Raw(NamedTuple):
    """A tensor as stored: safetensors' name of its dtype, its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


#: A tensor: as stored, or as an array.
Tensor = Raw | NDArray[Any]
Tensors = Mapping[str, Tensor]

_NAMES = {"f4": "F32", "f2": "F16", "f8": "F64", "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8", "u1": "U8"}
_NAMES |= {"b1": "BOOL", "u2": "U16", "u4": "U32", "u8": "U64", "c8": "C64"}


def raw(tensor: Tensor) -> Raw:
    """The tensor as stored."""
    if isinstance(tensor, Raw):
        return tensor
    return Raw(_NAMES[tensor.dtype.str[1:]], tensor.shape, np.ascontiguousarray(tensor).tobytes())


def bf16(values: NDArray[Any]) -> Raw:
    """float32 values, cut to bfloat16: exact for those that fit."""
    bits = np.asarray(values, np.float32).view(np.uint32) >> 16
    return Raw("BF16", np.shape(values), bits.astype(np.uint16).tobytes())


def floats(tensor: Raw) -> NDArray[np.float32]:
    """A stored tensor of a floating dtype as float32."""
    if tensor.dtype == "BF16":
        bits = np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tensor.shape)
    dtype = {"F32": np.float32, "F16": np.float16, "F64": np.float64}[tensor.dtype]
    return np.frombuffer(tensor.data, dtype).reshape(tensor.shape).astype(np.float32)


def container(header: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of that header, whatever it says, and that data.

    Args:
        length: what the file says of the header's length; by default the truth.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def safetensors(tensors: Tensors) -> bytes:
    """A file that says the truth."""
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in tensors.items():
        dtype, shape, stored = raw(tensor)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(stored)]}
        data += stored
    return container(header, data)


def write_model(folder: Path, tensors: Tensors | bytes, config: Mapping[str, Any] | None = None) -> Path:
    """A model's folder with one model.safetensors and a config.json; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = tensors if isinstance(tensors, bytes) else safetensors(tensors)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"} if config is None else config))
    return folder


def write_shards(folder: Path, shards: Mapping[str, Tensors], index: Any = None) -> Path:
    """A sharded model; `index` replaces the weight_map that would be true."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in shards.items():
        (folder / file).write_bytes(safetensors(tensors))
    truth = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(truth if index is None else index))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return folder


def read_model(folder: Path) -> dict[str, Raw]:
    """All tensors of the safetensors files of one folder, read by the safetensors library."""
    from safetensors import deserialize

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, info in deserialize(file.read_bytes()):
            found[name] = Raw(info["dtype"], tuple(info["shape"]), bytes(info["data"]))
    return found


def some(shape: tuple[int, ...], seed: int = 0, spread: float = 1.0) -> NDArray[np.float32]:
    """Normal values."""
    values = np.random.default_rng([seed, math.prod(shape)]).standard_normal(shape, dtype=np.float32)
    return values * np.float32(spread)


def tiny(seed: int = 0, **more: Tensor) -> dict[str, Tensor]:
    """A model of two layers, about a kilobyte; `more` replaces or adds tensors, `__` in their names standing for dots."""
    tensors: dict[str, Tensor] = {"embeddings.weight": some((9, 4), seed)}
    for layer in range(2):
        tensors[f"layer.{layer}.dense.weight"] = some((4, 4), seed + 10 * layer + 1)
        tensors[f"layer.{layer}.norm.bias"] = some((4,), seed + 10 * layer + 2)
    return tensors | {name.replace("__", "."): tensor for name, tensor in more.items()}


def write_recipe(file: Path, method: str = "linear", *models: Path | str, **keys: Any) -> Path:
    """A recipe that merges the models, each with weight 1 where nothing else is said; returns its path.

    Args:
        keys: of the recipe; `parameters` go to the top level.
    """
    content: dict[str, Any] = {"merge_method": method, "models": [{"model": str(model)} for model in models]}
    content |= {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
    if method not in ("slerp", "model_stock", "karcher", "sce"):
        content["parameters"] = {"weight": 1.0, **(content.get("parameters") or {})}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file
