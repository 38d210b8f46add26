"""TokenTable: distinct texts as token ids on disk, memory-mapped; and Ragged: rows of different length.

A table's folder holds `tokens.npy` (int32, all texts one after another), `offsets.npy` (int64, where each begins), and
the texts themselves as UTF-8 in `texts.npy` and `text_offsets.npy`. It is written in one stream: only the digests of the
texts seen so far, 16 bytes each, stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

TokenizeTexts = Callable[[list[str]], list[list[int]]]

_BATCH = 4096  # texts that are tokenised at once


@dataclass(frozen=True)
class Ragged:
    """Rows of different length, one after another.

    Attributes:
        offsets: (rows + 1,) int64, from 0.
        values: (offsets[-1],)
    """

    offsets: NDArray[np.int64]
    values: NDArray[Any]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @classmethod
    def of(cls, rows: Iterable[Sequence[Any]], dtype: Any = np.int32) -> Ragged:
        """From sequences of values."""
        lists = [np.asarray(row, dtype) for row in rows]
        lengths = np.array([len(row) for row in lists], np.int64)
        return cls(offsets_of(lengths), np.concatenate([*lists, np.zeros(0, dtype)]))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,)"""
        return np.diff(self.offsets)

    @property
    def whole(self) -> bool:
        """Whether the offsets are those of the values."""
        return len(self.offsets) > 0 and self.offsets[0] == 0 and int(self.offsets[-1]) == len(self.values)

    def kept(self, keep: NDArray[np.bool_]) -> Ragged:
        """Without the values where `keep`, (values,), is false."""
        counts = np.concatenate([[0], np.cumsum(keep)])
        return Ragged(counts[self.offsets].astype(np.int64), self.values[keep])

    def save(self, folder: Path, name: str) -> None:
        np.save(folder / f"{name}.offsets.npy", self.offsets)
        np.save(folder / f"{name}.values.npy", self.values)

    @classmethod
    def load(cls, folder: Path, name: str) -> Ragged:
        """Memory-mapped."""
        return cls(mapped(folder / f"{name}.offsets.npy"), mapped(folder / f"{name}.values.npy"))


class TextTable(Protocol):
    """Distinct texts of a side, as a batch takes them.

    Attributes:
        lengths: (texts,) tokens of each.
    """

    @property
    def lengths(self) -> NDArray[np.int32]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """`backbone.Text`: what the model reads."""

    def text(self, index: int) -> str:
        """The text itself, without its prompt; equal for equal texts."""


class TokenTable:
    """Distinct texts as token ids.

    Attributes:
        folder: where it lies.
        lengths: (texts,) int32, in memory.

    Raises:
        ValueError, OSError: the folder is damaged, or none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokens: NDArray[np.int32] = mapped(folder / "tokens.npy")
        self._offsets: NDArray[np.int64] = mapped(folder / "offsets.npy")
        self._texts: NDArray[np.uint8] = mapped(folder / "texts.npy")
        self._text_offsets: NDArray[np.int64] = mapped(folder / "text_offsets.npy")
        self.lengths: NDArray[np.int32] = np.diff(self._offsets).astype(np.int32)
        parts = (Ragged(self._offsets, self._tokens), Ragged(self._text_offsets, self._texts))
        if not all(part.whole for part in parts) or len(parts[0]) != len(parts[1]):
            raise ValueError(f"{folder} is damaged")

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenTable, (self.folder,)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        """Token ids of a text, with the prompt before it and the special tokens; (tokens,)."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = index % len(self)
        return self._tokens[self._offsets[index] : self._offsets[index + 1]]

    def text(self, index: int) -> str:
        """The text itself, without its prompt."""
        return self._texts[self._text_offsets[index] : self._text_offsets[index + 1]].tobytes().decode()


class TableWriter:
    """Writes a table text by text; equal texts are one."""

    def __init__(self, folder: Path, tokenize: TokenizeTexts) -> None:
        folder.mkdir(parents=True)
        self._tokenize = tokenize
        self._seen = _Digests()
        self._columns = {
            "tokens": _GrowingArray(folder / "tokens.npy", np.int32),
            "offsets": _GrowingArray(folder / "offsets.npy", np.int64),
            "texts": _GrowingArray(folder / "texts.npy", np.uint8),
            "text_offsets": _GrowingArray(folder / "text_offsets.npy", np.int64),
        }
        self._columns["offsets"].append(np.zeros(1, np.int64))
        self._columns["text_offsets"].append(np.zeros(1, np.int64))

    def add(self, texts: Sequence[str]) -> NDArray[np.int32]:
        """The index of each text, (texts,); what is new is tokenised and written."""
        raw = [text.encode() for text in texts]
        indices, new = self._seen.add(digests(raw))
        for start in range(0, len(new), _BATCH):
            part = new[start : start + _BATCH]
            self._write("texts", "text_offsets", [np.frombuffer(raw[i], np.uint8) for i in part])
            tokens = self._tokenize([texts[i] for i in part])
            self._write("tokens", "offsets", [np.asarray(each, np.int32) for each in tokens])
        return indices

    def close(self) -> None:
        for column in self._columns.values():
            column.close()

    def _write(self, values: str, offsets: str, parts: Sequence[NDArray[Any]]) -> None:
        before = self._columns[values].length
        self._columns[offsets].append(before + np.cumsum([len(part) for part in parts], dtype=np.int64))
        self._columns[values].append(np.concatenate(parts))


