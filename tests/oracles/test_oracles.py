"""The oracles themselves against mergekit, on tensors so small that its float32 sums are no excuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.oracles.merge_methods import RANDOM, oracle
from tests.oracles.parity import mergekit_merge
from tests.oracles.settings import SETTINGS
from tests.oracles.thinning import keep_probability, task_vector

torch = pytest.importorskip("torch")
pytest.importorskip("mergekit")

MODELS = {"slerp": 1, "arcee_fusion": 1, "nearswap": 1, "nuslerp": 2}
SEED = 9


def mergekits(name: str, parameters: dict[str, Any]) -> bool:
    """Whether mergekit has all that the setting asks for."""
    if name in ("fisher", "df_merge", "regmean", "obim") or "saliency" in parameters:
        return False
    if name in RANDOM:
        return parameters.get("rescale_by") == "norm" or parameters.get("rescale") is False
    return "scope" not in parameters and not (name == "karcher" and "weight" in parameters)


SHARED = [
    pytest.param(name, parameters, id=f"{name}-{i}")
    for name, several in SETTINGS.items()
    for i, parameters in enumerate(several)
    if mergekits(name, parameters)
]


@pytest.mark.parametrize("shape", [(), (17,), (40, 30), (4, 3, 2, 5)], ids=str)
@pytest.mark.parametrize(("name", "parameters"), SHARED)
def test_oracle_equals_mergekit(name: str, parameters: dict[str, Any], shape: tuple[int, ...]) -> None:
    if name.startswith("della") and len(shape) != 2:
        shape = (12, 10)  # mergekit ranks along the second dimension of whatever it gets, and crashes on a scalar
    rng = np.random.default_rng(0)
    base = np.asarray(rng.normal(size=shape), np.float32)
    models = [np.asarray(base + 0.3 * rng.normal(size=shape), np.float32) for _ in range(MODELS.get(name, 3))]
    masks = {"masks": mergekits_masks(name, base, models, parameters)} if name in RANDOM else {}
    exact = oracle(name, None if name in ("linear", "karcher") else base, models, **parameters, **masks)
    theirs = mergekit_merge(
        {"x": torch.tensor(base)},
        [{"x": torch.tensor(model)} for model in models],
        name,
        {key: value for key, value in parameters.items() if key != "rescale_by"},
        seed=SEED,
    )["x"].numpy()
    # Karcher's iteration stops at a step of 1e-5, in float32 perhaps one step sooner or later.
    np.testing.assert_allclose(
        theirs, exact, rtol=0, atol=(1e-5 if name == "karcher" else 4e-6) * max(1, abs(exact).max())
    )


def mergekits_masks(name: str, base: Any, models: list[Any], parameters: dict[str, Any]) -> list[Any]:
    """The draws that mergekit will make: one Bernoulli field per model from torch's global generator, in order."""
    masks = []
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        for i, model in enumerate(models):
            density, epsilon = (
                value[i] if isinstance(value, list) else value
                for value in (parameters["density"], parameters.get("epsilon", 0.15))
            )
            chance = keep_probability(task_vector(model, base), density, epsilon if name.startswith("della") else None)
            drawn = density < 1 and not (density <= 0 and name.startswith("della"))
            field = torch.tensor(chance, dtype=torch.float32)
            masks.append((torch.bernoulli(field) if drawn else field).numpy() > 0)
    return masks
