"""Checkpoint: a lazy, read-only view of a safetensors folder or hub id; CheckpointWriter: its sharded counterpart.

Only headers are read on opening, and everything they claim is checked against the file before a byte is trusted.
Tensors are read by `pread` into the caller's buffer: a file that shrinks or fails under us is then an error in one
line, where a memory map would end the process with a bus error.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from merging.errors import CheckpointError, MergeError

if TYPE_CHECKING:
    from merging.recipe import ModelRef

#: Bytes per element of every dtype that safetensors names and Cuvee reads.
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
#: The dtypes that are merged; every other dtype is copied when all models agree on it.
FLOATING = ("F32", "F16", "BF16", "F64")
MAX_HEADER = 100_000_000  # bytes; the limit that the safetensors library sets itself
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `offset` counts from the start of the file, `dtype` is safetensors' name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Checkpoint:
    """A model's folder: its tensors by name, its config, and reads of any byte range.

    Tensors of sentence-transformers' sub-modules carry their folder: `2_Dense/linear.weight`.
    Thread-safe; file handles are opened on first use and closed by `close`.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], ref: str) -> None:
        self.path, self.tensors, self.ref = path, tensors, ref
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, ref: ModelRef | str | Path, *, relative_to: Path | None = None) -> Checkpoint:
        """Opens a local folder, or a hub id through the hub's own cache.

        Args:
            ref: a folder, or a reference with path and revision (its adapter is not applied here).
            relative_to: a second place to look for a relative folder, after the working directory.

        Raises:
            CheckpointError: nothing there, no safetensors, or a file that contradicts its header.
        """
        path, revision = (str(ref), None) if isinstance(ref, str | Path) else (ref.path, ref.revision)
        folder = locate(path, revision, relative_to)
        return cls(folder, scan_folder(folder), str(ref))

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the transformer part; empty where there is none."""
        files = (self.path / folder / "config.json" for folder in module_folders(self.path))
        file = next((file for file in files if file.is_file()), None)
        return read_json(file) if file else {}

    @property
    def weight_files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values()})

    def read_into(self, info: TensorInfo, start: int, buffer: memoryview) -> None:
        """Fills `buffer` (bytes) from byte `start` of the tensor.

        Raises:
            CheckpointError: the file cannot be read, or ends early.
        """
        handle = self._handles.get(info.file)
        if handle is None:
            handle = self._open(info.file)
        done, size = 0, len(buffer)
        try:
            while done < size:
                got = os.preadv(handle, [buffer[done:]], info.offset + start + done)
                if got == 0:
                    raise CheckpointError(
                        f"'{info.name}' ends early: the file shrank while it was read", where=str(info.file)
                    )
                done += got
        except OSError as error:
            raise CheckpointError(f"cannot read '{info.name}': {error.strerror}", where=str(info.file)) from error

    def read_bytes(self, info: TensorInfo) -> bytearray:
        """The whole tensor as stored."""
        buffer = bytearray(info.nbytes)
        self.read_into(info, 0, memoryview(buffer))
        return buffer

    def read(self, info: TensorInfo) -> np.ndarray:
        """The whole tensor as float32 (integers too), in its shape; meant for small ones."""
        from merging.kernels import reference

        raw = np.frombuffer(self.read_bytes(info), np.uint8)
        values = np.empty(info.numel, np.float32)
        reference.load(raw, info.dtype, values)
        return values.reshape(info.shape)

    def close(self) -> None:
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, file: Path) -> int:
        with self._lock:
            if file not in self._handles:
                try:
                    self._handles[file] = os.open(file, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"cannot open: {error.strerror}", where=str(file)) from error
            return self._handles[file]


def locate(path: str, revision: str | None = None, relative_to: Path | None = None) -> Path:
    """The local folder of a path or hub id; a hub id is fetched into the hub's own cache.

    Raises:
        CheckpointError: neither a folder nor a model that the hub (or its cache, when offline) has.
    """
    home = os.path.expanduser(path)
    try:
        for folder in (Path(home), *([relative_to / home] if relative_to else [])):
            if folder.is_dir():
                return folder.resolve()
            if folder.is_file():
                raise CheckpointError("is a file, not a model's folder", where=path, mend="name the folder it lies in")
    except OSError as error:  # a folder on the way that may not be entered, a name that is too long
        raise CheckpointError(f"cannot be opened: {error.strerror}", where=path) from error
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or not path:
        raise CheckpointError("no such folder", where=path, mend="give a model's folder or a hub id 'owner/name'")
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.md"]
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns)).resolve()
    except Exception as error:  # the hub client raises a dozen kinds; all of them mean: cannot be had
        name = f"{path}@{revision}" if revision else path
        raise CheckpointError(
            f"no folder of that name here, and the hub cannot give it ({type(error).__name__})",
            where=name,
            mend="check the spelling, or download the model first and give its folder",
        ) from error


def scan_folder(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a model's folder, its sentence-transformers sub-modules included, in file order.

    Raises:
        CheckpointError: no safetensors weights, or any file that fails `read_header`.
    """
    tensors: dict[str, TensorInfo] = {}
    try:
        for part in module_folders(folder):
            for info in _scan_part(folder / part):
                name = f"{part}/{info.name}" if part else info.name
                if name in tensors:
                    raise CheckpointError(f"'{name[:80]}' lies in {tensors[name].file.name} too", where=str(info.file))
                tensors[name] = replace(info, name=name) if part else info
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(error.filename or folder)) from error
    if not tensors:
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                "is a LoRA adapter, not a model",
                where=str(folder),
                mend=f"write 'BASE+{folder}' to merge it into its base",
            )
        made = folder / "model"  # a run of `cuvee train` is named where its model is meant
        mend = f"did you mean {made}?" if (made / "config.json").is_file() else ""
        raise CheckpointError("holds no *.safetensors weights", where=str(folder), mend=mend)
    return tensors


