"""Training sets of images: a row's query is an image, with a text behind it where it has one; its positive is a text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from embeddings.images.reader import ImageReader
from embeddings.images.rows import ImageSet, read_images
from embeddings.images.text import ImageText
from embeddings.training.config import TrainingConfig
from embeddings.training.data import TrainingSet, kept_settings, write_table
from embeddings.training.set_builder import Tokenize
from embeddings.training.token_table import Ragged, TableWriter, TokenTable, offsets_of
from merging.output import staged
from merging.progress import Work

TYPE = "Retrieval"
_FORM = 1  # of what is kept: raise it when the same rows would give others
_MARKER = "tables.json"


class ImageTable:
    """Distinct images, each with the text behind it: a `TextTable`.

    Attributes:
        images: the file of each.
    """

    def __init__(
        self,
        images: Sequence[Path],
        sizes: Mapping[Path, tuple[int, int]],
        texts: NDArray[np.int32],
        table: TokenTable,
        reader: ImageReader,
    ) -> None:
        self.images, self._sizes = images, sizes
        self._texts, self._table, self._reader = texts, table, reader

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageText:
        image = self.images[index]
        before = self._reader.ids(self._reader.tokens_of_size(*self._sizes[image], str(image))).astype(np.int32)
        return ImageText(np.concatenate([before, self._table[int(self._texts[index])]]), image)

    def text(self, index: int) -> str:
        """What tells it from all others, and from any text alone."""
        return f"{self.images[index]}\0{self.behind(index)}"

    def behind(self, index: int) -> str:
        """The text behind the image."""
        return self._table.text(int(self._texts[index]))

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """(images,) tokens of each."""
        return np.array([len(self[index]) for index in range(len(self))], np.int32)


def load_image_sets(
    config: TrainingConfig,
    tokenize: Tokenize,
    reader: ImageReader | None,
    cache: Path,
    progress: Work,
    *,
    fresh: bool = False,
) -> list[TrainingSet]:
    """The data sets of images of a configuration that has some, from the cache or from their sources.

    Rows that have an image's own marks for a word are left out, which a note says.

    Args:
        reader: of the model's images; None where it has none.
        cache: a folder; made where it is missing.
        fresh: read what the hub has now.

    Raises:
        CuveeError: at file and row, for one that is wrong; the model reads no images.
    """
    read = read_images(config.images, reader, cache, config.seed, progress, fresh=fresh)
    assert reader is not None  # read_images has refused it
    return [_set_of(found, config, tokenize, reader, cache) for found in read]


def write_image_rows(
    sets: Sequence[TrainingSet], rows: Mapping[str, Iterable[int]], folder: Path
) -> list[dict[str, Any]]:
    """Writes some rows of sets of images, the images too, complete in themselves; gives the entries of `images:`.

    Args:
        sets: all of images.
        rows: row numbers by the set's name.
    """
    return [_written(found, rows[found.name], folder) for found in sets if found.name in rows]


def _written(found: TrainingSet, rows: Iterable[int], folder: Path) -> dict[str, Any]:
    own, table = folder / f"{found.name}.images", found.query_tokens
    assert isinstance(table, ImageTable)
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)

    def written() -> Iterator[dict[str, Any]]:
        for row in rows:
            number = int(found.queries[row])
            image = own / f"{number}{table.images[number].suffix}"
            if not image.is_file():
                shutil.copyfile(table.images[number], image)
            query = {"query": table.behind(number)} if table.behind(number) else {}
            text = found.document_tokens.text(int(found.positives[row][0]))
            yield {"image": f"{own.name}/{image.name}", **query, "text": text}

    file = folder / f"{found.name}.jsonl.gz"
    write_table(file, written())
    return {"file": file.name, **kept_settings(found.settings)}


def _set_of(
    found: ImageSet, config: TrainingConfig, tokenize: Tokenize, reader: ImageReader, cache: Path
) -> TrainingSet:
    content = ["tables", _FORM, found.digest, tokenize.digest, dict(config.max_length)]
    folder = cache / xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    columns = {"query": [query for _, _, query in found.rows], "document": [text for _, text, _ in found.rows]}
    if not (folder / _MARKER).is_file():
        with staged(folder, force=True, marker=_MARKER) as staging:
            for side, texts in columns.items():
                # what stands behind an image has no prompt before it
                prompt = tokenize.prompt_of(side) if side == "document" else None
                with closing(TableWriter(staging / side, partial(tokenize, side=side, prompt=prompt))) as writer:
                    np.save(staging / f"{side}.npy", writer.add(texts))
            (staging / _MARKER).write_text("{}", encoding="utf-8")
    tables = {side: TokenTable(folder / side) for side in columns}
    numbers = {side: np.load(folder / f"{side}.npy") for side in columns}  # (rows,)
    whole = {side: ~_with_marks(tables[side], reader)[numbers[side]] for side in columns}
    keep = whole["query"] & whole["document"]
    found = found.kept(keep.tolist(), "an image's mark for a word")
    texts, answers = numbers["query"][keep], numbers["document"][keep]
    distinct: dict[tuple[Path, int], int] = {}
    queries = [
        distinct.setdefault((image, int(text)), len(distinct))
        for (image, _, _), text in zip(found.rows, texts, strict=True)
    ]
    behind = np.array([text for _, text in distinct], np.int32)
    one, none = np.ones(len(answers), np.int64), np.zeros(len(answers), np.int64)
    return TrainingSet(
        name=found.name,
        type=TYPE,
        settings=replace(found.settings, type=TYPE),
        digest=found.digest,
        query_tokens=ImageTable([image for image, _ in distinct], found.sizes, behind, tables["query"], reader),
        document_tokens=tables["document"],
        queries=np.array(queries, np.int32),
        positives=Ragged(offsets_of(one), answers.astype(np.int32)),
        negatives=Ragged(offsets_of(none), np.zeros(0, np.int32)),
        notes=found.notes,
    )


def _with_marks(table: TokenTable, reader: ImageReader) -> NDArray[np.bool_]:
    """(texts,): whether a text has one of the ids that stand for an image."""
    return np.array([not reader.marks.isdisjoint(table[index].tolist()) for index in range(len(table))], bool)
