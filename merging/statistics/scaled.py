"""A model scaled back towards its base, θ₀ + s·(θ − θ₀): what DF-Merge takes its statistics of.

Source: arXiv 2504.18992.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from merging.sources import ModelRef
from merging.statistics.folder import StatsError
from merging.statistics.job import Found
from merging.views import View

_T = TypeVar("_T")


def refuse_strangers(model: View, base: View) -> None:
    """Raises StatsError where the two have hardly a tensor in common: of what only one has nothing would be scaled."""
    model.align(base.names())
    shared = sum(model.find(name) is not None for name in base.names())
    if 2 * shared < min(len(base.tensors), len(model.tensors)):
        what = f"{base.ref} has hardly a tensor in common with {model.ref}"
        raise StatsError(what, where="--base", mend="name the model that it was fine-tuned from")


@contextmanager
def scaled(model: ModelRef, base: ModelRef, scale: float) -> Iterator[ModelRef]:
    """For a while a folder with the scaled model in float32; all but the weights is the base's, as in a merge.

    What only one of the two has stays as it is.

    Raises:
        CuveeError: they are not of one lineage, or there is no room.
    """
    from merging.engine import merge
    from merging.recipe import Recipe

    with tempfile.TemporaryDirectory(prefix="cuvee-scaled-") as scratch:
        entry = {"model": model, "parameters": {"weight": scale}}
        merge(Recipe("task_arithmetic", [entry], base, dtype="float32", missing="keep"), Path(scratch) / "model")
        yield ModelRef(str(Path(scratch) / "model"))


def of_model(found: Found, model: View, base: View) -> Found:
    """Statistics of a scaled model under the stored names of the model, which the base may call otherwise."""
    model.align(base.names())

    def renamed(by_name: Mapping[str, _T]) -> dict[str, _T]:
        own = {name: info.name for name in by_name if (info := model.find(name)) is not None}
        return {own[name]: value for name, value in by_name.items() if name in own}

    return replace(found, tensors=renamed(found.tensors), rows=renamed(found.rows), axes=renamed(found.axes))
