"""Design: the points that are tried before any model of the scores: anchors, the user's, a previous study's, then Sobol's.

The start decides more than the optimiser: a Gaussian process after two uniform anchors and six Sobol points needs about
half the evaluations of a cold one. All points are a pure function of the space and the seed.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from merging.errors import CuveeError, did_you_mean
from merging.methods import registry
from search.cocktail import TEMPERATURE, alone
from search.space import Dimension, Space

UNIFORM, SOBOL, RANDOM, COCKTAIL = "uniform", "sobol", "random", "cocktail"
#: Points in all, where `sobol` or `random` says no number: what is missing to it is filled.
POINTS = 8
#: Of a previous study, the best.
FROM_STUDY = 5
TRIALS = "trials.jsonl"


@dataclass(frozen=True)
class Start:
    """One entry of `start:`.

    Attributes:
        kind: "uniform", "sobol", "random", "cocktail", "point" or "study".
        count: of Sobol's points or random ones; None: what is missing to `POINTS`, at least 2.
        values: of a point: by parameter a value, a list of one for each model, or either by group.
        study: the folder of a previous search.
        temperature: of the cocktail.
    """

    kind: str
    count: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    study: str = ""
    temperature: float = TEMPERATURE
    where: str = ""


DEFAULT = (Start(UNIFORM), Start(SOBOL))


def design(space: Space, starts: Sequence[Start], seed: int) -> list[dict[str, Any]]:
    """The first points to try, in order, none twice.

    A cocktail is each model by itself, and in their wake `{COCKTAIL: T}` for what they will have scored.

    Raises:
        CuveeError: a point that the space does not hold, a study that cannot be read.
    """
    points: list[dict[str, Any]] = []
    for start in starts:
        if start.kind == UNIFORM:
            new = uniform(space)
        elif start.kind in (SOBOL, RANDOM):
            count = max(2, POINTS - len(points)) if start.count is None else start.count
            new = sobol(space, count, seed) if start.kind == SOBOL else at_random(space, count, seed)
        elif start.kind == COCKTAIL:
            new = [*alone(space, start.where), {COCKTAIL: start.temperature}]
        elif start.kind == "study":
            new = from_study(space, start)
        else:
            new = [given_point(space, start)]
        for point in new:  # two of Sobol's may be one, where there are few values to take
            if point not in points:
                points.append(point)
    return points


def uniform(space: Space) -> list[dict[str, Any]]:
    """The same weight for all: 1/M, which averages, and 1/√M, which keeps the norm of task vectors at right angles.

    What is no weight of a model is at the method's default. Weights that are divided by their sum need one of the two.
    """
    shares = [1 / space.models, 1 / math.sqrt(space.models)]
    if space.divided or not any(d.model is not None for d in space.dimensions):
        shares = shares[:1]
    found: list[dict[str, Any]] = []
    for share in shares:
        point = {d.name: _nearest(d, share) if _is_share(d, space) else d.default for d in space.dimensions}
        if point not in found:
            found.append(point)
    return found


def sobol(space: Space, count: int, seed: int, skip: int = 0) -> list[dict[str, Any]]:
    """Points of the scrambled Sobol sequence of that seed, the first `skip` left out."""
    from scipy.stats import qmc

    if count <= 0:
        return []
    sequence = qmc.Sobol(len(space.dimensions), scramble=True, rng=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no power of two: its balance is not what is wanted
        if skip:
            sequence.fast_forward(skip)
        return [space.point(row) for row in sequence.random(count).tolist()]


def at_random(space: Space, count: int, seed: int) -> list[dict[str, Any]]:
    """Independent uniform draws, as most papers begin."""
    rows = np.random.default_rng(seed).random((count, len(space.dimensions)))
    return [space.point(row) for row in rows.tolist()]


def given_point(space: Space, start: Start) -> dict[str, Any]:
    """The user's point; dimensions that it does not name are at the method's default.

    Raises:
        CuveeError: it names what does not vary, has the wrong number of values, or lies outside of the bounds.
    """
    known = list(dict.fromkeys(d.parameter for d in space.dimensions))
    for name in start.values:
        if name not in known:
            mend = did_you_mean(name, known, f"what varies: {', '.join(known)}")
            raise CuveeError(f"'{name}' does not vary, so no start point can set it", where=start.where, mend=mend)
    return {d.name: _given(d, space, start) for d in space.dimensions}


def from_study(space: Space, start: Start) -> list[dict[str, Any]]:
    """The best points of a previous search, of whatever varies here too; the rest at the method's default.

    What varied there per model, or for all, begins here with the same value in each layer, or of each model.

    Raises:
        CuveeError: no such study, none of its trials succeeded, or nothing in it varies here.
    """
    file = Path(start.study) / TRIALS
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        done = [row for row in rows if row["state"] == "COMPLETE"]
        done.sort(key=lambda row: (not row["feasible"], -sum(row["values"])))
        found = []
        if not done:
            mend = "let it go on first, or choose another start"
            raise CuveeError(f"'{start.study}' is a study of which no trial succeeded", where=start.where, mend=mend)
        for row in done[:FROM_STUDY]:
            old = {d.name: row["point"][name] for d in space.dimensions for name in d.names() if name in row["point"]}
            if not old:
                raise CuveeError("is a study in which nothing varies that varies here", where=start.study)
            found.append({d.name: d.clipped(old.get(d.name, d.default)) for d in space.dimensions})
    except FileNotFoundError:
        mend = "give the folder of a 'cuvee search'"
        raise CuveeError(f"'{start.study}' holds no study", where=start.where, mend=mend) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CuveeError(f"'{file}' cannot be read as a search's trials", where=start.where) from None
    return found


def _is_share(dimension: Dimension, space: Space) -> bool:
    """A model's weight; or another number of each model for which the method has no value of its own."""
    usual = registry.get(space.method).parameters[dimension.parameter].default
    return dimension.model is not None and (dimension.parameter == "weight" or usual is None)


def _nearest(dimension: Dimension, share: float) -> Any:
    """The value within bounds, or the choice, that is nearest to a share."""
    if dimension.choices:
        return min(dimension.choices, key=lambda choice: abs(choice - share))
    return dimension.clipped(share)


def _given(dimension: Dimension, space: Space, start: Start) -> Any:
    name = dimension.parameter
    value = start.values.get(name)
    if value is None:
        return dimension.default
    if isinstance(value, Mapping):
        value = value.get(dimension.group)
        if value is None:
            return dimension.default
    if isinstance(value, list | tuple):
        if dimension.model is None or len(value) != space.models:
            want = f"a list of {space.models}, one a model" if dimension.model is not None else "one value"
            raise CuveeError(f"'{name}' of a start point must be a value or {want}", where=start.where)
        value = value[dimension.model]
    if dimension.choices:
        if value not in dimension.choices:
            raise CuveeError(f"'{value}' is no choice for '{name}'", where=start.where)
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CuveeError(f"'{name}' of a start point must be a number, not '{value}'", where=start.where)
    assert dimension.low is not None and dimension.high is not None
    if not dimension.low <= value <= dimension.high:
        bounds = f"[{dimension.low:g}, {dimension.high:g}]"
        raise CuveeError(f"'{name}' is {value:g}, outside {bounds}", where=start.where)
    return int(value) if dimension.whole else float(value)
