"""DataSettings: one data set to train on, as an entry of `data:` names it.

data:
  - suite: shipped                 # a suite's task: its train split; `task` one, a list, or absent for all that have one
    task: word
  - file: pairs.jsonl.gz           # JSONL, CSV, TSV or Parquet; a list of files is one data set
    name: faq                      # default: the file's stem
    type: Retrieval                # as in suites
    columns: {query: question}     # what the file calls a column
    scale: [0, 5]                  # lowest and highest score there may be, of STS and Regression
    prompt: {query: "Query: ", document: ""}   # or one text for both; or `instruction: …`
    weight: 0.5                    # of its rows: 0.5 = half of them an epoch, 2 = each twice
    limit: 10000                   # rows at most, of a seeded shuffle
    batch_size: 64                 # instead of the run's
    loss: {name: infonce, temperature: 0.05}   # instead of the type's default
    negatives: 7                   # of a row's own at most; so many are drawn for Classification and Clustering
    mine: {negatives: 5, relative_margin: 0.05}   # hard negatives, found by the run's base model
  - hub: sentence-transformers/all-nli
    subset: triplet
    split: train
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embeddings.evaluation import suite
from embeddings.evaluation.suite_settings import suite_folder
from embeddings.training.mining_settings import MiningSettings, mining_settings
from merging.errors import CuveeError, did_you_mean, quoted
from merging.fields import (
    choice,
    flag,
    given,
    located,
    looked_for,
    mapping,
    named,
    number,
    number_of,
    parameters,
    text,
    texts,
)
from merging.node import Node
from merging.setting import refuse_unknown_keys
from merging.tables import FORMATS

SIDES = ("query", "document")
#: Types whose two sides are texts of one kind: an instruction stands before both.
SYMMETRIC = ("STS", "PairClassification", "Classification", "Clustering", "Regression", "BitextMining")
#: Types whose rows are two texts and a score; of `Regression`, once partners are drawn.
GRADED = ("STS", "PairClassification", "Regression")
#: Types whose scores may be on any scale.
SCORED = ("STS", "Regression")
#: Types whose rows are single texts, from which training rows are drawn.
SINGLE = ("Classification", "Clustering", "Regression")
#: Columns by type that `columns` may rename.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "Retrieval": ("query", "positive", "negative", "teacher"),
    "Reranking": ("query", "positive", "negative", "teacher"),
    "BitextMining": ("sentence1", "sentence2", "negative"),
    "STS": ("sentence1", "sentence2", "score"),
    "PairClassification": ("sentence1", "sentence2", "label"),
    "Classification": ("text", "label", "query", "positive", "negative"),
    "Clustering": ("text", "label", "query", "positive", "negative"),
    "Regression": ("text", "score", "sentence1", "sentence2"),
}
INSTRUCTION = "Instruct: {}\nQuery: "

_COMMON = ("name", "prompt", "instruction", "weight", "limit", "batch_size", "loss", "negatives", "mine", "scale")
_FILE = ("file", "type", "columns")
_HUB = ("hub", "subset", "split", "revision", "type", "columns")
_SUITE = ("suite", "task")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class LossSettings:
    """A loss as written, for one data set or as the run's default.

    Attributes:
        name: of the registry's entry; None for the default of the data's type.
        in_batch: whether other rows' documents are negatives too; None: as the type has it.
        parameters: all else, for the registry's entry to check.
    """

    name: str | None = None
    in_batch: bool | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class DataSettings:
    """One data set.

    Attributes:
        name: unique in a run; a file's name can be made of it.
        type: a key of `embeddings.evaluation.suite.KINDS`.
        suite, task: a suite's folder (None: the one that ships) and the task, or None for other sources.
        files: absolute paths.
        hub, subset, split, revision: a data set of the hub, or a folder that `datasets.load_dataset` reads.
        columns: what the source calls a column, by our name.
        prompt: by side, what stands before each text; None: what the model itself says.
        weight: how much of the rows an epoch takes; 2: each twice.
        limit: rows at most; None for all.
        batch_size, loss: None: as the run has it.
        negatives: a row's own at most; None: all, and 7 where they are drawn.
        scale: lowest and highest score that there may be; None: [0, 1], or else what the scores themselves span.
        where: "config.yml:7".
        column_lines: likewise of each of `columns`.
    """

    name: str
    type: str = "Retrieval"
    suite: str | None = None
    task: str | None = None
    files: tuple[str, ...] = ()
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: Mapping[str, str] | None = None
    weight: float = 1.0
    limit: int | None = None
    batch_size: int | None = None
    loss: LossSettings | None = None
    negatives: int | None = None
    mine: MiningSettings | None = None
    scale: tuple[float, float] | None = None
    where: str = field(default="", compare=False)
    column_lines: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def prompt_of(self, side: str) -> str | None:
        """What stands before the texts of "query" or "document"; None: the model's own."""
        return None if self.prompt is None else self.prompt.get(side, "")


