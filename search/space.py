"""Space: what varies in a merge, what is fixed, and how a point of the space becomes a method's parameters.

It is built from the method's entry in the registry: types, bounds, choices and defaults are declared there once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from merging import layers
from merging.errors import CuveeError, quoted
from merging.methods import registry
from merging.methods.registry import REQUIRED, Method, Parameter
from merging.ownership import module_kind

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

#: A point: the value of each dimension by name.
Point: TypeAlias = Mapping[str, Any]
#: What `per` may be: one value for all, for each model, or for each model and group of tensors.
PER = ("all", "model", "layers", "module", "tensor")
#: Functions from a tensor's name to its group.
GROUPINGS: Mapping[str, Callable[[str], str]] = {"layers": layers.group, "module": module_kind, "tensor": str}
#: Dimensions that a search by proposals can do anything with.
MANY = 100
#: Points of a space that are told one by one.
FEW = 4096


@dataclass(frozen=True)
class Vary:
    """What is said of one parameter.

    Attributes:
        value: fixed to it; a list: one value for each model. None: it varies.
        low, high: inclusive bounds of a number.
        log: whether it is searched on a logarithmic scale.
        choices: of a parameter that is no number.
        per: one of `PER`.
    """

    value: Any = None
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()
    per: str = "all"
    where: str = ""


@dataclass(frozen=True)
class Dimension:
    """One coordinate.

    Attributes:
        name: "weight.0", "weight.0.encoder.layer.3", "density".
        parameter: the method's parameter.
        model: the model's place among those merged; None: all of them.
        group: of tensors; None: all of them.
        low, high: inclusive bounds; None for a categorical.
        choices: of a categorical.
        default: the method's own value, or the middle.
    """

    name: str
    parameter: str
    model: int | None = None
    group: str | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] = ()
    default: Any = None

    def distribution(self) -> BaseDistribution:
        """The same, as Optuna says it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        assert self.low is not None and self.high is not None
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def names(self) -> list[str]:
        """What it is called where it varies for more tensors or models at once, and at last its own name."""
        wider = [(None, None), (None, self.group), (self.model, None)]
        return list(dict.fromkeys([*(_name(self.parameter, *each) for each in wider), self.name]))

    def at(self, share: float) -> Any:
        """The value at a place in [0, 1]."""
        if self.choices:
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        assert self.low is not None and self.high is not None
        if self.whole:
            share = (share * (self.high - self.low + 1) - 0.5) / max(self.high - self.low, 1)
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        value = self.clipped(value)
        return round(value) if self.whole else value

    def place(self, value: Any) -> list[float]:
        """Coordinates in the unit cube: one of a number, one for each choice of a categorical."""
        if self.choices:
            return [float(choice == value) for choice in self.choices]
        assert self.low is not None and self.high is not None
        if self.low == self.high:
            return [0.0]
        if self.log:
            return [(math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))]
        return [(value - self.low) / (self.high - self.low)]

    def values(self) -> Sequence[Any] | None:
        """All that it may be; None for a number that may be anything between its bounds."""
        if self.choices:
            return self.choices
        assert self.low is not None and self.high is not None
        if self.whole:
            return range(int(self.low), int(self.high) + 1)
        return (self.low,) if self.low == self.high else None

    def clipped(self, value: Any) -> Any:
        """The nearest value within bounds; of a categorical, the value if it is a choice, else the first choice."""
        if self.choices:
            return value if value in self.choices else self.choices[0]
        assert self.low is not None and self.high is not None
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Space:
    """What varies and what is fixed.

    Attributes:
        models: how many are merged.
        fixed: parameters by name, as a recipe's global settings; a list is one value for each model.
    """

    method: str
    models: int
    dimensions: tuple[Dimension, ...]
    fixed: Mapping[str, Any]

    def distributions(self) -> dict[str, BaseDistribution]:
        """By name of the dimension."""
        return {dimension.name: dimension.distribution() for dimension in self.dimensions}

    def point(self, shares: Sequence[float]) -> dict[str, Any]:
        """The point at a place in the unit cube, (dimensions,)."""
        return {d.name: d.at(share) for d, share in zip(self.dimensions, shares, strict=True)}

    def points(self) -> Iterator[dict[str, Any]] | None:
        """All points, where these are at most `FEW`; None where there are more."""
        values = [dimension.values() for dimension in self.dimensions]
        known = [own for own in values if own is not None]
        if len(known) < len(values) or math.prod(map(len, known)) > FEW:
            return None
        names = [dimension.name for dimension in self.dimensions]
        return (dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*known))

    def coordinates(self, point: Point) -> list[float]:
        """Coordinates in the unit cube; a categorical has one for each choice."""
        return [place for dimension in self.dimensions for place in dimension.place(point[dimension.name])]

    @property
    def divided(self) -> bool:
        """Whether weights are divided by their sum, where nothing else is tried."""
        return self._divides({**{d.parameter: d.default for d in self.dimensions}, **self.fixed})

    def _divides(self, values: Mapping[str, Any]) -> bool:
        known = registry.get(self.method).parameters
        usual = {name: known[name].default for name in ("normalize", "normalize_weights") if name in known}
        return any(values.get(name, default) is True for name, default in usual.items())

    def coefficients(self, point: Point) -> dict[str, Any]:
        """The method's parameters at a point.

        Weights that are divided by their sum and are all 0 are all 1: as near to it as one comes with equal ones. There is
        no such merge, and a failure would tell the optimiser nothing: it would ask for it again.

        Returns:
            By parameter a value, a list of one for each model, or either of these for each group of tensors by its name.
        """
        found: dict[str, Any] = dict(self.fixed)
        for dimension in self.dimensions:
            value, name = point[dimension.name], dimension.parameter
            if dimension.group is not None:
                grouped = found.setdefault(name, {})
                if dimension.model is None:
                    grouped[dimension.group] = value
                else:
                    grouped.setdefault(dimension.group, [None] * self.models)[dimension.model] = value
            elif dimension.model is not None:
                found.setdefault(name, [None] * self.models)[dimension.model] = value
            else:
                found[name] = value
        if "weight" in found and self._divides(found):
            own = found["weight"]
            found["weight"] = (
                {group: _some(each) for group, each in own.items()} if isinstance(own, Mapping) else _some(own)
            )
        return found

    def plain(self) -> dict[str, Any]:
        """What tells this space from another, as JSON knows it."""
        return {
            "method": self.method,
            "models": self.models,
            "dimensions": [{**asdict(d), "choices": list(d.choices)} for d in self.dimensions],
            "fixed": {name: list(v) if isinstance(v, tuple) else v for name, v in self.fixed.items()},
        }


