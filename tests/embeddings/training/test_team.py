"""Several processes for one model: the steps of one, a death that ends all in one line, jobs that were launched."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embeddings.training.team import ALONE, Team
from tests import commands
from tests.embeddings.runs import config_of, metrics, same_weights, still, table, triplets, weights, write_config
from tests.embeddings.training import team_steps

ALL = """\
  - {file: word.jsonl}
  - {file: intent.jsonl, type: Classification, negatives: 2}
  - {file: pairs.jsonl, type: STS}
  - {file: taught.jsonl}
"""
STEPS = "steps: 12\nsave_every: 3\ncore: 0\nwarmup: 0.3\n"


# ---- shares ----


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("costs", [[], [5], [3, 3, 3, 3], [9, 1, 1, 1, 1, 1, 4], list(range(20))])
def test_shares_are_all_of_the_work_and_even(size: int, costs: list[int]) -> None:
    shares = [Team(rank, size).share(costs) for rank in range(size)]
    assert sorted(piece for share in shares for piece in share) == list(range(len(costs)))
    loads = [sum(costs[piece] for piece in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)
    assert ALONE.share(costs) == list(range(len(costs)))


# ---- steps ----


@dataclass(frozen=True)
class _Both(Team):
    """One process that does what two would: the same chunks, and so the same dropout."""

    size: int = 2

    def share(self, costs: Any) -> list[int]:
        return list(range(len(costs)))

    def add_up(self, values: torch.Tensor) -> None:
        pass

    def add_up_gradients(self, parameters: Any) -> None:
        pass


def _start(target: Any, *arguments: Any) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(rank, 2, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


@pytest.mark.slow
def test_gradients_of_two_processes_are_those_of_one_with_dropout(minilm: Path, tmp_path: Path) -> None:
    """All parts of a batch, packed and padded, with a gradient cache, surgery, bfloat16, and a single row."""
    from safetensors.torch import load_file

    config = config_of(tmp_path, minilm, "loss: {matryoshka: [384, 64]}\n", ALL)
    expected = team_steps.compute(config, tmp_path / "cache", _Both())
    _start(team_steps.work, config, tmp_path)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, one in expected.items():
        assert torch.equal(first[name], second[name]), name
        off = float((first[name].double() - one.double()).norm() / one.double().norm())
        assert off < (1e-5 if name != "bfloat16" else 1e-2), (name, off)
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_who_loses_another_process_says_so(tmp_path: Path) -> None:
    _start(team_steps.leave_without_a_word, tmp_path)
    said = (tmp_path / "said").read_text("utf-8")
    assert said.startswith("--processes: lost the other processes: ") and "\n" not in said


# ---- the command ----


@pytest.fixture(scope="module")
def place(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A configuration without dropout, and its run by one process."""
    folder = tmp_path_factory.mktemp("team")
    write_config(folder, still(minilm, folder / "still"), STEPS)
    _slower(folder / "config.yml")
    done = commands.run("train", folder / "config.yml", folder / "one", "--json")
    assert done.code == 0, done.err
    yield folder
    shutil.rmtree(folder)


def _slower(config: Path) -> None:
    """A lower learning rate: Adam makes full steps of a gradient that is rounding."""
    config.write_text(config.read_text("utf-8").replace("1.0e-3", "1.0e-4"), "utf-8")


