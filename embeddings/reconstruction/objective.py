"""Objective: what a step learns from; each is one file with its collator, its pattern and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from embeddings.reconstruction.batch import EOS, NO_LABEL, SOURCE, TARGET, Batch, Counts, Row
from embeddings.reconstruction.example import Example
from embeddings.reconstruction.reader import Reader

if TYPE_CHECKING:
    import torch

    from embeddings.reconstruction.model import Reconstructor


@dataclass(frozen=True)
class Outcome:
    """What a batch gave.

    Attributes:
        loss: scalar, in nats a token.
        numbers: of the same batch, by name, without a gradient: "accuracy" (share of tokens predicted right) and
            what else the objective knows; scalars that stay where the model is until someone reads them.
        predictions: how many tokens were predicted.
    """

    loss: torch.Tensor
    numbers: dict[str, torch.Tensor]
    predictions: int

    def plain(self) -> dict[str, float]:
        """The loss under "loss" and the numbers, read in one go."""
        import torch

        names = ["loss", *self.numbers]
        values = torch.stack([value.detach().float() for value in (self.loss, *self.numbers.values())]).tolist()
        return dict(zip(names, values, strict=True))


class Objective(Protocol):
    """What a reconstruction learns by."""

    @property
    def name(self) -> str:
        """As metrics and stages call it."""

    def collate(self, examples: Sequence[Example], reader: Reader, draw: np.random.Generator) -> Batch:
        """Examples as a batch, on the CPU; what is random comes from `draw` alone.

        Raises:
            CuveeError: an example lacks what the objective needs.
        """

    def loss(self, model: Reconstructor, batch: Batch, whole: Counts | None = None) -> Outcome:
        """Of a batch on the model's device.

        Args:
            whole: what the batch is a part of: loss and numbers are what it adds to those of the whole.
        """


def cross_entropy(model: Reconstructor, hidden: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each prediction of the batch its loss in nats, and whether its first guess is right; (predictions,) each.

    Args:
        hidden: (rows, tokens, width)
    """
    import torch

    logits = model.logits(hidden, batch.places)  # (predictions, vocabulary)
    losses = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    return losses, logits.detach().argmax(1) == batch.labels


def predicted_mean(model: Reconstructor, hidden: torch.Tensor, batch: Batch, whole: Counts | None = None) -> Outcome:
    """The mean loss of all predictions; 0 where a batch has none: texts of one token."""
    losses, right = cross_entropy(model, hidden, batch)
    count = max(1, (whole or batch.counts).predictions)
    return Outcome(losses.sum() / count, {"accuracy": right.sum() / count}, len(losses))


def drawn(share: float, among: NDArray[np.bool_], draw: np.random.Generator) -> NDArray[np.bool_]:
    """Each of the tokens in `among`, (tokens,), with this probability; one at least where there is one."""
    chosen = among & (draw.random(len(among)) < share)
    if not chosen.any() and among.any():
        chosen[draw.choice(np.flatnonzero(among))] = True
    return chosen


def bridged(source: NDArray[np.int64], target: NDArray[np.int64], eos_id: int) -> tuple[NDArray[np.int64], ...]:
    """[source][EOS][target]: ids and segments."""
    ids = np.concatenate([source, [eos_id], target]).astype(np.int64)
    segments = np.repeat([SOURCE, EOS, TARGET], [len(source), 1, len(target)]).astype(np.int64)
    return ids, segments


def masked_row(ids: NDArray[np.int64], segments: NDArray[np.int64], masked: NDArray[np.bool_], mask_id: int) -> Row:
    """A row whose masked tokens are read as the mask and predicted by the state before them."""
    return Row(np.where(masked, mask_id, ids), segments, np.where(masked, ids, NO_LABEL))
