"""A rival in RetroMAE's manner: a text is reconstructed from the EOS embedding of a corrupted copy of itself.

From the paper (arXiv 2205.12035): two corruptions of one text, a light one for what encodes and a heavy one for what
decodes, the embedding between them, and both of the losses of masked tokens, added.
Reconstructed, since that is a method for BERT: encoder and decoder are the same causal model with its mask dropped, in
one pass; the embedding is EOS's states in every layer, not one vector put before a decoder of one layer; the state at
i − 1 predicts a masked token i; there is no enhanced decoding (a mask of its own for every token).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from embeddings.reconstruction.batch import SOURCE, TARGET, Batch, Counts, Row, stack
from embeddings.reconstruction.example import Example
from embeddings.reconstruction.images import refuse_images
from embeddings.reconstruction.objective import Outcome, bridged, cross_entropy, drawn, masked_row
from embeddings.reconstruction.reader import Reader
from merging.errors import CuveeError

if TYPE_CHECKING:
    from embeddings.reconstruction.model import Reconstructor


@dataclass(frozen=True)
class RetroMAE:
    """[text, lightly masked][EOS][the same text, heavily masked]; EOS does not see the second copy.

    The first token of the second copy is always masked: EOS's own state of the last layer predicts it. An example's target
    is not read.

    Attributes:
        encoder_mask: share of the first copy's tokens that are masked, in [0, 1).
        decoder_mask: share of the second copy's, in (0, 1].
        encoder_weight: of the loss of the first copy's masked tokens beside that of the second's.
    """

    encoder_mask: float = 0.3
    decoder_mask: float = 0.7
    encoder_weight: float = 1.0
    name: str = "retromae"

    def collate(self, examples: Sequence[Example], reader: Reader, draw: np.random.Generator) -> Batch:
        refuse_images(examples, "retromae")
        rows = [self._row(example, reader, draw) for example in examples]
        return stack(rows, "collaborative", pad_id=reader.pad_id, pad_left=reader.pad_left, pack=reader.pack)

    def _row(self, example: Example, reader: Reader, draw: np.random.Generator) -> Row:
        source = reader.array(example.source)
        before = reader.before(source, example.prompt)
        target = source[before:][: reader.max_length["target"]]
        if not len(target):
            raise CuveeError("has no text to reconstruct", where=example.where, mend="remove the row")
        ids, segments = bridged(source, target, reader.eos_id)
        place = np.arange(len(ids))
        masked = draw.random(len(ids)) < np.where(segments == SOURCE, self.encoder_mask, 0.0)
        masked &= place >= max(1, before)  # nothing is before the first token to predict it
        masked |= drawn(self.decoder_mask, segments == TARGET, draw)
        masked[-len(target)] = True
        return masked_row(ids, segments, masked, reader.mask_id)

    def loss(self, model: Reconstructor, batch: Batch, whole: Counts | None = None) -> Outcome:
        losses, right = cross_entropy(model, model.hidden(batch, eos_sees_b=False), batch)
        of_target = batch.predicted_segments() == TARGET
        whole = whole or batch.counts
        targets, others = max(1, whole.targets), max(1, whole.predictions - whole.targets)
        decoded = (losses * of_target).sum() / targets
        encoded = (losses * ~of_target).sum() / others
        accuracy = (right & of_target).sum() / targets
        numbers = {"accuracy": accuracy, "decoder_loss": decoded.detach(), "encoder_loss": encoded.detach()}
        return Outcome(decoded + self.encoder_weight * encoded, numbers, len(losses))
