"""The layout of a model's folder: sentence-transformers' modules, and where config and tokenizer lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from merging.checkpoint import module_paths


def transformer_part(folder: Path) -> str:
    """The sub-folder of config.json and tokenizer: sentence-transformers' first module, mostly "" (the folder)."""
    return next(iter(module_paths(folder)), "")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def write_json(file: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8", errors="backslashreplace")  # half of a surrogate pair stays an escape
