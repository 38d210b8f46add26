"""Merges of tensors in memory: the same methods, on arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merging import kernels, methods
from merging.errors import MergeError
from merging.inputs import CACHE_BYTES, Inputs, NonFinite, Values, Workspace
from merging.random_streams import stream_key
from merging.weight_statistics import of_array

Floats = NDArray[np.float32]


class ArrayTensor:
    """A tensor that lies in memory."""

    def __init__(self, values: Floats) -> None:
        self._values = np.ascontiguousarray(values, np.float32).reshape(-1)

    def load(self, start: int, stop: int, values: Values, workspace: Workspace) -> bool:
        return bool(workspace.kernels.load(self._values[start:stop].view(np.uint8), "F32", values))


def merge_arrays(
    name: str,
    base: Floats | None,
    models: Sequence[Floats],
    *,
    seed: int = 0,
    key: str = "tensor",
    backend: str = "auto",
    chunk: int | None = None,
    statistics: Sequence[Floats | None] | None = None,
    axis: int = 1,
    note: Callable[[str], None] = lambda line: None,
    **parameters: Any,
) -> Floats:
    """Merges one tensor given as float32 arrays of one shape.

    Args:
        name: of the method.
        base: the base's array, or None for methods that do without.
        key: the tensor's name, which random draws depend on.
        backend: see `merging.kernels.load`.
        chunk: elements per chunk, about; by default what fits the cache.
        statistics: for methods that take them, of each model: the Fisher diagonal or what else broadcasts to the shape, or,
            where the method takes Gram matrices, (inputs, inputs); None for a model without.
        axis: of the tensor, over which its layer's inputs run; for Gram matrices.
        note: called with each line that the user should know.
        parameters: as in a recipe; a per-model parameter is a list or one number for all. `lambda_` means `lambda`.

    Raises:
        MergeError: unknown method or parameter, or shapes that differ.
    """
    entry = methods.get(name)
    given = {k.rstrip("_"): v for k, v in parameters.items()}
    arguments = {}
    for parameter in entry.parameters.values():
        value = given.pop(parameter.name, parameter.default)
        if value is methods.REQUIRED:
            raise MergeError(f"'{name}' needs '{parameter.name}'")
        if parameter.per_model and not isinstance(value, list | tuple):
            value = [value] * len(models)
        arguments[parameter.name] = value
    if given:
        raise MergeError(f"'{next(iter(given))}' is no parameter of '{name}'")
    if not entry.min_models <= len(models) <= (entry.max_models or len(models)):
        raise MergeError(
            f"'{name}' merges {entry.min_models} to {entry.max_models or 'any number of'} models, not {len(models)}"
        )
    if (base is None and entry.base == "required") or (base is not None and entry.base == "none"):
        raise MergeError(f"'{name}' {'needs a base' if base is None else 'takes no base'}")
    for parameter in entry.parameters.values():
        _check(parameter, arguments[parameter.name], len(models))
    shape = models[0].shape
    if any(array.shape != shape for array in [*models, *([] if base is None else [base])]):
        raise MergeError(f"shapes differ: {[array.shape for array in models]}")
    if statistics is not None and len(statistics) != len(models):
        raise MergeError(f"statistics of {len(statistics)} models are given for {len(models)}")
    wanted = bool(entry.statistics)
    if entry.statistics_if is not None:
        wanted = arguments[entry.statistics_if[0]] == entry.statistics_if[1]
    if wanted and statistics is None:
        raise MergeError(f"'{name}' needs statistics of every model", mend="give 'statistics', one array a model")
    kind = entry.statistics[0] if entry.statistics else ""
    streams = [None if array is None else of_array(array, shape, kind, axis) for array in statistics or []]
    rows = len(models) + (base is not None) + 1
    workspace = Workspace(kernels.load(backend), CACHE_BYTES // 4 if chunk is None else chunk * rows)
    inputs = Inputs(
        workspace,
        [ArrayTensor(model) for model in models],
        None if base is None else ArrayTensor(base),
        shape,
        lambda index: stream_key(seed, key, index),
        statistics=streams if wanted else [],
        note=lambda text, of_all: note(text),
    )
    call = methods.keywords(arguments)
    merged = np.empty(inputs.numel, np.float32)
    if not inputs.numel:
        return merged.reshape(shape)
    try:
        while entry.survey and (found := entry.survey(inputs, inputs.surveys, **call)) is not None:
            inputs.surveys = [*inputs.surveys, found]
        for part, values in inputs.apply(entry.function(inputs, **call)):
            merged[part.start : part.stop] = inputs.kernels.to_host(values)
    except NonFinite as error:
        where = "the base" if error.index < 0 else f"model {error.index}"
        raise MergeError(f"{where} holds NaN or infinite values") from None
    return merged.reshape(shape)


def _check(parameter: methods.Parameter, value: Any, models: int) -> None:
    values = value if parameter.per_model else [value]
    if parameter.per_model and len(values) != models:
        raise MergeError(f"'{parameter.name}' has {len(values)} values for {models} models")
    for each in values:
        if each is None and parameter.default is None:
            continue
        if parameter.choices and each not in parameter.choices:
            raise MergeError(f"'{parameter.name}' is {each!r}, not one of {', '.join(parameter.choices)}")
        if parameter.type in (int, float) and (isinstance(each, bool) or not isinstance(each, int | float)):
            raise MergeError(f"'{parameter.name}' must be a number, not {each!r}")
        low, high = parameter.low, parameter.high
        if (low is not None and each < low) or (high is not None and each > high):
            raise MergeError(f"'{parameter.name}' is {each}, outside [{low}, {high}]")
