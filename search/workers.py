"""Trials side by side: processes of their own that share a study, each on its share of the cores, or on a GPU of its own."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from merging.errors import CuveeError
from merging.processes import default_threads, die_with_parent, own_gpu
from search import config as search_config
from search.candidates import Candidates
from search.choose import Trial
from search.config import SearchConfig
from search.study import Settings, open_study, storage_failures_told, work


@dataclass(frozen=True)
class Job:
    """What a worker is told; the configuration travels as its text.

    Attributes:
        orphans: numbers of trials that an earlier run left, for this worker.
    """

    text: str
    where: str
    storage: str
    settings: Settings
    folder: Path
    scratch: Path
    device: str
    threads: int
    orphans: tuple[int, ...]


def search_side_by_side(
    config: SearchConfig,
    settings: Settings,
    folder: Path,
    scratch: Path,
    orphans: Sequence[int],
    *,
    device: str,
    told: Callable[[Trial], None],
) -> None:
    """Lets `settings.workers` processes evaluate trials until the study ends.

    Raises:
        CuveeError: of the first worker that fails; the others are stopped, and what they were at is evaluated next time.
    """
    context = multiprocessing.get_context("spawn")
    count = settings.workers
    processes: list[SpawnProcess] = []
    at_work: dict[Connection, SpawnProcess] = {}  # by the end that we read
    try:
        for i in range(count):
            ours, theirs = context.Pipe(duplex=False)
            job = Job(
                text=config.text,
                where=config.where,
                storage=config.storage,
                settings=settings,
                folder=folder,
                scratch=scratch / str(i),
                device=own_gpu(device, i),
                threads=max(1, default_threads() // count),
                orphans=tuple(orphans[i::count]),
            )
            process = context.Process(target=_work, args=(job, theirs))
            process.start()
            theirs.close()
            processes.append(process)
            at_work[ours] = process
        while at_work:
            for ready in wait(list(at_work)):
                assert isinstance(ready, Connection)
                try:
                    message = ready.recv()
                except EOFError:
                    _refuse_broken(at_work.pop(ready), folder)  # at once: others may wait for what it was at
                    continue
                if isinstance(message, CuveeError):
                    raise message
                told(message)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _refuse_broken(process: SpawnProcess, folder: Path) -> None:
    process.join()
    if process.exitcode:
        mend = "start the same command again: it goes on"
        raise CuveeError(f"a worker ended with status {process.exitcode}", where=str(folder), mend=mend)


def _work(job: Job, report: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the search that is interrupted ends its workers
    die_with_parent()
    try:
        config = search_config.parse(job.text, job.where)
        study = open_study(job.settings, job.folder, job.storage, job.where)
        evaluate = Candidates(config, job.folder, job.scratch, device=job.device, threads=job.threads)
        with storage_failures_told(job.folder):
            work(study, evaluate, orphans=job.orphans, told=report.send)
    except CuveeError as error:
        report.send(CuveeError(error.what, where=error.where, mend=error.mend))
    finally:
        report.close()
