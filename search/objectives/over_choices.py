"""OverChoices: what objectives have in common that look at the model's own distribution over what it may choose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from merging.checkpoint import Checkpoint
from merging.errors import CuveeError
from merging.sources import ModelRef
from merging.statistics.network import Network, head_of, open_network
from search.objective import Candidate, Scores
from search.objectives.choices import LEAST, Candidates, Choices, Classes, Prototypes
from search.objectives.questions import Question, read_question
from search.objectives.score_tokens import DEFAULT_LENGTH, ScoreTokens
from search.objectives.tasks import CORAL, CORN, Opening, Task, digests

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VALID = "valid"


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

    def task_names(self) -> tuple[str, ...]:
        names = tuple(task.name or self.name for task in self._tasks)
        valid = tuple(f"{task.name}.{VALID}" if task.name else VALID for task in self._tasks if task.scores)
        return (*names, *valid)

    def check(self, model: ModelRef) -> tuple[str, ...]:
        """Reads the inputs of every task, and the model's configuration.

        Raises:
            CuveeError: data that cannot be read, or do not go with what the model may choose.
        """
        from transformers import PretrainedConfig

        with Checkpoint.open(model) as checkpoint:
            own, head = head_of(checkpoint), self._head()
            head = own if head == "auto" else head
            config = PretrainedConfig.from_dict(dict(checkpoint.config))
        if self.opening.head in (CORAL, CORN):
            head = self.opening.head
            if own not in ("classification", "regression"):
                what = f"'head: {head}' is of a sequence classifier, and {model} has the head '{own}'"
                raise CuveeError(what, where=self.opening.where, mend="leave it out")
        for task in self._tasks:
            question = read_question(task, head, config, with_answers=self._with_answers)
            self.read(task, question.names, question.counts)
        told = r"the template has \n as two characters; for a line break write it in double quotes"
        return tuple(f"{task.where}: {told}" for task in self._tasks if r"\n" in task.template)

    def prepare(self, model: ModelRef, device: str) -> torch.nn.Module:
        """Opens the model, and reads the inputs of every task.

        Raises:
            CuveeError: a model or data that cannot be read.
        """
        opening, head = self.opening, self._head()
        length = opening.max_length or (DEFAULT_LENGTH if any(task.scores for task in self._tasks) else None)
        network = open_network(model, head=head, device=device, dtype=opening.dtype, max_length=length)
        self.tasks = {
            task.name or self.name: choices_of(task, network, opening, with_answers=self._with_answers)
            for task in self._tasks
        }
        for task in self._tasks:
            choices = self.tasks[task.name or self.name]
            self.read(task, choices.names, choices.counts)
        return network.module

    def _head(self) -> str:
        """What the model is opened with."""
        if self.opening.head in (CORAL, CORN):
            return "classification"
        prototypes = any(task.prototypes is not None for task in self._tasks)
        return "embedding" if prototypes and self.opening.head == "auto" else self.opening.head

    def read(  # noqa: B027  (most have nothing to add)
        self, task: Task, names: Sequence[str], counts: Sequence[int]
    ) -> None:
        """Takes note of what a task says besides, now that its choices are known.

        Args:
            names, counts: as `Choices` has them.

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
    question = read_question(task, head, network.config, with_answers=with_answers)
    found = _choices(task, network, question)
    found.answers = question.answers
    return found


def _choices(task: Task, network: Network, question: Question) -> Choices:
    if question.head == "lm":
        return ScoreTokens(network, question.inputs, question.names, task.template, task.where, task.tokens)
    if question.head != "embedding":
        return Classes(network, question.inputs, question.head, question.names)
    if question.prototypes is None:
        return Candidates(network, question.inputs, task.temperature)
    return Prototypes(network, question.inputs, question.prototypes, task.temperature)
