"""EmbeddingCache: vectors on disk by what they were made of, so that no text is encoded twice by the same model.

One SQLite file in write-ahead mode. Each batch is a transaction: a killed process loses at most the batch it was
writing, and any number of processes share the file. It is a cache and nothing more: a damaged file is replaced, a
damaged vector is forgotten, and where the disk is full the work goes on without it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from merging.errors import CuveeError

Vector = NDArray[np.float32]
Result = TypeVar("Result")

FILE = "embeddings.sqlite"
_FORMAT = 1  # goes up when the table changes; a file of another format is replaced
_CHECKSUM_BYTES = 8
_ROWS = 500  # keys of one query, and rows of one transaction: others wait no longer than that
_STALE = 60  # seconds after which a hit is worth a write that says so
_KEEP = 0.9  # share of the bound that an eviction leaves, so that the next batch does not evict again
_PATIENCE = 30.0  # seconds to wait for another process's transaction

_log = logging.getLogger(__name__)


class EmbeddingCache:
    """Vectors by key, bounded: the least recently used go first. Safe under threads and under several processes.

    Args:
        folder: where the file lies; made if it is missing.
        max_bytes: of the file, more or less one transaction.
        clock: seconds since the epoch; when a vector was last used.

    Raises:
        CuveeError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path | str, *, max_bytes: int = 4 << 30, clock: Callable[[], float] = time.time) -> None:
        if max_bytes < 1:
            raise CuveeError(f"a cache of {max_bytes} bytes holds nothing", mend="give at least 1 MB")
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._clock = clock
        self._mutex = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int, int] | None = None  # this process, and the file's device and inode
        self._works = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                pass
        except OSError as error:
            what = f"cannot be written to: {error.strerror}"
            raise CuveeError(what, where=str(self.folder), mend="choose another folder") from error
        self._attempt(lambda connection: _evict(connection, self.max_bytes), 0)

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, Vector]:
        """The vectors of those keys that are known."""
        found: dict[bytes, Vector] = {}
        for start in range(0, len(keys), _ROWS):
            nothing: dict[bytes, Vector] = {}
            found.update(self._attempt(partial(self._get, keys=keys[start : start + _ROWS]), nothing))
        return found

    def put_many(self, vectors: Mapping[bytes, Vector]) -> None:
        """Keeps vectors, each one-dimensional; on return they survive a kill of this process."""
        entries = list(vectors.items())
        for start in range(0, len(entries), _ROWS):
            self._attempt(partial(self._put, entries=entries[start : start + _ROWS]), None)

    def __len__(self) -> int:
        return self._attempt(lambda connection: int(_value(connection, "SELECT COUNT(*) FROM embeddings")), 0)

    def close(self) -> None:
        with self._mutex:
            if self._connection is not None and self._opened is not None and self._opened[0] == os.getpid():
                with suppress(sqlite3.Error):
                    self._connection.close()
            self._connection = None

    def __enter__(self) -> EmbeddingCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # One batch.

    def _get(self, connection: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, Vector]:
        marks, now = ",".join("?" * len(keys)), int(self._clock())
        rows = connection.execute(f"SELECT key, used, vector FROM embeddings WHERE key IN ({marks})", keys).fetchall()
        found, damaged, stale = {}, [], []
        for key, used, stored in rows:
            vector = _unpack(key, stored)
            if vector is None:
                damaged.append((key,))
                continue
            found[key] = vector
            if not isinstance(used, int) or now - used >= _STALE:
                stale.append((now, key))
        if damaged or stale:
            with suppress(_Busy), _transaction(connection):
                connection.executemany("DELETE FROM embeddings WHERE key = ?", damaged)
                connection.executemany("UPDATE embeddings SET used = ? WHERE key = ?", stale)
        return found

    def _put(self, connection: sqlite3.Connection, entries: Sequence[tuple[bytes, Vector]]) -> None:
        now = int(self._clock())
        with _transaction(connection):
            connection.executemany(
                "INSERT OR REPLACE INTO embeddings (key, used, vector) VALUES (?, ?, ?)",
                [(key, now, _pack(key, vector)) for key, vector in entries],
            )
        _evict(connection, self.max_bytes)

    # The file.

    def _attempt(self, work: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
        """The result of `work`, on a new file if the old one proves damaged; `otherwise` where nothing helps."""
        with self._mutex:
            for _ in range(2):
                if not self._works:
                    break
                try:
                    return work(self._connect())
                except _Busy:
                    break
                except (
                    sqlite3.Error,
                    UnicodeDecodeError,
                    OSError,
                ) as error:  # SQLite quotes damaged names in its errors
                    self._recover(error)
        return otherwise

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None and self._opened is not None and self._opened[0] != os.getpid():
            # A fork's copy, which only the parent may use; not closed: that would drop its locks.
            self._connection = None
        if self._connection is None:
            with self._alone():
                self._connection = _open(self.folder / FILE)
                self._opened = (os.getpid(), *_identity(self.folder / FILE))
        return self._connection

    def _recover(self, error: Exception) -> None:
        """Closes the file, and removes it if it is damaged and still the one that was open."""
        text, ours = str(error), self._opened
        self.close()
        with suppress(OSError), self._alone():
            here = _identity(self.folder / FILE)
            if ours is not None and here != ours[1:]:
                return  # another process has replaced it already
            if isinstance(error, OSError) or any(sign in text for sign in _NO_DAMAGE):
                self._works = False
                _log.warning("the embedding cache %s is not used any more: %s", self.folder, text)
                return
            _log.warning("the embedding cache %s is damaged (%s) and begins anew", self.folder, text)
            for end in ("", "-wal", "-shm", "-journal"):
                with suppress(FileNotFoundError):
                    os.unlink(f"{self.folder / FILE}{end}")
            return
        self._works = False

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time: while the file is made or replaced."""
        handle = os.open(self.folder / f"{FILE}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def text_keys(settings: Mapping[str, Any], texts: Sequence[str]) -> list[bytes]:
    """Keys of texts, 16 bytes each (xxh3).

    Args:
        settings: all else that the vectors depend on: the model's digest, the prompt, dtype, length; JSON values.
    """
    prefix = xxhash.xxh3_128_digest(json.dumps(settings, sort_keys=True).encode())
    return [xxhash.xxh3_128_digest(prefix + text.encode("utf-8", "surrogatepass")) for text in texts]


class _Busy(Exception):
    """Another process holds the file for longer than we wait."""


#: In SQLite's words: what is wrong with the disk or its permissions, and would be with a new file too.
_NO_DAMAGE = ("is full", "readonly", "read-only", "unable to open", "disk I/O", "out of memory")


def _open(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(file, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
    try:
        if _value(connection, "PRAGMA user_version") not in (0, _FORMAT):
            raise sqlite3.DatabaseError("it is of another format")
        if not _value(connection, "SELECT COUNT(*) FROM sqlite_master WHERE name = 'embeddings'"):
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # what is evicted is given back to the disk
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(
                f"""BEGIN;
                CREATE TABLE embeddings (key BLOB PRIMARY KEY, used INTEGER NOT NULL, vector BLOB NOT NULL);
                CREATE INDEX by_use ON embeddings (used);
                PRAGMA user_version = {_FORMAT};
                COMMIT;"""
            )
        # A kill loses nothing; a power cut may lose the last transactions, never the file.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA journal_size_limit = 16000000")
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise _Busy from error
        raise
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _evict(connection: sqlite3.Connection, max_bytes: int) -> int:
    """Removes the least recently used vectors until the file is within its bound; how many."""
    pages, page = _value(connection, "PRAGMA page_count"), _value(connection, "PRAGMA page_size")
    size = pages * page
    if size <= max_bytes:
        return 0
    size -= _value(connection, "PRAGMA freelist_count") * page
    count = 0
    with _transaction(connection):
        if size > max_bytes:
            rows = _value(connection, "SELECT COUNT(*) FROM embeddings")
            count = min(rows, int(rows * (1 - _KEEP * max_bytes / size)) + 1)
            oldest = "SELECT key FROM embeddings ORDER BY used LIMIT ?"
            connection.execute(f"DELETE FROM embeddings WHERE key IN ({oldest})", (count,))
    # It gives back one page a step, and `execute` takes one step of what has no columns.
    connection.executescript("PRAGMA incremental_vacuum")
    return count


def _value(connection: sqlite3.Connection, query: str) -> Any:
    with closing(connection.execute(query)) as cursor:
        return cursor.fetchone()[0]


def _pack(key: bytes, vector: Vector) -> bytes:
    data = np.ascontiguousarray(vector, dtype="<f4").tobytes()
    return bytes(xxhash.xxh3_64_digest(key + data)) + data


def _unpack(key: Any, stored: Any) -> Vector | None:
    """The vector; None if it is not what was stored: SQLite does not check its pages."""
    if not isinstance(key, bytes) or not isinstance(stored, bytes) or len(stored) < _CHECKSUM_BYTES:
        return None
    checksum, data = stored[:_CHECKSUM_BYTES], stored[_CHECKSUM_BYTES:]
    if checksum != xxhash.xxh3_64_digest(key + data):
        return None
    return np.frombuffer(data, dtype="<f4").astype(np.float32, copy=False)


def _identity(file: Path) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return (0, 0)
    return status.st_dev, status.st_ino
