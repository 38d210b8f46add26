"""SetBuilder: reads a source row by row and writes a training set's folder; a chunk of rows is in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from embeddings.training.config import TrainingConfig
from embeddings.training.data_settings import GRADED, SIDES, SYMMETRIC, DataSettings
from embeddings.training.partners import NEGATIVES, Partners, of_labels, of_scores
from embeddings.training.rows import Example, examples, limited
from embeddings.training.token_table import Ragged, TableWriter, offsets_of
from merging.errors import CuveeError
from merging.progress import Work

MARKER = "set.json"  # the last file to be written
_CHUNK_ROWS, _CHUNK_CHARACTERS = 2048, 1 << 22  # in memory at a time


class Tokenize(Protocol):
    """How texts become token ids, with the prompt before them and the special tokens."""

    @property
    def digest(self) -> str:
        """Of all that the ids depend on but a prompt of the user's: tokenizer, lengths, what is appended, the model's prompts."""

    def prompt_of(self, side: str | None) -> str | None:
        """The model's own prompt for a "query" or a "document"; for a text that is neither, None."""

    def __call__(self, texts: list[str], side: str, prompt: str | None) -> list[list[int]]:
        """Ids of each text behind the prompt; `side` is "query" or "document", which decides about the length."""


@dataclass
class _Columns:
    """What is gathered of the rows: arrays in pieces, a chunk each."""

    queries: list[NDArray[np.int32]] = field(default_factory=list)
    positives: list[NDArray[np.int32]] = field(default_factory=list)
    negatives: list[NDArray[np.int32]] = field(default_factory=list)
    counts: list[NDArray[np.int32]] = field(default_factory=list)  # (rows, 2): positives, negatives
    labels: list[NDArray[np.int32]] = field(default_factory=list)
    scores: list[NDArray[np.float64]] = field(default_factory=list)
    teacher: list[NDArray[np.float32]] = field(default_factory=list)