def module_folders(folder: Path) -> list[str]:
    """Where a model's weights may lie: "" (the folder itself), then the sub-folders that its modules.json names.

    Raises:
        CheckpointError: as `module_paths`.
    """
    return list(dict.fromkeys(["", *module_paths(folder)]))


def module_paths(folder: Path) -> list[str]:
    """The path of each module in sentence-transformers' modules.json, "" for the folder itself; none for other models.

    Raises:
        CheckpointError: modules.json cannot be read, or a path leads out of the folder.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return []
    try:
        paths = [str(module["path"]) for module in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"cannot be read ({type(error).__name__})", where=str(file)) from error
    for path in paths:
        inside(folder, path)
    normal = (str(PurePosixPath(path)) for path in paths)
    return ["" if path == "." else path for path in normal]


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, in file order, every claim of its header checked.

    Whatever passes, the safetensors library reads too (keys that neither knows aside, if they are nested very deep).

    Raises:
        CheckpointError: truncated file, malformed header, unknown dtype, or offsets that overlap, leave holes,
            contradict the shape or lead out of the file.
    """

    def fail(what: str, mend: str = "fetch or save the file again") -> CheckpointError:
        return CheckpointError(what, where=str(file), mend=mend)

    try:
        if file.exists() and not file.is_file():
            raise fail("is no regular file", "put the file itself there")
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise fail(f"truncated, or no safetensors file: a header of {length:,} bytes in {size:,} bytes")
            if length > MAX_HEADER:
                raise fail(f"a header of {length:,} bytes is over the format's limit of {MAX_HEADER:,}")
            text = stream.read(length).decode("utf-8")
            # Python reads a few things as numbers and texts that the format's own library refuses.
            whole = _whole if "-0" in text else None
            header = json.loads(text, object_pairs_hook=_no_duplicates, parse_int=whole, parse_constant=_no_constant)
            if "\\ud" in text.lower():  # half of a surrogate pair is a ValueError here, and would be one in the output
                json.dumps(header, ensure_ascii=False).encode("utf-8")
    except OSError as error:
        raise fail(f"cannot read: {error.strerror}", "check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise fail(f"malformed header ({str(error)[:80]})") from error
    if not isinstance(header, dict) or not text.startswith("{"):
        raise fail("malformed header (no JSON object)")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict | None) or not all(isinstance(v, str) for v in (metadata or {}).values()):
        raise fail("malformed header: its __metadata__ must be texts by name")

    tensors = []
    data = 8 + length
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (TypeError, KeyError, ValueError) as error:
            raise fail(f"malformed header: '{name[:80]}' lacks dtype, shape or data_offsets") from error
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise fail(f"malformed header: shape and offsets of '{name[:80]}' must be whole numbers from 0")
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise fail(
                f"'{name[:80]}' has the unknown dtype {str(dtype)[:40]!r}", "save it in float32, float16 or bfloat16"
            )
        if end - begin != _nbytes(shape, dtype):
            shown = str(shape) if len(shape) <= 8 else f"of {len(shape)} dimensions"
            raise fail(f"header lies: '{name[:80]}' of shape {shown} {dtype} does not fill its {end - begin:,} bytes")
        tensors.append(TensorInfo(name, dtype, tuple(shape), file, data + begin, end - begin))
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    position = data
    for info in tensors:
        if info.offset != position:
            raise fail(
                f"header lies: '{info.name[:80]}' starts at byte {info.offset:,}, what precedes it ends at {position:,}"
            )
        position += info.nbytes
    if position != size:
        what = "truncated" if position > size else "header lies"
        raise fail(f"{what}: the header describes {position:,} bytes, the file has {size:,}")
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: unreadable, no JSON, or no object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot be read as JSON ({str(error)[:80]})", where=str(file)) from error
    if not isinstance(value, dict):
        raise CheckpointError("is no JSON object", where=str(file))
    return value


