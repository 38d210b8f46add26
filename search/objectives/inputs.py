"""Inputs: what a model is asked about, without any answer; and, for objectives that compare, the answers beside them.

`unlabelled` looks at columns of inputs only. Whatever else a row holds is not touched, and what it returns has no place
for an answer: even which of a query's candidates is the right one is forgotten, by sorting them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from merging.columns import ALIASES, keys_of
from merging.errors import CuveeError
from merging.statistics.calibration import Example, draw
from search.objectives.tasks import Task

_IMAGE = ("image", "image_path", "img")
#: Second halves of a pair; not `answer` nor `positive`, which may say more.
_SECOND = ("sentence2", "document", "passage", "doc")


@dataclass(frozen=True)
class Input:
    """What a model reads.

    Attributes:
        texts: a text, or a pair.
        candidates: to choose between, of an embedding model's query; sorted.
        image: that belongs to the first text.
    """

    texts: tuple[str, ...]
    candidates: tuple[str, ...] = ()
    image: Path | None = None

    @property
    def text(self) -> str | tuple[str, ...]:
        return self.texts[0] if len(self.texts) == 1 else self.texts


def unlabelled(task: Task, *, ranking: bool = False) -> tuple[Input, ...]:
    """The task's inputs, drawn by its seed without replacement.

    Args:
        ranking: queries with candidates, which are those that the row has, and where it has fewer than two, some of other
            rows'. Else texts, or pairs of them.

    Raises:
        CuveeError: a file that cannot be read, or has no inputs.
    """
    drawn = _draw(task, readable(task, ranking=ranking), ranking)
    assert all(each.label is None for each in drawn)
    return tuple(
        Input((each.query,), tuple(sorted(each.candidates)), each.image)
        if ranking
        else Input(each.texts[:2], image=each.image)
        for each in drawn
    )


def readable(task: Task, *, ranking: bool) -> Callable[[str], bool]:
    """Which columns of a file hold inputs; labels are never among them."""
    renamed = {own for name, own in (task.columns or {}).items() if name != "label"}
    names = {*ALIASES["text"], *ALIASES["query"], *_IMAGE, *(ALIASES["positive"] if ranking else _SECOND)} | renamed

    def is_input(key: str) -> bool:
        return key in names or (ranking and bool(keys_of("negative", [key])))

    return is_input


def labelled(task: Task, *, ranking: bool = False) -> tuple[tuple[Input, ...], tuple[str, ...]]:
    """The task's inputs and their answers: labels as text; in a `ranking` the answer is the first candidate.

    Raises:
        CuveeError: as `unlabelled`, or a row without an answer.
    """
    drawn = _draw(task, None, ranking)
    if ranking:
        for each in drawn:
            if not each.positives:
                what = f"row {each.row + 1} has no 'positive', so no right candidate"
                raise CuveeError(what, where=str(task.files[0]), mend="add one, or say 'prototypes'")
            if each.positives == len(each.candidates):
                raise _lonely(each, task)
        others = [each.candidates[each.positives :] for each in drawn]
        inputs = tuple(Input((e.query,), (e.candidates[0], *o), e.image) for e, o in zip(drawn, others, strict=True))
        return inputs, ("",) * len(drawn)
    for each in drawn:
        if each.label is None:
            mend = "add a column 'label', or say 'columns: {label: NAME}'"
            what = f"row {each.row + 1} has no label that is a word or a whole number"
            raise CuveeError(what, where=str(task.files[0]), mend=mend)
    return tuple(Input(each.texts[:2], image=each.image) for each in drawn), tuple(map(label_of, drawn))


def label_of(example: Example) -> str:
    """As text, as choices are named: 3 and 3.0 are "3", true is "1"."""
    label = example.label
    return str(int(label)) if isinstance(label, bool) else str(label)


def places(answers: Sequence[str], names: Sequence[str], where: str) -> list[int]:
    """Which of the choices each answer names; a number that is no name is a place, from 0.

    Raises:
        CuveeError: an answer that is no choice.
    """
    known = {name: place for place, name in enumerate(names)}
    plain = {name.strip(): place for name, place in known.items()}
    numbered = not any(name.strip().lstrip("-").isdecimal() for name in names)
    found = []
    for answer in answers:
        place = known.get(answer, plain.get(answer.strip()))
        if place is None and numbered and answer.isdecimal() and int(answer) < len(names):
            place = int(answer)
        if place is None:
            some = ", ".join(f"'{name}'" for name in names[:8]) + (", …" if len(names) > 8 else "")
            raise CuveeError(f"the label '{answer}' is no choice", where=where, mend=f"the choices are {some}")
        found.append(place)
    return found


def _draw(task: Task, only: Callable[[str], bool] | None, ranking: bool) -> Sequence[Example]:
    files, count = list(task.files), task.examples or sys.maxsize
    drawn = draw(
        files,
        count,
        seed=task.seed,
        columns=task.columns,
        candidates=task.candidates,
        complete=ranking,
        readable=only,
    ).examples
    lonely = next((each for each in drawn if ranking and len(each.candidates) < 2), None)
    if lonely is not None:
        raise _lonely(lonely, task)
    return drawn


def _lonely(example: Example, task: Task) -> CuveeError:
    what = f"row {example.row + 1} has fewer than two candidates to choose from"
    return CuveeError(what, where=str(task.files[0]), mend="give more rows, or negatives, or say 'prototypes'")
