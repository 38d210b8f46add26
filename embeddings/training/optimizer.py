"""The optimiser of a training: AdamW without decay on biases and norms, and the learning rate's rise and fall.

As transformers' Trainer, so that results can be compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from embeddings.training.checkpointing import Learner


def adamw(learner: Learner, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW on what is trained."""
    import torch

    # Biases and norms do not decay; nor do the tables of relative positions, which transformers counts among the biases.
    decays = {name: parameter.ndim > 1 and "bias" not in name for name, parameter in learner.named_parameters()}
    matrices = [parameter for name, parameter in learner.named_parameters() if decays[name]]
    vectors = [parameter for name, parameter in learner.named_parameters() if not decays[name]]
    groups = [
        {"params": group, "weight_decay": decay} for group, decay in ((matrices, weight_decay), (vectors, 0.0)) if group
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def rate(number: int, steps: int, peak: float, warmup: float) -> float:
    """The learning rate of a step, from 0: linearly up over the warm-up, linearly down to 0 at the end."""
    rising = -(-steps * warmup // 1)  # rounded up, as transformers does
    if number < rising:
        return peak * number / max(1.0, rising)
    return peak * max(0.0, (steps - number) / max(1.0, steps - rising))
