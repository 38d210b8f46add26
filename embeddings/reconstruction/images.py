"""Images in a batch of a reconstruction: patches, of which some may be masked, and the positions that a model gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from embeddings.images.reader import Picture, no_images, positions
from embeddings.reconstruction.batch import PADDING, Batch
from merging.errors import CuveeError

if TYPE_CHECKING:
    import torch

    from embeddings.reconstruction.example import Example
    from embeddings.reconstruction.reader import Reader


@dataclass(frozen=True)
class ImageBatch:
    """The images of a batch, in the order of its rows.

    Attributes:
        pixels: (patches, values) float32: of all images, one after the other; what is masked is masked.
        grids: (images, 3) int64.
        targets: (masked tokens, patches of a token × values) float32: what was there; None where nothing is masked.
        places: (masked tokens, 2) int64: row and token that stand for it.
    """

    pixels: torch.Tensor
    grids: torch.Tensor
    targets: torch.Tensor | None = None
    places: torch.Tensor | None = None

    @property
    def masked(self) -> int:
        """How many image tokens are masked."""
        return 0 if self.places is None else len(self.places)

    def arguments(self) -> Mapping[str, torch.Tensor]:
        """As the model's forward names them."""
        return {"pixel_values": self.pixels, "image_grid_thw": self.grids}

    def to(self, device: Any) -> ImageBatch:
        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=True),
            grids=self.grids.to(device, non_blocking=True),
            targets=moved(self.targets),
            places=moved(self.places),
        )


def attached(batch: Batch, pictures: Sequence[Picture], reader: Reader) -> Batch:
    """The batch with its images, and with the positions that the model gives them.

    Args:
        batch: its ids have those of `ImageReader.ids` for each picture, in this order; not packed.
    """
    import torch

    if not pictures:
        return batch
    assert batch.documents is None, "packed rows have no images"
    grids = np.asarray([picture.grid for picture in pictures], np.int64)
    own = reader.processor
    places = positions(
        batch.ids.numpy(), batch.segments.numpy() != PADDING, grids, image_id=own.image_id, merge=own.merge
    )
    pixels = torch.from_numpy(np.concatenate([picture.pixels for picture in pictures]))
    return replace(
        batch,
        images=ImageBatch(pixels, torch.from_numpy(grids)),
        inputs={**batch.inputs, "position_ids": torch.from_numpy(places)},
    )


def pictures_of(examples: Sequence[Example], reader: Reader) -> list[Picture | None]:
    """The image of each example; None for one without.

    Raises:
        CuveeError: the model reads no images, or a file is none.
    """
    found: list[Picture | None] = []
    for example in examples:
        if example.image is None:
            found.append(None)
            continue
        if reader.processor is None:
            raise no_images(example.where)
        found.append(reader.processor.read(example.image))
    return found


def refuse_images(examples: Sequence[Example], objective: str) -> None:
    """Of an objective that would leave them out without a word.

    Raises:
        CuveeError: an example has one.
    """
    for example in examples:
        if example.image is not None:
            what = f"has an image, and {objective} reads texts alone"
            raise CuveeError(what, where=example.where, mend="run `cuvee pretrain cocoa`")
