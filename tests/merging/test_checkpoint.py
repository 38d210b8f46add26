"""Checkpoints: what is hostile or damaged is refused in one line, what is written the safetensors library reads."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merging.checkpoint import DTYPE_BYTES, Checkpoint, CheckpointWriter
from merging.errors import CheckpointError, MergeError
from tests.attacks import FOLDERS, HEADERS, Folder, Header
from tests.checkpoints import Raw, container, raw, read_model, safetensors, some, tiny, write_model, write_shards

library = pytest.importorskip("safetensors")

PATIENT = settings(deadline=None)  # a busy machine is no failure


def opened(folder: Path) -> dict[str, Raw]:
    """All tensors, read by our reader."""
    with Checkpoint.open(folder) as checkpoint:
        return {
            info.name: Raw(info.dtype, info.shape, bytes(checkpoint.read_bytes(info)))
            for info in checkpoint.tensors.values()
        }


def opened_file(content: bytes) -> dict[str, Raw]:
    with tempfile.TemporaryDirectory() as folder:
        return opened(write_model(Path(folder), content))


def by_the_library(content: bytes) -> dict[str, Raw] | None:
    """The same by the safetensors library; None where it refuses."""
    try:
        tensors = library.deserialize(content)
    except library.SafetensorError:
        return None
    return {name: Raw(info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in tensors}


def refusal(content: bytes) -> str:
    with pytest.raises(CheckpointError) as error:
        opened_file(content)
    return one_line(error.value)


def one_line(error: Exception) -> str:
    """What the user reads: the file, what is wrong, and no more than fits a few lines of a terminal."""
    text = str(error)
    assert text.isprintable()
    assert len(text.replace("x" * 100, "")) < 400
    return text


# ---- reading what is hostile ----


@pytest.mark.parametrize("header", [pytest.param(header, id=name) for name, header in HEADERS.items()])
def test_lying_files_are_refused_in_one_line(header: Header) -> None:
    assert header.says in refusal(header.content)
    assert (by_the_library(header.content) is not None) == bool(header.stricter)


@pytest.mark.parametrize("attack", [pytest.param(folder, id=name) for name, folder in FOLDERS.items()])
def test_folders_that_are_no_safe_model_are_refused_in_one_line(attack: Folder, tmp_path: Path) -> None:
    attack.make(tmp_path / "model")
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(tmp_path / "model")
    assert attack.says in one_line(error.value)


def test_a_true_file_of_any_dtype_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = {dtype: Raw(dtype, (3, 2), bytes(range(6)) * size) for dtype, size in DTYPE_BYTES.items()}
    tensors |= {"scalar": Raw("F32", (), bytes(4)), "none": Raw("F16", (0, 7), b"")}
    content = safetensors(tensors)
    assert opened_file(content) == by_the_library(content) == tensors


names = st.sampled_from(["a", "b", "layer.0.weight", "é\u2028", ""])
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def stored(draw: st.DrawFn) -> Raw:
    dtype, shape = draw(st.sampled_from(sorted(DTYPE_BYTES))), draw(shapes)
    size = math.prod(shape) * DTYPE_BYTES[dtype]
    return Raw(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


models = st.dictionaries(names, stored(), min_size=1, max_size=3)
values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([-1, -0.0, 4.0, 1 << 31, 1 << 61, 1 << 62, 1 << 63, 1 << 64])
    | st.integers(0, 64)
    | st.sampled_from([*DTYPE_BYTES, "F4", "f32", "\ud800", "a"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "more", "\udc00"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def bent_headers(draw: st.DrawFn) -> bytes:
    """A true file, in whose header one or two values are replaced, added or removed."""
    content = safetensors(draw(models))
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for _ in range(draw(st.integers(1, 2))):
        place: Any = header
        while isinstance(place, dict | list) and place and draw(st.booleans()):
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], dict | list) or draw(st.booleans()):
                place[key] = draw(values)
                break
            place = place[key]
        else:
            if isinstance(place, dict):
                place[draw(st.sampled_from(["__metadata__", "a", "shape", "more"]))] = draw(values)
            elif isinstance(place, list):
                place.append(draw(values))
    text = json.dumps(header)
    text = draw(st.sampled_from([text, text.replace(": 0", ": -0").replace("[0", "[-0"), text + " ", text.upper()]))
    return container(text.encode(), draw(st.sampled_from([data, data[:-1], data + b"\0", b""])))


@st.composite
def bent_bytes(draw: st.DrawFn) -> bytes:
    """A true file, in which bytes are replaced, put in or taken out, mostly in its header."""
    content = bytearray(safetensors(draw(models)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2) | st.sampled_from([b"0", b'"', b"{"]))
    return bytes(content)


@settings(PATIENT, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(bent_headers(), bent_bytes(), st.binary(max_size=64)))
def test_any_bytes_are_read_as_the_library_reads_them_or_refused_in_one_line(content: bytes) -> None:
    theirs = by_the_library(content)
    try:
        ours = opened_file(content)
    except CheckpointError as error:
        reason = one_line(error)
        stricter = ("twice", "unknown dtype", "holds no *.safetensors weights")
        assert theirs is None or any(part in reason for part in stricter), reason
    else:
        assert ours == theirs


# ---- folders ----


def test_a_tensor_in_two_shards_is_the_one_that_the_index_names(tmp_path: Path) -> None:
    first, second = some((4,), 1), some((4,), 2)
    shards = {"one.safetensors": {"w": first, "a": first}, "two.safetensors": {"w": second}}
    index = {"weight_map": {"a": "one.safetensors", "w": "two.safetensors"}}
    assert opened(write_shards(tmp_path / "m", shards, index)) == {"a": raw(first), "w": raw(second)}


def test_weights_may_be_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    write_model(tmp_path / "blobs", tiny())
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/model.safetensors")
    (tmp_path / "model").symlink_to("snapshot")
    assert opened(tmp_path / "model") == opened(tmp_path / "blobs")


@pytest.mark.parametrize("path", ["2_Dense", "./2_Dense", "2_Dense/"])
def test_modules_bring_their_weights_under_their_folders_name(path: str, tmp_path: Path) -> None:
    write_model(tmp_path, {"w": some((4,))})
    write_model(tmp_path / "2_Dense", {"w": some((2, 4))})
    for first in ("", ".", "./"):
        (tmp_path / "modules.json").write_text(json.dumps([{"path": first}, {"path": "1_Pooling"}, {"path": path}]))
        with Checkpoint.open(tmp_path) as checkpoint:
            assert {name: t.shape for name, t in checkpoint.tensors.items()} == {"w": (4,), "2_Dense/w": (2, 4)}


def test_a_file_that_shrinks_after_it_was_opened_is_told(tmp_path: Path) -> None:
    file = write_model(tmp_path, tiny()) / "model.safetensors"
    with Checkpoint.open(tmp_path) as checkpoint:
        last = list(checkpoint.tensors.values())[-1]
        with open(file, "r+b") as stream:
            stream.truncate(last.offset + last.nbytes - 1)
        with pytest.raises(CheckpointError, match="ends early: the file shrank"):
            checkpoint.read_bytes(last)


def test_a_file_that_goes_after_it_was_opened_is_told(tmp_path: Path) -> None:
    file = write_model(tmp_path, tiny()) / "model.safetensors"
    with Checkpoint.open(tmp_path) as checkpoint:
        file.unlink()
        with pytest.raises(CheckpointError, match="cannot open: No such file"):
            checkpoint.read_bytes(next(iter(checkpoint.tensors.values())))


# ---- writing ----


@PATIENT
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__"),
        stored(),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 200),
    st.randoms(use_true_random=False),
)
def test_whatever_is_written_in_any_order_the_library_reads(
    tensors: dict[str, Raw], shard_size: int, random: Any
) -> None:
    tensors |= {f"2_Dense/{name}": tensor for name, tensor in list(tensors.items())[:2]}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        layout = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
        writer = CheckpointWriter(folder, layout, shard_size, ["", "1_Pooling", "2_Dense"])
        sizes = {file: file.stat().st_size for file in folder.rglob("*.safetensors")}
        pieces = [(name, at) for name, tensor in tensors.items() for at in range(0, len(tensor.data), 5)]
        random.shuffle(pieces)
        for name, at in pieces:
            writer.write(name, at, memoryview(tensors[name].data)[at : at + 5])
        writer.close()

        inner = {name.removeprefix("2_Dense/"): t for name, t in tensors.items() if name.startswith("2_Dense/")}
        outer = {name: tensor for name, tensor in tensors.items() if not name.startswith("2_Dense/")}
        assert read_model(folder) == outer
        assert read_model(folder / "2_Dense") == inner
        assert {file: file.stat().st_size for file in sizes} == sizes  # all space was taken at the start
        assert writer.bytes == sum(len(tensor.data) for tensor in tensors.values())
        for part, content in ((folder, outer), (folder / "2_Dense", inner)):
            assert_well_laid_out(part, content, shard_size)
        (folder / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
        assert opened(folder) == tensors


def assert_well_laid_out(folder: Path, tensors: dict[str, Raw], shard_size: int) -> None:
    """Shards within the size, an index that says the truth, every tensor where its dtype may be mapped."""
    files = sorted(folder.glob("*.safetensors"))
    held = {}
    for file in files:
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        assert header.pop("__metadata__") == {"format": "pt"}
        assert len(content) - start <= shard_size or len([e for e in header.values() if math.prod(e["shape"])]) == 1
        for name, entry in header.items():
            held[name] = file.name
            assert (start + entry["data_offsets"][0]) % DTYPE_BYTES[entry["dtype"]] == 0
    index = folder / "model.safetensors.index.json"
    if len(files) == 1:
        assert files[0].name == "model.safetensors"
        assert not index.exists()
    else:
        total = sum(len(tensor.data) for tensor in tensors.values())
        assert json.loads(index.read_text()) == {"metadata": {"total_size": total}, "weight_map": held}
        assert [file.name for file in files] == [
            f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
        ]


def test_no_tensors_name_chooses_where_to_write(tmp_path: Path) -> None:
    names = ["../up", "/etc/x", "a/../../b", "2_Dense/../../c"]
    CheckpointWriter(tmp_path / "out", [(name, "F32", (1,)) for name in names], 1 << 20, ["2_Dense"]).close()
    files = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {"out/model.safetensors", "out/2_Dense/model.safetensors"}


def test_space_is_taken_before_the_first_byte_of_data(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, [("w", "F32", (1 << 20,))], 1 << 30)
    held = (tmp_path / "model.safetensors").stat()
    writer.close()
    assert held.st_size > 4 << 20
    if held.st_blocks:  # a file system that counts
        assert held.st_blocks * 512 >= 4 << 20


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(MergeError, match="cannot write: File exists"):
        CheckpointWriter(tmp_path, [("w", "F32", (1,))], 1 << 30)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
