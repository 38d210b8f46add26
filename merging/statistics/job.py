"""Job: the work of one kind of statistics, in micro-batches of like length, saved on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merging.progress import Note, Work
from merging.statistics.calibration import Example
from merging.statistics.network import Network
from merging.statistics.resume import Partial, interrupts
from merging.statistics.tokens import Tokens


@dataclass(frozen=True)
class Found:
    """Statistics by the stored name of a weight: the values, input rows and the axis they run over; see `folder`."""

    tensors: Mapping[str, NDArray[np.float32]]
    rows: Mapping[str, int] = field(default_factory=dict)
    axes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What is done for one kind: the items that micro-batches are made of, and what adds them up.

    Attributes:
        what: for the bar.
        lengths: of each item's longest row, in tokens.
        rows: of each item.
        tokens: of a micro-batch at most, unless `batch_size` says how many items.
        parameters: values to be found.
        open: gives what adds up, to be entered; with the state of an earlier run's, where there is one.
        batch: makes a micro-batch of some items.
        finish: gives what was found.
    """

    what: str
    lengths: Sequence[int]
    rows: Sequence[int]
    tokens: int
    batch_size: int | None
    parameters: int
    open: Callable[[Mapping[str, Any]], Any]
    batch: Callable[[Sequence[int]], Any]
    finish: Callable[[Any], Found]

    def run(self, partial: Partial, progress: Work, note: Note) -> Found:
        from merging.statistics.inputs import Ragged

        saved = partial.load()
        state: dict[str, Any] = {"done": 0, "equal": False} if saved is None else dict(saved[0])
        if saved is not None:
            note(f"goes on from {partial.folder}")
        while True:
            with ExitStack() as stack:
                sums = stack.enter_context(self.open(state))
                if saved is not None:
                    sums.load(saved[1])
                try:
                    self._add_all(sums, state, partial, progress)
                except Ragged:  # what was added up is of no use
                    note("a layer reads its rows in another order than the texts have: batches without padding")
                    state, saved = {"done": 0, "equal": True}, None
                    continue
                return self.finish(sums)

    def _add_all(self, sums: Any, state: dict[str, Any], partial: Partial, progress: Work) -> None:
        plan = micro_batches(self.lengths, self.rows, self.tokens, self.batch_size, equal=state["equal"])
        total = len(self.lengths)
        done = sum(map(len, plan[: state["done"]]))
        with interrupts() as interrupted:
            progress(self.what, done, total)
            for number, items in enumerate(plan[state["done"] :], start=state["done"] + 1):
                sums.add(self.batch(items))
                done += len(items)
                progress(self.what, done, total)
                state["done"] = number
                if number < len(plan) and (interrupted.is_set() or partial.due):
                    partial.save({**state, **_alone(sums)}, sums.state())
                if interrupted.is_set():
                    raise KeyboardInterrupt


def micro_batches(
    lengths: Sequence[int], rows: Sequence[int], tokens: int, batch_size: int | None = None, *, equal: bool = False
) -> list[list[int]]:
    """Places of items in micro-batches of like length, the longest first: what does not fit shows at once.

    Args:
        lengths: tokens of each item's longest row. rows: of each item.
        tokens: of a micro-batch at most, padding too; an item that has more is alone.
        batch_size: items at most; instead of `tokens`.
        equal: only items of one length go together.
    """
    found: list[list[int]] = []
    width = size = 0
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        full = len(found[-1]) >= batch_size if found and batch_size else (size + rows[place]) * width > tokens
        if not found or full or (equal and lengths[place] != width):
            found.append([])
            width, size = lengths[place], 0
        found[-1].append(place)
        size += rows[place]
    return found


def text_tokens(network: Network, examples: Sequence[Example], seed: int) -> list[Tokens]:
    """A text or pair an example; of several candidates one is drawn."""

    def text(example: Example) -> str | tuple[str, ...]:
        if not example.candidates:
            return example.query
        drawn = int(np.random.default_rng([seed, 2, example.row]).integers(len(example.candidates)))
        return (example.query, example.candidates[drawn])

    return network.read([text(each) for each in examples], None, [each.image for each in examples])


def _alone(sums: Any) -> dict[str, Any]:
    return {"alone": sorted(sums.alone)} if hasattr(sums, "alone") else {}
