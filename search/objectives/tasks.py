"""Tasks: what an objective asks a model about, as its YAML says it; every mistake with its line and its mend.

    pim: inputs.jsonl                        # a file, or a list of files
    entropy: {data: {a: a.jsonl, b: {data: [b1.csv, b2.csv], columns: {text: body}}}, examples: 32}
    loss: {data: validation.jsonl, scores: {low: 0, high: 5}, template: "{text}\\nScore:"}

What is said beside `data` holds for every task, and a task of its own may say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merging.errors import CuveeError, did_you_mean, quoted
from merging.fields import choice, given, located, looked_for, mapping, number, text, text_of, texts
from merging.lineage import file_digest
from merging.node import Node
from merging.setting import refuse_unknown_keys
from merging.statistics.calibration import COLUMNS, is_text
from merging.statistics.network import DTYPES
from merging.tables import KNOWN

TEXT = "{text}"
#: What counts of the log-probabilities of a score's tokens.
MEAN, SUM = "mean", "sum"
#: Of a model with a head of classes: what its outputs are.
CORAL, CORN = "coral", "corn"
HEADS = ("auto", "embedding", "classification", "lm", CORAL, CORN)
_OF_MODEL = ("head", "dtype", "max_length")
_OF_TASK = ("data", "examples", "seed", "columns")
_OF_CHOICES = ("scores", "template", "tokens", "prototypes", "candidates", "temperature")
_MANY = 1000  # choices


@dataclass(frozen=True)
class Opening:
    """How the model is opened.

    Attributes:
        head: one of `HEADS`; "auto": as its folder says.
        max_length: tokens of an input at most.
    """

    head: str = "auto"
    dtype: str = "float32"
    max_length: int | None = None
    where: str = ""


@dataclass(frozen=True)
class Task:
    """Inputs, and what the model is to choose between.

    Attributes:
        name: "" of the only one, where it has none.
        files: tables of texts; see `merging.statistics.calibration`.
        examples: how many rows are drawn of them; None: all.
        columns: what the files call a column, by our name.
        scores: the names of the choices, in order: of a language model what it may answer.
        template: of a language model's prompt; `{text}` is where the text goes.
        tokens: "mean" or "sum", of the log-probabilities of a score's tokens.
        prototypes: texts by the name of a choice, or the file that has them; None: the candidates of each query.
        candidates: of a query at most.
        temperature: of an embedding model's softmax over cosines.
        node: all that was said, for what an objective wants besides.
    """

    name: str
    files: tuple[Path, ...]
    node: Node
    examples: int | None = None
    seed: int = 0
    columns: Mapping[str, str] | None = None
    scores: tuple[str, ...] = ()
    template: str = TEXT
    tokens: str = MEAN
    prototypes: Mapping[str, tuple[str, ...]] | Path | None = None
    candidates: int = 8
    temperature: float = 0.05

    @property
    def where(self) -> str:
        return self.node.where


def tasks_of(
    settings: Node,
    name: str,
    near: Path,
    *,
    examples: int | None,
    labelled: bool,
    more: Sequence[str] = (),
    choices: bool = True,
) -> tuple[tuple[Task, ...], Opening]:
    """The tasks of an objective.

    Args:
        settings: with the objective's name as a key.
        near: where files are looked for, or else in the working directory.
        examples: by default.
        labelled: whether it reads labels.
        more: keys that the objective knows besides.
        choices: whether it asks what the model would choose.

    Raises:
        CuveeError: something impossible, or a file that is not there.
    """
    of = f"the objective '{name}'"
    refuse_unknown_keys(settings, (name,), of)
    said = settings.value[name]
    if not isinstance(said.value, dict):
        said = Node({} if said.value is None else {"data": said}, said.where)
    of_task = (*_OF_TASK, *(_OF_CHOICES if choices else ()), *more)
    of_model = _OF_MODEL if choices else ("dtype", "max_length")
    refuse_unknown_keys(said, (*of_model, *of_task), of)
    data = given(said, "data")
    if data is None:
        raise CuveeError(f"{of} needs 'data'", where=said.where, mend=f"write '{name}: {{data: texts.jsonl}}'")
    shared = {key: item for key, item in said.value.items() if key not in ("data", *_OF_MODEL)}
    opening = Opening(
        head=choice(said, "head", HEADS, "auto"),
        dtype=choice(said, "dtype", DTYPES, "float32"),
        max_length=number(said, "max_length", None, low=1, whole=True),
        where=said.where,
    )
    if not isinstance(data.value, dict):
        return (_task("", Node({**shared, "data": data}, said.where), near, examples, labelled),), opening
    if not data.value:
        raise CuveeError("'data' names no task", where=data.where, mend="write 'data: {task: texts.jsonl}'")
    tasks = []
    for key, item in data.value.items():
        own = item.value if isinstance(item.value, dict) else {"data": item}
        refuse_unknown_keys(Node(own, item.where), of_task, f"the task '{key}'")
        tasks.append(_task(key, Node({**shared, **own}, item.where), near, examples, labelled))
    return tuple(tasks), opening


def digests(tasks: Sequence[Task]) -> dict[str, str]:
    """Of the files of all tasks."""
    files = [file for task in tasks for file in task.files]
    files += [task.prototypes for task in tasks if isinstance(task.prototypes, Path)]
    return {str(file.absolute()): file_digest(file) for file in files}


def _task(name: str, said: Node, near: Path, examples: int | None, labelled: bool) -> Task:
    files = tuple(_file(file, where, near) for file, where in texts(said, "data"))
    if not files:
        raise CuveeError(f"the task '{name}' needs 'data'", where=said.where)
    return Task(
        name=name,
        files=files,
        node=said,
        examples=number(said, "examples", examples, low=1, whole=True),
        seed=number(said, "seed", 0, low=0, high=2**32 - 1, whole=True),
        columns=_columns(said, labelled),
        scores=_scores(said),
        template=_template(said),
        tokens=choice(said, "tokens", (MEAN, SUM), MEAN),
        prototypes=_prototypes(said, near),
        candidates=number(said, "candidates", Task.candidates, low=2, whole=True),
        temperature=number(said, "temperature", Task.temperature, above=0),
    )


def _file(name: str, where: str, near: Path) -> Path:
    found = located(name, near, Path.is_file)
    if found is None:
        raise CuveeError(f"no such file '{name}'", where=where, mend=looked_for(near))
    if not is_text(Path(found)):
        raise CuveeError(f"'{name}' is of no known format", where=where, mend=f"known: '.txt', {KNOWN}")
    return Path(found)


def _columns(said: Node, labelled: bool) -> dict[str, str]:
    item = mapping(said, "columns", "{text: body}")
    if item is None:
        return {}
    known = COLUMNS if labelled else tuple(column for column in COLUMNS if column != "label")
    for name, own in item.value.items():
        if name == "label" and not labelled:
            raise CuveeError("'label' is no column of this objective: it looks at no label", where=own.where)
        if name not in known:
            mend = did_you_mean(name, known, f"choose of {quoted(known)}")
            raise CuveeError(f"'{name}' is no column", where=own.where, mend=mend)
    return {name: text_of(own, name) for name, own in item.value.items()}


def _scores(said: Node) -> tuple[str, ...]:
    item = given(said, "scores")
    if item is None:
        return ()
    if isinstance(item.value, dict):
        refuse_unknown_keys(item, ("low", "high"), "'scores'")
        low, high = (number(item, key, None, whole=True) for key in ("low", "high"))
        if low is None or high is None:
            raise CuveeError(
                "'scores' need 'low' and 'high'", where=item.where, mend="write 'scores: {low: 0, high: 5}'"
            )
        names = [str(score) for score in range(low, min(high, low + _MANY) + 1)]
    elif isinstance(item.value, list):
        names = [text_of(each, "scores") for each in item.value]
    else:
        raise CuveeError(f"'scores' must be a list, not {item}", where=item.where, mend="write 'scores: [1, 2, 3]'")
    if len(names) < 2 or len(set(names)) < len(names) or len(names) > _MANY:
        raise CuveeError(f"'scores' must be two or more, all different, {_MANY} at most", where=item.where)
    return tuple(names)


def _template(said: Node) -> str:
    found: str = text(said, "template", TEXT)
    if found.count(TEXT) != 1:
        mend = f'write "{TEXT}\\nScore:"'
        raise CuveeError(
            f"'template' must say once where the text goes: {TEXT}", where=_at(said, "template"), mend=mend
        )
    return found


def _prototypes(said: Node, near: Path) -> Mapping[str, tuple[str, ...]] | Path | None:
    item = given(said, "prototypes")
    if item is None:
        return None
    if isinstance(item.value, dict):
        found = {name: tuple(each for each, _ in texts(item, name)) for name in item.value}
    elif isinstance(item.value, list):
        found = {name: (name,) for name, _ in texts(said, "prototypes")}
    else:
        return _file(text_of(item, "prototypes"), item.where, near)
    if len(found) < 2 or not all(found.values()):
        raise CuveeError("'prototypes' must be two or more, each with a text", where=item.where)
    return found


def _at(said: Node, key: str) -> str:
    item = given(said, key)
    return said.where if item is None else item.where
