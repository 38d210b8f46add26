"""What a reconstruction reads: the single texts of the data sets, or their pairs; some of them held out and never trained on.

The data sets are those of `cuvee train`, read, checked and tokenised once by the same code; here their token ids have no EOS,
since the objectives put it in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from embeddings.reconstruction.config import PretrainingConfig
from embeddings.reconstruction.example import Example
from embeddings.reconstruction.image_rows import ImageRows
from embeddings.reconstruction.reader import Reader
from embeddings.training.data import GRADED, TrainingSet, load_sets
from embeddings.training.data_settings import DataSettings
from embeddings.training.token_table import TextTable
from merging.errors import CuveeError
from merging.progress import Work

#: Graded pairs count as pairs from this score on: what does not belong together cannot be told from the other.
ALIKE = 0.5
_HELD, _SHARE_HELD = 64, 10
_FORM = 2  # of the token ids: raise it when the same texts would give others


class Tokenize:
    """`set_builder.Tokenize` without EOS: the ids that a source begins with.

    Args:
        reader: of the model.
        max_length: by "query" and "document".
    """

    def __init__(self, reader: Reader, max_length: Mapping[str, int]) -> None:
        longest = max(max_length.values()) + 1  # room for EOS: cut by side below
        self._reader = replace(reader, max_length={"source": longest, "target": longest})
        self._max_length = max_length

    @property
    def digest(self) -> str:
        tokenizer = self._reader.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        state = json.loads(backend.to_str()) if backend else {**tokenizer.get_vocab(), "": tokenizer.init_kwargs}
        state = {key: value for key, value in state.items() if key not in ("padding", "truncation")}  # of the last call
        content = json.dumps(["reconstruction", _FORM, state, dict(self._max_length)], sort_keys=True, default=str)
        return str(xxhash.xxh3_128_hexdigest(content.encode("utf-8", "surrogatepass")))

    def prompt_of(self, side: str | None) -> str | None:
        """None: a language model has no prompts."""
        return None

    def __call__(self, texts: list[str], side: str, prompt: str | None) -> list[list[int]]:
        """A text without a token of its own, behind the prompt and within the length, has none at all."""
        every = self._reader.ids([(prompt or "") + text for text in ("", *texts)])
        bare, *rows = (row[: self._max_length[side]] for row in every)
        return [[] if row == bare else row for row in rows]


def read_sets(
    config: PretrainingConfig, reader: Reader, cache: Path, progress: Work | None = None, *, fresh: bool = False
) -> list[TrainingSet]:
    """The data sets of a configuration, from the cache or their sources.

    Args:
        cache: a folder; made where it is missing.
        fresh: read what the hub has now.

    Raises:
        CuveeError: at the file and line of the first row that is wrong; a set of which no row has tokens in all its texts.
    """
    sets = load_sets(config.reading, Tokenize(reader, config.max_length), cache, progress, fresh=fresh)
    return [replace(found, notes=(*found.notes, *_of_wordless(found))) for found in sets]


@dataclass(frozen=True)
class HeldOut:
    """Rows of data sets that are kept for measuring.

    Attributes:
        rows: by data set, ascending.
    """

    rows: Mapping[str, NDArray[np.int64]]

    def __len__(self) -> int:
        return sum(map(len, self.rows.values()))


def hold_out(config: PretrainingConfig, sets: Sequence[TrainingSet], images: Sequence[ImageRows] = ()) -> HeldOut:
    """Draws the rows that are held out, all as likely; the same for every stage.

    Raises:
        CuveeError: there are not more rows than are to be held out.
    """
    pairs = {found.name: _pairs(found) for found in sets}
    pairs |= {found.name: np.arange(len(found), dtype=np.int64) for found in images}
    total = sum(map(len, pairs.values()))
    wanted = min(_HELD, total // _SHARE_HELD) if config.held_out is None else config.held_out
    if wanted and wanted >= total:
        what = f"{wanted} held-out rows leave none of {total} to train on"
        raise CuveeError(what, where=config.at("held_out"), mend="lower it")
    drawn = np.zeros(total, bool)
    drawn[np.random.default_rng([config.seed, 1]).permutation(total)[:wanted]] = True
    own = np.split(drawn, np.cumsum([len(rows) for rows in pairs.values()])[:-1])
    return HeldOut({name: rows[kept] for (name, rows), kept in zip(pairs.items(), own, strict=True)})


class Material(Protocol):
    """What a stage reads of one data set.

    Attributes:
        type: what its rows are.
        units: numbers that `example` takes, of all that is trained on.
        held: likewise, of what is held out.
    """

    @property
    def name(self) -> str: ...

    @property
    def type(self) -> str: ...

    @property
    def settings(self) -> DataSettings: ...

    @property
    def units(self) -> NDArray[np.int64]: ...

    @property
    def held(self) -> NDArray[np.int64]: ...

    def example(self, unit: int, draw: np.random.Generator) -> Example:
        """One example; what is random comes from `draw` alone."""


class Sides(Protocol):
    """What is embedded to be measured: a material whose rows have two sides."""

    @property
    def held(self) -> NDArray[np.int64]: ...

    def sides(self, unit: int) -> tuple[Example, Example]:
        """Both, each as a source."""


class Texts:
    """The distinct texts of a data set, of its queries and its documents.

    Attributes:
        units: numbers of texts: of the queries' table, and behind them of the documents' where that is another.
        held: likewise, of the held-out rows.
    """

    def __init__(self, found: TrainingSet, held: NDArray[np.int64]) -> None:
        self.found = found
        self.name, self.type, self.settings = found.name, found.type, found.settings
        self._queries = len(found.query_tokens)
        shared = found.document_tokens is found.query_tokens
        after = 0 if shared else self._queries
        documents = [after + found.positives[int(row)].astype(np.int64) for row in held]
        self.held = np.unique(np.concatenate([found.queries[held].astype(np.int64), *documents]))
        lengths = found.document_tokens.lengths
        if not shared:
            lengths = np.concatenate([found.query_tokens.lengths, lengths])
        self.units = np.setdiff1d(np.flatnonzero(lengths), self._known_by_text(self.held, shared))

    def example(self, unit: int, draw: np.random.Generator) -> Example:
        first = unit < self._queries
        table, side = (self.found.query_tokens, "query") if first else (self.found.document_tokens, "document")
        number = unit if first else unit - self._queries
        where = _where(self.found, f"the {side} {table.text(number)[:40]!r}")
        return Example(_ids(table, number), prompt=self.settings.prompt_of(side) or "", where=where)

    def _known_by_text(self, held: NDArray[np.int64], shared: bool) -> NDArray[np.int64]:
        """All numbers of the texts that some have: one text may be a query and, behind another prompt, a document."""
        if shared or not len(held):
            return held
        queries, documents = self.found.query_tokens, self.found.document_tokens
        own = [number for number in held.tolist() if number < self._queries]
        theirs = [number - self._queries for number in held.tolist() if number >= self._queries]
        in_both = _with_text_of(documents, queries, own) + self._queries, _with_text_of(queries, documents, theirs)
        return np.concatenate([held, *in_both])


class Pairs:
    """The rows of a data set, as a source and a target that belongs to it.

    Attributes:
        units: numbers of rows; with `reads` "both" each twice, the second time from the document to the query.
        held: likewise, each once, of the held-out rows.
    """

    def __init__(
        self,
        found: TrainingSet,
        reader: Reader,
        held: NDArray[np.int64],
        reads: str,
        max_length: Mapping[str, int],
    ) -> None:
        self.found, self._reader, self._reads, self._max_length = found, reader, reads, max_length
        self.name, self.type, self.settings = found.name, found.type, found.settings
        rows = _pairs(found)
        # A row that asks what a held-out one asks would teach its answer.
        rows = rows[~np.isin(found.queries[rows], found.queries[held])] if len(held) else rows
        self.units = 2 * rows + (reads == "document")
        if reads == "both":  # turned around, a row may ask what a held-out one asks
            self.units = np.concatenate([2 * rows, 2 * rows[~_answers_with(found, rows, found.queries[held])] + 1])
        self.held = 2 * held + (reads == "document")
        self._start = reader.start_tokens

    def example(self, unit: int, draw: np.random.Generator) -> Example:
        row, turned = divmod(int(unit), 2)
        positives = self.found.positives[row]
        document = int(positives[draw.integers(len(positives))])
        query = (self.found.query_tokens, int(self.found.queries[row]), "query")
        source, target = query, (self.found.document_tokens, document, "document")
        if turned:
            source, target = target, source
        table, number, side = source
        return Example(
            _ids(table, number)[: self._max_length[side] - 1],
            self._target(*target),
            text=table.text(number),
            prompt=self.found.settings.prompt_of(side) or "",
            where=_where(self.found, f"row {row + 1}"),
        )

    def sides(self, unit: int) -> tuple[Example, Example]:
        """A row's query and its first positive, each with its own prompt."""
        row = int(unit) // 2
        found, length = self.found, self._max_length
        query = _ids(found.query_tokens, int(found.queries[row]))[: length["query"] - 1]
        document = _ids(found.document_tokens, int(found.positives[row][0]))[: length["document"] - 1]
        return Example(query), Example(document)

    def _target(self, table: TextTable, number: int, side: str) -> Sequence[int]:
        """A text's ids without prompt and special tokens."""
        if self.found.settings.prompt_of(side):
            return self._reader.ids([table.text(number)], "target")[0][: self._max_length[side]]
        return _ids(table, number)[self._start :]


