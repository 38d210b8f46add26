"""Converters: from what others write to rows that train: scored candidates to rows with several positives."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.errors import CuveeError
from merging.tables import raw_rows


@dataclass(frozen=True)
class Candidate:
    """A passage, and how much it helped to answer a query.

    Attributes:
        utility: of the passage for the step at hand, in [0, 1].
        correct: whether the answer that came of it in the end was right.
    """

    text: str
    utility: float
    correct: bool


def multi_positive(
    query: str,
    candidates: Sequence[Candidate],
    *,
    least: float = 0.6,
    most: int = 3,
    negatives: int = 15,
    rng: random.Random,
) -> dict[str, Any] | None:
    """One row {query, positive, negative} of a query's scored candidates; None where none is good enough.

    Candidates are ranked by (correct, utility). The best must be correct with a utility of at least `least`; those that
    tie with it are the positives, `most` of them, and `negatives` random others the negatives: none that ties.

    Source: Agentic-R, arXiv 2601.11888, and its code.
    """
    distinct = list({candidate.text: candidate for candidate in reversed(candidates)}.values())[::-1]
    if not distinct:
        return None
    best = max((candidate.correct, candidate.utility) for candidate in distinct)
    if not best[0] or best[1] < least:
        return None
    tied = [candidate.text for candidate in distinct if (candidate.correct, candidate.utility) == best]
    others = [candidate.text for candidate in distinct if (candidate.correct, candidate.utility) != best]
    return {
        "query": query,
        "positive": tied[:most],
        "negative": rng.sample(others, min(negatives, len(others))),
    }


def convert_candidates(
    source: Path, *, least: float = 0.6, most: int = 3, negatives: int = 15, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Rows {query, positive, negative} of a file of rows {query, candidates: [{text, utility, correct}, …]}.

    Queries without a good candidate are left out.

    Raises:
        CuveeError: at the file and line of the first row that is wrong.
    """
    rng = random.Random(seed)
    for line, raw in raw_rows(source):
        try:
            query, candidates = _scored(raw)
        except ValueError as wrong:
            raise CuveeError(str(wrong), where=f"{source}:{line}") from None
        row = multi_positive(query, candidates, least=least, most=most, negatives=negatives, rng=rng)
        if row is not None:
            yield row


def grouped(pairs: Iterable[tuple[str, str, float]], *, threshold: float) -> Iterator[dict[str, Any]]:
    """Rows {query, positive, negative} of (query, document, score): at least `threshold` is positive, less negative.

    A query's pairs stand one after another. Queries without a positive are left out; of a document that comes twice the
    highest score counts.
    """
    waiting: str | None = None
    scores: dict[str, float] = {}

    def row() -> Iterator[dict[str, Any]]:
        good = [text for text, score in scores.items() if score >= threshold]
        if good:
            yield {"query": waiting, "positive": good, "negative": [t for t, s in scores.items() if s < threshold]}

    for query, document, score in pairs:
        if query != waiting:
            yield from row()
            waiting, scores = query, {}
        scores[document] = max(score, scores.get(document, score))
    yield from row()


def write_jsonl(rows: Iterable[Mapping[str, Any]], file: Path) -> int:
    """Writes rows as JSONL, gzipped where the name ends in .gz, and says how many; all of them or no file.

    Raises:
        CuveeError: it cannot be written; or of the rows.
    """
    count, staged = 0, file.with_name(f".{file.name}.{os.getpid()}")
    try:
        opened = gzip.open if file.suffix.lower() == ".gz" else open
        with opened(staged, "wt", encoding="utf-8") as stream:
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        staged.replace(file)
    except OSError as error:
        raise CuveeError(f"cannot write: {error.strerror}", where=str(file)) from error
    finally:
        with suppress(OSError):
            staged.unlink()
    return count


def _scored(raw: Mapping[str, Any]) -> tuple[str, list[Candidate]]:
    query, listed = raw.get("query"), raw.get("candidates")
    if not isinstance(query, str) or not query.strip():
        raise ValueError("'query' must be text that is not empty")
    if not isinstance(listed, list):
        raise ValueError("'candidates' must be a list of {text, utility, correct}")
    return query, [_candidate(item) for item in listed]


def _candidate(item: Any) -> Candidate:
    if not isinstance(item, dict) or not {"text", "utility", "correct"} <= item.keys():
        raise ValueError(f"a candidate must be {{text, utility, correct}}, not {item!r:.60}")
    text, utility, correct = item["text"], item["utility"], item["correct"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the text of a candidate must not be empty, not {text!r:.60}")
    if isinstance(utility, bool) or not isinstance(utility, int | float) or not 0 <= utility <= 1:
        raise ValueError(f"'utility' must be a number in [0, 1], not {utility!r:.60}")
    if correct not in (0, 1):
        raise ValueError(f"'correct' must be true or false, not {correct!r:.60}")
    return Candidate(text, float(utility), bool(correct))
