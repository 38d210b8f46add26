"""EmbeddingCache: what was put comes back, bounded, whatever happens to the file or the process."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from embeddings.evaluation.embedding_cache import FILE, EmbeddingCache, text_keys
from merging.errors import CuveeError

ROOT = Path(__file__).parents[3]
WIDTH = 16
SETTINGS = {"model": "abc", "prompt": None, "dtype": "float32", "max_length": 256}


def vectors(count: int, *, width: int = WIDTH, seed: int = 0) -> dict[bytes, NDArray[np.float32]]:
    rows = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return dict(zip(text_keys({"seed": seed}, [str(i) for i in range(count)]), rows, strict=True))


def assert_holds(cache: EmbeddingCache, expected: dict[bytes, NDArray[np.float32]]) -> None:
    found = cache.get_many(list(expected))
    assert found.keys() == expected.keys()
    for key, vector in expected.items():
        np.testing.assert_array_equal(found[key], vector)


def run(code: str, folder: Path) -> subprocess.Popen[bytes]:
    """Python code in a process of its own, which says "ready" when it is."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.argv = ['', {str(folder)!r}]\n{code}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n", process.communicate()[1].decode()
    return process


def test_vectors_come_back_bit_by_bit_also_from_a_new_process(tmp_path: Path) -> None:
    expected = vectors(1203)
    special = np.array([np.inf, -0.0, 1e-45, np.finfo(np.float32).max], np.float32)
    expected[b"0" * 16] = special
    with EmbeddingCache(tmp_path / "made" / "here") as cache:
        assert cache.get_many(list(expected)) == {}
        cache.put_many(expected)
        assert_holds(cache, expected)
    with EmbeddingCache(tmp_path / "made" / "here") as cache:
        assert len(cache) == len(expected)
        assert_holds(cache, expected)
        assert cache.get_many([b"unknown"]) == {}


def test_a_later_vector_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    with EmbeddingCache(tmp_path) as cache:
        cache.put_many({b"key": np.zeros(3, np.float32)})
        cache.put_many({b"key": np.ones(5, np.float32)})
        assert_holds(cache, {b"key": np.ones(5, np.float32)})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(), unique=True, min_size=2), st.sampled_from(sorted(SETTINGS)))
def test_keys_differ_with_the_text_and_with_every_setting(texts: list[str], changed: str) -> None:
    keys = text_keys(SETTINGS, texts)
    other = text_keys({**SETTINGS, changed: "other"}, texts)
    assert len({*keys, *other}) == 2 * len(texts)
    assert keys == text_keys(dict(reversed(SETTINGS.items())), texts)


def test_half_of_a_surrogate_pair_has_a_key() -> None:
    assert text_keys({}, ["\ud800"]) != text_keys({}, ["?"])


def test_the_least_recently_used_go_first_and_the_file_keeps_its_bound(tmp_path: Path) -> None:
    now, bound = [0.0], 700_000
    first, second, third = (vectors(200, width=256, seed=seed) for seed in range(3))
    with EmbeddingCache(tmp_path, max_bytes=bound, clock=lambda: now[0]) as cache:
        for batch in (first, second):
            now[0] += 1000
            cache.put_many(batch)
        assert len(cache) == 400
        now[0] += 1000
        used = set(cache.get_many(list(first)[:100]))
        now[0] += 1000
        cache.put_many(third)
        kept = cache.get_many([*first, *second, *third]).keys()
        assert len(kept) < 600
        assert used | third.keys() <= kept
        assert not kept & (first.keys() - used) or second.keys() <= kept
    assert (tmp_path / FILE).stat().st_size <= bound


def test_a_smaller_bound_gives_disk_back(tmp_path: Path) -> None:
    with EmbeddingCache(tmp_path) as cache:
        cache.put_many(vectors(1000, width=256))
    assert (tmp_path / FILE).stat().st_size > 1_000_000
    with EmbeddingCache(tmp_path, max_bytes=200_000) as cache:
        assert 0 < len(cache) < 200
    assert (tmp_path / FILE).stat().st_size <= 200_000


