"""The plan of a merge: which tensors come out, of which inputs, in which dtype — all of it before the first byte is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from merging import layers, methods
from merging.checkpoint import DTYPE_BYTES, FLOATING, TensorInfo, module_folders
from merging.errors import MergeError
from merging.methods import Method
from merging.recipe import Recipe
from merging.views import View
from merging.weight_statistics import refuse_misfit

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
#: Buffers that libraries store or leave out at will; they follow whoever has them.
_BUFFERS = ("position_ids", "rotary_emb.inv_freq", "attn.masked_bias", "attn.bias", "num_batches_tracked")
_WIDTH = {"F16": 1, "BF16": 1, "F32": 2, "F64": 3}


@dataclass(frozen=True)
class Step:
    """One tensor of the result.

    Attributes:
        dtype: it is written in.
        models: (view, its tensor) of those that take part, the base not counted.
        base: the base's tensor, where the method uses one.
        parameters: keyword arguments of the method.
        statistics: whether the method works by statistics of the models.
        action: "merge" by the method, or "copy" of bytes that all holders must share.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    models: tuple[tuple[View, TensorInfo], ...]
    base: tuple[View, TensorInfo] | None
    method: Method
    parameters: dict[str, Any]
    action: Literal["merge", "copy"]
    statistics: bool = False

    @cached_property
    def written(self) -> int:
        """Bytes of the result."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @cached_property
    def nbytes(self) -> int:
        """Bytes read and written, once each."""
        return sum(info.nbytes for _, info in self.models) + (self.base[1].nbytes if self.base else 0) + self.written


@dataclass(frozen=True)
class Plan:
    """All steps in the order of the donor's file, and one line for each thing the user should know.

    Attributes:
        parts: sub-folders of the result that hold weights of their own, see `CheckpointWriter`.
        models: those that take part, the base not counted, as the recipe names them.
    """

    steps: tuple[Step, ...]
    notes: tuple[str, ...]
    parts: tuple[str, ...] = ()
    models: tuple[str, ...] = ()

    @property
    def owned(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of the tensors of which the method says whose each coordinate is."""
        return [(s.name, s.shape) for s in self.steps if s.method.ownership and s.action == "merge"]


def make_plan(recipe: Recipe, method: Method, models: Sequence[View], base: View | None) -> Plan:
    """Decides every output tensor.

    Args:
        models: the views of `recipe.merged(method)`, in that order.
        base: the base's view if the method uses one.

    Raises:
        MergeError: a tensor is missing somewhere and no rule says what to do, shapes differ, or weights are quantised.
    """
    for view in [*models, *([base] if base else [])]:
        _refuse_quantised(view)
    lead = base or models[0]
    for view in models:
        if view is not lead:
            view.align(lead.names())
    names = list(dict.fromkeys(name for view in [lead, *models] for name in view.names()))
    fractions = layers.fractions(names)
    wanted = DTYPES.get(recipe.out_dtype or recipe.dtype or "")
    steps: list[Step] = []
    dropped: list[str] = []
    kept: list[str] = []
    for name in names:
        holders = [(view, info) for view in models if (info := view.find(name)) is not None]
        base_info = base.find(name) if base else None
        complete = len(holders) == len(models) and (base is None or base_info is not None)
        if not complete:
            rule = _missing_rule(recipe, name, models, base, lead)
            if rule == "drop":
                dropped.append(name)
                continue
            kept.append(name)
        step = _step(recipe, method, name, fractions[name], models, holders, base, base_info, complete, wanted)
        steps.append(step)
    notes = []
    if kept:
        notes.append(f"kept {quoted_some(kept)}, which only some models have")
    if dropped:
        notes.append(f"dropped {quoted_some(dropped)}, which only some models have")
    unmatched = recipe.unmatched(names)
    parts = tuple(module_folders(lead.checkpoint.path))
    return Plan(tuple(steps), (*notes, *unmatched), parts, tuple(str(view.ref) for view in models))


