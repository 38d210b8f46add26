"""Token tables: distinct texts numbered as a dictionary would, whatever the chunks; rows of different length."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from embeddings.training.token_table import Ragged, TableWriter, TokenTable, digests, mapped, offsets_of


def lengths_and_letters(texts: list[str]) -> list[list[int]]:
    return [[len(text), *map(ord, text)] for text in texts]


@pytest.mark.parametrize("chunk", [1, 7, 5000])
def test_texts_are_numbered_as_by_a_dictionary(chunk: int, tmp_path: Path) -> None:
    rng = random.Random(0)
    count = 600 if chunk == 1 else 20_000  # several times the first size of the table
    texts = [f"{rng.randrange(count)} täxt" for _ in range(count)]
    writer = TableWriter(tmp_path / "table", lengths_and_letters)
    found = np.concatenate([writer.add(texts[start : start + chunk]) for start in range(0, count, chunk)])
    writer.close()
    known: dict[str, int] = {}
    assert found.tolist() == [known.setdefault(text, len(known)) for text in texts]
    assert found.dtype == np.int32
    table = TokenTable(tmp_path / "table")
    assert len(table) == len(known)
    for text, index in rng.sample(sorted(known.items()), 300):
        assert table.text(index) == text and table[index].tolist() == lengths_and_letters([text])[0]
        assert table.lengths[index] == len(text) + 1


def test_each_text_is_tokenised_once(tmp_path: Path) -> None:
    seen: list[str] = []

    def tokenize(texts: list[str]) -> list[list[int]]:
        seen.extend(texts)
        return [[1] for _ in texts]

    writer = TableWriter(tmp_path / "table", tokenize)
    for chunk in (["a", "b", "a"], [], ["b", "c"], ["a"]):
        writer.add(chunk)
    writer.close()
    assert seen == ["a", "b", "c"]


def test_the_files_are_ordinary_arrays(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path / "table", lengths_and_letters)
    writer.add(["ab", "c"])
    writer.close()
    table = TokenTable(tmp_path / "table")
    assert np.load(tmp_path / "table" / "tokens.npy").tolist() == [2, 97, 98, 1, 99]
    assert np.load(tmp_path / "table" / "offsets.npy").tolist() == [0, 3, 5]
    with pytest.raises(IndexError):
        table[2]
    with pytest.raises(ValueError, match="read-only"):
        table[0][0] = 1
    assert pickle.loads(pickle.dumps(table))[1].tolist() == [1, 99]


def test_an_empty_table_and_empty_texts(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path / "none", lengths_and_letters)
    assert writer.add([]).tolist() == []
    writer.close()
    assert len(TokenTable(tmp_path / "none")) == 0
    writer = TableWriter(tmp_path / "empty", lambda texts: [[] for _ in texts])
    assert writer.add([""]).tolist() == [0]
    writer.close()
    table = TokenTable(tmp_path / "empty")
    assert table.text(0) == "" and table[0].tolist() == []


def test_ragged_rows_keep_their_values(tmp_path: Path) -> None:
    rows = [[1, 2, 3], [], [4], [5, 6]]
    ragged = Ragged.of(rows)
    assert len(ragged) == 4 and [ragged[i].tolist() for i in range(4)] == rows
    assert ragged.lengths.tolist() == [3, 0, 1, 2] and ragged.offsets.dtype == np.int64
    kept = ragged.kept(ragged.values % 2 == 0)
    assert [kept[i].tolist() for i in range(4)] == [[2], [], [4], [6]]
    ragged.save(tmp_path, "rows")
    again = Ragged.load(tmp_path, "rows")
    assert [again[i].tolist() for i in range(4)] == rows and type(again.values) is np.ndarray
    assert len(Ragged.of([])) == 0


def test_digests_are_of_the_bytes() -> None:
    found = digests([b"a", b"b", b"a"])
    assert found.shape == (3, 2) and (found[0] == found[2]).all() and (found[0] != found[1]).any()
    assert digests([]).shape == (0, 2)


def test_offsets_count_from_zero(tmp_path: Path) -> None:
    assert offsets_of(np.array([2, 0, 3])).tolist() == [0, 2, 2, 5]
    np.save(tmp_path / "empty.npy", np.zeros(0, np.int32))
    assert mapped(tmp_path / "empty.npy").shape == (0,)
