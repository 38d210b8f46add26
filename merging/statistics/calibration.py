"""Calibration: the few examples that statistics are made of, drawn once from tables of texts.

Rows are read under the names that `cuvee train` takes: a query with its positives and negatives, a pair of sentences, a
single text; with an image's path (`image`) or without. A .txt file has a text on each line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from merging.columns import ALIASES, keys_of
from merging.errors import did_you_mean, quoted
from merging.lineage import file_digest
from merging.statistics.folder import StatsError
from merging.tables import FORMATS, is_known, raw_rows

#: Columns that `columns` may rename.
COLUMNS = ("query", "positive", "negative", "text", "label", "image")
_IMAGE = ("image", "image_path", "img")


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        texts: a single text; or a query and its candidates, positives first; or a pair.
        label: as the file has it. Statistics never look at it, but to choose partners.
        image: that belongs to the first text.
        positives: how many of the candidates are right ones.
        row: its number among all rows of the data, from 0: what is drawn for it is drawn by this.
        key: tells it from all other rows.
    """

    texts: tuple[str, ...]
    label: str | int | None = None
    image: Path | None = None
    row: int = 0
    key: str = ""
    positives: int = 0

    @property
    def query(self) -> str:
        return self.texts[0]

    @property
    def candidates(self) -> tuple[str, ...]:
        return self.texts[1:]


@dataclass(frozen=True)
class Calibration:
    """What was drawn.

    Attributes:
        examples: in the order of the data.
        rows: how many rows the data has.
        data: file and digest of each, for the manifest.
    """

    examples: tuple[Example, ...]
    rows: int
    data: tuple[Mapping[str, str], ...]


def draw(
    files: Sequence[str | Path],
    count: int,
    *,
    seed: int = 0,
    part: tuple[int, int] = (1, 1),
    columns: Mapping[str, str] | None = None,
    candidates: int = 8,
    complete: bool = False,
    readable: Callable[[str], bool] | None = None,
) -> Calibration:
    """Draws `count` rows without replacement; all where there are no more.

    Args:
        part: (i, n): only each n-th of the drawn rows, from the i-th on; the n parts together are the whole.
        columns: what the files call a column, by our name.
        candidates: of a query at most, its first positive among them.
        complete: gives queries without negatives the positives of other rows for candidates, and single texts other
            rows' texts (one of their own label and the rest of others, where they have labels), `candidates` in all.
        readable: which columns of the files may be looked at; all where it is None. The cells of others are never touched.

    Raises:
        StatsError: no such column, no row at all, a wrong part.
        TableError: a file that is missing or damaged.
    """
    if count < 1:
        raise StatsError(f"{count} examples are none", where="--examples", mend="give a number from 1")
    if candidates < 2:
        raise StatsError(f"{candidates} candidates leave no choice", where="--candidates", mend="give a number from 2")
    if not 1 <= part[0] <= part[1]:
        raise StatsError(f"{part[0]}/{part[1]} is no part", where="--part", mend="write 1/2 and 2/2")
    for name in columns or {}:
        if name not in COLUMNS:
            raise StatsError(
                f"'{name}' is no column", where="--column", mend=did_you_mean(name, COLUMNS, quoted(COLUMNS))
            )
    rows: list[Example] = []
    data = []
    for file in map(Path, files):
        before = len(rows)
        rows.extend(_rows(file, dict(columns or {}), before, candidates, readable))
        if len(rows) == before:
            raise StatsError("holds no row", where=str(file))
        digest = file_digest(file)
        data.append({"file": str(file), "digest": digest})
        rows[before:] = [replace(each, key=_key(digest, each.row - before)) for each in rows[before:]]
    if not rows:
        raise StatsError("names no file", where="--data", mend="give JSONL, CSV, TSV, Parquet or .txt")
    places = np.arange(len(rows))
    if count < len(rows):
        places = np.sort(np.random.default_rng([seed, len(rows)]).choice(len(rows), count, replace=False))
    drawn = [rows[place] for place in places[part[0] - 1 :: part[1]]]
    if not drawn:
        raise StatsError(f"nothing is left for part {part[0]} of {part[1]}", where="--part", mend="draw more examples")
    if complete:
        drawn = [_completed(each, rows, candidates, seed) for each in drawn]
    return Calibration(tuple(drawn), len(rows), tuple(data))


def is_text(file: Path) -> bool:
    """Whether `draw` reads files of such a name."""
    return file.suffix.lower() == ".txt" or is_known(file)


def only(raw: Mapping[str, Any], readable: Callable[[str], bool]) -> dict[str, Any]:
    """The cells of a row that may be looked at; the others are not touched."""
    return {key: raw[key] for key in raw if readable(key)}


