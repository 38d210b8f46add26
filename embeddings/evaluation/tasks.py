"""Which tasks to run: mteb's by name, benchmark, language or type, and those of suites, each ready to be made anew.

A task of mteb carries random state that goes on from call to call, so that a second model would be scored on other
samples than the first. A `Target` makes a fresh one for every model.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from embeddings.evaluation import suite
from embeddings.evaluation.limited import LimitedTask
from merging.errors import CuveeError, quoted

SHIPPED = "shipped"
"""The name of the suite that comes with the package."""


@dataclass(frozen=True)
class Target:
    """A task to run.

    Attributes:
        type, metric: as mteb calls them.
        group: what its score is averaged with: the suite's group, or the benchmark it was named by.
        dataset: {"path", "revision"}.
        splits, subsets: what the score is the mean over.
        prompts: of the task, for models that name none themselves.
        fresh: from a seed to an mteb task that no model has been scored on.
    """

    name: str
    type: str
    metric: str
    group: str
    dataset: Mapping[str, str]
    splits: tuple[str, ...]
    subsets: tuple[str, ...]
    fresh: Callable[[int], Any] = field(repr=False, compare=False)
    prompts: Mapping[str, str] = field(default_factory=dict)


def resolve(
    names: Sequence[str] = (),
    *,
    suites: Sequence[Path | None] = (),
    languages: Sequence[str] = (),
    types: Sequence[str] = (),
    split: str = "test",
    limit: int | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Target]:
    """The tasks that are named, each once.

    Args:
        names: of mteb's tasks and benchmarks, and of the suites' tasks; of the suite that comes with the package also
            where it is not among them, if mteb has nothing of that name.
        suites: their folders; None is the suite that comes with the package. All of their tasks, or those that are named.
        languages: as mteb writes them ("eng", "eng-Latn"); keeps those tasks and parts of tasks only. Without names
            and suites: all of mteb's text tasks in them. Does not concern suites.
        types: likewise, of all tasks.
        split: of the suites' tasks; those that have no such split are left out.
        limit: rows of that split, see `LimitedTask`; None: all.
        note: called with a line on what is left out.

    Raises:
        CuveeError: an unknown task, benchmark, language or type; two tasks of one name; none left.
    """
    if types:
        _check_types(types)
    own = [task for folder in suites for task in sorted(suite.load(folder), key=lambda task: task.group)]
    picked = [task for task in own if task.name in names] or list(own)
    rest = [name for name in names if name not in {task.name for task in own}]
    found: list[Target] = []
    if rest:
        theirs, shipped = _look_up(rest, own)
        found += _of_mteb(theirs, languages, types) if theirs else ()
        picked += shipped
    elif not names and (languages or (types and not suites)):
        found += _of_mteb((), languages, types)
    picked = [task for task in picked if not types or task.type in types]
    fit = _with_split(picked, split, bool(found), note)
    found += [_of_suite(task if limit is None else LimitedTask.of(task, split, limit), split) for task in fit]
    targets: dict[str, Target] = {}
    for target in found:
        known = targets.setdefault(target.name, target)
        if (known.dataset, known.splits, known.subsets) != (target.dataset, target.splits, target.subsets):
            raise CuveeError("is the name of two tasks", where=target.name, mend="rename the suite's, or leave one out")
    if not targets:
        raise CuveeError("no task is left", where="cuvee evaluate", mend="name --tasks or a --suite, or filter less")
    return list(targets.values())


def of_task(task: Any, group: str) -> Target:
    """A task of mteb, as its splits and languages are set."""
    about = task.metadata
    return Target(
        name=about.name,
        type=about.type,
        metric=about.main_score,
        group=group,
        dataset={"path": str(about.dataset["path"]), "revision": str(about.dataset["revision"])},
        splits=tuple(task.eval_splits),
        subsets=tuple(task.hf_subsets),
        fresh=lambda seed: _fresh(task, seed),
    )


def _with_split(
    tasks: Sequence[suite.SuiteTask], split: str, others: bool, note: Callable[[str], None] | None
) -> list[suite.SuiteTask]:
    """Those that have the split; the first's error where it would leave none."""
    left = [task for task in tasks if split in task.splits]
    without = [task.name for task in tasks if split not in task.splits]
    if tasks and not left and not others:
        tasks[0].tables(split)  # which says so
    if without and note is not None:
        note(f"left out, for they have no split '{split}': {', '.join(without)}")
    return left


