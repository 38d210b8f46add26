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
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from embeddings import suite
from embeddings.data_settings import SINGLE, DataSettings
from embeddings.partners import NEGATIVES, Partners, of_labels, of_scores
from embeddings.result import write_whole
from embeddings.token_table import Ragged, TableWriter, TokenTable, mapped, offsets_of
from embeddings.training_config import TrainingConfig
from embeddings.training_rows import Example, examples
from merging import lineage
from merging.errors import CuveeError
from merging.output import staged

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is; 0: nobody knows."""

GRADED = ("STS", "PairClassification", "Regression")
_FORM = 1  # of the cache: raise it when the same sources would give other arrays
_MARKER = "set.json"
_CHUNK_ROWS, _CHUNK_CHARACTERS = 2048, 1 << 22  # in memory at a time


class Tokenize(Protocol):
    """How texts become token ids, with the prompt before them and the special tokens."""

    @property
    def digest(self) -> str:
        """Of all that the ids depend on but the prompt: tokenizer, lengths, what is appended."""

    def __call__(self, texts: list[str], side: str, prompt: str | None) -> list[list[int]]:
        """Ids of each text; `side` is "query" or "document", a prompt of None the model's own."""


@dataclass(frozen=True)
class TrainingSet:
    """A data set that is ready to train on.

    Attributes:
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
    query_tokens: TokenTable
    document_tokens: TokenTable
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
    progress: Progress | None = None,
    *,
    data: Sequence[DataSettings] | None = None,
    transformer: Callable[[], Any] | None = None,
) -> list[TrainingSet]:
    """The data sets of a configuration, from the cache or from their sources.

    Args:
        cache: a folder; made where it is missing.
        data: other data sets than the configuration's.
        transformer: opens the SentenceTransformer that mines hard negatives; by default the configuration's model.

    Raises:
        CuveeError: at the file and line of the first row that is wrong.
    """
    progress = progress or (lambda what, done, total: None)
    files = _FileDigests(cache / "files.json")
    sets = []
    for settings in config.data if data is None else data:
        key = _key(settings, config, tokenize, files)
        files.save()
        folder = cache / key
        build = _Build(settings, config, tokenize, transformer, progress)
        with _alone(cache / f".{key}.lock"):
            found = _open(folder, settings)
            if found is None:
                shutil.rmtree(folder, ignore_errors=True)  # damaged, if it is there at all
                with staged(folder, marker=_MARKER) as staging:
                    build(staging)
                found = _open(folder, settings)
        assert found is not None
        sets.append(found)
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


def write_rows(sets: Iterable[TrainingSet], rows: Mapping[str, Iterable[int]], folder: Path) -> Path:
    """Writes some rows of some sets, complete in themselves, and `data.yml`, which names them; gives its path.

    Args:
        rows: row numbers by the set's name.
    """
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for found in sets:
        if found.name not in rows:
            continue
        file = folder / f"{found.name}.jsonl.gz"
        with open(file, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:  # the same bytes each time
            for row in rows[found.name]:
                packed.write(json.dumps(read_texts(found, int(row)), ensure_ascii=False).encode() + b"\n")
        entries.append({"file": file.name, **_kept_settings(found.settings)})
    write_whole(folder / "data.yml", yaml.safe_dump({"data": entries}, sort_keys=False, allow_unicode=True))
    return folder / "data.yml"


def _kept_settings(settings: DataSettings) -> dict[str, Any]:
    """What still holds of rows that were written: not where they came from, nor how they were chosen."""
    kept = {
        **{"name": settings.name, "type": settings.type, "weight": settings.weight},
        **{"prompt": dict(settings.prompt) if settings.prompt is not None else None},
        **{"batch_size": settings.batch_size, "negatives": settings.negatives},
    }
    if settings.loss is not None:
        loss = settings.loss
        named = {"name": loss.name, "in_batch": loss.in_batch, **loss.parameters}
        kept["loss"] = {key: value for key, value in named.items() if value is not None}
    return {key: value for key, value in kept.items() if value is not None}


@dataclass
class _Columns:
    """What is gathered of the rows: arrays in pieces, a chunk each."""

    queries: list[NDArray[np.int32]] = field(default_factory=list)
    positives: list[NDArray[np.int32]] = field(default_factory=list)
    negatives: list[NDArray[np.int32]] = field(default_factory=list)
    counts: list[NDArray[np.int32]] = field(default_factory=list)  # (rows, 2): positives, negatives
    labels: list[NDArray[np.int32]] = field(default_factory=list)
    scores: list[NDArray[np.float64]] = field(default_factory=list)
    teacher: list[NDArray[np.float32]] = field(default_factory=list)


class _Build:
    """Reads a source and writes a set's folder."""

    def __init__(
        self,
        settings: DataSettings,
        config: TrainingConfig,
        tokenize: Tokenize,
        transformer: Callable[[], Any] | None,
        progress: Progress,
    ) -> None:
        self.settings, self.config, self.tokenize = settings, config, tokenize
        self.transformer, self.progress = transformer, progress
        self.names: dict[str | int, int] = {}
        self.unnamed = 0
        self.columns = _Columns()
        self.digest = xxhash.xxh3_128()

    def __call__(self, folder: Path) -> None:
        """Writes the set to an empty folder."""
        done = 0
        with ExitStack() as open_tables:
            writers = self._writers(folder, open_tables)
            for chunk in _chunks(self._source()):
                self._add(chunk, writers)
                done += len(chunk)
                self.progress(f"read {self.settings.name}", done, 0)
        if not done:
            raise CuveeError(f"the data set '{self.settings.name}' holds no row", where=self.settings.where)
        self.progress(f"read {self.settings.name}", done, done)
        notes = self._write(folder)
        content = {"form": _FORM, "digest": f"xxh3:{self.digest.hexdigest()}", "notes": notes}
        content["shared"] = writers[0] is writers[1]
        content["labels"] = self._label_names()
        (folder / _MARKER).write_text(json.dumps(content), encoding="utf-8")

    def _writers(self, folder: Path, open_tables: ExitStack) -> tuple[TableWriter, TableWriter]:
        def writer(side: str) -> TableWriter:
            prompt = self.settings.prompt_of(side)
            table = TableWriter(folder / side, lambda texts: self.tokenize(texts, side, prompt))
            return open_tables.enter_context(closing(table))

        query = writer("query")
        return (query, query) if self._sides_read_alike() else (query, writer("document"))

    def _sides_read_alike(self) -> bool:
        """Whether a text has the same tokens on both sides: prompts, lengths, and whatever else the model does."""
        probe = ["one", "two words " * max(self.config.max_length.values())]
        query, document = (self.tokenize(probe, side, self.settings.prompt_of(side)) for side in ("query", "document"))
        return query == document

    def _source(self) -> Iterator[Example]:
        settings = self.settings
        rows = examples(settings)
        if settings.limit is not None:
            count = sum(1 for _ in examples(settings))
            if count > settings.limit:
                keep = np.zeros(count, bool)
                keep[np.random.default_rng(self.config.seed).permutation(count)[: settings.limit]] = True
                rows = (row for row, kept in zip(rows, keep, strict=True) if kept)
        return self._mined(rows) if settings.mine is not None else rows

    def _mined(self, rows: Iterator[Example]) -> Iterator[Example]:
        from embeddings.mining import mine

        settings = self.settings
        assert settings.mine is not None
        all_rows = list(rows)
        self.progress(f"mine {settings.name}", 0, len(all_rows))
        transformer = self._transformer()
        mined = mine(
            all_rows,
            settings.mine,
            transformer,
            prompt=settings.prompt,
            seed=self.config.seed,
            most=settings.negatives,
            where=settings.where,
        )
        self.progress(f"mine {settings.name}", len(all_rows), len(all_rows))
        return iter(mined)

    def _transformer(self) -> Any:
        if self.transformer is not None:
            return self.transformer()
        from embeddings.model import open_model

        model = self.config.model
        opened = open_model(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
        return opened.transformer

    def _add(self, chunk: Sequence[Example], writers: tuple[TableWriter, TableWriter]) -> None:
        single = self._single_texts(chunk)
        queries, documents = writers
        columns = self.columns
        columns.queries.append(queries.add([row.query for row in chunk]))
        if single:
            documents.add([row.query for row in chunk])  # the same numbers: the same texts in the same order
        else:
            positives = [text for row in chunk for text in row.positives]
            both = documents.add([*positives, *(text for row in chunk for text in row.negatives)])
            columns.positives.append(both[: len(positives)])
            columns.negatives.append(both[len(positives) :])
            counts = [(len(row.positives), len(row.negatives)) for row in chunk]
            columns.counts.append(np.array(counts, np.int32))
            columns.teacher.append(np.array([score for row in chunk for score in _teacher(row)], np.float32))
        if self.settings.type in GRADED:
            columns.scores.append(np.array([row.score for row in chunk], np.float64))
        if self.settings.type in ("Classification", "Clustering"):
            columns.labels.append(np.array([self._label(row.label) for row in chunk], np.int32))
        for row in chunk:
            self.digest.update(repr((row.query, row.positives, row.negatives, row.label, row.score)).encode())

    def _single_texts(self, chunk: Sequence[Example]) -> bool:
        """Whether the rows are texts whose partners are drawn."""
        single = not chunk[0].positives
        before = bool(self.columns.queries) and not self.columns.counts
        if any(bool(row.positives) == single for row in chunk) or (self.columns.queries and single != before):
            what = f"the data set '{self.settings.name}' mixes single texts and rows with positives"
            raise CuveeError(what, where=self.settings.where, mend="make two data sets of it")
        return single

    def _label(self, label: str | int | None) -> int:
        if label is None:  # of no class: alone in one of its own
            self.unnamed += 1
            return -self.unnamed
        return self.names.setdefault(label, len(self.names))

    def _label_names(self) -> list[str | int | None]:
        return [*self.names, *[None] * self.unnamed]

    def _write(self, folder: Path) -> tuple[str, ...]:
        columns = self.columns
        queries = np.concatenate(columns.queries)
        labels = np.concatenate(columns.labels) if columns.labels else None
        if labels is not None:
            labels = np.where(labels < 0, len(self.names) - 1 - labels, labels).astype(np.int32)
        scores: NDArray[Any] | None = np.concatenate(columns.scores) if columns.scores else None
        teacher = None
        notes: tuple[str, ...] = ()
        if columns.counts:
            counts = np.concatenate(columns.counts)
            positives = Ragged(offsets_of(counts[:, 0]), np.concatenate(columns.positives))
            negatives = Ragged(offsets_of(counts[:, 1]), np.concatenate(columns.negatives))
            said = np.concatenate(columns.teacher)
            teacher = Ragged(offsets_of(counts.sum(axis=1)), said) if not np.isnan(said).all() else None
            scores = None if scores is None else self._scaled(scores)
        else:
            partners = self._partners(queries, labels, scores)
            texts, rows = queries, partners.rows
            self.digest.update(np.concatenate([rows, partners.positives, partners.negatives.values]).tobytes())
            queries, labels = texts[rows], None if labels is None else labels[rows]
            positives = Ragged(np.arange(len(rows) + 1, dtype=np.int64), texts[partners.positives])
            negatives = Ragged(partners.negatives.offsets, texts[partners.negatives.values])
            scores, notes = partners.scores, partners.notes
        arrays = {"queries": queries, "labels": labels, "scores": scores}
        for name, array in arrays.items():
            if array is not None:
                np.save(folder / f"{name}.npy", array.astype(np.float32 if name == "scores" else np.int32))
        for name, ragged in {"positives": positives, "negatives": negatives, "teacher": teacher}.items():
            if ragged is not None:
                ragged.save(folder, name)
        return notes

    def _partners(
        self, texts: NDArray[np.int32], labels: NDArray[np.int32] | None, scores: NDArray[np.float64] | None
    ) -> Partners:
        rng = np.random.default_rng(self.config.seed)
        wanted = self.settings.negatives
        try:
            if labels is not None:
                names = self._label_names()
                return of_labels(texts, labels, names, NEGATIVES if wanted is None else wanted, rng)
            assert scores is not None
            return of_scores(texts, scores, rng)
        except ValueError as wrong:
            what, _, mend = f"the data set '{self.settings.name}': {wrong}".partition("; ")
            raise CuveeError(what, where=self.settings.where, mend=mend) from None

    def _scaled(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scores in [0, 1] as they are; others from their lowest to their highest."""
        low, high = scores.min(), scores.max()
        if low >= 0 and high <= 1:
            return scores
        if low == high:
            what = f"all scores of the data set '{self.settings.name}' are {low:g}"
            raise CuveeError(what, where=self.settings.where, mend="nothing can be learned from them")
        return (scores - low) / (high - low)  # type: ignore[no-any-return]


def _chunks(rows: Iterator[Example]) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row.query) + sum(map(len, row.positives)) + sum(map(len, row.negatives))
        if len(chunk) == _CHUNK_ROWS or characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _teacher(row: Example) -> tuple[float, ...]:
    return row.teacher or (float("nan"),) * (len(row.positives) + len(row.negatives))


def _open(folder: Path, settings: DataSettings) -> TrainingSet | None:
    """The set of a folder; None where there is none, or it is damaged."""
    try:
        content = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        query = TokenTable(folder / "query")

        def optional(name: str) -> NDArray[Any] | None:
            return mapped(folder / f"{name}.npy") if (folder / f"{name}.npy").is_file() else None

        return TrainingSet(
            name=settings.name,
            type=settings.type,
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
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(settings: DataSettings, config: TrainingConfig, tokenize: Tokenize, files: _FileDigests) -> str:
    """32 hexadecimal digits over all that the arrays depend on."""
    drawn = settings.type in SINGLE or settings.limit is not None or settings.mine is not None
    model = config.model
    content = {
        "form": _FORM,
        "type": settings.type,
        "source": _source_digest(settings, files),
        "columns": dict(settings.columns),
        "prompt": None if settings.prompt is None else dict(settings.prompt),
        "limit": settings.limit,
        "negatives": settings.negatives,
        "seed": config.seed if drawn else None,
        "mine": None if settings.mine is None else [asdict(settings.mine), files.of_model(model.path, model.revision)],
        "tokenizer": tokenize.digest,
        "max_length": dict(config.max_length),
    }
    return str(xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest())


def _source_digest(settings: DataSettings, files: _FileDigests) -> list[Any]:
    if settings.task is not None:
        tasks = {task.name: task for task in suite.load(settings.suite)}
        if settings.task not in tasks:
            raise CuveeError(f"the suite has no task '{settings.task}'", where=settings.where)
        return ["suite", tasks[settings.task].digest]
    if settings.hub is not None:
        return ["hub", files.of_model(settings.hub, settings.revision), settings.subset, settings.split]
    return ["files", *(files.of(Path(file), settings.where) for file in settings.files)]


class _FileDigests:
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
