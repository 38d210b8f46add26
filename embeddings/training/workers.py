"""Members trained side by side: processes of their own, each on its share of the cores, or on a GPU of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embeddings.training.config import TrainingConfig
from embeddings.training.disk import disk_errors
from merging.engine import default_threads
from merging.errors import CuveeError

if TYPE_CHECKING:
    from embeddings.training.bag import Options
    from merging.progress import Work


def train_side_by_side(
    config: TrainingConfig, run: Path, names: Sequence[str], options: Options, progress: Work
) -> None:
    """Trains the members named, so many at a time as there are workers.

    Raises:
        CuveeError: of the first member that fails; the others are stopped, and go on from their checkpoints next time.
    """
    context = multiprocessing.get_context("spawn")
    workers = min(options.workers, len(names))
    threads = _threads(workers)
    waiting, running = list(names), dict[Connection, tuple[SpawnProcess, int]]()
    free = list(range(workers))
    try:
        while waiting or running:
            while waiting and free:
                slot, name = free.pop(0), waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                settings = replace(options, workers=1, device=_device(options.device, slot))
                process = context.Process(target=_work, name=name, args=(config, run, name, settings, threads, theirs))
                process.start()
                theirs.close()
                running[ours] = process, slot
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                try:
                    message = ready.recv()
                except EOFError:
                    process, slot = running.pop(ready)
                    process.join()
                    free.append(slot)
                    if process.exitcode:
                        mend = "train it again: it goes on from its checkpoint"
                        what = f"the worker ended with status {process.exitcode}"
                        raise CuveeError(what, where=process.name, mend=mend) from None
                    continue
                if isinstance(message, CuveeError):
                    raise message
                progress(*message)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


def _device(device: str, slot: int) -> str:
    """A GPU for each worker."""
    if device != "cuda":
        return device
    import torch

    return f"cuda:{slot % max(1, torch.cuda.device_count())}"


def _threads(workers: int) -> int:
    """Of each worker: its share of the cores, and no more than the user allows one process."""
    import torch

    return max(1, min(int(torch.get_num_threads()), default_threads() // workers))


def _die_with_parent() -> None:
    """A worker that goes on after its run was killed would get in the way of the next."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(config: TrainingConfig, run: Path, name: str, options: Options, threads: int, report: Any) -> None:
    from embeddings.training import bag
    from merging.loading import only_our_words, wait_passively

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run that is interrupted ends its workers
    _die_with_parent()
    wait_passively()
    import torch

    torch.set_num_threads(threads)
    told = [0.0]

    def progress(what: str, done: int, total: int) -> None:
        if done >= total or time.monotonic() - told[0] > 1:
            told[0] = time.monotonic()
            report.send((what, done, total))

    def silent(*_: Any) -> None:
        return None

    try:
        with disk_errors(run), only_our_words():
            sets = bag.read_sets(config, run, replace(options, force=False), silent, silent)  # what the run has read
            job = bag.jobs_by_name(config, sets, run)[name]
            bag.train_member(config, sets, job, options, progress, run)
    except CuveeError as error:
        report.send(error)
    finally:
        report.close()
