"""What mteb's score of a task was computed from, query by query or example by example, noted while mteb computes it.

mteb gives each subset's scores as means, and predictions in files of a gigabyte. `noted` reads along: it keeps what mteb
hands to its own hooks and turns it into `Examples`. They count only where the score computed from them is mteb's own;
what cannot be told apart into examples, or not by us, has none.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.evaluation.bootstrap import STATISTICS, Examples

_EQUAL = 2e-5  # mteb rounds the scores of retrieval to five digits
_PAIRWISE = 5000  # examples of which all pairs are compared, in 100 MB
_PYTREC = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P", "hit_rate": "success"}
_PAIRS = {  # mteb's name of what pairs are ranked by: its predictions, and their sign
    "similarity": ("similarity_scores", 1),
    "cosine": ("cosine_scores", 1),
    "dot": ("dot_scores", 1),
    "manhattan": ("manhattan_distances", -1),
    "euclidean": ("euclidean_distances", -1),
}


@contextmanager
def noted(task: Any) -> Iterator[list[Examples]]:
    """A list that fills with the examples of an mteb task while mteb scores a model on it."""
    found: list[Examples] = []
    score_subset, hook = task._evaluate_subset, getattr(task, "task_specific_scores", None)
    calculate: Any = getattr(task, "_calculate_scores", None)
    notes: dict[str, Any] = {}

    def evaluate_subset(model: Any, data: Any, **kwargs: Any) -> Any:
        notes.clear()
        # Carries on where the task's own generator stands, so that mteb draws what it would have drawn.
        notes["draws"] = task.rng_state = _Noting(task.rng_state)
        scores = score_subset(model, data, **kwargs)
        part = f"{kwargs.get('hf_split', '')}/{kwargs.get('hf_subset', '')}"
        found.extend(of_subset(task, data, scores, notes, kwargs.get("hf_split", ""), part))
        return scores

    def specific_scores(scores: Any, qrels: Any, results: Any, *args: Any, **kwargs: Any) -> Any:
        notes["by_query"] = scores
        return {} if hook is None else hook(scores, qrels, results, *args, **kwargs)

    def calculate_scores(*args: Any, **kwargs: Any) -> Any:
        # A column of a Dataset is read from its table label by label, each time a metric looks at it: most of the time
        # of a classification whose embeddings are there.
        args, kwargs = tuple(map(_plain_column, args)), {key: _plain_column(value) for key, value in kwargs.items()}
        return calculate(*args, **kwargs)

    task._evaluate_subset = evaluate_subset
    if calculate is not None:
        task._calculate_scores = calculate_scores
    task._save_task_predictions = lambda predictions, *args, **kwargs: notes.update(predictions=predictions)
    if hook is not None:
        task.task_specific_scores = specific_scores
    try:
        yield found
    finally:
        for name in ("_evaluate_subset", "_save_task_predictions", "task_specific_scores", "_calculate_scores"):
            vars(task).pop(name, None)


def _plain_column(values: Any) -> Any:
    import datasets

    return values[:] if isinstance(values, datasets.Column) else values


def of_aggregate(by_task: Mapping[str, Sequence[Examples]], score: float) -> list[Examples]:
    """The examples of a task whose score is the mean of other tasks', each by its name, or none."""
    found = [replace(each, part=f"{name}/{each.part}") for name, examples in by_task.items() for each in examples]
    if not found or len({len(examples) for examples in by_task.values()}) != 1:
        return []
    return found if abs(float(np.mean([each.score for each in found])) - score) <= _EQUAL else []


def of_subset(
    task: Any, data: Any, scores: Mapping[str, Any], notes: Mapping[str, Any], split: str, part: str
) -> list[Examples]:
    """The examples of one split and subset, or none.

    Args:
        data: as mteb hands it to the task's evaluator.
        scores: what mteb made of it.
        notes: "predictions", "by_query" and "draws", where mteb handed them out.
    """
    read = _READERS.get(task.metadata.type)
    score = scores.get(metric) if isinstance(metric := task.metadata.main_score, str) else None
    if read is None or not isinstance(score, float):
        return []
    try:
        found = read(task, data, scores, notes, metric, split, part)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return []  # a task that keeps its data in a way of its own
    if not found or not all(len(examples.ids) for examples in found):
        return []
    ours = float(np.mean([examples.score for examples in found]))
    return found if abs(ours - score) <= _EQUAL else []


