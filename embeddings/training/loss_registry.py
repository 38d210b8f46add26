"""The registry of losses: one dict, one decorator, and entries that carry all that others need.

A loss is `function(queries, candidates, targets, *, parameters…)`: (queries, dimensions), (candidates, dimensions) and
`Targets` in, one number with a gradient out. The built-in ones are in `losses.py`, where `build` sets parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from merging.errors import CuveeError, did_you_mean, quoted
from merging.methods.registry import REQUIRED, Parameter, declared_parameters
from merging.node import Node
from merging.registries import find, load_installed
from merging.setting import Setting

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Targets:
    """What is known about a batch's pairs; tensors on the embeddings' device.

    Attributes:
        positive: (queries, candidates) booleans: the answers to each query. For a loss that needs positives every query
            has one at least.
        allowed: (queries, candidates) booleans: the positives, and all that are negatives of the query.
        scores: None; (queries,) of graded pairs: candidate i belongs to query i; or (queries, candidates) of a teacher,
            NaN where it said nothing.
    """

    positive: torch.Tensor
    allowed: torch.Tensor
    scores: torch.Tensor | None = None


#: (queries, dimensions), (candidates, dimensions), targets → the loss, without dimensions.
Loss = Callable[["torch.Tensor", "torch.Tensor", Targets], "torch.Tensor"]
Needs = Literal["positives", "scores", "teacher"]


@dataclass(frozen=True)
class LossEntry:
    """A loss of the registry.

    Attributes:
        needs: which part of `Targets` it reads: "positives", "scores" of graded pairs, or a "teacher"'s scores.
        default_of: types of task that are trained with it unless something else is said.
        in_batch: whether other rows' candidates may be negatives.
        source: paper that defines it.
    """

    name: str
    title: str
    function: Callable[..., Any]
    needs: Needs
    parameters: Mapping[str, Parameter]
    default_of: tuple[str, ...]
    in_batch: bool
    source: str
    summary: str = field(default="", compare=False)


LOSSES: dict[str, LossEntry] = {}
_GROUP = "cuvee.losses"

#: Types whose rows are negatives of each other; rows of the others share answers too often (FlagEmbedding #1400).
IN_BATCH_TYPES = ("Retrieval", "Reranking", "BitextMining")

#: Parameters that every loss has …
COMMON = {
    "matryoshka": Parameter(
        "matryoshka", int, default=(), low=1, help="also on the first so many dimensions: a list; the sum is minimised"
    ),
    "matryoshka_weights": Parameter("matryoshka_weights", float, default=(), low=0, help="factor of each; 1 each"),
}
#: … and those with positives besides.
_MARGIN = {
    "false_negative_margin": Parameter(
        "false_negative_margin", float, default=None, low=-2, high=2,
        help="no negative whose cosine exceeds that of the farthest positive less the margin; absent: all are kept",
    ),
    "false_negative_mode": Parameter(
        "false_negative_mode", str, default="absolute", choices=("absolute", "relative"),
        help="relative: the margin is a share of the positive's cosine",
    ),
}  # fmt: skip

_INFONCE = "write '{name: infonce, temperature: 0.05}', its default scale of 20"
_CACHED = "with 'gradient_cache: 4096' in the configuration"
_SYMMETRIC = "write '{name: infonce, temperature: 0.05, symmetric: true}'"
_GIST = "the nearest is '{name: infonce, false_negative_margin: 0}', with the model as its own guide"
#: The classes of sentence-transformers' losses, in lower case and without "loss", and what they are here.
_THEIRS = {
    "multiplenegativesranking": _INFONCE,
    "cachedmultiplenegativesranking": f"{_INFONCE}, {_CACHED}",
    "multiplenegativessymmetricranking": _SYMMETRIC,
    "cachedmultiplenegativessymmetricranking": f"{_SYMMETRIC}, {_CACHED}",
    "gistembed": _GIST,
    "cachedgistembed": f"{_GIST}, {_CACHED}",
    "triplet": "the nearest is 'infonce'",
    "cosent": "write 'cosent'",
    "angle": "write 'angle'",
    "cosinesimilarity": "the nearest is 'cosent'",
    "contrastive": "write 'contrastive'",
    "onlinecontrastive": "the nearest is 'contrastive'",
    "distillkldiv": "write '{name: distill_kl, temperature: 1}'",
    "marginmse": "write 'margin_mse'",
    "matryoshka": "write 'matryoshka: [384, 128]' beside the parameters of any loss",
}


def loss(
    name: str,
    *,
    title: str,
    needs: Needs,
    source: str,
    default_of: Sequence[str] = (),
    in_batch: bool | None = None,
    replace: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers `function(queries, candidates, targets, *, parameters…)` as a loss.

    Keyword-only arguments become its parameters, as in `merging.methods.registry`.

    Raises:
        CuveeError: the name is taken and `replace` is not set.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in LOSSES and not replace:
            raise CuveeError(f"a loss '{name}' is registered already", mend="choose another name")
        common = {**COMMON, **(_MARGIN if needs == "positives" else {})}
        LOSSES[name] = LossEntry(
            name=name,
            title=title,
            function=function,
            needs=needs,
            parameters={**declared_parameters(function), **common},
            default_of=tuple(default_of),
            in_batch=needs == "positives" if in_batch is None else in_batch,
            source=source,
            summary=(function.__doc__ or "").split("\n\n")[0].strip().replace("\n", " "),
        )
        return function

    return register


def get(name: str, where: str = "") -> LossEntry:
    """The loss of that name, built in or from an installed package's entry point `cuvee.losses`.

    Raises:
        CuveeError: no such loss; names the nearest, or ours of sentence-transformers' class.
    """
    theirs = name.lower().removesuffix("loss")
    if name not in LOSSES and name.lower() != theirs and theirs in _THEIRS:
        load_installed(_GROUP)
        if name not in LOSSES:
            raise CuveeError(f"no loss '{name}'", where=where, mend=_THEIRS[theirs])
    return find(name, LOSSES, group=_GROUP, noun="loss", where=where)


def known() -> dict[str, LossEntry]:
    """All losses by name, those of installed packages included."""
    load_installed(_GROUP)
    return LOSSES


def default_of(type_: str, has: str = "positives") -> str:
    """The loss that rows of a task's type are trained with; those that have a "teacher" with `distill_kl`."""
    if has == "teacher":
        return "distill_kl"
    return next((name for name, entry in LOSSES.items() if type_ in entry.default_of), "infonce")


