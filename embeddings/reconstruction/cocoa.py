"""CoCoA's first two stages: a decoder learns to look both ways, then to put a text into EOS (arXiv 2603.01471).

Stage 3 is contrastive training with EOS as the pooled token: `cuvee train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embeddings.images.reader import Picture
from embeddings.reconstruction.batch import EOS, SOURCE, TARGET, Batch, Counts, Row, stack
from embeddings.reconstruction.example import Example
from embeddings.reconstruction.images import ImageBatch, attached, pictures_of
from embeddings.reconstruction.objective import Outcome, bridged, drawn, masked_row, predicted_mean
from embeddings.reconstruction.patches import patch_loss, with_masked_patches
from embeddings.reconstruction.reader import Reader
from merging.errors import CuveeError

if TYPE_CHECKING:
    import torch

    from embeddings.reconstruction.model import Reconstructor

BRIDGES = ("attention", "embedding")


@dataclass(frozen=True)
class WarmUp:
    """Stage 1: masked next-token prediction with the causal mask dropped; the state at i − 1 predicts a masked token i.

    An example is one sequence: its image and source, its target behind them where it has one, EOS. Of the images a part is
    masked too, see `patches`.

    Attributes:
        mask: share of the text's tokens that are masked, in (0, 1].
        patches: share of an image's patches that are masked.
        patch_weight: of the patches' loss.
    """

    mask: float = 0.2
    patches: float = 0.3
    patch_weight: float = 0.5
    name: str = "warm_up"

    def collate(self, examples: Sequence[Example], reader: Reader, draw: np.random.Generator) -> Batch:
        pictures = pictures_of(examples, reader)
        rows = [self.row(*each, reader, draw) for each in zip(examples, pictures, strict=True)]
        batch = stacked(rows, pictures, "bidirectional", reader)
        return batch if reader.processor is None else with_masked_patches(batch, reader.processor, self.patches, draw)

    def row(self, example: Example, picture: Picture | None, reader: Reader, draw: np.random.Generator) -> Row:
        target = [] if example.target is None else reader.cut(example.target, "target")
        image, source = image_ids(picture, reader), reader.cut(example.source)
        ids = np.array([*image, *source, *target, reader.eos_id], np.int64)
        segments = np.full(len(ids), SOURCE, np.int64)
        segments[-1] = EOS
        free = segments == SOURCE
        before = len(image) + reader.before(source, example.prompt)
        free[: max(1, before)] = False  # nothing is before the first to predict it; and an image has no words
        return masked_row(ids, segments, drawn(self.mask, free, draw), reader.mask_id)

    def loss(self, model: Reconstructor, batch: Batch, whole: Counts | None = None) -> Outcome:
        hidden = model.hidden(batch)
        outcome = predicted_mean(model, hidden, batch, whole)
        if not isinstance(batch.images, ImageBatch) or batch.images.targets is None:
            return outcome
        share = batch.images.masked / whole.patches if whole else 1.0
        painted = patch_loss(model.patch_head, hidden, batch.images) * share
        numbers = {**outcome.numbers, "patch_loss": painted.detach()}
        return Outcome(outcome.loss + self.patch_weight * painted, numbers, outcome.predictions)


@dataclass(frozen=True)
class Bridge:
    """Stage 2: [source][EOS][target]; the masked target is reconstructed from what EOS knows of the source.

    Source and EOS see one another, EOS and target see one another, source and target do not. The first token of the target
    is always masked [ours]: it is EOS's own state of the last layer, the vector that is pooled later, that predicts it. All
    other predictions reach that vector not at all, but EOS's states in the layers below it.

    With `bridge: embedding` [ours] they all do: a first pass reads [source][EOS] alone, and the vector of EOS, at the mean
    length of the input embeddings, is what a second pass reads in EOS's place before the target. Nothing of the target is
    in it then, as with `eos_sees_b: false`.

    Attributes:
        mask: share of the target's tokens that are masked, in (0, 1].
        eos_sees_b: EOS sees the target, as published; without it all that the target learns of the source is in what EOS
            knew before [ours].
        bridge: "attention" or "embedding".
    """

    mask: float = 0.7
    eos_sees_b: bool = True
    bridge: str = "attention"
    name: str = "bridge"

    def collate(self, examples: Sequence[Example], reader: Reader, draw: np.random.Generator) -> Batch:
        pictures = pictures_of(examples, reader)
        rows = [self.row(*each, reader, draw) for each in zip(examples, pictures, strict=True)]
        return stacked(rows, pictures, "collaborative", reader)

    def row(self, example: Example, picture: Picture | None, reader: Reader, draw: np.random.Generator) -> Row:
        target = needed_target(example, reader)
        source = np.concatenate([image_ids(picture, reader), reader.array(example.source)]).astype(np.int64)
        ids, segments = bridged(source, target, reader.eos_id)
        masked = drawn(self.mask, segments == TARGET, draw)
        masked[-len(target)] = True
        return masked_row(ids, segments, masked, reader.mask_id)

    def loss(self, model: Reconstructor, batch: Batch, whole: Counts | None = None) -> Outcome:
        if self.bridge == "embedding":
            return predicted_mean(model, *through_embedding(model, batch), whole)
        return predicted_mean(model, model.hidden(batch, eos_sees_b=self.eos_sees_b), batch, whole)


def image_ids(picture: Picture | None, reader: Reader) -> NDArray[np.int64]:
    """What stands for an image before a text; nothing for none."""
    return np.empty(0, np.int64) if picture is None else reader.processor.ids(reader.processor.tokens(picture))


def stacked(rows: Sequence[Row], pictures: Sequence[Picture | None], pattern: str, reader: Reader) -> Batch:
    """Rows with their images as one batch; rows with images are not packed."""
    there = [picture for picture in pictures if picture is not None]
    pack = 0 if there else reader.pack
    batch = stack(rows, pattern, pad_id=reader.pad_id, pad_left=reader.pad_left, pack=pack)
    return attached(batch, there, reader)


def needed_target(example: Example, reader: Reader) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The target's ids, one at least.

    Raises:
        CuveeError: there is none.
    """
    target = reader.array(example.target or (), "target")
    if not len(target):
        raise CuveeError("has no text to reconstruct", where=example.where, mend="give it a positive")
    return target


def through_embedding(model: Reconstructor, batch: Batch) -> tuple[torch.Tensor, Batch]:
    """The states of [EOS][target], where EOS is read as the vector that [source][EOS] gave; and the batch of them.

    Returns:
        (rows, tokens, width), and the batch without its sources.
    """
    import torch

    source = batch.only((batch.segments == SOURCE) | (batch.segments == EOS), "bidirectional")
    target = batch.only((batch.segments == EOS) | (batch.segments == TARGET), "bidirectional")
    vectors = model.eos_states(model.hidden(source), source)  # (sequences, width)
    vectors = torch.nn.functional.normalize(vectors, dim=1) * model.embedding_length
    return model.hidden(target, embeddings=vectors), target
