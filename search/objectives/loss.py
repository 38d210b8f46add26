"""Loss: how probable the model finds what is right: `objective: {loss: validation.jsonl}`, the negative cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merging.node import Node
from search.objective import objective
from search.objectives.over_choices import Smooth
from search.objectives.tasks import tasks_of

if TYPE_CHECKING:
    from torch import Tensor


class Loss(Smooth):
    """The mean log-probability of the right choice, in nats: of the label, or of a query's positive."""

    def value(self, task: str, log_p: Tensor, items: Sequence[int]) -> Tensor:
        import torch

        answers = self.tasks[task].answers
        assert answers is not None
        right = torch.tensor([answers[item] for item in items], device=log_p.device)
        return log_p.gather(1, right[:, None]).mean()


@objective("loss", "the negative cross-entropy of labels, or of a query's positive among its candidates")
def _loss(settings: Node, near: Path) -> Loss:
    tasks, opening = tasks_of(settings, "loss", near, examples=None, labelled=True)
    return Loss("loss", tasks, opening, with_answers=True)
