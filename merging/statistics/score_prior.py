"""Score prior: how a source's scores are distributed, as a Beta; all that leaves the source of them.

A score s between s_min and s_max counts as u = (s + 0.5 - s_min) / (s_max - s_min + 1), within (0, 1); the Beta is the one
of maximum likelihood.
Source: arXiv 2505.18548, section 3, and the authors' code.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merging import lineage
from merging.columns import ALIASES
from merging.errors import did_you_mean, quoted
from merging.output import refuse_existing, staged
from merging.sources import ModelRef
from merging.statistics.folder import COMMAND, StatsError
from merging.tables import as_number, raw_rows
from merging.views import View

KIND = "score-prior"


@dataclass(frozen=True)
class ScorePrior:
    """Beta(alpha, beta) of so many scores between `low` and `high`."""

    alpha: float
    beta: float
    low: float
    high: float
    count: int


def fit(scores: Sequence[float], low: float | None = None, high: float | None = None, where: str = "") -> ScorePrior:
    """The Beta of maximum likelihood.

    Args:
        low, high: the scores that can be given; by default the least and the greatest that were.

    Raises:
        StatsError: fewer than two different scores, or one out of range.
    """
    from scipy.stats import beta

    values = np.asarray(scores, float)
    if len(set(values.tolist())) < 2:
        what = f"{len(values)} scores, all the same: no distribution can be told from them"
        raise StatsError(what if len(values) else "no score", where=where, mend="give scores that differ")
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    if values.min() < low or values.max() > high:
        odd = values.min() if values.min() < low else values.max()
        raise StatsError(f"the score {odd:g} is outside {low:g} … {high:g}", where=where, mend="see --scores")
    shares = (values + 0.5 - low) / (high - low + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of steps on the way
            first, second, _, _ = beta.fit(shares, floc=0, fscale=1)
    except Exception as error:  # scipy's own kinds
        raise StatsError(f"no Beta fits the scores: {error}", where=where) from error
    return ScorePrior(float(first), float(second), low, high, len(values))


def collect_score_prior(
    model: str | os.PathLike[str] | ModelRef,
    data: Sequence[str | Path],
    out: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    scores: tuple[float, float] | None = None,
    seed: int = 0,
    force: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Writes OUT/cuvee.json with the Beta of the scores that a model was trained on.

    No more of the data goes there than their number and their range: no names of files, no digests.

    Args:
        columns: `label`: what the data call the score.
        scores: the least and the greatest that can be given; by default those that were.

    Returns:
        What `cuvee stats --json` prints.

    Raises:
        CuveeError: no model, no such data, or `out` exists.
    """
    began = time.perf_counter()
    refuse_existing(Path(out), force=force)
    for name in columns or {}:
        if name != "label":
            raise StatsError(f"'{name}' is not read for a score prior", where="--column", mend="write label=NAME")
    given = [score for file in map(Path, data) for score in read_scores(file, (columns or {}).get("label"))]
    low, high = scores or (None, None)
    found = fit(given, low, high, where=", ".join(map(str, data)))
    view = View.open(model if isinstance(model, ModelRef) else ModelRef.parse(model))
    with view.checkpoint:
        digest = view.digest()
    if not dry_run:
        with staged(Path(out), force=force) as staging:
            content = {"command": COMMAND, "kind": KIND, "examples": found.count, "alpha": found.alpha}
            content |= {"beta": found.beta, "scores": [found.low, found.high], "model": {"digest": digest}}
            lineage.write(staging, content)
    return {
        **{"command": COMMAND, "out": str(out), "kind": KIND, "examples": found.count, "parameters": 2},
        **{"alpha": found.alpha, "beta": found.beta, "scores": [found.low, found.high]},
        **{"seed": seed, "device": "cpu", "cuvee_version": lineage.cuvee_version()},
        "seconds": round(time.perf_counter() - began, 3),
        **({"dry_run": True} if dry_run else {}),
    }


def open_score_prior(folder: Path) -> ScorePrior:
    """What `collect_score_prior` wrote.

    Raises:
        StatsError: it is something else, or damaged.
    """
    mend = "make it by cuvee stats MODEL --data FILE --kind score-prior --out FOLDER"
    if not (folder / lineage.FILE).is_file():
        raise StatsError(f"holds no {lineage.FILE}, so it is no score prior", where=str(folder), mend=mend)
    said = lineage.read(folder)
    if said.get("command") != COMMAND or said.get("kind") != KIND:
        raise StatsError("is no score prior", where=str(folder), mend=mend)
    scores = said.get("scores")
    values = [said.get("alpha"), said.get("beta"), *(scores if isinstance(scores, list) else []), said.get("examples")]
    if len(values) != 5 or not all(isinstance(v, int | float) and np.isfinite(v) for v in values):
        raise StatsError("lacks a number", where=str(folder / lineage.FILE), mend="make it anew")
    alpha, beta, low, high, count = (float(value) for value in values if value is not None)
    if min(alpha, beta, count) <= 0 or low > high:
        raise StatsError("says something impossible", where=str(folder / lineage.FILE), mend="make it anew")
    return ScorePrior(alpha, beta, low, high, int(count))


def read_scores(file: Path, column: str | None = None) -> list[float]:
    """A table's scores, one a row.

    Raises:
        StatsError: a row without one.
        TableError: a file that is missing or damaged.
    """
    spellings = (column,) if column else tuple(dict.fromkeys((*ALIASES["score"], *ALIASES["label"])))
    found = []
    for line, row in raw_rows(file):
        key = next((key for key in spellings if row.get(key) is not None), None)
        if key is None:
            mend = did_you_mean(spellings[0], row, f"the row has {quoted(row)}, say --column label=NAME")
            raise StatsError(f"has no '{spellings[0]}'", where=f"{file}:{line}", mend=mend)
        score = as_number(row[key])
        if not np.isfinite(score):
            raise StatsError(f"'{key}' must be a number, not {row[key]!r:.60}", where=f"{file}:{line}")
        found.append(score)
    return found
