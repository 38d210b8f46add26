"""Images and their texts as a pre-training reads them: an image whose text is told again from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embeddings.images.rows import ImageSet, read_images
from embeddings.images.settings import ImageSettings
from embeddings.reconstruction.example import Example
from embeddings.reconstruction.reader import Reader
from embeddings.training.data_settings import DataSettings
from merging.progress import Work


def _none() -> NDArray[np.int64]:
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class ImageRows:
    """A data set of images as a stage reads it: `data.Material`.

    Attributes:
        found: what was read.
        units, held: numbers of rows.
        warm_up: image and text are one sequence; else the text is the target.
    """

    found: ImageSet
    reader: Reader
    units: NDArray[np.int64] = field(default_factory=_none)
    held: NDArray[np.int64] = field(default_factory=_none)
    warm_up: bool = False
    type: str = "ImageText"

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def settings(self) -> DataSettings:
        return self.found.settings

    @property
    def digest(self) -> str:
        return self.found.digest

    @property
    def rows(self) -> Sequence[tuple[Path, str, str]]:
        return self.found.rows

    @property
    def notes(self) -> tuple[str, ...]:
        return self.found.notes

    def __len__(self) -> int:
        return len(self.rows)

    def of_stage(self, reader: Reader, held: NDArray[np.int64], *, warm_up: bool) -> ImageRows:
        """As a stage reads it: in a warm-up image and text are one sequence, in a bridge the text is the target."""
        units = np.setdiff1d(np.arange(len(self.rows), dtype=np.int64), held)
        return replace(self, reader=reader, units=units, held=held, warm_up=warm_up)

    def example(self, unit: int, draw: np.random.Generator) -> Example:
        image, caption, query = self.rows[int(unit)]
        where = f"{self.name}: {image.name}"
        if self.warm_up:
            both = f"{query} {caption}" if query else caption
            return Example(self.reader.ids([both])[0], image=image, where=where)
        (target,) = self.reader.ids([caption], "target")
        return Example(self._source(query), target, image=image, where=where)

    def sides(self, unit: int) -> tuple[Example, Example]:
        """The image with its query, and the text."""
        image, caption, query = self.rows[int(unit)]
        return Example(self._source(query), image=image), Example(self._source(caption))

    def _source(self, words: str) -> list[int]:
        return self.reader.ids([words])[0] if words else []


def read_image_rows(
    settings: Sequence[ImageSettings], reader: Reader, cache: Path, seed: int, progress: Work, *, fresh: bool = False
) -> list[ImageRows]:
    """The data sets of images, without the rows whose text has no token, or which have an image's own marks for a word.

    Args:
        cache, fresh: see `read_images`.

    Raises:
        CuveeError: as `read_images`; no row is left; the model reads no images.
    """
    return [
        ImageRows(_with_words(found, reader), reader)
        for found in read_images(settings, reader.processor, cache, seed, progress, fresh=fresh)
    ]


def _with_words(found: ImageSet, reader: Reader) -> ImageSet:
    marks = reader.processor.marks
    targets = reader.ids([caption for _, caption, _ in found.rows], "target")
    sources = reader.ids([query for _, _, query in found.rows])
    keep = [
        bool(target) and marks.isdisjoint(target) and marks.isdisjoint(source)
        for target, source in zip(targets, sources, strict=True)
    ]
    return found.kept(keep, "no token, or an image's mark for a word")