def test_a_batch_larger_than_the_bound_is_no_error(tmp_path: Path) -> None:
    with EmbeddingCache(tmp_path, max_bytes=1) as cache:
        cache.put_many(vectors(2000))
        assert len(cache) == 0


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "text": lambda data: b"no database\n" * 1000,
    "cut in half": lambda data: data[: len(data) // 2],
    "cut within the header": lambda data: data[:50],
    "zeros in the middle": lambda data: data[:4096] + bytes(len(data) - 8192) + data[-4096:],
    "a schema of nonsense": lambda data: data.replace(b"CREATE TABLE", b"CREATE ELBAT"),
    "a longer page size": lambda data: data[:16] + b"\x80\x00" + data[18:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_begins_anew_and_never_raises(tmp_path: Path, damage: str) -> None:
    first, second = vectors(300), vectors(300, seed=1)
    with EmbeddingCache(tmp_path) as cache:
        cache.put_many(first)
    (tmp_path / FILE).write_bytes(DAMAGE[damage]((tmp_path / FILE).read_bytes()))
    with EmbeddingCache(tmp_path) as cache:
        for key, vector in cache.get_many(list(first)).items():
            np.testing.assert_array_equal(vector, first[key])
        cache.put_many(second)
        assert_holds(cache, second)
    with EmbeddingCache(tmp_path) as cache:
        assert_holds(cache, second)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_flipped_byte_gives_another_vector(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    expected = vectors(40)
    with EmbeddingCache(folder) as cache:
        cache.put_many(expected)
    content = bytearray((folder / FILE).read_bytes())
    for _ in range(20):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (folder / FILE).write_bytes(content)
    with EmbeddingCache(folder) as cache:
        for key, vector in cache.get_many(list(expected)).items():
            np.testing.assert_array_equal(vector, expected[key])


def test_a_file_of_another_format_is_replaced(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with EmbeddingCache(tmp_path) as cache:
        cache.put_many(vectors(3))
        assert_holds(cache, vectors(3))


def test_a_file_replaced_under_an_open_cache_is_found_again(tmp_path: Path) -> None:
    with EmbeddingCache(tmp_path) as one, EmbeddingCache(tmp_path) as other:
        one.put_many(vectors(5))
        for end in ("", "-wal", "-shm"):
            Path(f"{tmp_path / FILE}{end}").unlink(missing_ok=True)
        with EmbeddingCache(tmp_path) as third:
            third.put_many(vectors(5, seed=1))
        other.put_many(vectors(5, seed=2))
        other.put_many(vectors(5, seed=2))
        one.get_many(list(vectors(5)))
        assert_holds(other, vectors(5, seed=2))


def test_two_processes_and_threads_lose_nothing(tmp_path: Path) -> None:
    code = """
from collections.abc import Callable
from pathlib import Path
from tests.embeddings.evaluation.test_embedding_cache import EmbeddingCache, vectors
cache = EmbeddingCache(Path(sys.argv[1]))
print("ready", flush=True)
for seed in range(100, 110):
    cache.put_many(vectors(600, seed=seed))
"""
    process = run(code, tmp_path)
    with EmbeddingCache(tmp_path) as cache:
        threads = [
            threading.Thread(target=lambda seed=seed: cache.put_many(vectors(600, seed=seed))) for seed in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _, errors = process.communicate()
        assert process.returncode == 0 and not errors, errors.decode()
        for seed in (*range(6), *range(100, 110)):
            assert_holds(cache, vectors(600, seed=seed))


def test_two_processes_replace_a_damaged_file_once(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database\n" * 1000)
    code = """
from collections.abc import Callable
from pathlib import Path
from tests.embeddings.evaluation.test_embedding_cache import EmbeddingCache, vectors
print("ready", flush=True)
with EmbeddingCache(Path(sys.argv[1])) as cache:
    cache.put_many(vectors(300, seed=1))
"""
    process = run(code, tmp_path)
    with EmbeddingCache(tmp_path) as cache:
        cache.put_many(vectors(300))
        process.communicate()
        assert process.returncode == 0
        assert_holds(cache, vectors(300) | vectors(300, seed=1))


def test_what_was_put_survives_a_kill_at_any_moment(tmp_path: Path) -> None:
    code = """
from collections.abc import Callable
from pathlib import Path
from tests.embeddings.evaluation.test_embedding_cache import EmbeddingCache, vectors
cache = EmbeddingCache(Path(sys.argv[1]))
cache.put_many(vectors(700))
print("ready", flush=True)
seed = 1
while True:
    cache.put_many(vectors(700, seed=seed))
    seed += 1
"""
    for _ in range(3):
        process = run(code, tmp_path)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with EmbeddingCache(tmp_path) as cache:
            assert_holds(cache, vectors(700))


def test_a_fork_does_not_use_its_parents_connection(tmp_path: Path) -> None:
    code = """
import os
from collections.abc import Callable
from pathlib import Path
from tests.embeddings.evaluation.test_embedding_cache import EmbeddingCache, assert_holds, vectors
cache = EmbeddingCache(Path(sys.argv[1]))
cache.put_many(vectors(10))
if os.fork() == 0:
    assert_holds(cache, vectors(10))
    cache.put_many(vectors(10, seed=1))
    os._exit(0)
assert os.wait()[1] == 0
assert_holds(cache, vectors(10, seed=1))
print("ready", flush=True)
"""
    process = run(code, tmp_path)
    process.communicate()
    assert process.returncode == 0


def test_on_a_full_disk_the_work_goes_on_without_it(tmp_path: Path) -> None:
    code = """
import resource, signal
from collections.abc import Callable
from pathlib import Path
from tests.embeddings.evaluation.test_embedding_cache import EmbeddingCache, vectors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
cache = EmbeddingCache(Path(sys.argv[1]))
cache.put_many(vectors(5000))
cache.get_many(list(vectors(5000)))
cache.put_many(vectors(5))
print("ready", flush=True)
"""
    process = run(code, tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0
    assert errors.decode().count("is not used any more") == 1, errors.decode()


def test_a_folder_that_cannot_be_written_to_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CuveeError, match="cannot be written to"):
        EmbeddingCache(tmp_path / "file" / "folder")
    with pytest.raises(CuveeError, match="holds nothing"):
        EmbeddingCache(tmp_path, max_bytes=0)
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(CuveeError, match="cannot be written to"):
            EmbeddingCache(tmp_path / "closed")
