"""Resolution: a recipe's settings and a method's parameters, made ready to say what holds for one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merging.errors import RecipeError, did_you_mean, quoted
from merging.setting import Setting
from merging.sources import Source

if TYPE_CHECKING:
    from merging.methods.registry import Method, Parameter

#: Parameters of mergekit's that change nothing here, and why.
IGNORED = {"int8_mask": "no mask is kept in memory"}


def check_names(method: Method, parameters: Mapping[str, Setting], sources: Sequence[Source]) -> list[str]:
    """Checks names, places, types and ranges of every setting, whether it comes to bear or not.

    Args:
        parameters: the recipe's global ones.

    Returns:
        Notes on what is ignored.

    Raises:
        RecipeError: the first mistake, with its line and mend.
    """
    notes = []
    for level, of_model in [(parameters, False), *((source.parameters, True) for source in sources)]:
        for name, setting in level.items():
            parameter = method.parameters.get(name)
            if parameter is None and name in IGNORED:
                notes.append(f"{setting.where}: '{name}' is ignored: {IGNORED[name]}")
            elif parameter is None:
                takes = f"it takes {quoted(method.parameters)}" if method.parameters else "it takes none"
                mend = did_you_mean(name, method.parameters, takes)
                raise RecipeError(f"'{name}' is no parameter of '{method.name}'", where=setting.where, mend=mend)
            elif of_model and not parameter.per_model:
                raise RecipeError(
                    f"'{name}' of '{method.name}' holds for the whole merge, not for one model",
                    where=setting.where,
                    mend="move it to the recipe's own 'parameters:'",
                )
            else:
                setting.read_as(parameter)
    return notes


@dataclass(frozen=True)
class Chain:
    """The settings of one parameter from highest to lowest precedence; its default holds where none speaks."""

    parameter: Parameter
    settings: tuple[Setting, ...]
    default: Any
    required: bool

    @property
    def constant(self) -> bool:
        return not self.settings or self.settings[0].constant

    def at(self, tensor_name: str, t: float) -> Any:
        """The value for a tensor.

        Raises:
            RecipeError: the parameter is required and no condition matches the tensor.
        """
        for setting in self.settings:
            value = setting.at(tensor_name, t)
            if value is not None:
                # A gradient of whole numbers passes through fractions.
                return round(value) if self.parameter.type is int and isinstance(value, float) else value
        if self.required:
            raise RecipeError(
                f"no condition of '{self.parameter.name}' matches '{tensor_name}'",
                where=self.settings[-1].where,
                mend="add a last condition without 'filter:'",
            )
        return self.default


class Resolution:
    """A method's parameters under one recipe.

    Args:
        method: the registry's entry.
        sources: the models that take part, in order; the base is not among them unless the method has no base.
        parameters: the recipe's global parameters.
        where: where the recipe names the method.

    Raises:
        RecipeError: a required parameter that nobody sets; a value of the wrong type or out of range.
    """

    def __init__(
        self, method: Method, sources: Sequence[Source], parameters: Mapping[str, Setting], where: str
    ) -> None:
        self.method, self.sources, self._settings, self._where = method, tuple(sources), parameters, where
        self._shared: dict[str, Chain] = {}
        self._per_model: dict[str, list[Chain]] = {}
        for name, parameter in method.parameters.items():
            if parameter.per_model:
                self._per_model[name] = [self._chain(parameter, source) for source in self.sources]
            else:
                self._shared[name] = self._chain(parameter, None)
        chains = [*self._shared.values(), *(chain for chains in self._per_model.values() for chain in chains)]
        #: What holds for every tensor; None where something is filtered or graded.
        self.constant: tuple[dict[str, Any], dict[str, list[Any]]] | None = None
        if all(chain.constant for chain in chains):
            self.constant = self._evaluate("", 0.0)

    def values(self, tensor_name: str, t: float) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        """Shared values, and lists of one value for each of `sources`. The same objects may come again: read only."""
        return self.constant or self._evaluate(tensor_name, t)

    def constant_of(self, name: str, purpose: str, mend: str) -> list[Any]:
        """A per-model parameter's value for each model.

        Args:
            purpose, mend: for the error.

        Raises:
            RecipeError: it is filtered or graded.
        """
        chains = self._per_model[name]
        if odd := next((chain for chain in chains if not chain.constant), None):
            raise RecipeError(f"'{name}', {purpose}, differs by tensor", where=odd.settings[0].where, mend=mend)
        return [chain.at("", 0.0) for chain in chains]

    def refuse_weights_of_sum_0(self) -> None:
        """Normalising divides by the sum of the weights; what is filtered or graded cannot be judged here.

        Raises:
            RecipeError: the weights sum to 0, and the method would divide by it.
        """
        chains = self._per_model.get("weight", [])
        switches = [name for name in ("normalize", "normalize_weights") if name in self._shared]
        if not chains or not all(chain.constant for chain in chains):
            return
        weights = [chain.at("", 0.0) for chain in chains]
        for switch in switches:
            always = self._shared[switch].constant and self._shared[switch].at("", 0.0)
            if always and abs(sum(weights)) <= 1e-9 * max(map(abs, weights)):
                raise RecipeError(
                    f"the weights sum to 0 and '{switch}' divides by their sum",
                    where=next((chain.settings[0].where for chain in chains if chain.settings), self._where),
                    mend=f"change a weight, or set '{switch}: false'",
                )

    def _evaluate(self, tensor_name: str, t: float) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        return (
            {name: chain.at(tensor_name, t) for name, chain in self._shared.items()},
            {name: [chain.at(tensor_name, t) for chain in chains] for name, chains in self._per_model.items()},
        )

    def _chain(self, parameter: Parameter, source: Source | None) -> Chain:
        from merging.methods.registry import REQUIRED  # here, so that reading a recipe imports no method

        levels = [self._settings] if source is None else [source.parameters, self._settings]
        settings = tuple(level[parameter.name].read_as(parameter) for level in levels if parameter.name in level)
        required = parameter.default is REQUIRED
        if required and not settings:
            raise self._missing(parameter, source)
        return Chain(parameter, settings, parameter.default, required)

    def _missing(self, parameter: Parameter, source: Source | None) -> RecipeError:
        example = f"parameters: {{{parameter.name}: {_example(parameter)}}}"
        if source is None:
            what, where = f"'{self.method.name}' needs '{parameter.name}'", self._where
            return RecipeError(what, where=where, mend=f"add '{example}' to the recipe")
        what = f"the model '{source.model}' has no '{parameter.name}', which '{self.method.name}' needs"
        return RecipeError(what, where=source.where, mend=f"add '{example}' under the model")


def _example(parameter: Parameter) -> Any:
    """A value that the parameter may have."""
    if parameter.type is bool:
        return "true"
    if parameter.choices:
        return parameter.choices[0]
    if parameter.type not in (int, float):
        return "TEXT"
    low, high = parameter.low, parameter.high
    if low is not None and high is not None:
        return parameter.type((low + high) / 2)
    usual = 1 if parameter.per_model or parameter.type is int else 0.5
    return parameter.type(max(usual, low) if low is not None else min(usual, high) if high is not None else usual)
