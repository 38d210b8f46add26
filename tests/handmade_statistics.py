"""Folders of statistics as `cuvee stats` writes them, filled with random numbers, or with given ones."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from merging.sources import ModelRef
from merging.statistics import Statistics, open_statistics, write_statistics
from merging.views import View, fingerprint

Array = np.ndarray[Any, Any]
CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")  # GPT-2's, whose weights are (inputs, outputs)


def write_stats(
    folder: Path, model: Path | str, kind: str, values: Mapping[str, Array] | None = None, seed: int = 0
) -> Statistics:
    """Statistics of a model: the values given, or random ones of every floating weight that has such."""
    view = View.open(ModelRef.parse(str(model)))
    shapes = {name: info.shape for name, info in view.tensors.items() if info.dtype in ("F32", "BF16", "F16")}
    axes = {name: 0 if any(part in name for part in CONV1D) else 1 for name, shape in shapes.items() if len(shape) > 1}
    if values is None:
        found = {name: random_statistic(kind, name, shape, axes.get(name, 1), seed) for name, shape in shapes.items()}
        values = {name: value for name, value in found.items() if value is not None}
    manifest = {
        "examples": 7,
        "parameters": sum(value.size for value in values.values()),
        "rows": {} if kind == "fisher" else dict.fromkeys(values, 100),
        "axes": {} if kind == "fisher" else {name: axes.get(name, 1) for name in values},
        "seed": seed,
        "settings": {},
        "data": [],
        "model": {
            "ref": str(model), "path": str(view.checkpoint.path),
            "digest": view.digest(), "fingerprint": fingerprint(view),
        },
    }  # fmt: skip
    view.checkpoint.close()
    write_statistics(folder, kind, values, manifest, force=True)
    return open_statistics(folder)


def random_statistic(kind: str, name: str, shape: tuple[int, ...], axis: int, seed: int) -> Array | None:
    """What could be found of a weight; None of one that is no matrix, but for Fisher."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if kind == "fisher":
        return np.asarray(rng.exponential(size=shape) ** 3, np.float32)
    if len(shape) < 2 or "embed" in name or (kind == "gram" and len(shape) != 2):
        return None
    if kind == "moments":
        own = (1, *shape[1:]) if axis == 1 else (shape[0], *(1 for _ in shape[1:]))
        return np.asarray(rng.exponential(size=own), np.float32)
    inputs = rng.normal(size=(2 * shape[axis], shape[axis]))
    return np.asarray(inputs.T @ inputs / len(inputs), np.float32)
