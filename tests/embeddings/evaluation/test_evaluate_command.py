"""`cuvee evaluate` in processes of their own: what reaches the terminal, and two of them on one folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from embeddings.evaluation import suite
from tests import commands


@pytest.fixture(scope="module")
def translations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of one task of bitext mining, some rows of the shipped suite's: the type whose bars have no switch."""
    folder = tmp_path_factory.mktemp("suite")
    rows = next(task for task in suite.load() if task.name == "emoji-german").read("test")[:40]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "emoji.jsonl").write_text(lines, encoding="utf-8")
    (folder / "emoji.yml").write_text("type: BitextMining\nfiles: {test: emoji.jsonl}\n", encoding="utf-8")
    return folder


def test_only_our_progress_reaches_standard_error(minilm: Path, translations: Path, tmp_path: Path) -> None:
    done = commands.run("evaluate", minilm, "--suite", translations, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    lines = [line for line in done.err.replace("\r", "\n").splitlines() if line]
    assert all(" on emoji" in line for line in lines), done.err  # none where no terminal is
    assert "emoji" in done.out and "f1" in done.out


def test_a_second_process_on_a_run_is_refused_in_one_line(minilm: Path, translations: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", minilm, "--suite", translations, "--out", tmp_path / "run")
    first = commands.start(*arguments)
    for _ in range(6000):
        if (tmp_path / "run" / "cuvee.json").exists():
            break
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        command = [sys.executable, "-m", "cuvee", *map(str, arguments)]
        second = subprocess.run(command, env=commands.environment(), capture_output=True, text=True, check=False)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 2 and not second.stdout
    assert len(second.stderr.splitlines()) == 1 and "another process is at work in it" in second.stderr
    assert first.wait().code == 0
    again = commands.run(*arguments, "--json")
    assert again.code == 0 and again.json["reused"] == 1
