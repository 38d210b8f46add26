"""A folder of statistics: tensors by the names of the model's weights, and a manifest that says of what.

    STATS/statistics.safetensors   float32: by weight, its Fisher diagonal, its inputs' second moments or Gram matrix
    STATS/cuvee.json               kind, data, how many examples, seed, settings, and of which model

Every value is a mean: Fisher's over examples, the others' over the input rows that the layer has read. So folders made
from parts of the data combine, each weighted by what it has seen, to what the whole would have given.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merging import lineage
from merging.checkpoint import Checkpoint, TensorInfo, preallocate, read_header
from merging.errors import CuveeError
from merging.output import staged

KINDS = ("fisher", "moments", "gram")
FILE = "statistics.safetensors"
COMMAND = "stats"
_BLOCK = 1 << 22  # elements combined at a time
_ALIGN = 64

#: A tensor that is written, or a function that makes it when its turn comes.
Values = NDArray[Any] | Callable[[], NDArray[Any]]


class StatsError(CuveeError):
    """Statistics that cannot be read, used or made."""


@dataclass(frozen=True)
class Statistics:
    """An opened folder. Thread-safe.

    Attributes:
        kind: one of `KINDS`.
        examples: that were read.
        rows: by weight, the input rows that its layer has read; empty for Fisher.
        axes: by weight, the axis of the weight over which its layer's inputs run; empty for Fisher.
        model_digest: `View.digest()` of the model.
        fingerprint: `fingerprint` of the model.
        names: of the weights that have statistics.
        manifest: all that the folder says of itself.
    """

    path: Path
    kind: str
    examples: int
    rows: Mapping[str, int]
    axes: Mapping[str, int]
    model_digest: str
    fingerprint: str
    manifest: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    @property
    def scale(self) -> float | None:
        """Where it was made of θ₀ + scale·(θ − θ₀) instead of the model itself."""
        return float(self.manifest["settings"]["scale"]) if self.base else None

    @property
    def base(self) -> Mapping[str, str] | None:
        """θ₀ then: ref, path, digest and fingerprint, as of the model."""
        base: Mapping[str, str] | None = self.manifest.get("base")
        return base

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str, start: int, stop: int, out: NDArray[np.float32]) -> None:
        """Fills `out` with the flat elements start … stop.

        Raises:
            CheckpointError: the file cannot be read any more.
        """
        assert out.dtype == np.float32 and out.size == stop - start and out.flags.c_contiguous
        self._file.read_into(self.tensors[name], start * 4, out.reshape(-1).view(np.uint8).data)

    def array(self, name: str) -> NDArray[np.float32]:
        """The whole tensor, a read-only view of the file."""
        info = self.tensors[name]
        flat = np.frombuffer(self._map, "<f4", info.numel, info.offset) if info.numel else np.empty(0, np.float32)
        return flat.reshape(info.shape)

    def close(self) -> None:
        """Closes the file that `read` has opened; it may be read again."""
        if "_file" in self.__dict__:
            self._file.close()

    @cached_property
    def digest(self) -> str:
        """Of the values, for lineages."""
        return lineage.file_digest(self.path / FILE)

    @cached_property
    def _file(self) -> Checkpoint:
        return Checkpoint(self.path, self.tensors, str(self.path))

    @cached_property
    def _map(self) -> mmap.mmap:
        with open(self.path / FILE, "rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def open_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Opens what `cuvee stats` wrote.

    Raises:
        StatsError: nothing there, another command's output, or damaged.
        CheckpointError: the tensors' file contradicts its header.
    """
    path = Path(os.path.expanduser(path))
    mend = "make it by cuvee stats MODEL --data FILE --kind KIND --out FOLDER"
    if not path.is_dir():
        raise StatsError("no such folder of statistics", where=str(path), mend=mend)
    if not (path / lineage.FILE).is_file():
        raise StatsError(f"holds no {lineage.FILE}, so it is no folder of statistics", where=str(path), mend=mend)
    manifest = lineage.read(path)
    if manifest.get("command") != COMMAND:
        made = (
            f"was made by cuvee {manifest['command']}" if isinstance(manifest.get("command"), str) else "is no lineage"
        )
        raise StatsError(f"{made}, so it holds no statistics", where=str(path / lineage.FILE), mend=mend)
    _refuse_unsound(manifest, path / lineage.FILE)
    if not (path / FILE).is_file():
        raise StatsError(f"lacks {FILE}", where=str(path), mend="make it anew")
    tensors = {info.name: info for info in read_header(path / FILE)}
    if wrong := next((info for info in tensors.values() if info.dtype != "F32"), None):
        raise StatsError(f"'{wrong.name}' is {wrong.dtype}, not F32", where=str(path / FILE), mend="make it anew")
    return Statistics(
        path=path,
        kind=manifest["kind"],
        examples=manifest["examples"],
        rows=manifest["rows"],
        axes=manifest["axes"],
        model_digest=manifest["model"]["digest"],
        fingerprint=manifest["model"]["fingerprint"],
        manifest=manifest,
        tensors=tensors,
    )


