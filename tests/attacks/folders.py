"""Models' folders that are damaged, unsafe or no models: each with what the error must say."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.checkpoints import safetensors, some, tiny, write_model, write_shards

_ONE, _TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


class Folder(NamedTuple):
    """One model.

    make: fills a folder of that path; what lies beside the folder is free to use too.
    says: a part of the error.
    """

    make: Callable[[Path], object]
    says: str


def _files(**contents: bytes | str) -> Callable[[Path], None]:
    """Files of these names, `__` standing for dots."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for name, content in contents.items():
            file = folder / name.replace("__", ".")
            file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def _index(index: Any) -> Callable[[Path], object]:
    """A sharded model whose index says that; a true model lies beside it, for a name that leads out."""

    def make(folder: Path) -> None:
        (folder.parent / "outside.safetensors").write_bytes(safetensors({"w": some((4,))}))
        write_shards(folder, {_ONE: {"w": some((4,))}}, index)

    return make


def _naming(shard: str) -> Callable[[Path], object]:
    return _index({"weight_map": {"w": shard}})


def _modules(modules: Any) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        write_model(folder, tiny())
        (folder / "modules.json").write_text(modules if isinstance(modules, str) else json.dumps(modules))

    return make


def _missing_shard(folder: Path) -> None:
    write_shards(folder, {_ONE: {"a": some((4,))}, _TWO: {"b": some((4,))}})
    (folder / _TWO).unlink()


def _truncated_shard(folder: Path) -> None:
    write_shards(folder, {_ONE: {"a": some((4,))}, _TWO: {"b": some((4,))}})
    os.truncate(folder / _TWO, (folder / _TWO).stat().st_size - 1)


def _weights_are_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").mkdir(parents=True)


def _weights_are_a_pipe(folder: Path) -> None:
    folder.mkdir()
    os.mkfifo(folder / "model.safetensors")


def _weights_are_a_dead_link(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("nowhere")


def _a_name_in_two_parts(folder: Path) -> None:
    write_model(folder, {"2_Dense/linear.weight": some((2, 2))})
    write_model(folder / "2_Dense", {"linear.weight": some((2, 2))})
    (folder / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')


FOLDERS: dict[str, Folder] = {
    "empty": Folder(_files(), "holds no *.safetensors weights"),
    "config alone": Folder(_files(config__json="{}"), "holds no *.safetensors weights"),
    "pickled": Folder(_files(pytorch_model__bin=b"x"), "only pickled weights here (pytorch_model.bin)"),
    "pickled shards": Folder(
        _files(**{"pytorch_model-00001-of-00002__bin": b"x"}), "convert them where you trust them"
    ),
    "pickled checkpoint": Folder(_files(consolidated__00__pth=b"x"), "only pickled weights here"),
    "adapter": Folder(_files(adapter_config__json="{}", adapter_model__safetensors=b"x"), "is a LoRA adapter"),
    "two files and no index": Folder(_files(a__safetensors=b"x", b__safetensors=b"x"), "and no index"),
    "weights are a folder": Folder(_weights_are_a_folder, "model.safetensors: is no regular file"),
    "weights are a pipe": Folder(_weights_are_a_pipe, "model.safetensors: is no regular file"),
    "weights are a dead link": Folder(_weights_are_a_dead_link, "model.safetensors: cannot read: No such file"),
    "shard above the folder": Folder(_naming("../outside.safetensors"), "leads out of the folder"),
    "shard by a detour": Folder(_naming("x/../../outside.safetensors"), "leads out of the folder"),
    "shard at an absolute path": Folder(_naming("/tmp/outside.safetensors"), "leads out of the folder"),
    "shard behind a backslash": Folder(_naming("..\\outside.safetensors"), "leads out of the folder"),
    "shard on a drive": Folder(_naming("C:outside.safetensors"), "leads out of the folder"),
    "shard of a zero byte": Folder(_naming("../outside\0.safetensors"), "leads out of the folder"),
    "shard of a long name": Folder(_naming("x" * 5000 + ".safetensors"), "name too long"),
    "shard of half a surrogate pair": Folder(_naming("\ud800.safetensors"), "which no file can be called"),
    "shard that is pickled": Folder(_naming("pytorch_model.bin"), "is no safetensors file"),
    "shard without a name": Folder(_naming(""), "is no safetensors file"),
    "missing shard": Folder(_missing_shard, f"names '{_TWO}', which is missing"),
    "truncated shard": Folder(_truncated_shard, f"{_TWO}: truncated"),
    "shard without its tensor": Folder(_index({"weight_map": {"w": _ONE, "v": _ONE}}), f"promises 'v' in {_ONE}"),
    "index is a list": Folder(_index([1]), "is no JSON object"),
    "index says nothing": Folder(_index({}), "has no weight_map"),
    "index of numbers": Folder(_index({"weight_map": {"w": 1}}), "has no weight_map"),
    "index is a list of names": Folder(_index({"weight_map": ["w"]}), "has no weight_map"),
    "index is no JSON": Folder(_files(model__safetensors__index__json="{"), "cannot be read as JSON"),
    "index is no text": Folder(_files(model__safetensors__index__json=b"\xff\xfe"), "cannot be read as JSON"),
    "index is nested": Folder(_files(model__safetensors__index__json="[" * 100_000), "cannot be read as JSON"),
    "module above the folder": Folder(_modules([{"path": ""}, {"path": "../other"}]), "leads out of the folder"),
    "module at an absolute path": Folder(_modules([{"path": "/tmp"}]), "leads out of the folder"),
    "modules.json is a number": Folder(_modules(17), "modules.json: cannot be read"),
    "modules.json has no paths": Folder(_modules([{"idx": 0}]), "modules.json: cannot be read"),
    "modules.json is no JSON": Folder(_modules("[{"), "modules.json: cannot be read"),
    "a name in two parts": Folder(_a_name_in_two_parts, "lies in model.safetensors too"),
}
