"""Batch: token sequences in segments, and what which state has to predict; made of rows, one a sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

#: What a token is to its sequence.
PADDING, SOURCE, EOS, TARGET = 0, 1, 2, 3
NO_LABEL = -1


class Images(Protocol):
    """The images of a batch."""

    @property
    def masked(self) -> int:
        """How many image tokens are masked."""

    def arguments(self) -> Mapping[str, Any]:
        """What the model's forward takes of them, by its names."""

    def to(self, device: Any) -> Any:
        """The same on another device."""


@dataclass(frozen=True)
class Row:
    """One sequence, before padding.

    Attributes:
        ids: (tokens,) int64, as the model reads them: what is masked is masked.
        segments: (tokens,) int64.
        labels: (tokens,) int64: the id that the state at the token before this one has to predict; -1 for none.
            The first token's is always -1.
    """

    ids: NDArray[np.int64]
    segments: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.segments) == len(self.labels) > 0
        assert self.labels[0] == NO_LABEL

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Counts:
    """What a step's means are over: the sizes of a batch, or of all parts of a step.

    Attributes:
        tokens: without padding.
        predictions: tokens that are predicted …
        targets: … and those among them that are of a target.
        patches: image tokens that are masked.
    """

    tokens: int = 0
    predictions: int = 0
    targets: int = 0
    patches: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(own + its for own, its in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[int, int, int, int]:
        return self.tokens, self.predictions, self.targets, self.patches


@dataclass(frozen=True)
class Batch:
    """What one step sees.

    Attributes:
        ids: (rows, tokens) int64.
        segments: (rows, tokens) int64, of `PADDING, SOURCE, EOS, TARGET`.
        places: (predictions, 2) int64: row and token whose state predicts …
        labels: (predictions,) int64: … this id, of the token behind it.
        pattern: of `masks.PATTERNS`.
        documents: (rows, tokens) int64: the number of a token's sequence in its packed row, -1 for padding; None where
            each row is one sequence.
        images: of a vision–language model.
        inputs: what else the model's forward takes; `position_ids` in it replaces our own.
    """

    ids: torch.Tensor
    segments: torch.Tensor
    places: torch.Tensor
    labels: torch.Tensor
    pattern: str
    documents: torch.Tensor | None = None
    images: Images | None = None
    inputs: Mapping[str, torch.Tensor] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def rows(self) -> int:
        return int(self.ids.shape[0])

    @property
    def counts(self) -> Counts:
        targets = int((self.predicted_segments() == TARGET).sum())
        patches = self.images.masked if self.images is not None else 0
        return Counts(int((self.segments != PADDING).sum()), len(self.labels), targets, patches)

    def eos_places(self) -> torch.Tensor:
        """(sequences, 2) int64: row and token of every EOS that a sequence goes through, in reading order."""
        return (self.segments == EOS).nonzero()

    def predicted_segments(self) -> torch.Tensor:
        """(predictions,) int64: the segment of the token that is predicted."""
        return self.segments[self.places[:, 0], self.places[:, 1] + 1]

    def to(self, device: Any) -> Batch:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            ids=moved(self.ids),
            segments=moved(self.segments),
            places=moved(self.places),
            labels=moved(self.labels),
            documents=None if self.documents is None else moved(self.documents),
            images=None if self.images is None else self.images.to(device),
            inputs={name: moved(value) for name, value in self.inputs.items()},
        )

    def only(self, keep: torch.Tensor, pattern: str) -> Batch:
        """The batch without the tokens where `keep`, (rows, tokens), is false; padded on the right.

        A prediction stays where both its place and the token behind it stay, and are neighbours still. Images go where the
        sources go: all of these stay, or none. Positions of three axes (see `images`) stay what they are.
        """
        import torch

        assert self.inputs.keys() <= {"position_ids"}
        of_sources = keep[self.segments == SOURCE]
        assert self.images is None or bool((of_sources == of_sources[:1]).all())
        keep = keep & (self.segments != PADDING)
        counts = keep.sum(1)
        width = max(1, int(counts.max()))
        order = torch.argsort(~keep, dim=1, stable=True)[:, :width]  # (rows, width), kept ones first
        real = torch.arange(width, device=keep.device) < counts[:, None]
        new = keep.cumsum(1) - 1  # (rows, tokens) the place that a kept token gets
        row, token = self.places.unbind(1)
        stays = keep[row, token] & keep[row, token + 1]
        return replace(
            self,
            ids=self.ids.gather(1, order),
            segments=torch.where(real, self.segments.gather(1, order), PADDING),
            places=torch.stack([row, new[row, token]], 1)[stays],
            labels=self.labels[stays],
            pattern=pattern,
            documents=None if self.documents is None else torch.where(real, self.documents.gather(1, order), -1),
            images=self.images if bool(of_sources.all()) else None,
            inputs={name: places.gather(2, order.expand(3, -1, -1)) for name, places in self.inputs.items()},
        )


def stack(rows: Sequence[Row], pattern: str, *, pad_id: int, pad_left: bool = False, pack: int = 0) -> Batch:
    """Rows as one batch, padded to the longest.

    Args:
        pattern: of `masks.PATTERNS`.
        pack: 0, or the tokens of a row into which several sequences go, the longest first; one that is longer than that
            has a row of its own. The sequences' order in the batch changes then.
    """
    import torch

    bins = _bins([len(row) for row in rows], pack) if pack else [[number] for number in range(len(rows))]
    width = max(sum(len(rows[number]) for number in own) for own in bins)
    shape = (len(bins), width)
    ids, segments = np.full(shape, pad_id, np.int64), np.full(shape, PADDING, np.int64)
    labels, documents = np.full(shape, NO_LABEL, np.int64), np.full(shape, -1, np.int64)
    for place, own in enumerate(bins):
        at = width - sum(len(rows[number]) for number in own) if pad_left else 0
        for document, number in enumerate(own):
            row = rows[number]
            where = slice(at, at + len(row))
            ids[place, where], segments[place, where] = row.ids, row.segments
            labels[place, where], documents[place, where] = row.labels, document
            at += len(row)
    row_of, token = np.nonzero(labels != NO_LABEL)
    return Batch(
        ids=torch.from_numpy(ids),
        segments=torch.from_numpy(segments),
        places=torch.from_numpy(np.stack([row_of, token - 1], 1)),
        labels=torch.from_numpy(labels[row_of, token]),
        pattern=pattern,
        documents=torch.from_numpy(documents) if pack else None,
    )


def _bins(lengths: Sequence[int], size: int) -> list[list[int]]:
    """First fit, the longest first: numbers of the sequences in each bin."""
    bins: list[list[int]] = []
    free: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = next((place for place, space in enumerate(free) if space >= lengths[number]), None)
        if place is None:
            place = len(bins)
            bins.append([])
            free.append(max(size, lengths[number]))
        bins[place].append(number)
        free[place] -= lengths[number]
    return bins
