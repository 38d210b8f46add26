"""What a YAML says of a suite, `{suite: shipped, tasks: [word], split: validation}`; every mistake with its line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from embeddings.evaluation import suite
from embeddings.evaluation.suite import SuiteTask
from merging.errors import CuveeError, did_you_mean, quoted
from merging.fields import located, looked_for, text, texts
from merging.node import Node


def suite_folder(node: Node, near: Path) -> str | None:
    """The folder that `suite:` names, absolute; None for "shipped", the one that comes with the package.

    Raises:
        CuveeError: no such folder.
    """
    name: str = text(node, "suite", "shipped")
    if name == "shipped":
        return None
    folder = located(name, near, Path.is_dir)
    if folder is None:
        mend = did_you_mean(name, ["shipped"], f"write 'shipped', or a folder; {looked_for(near)}")
        raise CuveeError(f"no such suite: {name}", where=node.value["suite"].where, mend=mend)
    return folder


def suite_tasks(node: Node, folder: str | None, split: str) -> tuple[str, ...]:
    """The names that `tasks:` gives, all of which have the split; without names, of all tasks that have it.

    Raises:
        CuveeError: no such task, a task without the split, or none with it.
    """
    every = suite.load(folder)
    chosen = texts(node, "tasks")
    for name, where in chosen:
        refuse_unfit(name, every, split, where)
    names = tuple(name for name, _ in chosen) or tuple(task.name for task in every if split in task.splits)
    if not names:
        raise CuveeError(f"no task of the suite has a {split} split", where=node.where, mend="choose another split")
    return names


def refuse_unfit(name: str, every: Sequence[SuiteTask], split: str, where: str) -> None:
    """Raises CuveeError where a suite has no task of that name, or it has no such split."""
    able = [task.name for task in every if split in task.splits]
    if name not in able:
        has = f"has no {split} split" if any(task.name == name for task in every) else "is no task of the suite"
        raise CuveeError(f"'{name}' {has}", where=where, mend=did_you_mean(name, able, f"it has {quoted(able)}"))
