"""Prior: how often each choice is expected before a target text is seen, from what the sources tell of their labels.

Of scores: each source gives the Beta distribution of its scores, scaled to (0, 1); their equal mixture is replaced by the
Beta of the same mean and variance, and each of K scores gets the mass of its K-th part of [0, 1].
Source: arXiv 2505.18548, section 3, and the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from merging.errors import CuveeError
from merging.fields import given, located, looked_for, number_of, text_of
from merging.node import Node
from merging.setting import refuse_unknown_keys
from merging.statistics.score_prior import open_score_prior

UNIFORM = "uniform"
Beta = tuple[float, float]


@dataclass(frozen=True)
class Prior:
    """What is said of it; how many choices there are shows when the model is open.

    Attributes:
        betas: (alpha, beta) of each source.
        shares: of the choices, in their order.
        named: the same by the choices' names.
        folders: of `cuvee stats --kind score-prior`, each a source.
    """

    betas: tuple[Beta, ...] = ()
    shares: tuple[float, ...] = ()
    named: dict[str, float] | None = None
    folders: tuple[Path, ...] = ()
    where: str = ""

    def over(self, names: Sequence[str], count: int) -> NDArray[np.float64]:
        """(count,): the share of each choice; sums to 1.

        Raises:
            CuveeError: not as many as there are choices, a name of none; a folder that cannot be read.
        """
        betas = (*self.betas, *((own.alpha, own.beta) for own in map(open_score_prior, self.folders)))
        if not names and (betas or self.shares or self.named is not None):
            what = "every query has choices of its own, of which no prior tells"
            raise CuveeError(what, where=self.where, mend="write 'prior: uniform'")
        if betas:
            _refuse_unordered(names, self.where)
            return binned(mixture(betas), count)
        shares = np.full(count, 1.0)
        if self.named is not None:
            unknown = next((name for name in self.named if name not in names), None)
            if unknown is not None:
                mend = "write 'prior: uniform', or see what the choices are"
                raise CuveeError(f"'{unknown}' is no choice", where=self.where, mend=mend)
            shares = np.array([self.named.get(name, 0.0) for name in names])
        elif self.shares:
            if len(self.shares) != count:
                what = f"{len(self.shares)} shares for {count} choices"
                raise CuveeError(what, where=self.where, mend="give one for each, in their order")
            shares = np.array(self.shares)
        found: NDArray[np.float64] = shares / shares.sum()
        return found


def mixture(betas: Sequence[Beta]) -> Beta:
    """The Beta with the mean and the variance of an equal mixture of some."""
    alpha, beta = np.array(betas, float).T
    means, total = alpha / (alpha + beta), alpha + beta
    variances = means * (1 - means) / (total + 1)
    mean = means.mean()
    variance = variances.mean() + (means**2).mean() - mean**2
    strength = mean * (1 - mean) / variance - 1
    return float(mean * strength), float((1 - mean) * strength)


def binned(beta: Beta, count: int) -> NDArray[np.float64]:
    """(count,): the mass of a Beta in equal parts of [0, 1]."""
    from scipy.stats import beta as distribution

    edges = distribution.cdf(np.linspace(0, 1, count + 1), *beta)
    found: NDArray[np.float64] = np.diff(edges)
    return found


def prior_of(said: Node, near: Path) -> Prior:
    """The prior that a task's settings say.

    Raises:
        CuveeError: none, or an impossible one.
    """
    item = given(said, "prior")
    if item is None:
        mend = "name the sources' folders of `cuvee stats --kind score-prior`, or write 'prior: uniform'"
        raise CuveeError("'pim' needs a 'prior'", where=said.where, mend=mend)
    if isinstance(item.value, dict) and "beta" in item.value:
        refuse_unknown_keys(item, ("beta",), "'prior'")
        return Prior(betas=_betas(item.value["beta"]), where=item.where)
    if isinstance(item.value, dict):
        named = {name: number_of(share, name, low=0) for name, share in item.value.items()}
        _refuse_empty(named.values(), item)
        return Prior(named=named, where=item.where)
    entries = item.value if isinstance(item.value, list) else [item]
    if not isinstance(item.value, list) and item.text == UNIFORM:
        return Prior(where=item.where)
    if entries and all(isinstance(each.value, int | float) for each in entries):
        shares = tuple(number_of(each, "prior", low=0) for each in entries)
        _refuse_empty(shares, item)
        return Prior(shares=shares, where=item.where)
    return Prior(folders=tuple(_folder(each, near) for each in entries), where=item.where)


def _betas(item: Node) -> tuple[Beta, ...]:
    mend = "write 'beta: [[3.6, 2.7], [2.9, 2.0]]', one (alpha, beta) a source"
    if not isinstance(item.value, list) or not item.value:
        raise CuveeError(f"'beta' must be a list of pairs, not {item}", where=item.where, mend=mend)
    found = []
    for each in item.value if isinstance(item.value[0].value, list) else [item]:
        if not isinstance(each.value, list) or len(each.value) != 2:
            raise CuveeError(f"{each} is no pair (alpha, beta)", where=each.where, mend=mend)
        alpha, beta = (number_of(value, "beta", above=0) for value in each.value)
        found.append((alpha, beta))
    return tuple(found)


def _folder(item: Node, near: Path) -> Path:
    name = text_of(item, "prior")
    found = located(name, near, Path.is_dir)
    if found is None:
        raise CuveeError(f"no such folder '{name}'", where=item.where, mend=looked_for(near))
    return Path(found)


def _refuse_empty(shares: Iterable[float], item: Node) -> None:
    if not sum(shares) > 0:
        raise CuveeError("the shares of 'prior' sum to 0", where=item.where)


def _refuse_unordered(names: Sequence[str], where: str) -> None:
    """The parts of [0, 1] are the scores' in their order."""
    try:
        values = [float(name) for name in names]
    except ValueError:  # words, in the order that was given
        return
    if values != sorted(values):
        raise CuveeError("a Beta prior is of scores in ascending order", where=where, mend="see 'scores'")
