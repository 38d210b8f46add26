"""What cannot be read is not told as what cannot be written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from embeddings.training.disk import disk_errors
from merging.errors import CuveeError

Act = Callable[[Path], Any]


def _raise(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda folder: (folder / "missing.json").read_text(), "data/missing.json: cannot be read: No such file"),
        (
            lambda folder: (folder / "run" / "missing.json").read_text(),
            "run/missing.json: cannot be read: No such file",
        ),
        (lambda folder: os.listdir(folder / "table.jsonl"), "data/table.jsonl: cannot be read: Not a directory"),
        (lambda folder: (folder / "run").write_text(""), "data/run: cannot write: Is a directory"),
        (lambda folder: (folder / "run" / "no" / "x").write_text(""), "run/no/x: cannot write: No such file"),
        (lambda folder: _raise(OSError(28, "No space left on device")), "data/run: cannot write: No space left"),
        (lambda folder: _raise(OSError(5, "Input/output error")), "data/run: cannot read or write: Input/output"),
        (
            lambda folder: _raise(OSError("We couldn't connect to the hub\nTry later")),
            "cannot be read: We couldn't con",
        ),
        (lambda folder: safe_open(folder / "none.safetensors", "np"), "something it needs cannot be read: No such"),
        (lambda folder: safe_open(folder / "table.jsonl", "np"), "cannot be read: Error while deserializing"),
        (lambda folder: save_file({"a": np.zeros(1)}, folder / "no" / "x"), "data/run: cannot write: Error while ser"),
        (lambda folder: Tokenizer(WordLevel({"a": 0}, "a")).save(str(folder / "no" / "t")), "data/run: cannot write: "),
        (lambda folder: Tokenizer.from_file(str(folder / "table.jsonl")), "a file it needs cannot be read: "),
    ],
)
def test_reading_and_writing_are_told_apart(act: Act, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "run").mkdir(parents=True)
    (folder / "table.jsonl").write_text("no", encoding="utf-8")
    with pytest.raises(CuveeError) as error, disk_errors(folder / "run"):
        act(folder)
    assert said in str(error.value) and "Try later" not in str(error.value)


def test_other_errors_are_left_as_they_are(tmp_path: Path) -> None:
    for kind in (ValueError, CuveeError, KeyboardInterrupt):
        with pytest.raises(kind), disk_errors(tmp_path):
            raise kind("as it is")
