"""Draws: which rows each member of a bag is given, and which are kept for later updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embeddings.training.config import COMPLEMENT, TrainingConfig
from embeddings.training.data import TrainingSet

Rows = Mapping[str, NDArray[np.int64]]

_CORE_DRAW, _MEMBER_DRAW, _UPDATE_DRAW = 1, 2, 3  # keep draws apart that share a seed


@dataclass(frozen=True)
class Member:
    """One model of a bag.

    Attributes:
        percent: of each data set.
        rows: by data set, (rows,) sorted numbers.
    """

    name: str
    percent: float
    seed: int
    rows: Rows


def draw_members(config: TrainingConfig, sets: Sequence[TrainingSet]) -> list[Member]:
    """The bags: from each data set so many percent of its rows, without replacement, independent between members.

    A "complement" has the rows that the member before it was not given. Without bags, one member on everything.
    """
    members: list[Member] = []
    for number, size in enumerate(config.bags or (100.0,), 1):
        seed = config.seed * 1000 + number if config.bags else config.seed
        if size == COMPLEMENT:
            before = members[-1]
            rows: Rows = {each.name: _without(len(each), before.rows[each.name]) for each in sets}
            percent = 100.0 - before.percent
        else:
            percent = float(size)
            rows = draw(sets, percent, (config.seed, _MEMBER_DRAW, number))
        members.append(Member(f"{number}-{percent:g}", percent, seed, rows))
    return members


def draw_core(config: TrainingConfig, sets: Sequence[TrainingSet]) -> Rows:
    """The rows that are kept for later updates: `config.core` percent of each data set."""
    return draw(sets, config.core, (config.seed, _CORE_DRAW))


def draw_new_core(new: Sequence[TrainingSet], percent: float, seed: int) -> Rows:
    """Those of an update's new data."""
    return draw(new, percent, (seed, _UPDATE_DRAW))


def draw(sets: Sequence[TrainingSet], percent: float, seed: Sequence[int]) -> dict[str, NDArray[np.int64]]:
    """By data set, (rows,) sorted row numbers: so many percent of each, at least one, drawn without replacement."""
    found = {}
    for number, each in enumerate(sets):
        count = min(len(each), max(1, round(len(each) * percent / 100)))
        chosen = np.random.default_rng([*seed, number]).permutation(len(each))[:count]
        found[each.name] = np.sort(chosen).astype(np.int64)
    return found


def _without(size: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.setdiff1d(np.arange(size, dtype=np.int64), rows, assume_unique=True)
