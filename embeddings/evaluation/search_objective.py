"""The objective `suite` of `cuvee search`: main scores of tasks, as `cuvee evaluate` gives them.

    objective: suite                                   # the shipped suite's tasks that have a validation split
    objective: {suite: ../mine, tasks: [a, b], split: validation, limit: 500}

`tasks` may name tasks and benchmarks of mteb, too, which are scored on their own splits; `limit` is of the suite's tasks:
so many rows of each, drawn once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embeddings.evaluation import suite, tasks
from embeddings.evaluation.suite import SuiteTask
from embeddings.evaluation.suite_settings import refuse_unfit, suite_folder, suite_tasks
from embeddings.evaluation.tasks import Target
from merging.checkpoint import Checkpoint
from merging.errors import CuveeError
from merging.fields import choice, number, texts
from merging.loading import refuse_other_kinds
from merging.node import Node
from merging.setting import refuse_unknown_keys
from merging.sources import ModelRef
from search.objective import Candidate, Scores, objective

if TYPE_CHECKING:
    import torch

    from embeddings.evaluation.repeated import RepeatedEvaluation

NAME, SPLIT = "suite", "validation"


class SuiteObjective:
    """Scores by task of a SentenceTransformer whose weights are rewritten in place."""

    def __init__(self, targets: list[Target], where: str) -> None:
        self.targets, self.where = targets, where
        self._evaluation: RepeatedEvaluation

    def data(self) -> Mapping[str, str]:
        """Of the tasks, as `cuvee evaluate` tells them."""
        return {target.name: str(target.dataset["revision"]) for target in self.targets}

    def task_names(self) -> tuple[str, ...]:
        return tuple(target.name for target in self.targets)

    def check(self, model: ModelRef) -> tuple[str, ...]:
        """As `look`, and the model's folder.

        Raises:
            CuveeError: a file that is wrong, no embedding model, or mteb is missing.
        """
        _refuse_without_mteb(self.where)
        with Checkpoint.open(model) as checkpoint:
            refuse_other_kinds(checkpoint)
        return self.look()

    def look(self) -> tuple[str, ...]:
        """Reads the data of the suite's tasks; mteb's may have to be fetched, which is left to the search itself.

        Returns:
            Lines for the user.

        Raises:
            CuveeError: a file that is wrong, or mteb is missing.
        """
        _refuse_without_mteb(self.where)
        from embeddings.evaluation.scoring import MTEB_SEED, kept

        for_tests = []
        for target in self.targets:
            own: SuiteTask | None = getattr(target.fresh(MTEB_SEED), "suite_task", None)
            if own is not None:
                kept(target)
            if "test" in target.splits or (own and own.splits.get("test") == own.splits[target.splits[0]]):
                for_tests.append(target.name)
        if not for_tests:
            return ()
        told = f"{', '.join(for_tests[:5])}{', …' if len(for_tests) > 5 else ''}"
        return (f"scores on test rows ({told}): they can no longer tell how good the model is that is chosen by them",)

    def prepare(self, model: ModelRef, device: str) -> torch.nn.Module | None:
        """Opens the model, and reads the tasks' data.

        Raises:
            CuveeError: no embedding model, data that are not there, or mteb is missing.
        """
        _refuse_without_mteb(self.where)
        from embeddings.evaluation.repeated import RepeatedEvaluation
        from embeddings.model import open_model

        opened = open_model(model, device=device, name="candidate", packed=False)
        self._evaluation = RepeatedEvaluation(opened, self.targets)
        module: Any = opened.transformer
        return module

    def __call__(self, candidate: Candidate, /) -> Scores:
        return Scores(None, self._evaluation.scores())


@objective(NAME, "tasks of a suite or of mteb, scored as `cuvee evaluate` does")
def _suite(settings: Node, near: Path) -> SuiteObjective:
    refuse_unknown_keys(settings, (NAME, "tasks", "split", "limit"), "the objective 'suite'")
    folder = suite_folder(settings, near)
    split = choice(settings, "split", suite.SPLITS, SPLIT)
    limit = number(settings, "limit", None, low=1, whole=True)
    return SuiteObjective(_targets(settings, folder, split, limit), settings.where)


def _targets(settings: Node, folder: str | None, split: str, limit: int | None) -> list[Target]:
    root = None if folder is None else Path(folder)
    every = suite.load(root)
    own = {task.name for task in every}
    named = texts(settings, "tasks")
    if all(name in own for name, _ in named):
        return tasks.resolve(suite_tasks(settings, folder, split), suites=[root], split=split, limit=limit)
    found: dict[str, Target] = {}
    for name, where in named:
        if name in own:
            refuse_unfit(name, every, split, where)
        else:
            _refuse_without_mteb(where)
        try:
            for target in tasks.resolve([name], suites=[root] if name in own else (), split=split, limit=limit):
                found[target.name] = target
        except CuveeError as error:
            raise CuveeError(error.what, where=where, mend=error.mend) from None
    return list(found.values())


def _refuse_without_mteb(where: str) -> None:
    if importlib.util.find_spec("mteb") is None:
        raise CuveeError("mteb is not installed", where=where, mend="pip install mteb; it needs Python 3.11")
