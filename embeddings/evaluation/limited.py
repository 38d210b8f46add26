"""LimitedTask: a suite's task of which a split has only so many rows, for scores that are wanted often."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embeddings.evaluation.suite import SuiteTask
from merging.tables import Row

_DRAW = 4  # keeps this draw apart from others


@dataclass(frozen=True)
class LimitedTask(SuiteTask):
    """A task whose split is drawn once, without replacement and the same for every model; other splits are whole.

    Of a retrieval task in rows these rows are the pool too; of one in tables it keeps its corpus, and so many queries.

    Attributes:
        split: which one.
        limit: rows, or queries.
    """

    split: str = "test"
    limit: int = 0

    @classmethod
    def of(cls, task: SuiteTask, split: str, limit: int) -> SuiteTask:
        return cls(**vars(task), split=split, limit=limit)

    def read_table(self, split: str, table: str) -> list[tuple[int, Row]]:
        rows = super().read_table(split, table)
        if split != self.split or table == "corpus":
            return rows
        if table == "qrels":
            drawn = {row["id"] for _, row in self.read_table(split, "queries")}
            return [(line, row) for line, row in rows if row["query"] in drawn]
        count = min(len(rows), self.limit)
        return [rows[i] for i in sorted(np.random.default_rng(_DRAW).permutation(len(rows))[:count])]
