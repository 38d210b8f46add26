"""Tasks carried out by Ray: each on whatever machine of the cluster has room. They share the run's folder and cuvee."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.errors import CuveeError

if TYPE_CHECKING:
    from embeddings.training.options import Options
    from embeddings.training.workers import Task
    from merging.progress import Work


def train_by_ray(tasks: Sequence[Task], run: Path, options: Options, progress: Work) -> None:
    """As `workers.train_side_by_side`, on the cluster that `ray.init` finds (RAY_ADDRESS, else one of this machine's own).

    A task takes a GPU where the device is "cuda", else as many cores as this process has threads; one that its machine
    loses is begun again elsewhere, from its checkpoint.

    Raises:
        CuveeError: of the first task that fails; the others are stopped.
    """
    import ray
    import torch

    began = not ray.is_initialized()
    if began:
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    threads = int(torch.get_num_threads())
    gpus = int(options.device.startswith("cuda"))
    remote = ray.remote(num_cpus=1 if gpus else threads, num_gpus=gpus, max_retries=2)(_carry_out)
    settings = replace(options, ray=False, workers=1, device="cuda" if gpus else "cpu")
    waiting: list[Task] = list(tasks)
    running: list[Any] = []
    try:
        while waiting or running:
            while waiting and len(running) < (options.workers or len(tasks)):
                running.append(remote.remote(waiting.pop(0), run, settings, threads))
            (done,), running = ray.wait(running)
            try:
                error = ray.get(done)
            except ray.exceptions.RayError as lost:
                reason = str(lost).strip().splitlines()[-1][:200]
                mend = "train again: finished members are kept, the others go on from their checkpoints"
                raise CuveeError(f"a task of Ray failed: {reason}", where="--workers", mend=mend) from lost
            if error is not None:
                raise error
            progress("members by Ray", len(tasks) - len(waiting) - len(running), len(tasks))
    finally:
        for one in running:
            ray.cancel(one, force=True)
        if began:
            ray.shutdown()


def _carry_out(task: Task, run: Path, options: Options, threads: int) -> CuveeError | None:
    import torch

    from embeddings.training.disk import disk_errors
    from merging.loading import only_our_words

    torch.set_num_threads(threads)
    try:
        with disk_errors(run), only_our_words():
            task.train(options, lambda *_: None, lambda line: None)
    except CuveeError as error:
        return error
    return None
