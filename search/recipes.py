"""Recipes: a point of a search as a recipe for `cuvee merge`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merging import engine, lineage, recipe_statistics
from merging.errors import CuveeError
from merging.live_recipe import filters_of
from merging.recipe import Recipe
from merging.sources import ModelRef, StatsRef
from merging.views import View, fingerprint
from search import engines
from search.config import SearchConfig
from search.space import GROUPINGS, Space, make_space

#: The best model, in the search's folder.
MODEL = "model"


def space_of(config: SearchConfig) -> Space:
    """What varies; opens the base where parameters differ by layer or module.

    Raises:
        CuveeError: the space is impossible, or a model cannot be opened.
    """
    most = engines.get(config.engine).dimensions
    return make_space(config.method, len(config.models), config.vary, tensor_names(config), most)


def tensor_names(config: SearchConfig) -> list[str]:
    """Of the base, or of the first model where there is none; () where no parameter differs by layer or module."""
    if not any(vary.per in GROUPINGS for vary in config.vary.values()):
        return []
    view = View.open(look_of(config), None)
    try:
        return list(view.tensors)
    finally:
        view.checkpoint.close()


def look_of(config: SearchConfig) -> ModelRef:
    """What all candidates look like: the base, or the first model where there is none."""
    return config.base_model or config.models[0].model


def content_of(config: SearchConfig) -> dict[str, list[str]]:
    """What tells models and statistics from others that take their place: with other ones the same points score otherwise.

    Raises:
        CuveeError: a model or statistics that cannot be opened.
    """
    base = [] if config.base_model is None else [config.base_model]
    models, statistics = [], []
    for ref in (*base, *(source.model for source in config.models)):
        view = View.open(ref, None)
        with view.checkpoint:
            models.append(fingerprint(view))
    for stats in (source.stats for source in config.models if source.stats is not None):
        file = Path(stats.options["data"]) if stats.path is None else Path(stats.path) / lineage.FILE
        if file.is_file():  # else the method reads none, or `check` has refused it
            statistics.append(lineage.file_digest(file))
    return {"model content": models, **({"statistics": statistics} if statistics else {})}


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
    return [{"filter": part, "value": by_group[group]} for part, group in _filters(per, tuple(names))]


@functools.lru_cache(maxsize=4)
def _filters(per: str, names: tuple[str, ...]) -> list[tuple[str, str]]:
    return filters_of({name: GROUPINGS[per](name) for name in names})


def with_statistics(
    config: SearchConfig, out: Path, device: str, note: Callable[[str], None] = lambda line: None
) -> SearchConfig:
    """The configuration with folders of statistics where it names data; what is missing is computed, once for all trials.

    Where they depend on the coefficients the data stay: every trial makes its own.

    Args:
        out: where the best model will go: its merge finds them too.

    Raises:
        CuveeError: data or models of which none can be made.
    """
    if all(source.stats is None or source.stats.path is not None for source in config.models):
        return config
    if retaken(config):
        return config
    condition = config.method.statistics_if
    if condition is not None:
        vary = config.vary.get(condition[0])
        if vary is None or condition[1] not in (vary.value, *vary.choices):
            return config  # no trial reads them
    recipe = recipe_of(config, {**_fixed(config), **dict([condition] if condition else [])}, where=config.where)
    views = [View.open(source.model, None) for source in config.models]
    try:
        recipe_statistics.attach(
            recipe, config.method, views, out, relative_to=None, seed=config.seed, device=device, note=note
        )
    finally:
        for view in views:
            view.checkpoint.close()
    models = [
        replace(source, stats=StatsRef(str(view.statistics.path))) if view.statistics else source
        for source, view in zip(config.models, views, strict=True)
    ]
    return replace(config, models=tuple(models))


def retaken(config: SearchConfig) -> bool:
    """Whether the method takes statistics of models that the coefficients scale, so that each trial has its own."""
    at = config.method.statistics_at
    if at is None:
        return False
    vary = config.vary.get(at[1])
    said = (config.method.parameters[at[1]].default,) if vary is None else (vary.value, *vary.choices)
    return at[2] in said


def _fixed(config: SearchConfig) -> dict[str, Any]:
    return {name: vary.value for name, vary in config.vary.items() if vary.value is not None}


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
        entry = re.match(r"models\[(\d+)\]", key)
        key = key.partition("[")[0].partition(".")[0]
        key = {"merge_method": "method", "parameters": "vary"}.get(key, key)
        if key == "method" and key not in config.lines:  # the usual one of the engine
            key = next(each for each in ("engine", "models") if each in config.lines)
        mend = error.mend.replace("recipe", "configuration")
        for place, source in enumerate(config.models):
            mend = mend.replace(f"{config.where}.models[{place}]", source.where)
        where = config.at(key) if entry is None else config.models[int(entry[1])].where
        raise CuveeError(error.what, where=where, mend=mend) from None
