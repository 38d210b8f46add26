"""The registry of merge methods: one dict, one decorator, and entries that carry all that others need.

A method is a pure function of one tensor's inputs. Its signature declares its parameters; recipes are checked, help and
docs are printed and search spaces are built from them. `docs/adding-a-method.md` has an example that a test runs.
"""

from __future__ import annotations

import difflib
import inspect
import keyword
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from merging.errors import MergeError
from merging.registries import load_installed

_T = TypeVar("_T")


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class Range:
    """Inclusive bounds of a parameter, for `Annotated[float, Range(0, 1)]`."""

    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Search:
    """Marks a parameter that `cuvee search` varies by default, one value for all models, within inclusive bounds."""

    low: float
    high: float
    log: bool = False


class _PerModel:
    """Marks a parameter that has one value per model; see `PerModel`."""


#: `PerModel[float]`: the method receives a list, one value for each model that is not the base.
PerModel = Annotated[list[_T], _PerModel()]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as a recipe spells it."""

    name: str
    type: type
    per_model: bool = False
    default: Any = REQUIRED
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    help: str = ""
    search: Search | None = None


@dataclass(frozen=True)
class Method:
    """A merge method: what to call, and what a recipe must give it.

    Attributes:
        base: "required", "optional", or "none" (a listed base is then a model like any other).
        min_models, max_models: how many models, the base not counted (max None: any number).
        survey: what the method must know of the whole model first: a function as the method itself, and of the results of
            the stages before; see docs/adding-a-method.md.
        source: paper or page that defines it.
        statistics: kinds of `cuvee stats` that the method takes of its models, the one to make by default first.
        statistics_if: parameter and value under which it needs them; None: always.
        statistics_at: (λ, parameter, value): where the parameter has that value, statistics are not those of the models but of
            θ₀ + λᵢτᵢ, λ a parameter that each model has one of.
        statistics_examples: rows that statistics are made of on the way, where the recipe says nothing; None: as ever.
        ownership: whether it says of each coordinate which model it comes from (`Chunk.owners`).
    """

    name: str
    title: str
    function: Callable[..., Any]
    parameters: Mapping[str, Parameter]
    base: Literal["required", "optional", "none"]
    min_models: int
    max_models: int | None
    source: str
    survey: Callable[..., Any] | None = None
    statistics: tuple[str, ...] = ()
    statistics_if: tuple[str, str] | None = None
    statistics_at: tuple[str, str, str] | None = None
    statistics_examples: int | None = None
    ownership: bool = False
    summary: str = field(default="", compare=False)


METHODS: dict[str, Method] = {}
_GROUP = "cuvee.methods"


def method(
    name: str,
    *,
    title: str,
    base: Literal["required", "optional", "none"] = "none",
    models: tuple[int, int | None] = (1, None),
    source: str,
    survey: Callable[..., Any] | None = None,
    statistics: tuple[str, ...] = (),
    statistics_if: tuple[str, str] | None = None,
    statistics_at: tuple[str, str, str] | None = None,
    statistics_examples: int | None = None,
    ownership: bool = False,
    replace: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers `function(inputs, *, parameters…)` as a merge method.

    Keyword-only arguments become the recipe's parameters: `PerModel[float]` for one value per model, `Annotated` with a
    `Range` for bounds and a text for the help, `Literal` for choices, a trailing underscore for names that Python reserves
    (`lambda_`).

    Raises:
        MergeError: the name is taken and `replace` is not set.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in METHODS and not replace:
            raise MergeError(f"a merge method '{name}' is registered already", mend="choose another name")
        METHODS[name] = Method(
            name=name,
            title=title,
            function=function,
            parameters=declared_parameters(function),
            base=base,
            min_models=models[0],
            max_models=models[1],
            source=source,
            survey=survey,
            statistics=statistics,
            statistics_if=statistics_if,
            statistics_at=statistics_at,
            statistics_examples=statistics_examples,
            ownership=ownership,
            summary=(inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " "),
        )
        return function

    return register


def get(name: str) -> Method:
    """The method of that name, built in or from an installed package's entry point `cuvee.methods`.

    Raises:
        MergeError: no such method; names the nearest.
    """
    if name not in METHODS:
        load_installed(_GROUP)
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3)
        mend = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known: {', '.join(sorted(METHODS))}"
        raise MergeError(f"no merge method '{name}'", mend=mend)
    return METHODS[name]


def known() -> dict[str, Method]:
    """All methods by name, those of installed packages included."""
    load_installed(_GROUP)
    return METHODS


def declared_parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    """What a function's keyword-only arguments declare; other registries than this one read their entries so too.

    The other arguments' annotations are not evaluated: they may name types that are imported late.
    """
    parameters = {}
    for argument in inspect.signature(function).parameters.values():
        if argument.kind is not argument.KEYWORD_ONLY:
            continue
        kind, marks = _unwrapped(_hint(function, argument.annotation))
        bounds = next((mark for mark in marks if isinstance(mark, Range)), Range())
        name = argument.name.rstrip("_")
        parameters[name] = Parameter(
            name=name,
            type=str if get_origin(kind) is Literal else kind,
            per_model=any(isinstance(mark, _PerModel) for mark in marks),
            default=REQUIRED if argument.default is argument.empty else argument.default,
            low=bounds.low,
            high=bounds.high,
            choices=get_args(kind) if get_origin(kind) is Literal else (),
            help=next((mark for mark in marks if isinstance(mark, str)), ""),
            search=next((mark for mark in marks if isinstance(mark, Search)), None),
        )
    return parameters


def _hint(function: Callable[..., Any], annotation: Any) -> Any:
    """An annotation, evaluated where its function was defined if it was kept as text."""
    holder = SimpleNamespace(__annotations__={"it": annotation})
    return get_type_hints(holder, getattr(inspect.unwrap(function), "__globals__", {}), include_extras=True)["it"]


def _unwrapped(hint: Any) -> tuple[Any, list[Any]]:
    """The type of one value, and all that `Annotated` says of it, the outermost first."""
    marks: list[Any] = []
    while get_origin(hint) in (Annotated, list):
        hint, *more = get_args(hint)
        marks += more
    return hint, marks


def keywords(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters under their recipe's names, as keyword arguments of a method's function."""
    return {f"{name}_" if keyword.iskeyword(name) else name: value for name, value in parameters.items()}