def digests(raw: Sequence[bytes]) -> NDArray[np.uint64]:
    """128 bits of each text; (texts, 2)."""
    joined = b"".join(xxhash.xxh3_128_digest(text) for text in raw)
    return np.frombuffer(joined, np.uint64).reshape(-1, 2)


def offsets_of(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """(rows + 1,) from (rows,)."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def mapped(file: Path) -> NDArray[Any]:
    """An array on disk, for reading, as a plain view: slices of np.memmap itself cost ten times as much."""
    return np.load(file, mmap_mode="r").view(np.ndarray)  # type: ignore[no-any-return]


class _Digests:
    """Numbers distinct digests in the order in which they come: a hash table of arrays, 20 bytes a place."""

    def __init__(self, places: int = 1 << 12) -> None:
        self._count = 0
        self._keys = np.zeros((places, 2), np.uint64)
        self._values = np.full(places, -1, np.int32)

    def add(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.int32], list[int]]:
        """The number of each key, (keys,), and the positions of those that are new, in the order of their numbers."""
        _, first, inverse = np.unique(keys[:, 0] ^ (keys[:, 1] << np.uint64(1)), return_index=True, return_inverse=True)
        if not np.array_equal(keys[first][inverse.reshape(-1)], keys):  # two keys of one mixture: as good as never
            _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first)  # of the distinct keys, by their first position
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        distinct = first[order]
        while 2 * (self._count + len(distinct)) > len(self._values):
            self._grow()
        numbers = self._find(keys[distinct])
        new = np.flatnonzero(numbers < 0)
        numbers[new] = np.arange(self._count, self._count + len(new), dtype=np.int32)
        self._insert(keys[distinct[new]], numbers[new])
        self._count += len(new)
        return numbers[rank[inverse.reshape(-1)]], distinct[new].tolist()

    def _find(self, keys: NDArray[np.uint64]) -> NDArray[np.int32]:
        """The number of each key; -1 of those that are not there."""
        found = np.full(len(keys), -1, np.int32)
        waiting, place = np.arange(len(keys)), self._first_place(keys)
        while len(waiting):
            value = self._values[place]
            same = (value >= 0) & (self._keys[place] == keys[waiting]).all(axis=1)
            found[waiting[same]] = value[same]
            on = (value >= 0) & ~same
            waiting, place = waiting[on], (place[on] + 1) & (len(self._values) - 1)
        return found

    def _insert(self, keys: NDArray[np.uint64], values: NDArray[np.int32]) -> None:
        """Distinct keys that are not there; of several that want one place, one gets it and the others go on."""
        waiting, place = np.arange(len(keys)), self._first_place(keys)
        while len(waiting):
            free = self._values[place] < 0
            self._values[place[free]] = values[waiting[free]]
            mine = free & (self._values[place] == values[waiting])
            self._keys[place[mine]] = keys[waiting[mine]]
            waiting, place = waiting[~mine], (place[~mine] + 1) & (len(self._values) - 1)

    def _first_place(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        place: NDArray[np.int64] = (keys[:, 0] & np.uint64(len(self._values) - 1)).astype(np.int64)
        return place

    def _grow(self) -> None:
        taken = self._values >= 0
        keys, values = self._keys[taken], self._values[taken]
        self._keys = np.zeros((2 * len(self._values), 2), np.uint64)
        self._values = np.full(2 * len(self._values), -1, np.int32)
        self._insert(keys, values)


class _GrowingArray:
    """A one-dimensional .npy file that is written piece by piece; its header is put right at the end."""

    def __init__(self, file: Path, dtype: Any) -> None:
        self.length = 0
        self._dtype = np.dtype(dtype)
        self._stream: BinaryIO = open(file, "wb")  # noqa: SIM115
        self._header()

    def append(self, values: NDArray[Any]) -> None:
        self._stream.write(np.ascontiguousarray(values, self._dtype).data)
        self.length += len(values)

    def close(self) -> None:
        self._stream.seek(0)
        self._header()
        self._stream.close()

    def _header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        content = {"descr": descr, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._stream, content)  # numpy leaves room for any length
