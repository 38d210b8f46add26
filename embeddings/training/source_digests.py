"""Source digests: what a training set's arrays depend on, as the name of its folder in the cache."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from embeddings.evaluation import suite
from embeddings.training.config import TrainingConfig
from embeddings.training.data_settings import SINGLE, DataSettings
from merging import lineage
from merging.errors import CuveeError
from merging.output import write_whole

_FORM = 1  # of the cache: raise it when the same sources would give other arrays


def cache_key(settings: DataSettings, config: TrainingConfig, tokenizer: str, files: FileDigests) -> str:
    """32 hexadecimal digits over all that the arrays depend on."""
    drawn = settings.type in SINGLE or settings.limit is not None or settings.mine is not None
    model = config.model
    content = {
        "form": _FORM,
        "type": settings.type,
        "source": source_digest(settings, files),
        "columns": dict(settings.columns),
        "prompt": None if settings.prompt is None else dict(settings.prompt),
        "limit": settings.limit,
        "negatives": settings.negatives,
        "seed": config.seed if drawn else None,
        "mine": None if settings.mine is None else [asdict(settings.mine), files.of_model(model.path, model.revision)],
        "tokenizer": tokenizer,
        "max_length": dict(config.max_length),
        **({} if settings.scale is None else {"scale": settings.scale}),
    }
    return str(xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest())


def source_digest(settings: DataSettings, files: FileDigests) -> list[Any]:
    """What a data set is read from, by its content."""
    if settings.task is not None:
        tasks = {task.name: task for task in suite.load(settings.suite)}
        if settings.task not in tasks:
            raise CuveeError(f"the suite has no task '{settings.task}'", where=settings.where)
        return ["suite", tasks[settings.task].digest]
    if settings.hub is not None:
        return ["hub", files.of_model(settings.hub, settings.revision), settings.subset, settings.split]
    return ["files", *(files.of(Path(file), settings.where) for file in settings.files)]


class FileDigests:
    """Digests of files by path, read again only when size or time of change differ; kept in a JSON file."""

    def __init__(self, file: Path) -> None:
        self._file, self._changed = file, False
        try:
            self._known: dict[str, list[Any]] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def of(self, file: Path, where: str) -> str:
        path = os.path.abspath(file)
        try:
            stat = os.stat(path)
            known = self._known.get(path)
            if known is None or known[:2] != [stat.st_size, stat.st_mtime_ns]:
                known = self._known[path] = [stat.st_size, stat.st_mtime_ns, lineage.file_digest(file)]
                self._changed = True
        except OSError as error:
            raise CuveeError(f"cannot be read: {error.strerror}", where=path) from None
        return str(known[2])

    def of_model(self, path: str, revision: str | None) -> list[Any]:
        """Of a folder by its files; a hub id is itself."""
        if not os.path.isdir(path):
            return [path, revision]
        inside = sorted(file for file in Path(path).rglob("*") if file.is_file())
        return [[str(file.relative_to(path)), self.of(file, path)] for file in inside]

    def save(self) -> None:
        if self._changed:
            write_whole(self._file, json.dumps(self._known))
            self._changed = False
