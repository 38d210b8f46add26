"""Reader: texts to token ids, as the objectives want them: without EOS, which they put in themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDES = ("source", "target")


@dataclass(frozen=True)
class Reader:
    """A tokenizer and the ids that reconstruction needs.

    Attributes:
        eos_id: through which all goes.
        mask_id: stands for what is masked.
        pad_left: whether rows are padded on the left.
        max_length: tokens of a "source", with its EOS, and of a "target".
        pack: tokens of a packed row; 0: each sequence has a row of its own.
        processor: of images and texts; None where there are no images.
    """

    tokenizer: Any = field(repr=False)
    eos_id: int
    mask_id: int
    pad_id: int
    pad_left: bool = False
    max_length: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 512))
    pack: int = 0
    processor: Any = field(default=None, repr=False)
    _bare: dict[str, list[int]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def start_tokens(self) -> int:
        """How many tokens the tokenizer puts before a source (BOS)."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        return next((place for place in range(len(whole)) if whole[place] == plain[0]), 0)

    def before(self, source: Sequence[int] | NDArray[np.int64], prompt: str = "") -> int:
        """How many of a source's ids stand before its own text: what the tokenizer puts there, and the prompt's.

        A token that prompt and text share is the text's.
        """
        if not prompt:
            return self.start_tokens
        bare = self._bare.get(prompt)
        if bare is None:
            bare = self._bare[prompt] = self.tokenizer(prompt)["input_ids"]
        alike = (own == its for own, its in zip(source, bare, strict=False))
        return next((place for place, same in enumerate(alike) if not same), min(len(source), len(bare)))

    def ids(self, texts: Sequence[str], side: str = "source") -> list[list[int]]:
        """Token ids of each text, cut to the side's length.

        Args:
            side: a "source" begins as the tokenizer has it (BOS) and leaves room for EOS, a "target" has no such tokens.
        """
        if not texts:
            return []
        source = side == "source"
        rows = self.tokenizer(
            list(texts),
            add_special_tokens=source,
            return_attention_mask=False,
            truncation=True,
            max_length=self.max_length[side] + 1,  # it may put EOS there
        )["input_ids"]
        return [self.cut(row, side) for row in rows]

    def cut(self, ids: Sequence[int], side: str = "source") -> list[int]:
        """The ids without EOS behind them, cut to the side's length."""
        own = list(ids)
        while own and own[-1] == self.eos_id:
            own.pop()
        return own[: max(1, self.max_length[side] - (side == "source"))]

    def array(self, ids: Sequence[int], side: str = "source") -> NDArray[np.int64]:
        """`cut`, as an array."""
        return np.asarray(self.cut(ids, side), np.int64)