def _rows(
    file: Path, columns: Mapping[str, str], first: int, candidates: int, readable: Callable[[str], bool] | None
) -> Iterator[Example]:
    source = _lines(file) if file.suffix.lower() == ".txt" else raw_rows(file)
    for number, (line, raw) in enumerate(source, start=first):
        row = raw if readable is None else only(raw, readable)
        try:
            yield replace(_example(row, columns, file.parent, candidates), row=number)
        except ValueError as wrong:
            what, _, mend = str(wrong).partition("; ")
            raise StatsError(what, where=f"{file}:{line}", mend=mend) from None


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open(file, encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, {"text": line.rstrip("\r\n")}
    except FileNotFoundError:
        raise StatsError("no such file", where=str(file), mend=f"known: '.txt', {quoted(FORMATS)}") from None
    except OSError as error:
        raise StatsError(f"cannot be read: {error.strerror}", where=str(file)) from None
    except UnicodeDecodeError:
        raise StatsError("is not UTF-8 text", where=str(file), mend="save it as UTF-8") from None


def _example(raw: Mapping[str, Any], columns: Mapping[str, str], folder: Path, candidates: int) -> Example:
    keys = [key for key, value in raw.items() if value is not None]

    def found(name: str) -> list[str]:
        if name == "image":
            return [key for key in ((columns["image"],) if "image" in columns else _IMAGE) if key in keys][:1]
        return keys_of(name, keys, columns.get(name))

    for own in columns.values():
        if own not in raw:
            raise ValueError(f"has no '{own}'; {did_you_mean(own, raw, f'the row has {quoted(raw)}')}")
    query, positive, text, image = (found(name) for name in ("query", "positive", "text", "image"))
    label = next((raw[key] for key in found("label")), None)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    path = folder / _text(raw[image[0]], image[0]) if image else None
    if path is not None and not path.is_file():
        raise ValueError(f"names the image '{path}', which is missing")
    right = 0
    if query and positive:
        positives = _texts(raw[positive[0]], positive[0])
        right = min(len(positives), candidates)
        negatives = [each for key in found("negative") for each in _texts(raw[key], key)]
        texts = (_text(raw[query[0]], query[0]), *(*positives, *negatives)[:candidates])
    elif text or query:
        key = (text or query)[0]
        texts = tuple(_texts(raw[key], key)[:1]) if isinstance(raw[key], list) else (_text(raw[key], key),)
    elif path is not None:
        texts = ("",)
    else:
        known = {alias for name in ("text", "query", "positive") for alias in ALIASES[name]}
        wanted = "'text', nor 'query' and 'positive'"
        near = did_you_mean("text", raw.keys() - known, f"the row has {quoted(raw)}")
        raise ValueError(f"has no {wanted}; {near}, say --column text=NAME")
    if not texts:
        raise ValueError("names no text; remove the row")
    return Example(texts, label if isinstance(label, str | int) else None, path, positives=right)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"'{key}' must be text, not {value!r:.60}")
    if not value.strip():
        raise ValueError(f"'{key}' is empty; remove the row")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"'{key}' holds half of a surrogate pair, which is no text") from None
    return value


def _texts(value: Any, key: str) -> list[str]:
    if isinstance(value, list):
        return [_text(item, key) for item in value]
    return [] if value == "" else [_text(value, key)]  # in CSV, a row with fewer negatives than there are columns


def _key(digest: str, row: int) -> str:
    return str(xxhash.xxh3_64_hexdigest(f"{digest}\0{row}".encode()))


def _completed(example: Example, rows: Sequence[Example], candidates: int, seed: int) -> Example:
    """With candidates from other rows, where it has fewer than two of its own."""
    if len(example.candidates) >= 2 or len(rows) < 3:
        return example
    known = set(example.texts)
    rng = np.random.default_rng([seed, 1, example.row])
    chosen, right = list(example.candidates), example.positives
    others = [rows[place] for place in rng.permutation(len(rows))[: 64 * candidates]]
    if not chosen and example.label is not None:
        same = next((o for o in others if o.label == example.label and o.query not in known), None)
        if same is not None:
            right = 1
            chosen.append(same.query)
            known.add(same.query)
            others = [other for other in others if other.label != example.label]
    for other in others:
        text = other.texts[1] if example.candidates and other.candidates else other.query
        if text not in known and other.row != example.row:
            chosen.append(text)
            known.add(text)
        if len(chosen) >= candidates:
            break
    return replace(example, texts=(example.query, *chosen), positives=right)
