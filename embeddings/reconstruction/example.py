"""Example: what an objective collates: a text, or two that belong together, in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """A text, or two that belong together.

    Attributes:
        source: token ids, without EOS.
        target: token ids of what is reconstructed, without special tokens; None for a single text.
        text: the source's own text, where an objective changes its words.
        prompt: before the source's text; it is read, and neither masked nor told again.
        image: before the source's text.
        where: file and row, for errors.
    """

    source: Sequence[int]
    target: Sequence[int] | None = None
    text: str | None = None
    prompt: str = ""
    image: Path | None = None
    where: str = ""
