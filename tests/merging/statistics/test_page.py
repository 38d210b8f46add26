"""docs/stats.md: its commands and its Python run as they stand."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from merging.recipe import Recipe
from merging.statistics import open_statistics
from tests.commands import ROOT, code_blocks, environment, run
from tests.merging.statistics.models import model, sentences

PAGE = ROOT / "docs" / "stats.md"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with what the page's commands name."""
    model("bert", tmp_path / "zoo").rename(tmp_path / "model")
    (tmp_path / "zoo" / "base").rename(tmp_path / "base")
    texts = sentences(24)
    rows = [{"query": a, "positive": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps({"grade": i % 6 + 1}) + "\n" for i in range(20)))
    return tmp_path


def test_the_commands_run(work: Path) -> None:
    for line in filter(None, "\n".join(code_blocks(PAGE, "sh")).splitlines()):
        command, *arguments = shlex.split(line, comments=True)
        assert command == "cuvee"
        done = run(*arguments, cwd=work)
        assert done.code == 0, done.err
    assert open_statistics(work / "both").examples == open_statistics(work / "model-gram").examples == 12
    assert open_statistics(work / "model-fisher").kind == "fisher"


def test_the_python_runs(work: Path) -> None:
    (code,) = code_blocks(PAGE, "python")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=work,
        env={**environment(), "PYTHONPATH": os.pathsep.join([str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "encoder.layer.0.attention.self.query.weight" in done.stdout


def test_the_recipe_is_one() -> None:
    (text,) = code_blocks(PAGE, "yaml")
    assert [source.stats is not None for source in Recipe.parse(text).models] == [True, True]
