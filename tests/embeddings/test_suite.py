"""Suites: every type and format runs as an ordinary mteb task, as mteb's own would; every mistake is told with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from embeddings import suite
from merging.errors import CuveeError


def _write(folder: Path, yaml: str, **files: list[dict[str, Any]]) -> suite.SuiteTask:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "task.yml").write_text(yaml, encoding="utf-8")
    return suite.load(folder)[0]


def test_digest_follows_the_data_and_the_settings_but_not_the_words(tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "score": 1}, {"sentence1": "c", "sentence2": "d", "score": 2}]
    yaml = "type: STS\nfiles: {test: rows.jsonl}\n"
    first = _write(tmp_path, yaml, rows=rows).digest
    assert _write(tmp_path, yaml + "description: pairs\n").digest == first
    assert _write(tmp_path, yaml + "metric: cosine_pearson\n").digest != first
    assert _write(tmp_path, yaml, rows=[*rows, rows[0]]).digest != first


def test_a_missing_split_names_those_that_are_there(tmp_path: Path) -> None:
    task = _write(tmp_path, "type: STS\nfiles: {test: rows.jsonl}\n", rows=[{}])
    with pytest.raises(CuveeError, match=r"task.yml: the task 'task' has no split 'train'; it has 'test'"):
        task.read("train")
