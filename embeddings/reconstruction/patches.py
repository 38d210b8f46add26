"""Masked patches: a vision–language model paints in, from a state, what was hidden of an image (CoCoA, stage 1).

What is masked is all that one token of the language model stands for (merge × merge patches): of a single patch, its
neighbours under the same token would tell most [ours; the paper says "patches"]. It is painted over in mean grey behind the
processor, before the vision encoder; the state of the last layer at the image's token predicts the processor's normalised
values by a linear head, which is dropped afterwards. Source: arXiv 2603.01471, reconstructed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from embeddings.images.reader import ImageReader
from embeddings.reconstruction.batch import Batch
from embeddings.reconstruction.images import ImageBatch

if TYPE_CHECKING:
    import torch


def with_masked_patches(batch: Batch, reader: ImageReader, share: float, draw: np.random.Generator) -> Batch:
    """The batch with a part of each image painted over.

    Args:
        batch: on the CPU, as `images.attached` gave it; without images it stays as it is.
        share: of an image's tokens, in [0, 1]; at least one where it is not 0.
    """
    import torch

    images = batch.images
    if images is None or share == 0:
        return batch
    assert isinstance(images, ImageBatch)
    size = reader.merge**2
    counts = (images.grids.prod(1) // size).tolist()
    chosen = []
    for start, count in zip(np.cumsum([0, *counts]).tolist(), counts, strict=False):
        chosen.append(start + np.sort(draw.permutation(count)[: max(1, round(share * count))]))
    masked = torch.from_numpy(np.concatenate(chosen))  # (masked tokens,) of all image tokens
    blocks = images.pixels.reshape(-1, size * images.pixels.shape[1])  # (image tokens, values)
    painted = blocks.clone()
    painted[masked] = 0.0  # the mean colour, since the values are normalised
    places = (batch.ids == reader.image_id).nonzero()[masked]
    return replace(
        batch,
        images=ImageBatch(painted.reshape(images.pixels.shape), images.grids, targets=blocks[masked], places=places),
    )


def new_head(width: int, values: int, seed: int = 0) -> torch.nn.Linear:
    """From a state to the values of a token's patches.

    Args:
        width: of a state.
        values: of all patches of a token.
    """
    import torch

    head = torch.nn.Linear(width, values)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.02)
        head.bias.zero_()
    return head


def head_of(config: Any) -> torch.nn.Linear:
    """The head for a model of this configuration, of images and texts."""
    vision = config.vision_config
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2  # of a patch
    return new_head(int(config.get_text_config().hidden_size), int(values * vision.spatial_merge_size**2))


def patch_loss(head: Any, hidden: torch.Tensor, images: ImageBatch) -> torch.Tensor:
    """Mean squared error of the masked values, scalar float32; of no masked patch 0, with a gradient of 0.

    Args:
        head: of `new_head`.
        hidden: (rows, tokens, width)
    """
    if images.targets is None or images.places is None:
        return hidden.sum() * 0.0
    row, token = images.places.unbind(1)
    painted = head(hidden[row, token].float())  # (masked tokens, values)
    loss: torch.Tensor = (painted - images.targets).square().mean()
    return loss
