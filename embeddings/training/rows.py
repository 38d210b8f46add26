"""Training rows: what a data set's source says, row by row, checked and in one form whatever the type and the spelling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from embeddings.evaluation import suite
from embeddings.training import hub_data
from embeddings.training.data_settings import DataSettings
from merging.columns import ALIASES, keys_of
from merging.errors import CuveeError, did_you_mean, quoted
from merging.tables import as_number, raw_rows

_Raw = Mapping[str, Any]
_Row = TypeVar("_Row")
_OPTIONAL = ("negative", "teacher")


@dataclass(frozen=True, slots=True)
class Example:
    """One row.

    Attributes:
        query: of a graded pair the first text; of a single text, that.
        positives: at least one, of a graded pair the second text; () for a single text, whose partners are drawn later.
        label: rows of one label are no negatives of each other.
        score: of a graded pair, or of a single text.
        teacher: a score for each positive and then each negative; or ().
    """

    query: str
    positives: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    label: str | int | None = None
    score: float | None = None
    teacher: tuple[float, ...] = ()


def limited(rows: Callable[[], Iterator[_Row]], limit: int | None, seed: int) -> Iterator[_Row]:
    """The rows of a source: all, or as many as the limit allows, drawn by the seed and in their order.

    Args:
        rows: reads the source from its beginning; called twice where there is a limit.
    """
    count = sum(1 for _ in rows()) if limit is not None else 0
    if limit is None or count <= limit:
        return rows()
    keep = np.zeros(count, bool)
    keep[np.random.default_rng(seed).permutation(count)[:limit]] = True
    return (row for row, kept in zip(rows(), keep, strict=True) if kept)


def examples(settings: DataSettings) -> Iterator[Example]:
    """The rows of a data set, one at a time.

    Raises:
        CuveeError: at the file and line of the first row that is wrong.
    """
    reader = _Reader(settings)
    where = ""
    for where, raw in _raw(settings):
        try:
            yield reader.read(raw)
        except _NoColumnError as wrong:
            raise _no_column(settings, wrong.column, where, wrong.mend) from None
        except ValueError as wrong:
            what, _, mend = str(wrong).partition("; ")
            raise CuveeError(what, where=where, mend=mend) from None
    if where and reader.unseen:
        raise _no_column(settings, min(reader.unseen), where, "")


class _NoColumnError(ValueError):
    """A column that the settings name, which no row has had yet and which this one needs."""

    def __init__(self, column: str, mend: str) -> None:
        super().__init__(column)
        self.column, self.mend = column, mend


def _no_column(settings: DataSettings, column: str, row: str, mend: str) -> CuveeError:
    place = settings.column_lines.get(column, settings.where)
    return CuveeError(f"no row has the column '{settings.columns[column]}', up to {row}", where=place, mend=mend)


class _Reader:
    """Reads rows of one data set; which column is which is found once for all rows with the same keys."""

    def __init__(self, settings: DataSettings) -> None:
        self.settings = settings
        self._plans: dict[tuple[str, ...], dict[str, list[str]]] = {}
        self.unseen = set(settings.columns)  # of the columns that the settings name, those that no row has had yet
        of_type: Mapping[str, Callable[[_Raw], Example]] = {
            **dict.fromkeys(("Retrieval", "Reranking"), self._ranked),
            "BitextMining": self._translated,
            **dict.fromkeys(("STS", "PairClassification"), self._graded),
            **dict.fromkeys(("Classification", "Clustering"), self._classified),
            "Regression": self._scored,
        }
        self.read: Callable[[_Raw], Example] = of_type[settings.type]

    def _ranked(self, raw: _Raw) -> Example:
        if "sentence1" in raw and "sentence2" in raw and {"score", "label"} & raw.keys() and not self.settings.columns:
            kind = "STS" if "score" in raw else "PairClassification"
            raise ValueError(f"the row is a graded pair, not a query and its positive; add 'type: {kind}'")
        plan = self._plan(raw)
        if plan["text"] and plan["label"] and not plan["query"] and not self.settings.columns:
            mend = "add 'type: Classification' to its entry under 'data:'"
            raise ValueError(f"the row is a text and its label, not a query and its positive; {mend}")
        return self._with_candidates(raw, "query", "positive")

    def _translated(self, raw: _Raw) -> Example:
        return self._with_candidates(raw, "sentence1", "sentence2")

    def _graded(self, raw: _Raw) -> Example:
        first, second = self._text(raw, "sentence1"), self._text(raw, "sentence2")
        if self.settings.type == "PairClassification":
            key = self._key(raw, "label")
            score = _number(raw[key], key)
            if score not in (0, 1):
                raise ValueError(f"'{key}' must be 0 or 1, not {raw[key]!r:.60}")
        else:
            score = self._score(raw)
        return Example(first, (second,), score=score)

    def _classified(self, raw: _Raw) -> Example:
        plan = self._plan(raw)
        if plan["positive"] and not plan["text"]:  # partners are chosen already
            row = self._with_candidates(raw, "query", "positive")
            label = _label(raw, plan["label"][0]) if plan["label"] else None
            return Example(row.query, row.positives, row.negatives, label)
        return Example(self._text(raw, "text"), label=_label(raw, self._key(raw, "label")))

    def _scored(self, raw: _Raw) -> Example:
        score, plan = self._score(raw), self._plan(raw)
        if plan["sentence2"] and not plan["text"]:  # pairs already
            return Example(self._text(raw, "sentence1"), (self._text(raw, "sentence2"),), score=score)
        return Example(self._text(raw, "text"), score=score)

    def _score(self, raw: _Raw) -> float:
        """As it is written; in [0, 1] where the settings have a scale."""
        key = self._key(raw, "score")
        score = _number(raw[key], key)
        if self.settings.scale is None:
            return score
        low, high = self.settings.scale
        if not low <= score <= high:
            raise ValueError(f"'{key}' is {score:g}, outside the scale [{low:g}, {high:g}]; mend the row or 'scale'")
        return (score - low) / (high - low)

    def _with_candidates(self, raw: _Raw, query: str, positive: str) -> Example:
        plan = self._plan(raw)
        text = self._text(raw, query)
        key = self._key(raw, positive)
        positives = _texts(raw[key], key)
        if not positives:
            raise ValueError(f"'{key}' names no positive; remove the row")
        negatives = [
            text for key in plan["negative"] for text in _texts(raw[key], key, numbered=len(plan["negative"]) > 1)
        ]
        teacher = _teacher(raw, plan, len(positives), len(negatives))
        if len(positives) > 1 or negatives:
            known = set(positives)
            wrong = next((text for text in negatives if text in known), None)
            if wrong is not None:
                raise ValueError(f"'{wrong:.60}' is positive and negative; remove one of them")
            if len(known) < len(positives) or len(set(negatives)) < len(negatives):
                positives, negatives, teacher = _distinct(positives, negatives, teacher)
        most = self.settings.negatives
        if most is not None and len(negatives) > most:
            negatives, teacher = negatives[:most], teacher[: len(positives) + most]
        return Example(text, tuple(positives), tuple(negatives), teacher=tuple(teacher))

    def _plan(self, raw: _Raw) -> dict[str, list[str]]:
        """By our name of a column, the row's keys for it, of those that hold something."""
        keys = tuple(key for key, value in raw.items() if value is not None)
        plan = self._plans.get(keys)
        if plan is None:
            plan = self._plans[keys] = {name: self._keys(name, keys) for name in ALIASES}
            self.unseen -= {name for name in self.unseen if self._keys(name, tuple(raw))}
        return plan

    def _keys(self, name: str, keys: Sequence[str]) -> list[str]:
        return keys_of(name, keys, self.settings.columns.get(name))

    def _key(self, raw: _Raw, name: str) -> str:
        found = self._plan(raw)[name]
        if found:
            return found[0]
        wanted = self.settings.columns.get(name, name)
        if wanted in raw:
            raise ValueError(f"'{wanted}' is null; remove the row")
        has = f"the row has {quoted(raw)}" if raw else "the row is empty"
        if unseen := [each for each in (name, *sorted(self.unseen)) if each in self.unseen and each not in _OPTIONAL]:
            raise _NoColumnError(unseen[0], did_you_mean(self.settings.columns[unseen[0]], raw, has))
        spare = raw.keys() - {alias for each in ALIASES.values() for alias in each}
        raise ValueError(f"has no '{wanted}'; {did_you_mean(wanted, spare, has)}")

    def _text(self, raw: _Raw, name: str) -> str:
        key = self._key(raw, name)
        return _checked(raw[key], key)