def data_list(node: Node, near: Path) -> tuple[DataSettings, ...]:
    """The entries of a `data:` list; one that names a whole suite becomes several.

    Args:
        near: the folder in which relative paths are looked for first; then it is the working directory.

    Raises:
        CuveeError: at the line of the first mistake.
    """
    if not isinstance(node.value, list) or not node.value:
        mend = "write '- file: pairs.jsonl', '- suite: shipped' or '- hub: NAME'"
        raise CuveeError(f"'data' must be a list of data sets, not {node}", where=node.where, mend=mend)
    found = [settings for entry in node.value for settings in _entry(entry, near)]
    refuse_twins(found)
    return tuple(found)


def data_file(file: Path) -> DataSettings:
    """A table alone, as pairs of a query and its positive."""
    return DataSettings(_default_name(_stem(file)), files=(os.path.abspath(file),), where=str(file))


def refuse_twins(found: Sequence[DataSettings]) -> None:
    """Raises CuveeError if two data sets have one name."""
    first: dict[str, DataSettings] = {}
    for settings in found:
        twin = first.setdefault(settings.name.lower(), settings)  # files on some disks know no case
        if twin is not settings:
            mend = f"the first is at {twin.where}; give one of them another 'name'"
            raise CuveeError(f"two data sets are named '{settings.name}'", where=settings.where, mend=mend)


def loss_settings(node: Node | None) -> LossSettings | None:
    """`infonce`, or `{name: infonce, temperature: 0.05}`.

    Raises:
        CuveeError: neither.
    """
    if node is None:
        return None
    name, rest = named(node, "loss")
    in_batch = flag(node, "in_batch", None) if isinstance(node.value, dict) else None
    rest = {key: item for key, item in rest.items() if key != "in_batch"}
    return LossSettings(name, in_batch, parameters(rest, "the loss"), node.where)


def _entry(node: Node, near: Path) -> list[DataSettings]:
    if isinstance(node.value, str):
        node = Node({"file": node}, node.where)
    kinds = ("suite", "file", "hub")
    if not isinstance(node.value, dict):
        raise CuveeError(f"a data set must be a mapping, not {node}", where=node.where, mend="write '- file: NAME'")
    sources = [kind for kind in kinds if kind in node.value]
    if len(sources) != 1:
        what = f"{quoted(sources)} exclude each other" if sources else "a data set has no source"
        unknown = [key for key in node.value if key not in (*_COMMON, *_FILE, *_HUB, *_SUITE)]
        mend = did_you_mean(unknown[0], kinds, "") if unknown and not sources else ""
        raise CuveeError(what, where=node.where, mend=mend or f"name one of {quoted(kinds)}")
    source = sources[0]
    keys = {"suite": _SUITE, "file": _FILE, "hub": _HUB}[source]
    refuse_unknown_keys(node, (*keys, *_COMMON), f"a data set of a {source}" if source != "hub" else "a data set")
    readers: Mapping[str, Callable[[Node, Path], list[DataSettings]]]
    readers = {"suite": _of_suite, "file": _of_files, "hub": _of_hub}
    return readers[source](node, near)


def _of_files(node: Node, near: Path) -> list[DataSettings]:
    files = tuple(_file(name, where, near) for name, where in texts(node, "file"))
    if not files:
        raise CuveeError("'file' names no file", where=node.value["file"].where)
    type_ = choice(node, "type", suite.KINDS, "Retrieval")
    name = _name(node, _stem(Path(files[0])))
    return [DataSettings(name, type_, files=files, **_columns(node, type_), **_common(node, type_))]


def _of_hub(node: Node, near: Path) -> list[DataSettings]:
    hub = text(node, "hub", None)
    if hub is None:
        raise CuveeError("'hub' names no data set", where=node.value["hub"].where)
    local = located(hub, near, Path.is_dir)
    if local is None and hub.startswith((".", "/", "~")):
        raise CuveeError(f"no such folder: {hub}", where=node.value["hub"].where, mend=looked_for(near))
    hub = local or hub
    subset, type_ = text(node, "subset", None), choice(node, "type", suite.KINDS, "Retrieval")
    default = hub.rstrip("/").rpartition("/")[2] + (f"-{subset}" if subset else "")
    return [
        DataSettings(
            _name(node, default),
            type_,
            hub=hub,
            subset=subset,
            split=text(node, "split", "train"),
            revision=text(node, "revision", None),
            **_columns(node, type_),
            **_common(node, type_),
        )
    ]


