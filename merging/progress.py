"""A bar on standard error with rate and time left, for work that takes longer than a moment."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from merging.execution import Progress

_PATIENCE = 1.5  # seconds of work before a bar appears


@contextmanager
def bytes_bar(label: str) -> Iterator[Progress]:
    """A function to call with (bytes done, bytes in all) from any thread."""
    began, lock = time.monotonic(), threading.Lock()
    bar: Any = None
    task: Any = None

    def update(done: int, total: int) -> None:
        nonlocal bar, task
        if time.monotonic() - began < _PATIENCE:
            return
        with lock:
            if bar is None:
                bar, task = _start(label)
            bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        if bar is not None:
            bar.stop()


def _start(label: str) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
    bar.start()
    return bar, bar.add_task(label, total=None)
