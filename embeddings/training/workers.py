"""Trainings side by side, each in a process of its own or in several: shares of the cores, or GPUs of their own."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embeddings.training.disk import disk_errors
from embeddings.training.team import LostError, join
from merging.errors import CuveeError
from merging.processes import default_threads, die_with_parent, own_gpu

if TYPE_CHECKING:
    from embeddings.training.options import Options
    from merging.progress import Note, Work

_LAST_WORDS = 10.0  # seconds in which the run hears why a process ended, before others tell that they miss it


@dataclass(frozen=True)
class Task:
    """A training; can be sent to another process.

    Attributes:
        train: called in each of its processes, with the options of that one, its bar, and who is told what happens.
    """

    name: str
    train: Callable[[Options, Work, Note], object]


def train_side_by_side(
    tasks: Sequence[Task], run: Path, options: Options, progress: Work, note: Note = lambda line: None
) -> None:
    """Carries the tasks out, so many at a time as there are workers, each in so many processes.

    Raises:
        CuveeError: of the first process that fails; the others are stopped, and go on from their checkpoints next time.
    """
    context = multiprocessing.get_context("spawn")
    workers = min(options.workers, len(tasks))
    threads = _threads(workers * options.processes)
    waiting, running = list(tasks), dict[Connection, tuple[SpawnProcess, int]]()
    with tempfile.TemporaryDirectory() as meetings:
        try:
            while waiting or running:
                busy = {slot for _, slot in running.values()}
                for slot in [slot for slot in range(workers) if slot not in busy][: len(waiting)]:
                    task = waiting.pop(0)
                    for rank in range(options.processes):
                        ours, theirs = context.Pipe(duplex=False)
                        settings = replace(options, device=own_gpu(options.device, slot * options.processes + rank))
                        place = _Place(rank, f"file://{meetings}/{task.name}", threads)
                        arguments = (task, run, settings, place, theirs)
                        process = context.Process(target=_work, name=task.name, args=arguments)
                        process.start()
                        theirs.close()
                        running[ours] = process, slot
                for ready in wait(list(running)):
                    assert isinstance(ready, Connection)
                    _hear(ready, running, progress, note)
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.join()


def _hear(ready: Connection, running: dict[Connection, tuple[SpawnProcess, int]], progress: Work, note: Note) -> None:
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
    if isinstance(message, str):
        note(message)
    else:
        progress(*message)


def _threads(processes: int) -> int:
    """Of each process: its share of the cores, and no more than the user allows one process."""
    import torch

    return max(1, min(int(torch.get_num_threads()), default_threads() // processes))


@dataclass(frozen=True)
class _Place:
    """One process among those that carry out a task.

    Attributes:
        meeting: a URL where they find each other.
    """

    rank: int
    meeting: str
    threads: int


def _work(task: Task, run: Path, options: Options, place: _Place, report: Any) -> None:
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

    try:
        with disk_errors(run), only_our_words():
            if options.processes > 1:
                team = join(place.rank, options.processes, options.device, place.meeting)
                options = replace(options, team=team)
            task.train(options, progress, report.send if not place.rank else lambda line: None)
            options.team.leave()
    except LostError as error:
        time.sleep(_LAST_WORDS)  # the lost one's own are the better ones
        report.send(error)
    except CuveeError as error:
        report.send(error)
    finally:
        report.close()
