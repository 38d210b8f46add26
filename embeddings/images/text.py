"""ImageText: a text with an image before it, as a batch holds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ImageText:
    """A text with an image before it.

    Attributes:
        ids: (tokens,) int32: what stands for the image, and then the text's.
        image: its file.
    """

    ids: NDArray[np.int32]
    image: Path

    def __len__(self) -> int:
        return len(self.ids)
