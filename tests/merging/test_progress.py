"""Bars and lines for work that takes longer than a moment: on a terminal and where there is none."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from time import sleep

import pytest

from merging import progress
from merging.progress import Work, work_bars
from tests.commands import environment


class Clock:
    """Stands in for the one that counts real seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    monkeypatch.setattr(progress, "_LOOK_EVERY", 3600.0)  # real seconds
    return made


@pytest.fixture
def told(clock: Clock, capsys: pytest.CaptureFixture[str]) -> Callable[[Callable[[Work], None]], list[str]]:
    def run(work: Callable[[Work], None]) -> list[str]:
        with work_bars() as update:
            work(update)
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()

    return run


def test_what_takes_a_moment_says_nothing(told: Callable[[Callable[[Work], None]], list[str]], clock: Clock) -> None:
    def work(update: Work) -> None:
        update("train 1-40", 0, 10)
        clock.now += 1
        update("train 1-40", 10, 10)

    assert told(work) == []


def test_what_takes_more_than_a_second_each_says_how_many(
    told: Callable[[Callable[[Work], None]], list[str]], clock: Clock
) -> None:
    def work(update: Work) -> None:
        update("trials", 1, 3)
        for done in (2, 3):
            clock.now += 45
            update("trials", done, 3)

    assert told(work) == ["trials: 2/3, 45.0 s each, 45 s left", "trials: 3/3 in 90.0 s, 45.0 s each"]


def test_a_line_every_ten_seconds_and_one_that_stays(
    told: Callable[[Callable[[Work], None]], list[str]], clock: Clock
) -> None:
    def work(update: Work) -> None:
        for step in range(25):
            update("train 1-40", step, 25)
            clock.now += 1
        update("train 1-40", 25, 25)

    assert told(work) == [
        "train 1-40: 10/25, 1.0/s, 15 s left",
        "train 1-40: 20/25, 1.0/s, 5 s left",
        "train 1-40: 25/25 in 25.0 s, 1.0/s",
    ]


def test_a_resumed_pieces_rate_is_that_of_what_it_did_itself(
    told: Callable[[Callable[[Work], None]], list[str]], clock: Clock
) -> None:
    def work(update: Work) -> None:
        for step in range(980, 1000):
            update("train", step, 1000)
            clock.now += 1
        update("train", 1000, 1000)

    assert told(work) == ["train: 990/1000, 1.0/s, 10 s left", "train: 1000/1000 in 20.0 s, 1.0/s"]


def test_an_unknown_total_has_no_time_left(told: Callable[[Callable[[Work], None]], list[str]], clock: Clock) -> None:
    def work(update: Work) -> None:
        for done in (0, 500):
            update("read faq", done, 0)
            clock.now += 10
        update("read faq", 700, 700)

    assert told(work) == ["read faq: 500/?", "read faq: 700/700 in 20.0 s, 35.0/s"]


def test_pieces_side_by_side_and_the_same_name_again(
    told: Callable[[Callable[[Work], None]], list[str]], clock: Clock
) -> None:
    def work(update: Work) -> None:
        update("a", 0, 2)
        update("b", 0, 4)
        clock.now += 2
        update("a", 2, 2)
        update("a", 0, 2)  # begins anew
        clock.now += 2
        update("b", 4, 4)
        update("a", 2, 2)

    assert told(work) == ["a: 2/2 in 2.0 s, 1.0/s", "b: 4/4 in 4.0 s, 1.0/s", "a: 2/2 in 2.0 s, 1.0/s"]


def test_a_first_step_that_takes_long_is_told_of_while_it_is_at_work(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LOOK_EVERY", 0.001)
    shown = ""
    with work_bars() as update:
        update("trials", 0, 3)
        clock.now += 12
        for _ in range(20_000):
            shown = shown or capsys.readouterr().err
            if shown:
                break
            sleep(0.001)
        update("trials", 3, 3)
    assert shown == "trials: 0/3, 12 s so far\n"


def test_an_error_goes_through(clock: Clock) -> None:
    with pytest.raises(ValueError, match="broken"), work_bars() as update:
        update("a", 0, 2)
        raise ValueError("broken")


_SCRIPT = """
import time
from merging.progress import work_bars
with work_bars() as update:
    for step in range(30):
        update("train [1-40]", 70 + step, 100)
        time.sleep(0.1)
    update("train [1-40]", 100, 100)
"""


_ONE_LONG_STEP = """
import time
from merging.progress import work_bars
with work_bars() as update:
    update("trials", 0, 2)
    time.sleep(2.6)
    update("trials", 2, 2)
"""


@pytest.mark.parametrize(
    ("script", "bar", "line"),
    [
        (_SCRIPT, r"train \[1-40\].*━.*\d+/100", r"train \[1-40\]: 100/100 in \d+\.\d s, \d+\.\d/s"),
        (_ONE_LONG_STEP, r"trials.*━.*0/2 \d s so far", r"trials: 2/2 in \d+\.\d s, \d+\.\d s each"),
    ],
)
def test_on_a_terminal_there_is_a_bar_and_then_a_line(script: str, bar: str, line: str) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", script], env={**environment(), "TERM": "xterm"}, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # its end
        pass
    finally:
        os.close(ours)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(bar, text), text
    assert re.search(line, text), text
