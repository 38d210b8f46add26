"""The gradient of a loss along task vectors: what it changes by when a model's weight in a live merge does.

    dL/dλᵢ = ⟨∂L/∂θ, τᵢ⟩                   θ = θ₀ + Σ λᵢτᵢ
           = s · Σ (leftᵀ · ∂L/∂θ) ⊙ right  of an adapter without magnitudes, τ = s · left · right

Source: arXiv 2310.02575 (AdaMerging), by the chain rule.
"""

from __future__ import annotations

import numpy as np

from merging.inputs import Values, Workspace
from merging.live_tensors import Held


def along(held: Held, gradient: Values, start: int, stop: int, block: int, workspace: Workspace) -> Values:
    """The inner products of elements start … stop of a tensor's gradient with the same of every task vector.

    Args:
        gradient: (n,) float32 of the whole tensor, where the held values are.
        start, stop: whole rows, where models are held as adapters.
        block: elements at a time, at most; a row at least.

    Returns:
        (models,) float64, where the held values are.
    """
    kernels = workspace.kernels
    xp = kernels.xp
    total = xp.zeros(len(held.models), dtype=xp.float64, **({} if kernels.on_host else {"device": kernels.device}))
    thin = {product.model: product for product in held.products}
    columns = held.columns
    if held.plain:
        for product in held.products:
            rows = slice(start // columns, stop // columns)
            inner = product.left[rows].T @ gradient[start:stop].reshape(-1, columns)  # (rank, columns)
            total[product.model] += product.scale * (inner * product.right).sum(dtype=xp.float64)
    size = max(1, block // columns) * columns
    scratch = kernels.empty((min(size, stop - start),))
    for first in range(start, stop, size):
        last = min(first + size, stop)
        own = gradient[first:last]
        for place, model in enumerate(held.whole):
            total[model] += _task_vector(held, place, first, last, scratch[: last - first], workspace) @ own
        for model in () if held.plain else thin:
            values = scratch[: last - first]
            held.models[model].load(first, last, values, workspace)
            values -= held.base[first:last]
            total[model] += values @ own
    return total


def _task_vector(held: Held, place: int, start: int, stop: int, scratch: Values, workspace: Workspace) -> Values:
    """Elements of a model held whole, less the base's, in float32; `scratch` or a view of what is held."""
    row = held.rows[place, start:stop]
    if not held.deltas:
        return np.subtract(row, held.base[start:stop], out=scratch)
    if not workspace.kernels.on_host:
        return row.float()
    if row.dtype == np.uint16:
        workspace.kernels.load(row.view(np.uint8), "BF16", scratch)
        return scratch
    return row
