"""Tables of texts: JSONL, CSV, TSV or Parquet, plain or gzipped; every row with the line that it stands on."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.errors import CuveeError, did_you_mean, quoted

Row = dict[str, Any]

FORMATS = (".jsonl", ".csv", ".tsv", ".parquet")
KNOWN = f"{quoted(FORMATS)}, the first three also with .gz"
_CELL = 1 << 24  # characters; csv's own limit would refuse a long document


class TableError(CuveeError):
    """A table that cannot be read, or says something impossible."""


@dataclass(frozen=True)
class Column:
    """A column that a table must have.

    Attributes:
        name: as our code calls it.
        kind: a key of `KINDS`.
        aliases: other names it goes by in the files of mteb and BEIR.
        optional: it may be missing.
    """

    name: str
    kind: str
    aliases: tuple[str, ...] = ()
    optional: bool = False


def read_table(file: Path, columns: Sequence[Column], named: Mapping[str, str]) -> list[tuple[int, Row]]:
    """All rows of a file, each with its line (in Parquet: its number), with our names and the columns' types.

    Args:
        named: what the file calls a column, by our name, where neither that nor an alias is it.

    Raises:
        TableError: at the first line that is wrong.
    """
    rows = []
    for line, raw in raw_rows(file):
        try:
            rows.append((line, converted(raw, columns, named)))
        except ValueError as wrong:
            raise TableError(str(wrong), where=f"{file}:{line}") from None
    return rows


def converted(raw: Mapping[str, Any], columns: Sequence[Column], named: Mapping[str, str]) -> Row:
    """One row with our names and the columns' types.

    Raises:
        ValueError: says what is wrong with it.
    """
    row: Row = {}
    for column in columns:
        spellings = (named[column.name],) if column.name in named else (column.name, *column.aliases)
        found = next((key for key in spellings if raw.get(key) is not None), None)
        if found is not None:
            try:
                row[column.name] = KINDS[column.kind](raw[found])
            except ValueError as wrong:
                raise ValueError(f"'{found}' {wrong}") from None
        elif any(key in raw for key in spellings) and not column.optional:
            raise ValueError(f"'{spellings[0]}' is null")
        elif not column.optional:
            ours = {key for each in columns for key in (each.name, *each.aliases)}
            has = f"the row has {quoted(raw)}" if raw else "the row is empty"
            raise ValueError(f"has no '{spellings[0]}'; {did_you_mean(spellings[0], raw.keys() - ours, has)}")
    return row


def raw_rows(file: Path) -> Iterator[tuple[int, Row]]:
    """Each row as the file has it, and its line.

    Raises:
        TableError: missing, unreadable, damaged, of no known format.
    """
    reader = _reader(file)
    if reader is None:
        raise TableError("is of no known format", where=str(file), mend=f"known: {KNOWN}")
    try:
        yield from reader(file)
    except FileNotFoundError:
        raise TableError("no such file", where=str(file)) from None
    except (OSError, EOFError, zlib.error) as error:  # gzip's BadGzipFile is an OSError
        reason = getattr(error, "strerror", None) or str(error) or "is cut off"
        raise TableError(f"cannot be read: {reason}", where=str(file)) from None


def is_known(file: Path) -> bool:
    """Whether `raw_rows` reads files of such a name."""
    return _reader(file) is not None


def _reader(file: Path) -> Callable[[Path], Iterator[tuple[int, Row]]] | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = suffixes[-2 if packed else -1 :][:1]
    return None if not kind or (packed and kind == [".parquet"]) else _READERS.get(kind[0])


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with gzip.open(file) if file.suffix.lower() == ".gz" else open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise TableError("is not UTF-8 text", where=f"{file}:{number}", mend="save it as UTF-8") from None


def _read_jsonl(file: Path) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
            raise TableError(f"is not JSON: {reason}", where=f"{file}:{number}", mend="one object a line") from None
        if not isinstance(row, dict):
            raise TableError("is no JSON object", where=f"{file}:{number}", mend='write {"column": value, …}')
        yield number, row


def _read_csv(file: Path) -> Iterator[tuple[int, Row]]:
    plain = file.with_suffix("") if file.suffix.lower() == ".gz" else file
    csv.field_size_limit(_CELL)
    lines = (part for _, line in _lines(file) for part in io.StringIO(line, newline=""))  # "\r" alone ends one too
    reader = csv.DictReader(lines, strict=True, delimiter="\t" if plain.suffix.lower() == ".tsv" else ",")
    while True:
        begins = reader.line_num + 1  # a quoted cell may hold line breaks
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise TableError(f"is not CSV: {error}", where=f"{file}:{reader.line_num}") from None
        if row is None:
            return
        if None in row:
            raise TableError("has more cells than the header", where=f"{file}:{begins}", mend="quote its commas")
        yield max(begins, 2), row


def _read_parquet(file: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, UnicodeDecodeError) as error:  # a damaged column's name is no UTF-8
        raise TableError(f"is not Parquet: {str(error).splitlines()[0]}", where=str(file)) from None


_READERS: Mapping[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {value!r:.60}")
    return value


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"must be a list of texts, not {value!r:.60}")
    return value


def _identifier(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"must be text or a whole number, not {value!r:.60}")
    return str(value)


def _label(value: Any) -> str | int:
    if not isinstance(value, str | int):
        raise ValueError(f"must be text or a whole number, not {value!r:.60}")
    return int(value) if isinstance(value, bool) else value


def _score(value: Any) -> float:
    score = as_number(value)
    if not math.isfinite(score):
        raise ValueError(f"must be a finite number, not {value!r:.60}")
    return score


def as_number(value: Any) -> float:
    """The number that a cell is or says; NaN if it is none."""
    try:
        return float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def _relevance(value: Any) -> int:
    score = _score(value)
    if score != int(score):
        raise ValueError(f"must be a whole number, not {value!r:.60}")
    return int(score)


def _flag(value: Any) -> int:
    score = _score(value)
    if score not in (0, 1):
        raise ValueError(f"must be 0 or 1, not {value!r:.60}")
    return int(score)


KINDS: Mapping[str, Callable[[Any], Any]] = {
    "text": _text,
    "texts": _texts,
    "id": _identifier,
    "label": _label,
    "score": _score,
    "relevance": _relevance,
    "flag": _flag,
}
