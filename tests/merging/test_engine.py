"""The engine on files: what comes out of which inputs, the same bytes every time, in little memory whatever the size."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import merging
from tests.checkpoints import (
    Raw,
    Tensors,
    bf16,
    container,
    floats,
    raw,
    read_model,
    some,
    tiny,
    write_model,
    write_recipe,
    write_shards,
)
from tests.commands import Finished, run
from tests.handmade_statistics import write_stats

pytest.importorskip("safetensors")

MEAN: dict[str, Any] = {"parameters": {"weight": 1.0}}


def merged(place: Path, *models: Tensors, method: str = "linear", **keys: Any) -> dict[str, Raw]:
    """The tensors of a merge of these models."""
    with tempfile.TemporaryDirectory(dir=place) as name:
        paths = [str(write_model(Path(name) / f"{number}", model)) for number, model in enumerate(models)]
        if "base_model" in keys:
            keys["base_model"] = str(write_model(Path(name) / "base", keys["base_model"]))
        merging.merge(merging.Recipe(method, paths, **{**MEAN, **keys}), Path(name) / "out")
        return read_model(Path(name) / "out")


def values(tensors: dict[str, Raw]) -> dict[str, list[float]]:
    return {name: floats(tensor).reshape(-1).tolist() for name, tensor in tensors.items()}


def done(finished: Finished) -> Finished:
    assert finished.code == 0, finished.err
    return finished


def ones(value: float, *shape: int) -> NDArray[np.float32]:
    return np.full(shape or (2,), value, np.float32)


# ---- models that differ ----

_A: dict[str, Any] = {"w": ones(1), "head": ones(5)}
_B: dict[str, Any] = {"w": ones(3)}
_C: dict[str, Any] = {"w": ones(5), "head": ones(7)}


@pytest.mark.parametrize(
    ("models", "keys", "expected"),
    [
        ((_A, _B), {"missing": "keep"}, {"w": 2, "head": 5}),
        ((_B, _A), {"missing": "keep"}, {"w": 2, "head": 5}),
        ((_A, _B, _C), {"missing": "keep", "parameters": {"weight": 2.0, "normalize": False}}, {"w": 18, "head": 6}),
        ((_A, _B, _C), {"missing": "drop"}, {"w": 3}),
        ((_B,), {"missing": "keep", "method": "ties", "base_model": _A}, {"w": 3, "head": 5}),
        ((_C, _B), {"missing": "keep", "method": "task_arithmetic", "base_model": _A}, {"w": 7, "head": 7}),
        ((_A,), {"missing": "keep", "method": "ties", "base_model": _B}, {"w": 1, "head": 5}),
        ((_A,), {"missing": "drop", "method": "ties", "base_model": _B}, {"w": 1}),
    ],
)
def test_a_tensor_in_only_some_models_is_their_mean_or_dropped(
    models: tuple[Tensors, ...], keys: dict[str, Any], expected: dict[str, float], tmp_path: Path
) -> None:
    assert values(merged(tmp_path, *models, **keys)) == {name: [value] * 2 for name, value in expected.items()}


def test_buffers_that_libraries_leave_out_at_will_need_no_rule(tmp_path: Path) -> None:
    ids = {"embeddings.position_ids": np.arange(4)}
    with_ids, without = merged(tmp_path, _B | ids, _B), merged(tmp_path, _B, _B | ids)
    assert with_ids["embeddings.position_ids"] == raw(np.arange(4))  # as the first model, the donor, has it
    assert without.keys() == {"w"}


@pytest.mark.parametrize(
    ("dtypes", "keys", "expected"),
    [
        (("BF16", "BF16"), {}, "BF16"),
        (("F16", "F32"), {}, "F32"),
        (("F32", "BF16"), {}, "F32"),
        (("BF16", "F16"), {}, "F32"),  # the one has the range, the other the digits
        (("F64", "F32"), {}, "F64"),
        (("F32", "F32"), {"dtype": "bfloat16"}, "BF16"),
        (("BF16", "BF16"), {"dtype": "bfloat16", "out_dtype": "float16"}, "F16"),
    ],
)
def test_dtypes_that_differ_lose_nothing(
    dtypes: tuple[str, str], keys: dict[str, str], expected: str, tmp_path: Path
) -> None:
    kinds = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    numbers = (ones(1.25), ones(3.5))  # exact in all of them
    models = [
        {"w": bf16(n) if dtype == "BF16" else n.astype(kinds[dtype])} for n, dtype in zip(numbers, dtypes, strict=True)
    ]
    result = merged(tmp_path, *models, **keys)["w"]
    assert result.dtype == expected
    assert floats(result).tolist() == [2.375, 2.375]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_])
def test_whole_numbers_that_agree_are_copied(dtype: type, tmp_path: Path) -> None:
    ids: NDArray[Any] = np.array([0, 1, 100], np.int64).astype(dtype)
    result = merged(tmp_path, {"w": ones(1), "ids": ids}, {"w": ones(2), "ids": ids}, dtype="bfloat16")
    assert result["ids"] == raw(ids)


def test_counts_of_batches_are_the_donors(tmp_path: Path) -> None:
    models = [{"w": ones(1), "bn.num_batches_tracked": np.array(n)} for n in (7, 8)]
    assert merged(tmp_path, *models)["bn.num_batches_tracked"] == raw(np.array(7))
    base = {"w": ones(0), "bn.num_batches_tracked": np.array(9)}
    result = merged(tmp_path, *models, method="ties", base_model=base)
    assert result["bn.num_batches_tracked"] == raw(np.array(9))


def test_masks_of_minus_infinity_that_agree_are_copied(tmp_path: Path) -> None:
    mask = np.where(np.tri(300, dtype=bool), np.float32(0), np.float32(-np.inf))
    for method, scope in (("linear", {}), ("ties", {"scope": "global"}), ("slerp", {"t": 0.5})):
        models = [{"w": some((3, 3), n), "mask": mask} for n in range(2)]
        keys: dict[str, Any] = {"parameters": {**({} if method == "slerp" else MEAN["parameters"]), **scope}}
        if method != "linear":
            keys["base_model"] = models.pop()
        assert merged(tmp_path, *models, method=method, **keys)["mask"] == raw(mask)


def test_prefixes_of_names_are_bridged_and_the_donors_stay(tmp_path: Path) -> None:
    plain = {"embed.weight": ones(1), "layers.0.w": ones(2), "layers.1.w": ones(3)}
    prefixed = {f"model.{name}": tensor + 2 for name, tensor in plain.items()}
    expected = {name: tensor.tolist() for name, tensor in {n: t + 1 for n, t in plain.items()}.items()}
    assert values(merged(tmp_path, plain, prefixed)) == expected
    assert values(merged(tmp_path, prefixed, plain)) == {f"model.{name}": value for name, value in expected.items()}


def test_a_tied_head_stands_for_the_embedding_that_it_is(tmp_path: Path) -> None:
    """One model stores its output head, the other, whose head is tied, does not."""
    stored = {"model.embed_tokens.weight": ones(1), "lm_head.weight": ones(5)}
    tied = {"model.embed_tokens.weight": ones(3)}
    expected = {"model.embed_tokens.weight": [2, 2], "lm_head.weight": [4, 4]}
    assert values(merged(tmp_path, stored, tied)) == expected
    assert values(merged(tmp_path, tied, tied)) == {"model.embed_tokens.weight": [3, 3]}


def test_modules_of_sentence_transformers_are_merged_where_they_lie(tmp_path: Path) -> None:
    for number, value in enumerate((1.0, 3.0)):
        model = write_model(tmp_path / f"{number}", {"w": ones(value)})
        write_model(model / "2_Dense", {"linear.weight": ones(10 * value, 2, 3)}, {"in_features": 3})
        (model / "1_Pooling").mkdir()
        (model / "1_Pooling" / "config.json").write_text("{}")
        modules = [{"path": path} for path in ("", "1_Pooling", "2_Dense", "3_Normalize")]
        (model / "modules.json").write_text(json.dumps(modules))
    recipe = write_recipe(tmp_path / "r.yml", "linear", tmp_path / "0", tmp_path / "1")
    done(run("merge", recipe, tmp_path / "out", "--shard-size", "8"))
    assert values(read_model(tmp_path / "out")) == {"w": [2, 2]}
    assert values(read_model(tmp_path / "out" / "2_Dense")) == {"linear.weight": [20] * 6}
    assert json.loads((tmp_path / "out" / "2_Dense" / "config.json").read_text()) == {"in_features": 3}
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "{}"
    assert (tmp_path / "out" / "3_Normalize").is_dir()


@settings(deadline=None, max_examples=30)  # a busy machine is no failure
@given(
    st.sampled_from(["linear", "ties", "dare_linear", "della", "breadcrumbs_ties"]),
    st.sampled_from(["F32", "BF16", "F16"]),
    st.integers(-3, 3),
    st.integers(1, 4),
    st.integers(1_000, 100_000),
)
def test_files_merge_as_arrays_do_whatever_the_chunks(method: str, dtype: str, off: int, rows: int, chunk: int) -> None:
    """Tensors that end about where a chunk of the engine's ends, against arrays in chunks of another size."""
    columns = (3 << 20) // 4 // 5 // rows + off  # a chunk holds 3 MiB: of three models, a base and the result
    arrays = [some((rows, columns), seed) for seed in range(4)]
    tensors = [bf16(a) if dtype == "BF16" else raw(a.astype({"F32": "f4", "F16": "f2"}[dtype])) for a in arrays]
    parameters: dict[str, Any] = {"weight": 0.5} if method == "linear" else {"weight": 0.5, "density": 0.4}
    base = None if method == "linear" else floats(tensors[0])
    expected = merging.apply(method, base, [floats(t) for t in tensors[1:]], key="w", chunk=chunk, **parameters)
    keys: dict[str, Any] = {"parameters": parameters, "dtype": "float32"}
    if base is not None:
        keys["base_model"] = {"w": tensors[0]}
    with tempfile.TemporaryDirectory() as place:
        result = merged(Path(place), *({"w": tensor} for tensor in tensors[1:]), method=method, **keys)["w"]
    assert result.data == expected.tobytes()


