"""The diagonal of the Fisher information by its definition: one example, one choice, one plain backward at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from merging.statistics.heads import Batch


def fisher(module: torch.nn.Module, forward: Callable[..., torch.Tensor], batch: Batch) -> Mapping[str, torch.Tensor]:
    """By parameter, float64: the mean over the batch's examples of sum_c p_c (d log p_c / d theta)^2."""
    total = {name: torch.zeros(own.shape, dtype=torch.float64) for name, own in module.named_parameters()}
    for example in range(batch.examples):
        choices = batch.one(example).choices(forward)
        log_p = choices.log_p()[0]
        for choice, weight in enumerate(choices.weights[0].tolist()):
            if weight == 0:
                continue
            module.zero_grad(set_to_none=True)
            log_p[choice].backward(retain_graph=True)
            for name, own in module.named_parameters():
                if own.grad is not None:
                    total[name] += weight * own.grad.double() ** 2
    module.zero_grad(set_to_none=True)
    return {name: value / batch.examples for name, value in total.items()}
