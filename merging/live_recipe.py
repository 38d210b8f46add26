"""Coefficients of a live merge as a recipe: one value for each model and each group of tensors becomes settings and filters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merging.errors import RecipeError, did_you_mean, quoted
from merging.methods import REQUIRED, Method, Parameter
from merging.recipe import Recipe
from merging.sources import ModelRef

_WHERE = "coefficients"


class Coefficients:
    """From parameters by name to a recipe.

    Args:
        method, base, models: of every recipe.
        stats: of each model, what a recipe says of them; None where there are none.
        fixed: parameters that stay the same, as `recipe` takes them.
    """

    def __init__(
        self,
        method: Method,
        base: ModelRef | None,
        models: Sequence[ModelRef],
        stats: Sequence[str | Mapping[str, Any]] | None,
        fixed: Mapping[str, Any],
    ) -> None:
        self._method, self._base, self._models, self._stats, self._fixed = method, base, models, stats, dict(fixed)
        self._filters: list[tuple[str, str]] = []  # a part of a tensor's name, and the group that it tells
        self._groups: tuple[str, ...] = ("",)
        self._grouped = False

    def divide(self, names: Sequence[str], group_of: Callable[[str], str] | None) -> tuple[str, ...]:
        """Learns the groups of the tensors that are merged; their names, in order of appearance."""
        if group_of is not None:
            groups = {name: group_of(name) for name in names}
            self._groups, self._grouped = tuple(dict.fromkeys(groups.values())), True
            self._filters = filters_of(groups)
        return self._groups

    def recipe(self, given: Mapping[str, Any]) -> Recipe:
        """The recipe with these parameters, and the fixed ones where these say nothing.

        Raises:
            RecipeError: no such parameter, a list of another length, a group that is missing or unknown.
        """
        shared: dict[str, Any] = {}
        own: list[dict[str, Any]] = [{} for _ in self._models]
        for name, value in {**self._fixed, **given}.items():
            parameter = self._method.parameters.get(name)
            if parameter is None:
                mend = did_you_mean(name, self._method.parameters, f"it takes {quoted(self._method.parameters)}")
                raise RecipeError(f"'{name}' is no parameter of '{self._method.name}'", where=_WHERE, mend=mend)
            by_group = self._by_group(name, value) if isinstance(value, Mapping) else None
            if not parameter.per_model:
                shared[name] = self._setting(by_group, value)
                continue
            for index, settings in enumerate(own):
                one = None if by_group is None else {g: self._of(index, name, v) for g, v in by_group.items()}
                settings[name] = self._setting(one, None if one else self._of(index, name, value))
        entries = [
            {"model": model, "parameters": settings or None, **({"stats": self._stats[i]} if self._stats else {})}
            for i, (model, settings) in enumerate(zip(self._models, own, strict=True))
        ]
        return Recipe(self._method.name, entries, self._base, shared or None, where=_WHERE)

    def trial(self) -> Recipe:
        """The fixed parameters and any value for what else must be given: enough to plan with. Statistics are used if
        there are any."""
        fixed = {name: _any_value(value) for name, value in self._fixed.items()}
        required = [p for p in self._method.parameters.values() if p.default is REQUIRED and p.name not in fixed]
        given = {**fixed, **{p.name: _example(p) for p in required}}
        if self._stats and self._method.statistics_if:
            given |= dict([self._method.statistics_if])
        return self.recipe(given)

    def _by_group(self, name: str, value: Mapping[str, Any]) -> dict[str, Any]:
        missing = [group for group in self._groups if group not in value]
        unknown = [group for group in value if group not in self._groups]
        if unknown and self._grouped:
            mend = did_you_mean(unknown[0], self._groups, f"they are {quoted(self._groups)}")
            raise RecipeError(f"'{unknown[0]}' is no group", where=f"{_WHERE}.{name}", mend=mend)
        if missing:
            mend = "give one for every group" if self._grouped else "give one value, or make the merge with 'groups'"
            raise RecipeError(f"there is no value for the group '{missing[0]}'", where=f"{_WHERE}.{name}", mend=mend)
        return {group: value[group] for group in self._groups}

    def _of(self, index: int, name: str, value: Any) -> Any:
        """One model's part of a value."""
        value = _plain(value)
        if not isinstance(value, list):
            return value
        if len(value) != len(self._models):
            raise RecipeError(f"{len(value)} values for {len(self._models)} models", where=f"{_WHERE}.{name}")
        return value[index]

    def _setting(self, by_group: Mapping[str, Any] | None, value: Any) -> Any:
        if by_group is None:
            return _plain(value)
        values = {group: _plain(each) for group, each in by_group.items()}
        if len(values) == 1 or not self._filters:
            return next(iter(values.values()))
        return [{"filter": part, "value": values[group]} for part, group in self._filters]


def filters_of(groups: Mapping[str, str]) -> list[tuple[str, str]]:
    """Parts of names, each with its group, of which the first that a name holds tells the name's group.

    Args:
        groups: by name.
    """
    names: dict[str, list[str]] = {}
    for name, group in groups.items():
        names.setdefault(group, []).append(name)
    short, alone = [], []
    for group, own in names.items():
        part = next((p for p in (f"{group}.", f".{group}.", group) if _tells(p, group, groups)), None)
        if part is None:
            alone += own
        else:
            short.append((part, group))
    # A name may be part of another: the longer ones first.
    return short + [(name, groups[name]) for name in sorted(alone, key=len, reverse=True)]


def _tells(part: str, group: str, groups: Mapping[str, str]) -> bool:
    return bool(part) and all((part in name) == (own == group) for name, own in groups.items())


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists and numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _any_value(value: Any) -> Any:
    """One of a mapping's values: before the tensors' names are known no group is."""
    return next(iter(value.values())) if isinstance(value, Mapping) and value else value


def _example(parameter: Parameter) -> Any:
    """A value that the parameter may have."""
    if parameter.type is bool:
        return True
    if parameter.choices:
        return parameter.choices[0]
    low = parameter.low if parameter.low is not None else min(0.0, parameter.high or 0.0)
    high = parameter.high if parameter.high is not None else low + 2
    return parameter.type((low + high) / 2)