def refuse_unfit(entry: LossEntry, has: str, dataset: str, where: str = "") -> None:
    """Raises CuveeError if a loss needs what a data set's rows do not have.

    Args:
        has: "positives"; "scores" of graded pairs, which say nothing of positives; or a "teacher" besides positives.
    """
    if entry.needs == has or (entry.needs, has) == ("positives", "teacher"):
        return
    form = {"positives": "queries with positives", "scores": "graded pairs", "teacher": "a teacher's scores"}
    fit = [name for name, other in known().items() if other.needs == has]
    raise CuveeError(
        f"the loss '{entry.name}' needs {form[entry.needs]}, and '{dataset}' has {form[has]}",
        where=where,
        mend=f"choose one of {quoted(fit)}",
    )


def check(name: str, parameters: Mapping[str, Any] | None = None, where: str = "") -> dict[str, Any]:
    """The values of all of a loss's parameters, the defaults included; `build` says more."""
    entry = get(name, where)
    given = {key: Node.of(value, where) for key, value in (parameters or {}).items()}
    for key, node in given.items():
        _refuse_unknown(key, entry.parameters, f"'{name}'", node.where)
    values = {
        key: _value(given[key], parameter) if key in given and given[key].value is not None else parameter.default
        for key, parameter in entry.parameters.items()
    }
    if missing := [key for key, value in values.items() if value is REQUIRED]:
        raise CuveeError(f"the loss '{name}' needs '{missing[0]}'", where=where)
    widths, weights = values["matryoshka"], values["matryoshka_weights"]
    if weights and len(weights) != len(widths):
        what = f"'matryoshka_weights' has {len(weights)} values and 'matryoshka' {len(widths)}"
        raise CuveeError(what, where=where, mend="give one for each")
    return values


def combined(name: str, own: Mapping[str, Any], defaults: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """A data set's own parameters over the run's defaults, of which a loss takes those that it has.

    Raises:
        CuveeError: a default that no loss has.
    """
    entries = known().values()
    for key in defaults:
        _refuse_unknown(key, {key: None for entry in entries for key in entry.parameters}, "any loss", where)
    takes = get(name, where).parameters
    return {**{key: value for key, value in defaults.items() if key in takes}, **own}


def _refuse_unknown(key: str, takes: Iterable[str], of: str, where: str) -> None:
    takes = list(takes)
    if key not in takes:
        mend = did_you_mean(key, takes, f"it takes {quoted(takes)}")
        raise CuveeError(f"'{key}' is no parameter of {of}", where=where, mend=mend)


def _value(node: Node, parameter: Parameter) -> Any:
    """One value, or the several of a parameter whose default is a tuple."""
    several = isinstance(parameter.default, tuple)
    if isinstance(node.value, dict) or (isinstance(node.value, list) and not several):
        form = "a list of numbers" if several else "one value"
        raise CuveeError(f"'{parameter.name}' must be {form}, not {node}", where=node.where)
    (condition,) = Setting.of(parameter.name, node).read_as(parameter).conditions
    value = condition.value
    return (value if isinstance(value, tuple) else (value,)) if several else value
