"""`cuvee evaluate --check FOLDER`: everything that is wrong, or looks wrong, in a suite, each with file and line."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embeddings.evaluation.suite import KINDS, SPLITS, TABLES, SuiteTask, load_task, task_files
from merging.errors import CuveeError, printable
from merging.tables import Row, TableError, converted, raw_rows

ERROR, WARNING = "error", "warning"
_EACH = 20  # findings of one sort in one file; the rest is counted
Lines = Sequence[tuple[int, Row]]
Tables = Mapping[str, Mapping[str, Lines]]


@dataclass(frozen=True)
class Finding:
    """Something wrong with a suite.

    Attributes:
        file: the YAML or the table.
        line: in it, from 1; 0 where the whole file is meant.
        severity: "error": the scores would be wrong or none; "warning": they may mean less than they seem to.
        message: one line.
    """

    file: str
    line: int
    severity: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return printable(f"{where}: {self.severity}: {self.message}")


def check(folder: str | Path) -> list[Finding]:
    """Reads all of a suite and says what is wrong with it, in the order of tasks, files and lines.

    Raises:
        SuiteError: it is no suite at all: no such folder, or no task in it.
    """
    found: list[Finding] = []
    read: list[tuple[SuiteTask, Tables]] = []
    for file in task_files(Path(folder)):
        try:
            task = load_task(file)
        except CuveeError as error:
            found.append(_of_error(error, file))
            continue
        tables: dict[str, dict[str, Lines]] = {}
        found += _few(_check(task, tables))
        read.append((task, tables))
    return [*found, *_leaks_between(read)]


def _check(task: SuiteTask, tables: dict[str, dict[str, Lines]]) -> Iterator[Finding]:
    """What is wrong with one task; what could be read of it is left in `tables`, by split and table."""
    if "test" not in task.splits:
        yield Finding(task.where, 0, WARNING, "has no test split")
    if not task.licence:
        yield Finding(task.where, 0, WARNING, "states no licence")
    for split in SPLITS:
        if split in task.splits:
            tables[split] = {}
            for table, file in task.splits[split].items():
                findings, rows = _read(task, table, file)
                yield from findings
                if rows is not None:
                    tables[split][table] = rows
    for split, read in tables.items():
        if "rows" in read:
            file = task.splits[split]["rows"]
            yield from _empty(read["rows"], file)
            yield from _twice(task, read["rows"], file)
            if task.type in _SPECIAL:
                yield from _SPECIAL[task.type](read["rows"], file, split)
        elif len(read) == len(TABLES):
            yield from _judgments(read, task.splits[split])
    yield from _leaks(task, tables)
    yield from _unseen_labels(task, tables)


def _read(task: SuiteTask, table: str, file: Path) -> tuple[list[Finding], Lines | None]:
    """All rows that can be read; None for the rows of a file that cannot."""
    columns = KINDS[task.type].columns if table == "rows" else TABLES[table]
    rows: list[tuple[int, Row]] = []
    found = []
    try:
        for line, raw in raw_rows(file):
            try:
                rows.append((line, converted(raw, columns, task.columns.get(table, {}))))
            except ValueError as wrong:
                found.append(Finding(str(file), line, ERROR, str(wrong)))
    except TableError as error:
        return [*found, _of_error(error, file)], None
    if not rows and not found:
        found.append(Finding(str(file), 0, ERROR, "holds no row"))
    return found, rows


def _empty(rows: Lines, file: Path) -> Iterator[Finding]:
    for line, row in rows:
        for column, value in row.items():
            texts = value if isinstance(value, list) else [value]
            if any(isinstance(text, str) and not text.strip() for text in texts):
                yield Finding(str(file), line, ERROR, f"'{column}' is empty")


def _twice(task: SuiteTask, rows: Lines, file: Path) -> Iterator[Finding]:
    """Rows that ask the same; with another answer, one of them is wrong."""
    first: dict[Any, tuple[int, Row]] = {}
    for line, row in rows:
        # A query may have several positives, so a pair is asked twice only with both.
        key = (*question(row), plain(row["positive"])) if task.type == "Retrieval" else question(row)
        earlier, before = first.setdefault(key, (line, row))
        if earlier != line:
            answers = [{name: row[name] for name in ("label", "score") if name in row} for row in (before, row)]
            same = answers[0] == answers[1]
            other = "" if same else f", with {_shown(answers[0])} there and {_shown(answers[1])} here"
            yield Finding(str(file), line, WARNING, f"the same as line {earlier}{other}")


def _labels(rows: Lines, file: Path, split: str, *, sparse: bool = False) -> Iterator[Finding]:
    """One label only; with `sparse`, labels with one example."""
    count = Counter(row["label"] for _, row in rows)
    if len(count) == 1:
        yield Finding(str(file), 0, ERROR, f"every row has the label {_shown(rows[0][1]['label'])}")
        return
    for line, row in rows:
        if count[row["label"]] == 1 and sparse:
            yield Finding(str(file), line, WARNING, f"the label {_shown(row['label'])} has one example only")


def _classes(rows: Lines, file: Path, split: str) -> Iterator[Finding]:
    if rows and split == "train":  # in test a rare label is as good as any other
        yield from _labels(rows, file, split, sparse=True)


def _clusters(rows: Lines, file: Path, split: str) -> Iterator[Finding]:
    if rows:
        yield from _labels(rows, file, split, sparse=True)


def _scores(rows: Lines, file: Path, split: str) -> Iterator[Finding]:
    if len(rows) > 1 and len({row["score"] for _, row in rows}) == 1:
        yield Finding(
            str(file), 0, ERROR, f"every row has the score {rows[0][1]['score']:g}: nothing correlates with it"
        )
    elif len(rows) == 1:
        yield Finding(str(file), 0, ERROR, "holds one row: nothing correlates with it")


def _pairs(rows: Lines, file: Path, split: str) -> Iterator[Finding]:
    if len(rows) == 1:
        yield Finding(str(file), 0, ERROR, "holds one row: mteb would take it for a whole table")
    if rows:
        yield from _labels(rows, file, split)


def _candidates(rows: Lines, file: Path, split: str) -> Iterator[Finding]:
    for line, row in rows:
        if not row["positive"]:
            yield Finding(str(file), line, ERROR, "has no positive")
        if not row["negative"]:
            yield Finding(str(file), line, WARNING, "has no negative: any order is right")
        if both := set(row["positive"]) & set(row["negative"]):
            yield Finding(str(file), line, ERROR, f"{_shown(min(both))} is positive and negative")


def _translations(rows: Lines, file: Path, split: str) -> Iterator[Finding]:
    """A sentence that occurs twice on a side has two right answers, of which mteb counts one."""
    for column in ("sentence1", "sentence2"):
        first: dict[str, int] = {}
        for line, row in rows:
            earlier = first.setdefault(plain(row[column]), line)
            if earlier != line:
                message = f"'{column}' is that of line {earlier} too: either is right, one is counted"
                yield Finding(str(file), line, WARNING, message)


def _judgments(read: Mapping[str, Lines], files: Mapping[str, Path]) -> Iterator[Finding]:
    known: dict[str, set[str]] = {}
    for table in ("corpus", "queries"):
        first: dict[str, int] = {}
        texts: dict[str, int] = {}
        for line, row in read[table]:
            earlier = first.setdefault(row["id"], line)
            if earlier != line:
                yield Finding(str(files[table]), line, ERROR, f"the id {_shown(row['id'])} is that of line {earlier}")
            text = plain(f"{row.get('title', '')} {row['text']}")
            if not text:
                yield Finding(str(files[table]), line, ERROR, "'text' is empty")
            elif texts.setdefault(text, line) != line:
                yield Finding(str(files[table]), line, WARNING, f"the same text as line {texts[text]}")
        known[table] = set(first)
    relevant: set[str] = set()
    judged: dict[tuple[str, str], int] = {}
    for line, row in read["qrels"]:
        for table, name in (("queries", row["query"]), ("corpus", row["doc"])):
            if name not in known[table]:
                message = f"judges {_shown(name)}, an id that {files[table].name} does not have"
                yield Finding(str(files["qrels"]), line, ERROR, message)
        earlier = judged.setdefault((row["query"], row["doc"]), line)
        if earlier != line:
            yield Finding(str(files["qrels"]), line, WARNING, f"judges the same as line {earlier}")
        if row["relevance"] > 0:
            relevant.add(row["query"])
    for line, row in read["queries"]:
        if row["id"] not in relevant:
            yield Finding(str(files["queries"]), line, WARNING, "has no relevant document: left out of the score")


def _leaks(task: SuiteTask, tables: Tables) -> Iterator[Finding]:
    """Rows of train, and of validation, that ask what a later split asks."""
    asked: dict[tuple[str, ...], tuple[str, Path, int]] = {}
    for split in SPLITS:
        file, rows = _asking(task, tables, split)
        for line, row in rows:
            to, where, at = asked.setdefault(question(row), (split, file, line))
            if to != split:
                yield Finding(str(file), line, ERROR, f"leaks from {split} into {to}: {where.name}:{at} asks the same")


def _leaks_between(read: Sequence[tuple[SuiteTask, Tables]]) -> Iterator[Finding]:
    """Train splits that ask what another task's test split asks: whoever trains on all of them learns it by heart."""
    trained: dict[tuple[str, ...], dict[str, tuple[Path, int]]] = defaultdict(dict)
    for task, tables in read:
        file, rows = _asking(task, tables, "train")
        for line, row in rows:
            trained[question(row)].setdefault(task.name, (file, line))
    for task, tables in read:
        shared: dict[str, list[tuple[int, Path, int]]] = defaultdict(list)
        file, rows = _asking(task, tables, "test")
        for line, row in rows:
            for other, (where, at) in trained.get(question(row), {}).items():
                if other != task.name:
                    shared[other].append((line, where, at))
        for other, ((line, where, at), *more) in shared.items():
            also = f", and {len(more)} more do" if more else ""
            message = f"asks what the train split of {other} holds: {where.parent.name}/{where.name}:{at}{also}"
            yield Finding(str(file), line, WARNING, message)