def inside(folder: Path, relative: str) -> Path:
    """`folder / relative`, refused when it leads out of the folder.

    Raises:
        CheckpointError: an absolute path, a drive, any `..`, or what no file can be called.
    """
    path = PurePosixPath(relative)
    try:
        os.fsencode(relative)
    except UnicodeEncodeError:  # half of a surrogate pair
        raise CheckpointError(f"names '{relative}', which no file can be called", where=str(folder)) from None
    if path.is_absolute() or ".." in path.parts or "\\" in relative or ":" in relative or "\0" in relative:
        raise CheckpointError(f"names '{relative}', which leads out of the folder", where=str(folder))
    return folder / relative


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name occurs twice")
    return value


def _whole(digits: str) -> int:
    if digits == "-0":
        raise ValueError("-0 is no whole number")
    return int(digits)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _nbytes(shape: Sequence[int], dtype: str) -> int | None:
    """Bytes of a tensor; None beyond 2⁶², so that a hostile shape costs no time."""
    nbytes = DTYPE_BYTES[dtype]
    for length in shape:
        nbytes *= length
        if nbytes >= 1 << 62:
            return None
    return nbytes


def _scan_part(folder: Path) -> Iterator[TensorInfo]:
    """Tensors of one folder: model.safetensors, else its index, else a single other safetensors file."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        yield from read_header(single)
    elif index.is_file():
        yield from _scan_shards(folder, index)
    else:
        others = sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith("adapter_"))
        if len(others) > 1:
            raise CheckpointError(
                f"has {len(others)} safetensors files and no index", where=str(folder), mend="save the model again"
            )
        for file in others:
            yield from read_header(file)
        pickled = sorted(f.name for f in folder.glob("*") if f.suffix in PICKLED and f.name not in _NO_WEIGHTS)
        if not others and pickled and not (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"only pickled weights here ({pickled[0]}), which can run code when they are loaded",
                where=str(folder),
                mend="convert them where you trust them: AutoModel.from_pretrained(DIR).save_pretrained(DIR)",
            )


_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "optimizer.bin")


def _scan_shards(folder: Path, index: Path) -> Iterator[TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError("has no weight_map of names to files", where=str(index))
    listed = dict(weight_map)
    for name in dict.fromkeys(weight_map.values()):
        file = inside(folder, name)
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"names '{name}', which is no safetensors file", where=str(index))
        if not file.is_file():
            raise CheckpointError(f"names '{name}', which is missing", where=str(index), mend="fetch the model again")
        for info in read_header(file):
            if listed.get(info.name) == name:  # not what another shard holds under that name
                del listed[info.name]
                yield info
    if listed:
        missing = next(iter(listed))
        raise CheckpointError(f"promises '{missing}' in {listed[missing]}, which lacks it", where=str(index))


class CheckpointWriter:
    """Lays tensors out in preallocated safetensors shards; any thread then writes any byte range of any tensor.

    Args:
        folder: where the shards go.
        tensors: (name, dtype, shape) in the order they shall lie in.
        shard_size: bytes of data per shard at most (a single tensor may exceed it).
        parts: sub-folders of modules; a tensor named `part/name` goes to that one. Any other `/` is a letter like all
            others: no tensor's name chooses where we write.

    Raises:
        MergeError: a file cannot be created, or the disk is full.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[tuple[str, str, tuple[int, ...]]],
        shard_size: int,
        parts: Sequence[str] = (),
    ) -> None:
        self.bytes = 0
        self._places: dict[str, tuple[int, int]] = {}  # name -> (file handle, offset)
        self._handles: list[int] = []
        of_part: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
        for name, dtype, shape in tensors:
            part = max((part for part in parts if part and name.startswith(f"{part}/")), key=len, default="")
            of_part.setdefault(part, []).append((name[len(part) + 1 :] if part else name, dtype, shape))
        try:
            for part, entries in of_part.items():
                self._lay_out(folder / part, part, entries, shard_size)
        except OSError as error:
            self.close()
            raise MergeError(f"cannot write: {error.strerror}", where=str(folder)) from error

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Writes bytes at byte `start` of a tensor.

        Raises:
            MergeError: the disk is full or failed.
        """
        handle, offset = self._places[name]
        try:
            _write_all(handle, data, offset + start)
        except OSError as error:
            raise MergeError(f"cannot write: {error.strerror}", where=name) from error

    def close(self) -> None:
        for handle in self._handles:
            os.close(handle)
        self._handles.clear()

    def _lay_out(
        self, folder: Path, part: str, entries: list[tuple[str, str, tuple[int, ...]]], shard_size: int
    ) -> None:
        # Wide dtypes first keeps every tensor aligned to its element; the sort is stable, so the rest stays in order.
        entries = sorted(entries, key=lambda entry: -DTYPE_BYTES[entry[1]])
        shards: list[list[tuple[str, str, tuple[int, ...], int]]] = [[]]
        filled = 0
        for name, dtype, shape in entries:
            nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
            if shards[-1] and filled + nbytes > shard_size:
                shards.append([])
                filled = 0
            shards[-1].append((name, dtype, shape, nbytes))
            filled += nbytes
        folder.mkdir(parents=True, exist_ok=True)
        weight_map: dict[str, str] = {}
        total = 0
        for number, shard in enumerate(shards, 1):
            one = len(shards) == 1
            file_name = "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map.update((name, file_name) for name, *_ in shard)
            total += self._create(folder / file_name, part, shard)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self.bytes += total

    def _create(self, file: Path, part: str, shard: list[tuple[str, str, tuple[int, ...], int]]) -> int:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, dtype, shape, nbytes in shard:
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
            position += nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-(len(text) + 8) % 64)
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._handles.append(handle)
        start = 8 + len(text)
        preallocate(handle, start + position)
        _write_all(handle, memoryview(len(text).to_bytes(8, "little") + text), 0)
        prefix = f"{part}/" if part else ""
        for name, *_ in shard:
            self._places[prefix + name] = (handle, start + header[name]["data_offsets"][0])
        return position


def _write_all(handle: int, data: memoryview, position: int) -> None:
    while data:  # a nearly full disk may take a part only
        done = os.pwrite(handle, data, position)
        data, position = data[done:], position + done


def preallocate(handle: int, size: int) -> None:
    """Reserves `size` bytes, so that a full disk shows now and not half-way.

    Raises:
        OSError: ENOSPC.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
            return
        except OSError as error:
            if error.errno not in (22, 95):  # EINVAL, EOPNOTSUPP: a file system without it
                raise
    os.ftruncate(handle, size)