def _some(weights: Any) -> Any:
    """The weights, a list of one for each model; 1 each where all are 0."""
    return [1.0] * len(weights) if isinstance(weights, list | tuple) and not any(weights) else weights


def make_space(
    method: Method, models: int, vary: Mapping[str, Vary], names: Sequence[str] = (), most: int = MANY
) -> Space:
    """The space of a method.

    Args:
        models: how many are merged.
        vary: what the user says; for parameters that are not in it the registry decides: those without a default vary
            per model in their bounds, else in [0, 1], and those that it marks as worth a search in the marked bounds; where there
            is neither, every number with bounds, or else what is true or false.
        names: tensors of the base, for parameters that differ by layer, module or tensor.
        most: dimensions that there may be.

    Raises:
        CuveeError: no such parameter, bounds that are none or beyond the method's, choices that it does not have, nothing
            varies, too many dimensions.
    """
    said = {**_defaults(method), **vary}
    dimensions: list[Dimension] = []
    fixed: dict[str, Any] = {}
    for name in sorted(said, key=list(method.parameters).index):
        if said[name].value is not None:
            fixed[name] = said[name].value
        else:
            dimensions += _dimensions(method.parameters[name], said[name], models, names)
    if all(d.low == d.high and len(d.choices) < 2 for d in dimensions):
        where = next((each.where for each in vary.values() if each.where), "")
        if not method.parameters:
            what = f"'{method.name}' has no parameter, so there is nothing to search"
            raise CuveeError(what, where=where, mend="choose another method, or merge by it with `cuvee merge`")
        mend = f"give bounds, or a list of what to try, to one of {quoted(method.parameters)}"
        raise CuveeError(f"nothing varies in '{method.name}'", where=where, mend=mend)
    if len(dimensions) > most:
        where = next((v.where for v in said.values() if v.per in GROUPINGS), "")
        raise CuveeError(
            f"{len(dimensions)} coefficients are more than a search can find ({most} at most)",
            where=where,
            mend="let fewer of them vary, or vary them per model",
        )
    return Space(method.name, models, tuple(dimensions), fixed)


def _defaults(method: Method) -> dict[str, Vary]:
    found = {}
    for name, parameter in method.parameters.items():
        if parameter.search is not None:
            found[name] = Vary(low=parameter.search.low, high=parameter.search.high, log=parameter.search.log)
        elif parameter.default is REQUIRED and parameter.type in (int, float):
            low, high = parameter.low, parameter.high
            per = "model" if parameter.per_model else "all"
            found[name] = Vary(low=0.0 if low is None else low, high=1.0 if high is None else high, per=per)
        elif parameter.default is REQUIRED:
            found[name] = Vary(choices=parameter.choices or (False, True))
    if found:
        return found
    for name, parameter in method.parameters.items():  # nothing must be given: then whatever has natural bounds
        bounds = parameter.low, parameter.high
        if parameter.type is float and parameter.per_model and parameter.high is None:
            found[name] = Vary(low=parameter.low or 0.0, high=1.0, per="model")
        elif parameter.type is float and bounds[0] is not None and bounds[1] is not None:
            found[name] = Vary(low=bounds[0], high=bounds[1])
    return found or {name: Vary(choices=(False, True)) for name, own in method.parameters.items() if own.type is bool}


def _dimensions(parameter: Parameter, vary: Vary, models: int, names: Sequence[str]) -> list[Dimension]:
    name = parameter.name
    whole = parameter.type is int
    common = {
        **{"parameter": name, "low": vary.low, "high": vary.high, "log": vary.log, "whole": whole},
        **{"choices": vary.choices, "default": _default(parameter, vary)},
    }
    places: list[int | None] = [*range(models)] if parameter.per_model and vary.per != "all" else [None]
    groups: list[str | None] = [None]
    if vary.per in GROUPINGS:
        groups = [*dict.fromkeys(map(GROUPINGS[vary.per], names))]
        assert groups, "a space per group needs the tensors' names"
    return [
        Dimension(_name(name, place, group), model=place, group=group, **common) for group in groups for place in places
    ]


def _name(parameter: str, model: int | None, group: str | None) -> str:
    return ".".join(str(part) for part in (parameter, model, group) if part is not None)


def _default(parameter: Parameter, vary: Vary) -> Any:
    default = None if parameter.default is REQUIRED else parameter.default
    if vary.choices:
        return default if default in vary.choices else vary.choices[0]
    assert vary.low is not None and vary.high is not None
    if default is None:
        middle = math.sqrt(vary.low * vary.high) if vary.log else (vary.low + vary.high) / 2
        return int(middle) if parameter.type is int else middle
    return min(max(default, vary.low), vary.high)
