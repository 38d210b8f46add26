"""LM-Cocktail: weights in closed form, from the loss of each model alone on a few examples of the target.

    wᵢ = exp(−lossᵢ / T) / Σⱼ exp(−lossⱼ / T)

As an engine it is the whole search; as a start point (`start: [cocktail, …]`) what an optimiser begins with.
Source: arXiv 2311.13534, section 3, and the authors' code (T = 5, about five examples).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from merging.errors import CuveeError
from search.space import Dimension, Point, Space

TEMPERATURE = 5.0


def shares(losses: Sequence[float], temperature: float = TEMPERATURE) -> list[float]:
    """The weight of each model; they sum to 1.

    Args:
        losses: of each model, in nats where T = 5 is meant; infinite: it gets nothing, unless all are.
        temperature: T > 0, in the unit of the losses; what is much smaller chooses the best model, what is much larger
            averages.
    """
    exponents = -np.asarray(losses, np.float64) / temperature
    if not np.isfinite(exponents).any():
        return [1 / len(losses)] * len(losses)
    raised = np.exp(exponents - exponents[np.isfinite(exponents)].max())
    return [float(share) for share in raised / raised.sum()]


def alone(space: Space, where: str = "") -> list[dict[str, Any]]:
    """Each model by itself: its weight 1, that of the others 0; what is no weight at the method's default.

    Raises:
        CuveeError: the weights of the models do not vary, or not from 0 to 1.
    """
    own = [d for d in space.dimensions if _is_weight(d)]
    if {d.model for d in own} != {*range(space.models)}:
        mend = "let 'weight' vary per model"
        raise CuveeError("LM-Cocktail needs a weight of each model", where=where, mend=mend)
    if any(d.clipped(value) != value for d in own for value in (0.0, 1.0)):
        raise CuveeError("LM-Cocktail needs weights from 0 to 1", where=where, mend="mend the bounds of 'weight'")
    return [
        {d.name: float(d.model == model) if _is_weight(d) else d.default for d in space.dimensions}
        for model in range(space.models)
    ]


def mixed(space: Space, losses: Sequence[float], temperature: float = TEMPERATURE) -> dict[str, Any]:
    """The point of the closed form; see `shares`."""
    found = shares(losses, temperature)
    return {d.name: d.clipped(found[d.model or 0]) if _is_weight(d) else d.default for d in space.dimensions}


def loss_of(point: Point, done: Sequence[tuple[Point, float]]) -> float:
    """What a point scored, as a loss; infinite where it has no score."""
    return next((-score for other, score in done if other == point), math.inf)


def _is_weight(dimension: Dimension) -> bool:
    return dimension.parameter == "weight" and dimension.model is not None and not dimension.choices
