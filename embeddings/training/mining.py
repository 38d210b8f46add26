"""Hard negatives, found by sentence-transformers' own mine_hard_negatives with the model that training begins with."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from embeddings.training.mining_settings import MiningSettings
from embeddings.training.rows import Example
from merging.errors import CuveeError

_SCORES = 1 << 26  # similarities that are held at a time: 256 MB


def mine(
    rows: Sequence[Example],
    settings: MiningSettings,
    transformer: Any,
    *,
    prompt: Mapping[str, str] | None = None,
    seed: int = 0,
    most: int | None = None,
    where: str = "",
) -> list[Example]:
    """The rows with mined negatives after their own.

    The candidates are all positives and negatives of the data set; what any row has as a positive of the same query is
    none of its negatives. All texts and their vectors are in memory meanwhile; similarities are computed in parts.

    Args:
        transformer: a SentenceTransformer.
        prompt: by "query" and "document"; None: the model's own.
        seed: of the "random" sampling.
        most: negatives a row in all; None: no bound.

    Raises:
        CuveeError: the settings leave nothing to choose from.
    """
    import datasets
    from sentence_transformers.util import mine_hard_negatives

    positives: dict[str, dict[str, None]] = {}
    for row in rows:
        positives.setdefault(row.query, {}).update(dict.fromkeys(row.positives))
    pairs = [(query, positive) for query, texts in positives.items() for positive in texts]
    corpus = list(dict.fromkeys(text for row in rows for text in (*row.positives, *row.negatives)))
    table = datasets.Dataset.from_dict({"query": [pair[0] for pair in pairs], "positive": [pair[1] for pair in pairs]})
    state = random.getstate()
    random.seed(seed)  # the function draws from the global generator
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its bars cannot be switched off
            found = mine_hard_negatives(
                table,
                transformer,
                anchor_column_name="query",
                positive_column_name="positive",
                corpus=corpus,
                range_min=settings.range_min,
                range_max=settings.range_max,
                max_score=settings.max_score,
                min_score=settings.min_score,
                absolute_margin=settings.absolute_margin,
                relative_margin=settings.relative_margin,
                num_negatives=settings.negatives,
                sampling_strategy=settings.sampling,
                query_prompt=None if prompt is None else prompt.get("query", ""),
                corpus_prompt=None if prompt is None else prompt.get("document", ""),
                output_format="labeled-list",
                batch_size=settings.batch_size,
                faiss_batch_size=max(1, _SCORES // max(1, len(corpus))),
                verbose=False,
            )
    except ValueError as error:
        raise CuveeError(f"hard negatives cannot be mined: {error}", where=where, mend="change 'mine'") from None
    finally:
        random.setstate(state)
    mined: dict[str, dict[str, None]] = {}
    for query, texts in zip(found["query"], found["positive"], strict=True):
        mined.setdefault(query, {}).update(dict.fromkeys(texts[1:]))
    return [_with(row, mined.get(row.query, {}), positives[row.query], settings.negatives, most) for row in rows]


def _with(
    row: Example, mined: Mapping[str, None], positives: Mapping[str, None], count: int, most: int | None
) -> Example:
    """Mined texts after the row's own negatives; the teacher, who never saw them, says nothing about them."""
    own = dict.fromkeys(row.negatives)
    new = [text for text in mined if text not in positives and text not in own][:count]
    negatives = (*row.negatives, *new)[:most]
    if not row.teacher:
        return replace(row, negatives=negatives)
    silent = (float("nan"),) * (len(negatives) - len(row.negatives))
    return replace(row, negatives=negatives, teacher=(*row.teacher[: len(row.positives) + len(negatives)], *silent))
