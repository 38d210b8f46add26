"""Team: processes that train one model together, each on its share of every batch's texts.

Each has the whole model and computes the loss over all of the batch, as one process would; it embeds its own texts only,
and learns from these. Embeddings and gradients are exchanged, both as sums. That is torch.distributed by itself: what
wraps the model (accelerate, DistributedDataParallel) adds gradients up in each backward pass, of which a gradient cache
has one a chunk, and gathers batches that are of one size. Jobs that `accelerate launch` or `torchrun` start are joined.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from merging.errors import CuveeError

if TYPE_CHECKING:
    import torch

_Value = TypeVar("_Value")

#: Numbers that are added up at once: small tensors cost a message each.
_BUCKET = 1 << 22
#: The others wait while the first evaluates or writes; that one of them has died is seen by whoever started them.
_PATIENCE = timedelta(days=30)
#: Until all are there.
_MEETING = timedelta(minutes=10)


class LostError(CuveeError):
    """Another process of the team is gone."""


@dataclass(frozen=True)
class Team:
    """What one process knows of all.

    Attributes:
        rank: its number; 0 alone writes, evaluates and tells.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def share(self, costs: Sequence[int]) -> list[int]:
        """The numbers of the pieces of work that are this process's, ascending: the dearest first to who has least."""
        loads = [0] * self.size
        own = []
        for piece in sorted(range(len(costs)), key=lambda number: -costs[number]):
            rank = loads.index(min(loads))
            loads[rank] += costs[piece]
            if rank == self.rank:
                own.append(piece)
        return sorted(own)

    def add_up(self, values: torch.Tensor) -> None:
        """Replaces the values by their sum over the processes; the same bits in each."""
        if self.size > 1:
            import torch

            with _told_if_lost():
                torch.distributed.all_reduce(values)

    def add_up_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replaces each `.grad` by its sum over the processes; where none has one, there is none."""
        if self.size == 1:
            return
        import torch

        device = parameters[0].device
        has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32, device=device)
        self.add_up(has)
        small: list[torch.Tensor] = []
        for parameter, count in zip(parameters, has.tolist(), strict=True):
            if not count:
                continue
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = gradient = gradient.contiguous()
            if gradient.numel() >= _BUCKET:
                self.add_up(gradient)
                continue
            small.append(gradient)
            if sum(each.numel() for each in small) >= _BUCKET:
                self._add_up_together(small)
                small = []
        self._add_up_together(small)

    def _add_up_together(self, gradients: Sequence[torch.Tensor]) -> None:
        import torch

        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self.add_up(flat)
            for gradient, total in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def told(self, value: _Value) -> _Value:
        """What the first process calls it with; the others wait for it."""
        if self.size == 1:
            return value
        import torch

        box = [value]
        with _told_if_lost():
            torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gathered(self, value: _Value) -> list[_Value]:
        """What each process calls it with, in the order of their ranks."""
        if self.size == 1:
            return [value]
        import torch

        found: list[Any] = [None] * self.size
        with _told_if_lost():
            torch.distributed.all_gather_object(found, value)
        return found

    def leave(self) -> None:
        """To call by each process when there is nothing more to exchange."""
        if self.size > 1:
            import torch

            torch.distributed.destroy_process_group()


#: One process by itself.
ALONE = Team()


def join(rank: int, size: int, device: str, meeting: str) -> Team:
    """Waits until all are there.

    Args:
        device: this process's own.
        meeting: where they find each other: a URL as torch.distributed takes it.
    """
    import torch

    if device != "cpu":
        torch.cuda.set_device(device)
    if meeting.startswith("file:"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all on one machine: nothing listens to others
    with _told_if_lost():
        store, _, _ = next(iter(torch.distributed.rendezvous(meeting, rank, size, timeout=_MEETING)))
        store.set_timeout(_MEETING)
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    return Team(rank, size)


def is_launched() -> bool:
    """Whether `torchrun` or `accelerate launch` started this process as one of several."""
    return all(name in os.environ for name in ("RANK", "MASTER_ADDR")) and int(os.environ.get("WORLD_SIZE", 1)) > 1


def join_launched(device: str) -> tuple[Team, str]:
    """The team of a launched process, and its device: "cuda" becomes a GPU of its own.

    Raises:
        CuveeError: the device cannot be used.
    """
    from merging.loading import check_device

    if device not in ("cpu", "cuda"):
        what = f"the processes that were launched do not fit on one {device}"
        raise CuveeError(what, where="--device", mend="choose cuda")
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
    check_device(own)
    return join(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), own, "env://"), own


@contextmanager
def _told_if_lost() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        with suppress(RuntimeError, AssertionError):
            torch.distributed.destroy_process_group()  # its threads would abort the process that ends with them at work
        reason = str(error).splitlines()[0][:120]
        mend = "train again: it goes on from the last checkpoint"
        raise LostError(f"lost the other processes: {reason}", where="--processes", mend=mend) from error