def _step(
    recipe: Recipe,
    method: Method,
    name: str,
    fraction: float,
    models: Sequence[View],
    holders: list[tuple[View, TensorInfo]],
    base: View | None,
    base_info: TensorInfo | None,
    complete: bool,
    wanted: str | None,
) -> Step:
    pair = (base, base_info) if base and base_info else None
    everyone = holders + ([pair] if pair else [])
    first = everyone[0][1]
    for view, info in everyone:
        if info.shape != first.shape:
            raise _shape_error(name, everyone[0][0], first, view, info)
    if any(info.dtype not in FLOATING for _, info in everyone):
        mixed = next((info for _, info in everyone if info.dtype != first.dtype), None)
        if mixed:
            raise MergeError(
                f"'{name}' is {first.dtype} in one model and {mixed.dtype} in another", where=str(mixed.file)
            )
        return Step(name, first.shape, first.dtype, tuple(holders), pair, method, {}, "copy")
    dtype = wanted or max((info.dtype for _, info in everyone), key=lambda d: _WIDTH[d])
    if wanted is None and {"F16", "BF16"} <= {info.dtype for _, info in everyone}:
        dtype = "F32"
    if complete:
        shared, per_model = recipe.values(method, name, fraction)
        parameters = methods.keywords({**shared, **per_model})
        statistics = recipe.wants_statistics(method)
        if statistics:
            _refuse_unfit_statistics(holders)
        return Step(name, first.shape, dtype, tuple(holders), pair, method, parameters, "merge", statistics)
    # Not all have it: the plain mean of the models that do, or the base's own.
    source = holders or everyone
    mean = {"weight": [1.0] * len(source), "normalize": True}
    return Step(name, first.shape, dtype, tuple(source), None, methods.get("linear"), mean, "merge")


def _missing_rule(recipe: Recipe, name: str, models: Sequence[View], base: View | None, lead: View) -> str:
    if name.endswith(_BUFFERS):
        return "keep" if lead.find(name) else "drop"
    if recipe.missing != "error":
        return recipe.missing
    everyone = [*models, *([base] if base else [])]
    lacking = next(view for view in everyone if view.find(name) is None)
    holding = next(view for view in everyone if view.find(name) is not None)
    raise MergeError(
        f"'{name}' is in {holding.ref} but missing in {lacking.ref}",
        where=recipe.where,
        mend="add 'missing: keep' (take it from those that have it) or 'missing: drop' to the recipe",
    )


def _shape_error(name: str, view: View, info: TensorInfo, other: View, different: TensorInfo) -> MergeError:
    a, b = info.shape, different.shape
    vocabulary = (
        len(a) == len(b)
        and a[0] != b[0]
        and a[1:] == b[1:]
        and any(word in name for word in ("embed", "wte", "shared", "lm_head", "decoder"))
    )
    mend = (
        "the vocabularies differ: add 'tokenizer: {source: union}' to the recipe"
        if vocabulary
        else "only models of one architecture and size can be merged"
    )
    return MergeError(f"'{name}' is {list(a)} in {view.ref} but {list(b)} in {other.ref}", mend=mend)


def _refuse_unfit_statistics(holders: list[tuple[View, TensorInfo]]) -> None:
    for view, info in holders:
        known = view.statistics
        if known and info.name in known:
            where = f"{known.path}: '{info.name}'"
            refuse_misfit(known.kind, known.shape(info.name), known.axes.get(info.name, 1), info.shape, where)


def _refuse_quantised(view: View) -> None:
    quantised = view.checkpoint.config.get("quantization_config")
    packed = next((info for info in view.tensors.values() if info.dtype.startswith("F8")), None)
    if quantised or packed:
        how = quantised.get("quant_method", "") if isinstance(quantised, dict) else packed.dtype if packed else ""
        raise MergeError(
            f"holds quantised weights ({how})",
            where=str(view.ref),
            mend="merge the unquantised models, quantise the result",
        )


def quoted_some(names: Sequence[str]) -> str:
    """'a', 'b', 'c' and 5 more"""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in names[:3]) + more
