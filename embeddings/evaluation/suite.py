"""Suites: your own data as MTEB tasks. A folder with one YAML a task, beside or above the tables that it names.

    # legal-questions.yml: the file's name is the task's
    type: Retrieval              # one of KINDS
    group: in-domain             # tasks are averaged by group
    description: questions of clients, and the paragraphs that answer them
    licence: CC-BY-4.0
    files:                       # by split: test, validation, train
      train: train.jsonl.gz      # rows {query, positive}
      test: {corpus: corpus.parquet, queries: queries.csv, qrels: qrels.tsv}
    columns: {query: question}   # what the files call a column, where that is not our name
    metric: ndcg_at_10           # mteb's name
    languages: [eng-Latn]
    source: https://example.org
    prompt: {query: "Question: "}  # for models that name none themselves

A table is JSONL, CSV or TSV, plain or gzipped, or Parquet. The columns of each type:

    Retrieval           query, positive (every positive of the split is the pool); or corpus: id, text, title (optional),
                        queries: id, text, qrels: query, doc, relevance, as in BEIR
    Reranking           query, positive and negative (lists); or as above with relevance 0 for the other candidates
    STS                 sentence1, sentence2, score
    PairClassification  sentence1, sentence2, label (0 or 1)
    Classification      text, label; needs a train split, from which mteb draws the classifier's examples
    Clustering          text, label
    Regression          text, score; needs a train split
    BitextMining        sentence1, sentence2, each the other's translation
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from embeddings.evaluation.errors import SuiteError
from embeddings.evaluation.retrieval_data import RetrievalData, from_lists, from_pairs, from_tables
from merging import lineage, node
from merging.errors import RecipeError, did_you_mean, quoted
from merging.node import Node
from merging.recipe import read_file
from merging.setting import refuse_unknown_keys
from merging.tables import Column, Row, read_table

SHIPPED = Path(__file__).parent.parent / "data" / "suite"
SPLITS = ("test", "validation", "train")
_KEYS = (*("type", "group", "description", "licence", "source", "files", "columns", "metric", "languages", "prompt"),)
_TABLES = ("corpus", "queries", "qrels")
_FORM = 1  # of the digest: raise it when the same files would give other examples


@dataclass(frozen=True)
class Kind:
    """What a type of task needs: its columns, its usual metric, the metrics that mteb computes for it."""

    columns: tuple[Column, ...]
    metric: str
    metrics: str  # a regular expression
    tables: bool = False  # corpus, queries and qrels will do instead
    trains: bool = False  # mteb fits a probe on the train split


_PAIR = (Column("sentence1", "text"), Column("sentence2", "text"))
_RANKS = r"(ndcg|map|recall|precision|mrr|hit_rate)_at_(1|3|5|10|20|100|1000)"
_CLASSIFICATION = r"accuracy|ap|(f1|precision|recall|ap)(_weighted)?"

KINDS: Mapping[str, Kind] = {
    "Retrieval": Kind((Column("query", "text"), Column("positive", "text")), "ndcg_at_10", _RANKS, tables=True),
    "Reranking": Kind(
        (Column("query", "text"), Column("positive", "texts"), Column("negative", "texts")),
        *("map_at_1000", _RANKS),
        tables=True,
    ),
    "STS": Kind(
        (*_PAIR, Column("score", "score")),
        *("cosine_spearman", r"((cosine|manhattan|euclidean)_)?(spearman|pearson)"),
    ),
    "PairClassification": Kind(
        (*_PAIR, Column("label", "flag", ("labels", "is_duplicate"))),
        *("max_ap", r"(max|similarity|cosine|dot|manhattan|euclidean)_(ap|f1|accuracy|precision|recall)"),
    ),
    "Classification": Kind(
        (Column("text", "text"), Column("label", "label")), "accuracy", _CLASSIFICATION, trains=True
    ),
    "Clustering": Kind(
        (Column("text", "text", ("sentences",)), Column("label", "label", ("labels",))), "v_measure", r"v_measure|ami"
    ),
    "Regression": Kind(
        (Column("text", "text"), Column("score", "score", ("value",))), "kendalltau", r"kendalltau|r2", trains=True
    ),
    "BitextMining": Kind(_PAIR, "f1", r"f1|accuracy|precision|recall"),
}

TABLES: Mapping[str, tuple[Column, ...]] = {
    "corpus": (Column("id", "id", ("_id",)), Column("text", "text"), Column("title", "text", optional=True)),
    "queries": (Column("id", "id", ("_id",)), Column("text", "text")),
    "qrels": (
        Column("query", "id", ("query-id", "query_id")),
        Column("doc", "id", ("corpus-id", "doc_id")),
        Column("relevance", "relevance", ("score",)),
    ),
}


@dataclass(frozen=True)
class SuiteTask:
    """One task of a suite.

    Attributes:
        type: a key of `KINDS`.
        group: whatever the suite's author averages by; "in-domain" and "out-of-domain" in the shipped suite.
        metric: mteb's name of the main score.
        splits: by split, its tables: {"rows": file}, or "corpus", "queries" and "qrels".
        columns: by table, what its file calls a column, by our name.
        prompt: for models that name none themselves: one for all texts, or by "query" and "document".
        digest: of all that the scores depend on: the task's settings and the bytes of its files.
        where: the YAML's path.
        suite: the folder's name.
    """

    name: str
    type: str
    group: str
    metric: str
    splits: Mapping[str, Mapping[str, Path]]
    columns: Mapping[str, Mapping[str, str]]
    licence: str
    description: str
    source: str
    languages: tuple[str, ...]
    prompt: str | Mapping[str, str] | None
    digest: str
    where: str
    suite: str

    def read(self, split: str) -> list[Row]:
        """The rows of a split with the columns of the task's type; judged tables come as {query, positive} pairs too.

        Raises:
            SuiteError: no such split, or a file of it is wrong.
        """
        tables = self.tables(split)
        if "rows" in tables:
            return [row for _, row in self.read_table(split, "rows")]
        data = self.retrieval(split)
        if self.type == "Reranking":
            return data.lists()
        return data.pairs()

    def retrieval(self, split: str) -> RetrievalData:
        """A split of a Retrieval or Reranking task: corpus, queries and judgments.

        Raises:
            SuiteError: no such split, a file of it is wrong, or its ids do not fit together.
        """
        tables = self.tables(split)
        if "rows" not in tables:
            rows = {table: self.read_table(split, table) for table in _TABLES}
            return from_tables(rows, tables, rerank=self.type == "Reranking")
        build = from_lists if self.type == "Reranking" else from_pairs
        return build(self.read_table(split, "rows"), tables["rows"])

    def tables(self, split: str) -> Mapping[str, Path]:
        """The files of a split.

        Raises:
            SuiteError: there is no such split.
        """
        if split not in self.splits:
            mend = f"it has {quoted(self.splits)}"
            raise SuiteError(f"the task '{self.name}' has no split '{split}'", where=self.where, mend=mend)
        return self.splits[split]

    def read_table(self, split: str, table: str) -> list[tuple[int, Row]]:
        """The rows of one file of a split, each with its line.

        Raises:
            SuiteError: the file is wrong, or holds no row.
        """
        file = self.tables(split)[table]
        columns = KINDS[self.type].columns if table == "rows" else TABLES[table]
        rows = read_table(file, columns, self.columns.get(table, {}))
        if not rows:
            raise SuiteError("holds no row", where=str(file))
        return rows

    def refuse_changed(self) -> None:
        """Raises SuiteError if the task is not what it was when it was loaded: scores are kept under its digest."""
        if load_task(Path(self.where)).digest != self.digest:
            raise SuiteError("the task has changed since it was loaded", where=self.where, mend="run again")


def load(folder: str | Path | None = None) -> list[SuiteTask]:
    """The tasks of a suite in the order of their names; without a folder, of the suite that comes with the package.

    Raises:
        SuiteError: no such folder, no task in it, or a YAML that says something impossible.
    """
    root = SHIPPED if folder is None else Path(folder)
    return [load_task(file) for file in task_files(root)]


def task_files(folder: Path) -> list[Path]:
    """The YAML files of a suite.

    Raises:
        SuiteError: no such folder, no YAML in it, or two that name the same task.
    """
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix in (".yml", ".yaml"))
    except OSError as error:
        mend = "a suite is a folder with one YAML a task"
        raise SuiteError(f"cannot be read: {error.strerror}", where=str(folder), mend=mend) from None
    if not files:
        raise SuiteError("holds no task", where=str(folder), mend="a suite is a folder with one YAML a task")
    first: dict[str, Path] = {}
    for file in files:
        if first.setdefault(file.stem, file) != file:
            raise SuiteError(f"names the same task as {first[file.stem].name}", where=str(file), mend="rename it")
    return files


def load_task(file: Path) -> SuiteTask:
    """One task from its YAML.

    Raises:
        SuiteError: not readable, or it says something impossible.
    """
    try:
        text = read_file(file)
        if not text.strip():
            raise SuiteError("is empty", where=str(file), mend="write at least 'type:' and 'files:'")
        root = node.read(text, str(file))
        if not isinstance(root.value, dict):
            raise SuiteError("is no mapping", where=root.where, mend="write at least 'type:' and 'files:'")
        refuse_unknown_keys(root, _KEYS, "a task")
    except RecipeError as error:  # the reader was written for recipes
        what, mend = (said.replace("recipe", "task") for said in (error.what, error.mend))
        raise SuiteError(what, where=error.where, mend=mend) from None
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", file.stem):
        raise SuiteError("is no task's name", where=str(file), mend="use letters, digits, '.', '_' and '-'")
    return _task(file, root)


def _task(file: Path, root: Node) -> SuiteTask:
    kind_name = _type(root)
    kind = KINDS[kind_name]
    splits = _splits(root, kind, file.parent)
    metric = _text(root, "metric", kind.metric)
    if not re.fullmatch(kind.metrics, metric):
        usual = f"the usual one is '{kind.metric}'"
        raise SuiteError(f"'{metric}' is no metric of {kind_name}", where=root.value["metric"].where, mend=usual)
    columns = _columns(root, kind, splits)
    languages, prompt = _languages(root), _prompt(root)
    settings = {
        **{"form": _FORM, "name": file.stem, "type": kind_name, "metric": metric, "columns": columns},
        **{"languages": languages, "prompt": prompt},
    }
    return SuiteTask(
        name=file.stem,
        type=kind_name,
        metric=metric,
        group=_text(root, "group", "all"),
        splits=splits,
        columns=columns,
        licence=_text(root, "licence", ""),
        description=_text(root, "description", ""),
        source=_text(root, "source", ""),
        languages=languages,
        prompt=prompt,
        digest=_digest(settings, splits),
        where=str(file),
        suite=Path(os.path.abspath(file)).parent.name,
    )


def _type(root: Node) -> str:
    given = root.value.get("type")
    if given is None or given.value not in KINDS:
        what = "has no 'type'" if given is None else f"{given} is no type of task"
        mend = f"known: {quoted(KINDS)}"
        mend = did_you_mean(given.value, KINDS, mend) if given and isinstance(given.value, str) else mend
        raise SuiteError(what, where=given.where if given else root.where, mend=mend)
    return str(given.value)


def _splits(root: Node, kind: Kind, near: Path) -> dict[str, dict[str, Path]]:
    files = root.value.get("files")
    if files is None or not isinstance(files.value, dict) or not files.value:
        where = files.where if files else root.where
        raise SuiteError("needs 'files'", where=where, mend="write 'files: {test: rows.jsonl}'")
    found = {}
    for split, given in files.value.items():
        if split not in SPLITS:
            raise SuiteError(
                f"'{split}' is no split",
                where=given.where,
                mend=did_you_mean(split, SPLITS, f"known: {quoted(SPLITS)}"),
            )
        found[split] = {table: _file(item, near) for table, item in _tables(given, kind).items()}
    if kind.trains and "train" not in found:
        raise SuiteError("needs a train split", where=files.where, mend="mteb fits its probe on it")
    return {split: found[split] for split in SPLITS if split in found}


def _tables(given: Node, kind: Kind) -> dict[str, Node]:
    if isinstance(given.value, str):
        return {"rows": given}
    if not kind.tables or not isinstance(given.value, dict):
        raise SuiteError(f"must name a file, not {given}", where=given.where)
    for table in {**given.value, **dict.fromkeys(_TABLES)}:
        if table not in _TABLES or table not in given.value:
            has = "is no table" if table not in _TABLES else "is missing"
            raise SuiteError(f"'{table}' {has}", where=given.where, mend=f"name {quoted(_TABLES)}")
    return dict(given.value)


def _file(given: Node, near: Path) -> Path:
    if not isinstance(given.value, str) or not given.value:
        raise SuiteError(f"must name a file, not {given}", where=given.where)
    file = near / given.value
    if not file.is_file():
        raise SuiteError(f"no such file: {given.value}", where=given.where, mend=f"it is looked for in {near}")
    return file


def _columns(root: Node, kind: Kind, splits: Mapping[str, Mapping[str, Path]]) -> dict[str, dict[str, str]]:
    """`columns` by table. What is given flat belongs to every table that has such a column, unless that says otherwise."""
    given = root.value.get("columns")
    tables = {table for files in splits.values() for table in files}
    known = {table: [c.name for c in (kind.columns if table == "rows" else TABLES[table])] for table in sorted(tables)}
    found: dict[str, dict[str, str]] = {table: {} for table in known}
    if given is None:
        return found
    if not isinstance(given.value, dict):
        raise SuiteError(f"'columns' must be a mapping, not {given}", where=given.where)
    for name, item in sorted(given.value.items(), key=lambda each: isinstance(each[1].value, dict)):
        nested = isinstance(item.value, dict) and name in known
        for own, column in (item.value if nested else {name: item}).items():
            where_it_is = [table for table in ([name] if nested else known) if own in known[table]]
            if not where_it_is:
                names = sorted({each for table in ([name] if nested else known) for each in known[table]})
                mend = did_you_mean(own, names, f"known: {quoted(names)}")
                raise SuiteError(f"'{own}' is no column of the task", where=column.where, mend=mend)
            if not isinstance(column.value, str):
                raise SuiteError(f"must be a column's name, not {column}", where=column.where)
            for table in where_it_is:
                found[table][own] = column.value
    return found


def _languages(root: Node) -> tuple[str, ...]:
    given = root.value.get("languages")
    if given is None:
        return ("eng-Latn",)
    codes = given.value if isinstance(given.value, list) else [given]
    for code in codes:
        if not isinstance(code.value, str) or not re.fullmatch(r"[a-z]{3}-[A-Z][a-z]{3}", code.value):
            raise SuiteError(f"{code} is no language", where=code.where, mend="write it as mteb does, 'eng-Latn'")
    if not codes:
        raise SuiteError("names no language", where=given.where)
    return tuple(code.value for code in codes)


def _prompt(root: Node) -> str | dict[str, str] | None:
    given = root.value.get("prompt")
    if given is None or isinstance(given.value, str):
        return None if given is None else str(given.value)
    if not isinstance(given.value, dict) or not given.value:
        raise SuiteError(f"must be text or a mapping, not {given}", where=given.where)
    for key, item in given.value.items():
        if key not in ("query", "document") or not isinstance(item.value, str):
            raise SuiteError(f"'{key}' is no prompt", where=item.where, mend="write {query: …, document: …}, both text")
    return {key: str(item.value) for key, item in given.value.items()}


def _text(root: Node, key: str, default: str) -> str:
    given = root.value.get(key)
    if given is None or given.value is None:
        return default
    if isinstance(given.value, dict | list):
        raise SuiteError(f"'{key}' must be text, not {given}", where=given.where)
    return str(given.text).strip()


def _digest(settings: Mapping[str, Any], splits: Mapping[str, Mapping[str, Path]]) -> str:
    digest = xxhash.xxh3_128(json.dumps(settings, sort_keys=True, ensure_ascii=False).encode())
    for split, tables in splits.items():
        for table, file in sorted(tables.items()):
            stat = file.stat()
            content = _file_digest(os.path.abspath(file), stat.st_size, stat.st_mtime_ns)
            digest.update(f"\n{split} {table} {content}".encode())
    return f"xxh3:{digest.hexdigest()}"


@cache
def _file_digest(file: str, size: int, modified: int) -> str:
    """Read once in a process while the file stays as it is."""
    try:
        return lineage.file_digest(Path(file))
    except OSError as error:
        raise SuiteError(f"cannot be read: {error.strerror}", where=file) from None
