"""PIM, prior-encoded information maximisation: sure of each input, and of all together as the sources' scores would have it.

    objective: {pim: {data: essays.jsonl, scores: {low: 1, high: 6}, template: "{text}\\nScore:", prior: [a-prior, b-prior]}}

J = -(1/N) sum_n H(p_n) - KL(prior || mean of p_n), of N inputs without labels.
Source: arXiv 2505.18548, section 3, and the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merging.errors import CuveeError
from merging.node import Node
from merging.statistics.score_prior import open_score_prior
from search.objective import objective
from search.objectives.over_choices import Smooth
from search.objectives.prior import Prior, prior_of
from search.objectives.tasks import Opening, Task, tasks_of

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-8
_EXAMPLES = 64


class Pim(Smooth):
    """J of each task, in nats; at most 0."""

    whole = True

    def __init__(self, tasks: Sequence[Task], opening: Opening, priors: Sequence[Prior]) -> None:
        super().__init__("pim", tasks, opening, with_answers=False)
        self._said = {task.name: prior for task, prior in zip(tasks, priors, strict=True)}
        self._priors: dict[str, Tensor] = {}

    def data(self) -> Mapping[str, str]:
        """Of the tasks' files, and the sources' priors themselves."""
        folders = (folder for prior in self._said.values() for folder in prior.folders)
        return {**super().data(), **{str(each.absolute()): str(open_score_prior(each)) for each in folders}}

    def read(self, task: Task, names: Sequence[str], counts: Sequence[int]) -> None:
        import torch

        if len(set(counts)) > 1:
            few, many = min(counts), max(counts)
            what = f"queries have {few} to {many} candidates, and a prior is of one number of choices"
            raise CuveeError(what, where=task.where, mend=f"say 'candidates: {few}'")
        prior = self._said[task.name].over(names, len(names) or counts[0])
        self._priors[task.name or self.name] = torch.from_numpy(prior)

    def value(self, task: str, log_p: Tensor, items: Sequence[int]) -> Tensor:
        return information(log_p.exp(), self._priors[task].to(log_p))


def information(p: Tensor, prior: Tensor) -> Tensor:
    """J of distributions p, (inputs, K), and a prior, (K,)."""
    entropy = -(p * (p + EPSILON).log()).sum(1).mean()
    expected, mean = prior + EPSILON, p.mean(0) + EPSILON
    return -entropy - (expected * (expected / mean).log()).sum()


@objective(
    "pim", "prior-encoded information maximisation, without labels: sure of each input, all together like a prior"
)
def _pim(settings: Node, near: Path) -> Pim:
    tasks, opening = tasks_of(settings, "pim", near, examples=_EXAMPLES, labelled=False, more=("prior",))
    return Pim(tasks, opening, [prior_of(task.node, near) for task in tasks])
