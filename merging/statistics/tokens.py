"""Tokens: one text as a model reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tokens:
    """One text as the model reads it.

    Attributes:
        sequence: by the model's name, what has an entry for each token, (length,); `input_ids` among it.
        more: by the model's name, what else it reads, as tensors: an image's pixels.
        prompt: how many of the first tokens pooling leaves out.
    """

    sequence: Mapping[str, NDArray[np.int64]]
    more: Mapping[str, Any] = field(default_factory=dict)
    prompt: int = 0

    def __len__(self) -> int:
        return len(self.sequence["input_ids"])
