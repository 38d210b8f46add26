"""Small training runs on real text: tables cut from the shipped suite, configurations, and what a run leaves."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embeddings.evaluation import suite
from embeddings.training import members
from embeddings.training.backbone import Backbone
from embeddings.training.config import TrainingConfig, load
from embeddings.training.data import TrainingSet
from embeddings.training.options import Options

Rows = list[dict[str, Any]]


@functools.cache
def _rows_of(task: str) -> tuple[dict[str, Any], ...]:
    return tuple(next(each for each in suite.load() if each.name == task).read("train"))


def rows_of(task: str, count: int, start: int = 0) -> Rows:
    """Rows of a shipped task's train split."""
    return [dict(row) for row in _rows_of(task)[start : start + count]]


def triplets(count: int, start: int = 0) -> Rows:
    """Definitions, their words, and two other words each."""
    rows = rows_of("word", count + 2, start)
    words = [row["positive"] for row in rows]
    return [{**row, "negative": words[i + 1 : i + 3]} for i, row in enumerate(rows[:count])]


def taught(count: int) -> Rows:
    """Triplets with what a teacher says of each candidate."""
    return [{**row, "teacher": [0.9, 0.3 + i / 100, 0.1]} for i, row in enumerate(triplets(count))]


def pairs(count: int) -> Rows:
    """Sentences of reviews, two and two, as graded pairs."""
    rows = rows_of("sentiment", 2 * count)
    return [
        {"sentence1": a["text"], "sentence2": b["text"], "score": 1 - abs(a["score"] - b["score"]) / 8}
        for a, b in zip(rows[::2], rows[1::2], strict=True)
    ]


def intents(labels: int, each: int) -> Rows:
    """Sentences of a few classes."""
    found: dict[str, Rows] = {}
    for row in _rows_of("intent"):
        found.setdefault(str(row["label"]), []).append(dict(row))
    full = [rows for rows in found.values() if len(rows) >= each][:labels]
    return [row for rows in full for row in rows[:each]]


def table(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


DATA = """\
  - {file: word.jsonl}
  - {file: intent.jsonl, type: Classification, negatives: 2}
"""


def write_config(folder: Path, model: Path, more: str = "", data: str = DATA, name: str = "config.yml") -> Path:
    """A configuration of a few short steps, and the tables it names."""
    table(folder / "word.jsonl", rows_of("word", 16))
    table(folder / "intent.jsonl", intents(4, 4))
    table(folder / "pairs.jsonl", pairs(16))
    table(folder / "triplets.jsonl", triplets(16, 100))
    table(folder / "taught.jsonl", taught(16))
    text = f"model: {model}\ndata:\n{data}batch_size: 8\nmax_length: 16\nlearning_rate: 1.0e-3\n{more}"
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def config_of(folder: Path, model: Path, more: str = "", data: str = DATA) -> TrainingConfig:
    return load(write_config(folder, model, more, data))


def sets_of(config: TrainingConfig, cache: Path) -> list[TrainingSet]:
    """The data sets, read by the configuration's own tokenizer."""
    return members.read_sets(config, cache, Options(), lambda *_: None, lambda line: None)


def opened(config: TrainingConfig) -> Backbone:
    return members.open_backbone(config, "cpu", 0)


def weights(model: Path) -> dict[str, Any]:
    """The tensors of a saved model."""
    from safetensors.numpy import load_file

    return dict(load_file(model / "model.safetensors"))


def same_weights(one: Path, other: Path) -> bool:
    """To the last bit."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def metrics(folder: Path) -> Rows:
    """The lines of a metrics file, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "pairs_per_second"} for line in lines]


def still(model: Path, folder: Path) -> Path:
    """A copy of a model without dropout."""
    shutil.copytree(model, folder)
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
