"""Recipes: a point of a search as a recipe for `cuvee merge`, and the merge of it for an objective to score."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merging import engine
from merging.errors import CuveeError
from merging.live_recipe import filters_of
from merging.recipe import Recipe
from search.config import SearchConfig
from search.objective import Candidate, Objective, Scores
from search.space import GROUPINGS, Space, make_space


def space_of(config: SearchConfig) -> Space:
    """What varies; opens the base where parameters differ by layer or module.

    Raises:
        CuveeError: the space is impossible, or a model cannot be opened.
    """
    return make_space(config.method, len(config.models), config.vary, tensor_names(config))


def tensor_names(config: SearchConfig) -> list[str]:
    """Of the base, or of the first model where there is none; () where no parameter differs by layer or module."""
    if not any(vary.per in GROUPINGS for vary in config.vary.values()):
        return []
    from merging.views import View

    view = View.open(config.base_model or config.models[0].model, None)
    try:
        return list(view.tensors)
    finally:
        view.checkpoint.close()


def recipe_of(
    config: SearchConfig, coefficients: Mapping[str, Any], names: Sequence[str] = (), where: str = "best.yml"
) -> Recipe:
    """The recipe of a point: models by absolute paths, so that it holds wherever it lies.

    Args:
        coefficients: see `Space.coefficients`.
        names: tensors of the base, where coefficients differ by group.
    """
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in config.models]
    for name, value in coefficients.items():
        if isinstance(value, Mapping):
            per = config.vary[name].per
            if any(isinstance(each, list) for each in value.values()):
                for place, parameters in enumerate(own):
                    parameters[name] = _conditions({g: each[place] for g, each in value.items()}, per, names)
            else:
                shared[name] = _conditions(value, per, names)
        elif isinstance(value, list):
            for parameters, each in zip(own, value, strict=True):
                parameters[name] = each
        else:
            shared[name] = value
    models = [
        {**source.plain(), **({"parameters": parameters} if parameters else {})}
        for source, parameters in zip(config.models, own, strict=True)
    ]
    base = None if config.base_model is None else config.base_model.plain()
    return Recipe(config.method.name, models, base, shared or None, config.dtype, where=where)


def _conditions(by_group: Mapping[str, Any], per: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Filters that give each tensor its group's value."""
    filters = filters_of({name: GROUPINGS[per](name) for name in names})
    return [{"filter": part, "value": by_group[group]} for part, group in filters]


class MergedFolders:
    """Evaluates coefficients: merges into a folder of its own, scores it, and removes it."""

    def __init__(
        self,
        config: SearchConfig,
        scratch: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config, self.scratch, self.options = config, scratch, {"device": device, "threads": threads, "note": note}
        self.names = tensor_names(config)
        self.objective: Objective = config.make_objective()
        self.objective.prepare()

    def __call__(self, coefficients: Mapping[str, Any]) -> Scores:
        recipe = recipe_of(self.config, coefficients, self.names, where="trial.yml")
        folder = self.scratch / "model"
        try:
            engine.merge(recipe, folder, seed=self.config.seed, force=True, **self.options)  # type: ignore[arg-type]
            self.options = {**self.options, "note": lambda line: None}  # what is ignored is said once
            return self.objective(Candidate(folder, coefficients))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def check(config: SearchConfig, space: Space, out: Path, note: Callable[[str], None]) -> None:
    """Plans the merge of the middle of the space, so that what no trial could do is told before the first.

    Args:
        out: where a model would go.

    Raises:
        CuveeError: the first mistake; one of the recipe's at the configuration's line.
    """
    middle = {d.name: d.default for d in space.dimensions}
    recipe = recipe_of(config, space.coefficients(middle), tensor_names(config), where=config.where)
    try:
        engine.merge(recipe, out, dry_run=True, force=True, note=note)
    except CuveeError as error:
        key = error.where.removeprefix(f"{config.where}.")
        if key == error.where:
            raise
        key = key.partition("[")[0].partition(".")[0]
        key = {"merge_method": "method", "parameters": "vary"}.get(key, key)
        mend = error.mend.replace("recipe", "configuration")
        raise CuveeError(error.what, where=config.at(key), mend=mend) from None
