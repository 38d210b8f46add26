"""RetrievalData: corpus, queries and judgments, from pairs, from lists of candidates, or from three tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from embeddings.evaluation.errors import SuiteError
from merging.tables import Row

Lines = Sequence[tuple[int, Row]]


@dataclass(frozen=True)
class RetrievalData:
    """What a retrieval or reranking task is scored on.

    Attributes:
        corpus: text by the document's id.
        titles: by the document's id, of those that have one.
        queries: text by the query's id; only those that have a relevant document.
        relevant: by query, the relevance (1 or more) of its relevant documents.
        candidates: by query, the documents to put in order; None where that is the whole corpus.
    """

    corpus: Mapping[str, str]
    titles: Mapping[str, str]
    queries: Mapping[str, str]
    relevant: Mapping[str, Mapping[str, int]]
    candidates: Mapping[str, Sequence[str]] | None = None

    def pairs(self) -> list[Row]:
        """Each query with each of its relevant documents, as the model reads it: {query, positive}."""
        return [
            {"query": text, "positive": self.document(doc)}
            for query, text in self.queries.items()
            for doc in self.relevant[query]
        ]

    def lists(self) -> list[Row]:
        """Each query with its candidates: {query, positive, negative}, both lists."""
        rows = []
        for query, text in self.queries.items():
            relevant = self.relevant[query]
            others = [doc for doc in (self.candidates or {}).get(query, ()) if doc not in relevant]
            rows.append(
                {
                    "query": text,
                    "positive": [self.document(doc) for doc in relevant],
                    "negative": [self.document(doc) for doc in others],
                }
            )
        return rows

    def document(self, doc: str) -> str:
        """A document as mteb shows it to a model: its title, if it has one, before its text."""
        return f"{self.titles.get(doc, '')} {self.corpus[doc]}".strip()


def from_pairs(rows: Lines, file: Path) -> RetrievalData:
    """Every distinct positive is a document of the pool; a query that occurs with several has several right answers."""
    corpus: dict[str, str] = {}
    queries: dict[str, str] = {}
    relevant: dict[str, dict[str, int]] = {}
    for _, row in rows:
        document = corpus.setdefault(row["positive"], f"d{len(corpus)}")
        query = queries.setdefault(row["query"], f"q{len(queries)}")
        relevant.setdefault(query, {})[document] = 1
    return RetrievalData(
        {name: text for text, name in corpus.items()}, {}, {name: text for text, name in queries.items()}, relevant
    )


def from_lists(rows: Lines, file: Path) -> RetrievalData:
    """Each row is a query of its own; equal candidates of different rows are one document.

    Raises:
        SuiteError: a row has no positive, or a text on both sides.
    """
    corpus: dict[str, str] = {}
    queries: dict[str, str] = {}
    relevant: dict[str, dict[str, int]] = {}
    candidates: dict[str, list[str]] = {}
    for line, row in rows:
        if not row["positive"]:
            raise SuiteError("has no positive", where=f"{file}:{line}", mend="remove the row")
        if both := set(row["positive"]) & set(row["negative"]):
            what = f"'{min(both):.60}' is positive and negative"
            raise SuiteError(what, where=f"{file}:{line}", mend="remove one of them")
        query = f"q{len(queries)}"
        queries[query] = row["query"]
        names = {text: corpus.setdefault(text, f"d{len(corpus)}") for text in (*row["positive"], *row["negative"])}
        relevant[query] = {names[text]: 1 for text in row["positive"]}
        candidates[query] = list(names.values())
    return RetrievalData({name: text for text, name in corpus.items()}, {}, queries, relevant, candidates)


def from_tables(rows: Mapping[str, Lines], files: Mapping[str, Path], *, rerank: bool) -> RetrievalData:
    """From corpus, queries and qrels as in BEIR. Queries without a relevant document are left out: nothing ranks them.

    Args:
        rerank: the judged documents of a query, those of relevance 0 too, are its candidates.

    Raises:
        SuiteError: an id that occurs twice or is unknown, or no judgment at all.
    """
    corpus = {row["id"]: row["text"] for row in _by_id(rows["corpus"], files["corpus"]).values()}
    titles = {row["id"]: row["title"] for _, row in rows["corpus"] if row.get("title")}
    queries = {row["id"]: row["text"] for row in _by_id(rows["queries"], files["queries"]).values()}
    relevant: dict[str, dict[str, int]] = {}
    candidates: dict[str, list[str]] = {}
    for line, row in rows["qrels"]:
        for kind, name, known in (("query", row["query"], queries), ("document", row["doc"], corpus)):
            if name not in known:
                file = files["queries" if kind == "query" else "corpus"]
                raise SuiteError(
                    f"judges the {kind} '{name:.60}', which {file.name} does not have", where=f"{files['qrels']}:{line}"
                )
        candidates.setdefault(row["query"], []).append(row["doc"])
        if row["relevance"] > 0:
            relevant.setdefault(row["query"], {})[row["doc"]] = row["relevance"]
    if not relevant:
        raise SuiteError("judges no document as relevant", where=str(files["qrels"]))
    judged = {name: text for name, text in queries.items() if name in relevant}
    ranked = {name: candidates[name] for name in judged} if rerank else None
    return RetrievalData(corpus, titles, judged, relevant, ranked)


def _by_id(rows: Lines, file: Path) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for line, row in rows:
        if row["id"] in found:
            raise SuiteError(f"the id '{row['id']:.60}' occurs twice", where=f"{file}:{line}", mend="ids are unique")
        found[row["id"]] = row
    return found
