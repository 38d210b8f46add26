"""Folders of statistics: what is written is read, parts combine to the whole, and what is no statistics is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merging import CuveeError
from merging.checkpoint import Checkpoint
from merging.statistics import StatsError, combine, open_statistics, write_statistics
from merging.views import fingerprint
from tests.checkpoints import Tensors, read_model, some, tiny, write_model


def manifest(**other: Any) -> dict[str, Any]:
    return {
        "examples": 4,
        "rows": {},
        "axes": {},
        "seed": 0,
        "settings": {"head": "embedding"},
        "data": [{"file": "texts.jsonl", "digest": "xxh3:0"}],
        "model": {"ref": "model", "digest": "xxh3:a", "fingerprint": "xxh3:b"},
        **other,
    }


def write(folder: Path, kind: str, tensors: Any, **other: Any) -> Path:
    write_statistics(folder, kind, tensors, manifest(**other))
    return folder


def test_what_is_written_is_read_by_us_and_by_safetensors(tmp_path: Path) -> None:
    tensors = {"a.weight": some((3, 5)), "2_Dense/linear.weight": some((7,), 1), "none": some((0, 4))}
    folder = write(tmp_path / "stats", "fisher", {**tensors, "a.weight": tensors["a.weight"].astype("f8")})
    found = open_statistics(folder)
    assert (found.kind, found.examples, found.model_digest, found.fingerprint) == ("fisher", 4, "xxh3:a", "xxh3:b")
    assert found.names == tuple(tensors) and "a.weight" in found and "b" not in found
    stored = read_model(folder)
    for name, values in tensors.items():
        assert found.shape(name) == values.shape
        np.testing.assert_array_equal(found.array(name), values)
        assert stored[name].data == values.tobytes()
    out = np.empty(4, np.float32)
    found.read("a.weight", 3, 7, out)
    np.testing.assert_array_equal(out, tensors["a.weight"].reshape(-1)[3:7])


def test_threads_read_side_by_side(tmp_path: Path) -> None:
    values = some((1000,))
    found = open_statistics(write(tmp_path / "stats", "fisher", {"a": values}))

    def read(start: int) -> bool:
        out = np.empty(10, np.float32)
        found.read("a", start, start + 10, out)
        return bool((out == values[start : start + 10]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(0, 990)))


def test_values_that_are_made_when_they_are_written(tmp_path: Path) -> None:
    write_statistics(tmp_path / "s", "gram", {"a": lambda: some((4, 4))}, manifest(), shapes={"a": (4, 4)})
    np.testing.assert_array_equal(open_statistics(tmp_path / "s").array("a"), some((4, 4)))


def test_an_existing_folder_is_replaced_by_force_only(tmp_path: Path) -> None:
    folder = write(tmp_path / "stats", "fisher", {"a": some((3,))})
    with pytest.raises(CuveeError, match="exists already"):
        write(folder, "fisher", {"a": some((4,))})
    write_statistics(folder, "fisher", {"a": some((4,))}, manifest(), force=True)
    assert open_statistics(folder).shape("a") == (4,)


def test_values_that_are_not_finite_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(StatsError, match="'a' are not finite"):
        write(tmp_path / "stats", "fisher", {"a": np.array([1, np.nan], np.float32)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_parts_combine_to_the_whole(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.random((n, 5, 5)) for n in (3, 4, 5)]
    for i, part in enumerate(parts):
        count = {"rows": {"a": len(part)}, "axes": {"a": 1}} if kind == "gram" else {}
        write(
            tmp_path / f"{i}",
            kind,
            {"a": part.mean(0)},
            examples=len(part),
            drawn=[f"{i}-{j}" for j in range(3)],
            **count,
        )
    result = combine([tmp_path / f"{i}" for i in range(3)], tmp_path / "all")
    assert (result["kind"], result["examples"], result["parameters"]) == (kind, 12, 25)
    found = open_statistics(tmp_path / "all")
    np.testing.assert_allclose(found.array("a"), np.concatenate(parts).mean(0), rtol=1e-6)
    assert found.examples == 12 and found.rows == ({"a": 12} if kind == "gram" else {})
    assert len(found.manifest["drawn"]) == 9 and len(found.manifest["parts"]) == 3


def test_a_layer_that_one_part_never_used_has_the_others_mean(tmp_path: Path) -> None:
    one, two = some((1, 4)), some((1, 4), 1)
    write(tmp_path / "a", "moments", {"x": one}, rows={"x": 3, "y": 0}, axes={"x": 1})
    write(tmp_path / "b", "moments", {"x": two, "y": two}, rows={"x": 1, "y": 1}, axes={"x": 1, "y": 1})
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    found = open_statistics(tmp_path / "all")
    np.testing.assert_allclose(found.array("x"), (3 * one + two) / 4, rtol=1e-6)
    np.testing.assert_array_equal(found.array("y"), two)
    assert found.rows == {"x": 4, "y": 1} and found.axes == {"x": 1, "y": 1}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"model": {"ref": "m2", "digest": "xxh3:z", "fingerprint": "xxh3:b"}},
            r"another model \(m2\) than .*\(model\)",
        ),
        ({"settings": {"head": "lm"}}, "was made with head lm, and .* with embedding"),
        ({"drawn": ["y", "x"]}, "has examples that .* has too; .*--part"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    write(tmp_path / "a", "fisher", {"x": some((3,))}, drawn=["x"])
    write(tmp_path / "b", "fisher", {"x": some((3,))}, **other)
    with pytest.raises(StatsError, match=message):
        combine([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_parts_of_another_kind_or_twice_or_alone_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", "fisher", {"x": some((3,))}, drawn=["x"])
    b = write(tmp_path / "b", "moments", {"x": some((1, 3))}, rows={"x": 1}, axes={"x": 1})
    c = write(tmp_path / "c", "fisher", {"z": some((3,))})
    d = write(tmp_path / "d", "fisher", {"x": some((4,))})
    for folders, message in (
        ([a, b], "holds moments, and .* fisher"),
        ([a, a], "has examples that"),
        ([a], "at least two"),
        ([a, c], "other weights"),
        ([a, d], "another shape"),
    ):
        with pytest.raises(StatsError, match=message):
            combine(folders, tmp_path / "all")


def _not_json(folder: Path) -> None:
    (folder / "cuvee.json").write_text("{")


def _changed(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "cuvee.json").read_text())
        (folder / "cuvee.json").write_text(json.dumps({**content, key: value}))

    return change


def _cut(folder: Path) -> None:
    content = (folder / "statistics.safetensors").read_bytes()
    (folder / "statistics.safetensors").write_bytes(content[:-4])


def _halved(folder: Path) -> None:
    content = (folder / "statistics.safetensors").read_bytes()
    (folder / "statistics.safetensors").write_bytes(content.replace(b'"F32"', b'"I32"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "cuvee.json").unlink(), "is no folder of statistics"),
        (lambda folder: (folder / "statistics.safetensors").unlink(), "lacks statistics.safetensors"),
        (_not_json, "JSON"),
        (_changed("command", "merge"), "was made by cuvee merge"),
        (_changed("command", 7), "is no lineage"),
        (_changed("kind", "variance"), "has no 'kind'"),
        (_changed("examples", 0), "has no 'examples'"),
        (_changed("rows", {"a": 1.5}), "has no 'rows'"),
        (_changed("model", "m"), "has no 'model'"),
        (_cut, "truncated"),
        (_halved, "is I32, not F32"),
    ],
)
def test_damage_is_told_in_one_line(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = write(tmp_path / "stats", "fisher", {"a": some((3,))})
    damage(folder)
    with pytest.raises(CuveeError, match=message) as error:
        open_statistics(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(StatsError, match="no such folder of statistics"):
        open_statistics(tmp_path / "none")


def test_the_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    def of(name: str, tensors: Tensors) -> str:
        with Checkpoint.open(write_model(tmp_path / name, tensors)) as checkpoint:
            return fingerprint(checkpoint)

    one = tiny()
    assert of("a", one) == of("b", dict(reversed(one.items())))
    assert len({of("a", one), of("c", tiny(1)), of("d", {"more": some((2,)), **one}), of("e", {"a": some((1,))})}) == 4