def _assert_same(one: Path, other: Path, base: Path) -> None:
    before, a, b = weights(base), weights(one), weights(other)
    moved, gap = 0.0, 0.0
    for name in a:
        # A key's bias shifts all logits of a row alike: its gradient is rounding, which Adam blows up to full steps.
        if "pooler" not in name and "key.bias" not in name:
            moved += float(np.sum((a[name] - before[name]) ** 2.0))
            gap += float(np.sum((a[name] - b[name]) ** 2.0))
    assert moved > 0 and np.sqrt(gap / moved) < 0.02, np.sqrt(gap / moved)
    for mine, theirs in zip(metrics(one), metrics(other), strict=True):
        assert mine["step"] == theirs["step"] and mine["learning_rate"] == theirs["learning_rate"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _await_checkpoint(run: Path, running: commands.Running) -> list[int]:
    """Until the first checkpoint is there; the processes of the team."""
    for _ in range(60000):
        if list(run.glob("work/*/checkpoint/state.json")):
            break
        time.sleep(0.01)
    return [pid for pid in _children(running.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_go_on_when_killed(place: Path) -> None:
    """A process of the team dies: all end, in one line; run again, it is the same model, and that of one process."""
    arguments = ("train", place / "config.yml", place / "two", "--processes", 2)
    running = commands.start(*arguments)
    team = _await_checkpoint(place / "two", running)
    assert len(team) == 2
    os.kill(team[1], signal.SIGKILL)
    done = running.wait()
    assert done.code == 2 and "Traceback" not in done.err and not done.out
    assert done.err.splitlines()[-1].startswith("error: 1-100: the worker ended with status -9; train it again")
    assert not any(Path(f"/proc/{pid}").exists() for pid in team)
    state = json.loads(next((place / "two").glob("work/*/checkpoint/state.json")).read_text("utf-8"))
    assert 0 < state["step"] < 12
    done = commands.run(*arguments, "--json")
    assert done.code == 0 and done.json["steps"] == 12, done.err
    _assert_same(place / "one" / "model", place / "two" / "model", place / "still")


@pytest.mark.slow
def test_ctrl_c_ends_all(place: Path) -> None:
    running = commands.start("train", place / "config.yml", place / "interrupted", "--processes", 2)
    team = _await_checkpoint(place / "interrupted", running)
    for pid in (running.pid, *team):  # as a terminal does
        os.kill(pid, signal.SIGINT)
    done = running.wait()
    assert done.code == 130 and done.err.splitlines()[-1].startswith("interrupted"), done.err
    assert not any(Path(f"/proc/{pid}").exists() for pid in team)


@pytest.mark.slow
def test_an_update_by_processes_that_torchrun_started(place: Path) -> None:
    """The first of them does all that is not training; the same as one process and as two that it starts itself."""
    new = table(place / "new.jsonl", triplets(8, 200))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    updates = []
    for name, start in (("plain", [sys.executable, "-m"]), ("launched", launcher)):
        command = [*start, "cuvee", "update", place / "one", "--data", new, "--out", place / name, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=commands.environment(), check=False)
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        updates.append(json.loads(line))
    assert updates[0]["members"]["update"]["rows"] == updates[1]["members"]["update"]["rows"]
    _assert_same(*(place / name / "members" / "update" for name in ("plain", "launched")), place / "still")
    same = same_weights(place / "plain" / "model", place / "launched" / "model")
    assert not same  # rounding


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "cuda:5"), "error: device cuda:5: cannot be used: "),
        (("--device", "cuda:0", "--processes", 2), "error: --processes: 2 processes do not fit on one cuda:0"),
        (
            ("--workers", "ray", "--processes", 2),
            "error: --processes: does not go together with --workers ray",
        ),
        (("--workers", "rya"), "error: cuvee train: Invalid value for '--workers': 'rya' is no number"),
        (("--workers", "ray:0"), "error: cuvee train: Invalid value for '--workers': 'ray:0' is no number"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_what_cannot_be_is_refused_before_data_is_read(
    place: Path, options: tuple[Any, ...], said: str, more: tuple[str, ...]
) -> None:
    if "cuda" in str(options) and torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    text = (place / "config.yml").read_text("utf-8")
    (place / "broken.yml").write_text(text.replace("word.jsonl", "broken.jsonl"), "utf-8")
    (place / "broken.jsonl").write_text("no JSON\n", "utf-8")
    done = commands.run("train", place / "broken.yml", place / "refused", *options, *more)
    assert done.code == 2 and not done.out and done.err.startswith(said), done.err
    assert len(done.err.splitlines()) == 1 and not (place / "refused").exists()
