"""Statistics of a model on a few texts: which of its weights matter, and what its linear layers read."""

from merging.statistics.collect import collect
from merging.statistics.folder import (
    KINDS,
    Statistics,
    StatsError,
    combine,
    open_statistics,
    write_statistics,
)

__all__ = [
    "KINDS",
    "Statistics",
    "StatsError",
    "collect",
    "combine",
    "open_statistics",
    "write_statistics",
]
