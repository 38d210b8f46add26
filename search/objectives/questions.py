"""Questions: a task as its files have it, read before any model is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.errors import CuveeError
from merging.statistics.calibration import draw
from search.objectives.inputs import Input, label_of, labelled, places, unlabelled
from search.objectives.tasks import CORAL, CORN, Task

_ALL = 1 << 62


@dataclass(frozen=True)
class Question:
    """Inputs, and what there is to choose between.

    Attributes:
        head: "classification", "coral", "corn", "lm" or "embedding".
        names: of the K choices, in order; () where every input has its own.
        counts: how many each input has, where it has its own.
        answers: (inputs,) the place of the right choice; None where no answer was read.
        prototypes: texts by the name of a choice, of an embedding model that has them.
    """

    head: str
    inputs: tuple[Input, ...]
    names: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    answers: tuple[int, ...] | None = None
    prototypes: Mapping[str, Sequence[str]] | None = None


def read_question(task: Task, head: str, config: Any, *, with_answers: bool) -> Question:
    """Reads a task's inputs, and says what a model may choose.

    Args:
        head: of the model.
        config: transformers' configuration of a classifier.
        with_answers: labels are read too. Without, no label is looked at.

    Raises:
        CuveeError: data that cannot be read; a model that has no choices, or others.
    """
    if head == "lm" and not task.scores:
        mend = "write 'scores: [1, 2, 3]' and 'template'"
        raise CuveeError("a language model needs the scores that it may answer", where=task.where, mend=mend)
    if head == "regression":
        mend = "an ordinal head is said by 'head: coral' or 'head: corn'"
        raise CuveeError("the model gives a number, not a choice", where=task.where, mend=mend)
    ranking = head == "embedding" and task.prototypes is None
    prototypes = prototypes_of(task) if head == "embedding" and not ranking else None
    names = _names(task, head, config, prototypes)
    if not with_answers:
        inputs = unlabelled(task, ranking=ranking)
        return Question(head, inputs, names, _counts(inputs, ranking), None, prototypes)
    inputs, labels = labelled(task, ranking=ranking)
    answers = (0,) * len(inputs) if ranking else tuple(places(labels, names, str(task.files[0])))
    return Question(head, inputs, names, _counts(inputs, ranking), answers, prototypes)


def classes_of(config: Any, head: str, names: Sequence[str], where: str) -> tuple[str, ...]:
    """The names of a classifier's choices.

    Args:
        head: "classification", "coral" or "corn".
        names: () for the model's own.

    Raises:
        CuveeError: not as many names as choices; a model that gives several labels at once, or a number.
    """
    several = getattr(config, "problem_type", None) == "multi_label_classification"
    if several and head not in (CORAL, CORN):
        mend = "an ordinal head is said by 'head: coral' or 'head: corn'"
        raise CuveeError("the model gives several labels at once, not one of them", where=where, mend=mend)
    outputs = int(config.num_labels) + (head in (CORAL, CORN))
    own = {int(place): str(name) for place, name in (getattr(config, "id2label", None) or {}).items()}
    if head in (CORAL, CORN):
        own = {place: str(place) for place in range(outputs)}
    if names and len(names) != outputs:
        raise CuveeError(f"{len(names)} scores, and the model has {outputs} choices", where=where)
    if outputs < 2:
        raise CuveeError("the model gives a number, not a choice", where=where, mend="see 'head'")
    return tuple(names or (own[place] for place in range(outputs)))


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


def _names(task: Task, head: str, config: Any, prototypes: Mapping[str, Any] | None) -> tuple[str, ...]:
    if head == "lm":
        return task.scores
    if head != "embedding":
        return classes_of(config, head, task.scores, task.where)
    return tuple(prototypes or ())


def _counts(inputs: Sequence[Input], ranking: bool) -> tuple[int, ...]:
    return tuple(len(each.candidates) for each in inputs) if ranking else ()
