"""Tasks of a suite as ordinary task objects of mteb: its own classes, fed from local files."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.regression import AbsTaskRegression
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import Licenses

if TYPE_CHECKING:
    from embeddings.evaluation.suite import SuiteTask
    from merging.tables import Row


def mteb_task(task: SuiteTask, split: str = "test") -> AbsTask:
    """An mteb task whose data are read from the suite's files when mteb asks for them.

    Each task has a class of its own: mteb looks for metadata and prompts there, and forgets those of an instance when
    it unloads the data.

    Raises:
        SuiteError: there is no such split.
    """
    task.tables(split)
    licence = task.licence.lower()
    metadata = TaskMetadata(
        name=task.name,
        description=task.description or task.name,
        dataset={"path": f"cuvee/{task.suite}/{task.name}", "revision": task.digest},
        reference=task.source if task.source.startswith("https://") else None,
        type=task.type,
        category="t2c" if task.type in ("Classification", "Clustering") else "t2t",
        eval_splits=[split],
        eval_langs=list(task.languages),
        main_score=task.metric,
        license=licence if licence in get_args(get_args(Licenses)[0] or Licenses) else None,
        prompt=task.prompt if task.prompt is None or isinstance(task.prompt, str) else dict(task.prompt),
    )
    name = "".join(character if character.isalnum() else "_" for character in task.name)
    kind = type(f"Suite_{name}", (_KINDS[task.type],), {"metadata": metadata, "suite_task": task})
    made: AbsTask = kind()
    return made


class _FromFiles(AbsTask):
    """Reads the evaluated split, and the train split where mteb fits a probe on it."""

    suite_task: ClassVar[SuiteTask]
    data_loaded: bool
    dataset: Any

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        if not self.data_loaded:
            self.suite_task.refuse_changed()
            rows = {split: self.suite_task.read(split) for split in self._splits_to_read()}
            self.dataset = DatasetDict({split: Dataset.from_dict(data) for split, data in self._columns(rows).items()})
            self.data_loaded = True

    def _splits_to_read(self) -> Sequence[str]:
        return list(self.eval_splits)

    def _columns(self, rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, list[Any]]]:
        """Mteb's columns by split."""
        return {split: {key: [row[key] for row in data] for key in data[0]} for split, data in rows.items()}


class _Retrieval(_FromFiles, AbsTaskRetrieval):
    """Retrieval, and reranking where the data name candidates."""

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        if not self.data_loaded:
            self.suite_task.refuse_changed()
            self.dataset = {"default": {split: self._read(split) for split in self.eval_splits}}
            self.data_loaded = True

    def _read(self, split: str) -> dict[str, Any]:
        data = self.suite_task.retrieval(split)
        corpus = {"id": list(data.corpus), "text": list(data.corpus.values())}
        if data.titles:
            corpus["title"] = [data.titles.get(name, "") for name in data.corpus]
        ranked = data.candidates
        return {
            "corpus": Dataset.from_dict(corpus),
            "queries": Dataset.from_dict({"id": list(data.queries), "text": list(data.queries.values())}),
            "relevant_docs": {query: dict(docs) for query, docs in data.relevant.items()},
            "top_ranked": None if ranked is None else {query: list(docs) for query, docs in ranked.items()},
        }


class _STS(_FromFiles, AbsTaskSTS):
    pass


class _PairClassification(_FromFiles, AbsTaskPairClassification):
    def _columns(self, rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, list[Any]]]:
        return {split: _renamed(data, label="labels") for split, data in super()._columns(rows).items()}


class _Classification(_FromFiles, AbsTaskClassification):
    def _splits_to_read(self) -> Sequence[str]:
        return list(dict.fromkeys([self.train_split, *self.eval_splits]))

    def _columns(self, rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, list[Any]]]:
        """With labels as whole numbers from 0: average precision takes no others."""
        labels = {row["label"] for data in rows.values() for row in data}
        order = sorted(labels) if all(isinstance(label, int) for label in labels) else sorted(labels, key=str)
        number = {label: i for i, label in enumerate(order)}
        columns = super()._columns(rows)
        return {split: {**data, "label": [number[label] for label in data["label"]]} for split, data in columns.items()}


class _Regression(_FromFiles, AbsTaskRegression):
    def _splits_to_read(self) -> Sequence[str]:
        return list(dict.fromkeys([self.train_split, *self.eval_splits]))

    def _columns(self, rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, list[Any]]]:
        return {split: _renamed(data, score="value") for split, data in super()._columns(rows).items()}


class _Clustering(_FromFiles, AbsTaskClustering):
    max_fraction_of_documents_to_embed = None  # mteb's 4 % suit its own large sets
    max_documents_per_cluster: int = AbsTaskClustering.max_documents_per_cluster

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        super().load_data(num_proc, **kwargs)
        rows = min(len(data) for data in self.dataset.values())
        self.max_documents_per_cluster = min(AbsTaskClustering.max_documents_per_cluster, rows)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As mteb's, with the same bootstrap samples for every model: its generator goes on from call to call."""
        self.rng_state, self.np_rng = random.Random(self.seed), np.random.default_rng(self.seed)
        return super().evaluate(*args, **kwargs)

    def _columns(self, rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, list[Any]]]:
        columns = super()._columns(rows).items()
        renamed = {split: _renamed(data, text="sentences", label="labels") for split, data in columns}
        return {split: {**data, "labels": list(map(str, data["labels"]))} for split, data in renamed.items()}


class _BitextMining(_FromFiles, AbsTaskBitextMining):
    pass


def _renamed(data: Mapping[str, list[Any]], **names: str) -> dict[str, list[Any]]:
    return {names.get(key, key): values for key, values in data.items()}


_KINDS: Mapping[str, type[_FromFiles]] = {
    "Retrieval": _Retrieval,
    "Reranking": _Retrieval,
    "STS": _STS,
    "PairClassification": _PairClassification,
    "Classification": _Classification,
    "Clustering": _Clustering,
    "Regression": _Regression,
    "BitextMining": _BitextMining,
}