def _asking(task: SuiteTask, tables: Tables, split: str) -> tuple[Path, Lines]:
    """The table of a split that asks: its rows, or its queries; none where there is no such split."""
    table = "rows" if "rows" in tables.get(split, {}) else "queries"
    rows = tables.get(split, {}).get(table, ())
    return (task.splits[split][table] if rows else Path(task.where)), rows


def _unseen_labels(task: SuiteTask, tables: Tables) -> Iterator[Finding]:
    if task.type != "Classification" or "rows" not in tables.get("train", {}):
        return
    trained = {row["label"] for _, row in tables["train"]["rows"]}
    for split in ("test", "validation"):
        lines = tables.get(split, {}).get("rows", ())
        unseen: dict[Any, list[int]] = defaultdict(list)
        for line, row in lines:
            if row["label"] not in trained:
                unseen[row["label"]].append(line)
        for label, where in unseen.items():
            message = f"the label {_shown(label)} ({len(where)} rows) is none of train: it cannot be told"
            yield Finding(str(task.splits[split]["rows"]), where[0], WARNING, message)


def _few(findings: Iterable[Finding]) -> Iterator[Finding]:
    """The first of each sort in each file, and how many more there are."""
    count: Counter[tuple[str, str, str]] = Counter()
    last: dict[tuple[str, str, str], Finding] = {}
    for finding in findings:
        # Messages of one sort differ in what they quote and in their numbers.
        sort = re.sub(r"'[^']*'|\d+", "", finding.message)
        key = (finding.file, finding.severity, sort)
        count[key] += 1
        last[key] = finding
        if count[key] <= _EACH:
            yield finding
    for key, finding in last.items():
        if count[key] > _EACH:
            more = f"and {count[key] - _EACH} more like the {_EACH} above"
            yield Finding(finding.file, finding.line, finding.severity, more)


def _of_error(error: CuveeError, file: Path) -> Finding:
    path, _, line = error.where.rpartition(":")
    message = f"{error.what}; {error.mend}" if error.mend else error.what
    if path and line.isdigit():
        return Finding(path, int(line), ERROR, message)
    return Finding(error.where or str(file), 0, ERROR, message)


def question(row: Row) -> tuple[str, ...]:
    """What a row asks, without case and extra space: its text, its query, or its two sentences in either order."""
    if "sentence1" in row:
        return tuple(sorted((plain(row["sentence1"]), plain(row["sentence2"]))))
    return (plain(row["query"] if "query" in row else row["text"]),)


def plain(text: str) -> str:
    """Without case and extra space."""
    return " ".join(text.casefold().split())


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else f"'{value:.60}'" if isinstance(value, str) else str(value)


_SPECIAL: Mapping[str, Callable[[Lines, Path, str], Iterator[Finding]]] = {
    "Classification": _classes,
    "Clustering": _clusters,
    "PairClassification": _pairs,
    "STS": _scores,
    "Regression": _scores,
    "Reranking": _candidates,
    "BitextMining": _translations,
}
