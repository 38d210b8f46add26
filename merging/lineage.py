"""cuvee.json beside every output: what it was made of and how, so that it can be made again and told from any other."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from merging.checkpoint import Checkpoint, TensorInfo, read_json
from merging.errors import CuveeError

FILE = "cuvee.json"
_BLOCK = 1 << 20


def cuvee_version() -> str:
    try:
        return version("cuvee")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"


def versions(*packages: str) -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def tensor_digest(checkpoint: Checkpoint, info: TensorInfo) -> str:
    """128 bits of the tensor's stored bytes (xxh3), in hexadecimal."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(_BLOCK, info.nbytes)))
    for start in range(0, info.nbytes, _BLOCK):
        part = buffer[: min(_BLOCK, info.nbytes - start)]
        checkpoint.read_into(info, start, part)
        digest.update(part)
    return str(digest.hexdigest())


def combined_digest(tensors: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """Digest of a model's weights from (name, dtype, shape, tensor digest), whatever their order or sharding."""
    digest = xxhash.xxh3_128()
    for name, dtype, shape, tensor in sorted(tensors):
        digest.update(f"{name}\0{dtype}\0{list(shape)}\0{tensor}\n".encode())
    return f"xxh3:{digest.hexdigest()}"


def weights_digest(checkpoint: Checkpoint, known: Mapping[str, str] | None = None) -> str:
    """Digest of all weights of a checkpoint; tensors whose digest is `known` by name are not read again."""
    known = known or {}
    return combined_digest(
        (info.name, info.dtype, info.shape, known.get(name) or tensor_digest(checkpoint, info))
        for name, info in checkpoint.tensors.items()
    )


def file_digest(file: Path) -> str:
    """Digest of a file's bytes."""
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return f"xxh3:{digest.hexdigest()}"


def write(folder: Path, content: Mapping[str, Any]) -> None:
    # A folder's name that is no UTF-8 holds halves of surrogate pairs: they become JSON's own escapes.
    (folder / FILE).write_text(text(content), encoding="utf-8", errors="backslashreplace")


def text(content: Mapping[str, Any]) -> str:
    """What cuvee.json says."""
    return json.dumps({"cuvee_version": cuvee_version(), **content}, indent=2, ensure_ascii=False) + "\n"


def read(file: Path) -> dict[str, Any]:
    """The lineage of an output, given its folder or the file itself.

    Raises:
        CuveeError: there is none.
    """
    file = file / FILE if os.path.isdir(file) else file
    if not os.path.isfile(file):
        raise CuveeError("no such lineage", where=str(file), mend=f"give an output's folder or its {FILE}")
    return read_json(file)


def read_merge(file: Path) -> dict[str, Any]:
    """As `read`, and everything that a merge is made again from is there, of the right kind.

    Raises:
        CuveeError: it is not.
    """
    past = read(file)
    if past.get("command") != "merge":
        raise CuveeError("is not the lineage of a merge", where=str(file))
    inputs = past.get("inputs")
    sound = {
        **{key: isinstance(past.get(key), str) for key in ("recipe", "device", "output", "working_directory")},
        "recipe_directory": isinstance(past.get("recipe_directory"), str | None),
        "seed": type(past.get("seed")) is int,
        "shard_size": type(past.get("shard_size")) is int and past["shard_size"] > 0,
        "inputs": isinstance(inputs, list)
        and all(isinstance(i, dict) and {"model", "digest"} <= i.keys() for i in inputs),
    }
    for key, is_sound in sound.items():
        if not is_sound:
            raise CuveeError(f"has no '{key}', or none that can be used", where=str(file), mend="merge anew")
    return past
