"""Members as tasks of Ray, where it is installed: the same models as one after another."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import commands
from tests.embeddings.runs import metrics, same_weights, write_config

BAGS = "bags: [50, 75]\nsteps: 4\nsave_every: 2\ncore: 0\n"


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_it_is_said_how_to_get_it(minilm: Path, tmp_path: Path) -> None:
    done = commands.run("train", write_config(tmp_path, minilm, BAGS), tmp_path / "run", "--workers", "ray")
    assert done.code == 2 and not (tmp_path / "run").exists()
    assert done.err == "error: --workers: Ray is not installed; pip install 'cuvee[ray]'\n"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.filterwarnings("ignore")
def test_ray_trains_what_one_process_does(minilm: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, minilm, BAGS)
    for name, options in (("one", ()), ("ray", ("--workers", "ray:2"))):
        done = commands.run("train", config, tmp_path / name, *options)
        assert done.code == 0, done.err
    for part in ("members/1-50", "members/2-75"):
        assert same_weights(tmp_path / "one" / part, tmp_path / "ray" / part)
        assert metrics(tmp_path / "one" / part) == metrics(tmp_path / "ray" / part)
    hot = write_config(tmp_path, minilm, BAGS.replace("steps: 4", "steps: 60\nwarmup: 0.0"), name="hot.yml")
    hot.write_text(hot.read_text("utf-8").replace("1.0e-3", "1.0e+6"), "utf-8")
    done = commands.run("train", hot, tmp_path / "hot", "--workers", "ray")
    assert done.code == 2 and "is not finite at step" in done.err.splitlines()[-1] and "Traceback" not in done.err
    shutil.rmtree(tmp_path)