# ---- the same bytes every time ----


def files(folder: Path) -> dict[str, bytes]:
    """All files but the lineage."""
    found = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in found.items() if name != "cuvee.json"}


@pytest.fixture
def family(tmp_path: Path) -> list[Path]:
    """A base and two models of it, sharded."""
    shards = {f"{n}.safetensors": [f"layer.{n}.{i}.w" for i in range(4)] for n in range(3)}
    return [
        write_shards(
            tmp_path / f"model {seed}",
            {
                file: {name: bf16(some((90, 70 + i), seed)) for i, name in enumerate(names)}
                for file, names in shards.items()
            },
        )
        for seed in range(3)
    ]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("dare_ties", {"density": 0.5}),
        ("della", {"density": 0.5}),
        ("ties", {"density": 0.3, "scope": "global"}),
        ("slerp", {"t": 0.3}),
        ("model_stock", {}),
        ("karcher", {}),
    ],
)
def test_threads_change_no_byte_and_shards_change_no_tensor(
    method: str, parameters: dict[str, Any], family: list[Path], tmp_path: Path
) -> None:
    models = family[1:2] if method == "slerp" else family[1:]
    recipe = write_recipe(tmp_path / "r.yml", method, *models, base_model=family[0], parameters=parameters)
    first = done(run("merge", recipe, tmp_path / "one", "--threads", 1, "--seed", 3, "--json")).json
    for threads in (2, 7):
        again = done(
            run("merge", recipe, tmp_path / "again", "--threads", threads, "--seed", 3, "--force", "--json")
        ).json
        assert files(tmp_path / "again") == files(tmp_path / "one")
        assert again["digest"] == first["digest"]
    small = done(run("merge", recipe, tmp_path / "small", "--seed", 3, "--shard-size", "30KB", "--json")).json
    assert read_model(tmp_path / "small") == read_model(tmp_path / "one")
    assert small["digest"] == first["digest"]
    other = done(run("merge", recipe, tmp_path / "other", "--seed", 4, "--json")).json
    assert (other["digest"] != first["digest"]) == (method in ("dare_ties", "della"))


