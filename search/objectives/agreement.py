"""Agreement: how well the model's most probable choice agrees with the label.

    objective: {score: {data: validation.jsonl, metric: qwk}}      # or accuracy, macro_f1

Quadratic weighted kappa takes the choices for equally spaced ranks, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from merging.fields import choice
from merging.node import Node
from search.objective import objective
from search.objectives.over_choices import OverChoices
from search.objectives.tasks import Opening, Task, tasks_of

if TYPE_CHECKING:
    from torch import Tensor

Ints = NDArray[np.int64]


def quadratic_kappa(given: Ints, found: Ints, count: int) -> float:
    """Cohen's kappa with quadratic weights; 1 where both are the same everywhere.

    Args:
        given, found: (inputs,) ranks from 0 to `count` - 1.
    """
    table = _table(given, found, count)
    ranks = np.arange(count)
    weights = (ranks[:, None] - ranks) ** 2
    chance = np.outer(table.sum(1), table.sum(0)) / len(given)
    by_chance = (weights * chance).sum()
    return 1.0 if by_chance == 0 else float(1 - (weights * table).sum() / by_chance)


def accuracy(given: Ints, found: Ints, count: int) -> float:
    """The share that agrees."""
    return float((given == found).mean())


def macro_f1(given: Ints, found: Ints, count: int) -> float:
    """The mean F1 of the choices that appear among either."""
    table = _table(given, found, count)
    both = table.sum(0) + table.sum(1)
    return float((2 * table.diagonal()[both > 0] / both[both > 0]).mean())


METRICS: Mapping[str, Callable[[Ints, Ints, int], float]] = {
    "qwk": quadratic_kappa,
    "accuracy": accuracy,
    "macro_f1": macro_f1,
}


class Agreement(OverChoices):
    """A metric of the most probable choices against the labels. It has no gradient."""

    def __init__(self, tasks: Sequence[Task], opening: Opening, metrics: Sequence[str]) -> None:
        super().__init__("score", tasks, opening, with_answers=True)
        self._metrics = {task.name or self.name: metric for task, metric in zip(tasks, metrics, strict=True)}

    def value(self, task: str, log_p: Tensor, items: Sequence[int]) -> Tensor:
        import torch

        answers = self.tasks[task].answers
        assert answers is not None
        given = np.array([answers[item] for item in items])
        found = log_p.argmax(1).cpu().numpy()
        return torch.tensor(METRICS[self._metrics[task]](given, found, log_p.shape[1]))


@objective("score", "agreement with labels: quadratic weighted kappa, accuracy or macro F1")
def _score(settings: Node, near: Path) -> Agreement:
    tasks, opening = tasks_of(settings, "score", near, examples=None, labelled=True, more=("metric",))
    return Agreement(tasks, opening, [choice(task.node, "metric", METRICS, "accuracy") for task in tasks])


def _table(given: Ints, found: Ints, count: int) -> NDArray[np.float64]:
    """(count, count): how often a rank was given and another found."""
    return np.bincount(given * count + found, minlength=count * count).reshape(count, count).astype(np.float64)
