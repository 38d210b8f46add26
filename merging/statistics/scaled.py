"""A model scaled back towards its base, θ₀ + s·(θ − θ₀): what DF-Merge takes its statistics of.

Source: arXiv 2504.18992.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from merging.build import build_plain
from merging.output import scratch
from merging.recipe import Recipe
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
def scaled(model: ModelRef, base: ModelRef, scale: float, out: Path) -> Iterator[ModelRef]:
    """For a while a folder with the scaled model in float32; all but the weights is the base's, as in a merge.

    What only one of the two has stays as it is.

    Args:
        out: of the statistics. The folder is beside it: on a disk that has room, where the next run finds what a killed
            one left.

    Raises:
        CuveeError: they are not of one lineage, or there is no room.
    """
    with scratch(out) as folder:
        entry = {"model": model, "parameters": {"weight": scale}}
        build_plain(Recipe("task_arithmetic", [entry], base, dtype="float32", missing="keep"), folder / "model")
        yield ModelRef(str(folder / "model"))


def of_model(found: Found, model: View, base: View) -> Found:
    """Statistics of a scaled model under the stored names of the model, which the base may call otherwise."""
    model.align(base.names())

    def renamed(by_name: Mapping[str, _T]) -> dict[str, _T]:
        own = {name: info.name for name in by_name if (info := model.find(name)) is not None}
        return {own[name]: value for name, value in by_name.items() if name in own}

    return replace(found, tensors=renamed(found.tensors), rows=renamed(found.rows), axes=renamed(found.axes))
