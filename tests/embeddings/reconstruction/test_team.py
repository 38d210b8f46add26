"""Several processes for one pre-training: the steps of one, a death that ends all in one line, jobs that were launched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from embeddings.reconstruction.config import load
from embeddings.reconstruction.run import pretrain_run
from tests import commands
from tests.embeddings.reconstruction.runs import metrics, write_config
from tests.embeddings.runs import weights

# Parts of the same rows, whoever has them.
WARM_UP = "save_every: 2\nwarm_up: {steps: 5, micro_batch: 3, learning_rate: 1.0e-4}\n"
BRIDGE = "bridge: {steps: 12, batch_size: 2, micro_batch: 1, learning_rate: 1.0e-4}\n"
CONTRASTIVE = "contrastive:\n  data:\n    - {file: pairs.jsonl}\n  batch_size: 8\n  steps: 2\n"


def by_one(place: Path, more: str) -> Path:
    """The configuration's run by this process."""
    pretrain_run(load(write_config(place, more), "cocoa"), place / "one")
    return place / "one"


def assert_same(one: Path, other: Path) -> None:
    """But for rounding."""
    for mine, its in zip(metrics(one), metrics(other), strict=True):
        assert (mine["step"], mine["stage"]) == (its["step"], its["stage"])
        for told in (mine, its):
            told.update({f"held_out {name}": value for name, value in told.pop("held_out", {}).items()})
        for name in mine.keys() - {"stage"}:
            assert mine[name] == pytest.approx(its[name], rel=2e-3, abs=2e-4), name
    for stage in (one / "stages").iterdir():
        a, b = weights(stage), weights(other / "stages" / stage.name)
        before = weights(one.parent / "llama")
        moved = sum(float(np.sum((a[name] - before[name]) ** 2.0)) for name in before)
        gap = sum(float(np.sum((a[name] - b[name]) ** 2.0)) for name in before)
        assert moved > 0 and np.sqrt(gap / moved) < 0.05, (stage.name, np.sqrt(gap / moved))


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_go_on_when_killed(tmp_path: Path) -> None:
    """A process of the team dies: all end, in one line; run again, it is the model of one process."""
    one = by_one(tmp_path, "warm_up: false\nsave_every: 2\n" + BRIDGE)
    arguments = ("pretrain", "cocoa", tmp_path / "config.yml", tmp_path / "two", "--processes", 2)
    running = commands.start(*arguments)
    for _ in range(60000):
        if (tmp_path / "two" / "work" / "bridge" / "checkpoint" / "state.json").exists():
            break
        time.sleep(0.01)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    team = [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(team[1], signal.SIGKILL)
    done = running.wait()
    assert done.code == 2 and "Traceback" not in done.err and not done.out
    assert done.err.splitlines()[-1].startswith("error: bridge: the worker ended with status -9; train it again")
    assert not any(Path(f"/proc/{pid}").exists() for pid in team)
    done = commands.run(*arguments, "--json")
    assert done.code == 0 and done.json["steps"] == 12, done.err
    assert_same(one, tmp_path / "two")
    loss = json.loads((one / "cuvee.json").read_text("utf-8"))["loss"]
    assert done.json["loss"] == pytest.approx(loss, rel=1e-3)


@pytest.mark.slow
def test_processes_that_torchrun_started_pretrain_what_one_does(tmp_path: Path) -> None:
    """The first of them does all that is not training; the contrastive stage is trained by both too."""
    one = by_one(tmp_path, WARM_UP + BRIDGE + CONTRASTIVE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    command = [*launcher, "cuvee", "pretrain", "cocoa", tmp_path / "config.yml", tmp_path / "launched", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=commands.environment(), check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["steps"] == 17
    assert_same(one, tmp_path / "launched")
    assert (tmp_path / "launched" / "contrastive" / "model" / "modules.json").exists()
