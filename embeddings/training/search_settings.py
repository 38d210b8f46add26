"""SearchSettings: what `weights: search` in a training configuration says, and the search that follows from it.

    weights: search                                     # on the tasks of `evaluate`
    weights: {search: {trials: 30, objective: {suite: shipped, tasks: [word]}}}

All that `cuvee search` reads may stand there but what the run knows itself: models, method, seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from merging.errors import CuveeError
from merging.fields import choice, given, mapping
from merging.node import Node
from merging.setting import refuse_unknown_keys

if TYPE_CHECKING:
    from merging.sources import ModelRef
    from search.config import SearchConfig
    from search.engines import Engine

SIZE, EQUAL, SEARCH = "size", "equal", "search"
#: By default.
TRIALS = 20
_SPLIT = "validation"
_KEYS = ("objective", "vary", "engine", "trials", "start", "until", "recommend")


@dataclass(frozen=True)
class SearchSettings:
    """A search of merge weights.

    Attributes:
        said: as in the YAML of `cuvee search`, with an objective always, and trials unless the engine has its own.
        near: the folder near which files are looked for.
        lines: by key, where the configuration says it.
    """

    said: Mapping[str, Any]
    near: str
    where: str = field(default="", compare=False)
    lines: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def text(
        self,
        method: str,
        parameters: Mapping[str, Any],
        models: Sequence[str],
        shares: Sequence[float],
        base: str | None,
        seed: int,
    ) -> str:
        """The YAML for `cuvee search`.

        Args:
            parameters: of the method, that stay as they are.
            shares: weights that sum to 1, to begin with.
        """
        said = dict(self.said)
        vary = {**parameters, **(said.pop("vary", None) or {})}
        content = {
            **({"base_model": base} if base else {}),
            **{"models": list(models), "method": method, "dtype": "float32", "seed": seed},
            **({"vary": vary} if vary else {}),
            **({"start": _start(method, vary, shares)} if "start" not in said and _engine(said).starts else {}),
            **said,
        }
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

    def check(
        self,
        method: str,
        parameters: Mapping[str, Any],
        models: Sequence[str],
        shares: Sequence[float],
        base: str | None,
    ) -> None:
        """Raises CuveeError, at the training configuration's line, for a search that cannot be."""
        from search import engines, rivals
        from search.design import design
        from search.space import GROUPINGS, make_space

        text = self.text(method, parameters, models, shares, base, 0)
        config = self.config(text)
        grouped = any(vary.per in GROUPINGS for vary in config.vary.values())
        names = ["a.tensor"] if grouped else []  # the true ones are not known yet
        try:
            space = make_space(config.method, len(models), config.vary, names, engines.get(config.engine).dimensions)
            if rival := rivals.get(config):
                rival.begin(config, space)
            elif not grouped:
                design(space, config.start, 0)
        except CuveeError as error:
            raise self._here(error, text) from None

    def look(self, method: str, parameters: Mapping[str, Any], model: ModelRef, note: Callable[[str], None]) -> None:
        """Reads what it will score on, so that mistakes, and what is hardly meant, are told before the training.

        Args:
            model: that training starts from. What is trained of one that is no embedding model yet, nobody can ask anything:
                then only what does not depend on it is looked at.

        Raises:
            CuveeError: data that cannot be read, or that such models cannot be scored on; at the training configuration's line.
        """
        from embeddings.evaluation.search_objective import SuiteObjective
        from merging.checkpoint import Checkpoint
        from merging.statistics.network import head_of

        text = self.text(method, parameters, ("one", "other"), (0.5, 0.5), "base", 0)
        objective = self.config(text).make_objective()
        with Checkpoint.open(model) as checkpoint:
            embeds = head_of(checkpoint) == "embedding"
        try:
            if isinstance(objective, SuiteObjective):
                lines: Sequence[str] = objective.look()
            else:
                lines = objective.check(model) if embeds else ()
        except CuveeError as error:
            raise self._here(error, text) if "search.yml" in error.where else error from None
        for line in lines:
            note(f"the search of weights {line}")

    def config(self, text: str) -> SearchConfig:
        """What `text` made, read.

        Raises:
            CuveeError: it is impossible; at the training configuration's line.
        """
        import embeddings.evaluation.search_objective  # noqa: F401  (registers itself)
        from search import config as search_config
        from search import engines

        try:
            config = search_config.parse(text, str(Path(self.near) / "search.yml"))
            engines.refuse_unfit(config.engine, len(config.goal.front), config.at("engine"))
        except CuveeError as error:
            raise self._here(error, text) from None
        return config

    def _here(self, error: CuveeError, text: str) -> CuveeError:
        where = self.lines.get(_key_at(text, error.where), self.where)
        return CuveeError(error.what, where=where, mend=error.mend)