class _Noting(random.Random):
    """A generator that goes on from another and keeps what it draws."""

    def __init__(self, before: random.Random) -> None:
        super().__init__()
        self.setstate(before.getstate())
        self.sampled: list[list[Any]] = []
        self.chosen: list[list[Any]] = []

    def sample(self, *args: Any, **kwargs: Any) -> list[Any]:
        self.sampled.append(super().sample(*args, **kwargs))
        return self.sampled[-1]

    def choices(self, *args: Any, **kwargs: Any) -> list[Any]:
        self.chosen.append(super().choices(*args, **kwargs))
        return self.chosen[-1]


def _retrieval(
    task: Any, data: Any, scores: Any, notes: Mapping[str, Any], metric: str, split: str, part: str
) -> list[Examples]:
    by_query: Mapping[str, Mapping[str, float]] = notes["by_query"]
    ids = tuple(sorted(by_query))
    name, _, k = metric.rpartition("_at_")
    if name == "mrr":
        value = [_reciprocal_rank(notes["predictions"][q], data["relevant_docs"][q], int(k)) for q in ids]
    else:
        key = "recall_1" if metric == "accuracy" else f"{_PYTREC[name]}_{k}"
        value = [by_query[query][key] for query in ids]
    return [Examples("mean", ids, {"value": np.asarray(value)}, part)]


def _reciprocal_rank(ranking: Mapping[str, float], relevant: Mapping[str, int], k: int) -> float:
    best = sorted(ranking, key=lambda doc: ranking[doc], reverse=True)[:k]
    return next((1 / rank for rank, doc in enumerate(best, 1) if relevant.get(doc, 0) > 0), 0.0)


def _sts(
    task: Any, data: Any, scores: Any, notes: Mapping[str, Any], metric: str, split: str, part: str
) -> list[Examples]:
    by, _, statistic = metric.rpartition("_")
    column = _PAIRS[by or "similarity"][0]
    gold = np.asarray(data["score"], dtype=float)
    return [Examples(statistic, _rows(gold), {"gold": gold, "predicted": _floats(notes, column)}, part)]


def _pairs(
    task: Any, data: Any, scores: Any, notes: Mapping[str, Any], metric: str, split: str, part: str
) -> list[Examples]:
    by, _, statistic = metric.rpartition("_")
    if statistic != "ap":
        return []
    gold = np.asarray(data[task.label_column_name]).reshape(-1)  # of old tasks one row that holds a list
    rankings = list(_PAIRS.values()) if by == "max" else [_PAIRS[by]]
    predicted = np.stack([sign * _floats(notes, column) for column, sign in rankings], axis=1)
    return [Examples("average_precision", _rows(gold), {"gold": gold, "predicted": predicted}, part)]


def _classification(
    task: Any, data: Any, scores: Any, notes: Mapping[str, Any], metric: str, split: str, part: str
) -> list[Examples]:
    gold = np.asarray(data[split][task.label_column_name])
    predicted = np.asarray(notes["predictions"]).T  # (examples, classifiers)
    if metric == "accuracy":
        return [Examples("mean", _rows(gold), {"value": (predicted == gold[:, None]).mean(axis=1)}, part)]
    if metric in ("ap", "ap_weighted"):  # of two classes, which leaves nothing to weigh
        return [Examples("mean_average_precision", _rows(gold), {"gold": gold, "predicted": predicted}, part)]
    if metric not in STATISTICS:
        return []
    _, codes = np.unique(np.concatenate([gold[:, None], predicted], axis=1), return_inverse=True)
    codes = codes.reshape(len(gold), -1)
    return [Examples(metric, _rows(gold), {"gold": codes[:, 0], "predicted": codes[:, 1:]}, part)]


def _multilabel(
    task: Any, data: Any, scores: Any, notes: Mapping[str, Any], metric: str, split: str, part: str
) -> list[Examples]:
    from sklearn.preprocessing import MultiLabelBinarizer

    gold = MultiLabelBinarizer().fit_transform(data[split][task.label_column_name][:])  # (examples, labels)
    predicted = np.asarray(notes["predictions"]).swapaxes(0, 1)  # (examples, classifiers, labels)
    if metric == "accuracy":
        right = (predicted == gold[:, None]).all(axis=2).mean(axis=1)
        return [Examples("mean", _rows(gold), {"value": right}, part)]
    if metric != "f1":
        return []
    columns = {"gold": gold, "predicted": predicted.reshape(len(gold), -1).astype(int)}
    return [Examples("f1_of_labels", _rows(gold), columns, part)]


