"""Packing: several texts in one row of a batch, each blind to the others, so that nothing is spent on padding.

Each text keeps its own positions and attends to itself alone, by a mask of blocks. Whether a model computes the same
vectors then is found out by trying (`find`), not by its architecture's name: some have positions of their own, windows,
or attention that takes no such mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

#: Tokens of a row at least: shorter ones fill badly; attention and its dropout cost as much more as a row is longer than its
#: texts.
WIDTH = 32
_EQUAL = 1e-4  # of token vectors, whose entries are around 1


@dataclass(frozen=True)
class Packing:
    """How a model takes packed texts.

    Attributes:
        causal: whether a token sees only those before it.
        first: the position of a text's first token.
        boolean: the mask's form: true where a token may look, or 0 there and −∞ elsewhere.
    """

    causal: bool
    first: int
    boolean: bool


def find(model: Any, *, causal: bool, types: bool) -> Packing | None:
    """How a transformers' model takes packed texts; None if it does not.

    Args:
        types: whether it wants token_type_ids.
    """
    import torch

    config = model.config
    boolean = getattr(config, "_attn_implementation", "") == "sdpa"
    # A window or chunks in some layers: seen only in texts that are longer than those of the trial.
    if any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "local_attention")):
        return None
    vocabulary = int(getattr(config, "vocab_size", 0) or 64)
    draw = np.random.default_rng(0)
    tokens = [draw.integers(3, max(4, min(vocabulary, 30000)), length).astype(np.int32) for length in (9, 2, 5, 14, 1)]
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            expected = [_alone(model, each, types) for each in tokens]
            for first in dict.fromkeys((0, int(getattr(config, "pad_token_id", None) or 0) + 1)):
                packing = Packing(causal, first, boolean)
                try:
                    hidden, places = forward(model, packing, tokens, types=types, width=17)
                except Exception:  # every architecture has its own ways to refuse
                    continue
                got = [hidden[place] for place in places]
                if all(torch.allclose(a, b, atol=_EQUAL, rtol=1e-4) for a, b in zip(got, expected, strict=True)):
                    return packing
    finally:
        model.train(training)
    return None


def forward(
    model: Any, packing: Packing, tokens: Sequence[NDArray[np.int32]], *, types: bool, width: int = WIDTH
) -> tuple[torch.Tensor, list[NDArray[np.int64]]]:
    """Token vectors of all texts, (tokens of all rows, hidden), and for each text where its own are, (tokens,).

    Args:
        tokens: ids of each text, none of them negative.
    """
    import torch

    lengths = [len(each) for each in tokens]
    width = max(width, *lengths)
    rows, starts = fit(lengths, width)
    count = max(rows, default=0) + 1
    shape = (count, width)
    ids, positions, text = np.zeros(shape, np.int64), np.full(shape, packing.first), np.zeros(shape, np.int32)
    places = []
    for number, (own, row, start) in enumerate(zip(tokens, rows, starts, strict=True)):
        part = slice(start, start + len(own))
        ids[row, part], text[row, part] = own, number + 1
        positions[row, part] = packing.first + np.arange(len(own))
        places.append(row * width + np.arange(part.start, part.stop))
    device = model.device
    names = torch.from_numpy(text).to(device)
    mask = names[:, None, :, None] == names[:, None, None, :]  # (rows, 1, width, width); padding sees padding
    if packing.causal:
        mask = mask.tril()
    if not packing.boolean:
        mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, torch.finfo(torch.float32).min)
    features = {"input_ids": torch.from_numpy(ids).to(device), "position_ids": torch.from_numpy(positions).to(device)}
    if types:
        features["token_type_ids"] = torch.zeros_like(features["input_ids"])
    hidden = model(**features, attention_mask=mask, return_dict=True)[0]
    return hidden.reshape(count * width, -1), places


def fit(lengths: Sequence[int], width: int) -> tuple[list[int], list[int]]:
    """The row of each text and where in it it starts: each in the first row that has room, the longest first."""
    rows, starts = [0] * len(lengths), [0] * len(lengths)
    used: list[int] = []
    for place in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        row = next((i for i, full in enumerate(used) if full + lengths[place] <= width), len(used))
        if row == len(used):
            used.append(0)
        rows[place], starts[place] = row, used[row]
        used[row] += lengths[place]
    return rows, starts


def _alone(model: Any, tokens: NDArray[np.int32], types: bool) -> torch.Tensor:
    """(tokens, hidden) of a text by itself."""
    import torch

    ids = torch.from_numpy(tokens.astype(np.int64))[None].to(model.device)
    features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if types:
        features["token_type_ids"] = torch.zeros_like(ids)
    hidden: torch.Tensor = model(**features, return_dict=True)[0][0]
    return hidden
