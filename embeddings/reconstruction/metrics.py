"""What a pre-training comes to: how well a text is told again, and how its embeddings spread. Pure functions.

Sources: effective rank, Roy & Vetterli 2007, as in arXiv 2602.09789; alignment and uniformity, arXiv 2005.10242.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def effective_rank(embeddings: torch.Tensor, *, centred: bool = False) -> float:
    """exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ / Σσ of the singular values: 1 if all point one way, min(texts, dimension) at most.

    Args:
        embeddings: (texts, dimension).
        centred: without their mean.

    Returns:
        0 where there is nothing but zeros: a single text without its mean.
    """
    import torch

    matrix = embeddings.double()
    if centred:
        matrix = matrix - matrix.mean(0)
        # What is left of equal embeddings is rounding, and no direction.
        if float(matrix.norm()) <= 1e-12 * float(embeddings.double().norm()):
            return 0.0
    singular = torch.linalg.svdvals(matrix)
    total = float(singular.sum())
    if not total:
        return 0.0
    shares = singular[singular > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))


def alignment(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean squared distance of the two sides of a pair, in [0, 4]: 0 where they have one embedding.

    Args:
        first, second: (pairs, dimension), of length one.
    """
    return float((first.double() - second.double()).pow(2).sum(1).mean())


def uniformity(embeddings: torch.Tensor) -> float:
    """Log of the mean of exp(−2 d²) over all pairs of texts: 0 where all have one embedding, below it where they spread.

    Args:
        embeddings: (texts, dimension), of length one; at least two.
    """
    import torch

    distances = torch.pdist(embeddings.double())
    return float((-2 * distances.pow(2)).exp().mean().log())


@dataclass
class Reconstruction:
    """How well tokens are told again, gathered batch by batch."""

    _losses: list[torch.Tensor] = field(default_factory=list)
    _entropies: list[torch.Tensor] = field(default_factory=list)
    _right: list[torch.Tensor] = field(default_factory=list)
    _whole: list[torch.Tensor] = field(default_factory=list)

    def add(self, logits: torch.Tensor, labels: torch.Tensor, sequences: torch.Tensor) -> None:
        """Takes in a batch.

        Args:
            logits: (predictions, vocabulary).
            labels: (predictions,) int64, what should have been told.
            sequences: (predictions,) int64, of which sequence each is a token; of this batch alone.
        """
        import torch

        logs = torch.log_softmax(logits.float(), 1)
        self._losses.append(-logs.gather(1, labels[:, None])[:, 0].double())
        self._entropies.append(-(logs.exp() * logs).sum(1).double())
        right = logs.argmax(1) == labels
        self._right.append(right)
        _, number = sequences.unique(return_inverse=True)
        wrong = torch.zeros(int(number.max()) + 1 if len(number) else 0, device=number.device)
        wrong.index_add_(0, number, (~right).to(wrong.dtype))
        self._whole.append(wrong == 0)

    def numbers(self) -> dict[str, float]:
        """`loss` and `entropy` of the predictions, means in nats; `accuracy`, the share of tokens that were told right;
        `exact`, that of sequences without a mistake. Empty where nothing was predicted.
        """
        import torch

        if not sum(map(len, self._losses)):
            return {}
        return {
            "loss": float(torch.cat(self._losses).mean()),
            "entropy": float(torch.cat(self._entropies).mean()),
            "accuracy": float(torch.cat(self._right).double().mean()),
            "exact": float(torch.cat(self._whole).double().mean()),
        }
