"""The ownership map: from which model each coordinate of a merge comes, where a method takes it from one and never averages.

    OUT/ownership/owners.safetensors   uint8, by tensor: 0 the base, i the i-th model
    OUT/ownership/ownership.json       the models, and how many coordinates each owns, by tensor

Neither transformers nor sentence-transformers look into that folder, nor does a further merge.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merging import layers
from merging.checkpoint import CheckpointWriter, read_json
from merging.errors import CheckpointError, MergeError

FOLDER = "ownership"
OWNERS = "owners.safetensors"
COUNTS = "ownership.json"
MOST_MODELS = 255


class OwnershipWriter:
    """Writes the map of a merge piece by piece, from any thread, and counts.

    Args:
        out: the merge's folder, which exists.
        tensors: (name, shape) of those that are owned.
        models: their names; owner i is `models[i − 1]`.

    Raises:
        MergeError: too many models, or the files cannot be written.
    """

    def __init__(self, out: Path, tensors: Sequence[tuple[str, tuple[int, ...]]], models: Sequence[str]) -> None:
        if len(models) > MOST_MODELS:
            raise MergeError(f"an ownership map has room for {MOST_MODELS} models, not {len(models)}")
        self._folder, self._models = out / FOLDER, list(models)
        self._writer = CheckpointWriter(self._folder, [(name, "U8", shape) for name, shape in tensors], sys.maxsize)
        self.counts = {name: np.zeros(len(models) + 1, np.int64) for name, _ in tensors}
        self._lock = threading.Lock()

    def write(self, name: str, start: int, owners: NDArray[np.uint8]) -> None:
        """Elements start … start + n of a tensor. owners (n,)."""
        counts = np.bincount(owners, minlength=len(self._models) + 1)
        with self._lock:
            self.counts[name] += counts
        self._writer.write(name, start, owners.data)

    @property
    def shares(self) -> dict[str, float]:
        """Of all coordinates, what each model owns; the rest is the base's."""
        total = np.sum([*self.counts.values(), np.zeros(len(self._models) + 1)], axis=0)
        return {name: float(own / max(1, total.sum())) for name, own in zip(self._models, total[1:], strict=True)}

    def close(self) -> None:
        """Puts the files under their names, and the counts beside them."""
        self._writer.close()
        (self._folder / "model.safetensors").rename(self._folder / OWNERS)
        content = {"models": self._models, "counts": {name: counts.tolist() for name, counts in self.counts.items()}}
        (self._folder / COUNTS).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def read_ownership(out: Path) -> dict[str, Any] | None:
    """What a merge's ownership map says; None where there is none.

    Returns:
        `models` by name; counts, the base's first, then each model's: `total`, and by `groups` of layers, `kinds` of
        modules (the name without its place in the stack) and `tensors`.

    Raises:
        CheckpointError: it is there and cannot be understood.
    """
    file = out / FOLDER / COUNTS
    if not file.is_file():
        return None
    content = read_json(file)
    models, counts = content.get("models"), content.get("counts")
    sound = isinstance(models, list) and isinstance(counts, dict)
    if not sound or not all(_are_counts(each, len(models or ()) + 1) for each in (counts or {}).values()):
        raise CheckpointError("is no ownership map", where=str(file), mend="merge anew")
    assert isinstance(models, list) and isinstance(counts, dict)
    total = np.sum([*counts.values(), [0] * (len(models) + 1)], axis=0, dtype=np.int64)
    return {
        "models": [str(model) for model in models],
        "total": total.tolist(),
        "groups": _summed(counts, layers.group),
        "kinds": _summed(counts, module_kind),
        "tensors": counts,
    }


def module_kind(name: str) -> str:
    """A module's name without its place in the stack: `attention.self.query` of `encoder.layer.3.attention.self.query.weight`."""
    module = re.sub(r"\.(weight|bias)$", "", name)
    group = layers.group(name)
    return module[len(group) + 1 :] if re.search(r"\.\d+$", group) and module.startswith(f"{group}.") else module


def _summed(counts: Mapping[str, Sequence[int]], key: Callable[[str], str]) -> dict[str, list[int]]:
    sums: dict[str, list[int]] = {}
    for name, own in counts.items():
        before = sums.setdefault(key(name), [0] * len(own))
        sums[key(name)] = [a + b for a, b in zip(before, own, strict=True)]
    return sums


def _are_counts(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(type(n) is int and n >= 0 for n in value)