def _regression(
    task: Any, data: Any, scores: Any, notes: Mapping[str, Any], metric: str, split: str, part: str
) -> list[Examples]:
    gold = np.asarray(data[split][task.label_column_name], dtype=float)
    statistic = {"kendalltau": "kendall", "r2": "r2"}.get(metric)
    if statistic is None or (statistic == "kendall" and len(gold) > _PAIRWISE):
        return []
    predicted = np.asarray(notes["predictions"], dtype=float)  # (probes, examples)
    if (predicted == predicted[0]).all():  # each probe saw all of the train split
        predicted = predicted[:1]
    return [Examples(statistic, _rows(gold), {"gold": gold, "predicted": predicted.T}, part)]


def _summarization(
    task: Any, data: Any, scores: Any, notes: Mapping[str, Any], metric: str, split: str, part: str
) -> list[Examples]:
    """A correlation for each text, over its summaries; mteb leaves out texts whose summaries are all judged alike."""
    from scipy.stats import pearsonr, spearmanr

    by, _, statistic = metric.rpartition("_")
    ids = tuple(str(i) for i, judged in enumerate(data[task.relevancy_column_name]) if len(set(judged)) > 1)
    pairs = zip(notes["predictions"]["human_scores"], notes["predictions"][_PAIRS[by or "similarity"][0]], strict=True)
    correlation = {"spearman": spearmanr, "pearson": pearsonr}[statistic]
    value = np.asarray([float(correlation(*pair).statistic) for pair in pairs])
    return [Examples("mean", ids, {"value": value}, part)] if len(ids) == len(value) else []


def _clustering(
    task: Any, data: Any, scores: Any, notes: Mapping[str, Any], metric: str, split: str, part: str
) -> list[Examples]:
    if metric not in ("v_measure", "nmi"):  # the same by two names
        return []
    if isinstance(scores.get("v_measures"), list):  # mteb's older tasks: sets that are clustered each by itself
        value = np.asarray(scores["v_measures"], dtype=float)
        return [Examples("mean", _rows(value), {"value": value}, part)]
    draws: _Noting = notes["draws"]
    labels = data[task.label_column_name]
    if draws.sampled:
        labels = [labels[row] for row in draws.sampled[0]]
    labels = [label if isinstance(label, list) else [label] for label in labels]
    found, chosen = [], iter(draws.chosen)
    for level, assignments in enumerate(notes["predictions"].values()):
        named = [row for row, label in enumerate(labels) if len(label) > level and label[level] != -1]
        gold = np.unique([str(labels[row][level]) for row in named], return_inverse=True)[1].reshape(-1)
        cluster = np.full((len(named), len(assignments)), -1)
        count = np.zeros_like(cluster)
        for i, assigned in enumerate(assignments):
            rows = next(chosen)
            cluster[rows, i] = assigned  # equal vectors fall into one cluster, however often they are drawn
            count[:, i] = np.bincount(rows, minlength=len(named))
        columns = {"gold": gold, "cluster": cluster, "count": count}
        found.append(Examples("v_measure", tuple(map(str, named)), columns, f"{part}/{level}" if level else part))
    return found


def _bitext(
    task: Any, data: Any, scores: Any, notes: Mapping[str, Any], metric: str, split: str, part: str
) -> list[Examples]:
    (neighbours,) = notes["predictions"].values()
    gold = [pair[1] for pair in data["gold"]] if "gold" in data else list(range(len(neighbours)))
    guess = [each["corpus_id"] for each in neighbours]
    right = np.asarray(gold) == np.asarray(guess)
    if metric in ("accuracy", "recall"):
        value = right.astype(float)
    elif metric == "f1":  # each sentence is a class of its own: recall is 0 or 1, precision a share of the guesses
        guessed = np.bincount(guess, minlength=max(gold) + 1)[gold]
        value = np.where(right, 2 / (1 + np.maximum(guessed, 1)), 0.0)
    elif metric == "precision":
        value = right / np.maximum(np.bincount(guess, minlength=max(gold) + 1)[gold], 1)
    else:
        return []
    return [Examples("mean", _rows(value), {"value": value}, part)]


_Reader = Callable[[Any, Any, Any, Mapping[str, Any], str, str, str], list[Examples]]
_READERS: Mapping[str, _Reader] = {
    "Retrieval": _retrieval,
    "Reranking": _retrieval,
    "STS": _sts,
    "PairClassification": _pairs,
    "Classification": _classification,
    "MultilabelClassification": _multilabel,
    "Regression": _regression,
    "Summarization": _summarization,
    "Clustering": _clustering,
    "BitextMining": _bitext,
}


def _rows(column: Sequence[Any] | NDArray[Any]) -> tuple[str, ...]:
    return tuple(map(str, range(len(column))))


def _floats(notes: Mapping[str, Any], column: str) -> NDArray[np.float64]:
    return np.asarray(notes["predictions"][column], dtype=float)