def _of_suite(node: Node, near: Path) -> list[DataSettings]:
    folder = suite_folder(node, near)
    tasks = {task.name: task for task in suite.load(folder)}
    trained = [name for name, task in tasks.items() if "train" in task.splits]
    wanted = texts(node, "task") or tuple((name, node.value["suite"].where) for name in trained)
    if not wanted:
        raise CuveeError("no task of the suite has a train split", where=node.value["suite"].where)
    if len(wanted) > 1 and given(node, "name"):
        raise CuveeError("one name for several tasks", where=node.value["name"].where, mend="remove 'name'")
    found = []
    for name, where in wanted:
        if name not in trained:
            what = f"the task '{name}' has no train split" if name in tasks else f"the suite has no task '{name}'"
            raise CuveeError(what, where=where, mend=did_you_mean(name, trained, f"it has {quoted(trained)}"))
        task = tasks[name]
        common = _common(node, task.type)
        if common["prompt"] is None and task.prompt is not None:
            both = dict.fromkeys(SIDES, task.prompt) if isinstance(task.prompt, str) else task.prompt
            common["prompt"] = {side: both.get(side, "") for side in SIDES}
        found.append(DataSettings(_name(node, name), task.type, suite=folder, task=name, **(common | {"where": where})))
    return found


def _common(node: Node, type_: str) -> dict[str, Any]:
    return {
        "prompt": _prompt(node, type_),
        "weight": number(node, "weight", 1.0, above=0),
        "limit": number(node, "limit", None, low=1, whole=True),
        "batch_size": number(node, "batch_size", None, low=1, whole=True),
        "loss": loss_settings(given(node, "loss")),
        "negatives": number(node, "negatives", None, low=0, whole=True),
        "mine": mining_settings(node, type_),
        "scale": _scale(node, type_),
        "where": node.where,
    }


def _prompt(node: Node, type_: str) -> dict[str, str] | None:
    prompt, instruction = given(node, "prompt"), text(node, "instruction", None)
    if instruction is not None:
        if prompt is not None:
            raise CuveeError("'prompt' and 'instruction' exclude each other", where=prompt.where, mend="keep one")
        query = INSTRUCTION.format(instruction)
        return {"query": query, "document": query if type_ in SYMMETRIC else ""}
    if prompt is None:
        return None
    if isinstance(prompt.value, str):
        return dict.fromkeys(SIDES, prompt.value)
    if not isinstance(prompt.value, dict):
        mend = "write {query: …, document: …}, or one text for both"
        raise CuveeError(f"'prompt' must be text or a mapping, not {prompt}", where=prompt.where, mend=mend)
    refuse_unknown_keys(prompt, SIDES, "'prompt'")
    for side, item in prompt.value.items():
        if not isinstance(item.value, str | None):
            raise CuveeError(f"the prompt of '{side}' must be text, not {item}", where=item.where, mend="quote it")
    return {side: prompt.value[side].value or "" if side in prompt.value else "" for side in SIDES}


def _scale(node: Node, type_: str) -> tuple[float, float] | None:
    scale = given(node, "scale")
    if scale is None:
        return None
    if type_ not in SCORED:
        raise CuveeError(f"rows of {type_} have no scores on a scale", where=scale.where, mend="remove 'scale'")
    if not isinstance(scale.value, list) or len(scale.value) != 2:
        mend = "write 'scale: [0, 5]'"
        raise CuveeError(f"'scale' must be the lowest and the highest score, not {scale}", where=scale.where, mend=mend)
    low, high = (number_of(item, "scale") for item in scale.value)
    if low >= high:
        raise CuveeError(f"'scale' goes from {low:g} to {high:g}", where=scale.where, mend="write the lowest first")
    return low, high


def _columns(node: Node, type_: str) -> dict[str, Any]:
    columns = mapping(node, "columns", "{query: question}")
    if columns is None:
        return {}
    refuse_unknown_keys(columns, COLUMNS[type_], f"the columns of {type_}")
    renamed = {name: text(columns, name, None) for name in columns.value if given(columns, name)}
    return {"columns": renamed, "column_lines": {name: columns.value[name].where for name in renamed}}


def _file(name: str, where: str, near: Path) -> str:
    file = located(name, near, Path.is_file)
    if file is None:
        raise CuveeError(f"no such file: {name}", where=where, mend=looked_for(near))
    plain = name.lower().removesuffix(".gz")
    if not plain.endswith(FORMATS) or (plain.endswith(".parquet") and plain != name.lower()):
        mend = f"known: {quoted(FORMATS)}, the first three also with .gz"
        raise CuveeError(f"{name} is of no known format", where=where, mend=mend)
    return file


def _name(node: Node, default: str) -> str:
    name = text(node, "name", None)
    if name is None:
        return _default_name(default)
    if not _NAME.fullmatch(name):
        mend = "use letters, digits, '.', '_' and '-'"
        raise CuveeError(f"'{name}' is no name of a data set", where=node.value["name"].where, mend=mend)
    return str(name)


def _default_name(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-") or "data"


def _stem(file: Path) -> str:
    return Path(file.stem).stem if file.suffix.lower() == ".gz" else file.stem
