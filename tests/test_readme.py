"""The README's commands and Python run as they stand, on real checkpoints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import read_model
from tests.commands import ROOT, code_blocks, environment, run
from tests.conftest import MiniLMFamily

README = ROOT / "README.md"


def commands() -> list[list[str]]:
    """Every line of the shell blocks, without its comment."""
    lines = [line.split("#")[0].split() for block in code_blocks(README, "sh") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture
def workplace(minilm_family: MiniLMFamily, tmp_path: Path) -> Path:
    """A folder with what the README's recipe names."""
    names = ("base", "specialist-a", "specialist-b")
    for name, folder in zip(names, (minilm_family.base, *minilm_family.specialists), strict=False):
        os.symlink(folder, tmp_path / name)
    config, recipe = code_blocks(README, "yaml")
    (tmp_path / "train.yml").write_text(config, encoding="utf-8")
    (tmp_path / "new.yml").write_text("data: [{suite: shipped, task: intent, limit: 40}]\n", encoding="utf-8")
    (tmp_path / "recipe.yml").write_text(recipe, encoding="utf-8")
    return tmp_path


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line[1] for line in commands() if line[0] == "make"]
    assert targets == ["quickstart", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_commands_run(workplace: Path) -> None:
    ours = [line for line in commands() if line[0] == "cuvee"]
    assert {line[1] for line in ours} == {"train", "update", "merge", "inspect", "methods", "evaluate"}
    for _, *arguments in ours:
        done = run(*arguments, cwd=workplace)
        assert done.code == 0, done.err
    assert read_model(workplace / "OUT") == read_model(workplace / "AGAIN")
    assert "UPDATED" in (workplace / "SCORES" / "scores.md").read_text(encoding="utf-8")


def test_python_runs(workplace: Path) -> None:
    (code,) = code_blocks(README, "python")
    subprocess.run([sys.executable, "-c", code], cwd=workplace, env=environment(), check=True)
    assert read_model(workplace / "OUT")


def test_every_method_is_named() -> None:
    from merging import methods

    text = README.read_text(encoding="utf-8")
    assert [name for name in methods.METHODS if name not in text] == []
    assert f"{len(methods.METHODS)} methods" in text