def _of_suite(task: suite.SuiteTask, split: str) -> Target:
    task.tables(split)
    prompts: dict[str, str] = {}
    if isinstance(task.prompt, str):
        prompts = {task.name: task.prompt}
    elif task.prompt:
        prompts = {f"{task.name}-{kind}": text for kind, text in task.prompt.items()}

    def fresh(seed: int) -> Any:
        from embeddings.evaluation.mteb_tasks import mteb_task

        return _fresh(mteb_task(task, split), seed)

    return Target(
        name=task.name,
        type=task.type,
        metric=task.metric,
        group=task.group,
        dataset={"path": f"cuvee/{task.suite}/{task.name}", "revision": task.digest},
        splits=(split,),
        subsets=("default",),
        fresh=fresh,
        prompts=prompts,
    )


def _of_mteb(names: Sequence[str], languages: Sequence[str], types: Sequence[str]) -> Iterator[Target]:
    import mteb

    try:
        if not names:
            about: dict[str, Any] = {"languages": languages or None, "task_types": types or None}
            tasks = mteb.get_tasks(**about, modalities=["text"], exclusive_modality_filter=True)
            yield from (of_task(task, "mteb") for task in tasks)
        for group, task in _named(names):
            if not types or task.metadata.type in types:
                fresh = _fresh(task, task.seed)
                if not languages or _keep_languages(fresh, languages):
                    yield of_task(fresh, group)
    except ValueError as error:
        if "language code" not in str(error):
            raise
        code = str(error).split(":", 1)[1].split(",")[0].strip()
        raise CuveeError(f"'{code}' is no language", mend="write ISO 639-3 as mteb does, 'eng' or 'eng-Latn'") from None


def _look_up(names: Iterable[str], own: Sequence[suite.SuiteTask]) -> tuple[list[str], list[suite.SuiteTask]]:
    """The names that mteb knows, and the shipped suite's tasks of the others.

    Args:
        own: the tasks of the suites that were named, for the nearest names.

    Raises:
        CuveeError: a name that is neither's.
    """
    shipped = {task.name: task for task in suite.load()}
    theirs, ours = [], []
    for name in names:
        if any(_named([name])):
            theirs.append(name)
        elif name in shipped:
            ours.append(shipped[name])
        else:
            raise _unknown(name, [*(task.name for task in own), *shipped])
    return theirs, ours


def _named(names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Group and task of each name that mteb knows; the group of a benchmark's tasks is the benchmark."""
    import mteb

    for name in names:
        with suppress(KeyError):
            yield "mteb", mteb.get_task(name)
            continue
        with suppress(KeyError):
            yield from ((name, task) for task in mteb.get_benchmark(name).tasks)


def _unknown(name: str, of_suites: Iterable[str]) -> CuveeError:
    known = {known.lower(): known for known in (*_names_of_mteb(), *of_suites)}
    near = [known[found] for found in difflib.get_close_matches(name.lower(), known, n=3)]
    mend = f"the nearest are {quoted(near)}" if near else "`mteb available-tasks` lists mteb's"
    what = f"'{name}' is no task or benchmark of mteb, and no task of a suite named here or of the shipped one"
    own = "add --suite FOLDER, or 'suite: FOLDER' in a YAML, for tasks of your own"
    return CuveeError(what, where="--tasks", mend=f"{mend}; {own}")


@cache
def _names_of_mteb() -> tuple[str, ...]:
    import mteb

    tasks = mteb.get_tasks(exclude_superseded=False, exclude_private=False)
    return (*(task.metadata.name for task in tasks), *(benchmark.name for benchmark in mteb.get_benchmarks()))


def _fresh(task: Any, seed: int) -> Any:
    """A new task of the same kind, splits and languages."""
    new = type(task)(seed=seed)
    new.hf_subsets = list(task.hf_subsets)
    new._eval_splits = task._eval_splits
    if new.is_aggregate:  # its class holds its tasks, with a state that goes on from model to model
        new.metadata = new.metadata.model_copy(update={"tasks": [_fresh(part, seed) for part in new.metadata.tasks]})
        new.tasks = new.metadata.tasks
    return new


def _keep_languages(task: Any, languages: Sequence[str]) -> bool:
    """Leaves only the parts in these languages; whether any are left."""
    try:
        task.filter_languages(list(languages))
    except ValueError as error:
        if "No subsets" in str(error):
            return False
        raise
    return True


def _check_types(types: Iterable[str]) -> None:
    from typing import get_args

    from mteb.abstasks.task_metadata import TaskType

    known = [name for name in get_args(TaskType) or () if isinstance(name, str)]
    for name in types:
        if known and name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            mend = f"the nearest are {quoted(near)}" if near else f"known: {quoted(known)}"
            raise CuveeError(f"'{name}' is no type of task", where="--type", mend=mend)
