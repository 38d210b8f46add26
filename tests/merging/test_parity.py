"""Agreement with mergekit on real weights: all-MiniLM-L6-v2 and three specialists fine-tuned from it.

The engine runs on the folders, mergekit's methods on the same tensors in memory (its command refuses BertModel). What may
differ, and by how much, stands beside each tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import merging
from merging import Recipe
from tests.conftest import MiniLMFamily
from tests.oracles.parity import mergekit_merge

torch = pytest.importorskip("torch")
pytest.importorskip("mergekit")

pytestmark = pytest.mark.slow

EPS = 2.0**-23
WEIGHTS = [0.6, 0.3, 0.9]
StateDict = dict[str, Any]


@dataclass(frozen=True)
class Weights:
    """The family's tensors, float32; `models` in the order of `paths`."""

    paths: MiniLMFamily
    base: StateDict
    models: tuple[StateDict, ...]

    def arrays(self, name: str, count: int = 3) -> tuple[np.ndarray, list[np.ndarray]]:
        return self.base[name].numpy(), [model[name].numpy() for model in self.models[:count]]


def _tensors(folder: Path) -> StateDict:
    from safetensors.torch import load_file

    return {name: t for name, t in load_file(folder / "model.safetensors").items() if t.is_floating_point()}


@pytest.fixture(scope="module")
def weights(minilm_family: MiniLMFamily) -> Weights:
    return Weights(minilm_family, _tensors(minilm_family.base), tuple(map(_tensors, minilm_family.specialists)))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ours(
    weights: Weights, out: Path, method: str, parameters: dict[str, Any], count: int = 3, seed: int = 0
) -> StateDict:
    """The engine's result. A parameter that is a list goes to the models one by one."""
    shared = {key: value for key, value in parameters.items() if not isinstance(value, list)}
    models = [
        {"model": str(path), "parameters": {key: parameters[key][i] for key in parameters if key not in shared}}
        for i, path in enumerate(weights.paths.specialists[:count])
    ]
    base = str(weights.paths.base)
    merging.merge(Recipe(method, models, base, shared, "float32"), out, seed=seed)
    return _tensors(out)


def assert_equal_to_rounding(
    mine: StateDict, theirs: StateDict, weights: Weights, excused: Callable[[str, np.ndarray], np.ndarray] | None = None
) -> None:
    """Every tensor within a few float32 roundings of its largest weight; `excused` says which entries may differ.

    mergekit adds squares for norms in float32 where ours adds in float64: over the 4e5 entries of a matrix its relative
    error reaches some 1e-5, but of a coefficient that multiplies a task vector, a hundredth of the weights in size.
    """
    assert mine.keys() == theirs.keys() == weights.base.keys()
    strays = total = 0
    for name, tensor in mine.items():
        base, models = weights.arrays(name)
        largest = max(float(np.abs(array).max()) for array in [base, *models])
        far = np.abs(tensor.numpy() - theirs[name].numpy()) > 8 * EPS * largest
        if far.any():
            assert excused, f"{name}: {far.sum()} entries differ, at most by {np.abs(tensor - theirs[name]).max()}"
            assert excused(name, far).all(), f"{name}: {far.sum()} entries differ, not all of them on a threshold"
        strays += int(far.sum())
        total += far.size
    assert strays < 1e-4 * total


# ---- methods without random draws ----

EXACT: dict[str, tuple[str, dict[str, Any], int]] = {
    "linear": ("linear", {"weight": WEIGHTS}, 3),
    "linear, not normalised": ("linear", {"weight": WEIGHTS, "normalize": False}, 3),
    "task_arithmetic": ("task_arithmetic", {"weight": WEIGHTS, "lambda": 0.8}, 3),
    "task_arithmetic, normalised": ("task_arithmetic", {"weight": WEIGHTS, "normalize": True}, 3),
    "slerp": ("slerp", {"t": 0.3}, 1),
    "nuslerp": ("nuslerp", {"weight": [0.3, 0.6]}, 2),
    "nuslerp by rows": ("nuslerp", {"weight": [0.3, 0.6], "nuslerp_flatten": False}, 2),
    "nuslerp by columns": ("nuslerp", {"weight": [0.3, 0.6], "nuslerp_flatten": False, "nuslerp_row_wise": True}, 2),
    "multislerp": ("multislerp", {"weight": WEIGHTS}, 2),
    "karcher": ("karcher", {}, 3),
    "model_stock": ("model_stock", {}, 3),
    "model_stock by filter": ("model_stock", {"filter_wise": True}, 3),
    "nearswap": ("nearswap", {"t": 1e-4}, 1),
    "ram": ("ram", {}, 3),
    "ramplus_tl": ("ramplus_tl", {"r": 0.3, "alpha": 0.5}, 3),
    "sce": ("sce", {}, 3),
}


@pytest.mark.parametrize("case", EXACT)
def test_agrees_with_mergekit(case: str, weights: Weights, tmp_path: Path) -> None:
    method, parameters, count = EXACT[case]
    parameters = {key: value[:count] if isinstance(value, list) else value for key, value in parameters.items()}
    theirs = mergekit_merge(weights.base, weights.models[:count], method, parameters)
    assert_equal_to_rounding(ours(weights, tmp_path / "out", method, parameters, count), theirs, weights)
