"""Modular gradient surgery: gradients of several tasks made into one that works against none of them.

Source: arXiv 2602.02301 (MGS): the projections of PCGrad (arXiv 2001.06782), for each parameter tensor by itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def modular_gradient_surgery(
    gradients: Sequence[Sequence[torch.Tensor | None]],
    generator: torch.Generator | None = None,
    groups: Sequence[Hashable] | None = None,
) -> list[torch.Tensor | None]:
    """The sum of the tasks' gradients, each freed of what points against another.

    In every group and for every task i, over the other tasks j in random order: where ⟨g_i, g_j⟩ < 0,
    g_i ← g_i − ⟨g_i, g_j⟩/‖g_j‖² · g_j, with g_j as it was at the start. All that is needed of the gradients are their
    inner products: the result is a combination of them, whose factors are found in float64.

    Args:
        gradients: for each task one gradient for each tensor; None where a task does not reach it. Left as they are.
        generator: of the orders, on the CPU; the same seed gives the same result. None: torch's global one.
        groups: a label for each tensor; tensors of one label are projected together, as one vector: `modules(names)`,
            or one label for all of them for PCGrad. None: each tensor by itself.

    Returns:
        For each tensor the sum over the tasks, in its dtype; None where no task has a gradient.
    """
    tensors = len(gradients[0])
    assert all(len(task) == tensors for task in gradients), "every task has a gradient, or None, for each tensor"
    members: dict[Hashable, list[int]] = {}
    for tensor, label in enumerate(range(tensors) if groups is None else groups):
        members.setdefault(label, []).append(tensor)
    grams = _grams(gradients).cpu()  # one transfer for all tensors
    result: list[torch.Tensor | None] = [None] * tensors
    for chosen in members.values():
        factors = _factors(grams[chosen].sum(0), generator)
        for tensor in chosen:
            result[tensor] = _combined([task[tensor] for task in gradients], factors)
    return result


def modules(names: Sequence[str]) -> list[str]:
    """The module of each parameter: "encoder.layer.0.output.dense.weight" → "encoder.layer.0.output.dense"."""
    return [name.rpartition(".")[0] for name in names]


def _grams(gradients: Sequence[Sequence[torch.Tensor | None]]) -> torch.Tensor:
    """(tensors, tasks, tasks) inner products in float64, on the gradients' device; 0 with what is missing."""
    import torch

    device = next((g.device for task in gradients for g in task if g is not None), torch.device("cpu"))
    tasks, tensors = len(gradients), len(gradients[0])
    grams = torch.zeros(tensors, tasks, tasks, dtype=torch.float64, device=device)
    for tensor in range(tensors):
        flat = [(t, _wide(g).reshape(-1)) for t in range(tasks) if (g := gradients[t][tensor]) is not None]
        for i, one in flat:
            for j, other in flat:
                if j <= i:
                    grams[tensor, i, j] = grams[tensor, j, i] = one @ other
    return grams


def _wide(gradient: torch.Tensor) -> torch.Tensor:
    """Without its history, in float32 at least."""
    return gradient.detach().float() if gradient.element_size() < 4 else gradient.detach()


def _factors(gram: torch.Tensor, generator: torch.Generator | None) -> list[float]:
    """How much of each task's original gradient is in the result."""
    import torch

    tasks = len(gram)
    products = gram.tolist()
    total = [0.0] * tasks
    for i in range(tasks):
        mine = [float(k == i) for k in range(tasks)]  # g_i as a combination of the originals
        for j in torch.randperm(tasks, generator=generator).tolist():
            product = sum(factor * products[k][j] for k, factor in enumerate(mine) if factor)
            if j != i and product < 0 < products[j][j]:
                mine[j] -= product / products[j][j]
        total = [sum(pair) for pair in zip(total, mine, strict=True)]
    return total


def _combined(gradients: Sequence[torch.Tensor | None], factors: Sequence[float]) -> torch.Tensor | None:
    """Σ factor · gradient over those that are there, summed in float32 at least."""
    there = [(gradient, factor) for gradient, factor in zip(gradients, factors, strict=True) if gradient is not None]
    if not there:
        return None
    (first, factor), *others = there
    total = _wide(first) * factor
    for gradient, factor in others:
        total.add_(_wide(gradient), alpha=factor)
    return total.to(first.dtype)
