"""Setting: one parameter as a recipe writes it, and what it says about one tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from merging.errors import RecipeError, did_you_mean, quoted
from merging.node import Node

if TYPE_CHECKING:
    from merging.methods.registry import Parameter

Scalar: TypeAlias = bool | int | float | str

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Condition:
    """A value for the tensors whose name contains `filter`; None: for every tensor.

    Attributes:
        value: a scalar, or a gradient: a tuple of scalars spread evenly over the layers.
    """

    filter: str | None
    value: Scalar | tuple[Scalar, ...]
    where: str = field(default="", compare=False)

    def matches(self, tensor_name: str) -> bool:
        return self.filter is None or self.filter in tensor_name

    def at(self, t: float) -> Scalar:
        """The value at position t in [0, 1] of its stack of layers.

        Numbers are interpolated linearly over the len - 1 intervals; of truth values and texts the one at
        int(t · (len - 1)) is taken.
        """
        if not isinstance(self.value, tuple):
            return self.value
        assert 0 <= t <= 1
        scaled = t * (len(self.value) - 1)
        left = int(scaled)
        if any(isinstance(end, bool | str) for end in self.value):
            return self.value[left]
        low, high = self.value[left], self.value[min(left + 1, len(self.value) - 1)]
        share = scaled - left
        return (1 - share) * low + share * high  # type: ignore[operator]


@dataclass(frozen=True)
class Setting:
    """One parameter as written: a scalar, a gradient, or conditions of which the first that matches holds.

    Attributes:
        where: "recipe.yml:12".
    """

    name: str
    conditions: tuple[Condition, ...]
    where: str = field(default="", compare=False)

    @classmethod
    def of(cls, name: str, node: Node) -> Setting:
        """Reads `0.5`, `[0, 0.5, 1]`, `{filter: mlp, value: 0.5}`, or a list of such conditions.

        Raises:
            RecipeError: nothing, an empty list, a mixed one, an unknown key, a number that is not finite.
        """
        if isinstance(node.value, Setting):
            return node.value
        entries = node.value if isinstance(node.value, list) else [node]
        if any(isinstance(entry.value, dict) for entry in entries):
            return cls(name, tuple(_condition(name, entry) for entry in entries), node.where)
        return cls(name, (Condition(None, _value(name, node), node.where),), node.where)

    @property
    def constant(self) -> bool:
        """Whether it says the same about every tensor."""
        first = self.conditions[0]
        return first.filter is None and not isinstance(first.value, tuple)

    def at(self, tensor_name: str, t: float) -> Scalar | None:
        """The value for a tensor at position t in [0, 1] of its stack; None where no condition matches."""
        for condition in self.conditions:
            if condition.matches(tensor_name):
                return condition.at(t)
        return None

    def read_as(self, parameter: Parameter) -> Setting:
        """The same setting with every value, also of gradients and conditions, in the parameter's type.

        Raises:
            RecipeError: a value of the wrong type, out of range, or none of the choices.
        """

        def read(condition: Condition) -> Condition:
            value, where = condition.value, condition.where
            if isinstance(value, tuple):
                return Condition(condition.filter, tuple(_read(end, parameter, where) for end in value), where)
            return Condition(condition.filter, _read(value, parameter, where), where)

        return Setting(self.name, tuple(read(condition) for condition in self.conditions), self.where)

    def plain(self) -> Any:
        """What `of` reads, as Python values."""
        values = [list(c.value) if isinstance(c.value, tuple) else c.value for c in self.conditions]
        if len(self.conditions) == 1 and self.conditions[0].filter is None:
            return values[0]
        return [
            {"value": value} if condition.filter is None else {"filter": condition.filter, "value": value}
            for condition, value in zip(self.conditions, values, strict=True)
        ]


def settings(node: Node) -> dict[str, Setting]:
    """A `parameters:` mapping; empty where nothing is written.

    Raises:
        RecipeError: not a mapping, or a setting that cannot be read.
    """
    if node.value is None:
        return {}
    if not isinstance(node.value, dict):
        raise RecipeError(
            f"'parameters' must be a mapping, not {node}", where=node.where, mend="write 'parameters: {weight: 1.0}'"
        )
    return {name: Setting.of(name, item) for name, item in node.value.items()}


def refuse_unknown_keys(node: Node, known: Iterable[str], of: str) -> None:
    """Raises RecipeError, at its line, for the first key of a mapping that is not known."""
    for key, item in node.value.items():
        if key not in known:
            mend = did_you_mean(key, known, f"known: {quoted(known)}")
            raise RecipeError(f"'{key}' is no key of {of}", where=item.where, mend=mend)


def _condition(name: str, node: Node) -> Condition:
    if not isinstance(node.value, dict):
        raise RecipeError(
            f"'{name}' mixes conditions and plain values", where=node.where, mend=f"write 'value: {node.text}'"
        )
    refuse_unknown_keys(node, ("filter", "value"), "a condition")
    if "value" not in node.value:
        raise RecipeError(f"a condition of '{name}' has no value", where=node.where, mend="add 'value:'")
    match = node.value.get("filter", Node(None, node.where))
    if not isinstance(match.value, str | None):
        raise RecipeError(
            f"the filter of '{name}' must be text, a part of tensor names, not {match}",
            where=match.where,
            mend="put it in quotes",
        )
    value = node.value["value"]
    return Condition(None if match.value == "*" else match.value, _value(name, value), value.where)


def _value(name: str, node: Node) -> Scalar | tuple[Scalar, ...]:
    if not isinstance(node.value, list):
        return _scalar(name, node)
    if not node.value:
        raise RecipeError(f"the list of '{name}' is empty", where=node.where, mend="give it at least one value")
    return tuple(_scalar(name, end) for end in node.value)


def _scalar(name: str, node: Node) -> Scalar:
    value = node.value
    if not isinstance(value, bool | int | float | str):
        raise RecipeError(f"'{name}' must be a value or a list of values, not {node}", where=node.where)
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"'{name}' is {node.text}: it must be finite", where=node.where)
    return value


def _read(value: Scalar, parameter: Parameter, where: str) -> Scalar:
    """One value in the parameter's type and within its bounds."""
    name, shown = parameter.name, f"'{value}'" if isinstance(value, str) else str(value).lower()
    result: Scalar | None = None
    if parameter.type is bool:
        result = _switch(value)
        if result is None:
            raise RecipeError(f"'{name}' must be true or false, not {shown}", where=where)
        return result
    if parameter.type in (float, int):
        result = _number(value)
        if result is None:
            raise RecipeError(f"'{name}' must be a number, not {shown}", where=where)
        if parameter.type is int:
            if not result.is_integer():
                raise RecipeError(f"'{name}' must be a whole number, not {shown}", where=where)
            result = int(result)
        _refuse_out_of_range(result, shown, parameter, where)
        return result
    if not isinstance(value, str):
        raise RecipeError(f"'{name}' must be text, not {shown}", where=where, mend="put it in quotes")
    if parameter.choices and value not in parameter.choices:
        mend = did_you_mean(value, parameter.choices, f"choose one of {quoted(parameter.choices)}")
        raise RecipeError(f"'{value}' is no choice for '{name}'", where=where, mend=mend)
    return value


def _number(value: Scalar) -> float | None:
    """YAML 1.1 reads `1e-5` as text; it is a number all the same, `true` is none."""
    if isinstance(value, bool) or (isinstance(value, str) and not _NUMBER.fullmatch(value)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _switch(value: Scalar) -> bool | None:
    if isinstance(value, str):
        return _SWITCH.get(value.lower())
    return bool(value) if value in (0, 1) else None


def _refuse_out_of_range(value: float, shown: str, parameter: Parameter, where: str) -> None:
    low, high = parameter.low, parameter.high
    if (low is None or value >= low) and (high is None or value <= high):
        return
    if low is not None and high is not None:
        raise RecipeError(f"'{parameter.name}' is {shown}, outside [{low:g}, {high:g}]", where=where)
    bound = f"at least {low:g}" if low is not None else f"at most {high:g}"
    raise RecipeError(f"'{parameter.name}' is {shown}; it must be {bound}", where=where)