def test_lineage_makes_it_again_byte_for_byte(family: list[Path], tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r.yml", "dare_ties", *family[1:], base_model=family[0], parameters={"density": 0.5}
    )
    done(run("merge", recipe, tmp_path / "out", "--seed", 5, "--shard-size", "50KB", "--threads", 1))
    recipe.unlink()
    for source in (tmp_path / "out", tmp_path / "out" / "cuvee.json"):
        again = done(run("merge", "--from", source, tmp_path / "again", "--force"))
        assert files(tmp_path / "again") == files(tmp_path / "out")
        assert "differ" not in again.err
    lineages = [json.loads((tmp_path / name / "cuvee.json").read_text()) for name in ("out", "again")]
    circumstances = dict.fromkeys(("seconds", "working_directory", "recipe_directory"))
    assert lineages[0] | circumstances == lineages[1] | circumstances


@pytest.mark.parametrize("began", ["", "elsewhere"], ids=["beside the models", "elsewhere"])
def test_lineage_finds_models_that_were_named_beside_the_recipe(began: str, family: list[Path], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    recipe = write_recipe(tmp_path / "r.yml", "linear", *(model.name for model in family))
    out = tmp_path / "elsewhere" / "out"
    done(run("merge", recipe, out, cwd=tmp_path / began))
    done(run("merge", "--from", out, tmp_path / "again", cwd=Path("/")))
    assert files(tmp_path / "again") == files(out)


def test_lineage_refuses_inputs_that_have_changed(family: list[Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yml", "linear", *family)
    done(run("merge", recipe, tmp_path / "out"))
    file = family[2] / "1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # a sign, or the last bit of an exponent
    file.write_bytes(content)
    said = run("merge", "--from", tmp_path / "out", tmp_path / "again")
    assert (said.code, said.err) == (
        2,
        f"error: {family[2]}: has changed since that merge; restore it, or merge anew\n",
    )
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": None},
        {"seed": "many"},
        {"shard_size": -1},
        {"device": 7},
        {"inputs": 3},
        {"inputs": [{}]},
        {"inputs": [17]},
        {"recipe": None},
        {"recipe": "merge_method: linear"},
        {"command": "search"},
        {"working_directory": 3},
        {"output": None},
    ],
    ids=str,
)
def test_a_lineage_that_is_none_is_told_in_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yml", "linear", *(write_model(tmp_path / f"{n}", tiny(n)) for n in range(2)))
    done(run("merge", recipe, tmp_path / "out"))
    file = tmp_path / "out" / "cuvee.json"
    past = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in past.items() if value is not None}))
    said = run("merge", "--from", file, tmp_path / "again")
    assert (said.code, said.err.count("\n")) == (2, 1), said.err
    assert not (tmp_path / "again").exists()