def weights(
    root: Node, near: Path, validation: Callable[[], Mapping[str, Any] | None]
) -> tuple[str, SearchSettings | None]:
    """How members are weighed: "size", "equal", or by a search.

    Args:
        validation: gives the objective where none is said; None: there is no such data.

    Raises:
        CuveeError: something else, or a search without an objective.
    """
    key = "merge_weights" if given(root, "weights") is None else "weights"
    item = given(root, key)
    if key == "weights" and given(root, "merge_weights") is not None:
        where = root.value["merge_weights"].where
        raise CuveeError("'weights' and 'merge_weights' are the same", where=where, mend="keep 'weights'")
    if item is None or not isinstance(item.value, dict):
        chosen: str = choice(root, key, (SIZE, EQUAL, SEARCH), SIZE)
        if item is None or chosen != SEARCH:
            return chosen, None
        said: dict[str, Node] = {}
    else:
        refuse_unknown_keys(item, (SEARCH,), f"'{key}'")
        own = mapping(item, SEARCH, "{trials: 30}")
        said = own.value if own is not None else {}
        if own is not None:
            refuse_unknown_keys(own, _KEYS, "the search of weights")
    plain = {name: node.plain() for name, node in said.items() if node.value is not None}
    if "objective" not in plain:
        usual = validation()
        if usual is None:
            mend = "add 'evaluate: {suite: …}' or 'weights: {search: {objective: …}}'"
            raise CuveeError("a search of weights needs data to score on", where=item.where, mend=mend)
        if usual["split"] != _SPLIT:
            what = f"a search of weights would choose by the {usual['split']} rows that 'evaluate' names"
            mend = f"evaluate on '{_SPLIT}', or say what it is to score on: 'weights: {{search: {{objective: {{suite: …}}}}}}'"
            raise CuveeError(what, where=item.where, mend=mend)
        plain["objective"] = dict(usual)
    lines = {name: node.where for name, node in said.items()}
    if _engine(plain).proposes:  # those that go their own way have numbers of their own
        plain = {"trials": TRIALS, **plain}
    return SEARCH, SearchSettings(plain, str(near.absolute()), item.where, lines)


def _engine(said: Mapping[str, Any]) -> Engine:
    """That which is said, if there is one of that name, else the usual one."""
    from search import engines

    name = said.get("engine")
    name = next(iter(name), None) if isinstance(name, Mapping) else name
    return engines.ENGINES.get(str(name)) or engines.get("gp")


def _start(method: str, vary: Mapping[str, Any], shares: Sequence[float]) -> list[Any]:
    """The weights by size, then as ever; where the weights are not one number a model, as ever alone."""
    from merging import methods

    entry = methods.known().get(method)
    takes = entry is not None and "weight" in entry.parameters and entry.parameters["weight"].per_model
    return [*([{"weight": list(shares)}] if takes and "weight" not in vary else []), "uniform", "sobol"]


def _key_at(text: str, where: str) -> str:
    """The key of a mapping whose value covers a line, of which `where` ends in the number."""
    found = re.search(r":(\d+)\b", where)
    lines = text.splitlines()[: int(found[1]) if found else 0]
    keys = [line.partition(":")[0] for line in lines if line[:1].isalpha()]
    return keys[-1] if keys else ""
