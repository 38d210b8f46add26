"""scripts/experiments/emoji.py: its scores, and a tiny run of it, killed and gone on with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "scripts" / "experiments"


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The script's module, imported as `python scripts/experiments/emoji.py` does."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(FOLDER))
    yield import_module("emoji")
    patch.undo()
    for name in ("emoji", "boom_lab", "boom_table", "boom_arms"):
        sys.modules.pop(name, None)


def test_ndcg_counts_the_right_one_behind_its_equals(script: Any) -> None:
    likeness = np.array([[0.9, 0.1, 0.0], [0.5, 0.5, 0.0], [0.8, 0.9, 0.1]])
    assert script.ndcg(likeness) == pytest.approx((1 + 1 / np.log2(3) + 1 / np.log2(4)) / 3, abs=1e-5)
    assert script.ndcg(np.zeros((30, 30))) == 0


def test_a_tiny_run_goes_on_where_it_was(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'cuvee[images]'")
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for number, name in enumerate(("red", "green", "blue", "white") * 3):
        pillow.new("RGBA", (64, 64), (20 * number, 99, 7, 200)).save(data / f"{number}.png")
        split = "test" if number > 7 else "train"
        rows.append({"image": f"{number}.png", "label": f"a {name} square", "tags": ["square", name], "split": split})
    (data / "emoji.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = ["--warm-up-steps", "1", "--bridge-steps", "1", "--contrastive-steps", "1", "--batch", "4"]
    command = ["--data", str(data), "--out", str(tmp_path / "out"), "--seeds", "0", *steps, "--arms"]
    script.main([*command, "CoCoA"])
    capsys.readouterr()
    script.main([*command, "nothing", "CoCoA", "CoCoA, embedding"])
    report = (tmp_path / "out" / "emoji.md").read_text()
    made = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [json.loads(line)["arm"] for line in made] == ["nothing", "CoCoA, embedding"]
    assert "| CoCoA, embedding |" in report and "8 training rows, 4 held out" in report