def _checked(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"'{key}' must be text, not {value!r:.60}")
    if not value or value.isspace():
        raise ValueError(f"'{key}' is empty; remove the row")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"'{key}' holds half of a surrogate pair, which is no text") from None
    return value


def _texts(value: Any, key: str, *, numbered: bool = False) -> list[str]:
    if isinstance(value, list):
        return [_checked(item, key) for item in value]
    if numbered and value == "":  # in CSV, a row with fewer negatives than the header has columns
        return []
    return [_checked(value, key)]


def _number(value: Any, key: str) -> float:
    number = as_number(value)
    if not math.isfinite(number):
        raise ValueError(f"'{key}' must be a finite number, not {value!r:.60}")
    return number


def _label(raw: _Raw, key: str) -> str | int:
    value = raw[key]
    if not isinstance(value, str | int):
        raise ValueError(f"'{key}' must be text or a whole number, not {value!r:.60}")
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"'{key}' is empty; remove the row")
    return int(value) if isinstance(value, bool) else value


def _teacher(raw: _Raw, plan: Mapping[str, list[str]], positives: int, negatives: int) -> list[float]:
    """A score a candidate: from `teacher`, or FlagEmbedding's `pos_scores` and `neg_scores`."""
    if plan["teacher"]:
        key = plan["teacher"][0]
        values = raw[key]
    elif raw.get("pos_scores") is not None:
        key, values = "pos_scores", [*_list(raw, "pos_scores"), *_list(raw, "neg_scores")]
    else:
        return []
    if not isinstance(values, list) or len(values) != positives + negatives:
        has = f"{len(values)} scores" if isinstance(values, list) else f"{values!r:.60}"
        raise ValueError(f"'{key}' must have a score for each of {positives + negatives} candidates, not {has}")
    return [math.nan if value is None else _number(value, key) for value in values]


