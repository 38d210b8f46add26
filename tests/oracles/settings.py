"""Recipes to try every method with, and what a random method drew, seen from outside."""

from __future__ import annotations

from typing import Any

import numpy as np

import merging
from merging.methods import METHODS, REQUIRED, Method
from tests.oracles.thinning import Array, task_vector

#: For three models, or as many as the method takes. Values that differ between the models are lists.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "linear": [
        {"weight": 1.0},
        {"weight": [0.2, 0.5, 1.7]},
        {"weight": [1.5, -0.5, 0.25], "normalize": False},
    ],
    "task_arithmetic": [
        {"weight": 1.0},
        {"weight": [0.3, -0.4, 1.5], "lambda": 0.7},
        {"weight": [1.0, 2.0, 0.5], "normalize": True},
    ],
    "ties": [
        {"weight": 1.0},
        {"weight": [1.0, 0.5, 2.0], "density": 0.3},
        {"weight": [1.0, 0.5, -2.0], "density": [0.9, 0.01, 1.0], "lambda": 1.3, "normalize": False},
        {"weight": [1.0, 0.5, 2.0], "density": [0.5, 0.2, 1.0], "rescale": True},
        {"weight": [1.0, 0.5, 2.0], "density": [0.5, 0.0, 1.0], "scope": "global"},
        {"weight": [1.0, 0.5, -2.0], "density": [0.5, 0.2, 0.3], "saliency": "stats"},
        {
            "weight": [1.0, 0.5, 2.0],
            "density": [0.5, 0.2, 0.3],
            "saliency": "stats",
            "scope": "global",
            "rescale": True,
        },
    ],
    "fisher": [
        {},
        {"weight": [0.2, 0.5, 1.7], "normalize": False, "floor": 0.01},
        {"weight": [0.2, 0.5, 1.7], "floor": 0.01, "floor_is": "absolute"},
        {"weight": [0.2, 0.0, 1.7], "floor": 0.0},
    ],
    "df_merge": [
        {"weight": 0.4, "fisher": "frozen"},
        {"weight": [0.2, 0.5, 1.0], "fisher": "frozen", "floor": 0.01},
        {"weight": [0.0, 0.7, 0.3], "fisher": "frozen", "floor": 0.0},
    ],
    "regmean": [{}, {"weight": [0.2, 0.5, 1.7], "alpha": 0.1, "damping": 0.01}, {"alpha": 1.0}],
    "obim": [
        {},
        {"density": [0.5, 0.1, 0.6], "lambda": 0.7},
        {"saliency": "magnitude", "quota": "drop_collisions", "density": 0.6},
        {"order": "interleaved", "density": [0.5, 0.3, 0.2]},
        {"order": "interleaved", "quota": "drop_collisions", "density": [0.5, 0.3, 0.9]},
        {"scope": "row", "density": [0.3, 0.0, 0.4]},
        {"scope": "row", "quota": "drop_collisions", "order": "interleaved"},
        {"scope": "global"},
        {"scope": "global", "quota": "drop_collisions", "order": "interleaved", "density": 0.7},
        {"scope": "global", "saliency": "magnitude", "order": "interleaved", "density": [0.5, 0.3, 0.9]},
    ],
    "breadcrumbs": [
        {"weight": 1.0, "density": 0.8, "gamma": 0.05},
        {"weight": [1.0, -0.5, 2.0], "density": [0.3, 0.999, 1.0], "gamma": [0.2, 0.1, 0.1], "normalize": True},
        {"weight": 0.5, "density": 0.4, "gamma": 0.3, "rescale": True, "lambda": 0.6},
    ],
    "breadcrumbs_ties": [
        {"weight": 1.0, "density": 0.8, "gamma": 0.05},
        {"weight": [1.0, 0.5, 2.0], "density": [0.3, 0.0, 1.0], "gamma": [0.2, 0.1, 0.1], "normalize": True},
        {"weight": 0.5, "density": 0.4, "gamma": 0.3, "rescale": True, "lambda": 0.6},
    ],
    "dare_linear": [
        {"weight": 1.0, "density": 0.4},
        {"weight": [0.3, -0.4, 1.5], "density": [0.5, 0.2, 1.0], "saliency": "stats"},
        {"weight": [0.3, -0.4, 1.5], "density": [0.5, 0.9, 1.0], "rescale_by": "norm", "lambda": 0.5},
        {"weight": [0.3, 0.4, 1.5], "density": [0.5, 0.0, 0.2], "rescale": False, "normalize": True},
    ],
    "dare_ties": [
        {"weight": 1.0, "density": 0.4},
        {"weight": [0.3, -0.4, 1.5], "density": [0.5, 0.0, 0.2], "saliency": "stats", "rescale_by": "norm"},
        {"weight": [0.3, -0.4, 1.5], "density": [0.5, 0.9, 1.0], "rescale_by": "norm", "lambda": 0.5},
        {"weight": [0.3, 0.4, 1.5], "density": [0.5, 0.0, 0.2], "rescale": False, "normalize": True},
    ],
    "della_linear": [
        {"weight": 1.0, "density": 0.4},
        {"weight": [0.3, -0.4, 1.5], "density": [0.5, 0.8, 1.0], "epsilon": [0.4, 0.1, 0.2], "rescale_by": "norm"},
        {"weight": [0.3, 0.4, 1.5], "density": 0.6, "rescale": False, "normalize": True, "lambda": 2.0},
    ],
    "della": [
        {"weight": 1.0, "density": 0.4},
        {"weight": [0.3, -0.4, 1.5], "density": [0.5, 0.8, 1.0], "epsilon": [0.4, 0.1, 0.2], "rescale_by": "norm"},
        {"weight": [0.3, 0.4, 1.5], "density": 0.6, "rescale": False, "normalize": False, "lambda": 2.0},
    ],
    "slerp": [{"t": 0.0}, {"t": 0.3}, {"t": 1.0}],
    "nuslerp": [
        {"weight": [0.3, 0.9]},
        {"weight": [1.0, -1.0]},
        {"weight": [0.3, 0.9], "nuslerp_flatten": False},
        {"weight": [0.7, 0.5], "nuslerp_flatten": False, "nuslerp_row_wise": True},
    ],
    "multislerp": [
        {"weight": 1.0},
        {"weight": [0.2, 0.5, 1.7]},
        {"weight": [0.2, 0.5, 1.7], "normalize_weights": False, "eps": 1e-3},
    ],
    "karcher": [{}, {"weight": [0.2, 0.5, 1.7]}, {"max_iter": 1}],
    "model_stock": [{}, {"filter_wise": True}],
    "sce": [{}, {"select_topk": 0.3}, {"select_topk": 0.0}],
    "arcee_fusion": [{}],
    "nearswap": [{"t": 0.1}, {"t": 0.0}, {"t": 1e-4}],
    "ram": [{}, {"epsilon": 0.2}],
    "ramplus_tl": [{}, {"epsilon": 0.2, "r": 0.5, "alpha": 0.9}, {"epsilon": 0.4, "r": -0.3, "alpha": 0.4}],
}


