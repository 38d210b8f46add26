"""Batch: what one step of the optimiser sees, as arrays: the distinct texts, and which answers which query.

Each text of a side is embedded once, however often it occurs. A candidate is a negative of a query unless it may be an
answer to it: another row's positive of the same query or label, or the query's own text. Rows of classification and
clustering have only their own negatives (BOOM, arXiv 2602.05787; FlagEmbedding #1400 says why).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.training import losses
from embeddings.training.backbone import Text
from embeddings.training.config import TrainingConfig
from embeddings.training.data import GRADED, TrainingSet
from embeddings.training.loss_registry import Loss, Needs, Targets
from embeddings.training.schedule import Step


@dataclass(frozen=True)
class Objective:
    """How a data set is trained.

    Attributes:
        name: of the loss.
        needs: "positives", "scores" or "teacher".
        in_batch: whether other rows' candidates are negatives too.
    """

    name: str
    loss: Loss
    needs: str
    in_batch: bool


@dataclass(frozen=True)
class BatchPart:
    """The rows of one data set.

    Attributes:
        dataset: its index.
        rows: how many.
        queries: (rows,) places in the batch's texts.
        candidates: (candidates,) places in the batch's texts.
        positive, allowed: (rows, candidates), see `losses.Targets`.
        scores: None, (rows,) of graded pairs, or (rows, candidates) of a teacher.
    """

    dataset: int
    rows: int
    queries: NDArray[np.int64]
    candidates: NDArray[np.int64]
    positive: NDArray[np.bool_]
    allowed: NDArray[np.bool_]
    scores: NDArray[np.float32] | None = None

    def targets(self, device: Any) -> Targets:
        import torch

        positive, allowed = (torch.from_numpy(mask).to(device) for mask in (self.positive, self.allowed))
        return Targets(positive, allowed, None if self.scores is None else torch.from_numpy(self.scores).to(device))


@dataclass(frozen=True)
class Batch:
    """A step's texts and what is known about them.

    Attributes:
        tokens: ids of each text, with an image before it or without.
        parts: one a data set.
    """

    tokens: Sequence[Text]
    parts: tuple[BatchPart, ...]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)


def objectives(config: TrainingConfig, sets: Sequence[TrainingSet]) -> list[Objective]:
    """The loss of each data set: its own, else the run's, else that of its type; its parameters over the run's.

    Raises:
        CuveeError: no such loss or parameter, or a loss that needs what the rows do not have.
    """
    return [_objective(config, each) for each in sets]


def _objective(config: TrainingConfig, of: TrainingSet) -> Objective:
    own, run = of.settings.loss, config.loss
    has: Needs = "teacher" if of.teacher is not None else "scores" if of.type in GRADED else "positives"
    name, where = own.name if own else None, own.where if own else of.settings.where
    if name is None and run.name is not None and losses.get(run.name, run.where).needs == has:
        name, where = run.name, run.where  # the run's loss is for the rows that it fits
    entry = losses.get(name or losses.default_of(of.type, has), where)
    losses.refuse_unfit(entry, has, of.name, where)
    parameters = losses.combined(entry.name, own.parameters if own else {}, run.parameters, where)
    in_batch = of.type in losses.IN_BATCH_TYPES
    if own is not None and own.in_batch is not None:
        in_batch = own.in_batch
    elif run.in_batch is not None:
        in_batch &= run.in_batch
    return Objective(entry.name, losses.build(entry.name, parameters, where), entry.needs, in_batch and entry.in_batch)


def build_batch(step: Step, sets: Sequence[TrainingSet], objectives: Sequence[Objective]) -> Batch:
    """The texts and targets of a schedule's step."""
    texts: list[Text] = []
    parts = []
    for part in step:
        of, objective = sets[part.dataset], objectives[part.dataset]
        graded = objective.needs == "scores"
        parts.append(_part(part.dataset, of, part.rows, texts, graded=graded, in_batch=objective.in_batch))
    return Batch(texts, tuple(parts))


def _part(
    dataset: int,
    of: TrainingSet,
    rows: NDArray[np.int64],
    texts: list[Text],
    *,
    graded: bool,
    in_batch: bool,
) -> BatchPart:
    query_ids = np.asarray(of.queries[rows], np.int64)  # (rows,)
    queries = _add(texts, of.query_tokens, query_ids)
    positives = [np.asarray(of.positives[row], np.int64) for row in rows]
    if graded:
        candidates = _add(texts, of.document_tokens, np.array([own[0] for own in positives]))
        pairs = np.eye(len(rows), dtype=bool)
        assert of.scores is not None
        scores = np.asarray(of.scores[rows], np.float32)
        return BatchPart(dataset, len(rows), queries, candidates, pairs, pairs, scores)
    negatives = [np.asarray(of.negatives[row], np.int64) for row in rows]
    owner = np.repeat(np.arange(len(rows)), [len(p) + len(n) for p, n in zip(positives, negatives, strict=True)])
    is_positive = np.concatenate(
        [np.arange(len(p) + len(n)) < len(p) for p, n in zip(positives, negatives, strict=True)]
    )
    values = np.concatenate([part for pair in zip(positives, negatives, strict=True) for part in pair])
    ids, place = np.unique(values, return_inverse=True)  # (candidates,), (values,)
    own = np.zeros((len(rows), len(ids)), bool)
    positive = own.copy()
    own[owner, place] = True
    positive[owner[is_positive], place[is_positive]] = True
    allowed = own
    if in_batch:
        allowed = own | ~_maybe_answers(of, rows, query_ids, ids, positive)
    taught = None
    if of.teacher is not None:
        taught = np.full(own.shape, np.nan, np.float32)
        taught[owner, place] = np.concatenate([of.teacher[row] for row in rows])
    return BatchPart(dataset, len(rows), queries, _add(texts, of.document_tokens, ids), positive, allowed, taught)


def _maybe_answers(
    of: TrainingSet,
    rows: NDArray[np.int64],
    queries: NDArray[np.int64],
    candidates: NDArray[np.int64],
    positive: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """(rows, candidates): positives of any row with the same query or label, and the query's own text."""
    found = np.zeros_like(positive)
    labels = None if of.labels is None else np.asarray(of.labels[rows])
    for names in (queries, labels):
        if names is not None:
            _, group = np.unique(names, return_inverse=True)  # (rows,)
            answers = np.zeros((group.max() + 1, positive.shape[1]), bool)
            np.logical_or.at(answers, group, positive)
            found |= answers[group]
    if of.query_tokens is of.document_tokens:
        found |= queries[:, None] == candidates
        return found
    # Each side has its own prompt or length, so that equal texts have two numbers.
    own, other = (
        np.array([table.text(i) for i in ids], object)
        for table, ids in ((of.query_tokens, queries), (of.document_tokens, candidates))
    )
    found |= own[:, None] == other
    return found


def _add(texts: list[Text], table: Any, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Appends the distinct texts; the place of each id, (ids,)."""
    distinct, inverse = np.unique(ids, return_inverse=True)
    first = len(texts)
    texts.extend(table[index] for index in distinct)
    return first + inverse.astype(np.int64)
