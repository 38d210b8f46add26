"""MiningSettings: how hard negatives are found, as the `mine:` of a data set says it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from merging.errors import CuveeError
from merging.fields import choice, given, mapping, number, number_of
from merging.node import Node
from merging.setting import refuse_unknown_keys


@dataclass(frozen=True)
class MiningSettings:
    """Hard negatives, found by `sentence_transformers.util.mine_hard_negatives`, whose names these are.

    Attributes:
        negatives: a row's at most; rows for which fewer are found keep those.
        range_min, range_max: ranks of the nearest documents to choose from.
        relative_margin: a negative's similarity is at least this share of the positive's below it.
        sampling: "top" or "random".
    """

    negatives: int = 5
    range_min: int = 0
    range_max: int | None = None
    max_score: float | None = None
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = 0.05
    sampling: str = "top"
    batch_size: int = 32


def mining_settings(node: Node, type_: str) -> MiningSettings | None:
    """The `mine` of a data set of a type; None where it is absent.

    Raises:
        CuveeError: at the line of the first mistake.
    """
    mine = mapping(node, "mine", "{negatives: 5}")
    if mine is None:
        return None
    if type_ not in ("Retrieval", "Reranking", "BitextMining"):
        mend = "remove it: it is for queries with positives"
        raise CuveeError(f"hard negatives are not mined for {type_}", where=mine.where, mend=mend)
    refuse_unknown_keys(mine, [each.name for each in fields(MiningSettings)], "'mine'")
    found = MiningSettings(
        negatives=number(mine, "negatives", MiningSettings.negatives, low=1, whole=True),
        range_min=number(mine, "range_min", 0, low=0, whole=True),
        range_max=number(mine, "range_max", None, low=1, whole=True),
        max_score=number(mine, "max_score", None, low=-1, high=1),
        min_score=number(mine, "min_score", None, low=-1, high=1),
        absolute_margin=number(mine, "absolute_margin", None, low=0, high=2),
        relative_margin=_margin(mine),
        sampling=choice(mine, "sampling", ("top", "random"), MiningSettings.sampling),
        batch_size=number(mine, "batch_size", MiningSettings.batch_size, low=1, whole=True),
    )
    if found.range_max is not None and found.range_max - found.range_min < found.negatives:
        what = f"ranks {found.range_min} to {found.range_max} leave fewer than {found.negatives} to choose from"
        raise CuveeError(what, where=mine.where, mend="raise 'range_max'")
    return found


def _margin(mine: Node) -> float | None:
    node = mine.value.get("relative_margin")
    if node is None:
        return None if given(mine, "absolute_margin") else MiningSettings.relative_margin
    return None if node.value is None else number_of(node, "relative_margin", low=0, high=1)