def count_of(method: Method) -> int:
    """How many models to give it."""
    return method.max_models or max(3, method.min_models)


def parameters_of(method: Method) -> dict[str, Any]:
    """The first of the method's settings; for a method without, a value for each required parameter."""
    if method.name in SETTINGS:
        return SETTINGS[method.name][0]
    required = [parameter for parameter in method.parameters.values() if parameter.default is REQUIRED]
    return {p.name: p.choices[0] if p.choices else p.type(0.5 if p.low is None else p.low) for p in required}


def statistics_of(name: str, models: list[Array], seed: int = 0) -> list[Array | None] | None:
    """Statistics for a method that takes them, of one tensor: what `cuvee stats` could find; None for other methods.

    Of importances a fifth is 0, and one model has them for each input only, as second moments; a vector has no Gram matrix.
    """
    kinds = METHODS[name].statistics
    if not kinds or not models:
        return None
    shape, found = models[0].shape, []
    for i in range(len(models)):
        rng = np.random.default_rng([seed, i, *shape])
        if "gram" in kinds:
            inputs = rng.normal(size=(max(2, shape[-1] // 2 * 3 if i else 2), shape[-1])) if len(shape) == 2 else None
            found.append(None if inputs is None else np.asarray(inputs.T @ inputs / len(inputs), np.float32))
        else:
            own = (1, *shape[1:]) if kinds[0] == "moments" and i == 1 and len(shape) > 1 else shape
            found.append(np.asarray(rng.exponential(size=own) ** 3 * (rng.random(own) > 0.2) * 10.0**i, np.float32))
    return found


def masks_of(name: str, base: Array, models: list[Array], seed: int = 0, **parameters: Any) -> list[Array]:
    """What a random method kept, seen from outside: each model alone on a base of zeros, nothing rescaled."""
    taus = [np.asarray(task_vector(model, base), np.float32) for model in models]
    kept = {key: value for key, value in parameters.items() if key in ("density", "epsilon", "key", "chunk", "backend")}
    masks = []
    for i in range(len(taus)):
        alone = [float(i == j) for j in range(len(taus))]
        result = merging.apply(
            name, np.zeros_like(base), taus, seed=seed, weight=alone, rescale=False, normalize=False, **kept
        )
        masks.append(result != 0)
    return masks