def _answers_with(found: TrainingSet, rows: NDArray[np.int64], queries: NDArray[np.int32]) -> NDArray[np.bool_]:
    """(rows,): whether one of a row's positives has the text of one of the queries."""
    own, theirs = found.query_tokens, found.document_tokens
    same = set(queries.tolist() if own is theirs else _with_text_of(theirs, own, queries.tolist()).tolist())
    return np.array([not same.isdisjoint(found.positives[int(row)].tolist()) for row in rows], bool)


def _with_text_of(table: TextTable, other: TextTable, numbers: Sequence[int]) -> NDArray[np.int64]:
    """The numbers of the texts in one table that are among some of another."""
    texts = {other.text(number) for number in numbers}
    found = [number for number in range(len(table)) if table.text(number) in texts] if texts else []
    return np.array(found, np.int64)


def _pairs(found: TrainingSet) -> NDArray[np.int64]:
    """The rows whose texts belong together, and have tokens."""
    rows = np.flatnonzero(~_wordless(found))
    if found.type in GRADED:
        assert found.scores is not None
        return rows[found.scores[rows] >= ALIKE]
    return rows


def _wordless(found: TrainingSet) -> NDArray[np.bool_]:
    """(rows,): whether the query or one of the positives has no token."""
    empty = found.document_tokens.lengths[found.positives.values] == 0
    before = np.concatenate([[0], np.cumsum(empty)])[found.positives.offsets]  # (rows + 1,)
    wordless: NDArray[np.bool_] = (np.diff(before) > 0) | (found.query_tokens.lengths[found.queries] == 0)
    return wordless


def _of_wordless(found: TrainingSet) -> tuple[str, ...]:
    """What is told of the rows without tokens: one line, or none.

    Raises:
        CuveeError: there are no others.
    """
    rows = np.flatnonzero(_wordless(found))
    if not len(rows):
        return ()
    if len(rows) == len(found):
        what = f"the data set '{found.name}' has no row with tokens in all of its texts"
        raise CuveeError(what, where=found.settings.where, mend="look at its texts, prompts and 'max_length'")
    first = int(rows[0])
    shown = f"row {first + 1}, {found.query_tokens.text(int(found.queries[first]))[:40]!r}"
    return (
        f"{found.name}: {len(rows)} of {len(found)} rows have a text without a token and are left out, first {shown}",
    )


def _ids(table: TextTable, number: int) -> list[int]:
    ids: list[int] = table[number].tolist()
    return ids


def _where(found: TrainingSet, what: str) -> str:
    return f"{found.name}: {what}"
