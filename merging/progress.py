"""A bar on standard error with rate and time left, for work that takes longer than a moment."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

#: Called with what is done and what there is in all, from any thread.
Progress: TypeAlias = Callable[[int, int], None]

_PATIENCE = 1.5  # seconds of work before a bar appears
_LINE_EVERY = 10.0  # seconds, where there is no terminal for a bar
_LOOK_EVERY = 0.5  # seconds between looks at pieces whose first step is not done yet


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


class Work(Protocol):
    """Called with what is being done, how much of it is done, and how much there is; 0: nobody knows."""

    def __call__(self, what: str, done: int, total: int, /) -> None: ...


#: Told a line for the user.
Note: TypeAlias = Callable[[str], None]


@contextmanager
def work_bars() -> Iterator[Work]:
    """A function to tell of steps done, of several pieces of work one after another or side by side.

    On a terminal each has a bar with rate and time left; elsewhere a line every ten seconds, also while its first step is
    at work. Of each that took more than a moment one line stays.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    rate = TextColumn("{task.fields[rate]}")
    bar = Progress(
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()),
        console=console,
        transient=True,
    )
    works: dict[str, _Piece] = {}
    lock, over = threading.Lock(), threading.Event()

    def show(what: str, piece: _Piece, done: int, total: int, now: float) -> None:
        if console.is_terminal and now - piece.began >= _PATIENCE:
            if piece.task is None:
                bar.start()
                piece.task = bar.add_task(what, total=None, completed=done, rate="")
            rate = piece.rate(done, now) or piece.so_far(now)
            bar.update(piece.task, completed=done, total=total or None, rate=rate)
        elif not console.is_terminal and now - piece.told >= _LINE_EVERY:
            piece.told = now
            left = piece.left(done, total, now) or f", {piece.so_far(now)}" * (done == piece.before)
            _line(f"{what}: {done}/{total or '?'}{left}")

    def look() -> None:
        while not over.wait(_LOOK_EVERY):
            with lock:
                for what, piece in works.items():
                    if not piece.moved:
                        show(what, piece, piece.before, piece.total, time.monotonic())

    def update(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        with lock:
            piece = works.setdefault(what, _Piece(now, now, done, total))
            piece.moved = piece.moved or done != piece.before
            finished = bool(total) and done >= total
            if not finished:
                show(what, piece, done, total, now)
            else:
                del works[what]
                if piece.task is not None:
                    bar.remove_task(piece.task)
                if now - piece.began >= _PATIENCE:
                    spent = f"{now - piece.began:.1f} s, {piece.rate(done, now)}"
                    line = f"{what}: {done}/{total} in {spent}"
                    if console.is_terminal:
                        bar.console.print(line, markup=False, highlight=False)
                    else:
                        _line(line)

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    try:
        yield update
    finally:
        over.set()
        watch.join()
        if bar.live.is_started:  # what never began ends with an empty line where there is no terminal
            bar.stop()


@dataclass
class _Piece:
    """A piece of work: when it began and was last told of, how much was done before and how much there is, its bar."""

    began: float
    told: float
    before: int = 0
    total: int = 0
    moved: bool = False
    task: Any = None

    def so_far(self, now: float) -> str:
        return f"{now - self.began:.0f} s so far"

    def rate(self, done: int, now: float) -> str:
        spent, new = now - self.began, done - self.before
        if spent <= 0 or new <= 0:
            return ""
        return f"{new / spent:.1f}/s" if new >= spent else f"{spent / new:.1f} s each"

    def left(self, done: int, total: int, now: float) -> str:
        new = done - self.before
        if new <= 0 or not total:
            return ""
        return f", {self.rate(done, now)}, {(now - self.began) / new * (total - done):.0f} s left"


def _line(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
