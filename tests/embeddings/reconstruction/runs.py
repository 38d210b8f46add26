"""Small pre-trainings of a small model with random weights: what they read, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.embeddings.reconstruction.models import folder, texts
from tests.embeddings.runs import table

ROWS = 48


def rows(count: int = ROWS) -> list[dict[str, Any]]:
    """Texts of random words; each has a text of its first words as its pair."""
    sources = texts(count, seed=1, low=4, high=9)
    return [{"query": text, "positive": " ".join(text.split()[:3])} for text in sources]


def write_config(
    place: Path, more: str = "", data: str = "  - {file: pairs.jsonl}\n", name: str = "config.yml"
) -> Path:
    """A configuration of a few short steps, its model and its table, where they are not there yet."""
    place.mkdir(exist_ok=True, parents=True)
    if not (place / "llama").exists():
        folder("llama", place / "llama")
    table(place / "pairs.jsonl", rows())
    head = f"model: llama\ndata:\n{data}batch_size: 8\nmax_length: 12\nlearning_rate: 1.0e-3\nheld_out: 6\n"
    (place / name).write_text(head + more, encoding="utf-8")
    return place / name


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def losses(run: Path, stage: str) -> Sequence[float]:
    """Of a stage, on the way."""
    return [line["loss"] for line in metrics(run) if line["stage"] == stage and "loss" in line]
