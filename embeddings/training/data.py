"""TrainingSet: a data set as arrays on disk: token ids of its distinct texts, and which text goes with which.

A source is read once, row by row, checked, tokenised and written to `CACHE/<digest>/`; the next start maps the files
into memory. Nothing there depends on bags, batches or losses; all runs of one tokenizer share it.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.training.config import TrainingConfig
from embeddings.training.data_settings import GRADED, DataSettings
from embeddings.training.hub_data import HubRevisions
from embeddings.training.set_builder import MARKER, SetBuilder, Tokenize
from embeddings.training.source_digests import FileDigests, cache_key
from embeddings.training.token_table import Ragged, TextTable, TokenTable, mapped
from merging.errors import CuveeError
from merging.output import staged, write_whole
from merging.progress import Work

__all__ = ["GRADED", "Tokenize", "TrainingSet", "kept_settings", "load_sets", "read_texts", "write_rows", "write_table"]


@dataclass(frozen=True)
class TrainingSet:
    """A data set that is ready to train on.

    Attributes:
        type: what its rows are: that of the settings, but "STS" for `Regression`, whose rows are graded pairs by now.
        digest: of the rows' texts, in their order: the same digest, the same row numbers.
        query_tokens, document_tokens: distinct texts of each side; one object where both sides read alike.
        queries: (rows,) int32, indices into query_tokens.
        positives: by row, indices into document_tokens, at least one; of a graded pair its second text.
        negatives: by row, indices into document_tokens; may be empty.
        labels: (rows,) int32; rows of one label are no negatives of each other.
        scores: (rows,) float32 in [0, 1], of graded pairs.
        teacher: by row, float32 for each positive and then each negative; NaN where it says nothing.
        label_names: by label, as the source has it.
        notes: on what was left out, one line each.
    """

    name: str
    type: str
    settings: DataSettings
    digest: str
    query_tokens: TextTable
    document_tokens: TextTable
    queries: NDArray[np.int32]
    positives: Ragged
    negatives: Ragged
    labels: NDArray[np.int32] | None = None
    scores: NDArray[np.float32] | None = None
    teacher: Ragged | None = None
    label_names: tuple[str | int | None, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.queries)


def load_sets(
    config: TrainingConfig,
    tokenize: Tokenize,
    cache: Path,
    progress: Work | None = None,
    *,
    data: Sequence[DataSettings] | None = None,
    transformer: Callable[[], Any] | None = None,
    fresh: bool = False,
) -> list[TrainingSet]:
    """The data sets of a configuration, from the cache or from their sources.

    Args:
        cache: a folder; made where it is missing.
        data: other data sets than the configuration's.
        transformer: opens the SentenceTransformer that mines hard negatives; by default the configuration's model.
        fresh: read what the hub has now, and not the revision that is known in the cache.

    Raises:
        CuveeError: at the file and line of the first row that is wrong.
    """
    progress = progress or (lambda what, done, total: None)
    files, revisions = FileDigests(cache / "files.json"), HubRevisions(cache / "hub.json", fresh=fresh)
    sets = []
    for entry in config.data if data is None else data:
        settings, notes = revisions.pinned(entry)
        key = cache_key(settings, config, tokenize.digest, files)
        files.save()
        folder = cache / key
        build = SetBuilder(settings, config, tokenize, transformer, progress)
        with _alone(cache / f".{key}.lock"):
            found = _open(folder, settings)
            if found is None:
                shutil.rmtree(folder, ignore_errors=True)  # damaged, if it is there at all
                with staged(folder, marker=MARKER) as staging:
                    build(staging)
                found = _open(folder, settings)
        assert found is not None
        sets.append(replace(found, notes=(*found.notes, *notes)))
    return sets


def read_texts(found: TrainingSet, row: int) -> dict[str, Any]:
    """A row as text again, in the columns that its type reads."""
    query = found.query_tokens.text(found.queries[row])
    positives = [found.document_tokens.text(i) for i in found.positives[row]]
    if found.scores is not None:
        score = float(found.scores[row])
        graded = {"label": int(score)} if found.type == "PairClassification" else {"score": round(score, 7)}
        return {"sentence1": query, "sentence2": positives[0], **graded}
    first, second = ("sentence1", "sentence2") if found.type == "BitextMining" else ("query", "positive")
    content: dict[str, Any] = {first: query, second: positives}
    content["negative"] = [found.document_tokens.text(i) for i in found.negatives[row]]
    if found.labels is not None and found.label_names[found.labels[row]] is not None:
        content["label"] = found.label_names[found.labels[row]]
    if found.teacher is not None and not np.isnan(found.teacher[row]).all():
        content["teacher"] = [None if np.isnan(each) else float(each) for each in found.teacher[row]]
    return content


def write_rows(
    sets: Iterable[TrainingSet],
    rows: Mapping[str, Iterable[int]],
    folder: Path,
    images: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes some rows of some sets, complete in themselves, and `data.yml`, which names them; gives its path.

    Args:
        rows: row numbers by the set's name.
        images: entries of data.yml's `images:`.
    """
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for found in sets:
        if found.name not in rows:
            continue
        file = folder / f"{found.name}.jsonl.gz"
        write_table(file, (read_texts(found, int(row)) for row in rows[found.name]))
        entries.append({"file": file.name, "type": found.settings.type, **kept_settings(found.settings)})
    content = {key: own for key, own in {"data": entries, "images": list(images)}.items() if own}
    write_whole(folder / "data.yml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return folder / "data.yml"


def write_table(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A .jsonl.gz; the same bytes for the same rows."""
    with open(file, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:
        for row in rows:
            packed.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def kept_settings(settings: DataSettings) -> dict[str, Any]:
    """What still holds of rows that were written: not where they came from, nor how they were chosen."""
    kept = {
        **{"name": settings.name, "weight": settings.weight},
        **{"prompt": dict(settings.prompt) if settings.prompt is not None else None},
        **{"batch_size": settings.batch_size, "negatives": settings.negatives},
    }
    if settings.loss is not None:
        loss = settings.loss
        named = {"name": loss.name, "in_batch": loss.in_batch, **loss.parameters}
        kept["loss"] = {key: value for key, value in named.items() if value is not None}
    return {key: value for key, value in kept.items() if value is not None}


def _open(folder: Path, settings: DataSettings) -> TrainingSet | None:
    """The set of a folder; None where there is none, or it is damaged."""
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        query = TokenTable(folder / "query")

        def optional(name: str) -> NDArray[Any] | None:
            return mapped(folder / f"{name}.npy") if (folder / f"{name}.npy").is_file() else None

        found = TrainingSet(
            name=settings.name,
            type="STS" if settings.type == "Regression" else settings.type,
            settings=settings,
            digest=content["digest"],
            query_tokens=query,
            document_tokens=query if content["shared"] else TokenTable(folder / "document"),
            queries=mapped(folder / "queries.npy"),
            positives=Ragged.load(folder, "positives"),
            negatives=Ragged.load(folder, "negatives"),
            labels=optional("labels"),
            scores=optional("scores"),
            teacher=Ragged.load(folder, "teacher") if (folder / "teacher.offsets.npy").is_file() else None,
            label_names=tuple(content["labels"]),
            notes=tuple(f"{settings.name}: {note}" for note in content["notes"]),
        )
    except Exception:  # whatever json and numpy make of damaged files
        return None
    return found if _sound(found) else None


def _sound(found: TrainingSet) -> bool:
    """Whether the arrays fit each other."""
    raggeds = [found.positives, found.negatives, *([found.teacher] if found.teacher is not None else [])]
    columns = [each for each in (found.labels, found.scores) if each is not None]
    return all(ragged.whole for ragged in raggeds) and {len(each) for each in (*raggeds, *columns)} == {len(found)}


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Waits until no other process is at the same work."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise CuveeError(
            f"cannot write: {error.strerror}", where=str(file.parent), mend="choose another folder"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