class SetBuilder:
    """Reads a source and writes a set's folder."""

    def __init__(
        self,
        settings: DataSettings,
        config: TrainingConfig,
        tokenize: Tokenize,
        transformer: Callable[[], Any] | None,
        progress: Work,
    ) -> None:
        self.settings, self.config, self.tokenize = settings, config, tokenize
        self.transformer, self.progress = transformer, progress
        self.names: dict[str | int, int] = {}
        self.unnamed = 0
        self.columns = _Columns()
        self.digest = xxhash.xxh3_128()

    def __call__(self, folder: Path) -> None:
        """Writes the set to an empty folder."""
        done = 0
        with ExitStack() as open_tables:
            writers = self._writers(folder, open_tables)
            for chunk in _chunks(self._source()):
                self._add(chunk, writers)
                done += len(chunk)
                self.progress(f"read {self.settings.name}", done, 0)
        if not done:
            raise CuveeError(f"the data set '{self.settings.name}' holds no row", where=self.settings.where)
        self.progress(f"read {self.settings.name}", done, done)
        notes = self._write(folder)
        content = {
            "digest": f"xxh3:{self.digest.hexdigest()}",
            "notes": notes,
            "shared": writers[0] is writers[1],
            "labels": self._label_names(),
        }
        (folder / MARKER).write_text(json.dumps(content), encoding="utf-8")

    def _writers(self, folder: Path, open_tables: ExitStack) -> tuple[TableWriter, TableWriter]:
        def writer(side: str) -> TableWriter:
            prompt = self._prompt(side)
            table = TableWriter(folder / side, lambda texts: self.tokenize(texts, side, prompt))
            return open_tables.enter_context(closing(table))

        query = writer("query")
        return (query, query) if self._sides_read_alike() else (query, writer("document"))

    def _sides_read_alike(self) -> bool:
        """Whether a text has the same tokens on both sides: prompts, lengths, and whatever else the model does."""
        probe = ["one", "two words " * max(self.config.max_length.values())]
        query, document = (self.tokenize(probe, side, self._prompt(side)) for side in SIDES)
        return query == document

    def _prompt(self, side: str) -> str | None:
        """What stands before the texts of a side: the user's, else the model's; of symmetric tasks as the model has no sides."""
        if self.settings.prompt is not None:
            return self.settings.prompt_of(side)
        return self.tokenize.prompt_of(None if self.settings.type in SYMMETRIC else side)

    def _source(self) -> Iterator[Example]:
        settings = self.settings
        rows = limited(partial(examples, settings), settings.limit, self.config.seed)
        return self._mined(rows) if settings.mine is not None else rows

    def _mined(self, rows: Iterator[Example]) -> Iterator[Example]:
        from embeddings.training.mining import mine

        settings = self.settings
        assert settings.mine is not None
        all_rows = list(rows)
        self.progress(f"mine {settings.name}", 0, len(all_rows))
        transformer = self._transformer()
        mined = mine(
            all_rows,
            settings.mine,
            transformer,
            prompt=settings.prompt,
            seed=self.config.seed,
            most=settings.negatives,
            where=settings.where,
        )
        self.progress(f"mine {settings.name}", len(all_rows), len(all_rows))
        return iter(mined)

    def _transformer(self) -> Any:
        if self.transformer is not None:
            return self.transformer()
        from embeddings.model import open_model

        model = self.config.model
        opened = open_model(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
        return opened.transformer

    def _add(self, chunk: Sequence[Example], writers: tuple[TableWriter, TableWriter]) -> None:
        single = self._single_texts(chunk)
        queries, documents = writers
        columns = self.columns
        columns.queries.append(queries.add([row.query for row in chunk]))
        if single:
            documents.add([row.query for row in chunk])  # the same numbers: the same texts in the same order
        else:
            positives = [text for row in chunk for text in row.positives]
            both = documents.add([*positives, *(text for row in chunk for text in row.negatives)])
            columns.positives.append(both[: len(positives)])
            columns.negatives.append(both[len(positives) :])
            counts = [(len(row.positives), len(row.negatives)) for row in chunk]
            columns.counts.append(np.array(counts, np.int32))
            columns.teacher.append(np.array([score for row in chunk for score in _teacher(row)], np.float32))
        if self.settings.type in GRADED:
            columns.scores.append(np.array([row.score for row in chunk], np.float64))
        if self.settings.type in ("Classification", "Clustering"):
            columns.labels.append(np.array([self._label(row.label) for row in chunk], np.int32))
        for row in chunk:
            known = (row.query, row.positives, row.negatives, row.label, row.score, row.teacher)
            self.digest.update(repr(known).encode())

    def _single_texts(self, chunk: Sequence[Example]) -> bool:
        """Whether the rows are texts whose partners are drawn."""
        single = not chunk[0].positives
        before = bool(self.columns.queries) and not self.columns.counts
        if any(bool(row.positives) == single for row in chunk) or (self.columns.queries and single != before):
            what = f"the data set '{self.settings.name}' mixes single texts and rows with positives"
            raise CuveeError(what, where=self.settings.where, mend="make two data sets of it")
        return single

    def _label(self, label: str | int | None) -> int:
        if label is None:  # of no class: alone in one of its own
            self.unnamed += 1
            return -self.unnamed
        return self.names.setdefault(label, len(self.names))

    def _label_names(self) -> list[str | int | None]:
        return [*self.names, *[None] * self.unnamed]

    def _write(self, folder: Path) -> tuple[str, ...]:
        columns = self.columns
        queries = np.concatenate(columns.queries)
        labels = np.concatenate(columns.labels) if columns.labels else None
        if labels is not None:
            labels = np.where(labels < 0, len(self.names) - 1 - labels, labels).astype(np.int32)
        scores: NDArray[Any] | None = np.concatenate(columns.scores) if columns.scores else None
        teacher = None
        notes: tuple[str, ...] = ()
        if columns.counts:
            counts = np.concatenate(columns.counts)
            positives = Ragged(offsets_of(counts[:, 0]), np.concatenate(columns.positives))
            negatives = Ragged(offsets_of(counts[:, 1]), np.concatenate(columns.negatives))
            said = np.concatenate(columns.teacher)
            teacher = Ragged(offsets_of(counts.sum(axis=1)), said) if not np.isnan(said).all() else None
            if scores is not None:
                scores, notes = self._scaled(scores)
        else:
            partners = self._partners(queries, labels, scores)
            texts, rows = queries, partners.rows
            self.digest.update(np.concatenate([rows, partners.positives, partners.negatives.values]).tobytes())
            queries, labels = texts[rows], None if labels is None else labels[rows]
            positives = Ragged(np.arange(len(rows) + 1, dtype=np.int64), texts[partners.positives])
            negatives = Ragged(partners.negatives.offsets, texts[partners.negatives.values])
            scores, notes = partners.scores, partners.notes
        arrays = {"queries": queries, "labels": labels, "scores": scores}
        for name, array in arrays.items():
            if array is not None:
                np.save(folder / f"{name}.npy", array.astype(np.float32 if name == "scores" else np.int32))
        for name, ragged in {"positives": positives, "negatives": negatives, "teacher": teacher}.items():
            if ragged is not None:
                ragged.save(folder, name)
        return notes

    def _partners(
        self, texts: NDArray[np.int32], labels: NDArray[np.int32] | None, scores: NDArray[np.float64] | None
    ) -> Partners:
        rng = np.random.default_rng(self.config.seed)
        wanted = self.settings.negatives
        try:
            if labels is not None:
                names = self._label_names()
                return of_labels(texts, labels, names, NEGATIVES if wanted is None else wanted, rng)
            assert scores is not None
            return of_scores(texts, scores, rng, reach=None if self.settings.scale is None else 1.0)
        except ValueError as wrong:
            what, _, mend = f"the data set '{self.settings.name}': {wrong}".partition("; ")
            raise CuveeError(what, where=self.settings.where, mend=mend) from None

    def _scaled(self, scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], tuple[str, ...]]:
        """Scores in [0, 1] as they are; others from their lowest to their highest, which is noted."""
        low, high = scores.min(), scores.max()
        if low >= 0 and high <= 1:
            return scores, ()
        if low == high:
            what = f"all scores of the data set '{self.settings.name}' are {low:g}"
            raise CuveeError(what, where=self.settings.where, mend="nothing can be learned from them")
        note = f"scores from {low:g} to {high:g} become 0 to 1; 'scale: [lowest, highest]' makes that of other data the same"
        return (scores - low) / (high - low), (note,)


def _chunks(rows: Iterator[Example]) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row.query) + sum(map(len, row.positives)) + sum(map(len, row.negatives))
        if len(chunk) == _CHUNK_ROWS or characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _teacher(row: Example) -> tuple[float, ...]:
    return row.teacher or (float("nan"),) * (len(row.positives) + len(row.negatives))
