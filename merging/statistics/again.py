"""The Fisher information of one network on the same examples, as often as its weights change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from merging.progress import Note
from merging.statistics.calibration import draw
from merging.statistics.fisher_job import fisher_job
from merging.statistics.job import micro_batches
from merging.statistics.network import Network

if TYPE_CHECKING:
    from torch import Tensor


class FisherAgain:
    """What `cuvee stats --kind fisher` finds of the weights that the network has now; nothing is written.

    The examples are drawn and tokenised once, and once it is checked of which parameters one backward serves a whole
    micro-batch.

    Args:
        network: whose weights change.
        data, examples, seed, batch_size, columns, temperature, candidates: as `collect` takes them.
        note: takes lines for the log.

    Raises:
        CuveeError: as `collect`.
    """

    def __init__(
        self,
        network: Network,
        data: str | Path,
        *,
        examples: int = 128,
        seed: int = 0,
        batch_size: int | None = None,
        columns: Mapping[str, str] | None = None,
        temperature: float = 0.05,
        candidates: int = 8,
        note: Note = lambda line: None,
    ) -> None:
        complete = network.head == "embedding"
        calibration = draw([data], examples, seed=seed, columns=columns, candidates=candidates, complete=complete)
        settings = {"temperature": temperature} if complete else {}
        self._network = network
        self._job = job = fisher_job(network, calibration, settings, seed, batch_size, note)
        self._plan = micro_batches(job.lengths, job.rows, job.tokens, job.batch_size)
        self._state: dict[str, list[str]] = {}

    def __call__(self) -> dict[str, Tensor]:
        """By stored name, float32 on the network's device, in the shape of the weight."""
        with self._job.open(self._state) as fisher:
            for items in self._plan:
                fisher.add(self._job.batch(items))
            self._state = {"alone": sorted(fisher.alone)}
            return self._network.stored(fisher.mean())
