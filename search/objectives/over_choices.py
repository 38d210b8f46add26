"""OverChoices: what objectives have in common that look at the model's own distribution over what it may choose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merging.errors import CuveeError
from merging.sources import ModelRef
from merging.statistics.calibration import draw
from merging.statistics.network import Network, open_network
from search.objective import Candidate, Scores
from search.objectives.choices import LEAST, Candidates, Choices, Classes, Prototypes
from search.objectives.inputs import Input, label_of, labelled, places, unlabelled
from search.objectives.score_tokens import DEFAULT_LENGTH, ScoreTokens
from search.objectives.tasks import CORAL, CORN, Opening, Task, digests

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VALID = "valid"
_ALL = 1 << 62


class OverChoices(ABC):
    """An objective that is a function of log-probabilities, for each task.

    Args:
        name: of the objective, for the score of a task that has none.
        with_answers: labels are read.

    Attributes:
        tasks: by name, once prepared.
    """

    def __init__(self, name: str, tasks: Sequence[Task], opening: Opening, *, with_answers: bool) -> None:
        self.name, self.opening, self._tasks, self._with_answers = name, opening, tuple(tasks), with_answers
        self.tasks: dict[str, Choices] = {}

    def data(self) -> Mapping[str, str]:
        """Of the tasks' files."""
        return digests(self._tasks)

    def prepare(self, model: ModelRef, device: str) -> torch.nn.Module:
        """Opens the model, and reads the inputs of every task.

        Raises:
            CuveeError: a model or data that cannot be read.
        """
        opening, head = self.opening, self.opening.head
        if head in (CORAL, CORN):
            head = "classification"
        elif head == "auto" and any(task.prototypes is not None for task in self._tasks):
            head = "embedding"
        length = opening.max_length or (DEFAULT_LENGTH if any(task.scores for task in self._tasks) else None)
        network = open_network(model, head=head, device=device, dtype=opening.dtype, max_length=length)
        self.tasks = {
            task.name or self.name: choices_of(task, network, opening, with_answers=self._with_answers)
            for task in self._tasks
        }
        for task in self._tasks:
            self.read(task, self.tasks[task.name or self.name])
        return network.module

    def read(self, task: Task, choices: Choices) -> None:  # noqa: B027  (most have nothing to add)
        """Takes note of what a task says besides, now that its choices are known.

        Raises:
            CuveeError: it does not go with the choices.
        """

    @abstractmethod
    def value(self, task: str, log_p: Tensor, items: Sequence[int]) -> Tensor:
        """The task's score of some inputs, with gradient where there is one; higher is better.

        Args:
            log_p: (items, K), as `Choices.log_p` gives them.
        """

    def __call__(self, candidate: Candidate, /) -> Scores:
        found: dict[str, float] = {}
        valid: dict[str, float] = {}
        for name, choices in self.tasks.items():
            log_p = choices.probabilities().log().clamp(min=LEAST)
            found[name] = float(self.value(name, log_p, range(len(choices))))
            if choices.valid is not None:
                valid[VALID if name == self.name else f"{name}.{VALID}"] = choices.valid
        total = sum(found.values()) / len(found)
        return Scores(total, {**found, **valid}, tuple(valid))


class Smooth(OverChoices):
    """One whose value has a gradient by the model's weights; see `search.adamerging`.

    Attributes:
        whole: only all inputs together have a value; else that of some is the same but for chance.
    """

    whole = False

    def sizes(self) -> Mapping[str, int]:
        """How many inputs each task has."""
        return {name: len(choices) for name, choices in self.tasks.items()}

    def smooth(self, task: str, items: Sequence[int]) -> Tensor:
        """A task's value on some of its inputs, 0-dimensional, with its graph."""
        return self.value(task, self.tasks[task].log_p(items), items)


def choices_of(task: Task, network: Network, opening: Opening, *, with_answers: bool) -> Choices:
    """Reads a task's inputs, and makes of them what this model may choose.

    Args:
        with_answers: labels are read too. Without, no label is looked at.

    Raises:
        CuveeError: data that cannot be read; a model that has no choices, or others.
    """
    head = opening.head if opening.head in (CORAL, CORN) else network.head
    ranking = head == "embedding" and task.prototypes is None
    if head == "lm" and not task.scores:
        mend = "write 'scores: [1, 2, 3]' and 'template'"
        raise CuveeError("a language model needs the scores that it may answer", where=task.where, mend=mend)
    if head == "regression":
        mend = "an ordinal head is said by 'head: coral' or 'head: corn'"
        raise CuveeError("the model gives a number, not a choice", where=task.where, mend=mend)
    answers: Sequence[str] = ()
    if with_answers:
        inputs, answers = labelled(task, ranking=ranking)
    else:
        inputs = unlabelled(task, ranking=ranking)
    found = _choices(task, network, head, inputs)
    if with_answers:
        file = str(task.files[0])
        found.answers = (0,) * len(inputs) if ranking else tuple(places(answers, found.names, file))
    return found


def _choices(task: Task, network: Network, head: str, inputs: Sequence[Input]) -> Choices:
    if head == "lm":
        return ScoreTokens(network, inputs, task.scores, task.template, task.where)
    if head != "embedding":
        return Classes(network, inputs, head, task.scores, task.where)
    if task.prototypes is None:
        return Candidates(network, inputs, task.temperature)
    return Prototypes(network, inputs, prototypes_of(task), task.temperature)


def prototypes_of(task: Task) -> Mapping[str, tuple[str, ...]]:
    """Texts by the name of a choice: as the YAML says them, or from a file: a text each line, or a table with labels.

    Raises:
        CuveeError: fewer than two.
    """
    if not isinstance(task.prototypes, Path):
        assert task.prototypes is not None
        return task.prototypes
    found: dict[str, tuple[str, ...]] = {}
    for each in draw([task.prototypes], _ALL).examples:
        name = each.query if each.label is None else label_of(each)
        found[name] = (*found.get(name, ()), each.query)
    if len(found) < 2:
        raise CuveeError("holds fewer than two prototypes", where=str(task.prototypes))
    return found
