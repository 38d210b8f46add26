"""Members trained side by side, each in a process of its own or in several: shares of the cores, or GPUs of their own."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embeddings.training.config import TrainingConfig
from embeddings.training.disk import disk_errors
from embeddings.training.team import LostError, join
from merging.engine import default_threads
from merging.errors import CuveeError
from merging.processes import die_with_parent, own_gpu

if TYPE_CHECKING:
    from embeddings.training.options import Options
    from embeddings.training.train import Job
    from merging.progress import Work

_LAST_WORDS = 10.0  # seconds in which the run hears why a process ended, before others tell that they miss it


def train_side_by_side(
    config: TrainingConfig, run: Path, jobs: Sequence[Job], options: Options, progress: Work
) -> None:
    """Trains the jobs, so many at a time as there are workers, each in so many processes.

    Raises:
        CuveeError: of the first process that fails; the others are stopped, and go on from their checkpoints next time.
    """
    context = multiprocessing.get_context("spawn")
    workers = min(options.workers, len(jobs))
    threads = _threads(workers * options.processes)
    waiting, running = list(jobs), dict[Connection, tuple[SpawnProcess, int]]()
    with tempfile.TemporaryDirectory() as meetings:
        try:
            while waiting or running:
                busy = {slot for _, slot in running.values()}
                for slot in [slot for slot in range(workers) if slot not in busy][: len(waiting)]:
                    job = waiting.pop(0)
                    for rank in range(options.processes):
                        ours, theirs = context.Pipe(duplex=False)
                        settings = replace(options, device=own_gpu(options.device, slot * options.processes + rank))
                        place = _Place(rank, f"file://{meetings}/{job.name}", threads)
                        arguments = (config, run, job, settings, place, theirs)
                        process = context.Process(target=_work, name=job.name, args=arguments)
                        process.start()
                        theirs.close()
                        running[ours] = process, slot
                for ready in wait(list(running)):
                    assert isinstance(ready, Connection)
                    _hear(ready, running, progress)
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.join()


def _hear(ready: Connection, running: dict[Connection, tuple[SpawnProcess, int]], progress: Work) -> None:
    """One message of a process, or its end."""
    try:
        message = ready.recv()
    except EOFError:
        process, _ = running.pop(ready)
        process.join()
        if process.exitcode:
            mend = "train it again: it goes on from its checkpoint"
            what = f"the worker ended with status {process.exitcode}"
            raise CuveeError(what, where=process.name, mend=mend) from None
        return
    if isinstance(message, CuveeError):
        raise message
    progress(*message)


def _threads(processes: int) -> int:
    """Of each process: its share of the cores, and no more than the user allows one process."""
    import torch

    return max(1, min(int(torch.get_num_threads()), default_threads() // processes))


@dataclass(frozen=True)
class _Place:
    """One process among those that train a member.

    Attributes:
        meeting: a URL where they find each other.
    """

    rank: int
    meeting: str
    threads: int


def _work(config: TrainingConfig, run: Path, job: Job, options: Options, place: _Place, report: Any) -> None:
    from embeddings.training import members
    from merging.loading import only_our_words, wait_passively

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run that is interrupted ends its workers
    die_with_parent()
    wait_passively()
    import torch

    torch.set_num_threads(place.threads)
    told = [0.0]

    def progress(what: str, done: int, total: int) -> None:
        if not place.rank and (done >= total or time.monotonic() - told[0] > 1):
            told[0] = time.monotonic()
            report.send((what, done, total))

    def silent(*_: Any) -> None:
        return None

    try:
        with disk_errors(run), only_our_words():
            sets = members.read_sets(
                config, run, replace(options, force=False), silent, silent
            )  # what the run has read
            if options.processes > 1:
                team = join(place.rank, options.processes, options.device, place.meeting)
                options = replace(options, team=team)
            members.train_member(config, sets, job, options, progress, run)
            options.team.leave()
    except LostError as error:
        time.sleep(_LAST_WORDS)  # the lost one's own are the better ones
        report.send(error)
    except CuveeError as error:
        report.send(error)
    finally:
        report.close()
