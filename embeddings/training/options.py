"""Options: how a training run is carried out, by which devices and how many processes."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from embeddings.training.team import ALONE, Team
from merging.errors import CuveeError
from merging.loading import check_device


@dataclass(frozen=True)
class Options:
    """How a run is carried out; none of it changes what comes out but for rounding and, with `processes`, what is drawn for
    dropout and masks.

    With another number of threads a sum has another order: workers give the bytes of one process where each has as many
    threads as that would have, as with OMP_NUM_THREADS=1.

    Attributes:
        workers: members trained side by side, each on its share of the cores, or on a GPU of its own; of Ray 0 for as
            many as the cluster takes.
        force: make again what is there.
        logs: "tensorboard", "wandb".
        processes: that train each member together, each with its share of the cores, or a GPU of its own.
        ray: the workers are tasks of a Ray cluster.
        team: that this process was launched into; its first process does all that is not training.
    """

    device: str = "cpu"
    workers: int = 1
    force: bool = False
    logs: tuple[str, ...] = ()
    processes: int = 1
    ray: bool = False
    team: Team = ALONE


def refuse_device(options: Options) -> None:
    """Looks whether it can be done here, before any data is read.

    Raises:
        CuveeError: a device that cannot be used, too few of them, Ray is missing, or ways that exclude each other.
    """
    each = options.processes > 1 or options.team.size > 1
    if each and options.ray:
        mend = "leave one of them out"
        raise CuveeError("does not go together with --workers ray", where="--processes", mend=mend)
    if options.team.size > 1 and (options.processes > 1 or options.workers > 1):
        mend = "leave --workers and --processes out"
        raise CuveeError("the processes were launched already", where=f"{options.team.size} processes", mend=mend)
    if options.processes > 1 and options.device not in ("cpu", "cuda"):
        what = f"{options.processes} processes do not fit on one {options.device}"
        raise CuveeError(what, where="--processes", mend="choose --device cuda")
    if options.ray:
        if find_spec("ray") is None:
            raise CuveeError("Ray is not installed", where="--workers", mend="pip install 'cuvee[ray]'")
        return  # the devices are elsewhere
    check_device(options.device)
    wanted = options.processes * options.workers
    if options.device == "cuda" and options.processes > 1 and wanted > (there := _gpus()):
        what = f"{wanted} processes want a GPU each, and there {'is' if there == 1 else 'are'} {there}"
        raise CuveeError(what, where="--processes", mend="lower --processes or --workers")


def _gpus() -> int:
    import torch

    return int(torch.cuda.device_count())