def _list(raw: _Raw, key: str) -> list[Any]:
    value = raw.get(key)
    return value if isinstance(value, list) else [] if value is None else [value]


def _distinct(
    positives: Sequence[str], negatives: Sequence[str], teacher: Sequence[float]
) -> tuple[list[str], list[str], list[float]]:
    """Each text once, with the score that it had first."""
    places = {text: i for i, text in reversed(list(enumerate([*positives, *negatives])))}
    kept = sorted(places.values())
    split = len(set(positives))
    texts = [[*positives, *negatives][i] for i in kept]
    return texts[:split], texts[split:], [teacher[i] for i in kept] if teacher else []


def _raw(settings: DataSettings) -> Iterator[tuple[str, _Raw]]:
    """Each row as its source has it, and the place where it stands."""
    if settings.hub is not None:
        yield from hub_data.rows(settings)
    elif settings.task is not None:
        yield from _of_task(settings)
    else:
        for file in settings.files:
            for line, raw in raw_rows(Path(file)):
                yield f"{file}:{line}", raw


def _of_task(settings: DataSettings) -> Iterator[tuple[str, _Raw]]:
    task = next((task for task in suite.load(settings.suite) if task.name == settings.task), None)
    if task is None:
        raise CuveeError(f"the suite has no task '{settings.task}' any more", where=settings.where)
    tables = task.tables("train")
    if "rows" not in tables:
        rows = task.retrieval("train").lists()
        yield from ((f"{tables['qrels']}: query {number}", row) for number, row in enumerate(rows, start=1))
        return
    named = task.columns.get("rows", {})
    for line, raw in raw_rows(tables["rows"]):
        own = {name: raw[column] for name, column in named.items() if column in raw}
        yield f"{tables['rows']}:{line}", {**raw, **own} if own else raw
