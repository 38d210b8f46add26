"""Entropy: how sure the model is of what it chooses, on inputs without labels: `objective: {entropy: inputs.jsonl}`.

Source: AdaMerging, arXiv 2310.02575, which minimises it; here its negative is maximised.
"""

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

_EXAMPLES = 64


class Entropy(Smooth):
    """The negative mean entropy of the model's distributions over its choices, in nats."""

    def value(self, task: str, log_p: Tensor, items: Sequence[int]) -> Tensor:
        return (log_p.exp() * log_p).sum(1).mean()


@objective("entropy", "how sure the model is of its choices, without labels (AdaMerging's)")
def _entropy(settings: Node, near: Path) -> Entropy:
    tasks, opening = tasks_of(settings, "entropy", near, examples=_EXAMPLES, labelled=False)
    return Entropy("entropy", tasks, opening, with_answers=False)