def test_names_that_are_no_text_are_no_obstacle(tmp_path: Path) -> None:
    """Folders whose names are no UTF-8, and half of a surrogate pair in a config."""
    place = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    models = [write_model(place / f"{n}", tiny(n), {"model_type": "bert", "x": "\ud800é"}) for n in range(2)]
    recipe = write_recipe(tmp_path / "r.yml", "linear", *(model.name for model in models), dtype="float16")
    result = done(run("merge", recipe, place / "out", "--json", cwd=place)).json
    assert result["out"] == str(place / "out")
    assert json.loads((place / "out" / "config.json").read_text())["x"] == "\ud800é"
    done(run("merge", "--from", place / "out", tmp_path / "again"))
    assert files(tmp_path / "again") == files(place / "out")


# ---- what it takes ----


def test_an_interrupt_ends_the_workers_before_their_files_are_closed(family: list[Path], tmp_path: Path) -> None:
    """A file number that is free again may soon be another file's."""
    calls = []
    heard = threading.Event()

    def hear(*_: object) -> None:
        heard.set()
        raise KeyboardInterrupt

    def interrupt(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            assert heard.wait(60)
            time.sleep(1)  # what is left for the main thread to do takes microseconds, even on a busy machine

    recipe = merging.Recipe("linear", [str(model) for model in family], **MEAN)
    before = signal.signal(signal.SIGINT, hear)
    with pytest.raises(KeyboardInterrupt):
        merging.merge(recipe, tmp_path / "out", threads=1, progress=interrupt)
    signal.signal(signal.SIGINT, before)
    assert not [thread.name for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name]
    assert len(calls) == 1
    assert sorted(tmp_path.iterdir()) == family


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not list open files")
@pytest.mark.parametrize("damage", [0.0, np.nan], ids=["merged", "refused"])
def test_no_file_stays_open(damage: float, family: list[Path], tmp_path: Path) -> None:
    write_model(
        tmp_path / "more", {f"layer.{n}.{i}.w": some((90, 70 + i)) + damage for n in range(3) for i in range(4)}
    )
    recipe = merging.Recipe("linear", [str(model) for model in [*family, tmp_path / "more"]], **MEAN)
    before = os.listdir("/proc/self/fd")
    with contextlib.suppress(merging.MergeError):
        merging.merge(recipe, tmp_path / "out")
    assert os.listdir("/proc/self/fd") == before
    assert (tmp_path / "out").exists() == (damage == 0)


def sparse(place: Path, count: int, rows: int) -> list[Path]:
    """Models of one tensor of rows × 4,096 bfloat16 zeros, which takes no space on the disk."""
    size = rows * 4096 * 2
    header = container({"w": {"dtype": "BF16", "shape": [rows, 4096], "data_offsets": [0, size]}})
    models = [write_model(place / f"{rows} {n}", header) for n in range(count)]
    for model in models:
        os.truncate(model / "model.safetensors", len(header) + size)
    return models


@pytest.mark.parametrize(
    ("method", "parameters", "count", "rows"),
    [
        ("linear", {}, 3, 1 << 13),  # 64 MiB; one float32 copy would take 128
        ("ties", {"density": 0.3}, 3, 1 << 13),
        ("slerp", {"t": 0.5}, 2, 1 << 13),
        ("della", {"density": 0.5}, 3, 1 << 13),
        ("linear", {}, 30, 1 << 10),  # 240 MiB
        ("ties", {"density": 0.3}, 30, 1 << 10),
    ],
)
def test_memory_grows_neither_with_the_largest_tensor_nor_with_the_models(
    method: str, parameters: dict[str, Any], count: int, rows: int, tmp_path: Path
) -> None:
    def anonymous(models: list[Path]) -> int:
        keys = {} if method == "linear" else {"base_model": models[0], "parameters": parameters}
        recipe = write_recipe(tmp_path / "r.yml", method, *(models if method == "linear" else models[1:]), **keys)
        return done(run("merge", recipe, tmp_path / "out", "--force", "--threads", 2, watch_memory=True)).anonymous

    small, large = anonymous(sparse(tmp_path, 3 if count > 2 else 2, 1)), anonymous(sparse(tmp_path, count, rows))
    assert large < 1 << 30
    assert large - small < 32 << 20


@pytest.mark.parametrize(("method", "bytes_an_element"), [("fisher", 0), ("obim", 1)])  # whose it is
def test_memory_grows_neither_with_statistics(method: str, bytes_an_element: int, tmp_path: Path) -> None:
    rows = 1 << 12  # 32 MiB, and statistics of 64

    def anonymous(models: list[Path], rows: int) -> int:
        zeros = np.zeros((rows, 4096), np.float32)
        entries = [
            {"model": str(model), "stats": str(write_stats(Path(f"{model}-stats"), model, "fisher", {"w": zeros}).path)}
            for model in models[1:]
        ]
        base = {} if method == "fisher" else {"base_model": str(models[0])}
        recipe = tmp_path / "r.yml"
        recipe.write_text(json.dumps({"merge_method": method, "models": entries, **base}))
        return done(run("merge", recipe, tmp_path / "out", "--force", "--threads", 2, watch_memory=True)).anonymous

    small, large = anonymous(sparse(tmp_path, 3, 1), 1), anonymous(sparse(tmp_path, 3, rows), rows)
    assert large - small < (32 << 20) + bytes_an_element * rows * 4096
