"""Who may look at whom: attention masks and positions from the segments of a batch's tokens. Pure functions.

| pattern | a source token sees | EOS sees | a target token sees |
| --- | --- | --- | --- |
| `causal` | what is before it | what is before it | what is before it |
| `bidirectional` | all | all | all |
| `collaborative` (CoCoA, arXiv 2603.01471) | source, EOS | all; without `eos_sees_b` source, EOS | EOS, target |
| `attention_stop` (LLM-QL, arXiv 2504.05216) | what is before it | what is before it | EOS, targets before it |

Always within its own sequence, itself included. A padding token sees itself alone, and no one sees it: a row of a softmax
over nothing would be NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from embeddings.reconstruction.batch import EOS, PADDING, SOURCE, TARGET

if TYPE_CHECKING:
    import torch

PATTERNS = ("causal", "bidirectional", "collaborative", "attention_stop")
_CAUSAL = ("causal", "attention_stop")


def allowed(
    segments: torch.Tensor,
    pattern: str,
    *,
    documents: torch.Tensor | None = None,
    eos_sees_b: bool = True,
    window: int | None = None,
) -> torch.Tensor:
    """Whether the token of a row (third axis) may look at that of a column (fourth axis).

    Args:
        segments: (rows, tokens) int64, see `batch`; padding on either side.
        documents: (rows, tokens): which tokens are of one sequence, in packed rows.
        eos_sees_b: of `collaborative`: EOS sees the target, as published; else the source reaches the target only
            through what EOS knows without it.
        window: of a layer with a sliding window, as transformers has it: causal patterns see the last `window` tokens,
            themselves included, the others `window` tokens on either side.

    Returns:
        (rows, 1, tokens, tokens) bool.
    """
    import torch

    tokens = segments.shape[1]
    place = torch.arange(tokens, device=segments.device)
    row, column = place[:, None], place[None, :]
    of_row, of_column = segments[:, :, None], segments[:, None, :]
    seen = _seen(of_row, of_column, row, column, pattern, eos_sees_b, window)  # (rows, tokens, tokens)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    return (seen | (row == column))[:, None]


def mask_mod(
    segments: torch.Tensor,
    pattern: str,
    *,
    documents: torch.Tensor | None = None,
    eos_sees_b: bool = True,
    window: int | None = None,
) -> Callable[[Any, Any, Any, Any], torch.Tensor]:
    """`allowed` entry by entry, as flex attention wants it: of batch row, head, row, column."""

    def mod(batch: Any, head: Any, row: Any, column: Any) -> torch.Tensor:
        of_row, of_column = segments[batch, row], segments[batch, column]
        seen = _seen(of_row, of_column, row, column, pattern, eos_sees_b, window)
        if documents is not None:
            seen = seen & (documents[batch, row] == documents[batch, column])
        return seen | (row == column)

    return mod


def for_model(allowed: torch.Tensor, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    """The mask in the form that the attention takes: bool for `sdpa`, for `eager` numbers that are added.

    transformers adds a boolean mask under `eager`, without a word: nothing is masked then.
    """
    import torch

    if implementation != "eager":
        return allowed
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min)


def positions(segments: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor:
    """(rows, tokens) int64: places in the sequence, from 0 wherever the padding is; 0 for padding."""
    import torch

    real = segments != PADDING
    place = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    belongs = real.long() if documents is None else torch.where(real, documents + 1, 0)
    begins = torch.ones_like(real)
    begins[:, 1:] = belongs[:, 1:] != belongs[:, :-1]
    start = torch.where(begins, place, 0).cummax(1).values  # (rows, tokens)
    return torch.where(real, place - start, 0)


def _seen(
    of_row: torch.Tensor,
    of_column: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    pattern: str,
    eos_sees_b: bool,
    window: int | None,
) -> torch.Tensor:
    """The patterns, for one entry or for all of them; self and sequences are the caller's."""
    seen = (of_row != PADDING) & (of_column != PADDING)
    if pattern in _CAUSAL:
        seen = seen & (row >= column)
    if pattern in ("collaborative", "attention_stop"):
        seen = seen & ~((of_row == TARGET) & (of_column == SOURCE))
    if pattern == "collaborative":
        blind = of_row == SOURCE if eos_sees_b else (of_row == SOURCE) | (of_row == EOS)
        seen = seen & ~(blind & (of_column == TARGET))
    if window is not None:
        distance = row - column
        seen = seen & ((distance < window) if pattern in _CAUSAL else (distance.abs() <= window))
    return seen
