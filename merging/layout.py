"""The layout of a model's folder: sentence-transformers' modules, and where config and tokenizer lie."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from merging.checkpoint import inside
from merging.errors import CheckpointError


def module_folders(folder: Path) -> list[str]:
    """Sub-folders that sentence-transformers' modules.json names, in its order; empty for other models.

    Raises:
        CheckpointError: not readable, or a path that leads out of the folder.
    """
    return [path for path in _modules(folder) if path]


def transformer_part(folder: Path) -> str:
    """The sub-folder of config.json and tokenizer: sentence-transformers' first module, mostly "" (the folder)."""
    return next(iter(_modules(folder)), "")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def write_json(file: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8", errors="backslashreplace")  # half of a surrogate pair stays an escape


def _modules(folder: Path) -> list[str]:
    """Paths of modules.json, "" for the folder itself."""
    file = folder / "modules.json"
    if not file.is_file():
        return []
    try:
        paths = [str(module["path"]) for module in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"cannot be read ({type(error).__name__})", where=str(file)) from error
    for path in paths:
        inside(folder, path)
    return ["" if folder == "." else folder for folder in (str(PurePosixPath(path)) for path in paths)]
