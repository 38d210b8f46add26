"""Partners: training rows of data whose rows are single texts, with a label or a score; drawn once, by a seed.

A row of a class gets one positive, another text of its label, and negatives of other labels: it is complete in itself,
so that a batch need not hold other classes. A text with a score gets one other text, and how near their scores are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embeddings.training.token_table import Ragged, offsets_of

NEGATIVES = 7  # as BOOM's classification rows have


@dataclass(frozen=True)
class Partners:
    """Who goes with whom; all numbers are positions of source rows.

    Attributes:
        rows: (rows,) the source rows that became training rows, in their order.
        positives: (rows,)
        negatives: by row.
        scores: (rows,) in [0, 1], of texts with a score; else None.
        notes: on what was left out, one line each.
    """

    rows: NDArray[np.int64]
    positives: NDArray[np.int64]
    negatives: Ragged
    scores: NDArray[np.float32] | None = None
    notes: tuple[str, ...] = ()


def of_labels(
    texts: NDArray[np.int32],
    labels: NDArray[np.int32],
    names: Sequence[str | int | None],
    negatives: int,
    rng: np.random.Generator,
) -> Partners:
    """Of each text one other of its label as positive, so that each is positive once, and `negatives` of other labels.

    The negatives of a row are spread evenly over the other labels' texts. A label with one text is left out, and so is
    a text that comes again with its label.

    Args:
        texts: (rows,) equal numbers for equal texts.
        labels: (rows,) positions in `names`.

    Raises:
        ValueError: no two labels are left.
    """
    _, first = np.unique(labels.astype(np.int64) << 32 | texts, return_index=True)
    keep = np.zeros(len(texts), bool)
    keep[first] = True
    notes = _repeated(len(texts) - len(first))
    counts = np.bincount(labels[keep], minlength=len(names))
    lonely = np.flatnonzero(counts == 1)
    keep &= counts[labels] > 1
    if len(lonely):
        shown = ", ".join(f"'{names[label]}'" for label in lonely[:3]) + (", …" if len(lonely) > 3 else "")
        notes += (f"{len(lonely)} labels with a single text are left out: {shown}",)
    if np.count_nonzero(counts > 1) < 2:
        raise ValueError("fewer than two labels have two texts or more; nothing can be told apart")
    rows = np.flatnonzero(keep)
    order = rng.permutation(rows)
    order = order[np.argsort(labels[order], kind="stable")]  # label by label, shuffled within each
    counts = np.where(counts > 1, counts, 0)
    begins = (offsets_of(counts)[:-1])[labels[order]]  # of the label's block, for each place
    sizes = counts[labels[order]]
    place = np.arange(len(order))
    positive = order[begins + (place - begins + 1) % sizes]
    negative = _from_other_blocks(order, begins, sizes, negatives, rng)
    back = np.argsort(order)
    positive, negative = positive[back], negative[back]
    own = texts[rows][:, None]
    usable = (negative >= 0) & (texts[negative] != own) & (texts[negative] != texts[positive][:, None])
    return Partners(rows, positive, Ragged(offsets_of(usable.sum(axis=1)), negative[usable]), notes=notes)


def of_scores(
    texts: NDArray[np.int32], scores: NDArray[np.float64], rng: np.random.Generator, reach: float | None = None
) -> Partners:
    """Of each text one other, and 1 − |difference of their scores| / the scores' range.

    Args:
        texts: (rows,) equal numbers for equal texts.
        scores: (rows,)
        reach: the range that scores may have; None: what these have.

    Raises:
        ValueError: all scores are equal.
    """
    _, first = np.unique(texts, return_index=True)
    rows = np.sort(first)
    span = float(np.ptp(scores[rows])) if len(rows) else 0.0
    if not span > 0:
        raise ValueError("all scores are equal; nothing can be learned from them")
    order = rng.permutation(rows)
    other = np.roll(order, -1)[np.argsort(order)]
    near = 1 - np.abs(scores[rows] - scores[other]) / (reach or span)
    none = Ragged(np.zeros(len(rows) + 1, np.int64), np.zeros(0, np.int64))
    return Partners(rows, other, none, near.astype(np.float32), _repeated(len(texts) - len(rows)))


def _from_other_blocks(
    order: NDArray[np.int64],
    begins: NDArray[np.int64],
    sizes: NDArray[np.int64],
    count: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """`count` different members of `order` outside each place's own block, one of each equal share; (places, count).

    Where fewer are outside, all of them, and −1.
    """
    outside = len(order) - sizes
    wanted = np.minimum(outside, count)
    found = np.full((len(order), count), -1, np.int64)
    for j in range(count):
        low, high = j * outside // np.maximum(wanted, 1), (j + 1) * outside // np.maximum(wanted, 1)
        share = low + (rng.random(len(order)) * (high - low)).astype(np.int64)
        place = np.where(share < begins, share, share + sizes)
        found[:, j] = np.where(j < wanted, order[np.minimum(place, len(order) - 1)], -1)
    return found


def _repeated(count: int) -> tuple[str, ...]:
    return (f"{count} rows that come again are left out",) if count else ()
