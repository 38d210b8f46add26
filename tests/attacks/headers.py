"""Safetensors files that lie, or are damaged: each with what the error must say."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tests.checkpoints import container, safetensors, some


class Header(NamedTuple):
    """One file.

    says: a part of the error.
    stricter: the safetensors library takes it; why we do not.
    """

    content: bytes
    says: str
    stricter: str = ""


def _entry(begin: int = 0, end: int = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


_DATA = bytes(range(64))
_GOOD = safetensors({"w": some((4,))})
_TWO = {"a": _entry(), "b": _entry(16, 32)}
_HUGE = "9" * 5000

HEADERS: dict[str, Header] = {
    "empty file": Header(b"", "truncated"),
    "seven bytes": Header(b"\x02\0\0\0\0\0\0", "truncated"),
    "no header after its length": Header((2).to_bytes(8, "little"), "truncated"),
    "header longer than the file": Header(container({"w": _entry()}, _DATA[:16], 10_000), "truncated"),
    "header of 2^64 - 1 bytes": Header(b"\xff" * 8 + b"{}", "truncated"),
    "length of 0": Header(bytes(8) + b"{}", "malformed header"),
    "a zip, as torch saves": Header(b"PK\x03\x04" + bytes(200), "truncated"),
    "a pickle": Header(b"\x80\x02}q\x00." + bytes(200), "truncated"),
    "a web page": Header(b"<!DOCTYPE html><html><body>404</body></html>", "truncated"),
    "git-lfs pointer": Header(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "truncated"),
    "data cut off": Header(_GOOD[:-1], "truncated"),
    "data cut in half": Header(_GOOD[:-8], "truncated"),
    "bytes behind the data": Header(_GOOD + b"\0", "header lies"),
    "no tensor but data": Header(container({}, _DATA), "header lies"),
    "not UTF-8": Header(container(b'{"\xff": 1}', _DATA), "malformed"),
    "not JSON": Header(container(b"{'w': 1}", _DATA), "malformed"),
    "cut JSON": Header(container(b'{"w": {"dtype": "F32"', _DATA), "malformed"),
    "JSON behind the JSON": Header(container(b"{}{}", b""), "malformed"),
    "space before the JSON": Header(
        container(b" " + json.dumps({"w": _entry()}).encode(), _DATA[:16]),
        "malformed",
        "the format wants a brace first",
    ),
    "a list": Header(container(b"[1, 2]"), "malformed"),
    "a number": Header(container(b"17"), "malformed"),
    "null": Header(container(b"null"), "malformed"),
    "nested 100,000 deep": Header(container(b'{"w": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "malformed"),
    "objects 100,000 deep": Header(container(b'{"w": ' * 100_000 + b"1" + b"}" * 100_000), "malformed"),
    "Infinity": Header(
        container(b'{"w": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 16]}}'), "malformed"
    ),
    "half of a surrogate pair": Header(
        container(b'{"\\ud800": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}', _DATA[:16]), "malformed"
    ),
    "a name twice": Header(
        container(b'{"w": %b, "w": %b}' % ((json.dumps(_entry()).encode(),) * 2), _DATA[:16]),
        "twice",
        "two tensors of one name: which of them is meant?",
    ),
    "a key twice": Header(
        container(b'{"w": {"dtype": "F32", "dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}', _DATA[:16]),
        "twice",
    ),
    "entry is null": Header(container({"w": None}), "lacks dtype"),
    "entry is a list": Header(container({"w": [1, 2, 3]}), "lacks dtype"),
    "entry is text": Header(container({"w": "F32"}), "lacks dtype"),
    "no dtype": Header(container({"w": {"shape": [4], "data_offsets": [0, 16]}}, _DATA[:16]), "lacks dtype"),
    "no shape": Header(container({"w": {"dtype": "F32", "data_offsets": [0, 16]}}, _DATA[:16]), "lacks dtype"),
    "no offsets": Header(container({"w": {"dtype": "F32", "shape": [4]}}, _DATA[:16]), "lacks dtype"),
    "one offset": Header(
        container({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}, _DATA[:16]), "lacks dtype"
    ),
    "three offsets": Header(
        container({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, _DATA[:16]), "lacks dtype"
    ),
    "offsets are text": Header(
        container({"w": {"dtype": "F32", "shape": [4], "data_offsets": "ab"}}, _DATA[:16]), "whole numbers"
    ),
    "shape is a number": Header(
        container({"w": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}}, _DATA[:16]), "lacks dtype"
    ),
    "shape is an object": Header(
        container({"w": {"dtype": "F32", "shape": {"4": 4}, "data_offsets": [0, 16]}}, _DATA[:16]), "whole numbers"
    ),
    "shape of floats": Header(container({"w": _entry(shape=(4.0,))}, _DATA[:16]), "whole numbers"),
    "shape of truth values": Header(container({"w": _entry(0, 4, (True,))}, _DATA[:4]), "whole numbers"),
    "shape of lists": Header(container({"w": _entry(shape=([4],))}, _DATA[:16]), "whole numbers"),
    "shape under zero": Header(container({"w": _entry(shape=(-2, -2))}, _DATA[:16]), "whole numbers"),
    "offsets under zero": Header(container({"w": _entry(-16, 0)}, _DATA[:16]), "whole numbers"),
    "offsets swapped": Header(container({"w": _entry(16, 0)}, _DATA[:16]), "header lies"),
    "offsets are floats": Header(container({"w": _entry(0.0, 16.0)}, _DATA[:16]), "whole numbers"),  # type: ignore[arg-type]
    "offsets beyond 2^64": Header(container({"w": _entry(0, 1 << 70)}, _DATA[:16]), "whole numbers"),
    "a number of 5,000 digits": Header(
        container(b'{"w": {"dtype": "F32", "shape": [%b], "data_offsets": [0, 16]}}' % _HUGE.encode(), _DATA[:16]),
        "malformed",
    ),
    "shape that wraps to the size": Header(container({"w": _entry(shape=(1 << 32, 1 << 32, 4))}, _DATA[:16]), "lies"),
    "shape that overflows, times 0": Header(container({"w": _entry(0, 0, (1 << 40, 1 << 40, 0))}), "header lies"),
    "100,000 dimensions": Header(
        container({"w": _entry(shape=[1 << 40] * 100_000)}, _DATA[:16]), "of 100000 dimensions"
    ),
    "shape larger than the data": Header(container({"w": _entry(shape=(5,))}, _DATA[:16]), "header lies"),
    "shape smaller than the data": Header(container({"w": _entry(shape=(3,))}, _DATA[:16]), "header lies"),
    "wider dtype than the data": Header(container({"w": _entry(dtype="F64")}, _DATA[:16]), "header lies"),
    "narrower dtype than the data": Header(container({"w": _entry(dtype="BF16")}, _DATA[:16]), "header lies"),
    "unknown dtype": Header(container({"w": _entry(dtype="F33")}, _DATA[:16]), "unknown dtype"),
    "dtype of torch": Header(container({"w": _entry(dtype="float32")}, _DATA[:16]), "unknown dtype"),
    "dtype is null": Header(container({"w": _entry(dtype=None)}, _DATA[:16]), "unknown dtype"),
    "dtype is a list": Header(container({"w": _entry(dtype=["F32"])}, _DATA[:16]), "unknown dtype"),
    "half a byte an element": Header(
        container({"w": _entry(0, 2, (4,), "F4")}, _DATA[:2]), "unknown dtype", "packed floats cannot be averaged"
    ),
    "first tensor beyond the file": Header(container({"w": _entry(1 << 40, (1 << 40) + 16)}, _DATA[:16]), "lies"),
    "second tensor beyond the file": Header(container(_TWO, _DATA[:16]), "truncated"),
    "hole before": Header(container({"w": _entry(16, 32)}, _DATA[:32]), "header lies"),
    "hole between": Header(container({"a": _entry(), "b": _entry(32, 48)}, _DATA[:48]), "header lies"),
    "overlap by half": Header(container({"a": _entry(), "b": _entry(8, 24)}, _DATA[:24]), "header lies"),
    "overlap altogether": Header(container({"a": _entry(), "b": _entry()}, _DATA[:16]), "header lies"),
    "one inside the other": Header(
        container({"a": _entry(0, 48, (12,)), "b": _entry(16, 32)}, _DATA[:48]), "header lies"
    ),
    "metadata is text": Header(container({"__metadata__": "pt", "w": _entry()}, _DATA[:16]), "__metadata__"),
    "metadata is a list": Header(container({"__metadata__": ["pt"], "w": _entry()}, _DATA[:16]), "__metadata__"),
    "metadata of numbers": Header(container({"__metadata__": {"n": 1}, "w": _entry()}, _DATA[:16]), "__metadata__"),
    "metadata of objects": Header(container({"__metadata__": {"n": {}}, "w": _entry()}, _DATA[:16]), "__metadata__"),
}