def write_statistics(
    out: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Values],
    manifest: Mapping[str, Any],
    *,
    force: bool = False,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Writes a folder, whole or not at all.

    Args:
        tensors: by the weight's stored name; whatever their type, float32 is written, rounded once. Functions are called
            one after another, each when its tensor is written.
        manifest: at least examples, rows, axes, seed, settings, data and model; see `open_statistics`.
        force: replace an earlier folder of statistics.
        shapes: of the tensors that are functions.

    Raises:
        StatsError: a value is not finite.
        CuveeError: `out` exists, or cannot be written.
    """
    shapes = {
        name: (shapes or {})[name] if callable(values) else tuple(values.shape) for name, values in tensors.items()
    }
    content = {"command": COMMAND, "kind": kind, **manifest}
    _refuse_unsound(content, Path(out) / lineage.FILE)
    with staged(Path(out), force=force) as staging:
        with open(staging / FILE, "wb") as stream:
            header = _header(shapes)
            preallocate(stream.fileno(), len(header) + 4 * sum(map(math.prod, shapes.values())))
            stream.write(header)
            for name, values in tensors.items():
                array = values() if callable(values) else values
                assert tuple(array.shape) == shapes[name], name
                for part in _as_float32(array):
                    if not np.isfinite(part).all():
                        mend = "compute them in float32, of a model that is sound"
                        raise StatsError(f"the statistics of '{name}' are not finite", where=str(out), mend=mend)
                    stream.write(part.data)
        lineage.write(staging, content)


def combine(
    folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, force: bool = False
) -> dict[str, Any]:
    """Writes what a run on all the folders' examples together would have found; in float64, rounded once.

    Returns:
        What `cuvee stats --json` prints of it: kind, examples, parameters …

    Raises:
        StatsError: fewer than two folders, or folders that do not go together: of another model, kind or settings, or
            twice of the same examples.
    """
    if len(folders) < 2:
        raise StatsError("wants at least two folders", where="--combine", mend="name those to be combined")
    opened = [open_statistics(folder) for folder in folders]
    first = opened[0]
    for other in opened[1:]:
        _refuse_mismatch(first, other)
    _refuse_overlap(opened)
    weights = {
        name: [_weight(each, name) for each in opened]
        for name in dict.fromkeys(n for each in opened for n in each.names)
    }
    shapes = {name: next(each.shape(name) for each in opened if name in each) for name in weights}
    for each in opened:
        if wrong := next((name for name in each.names if each.shape(name) != shapes[name]), None):
            raise StatsError(f"'{wrong}' has another shape than in {first.path}", where=str(each.path))
    rows: dict[str, int] = {}
    for each in opened:
        for name, number in each.rows.items():
            rows[name] = rows.get(name, 0) + number
    manifest = {key: value for key, value in first.manifest.items() if key not in ("cuvee_version", "command", "kind")}
    manifest |= {
        "examples": sum(each.examples for each in opened),
        "rows": rows,
        "axes": {name: axis for each in opened for name, axis in each.axes.items()},
        "parameters": sum(map(math.prod, shapes.values())),
        "data": _distinct([item for each in opened for item in each.manifest["data"]]),
        "drawn": sorted(example for each in opened for example in each.manifest.get("drawn", ())),
        "parts": [
            {"path": str(each.path), "digest": each.digest, "examples": each.examples, "seed": each.manifest["seed"]}
            for each in opened
        ],
    }
    tensors: dict[str, Values] = {name: _mean(opened, name, shares) for name, shares in weights.items()}
    write_statistics(out, first.kind, tensors, manifest, force=force, shapes=shapes)
    return {"kind": first.kind, **{key: manifest[key] for key in ("examples", "parameters")}, "parts": len(opened)}


def _refuse_unsound(manifest: Mapping[str, Any], where: Path) -> None:
    def numbers(key: str) -> bool:
        value = manifest.get(key)
        return isinstance(value, dict) and all(type(number) is int and number >= 0 for number in value.values())

    def identity(model: Any) -> bool:
        return isinstance(model, dict) and all(isinstance(model.get(key), str) for key in ("digest", "fingerprint"))

    settings, base = manifest.get("settings"), manifest.get("base")
    sound = {
        "kind": manifest.get("kind") in KINDS,
        "examples": type(manifest.get("examples")) is int and manifest["examples"] > 0,
        "rows": numbers("rows"),
        "axes": numbers("axes"),
        "seed": type(manifest.get("seed")) is int,
        "settings": isinstance(settings, dict) and (base is None or isinstance(settings.get("scale"), int | float)),
        "data": isinstance(manifest.get("data"), list),
        "model": identity(manifest.get("model")),
        "base": base is None or identity(base),
    }
    for key, is_sound in sound.items():
        if not is_sound:
            raise StatsError(f"has no '{key}', or none that can be used", where=str(where), mend="make it anew")


def _refuse_mismatch(first: Statistics, other: Statistics) -> None:
    """What two runs must share, for their means to be parts of one."""

    def fail(what: str, mend: str) -> StatsError:
        return StatsError(what, where=str(other.path), mend=mend)

    if other.kind != first.kind:
        raise fail(f"holds {other.kind}, and {first.path} {first.kind}", "combine folders of one kind")
    if other.model_digest != first.model_digest:
        mine, theirs = (each.manifest["model"].get("ref", "another model") for each in (other, first))
        raise fail(f"was made from another model ({mine}) than {first.path} ({theirs})", "combine folders of one model")
    for key in dict.fromkeys([*first.manifest["settings"], *other.manifest["settings"]]):
        mine, theirs = (each.manifest["settings"].get(key) for each in (other, first))
        if mine != theirs:
            raise fail(
                f"was made with {key} {mine}, and {first.path} with {theirs}", "make both with the same settings"
            )
    if first.kind == "fisher" and set(other.names) != set(first.names):
        raise fail(f"holds other weights than {first.path}", "make it anew")


def _refuse_overlap(opened: Sequence[Statistics]) -> None:
    """An example that is in two folders would count twice."""
    seen: dict[str, Path] = {}
    for each in opened:
        for example in each.manifest.get("drawn", ()):
            if (other := seen.setdefault(example, each.path)) != each.path or other is not each.path:
                mend = "make them from different rows: from other files, or by --part 1/2 and --part 2/2"
                raise StatsError(f"has examples that {other} has too", where=str(each.path), mend=mend)


def _weight(folder: Statistics, name: str) -> int:
    if name not in folder:
        return 0
    return folder.examples if folder.kind == "fisher" else folder.rows.get(name, 0)


def _mean(opened: Sequence[Statistics], name: str, weights: Sequence[int]) -> Callable[[], NDArray[np.float32]]:
    def mean() -> NDArray[np.float32]:
        shape = next(each.shape(name) for each in opened if name in each)
        result = np.empty(math.prod(shape), np.float32)
        for start in range(0, result.size, _BLOCK):
            stop = min(start + _BLOCK, result.size)
            total = np.zeros(stop - start)
            for each, weight in zip(opened, weights, strict=True):
                if weight:
                    total += weight * each.array(name).reshape(-1)[start:stop].astype(np.float64)
            result[start:stop] = total / max(1, sum(weights))
        return result.reshape(shape)

    return mean


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(len(text) + 8) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def _as_float32(array: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
    flat = np.ascontiguousarray(array).reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        yield flat[start : start + _BLOCK].astype("<f4")


def _distinct(items: Sequence[Any]) -> list[Any]:
    return [item for i, item in enumerate(items) if item not in items[:i]]
