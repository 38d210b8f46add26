"""Attention patterns once more: entry by entry, from the table of what each kind of token sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PADDING, SOURCE, EOS, TARGET = 0, 1, 2, 3


def may_look(
    segments: Sequence[int],
    documents: Sequence[int],
    pattern: str,
    *,
    eos_sees_b: bool = True,
    window: int | None = None,
) -> NDArray[np.bool_]:
    """(tokens, tokens) of one row: whether the token of a row may look at that of a column."""
    tokens = len(segments)
    found = np.zeros((tokens, tokens), bool)
    for row in range(tokens):
        for column in range(tokens):
            found[row, column] = row == column or (
                segments[row] != PADDING
                and segments[column] != PADDING
                and documents[row] == documents[column]
                and _sees(row, column, segments[row], segments[column], pattern, eos_sees_b)
                and _near(row, column, pattern, window)
            )
    return found


def _sees(row: int, column: int, looks: int, seen: int, pattern: str, eos_sees_b: bool) -> bool:
    if pattern == "causal":
        return column <= row
    if pattern == "bidirectional":
        return True
    if pattern == "attention_stop":
        return column <= row and (looks != TARGET or seen in (EOS, TARGET))
    if looks == SOURCE:
        return seen in (SOURCE, EOS)
    if looks == EOS:
        return seen in (SOURCE, EOS) or eos_sees_b
    return seen in (EOS, TARGET)


def _near(row: int, column: int, pattern: str, window: int | None) -> bool:
    if window is None:
        return True
    if pattern in ("causal", "attention_stop"):
        return row - column < window
    return abs(row - column) <= window


def positions(segments: Sequence[int], documents: Sequence[int]) -> list[int]:
    """Of one row: each token's place in its sequence; 0 for padding."""
    found, seen = [], dict.fromkeys(documents, 0)
    for segment, document in zip(segments, documents, strict=True):
        found.append(0 if segment == PADDING else seen[document])
        seen[document] += segment != PADDING
    return found
