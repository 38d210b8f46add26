"""Members side by side: the same models as one after another, errors in one line, no orphans."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from tests import commands
from tests.embeddings.runs import metrics, same_weights, write_config

pytestmark = pytest.mark.slow  # each worker imports torch anew

BAGS = "bags: [50, 75]\nsteps: 4\nsave_every: 2\ncore: 0\n"


def test_two_workers_train_what_one_does(minilm: Path, tmp_path: Path) -> None:
    """Bit for bit, as one thread each does it; with more threads a worker's sums are in another order."""
    config = write_config(tmp_path, minilm, BAGS)
    for workers in (1, 2):
        done = commands.run("train", config, tmp_path / f"{workers}", "--workers", workers, "--json")
        assert done.code == 0, done.err
        assert done.json["steps"] == 5
    for part in ("members/1-50", "members/2-75", "model"):
        assert same_weights(tmp_path / "1" / part, tmp_path / "2" / part), part
        if part != "model":
            assert metrics(tmp_path / "1" / part) == metrics(tmp_path / "2" / part)
    shutil.rmtree(tmp_path)


def test_where_no_affinity_is_known_the_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    from embeddings.training import workers

    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 6)
    assert [workers._threads(count) for count in (1, 2, 16)] == [6, 4, 1]


def test_a_workers_mistake_is_one_line_and_the_rest_goes_on_next_time(minilm: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, minilm, BAGS.replace("steps: 4", "steps: 60\nwarmup: 0.0"))
    config.write_text(config.read_text("utf-8").replace("1.0e-3", "1.0e+6"), "utf-8")
    done = commands.run("train", config, tmp_path / "run", "--workers", 2)
    assert done.code == 2 and not done.out
    line = done.err.splitlines()[-1]
    assert line.startswith("error: ") and "is not finite at step" in line and "Traceback" not in done.err
    assert not list((tmp_path / "run" / "members").glob("*/cuvee.json"))
    shutil.rmtree(tmp_path)


def test_workers_end_with_a_run_that_is_killed(minilm: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, minilm, BAGS.replace("steps: 4", "steps: 4000").replace("every: 2", "every: 3"))
    running = commands.start("train", config, tmp_path / "run", "--workers", 2)
    checkpoints = tmp_path / "run" / "work"
    for _ in range(60000):
        if len(list(checkpoints.glob("*/checkpoint/state.json"))) == 2:
            break
        time.sleep(0.01)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    assert len(children) >= 2
    running.kill()
    running.wait()
    for _ in range(60000):
        if not any(
            Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes()
            for child in children
        ):
            break
        time.sleep(0.01)
    else:
        pytest.fail("a worker goes on")
    shutil.rmtree(tmp_path)
