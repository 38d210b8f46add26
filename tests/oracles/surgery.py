"""Modular gradient surgery once more: loops in float64 over vectors, written from its text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def surgery(vectors: Sequence[Array], orders: Sequence[Sequence[int]]) -> Array:
    """Of one group: each task's gradient as one vector, and for each task the order in which it meets the others."""
    total = np.zeros_like(vectors[0])
    for i, vector in enumerate(vectors):
        g = vector.copy()
        for j in orders[i]:
            if j != i and g @ vectors[j] < 0:
                g -= (g @ vectors[j]) / (vectors[j] @ vectors[j]) * vectors[j]
        total += g
    return total
