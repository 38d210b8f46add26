"""The user's own function: `objective: {function: "module:function"}`.

It is called with the folder of the merged model (a `pathlib.Path`), or with `takes: model` with the model itself: a
SentenceTransformer, or a model of transformers and its tokenizer. It returns a number, or numbers by task; higher is better.
The module is looked for beside the search's YAML first, then wherever Python looks.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.errors import CuveeError
from merging.fields import choice, text
from merging.lineage import file_digest
from merging.node import Node
from merging.setting import refuse_unknown_keys
from merging.sources import ModelRef
from search.objective import Candidate, Scores, objective

if TYPE_CHECKING:
    import torch

FOLDER, MODEL = "folder", "model"
_OURS = ("cuvee", "embeddings", "merging", "search")
#: By module, the file that it came from and its digest.
_IMPORTED: dict[str, tuple[Path, str]] = {}


class Function:
    """An objective by the name of a function."""

    def __init__(self, name: str, near: Path, where: str, takes: str = FOLDER) -> None:
        self.name, self.near, self.where, self.takes = name, near, where, takes
        self._function: Callable[..., Any]
        self._model: tuple[Any, ...] = ()

    def data(self) -> Mapping[str, str]:
        """Of the module's own file; what it imports is not looked at."""
        file = self._file()
        return {} if file is None else {self.name.partition(":")[0]: file_digest(file)}

    def check(self, model: ModelRef) -> tuple[str, ...]:
        """Imports the module.

        Raises:
            CuveeError: it cannot be imported, or has no such function.
        """
        self._found()
        return ()

    def prepare(self, model: ModelRef, device: str) -> torch.nn.Module | None:
        """Imports the module, and opens the model if the function takes one.

        Raises:
            CuveeError: it cannot be imported, or has no such function; a model that cannot be opened.
        """
        self._function = self._found()
        if self.takes == FOLDER:
            return None
        from merging.statistics.network import open_network

        network = open_network(model, device=device)
        self._model = (network.module,) if network.head == "embedding" else (network.module, network.reader)
        return network.module

    def __call__(self, candidate: Candidate, /) -> Scores:
        return scores_of(self._function(*(self._model or (candidate.folder,))), self.name)

    def _found(self) -> Callable[..., Any]:
        module, _, name = self.name.partition(":")
        near, file = str(self.near.absolute()), self._file()
        sys.path[:] = [near, *(place for place in sys.path if place != near)]
        now = None if file is None else (file, file_digest(file))
        if now and module in sys.modules and _IMPORTED.get(module, now) != now:
            del sys.modules[module]  # another search's, or an earlier text of it: what is scored is what `data` says
        try:
            found = importlib.import_module(module)
        except (Exception, SystemExit) as error:  # a script ends Python where it has read its arguments
            what = f"'{module}' cannot be imported: {type(error).__name__}: {error}"
            raise CuveeError(what, where=self.where, mend=f"put {module}.py beside the YAML, or install it") from error
        if now:
            _IMPORTED[module] = now
        for part in name.split("."):
            found = getattr(found, part, None)  # type: ignore[assignment]
        if not callable(found):
            raise CuveeError(f"'{module}' has no function '{name}'", where=self.where)
        return found

    def _file(self) -> Path | None:
        """The module's, found without running anything of it; None where it has none, or is not there."""
        places: Sequence[str] | None = [str(self.near.absolute()), *sys.path]
        parts, spec = self.name.partition(":")[0].split("."), None
        for count in range(1, len(parts) + 1):
            spec = None if places is None else PathFinder.find_spec(".".join(parts[:count]), places)
            places = None if spec is None else spec.submodule_search_locations
        file = None if spec is None or spec.origin is None else Path(spec.origin)
        return file if file is not None and file.is_file() else None


def scores_of(result: Any, name: str) -> Scores:
    """Scores of what a function returns: a number, or numbers by task.

    Raises:
        CuveeError: something else.
    """
    if isinstance(result, Scores):
        return result
    try:
        if isinstance(result, Mapping):
            return Scores(None, {str(task): float(score) for task, score in result.items()})
        return Scores(float(result))
    except (TypeError, ValueError):
        kind = type(result).__name__
        what = f"returned {kind}, neither a number nor numbers by task"
        raise CuveeError(what, where=name, mend="return a score, higher is better") from None


@objective("function", "a function of yours, `module:function`, of the merged model or its folder")
def _function(settings: Node, near: Path) -> Function:
    refuse_unknown_keys(settings, ("function", "takes"), "the objective 'function'")
    name = text(settings, "function", "")
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        raise CuveeError(f"'{name}' names no function", where=settings.where, mend="write 'function: module:function'")
    if module.partition(".")[0] in (*_OURS, *sys.stdlib_module_names):  # in its place all that needs it would break
        what = f"'{module}' is the name of a module of Python's or of ours"
        raise CuveeError(what, where=settings.where, mend="give your module another name")
    return Function(name, near, settings.where, choice(settings, "takes", (FOLDER, MODEL), FOLDER))
