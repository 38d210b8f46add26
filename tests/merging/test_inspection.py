"""`cuvee inspect` against a float64 oracle on the real all-MiniLM-L6-v2, and against damage and differences of every kind."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from merging import inspection, kernels, layers
from merging.errors import CuveeError
from merging.inspection import inspect, short_names
from merging.inspection_table import collapse, show_tables
from merging.sources import ModelRef
from tests.checkpoints import bf16, container, some, tiny, write_model
from tests.commands import run

Array = NDArray[Any]
Arrays = Mapping[str, Array]


# ---- the oracle ----


def oracle(models: Mapping[str, Arrays], base: Arrays | None) -> dict[str, dict[str, Any]]:
    """The promised numbers of models that all have the same tensors, each flattened into one vector."""
    flat = {name: np.concatenate([a.ravel() for a in arrays.values()]) for name, arrays in models.items()}
    start = None if base is None else np.concatenate([base[name].ravel() for name in next(iter(models.values()))])
    vectors = {name: v if start is None else v - start for name, v in flat.items()}  # in the storage's float32
    wide = {name: v.astype(np.float64) for name, v in vectors.items()}
    upward = np.add.reduce(list(wide.values())) >= 0
    found = {}
    for name, v in wide.items():
        norm, others = np.linalg.norm(v), {other: w for other, w in wide.items() if other != name}
        found[name] = {
            "norm": norm,
            "relative_norm": None if start is None else norm / np.linalg.norm(start.astype(np.float64)),
            "density": np.mean(v != 0),
            "sign_conflict": np.mean(np.where(upward, v < 0, v > 0)),
            "cosine": {o: (v @ w) / norm / np.linalg.norm(w) if norm and w.any() else None for o, w in others.items()},
            "distance": {other: np.linalg.norm(v - w) for other, w in others.items()},
            "opposite_signs": {other: np.mean(v * w < 0) for other, w in others.items()},
            "nan": 0,
            "inf": 0,
            "parameters": len(v),
        }
    return found


def assert_same(found: Any, truth: Any, absolute: float = 1e-6) -> None:
    assert found.keys() == truth.keys()
    for key, expected in truth.items():
        if isinstance(expected, Mapping):
            assert_same(found[key], expected, absolute)
        else:
            assert found[key] == (None if expected is None else pytest.approx(expected, rel=1e-5, abs=absolute)), key


def loaded(folder: Path) -> dict[str, Array]:
    from safetensors.numpy import load_file

    return {name: a for name, a in load_file(folder / "model.safetensors").items() if a.dtype == np.float32}


@pytest.fixture(scope="module")
def family(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """MiniLM and three copies: one moved everywhere, one at a fifth of the coordinates, one in the layers only."""
    from safetensors.numpy import save_file

    base, folders = loaded(minilm), []
    for seed, name in enumerate(["everywhere", "sparse", "layers"]):
        rng = np.random.default_rng(seed)
        moved = {}
        for tensor, array in base.items():
            change = (0.01 * array.std() * rng.standard_normal(array.shape)).astype(np.float32)
            if name == "sparse":
                change *= rng.random(array.shape) < 0.2
            moved[tensor] = array + change if name != "layers" or ".layer." in tensor else array
        folders.append(tmp_path_factory.mktemp("family") / name)
        folders[-1].mkdir()
        save_file(moved, folders[-1] / "model.safetensors")
    return minilm, folders


# ---- the numbers ----


def test_task_vectors_of_minilm_equal_the_float64_oracle(family: tuple[Path, list[Path]]) -> None:
    base, folders = family
    result = inspect([str(folder) for folder in folders], str(base))
    arrays = {folder.name: loaded(folder) for folder in folders}
    origin = loaded(base)
    assert_same(result["models"], oracle(arrays, origin))
    groups = {layers.group(name) for name in origin}
    assert list(result["groups"]) == ["embeddings", *(f"encoder.layer.{i}" for i in range(6)), "pooler"]
    assert set(result["groups"]) == groups
    for group in groups:
        part = {n: {t: a for t, a in each.items() if layers.group(t) == group} for n, each in arrays.items()}
        assert_same(result["groups"][group], oracle(part, origin))
    assert result["models"]["sparse"]["density"] == pytest.approx(0.2, abs=0.01)
    assert result["base"]["norm"] == pytest.approx(np.sqrt(sum(np.sum(a.astype("f8") ** 2) for a in origin.values())))
    # The copies leave out the one buffer of whole numbers.
    assert result["differences"] == [
        {"tensor": "embeddings.position_ids", "kind": "missing", "models": ["everywhere", "sparse", "layers"]}
    ]


def test_weights_of_minilm_equal_the_float64_oracle(family: tuple[Path, list[Path]]) -> None:
    _, folders = family
    result = inspect([str(folder) for folder in folders])
    assert_same(result["models"], oracle({folder.name: loaded(folder) for folder in folders}, None), absolute=1e-5)
    assert result["base"] is None


def test_a_copy_of_the_base_has_not_moved(minilm: Path) -> None:
    result = inspect([str(minilm), str(minilm)], str(minilm))
    assert list(result["models"]) == ["model", "model (2)"]
    entry = result["models"]["model"]
    assert [entry[key] for key in ("norm", "relative_norm", "density", "sign_conflict")] == [0, 0, 0, 0]
    assert entry["cosine"] == {"model (2)": None}
    assert entry["distance"] == entry["opposite_signs"] == {"model (2)": 0}
    assert result["differences"] == result["damaged"] == []
    assert inspect([str(minilm), str(minilm)])["models"]["model"]["cosine"] == {"model (2)": 1.0}


def test_opposite_task_vectors(tmp_path: Path) -> None:
    base = some((40, 30))
    change = some((40, 30), 1)
    change[:10] = 0
    folders = [
        write_model(tmp_path / n, {"w": a}) for n, a in [("c", base), ("a", base + change), ("b", base - change)]
    ]
    entries = inspect([str(folders[1]), str(folders[2])], str(folders[0]))["models"]
    assert entries["a"]["cosine"]["b"] == pytest.approx(-1, abs=1e-6)
    assert entries["a"]["opposite_signs"]["b"] == entries["a"]["density"] == 0.75
    assert entries["a"]["sign_conflict"] + entries["b"]["sign_conflict"] == 0.75  # one of the two loses everywhere


@pytest.mark.parametrize("kind", ["F16", "BF16", "F64"])
def test_other_dtypes_are_measured_as_float32(kind: str, tmp_path: Path) -> None:
    arrays = [np.round(some((64, 32), seed) * 16) / 16 for seed in range(3)]  # exact in all of them
    stored = {"F16": lambda a: a.astype("f2"), "F64": lambda a: a.astype("f8"), "BF16": bf16}[kind]
    folders = [write_model(tmp_path / f"{i}", {"w": stored(a)}) for i, a in enumerate(arrays)]
    result = inspect([str(folder) for folder in folders[1:]], str(folders[0]))
    named = {f"{i}": {"w": a} for i, a in enumerate(arrays)}
    if kind == "BF16":
        named = {n: {"w": (a["w"].view("u4") >> 16 << 16).view("f4")} for n, a in named.items()}
    assert_same(result["models"], oracle({n: named[n] for n in ("1", "2")}, named["0"]))


def test_pieces_change_rounding_only_and_threads_nothing(
    family: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folders = family
    arguments = ([str(folder) for folder in folders], str(base))
    first, second = (inspect(*arguments, threads=threads) for threads in (1, 4))
    for timed in (first, second):
        del timed["seconds"]
    assert json.dumps(first) == json.dumps(second)
    monkeypatch.setattr(inspection, "_PIECE", 12_345)
    assert_same(inspect(*arguments)["models"], first["models"])


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 5000])
def test_sign_counts_compiled_equal_reference_and_the_loop(count: int, size: int) -> None:
    rng = np.random.default_rng([count, size])
    values = (rng.integers(-3, 4, (count, size)) / 2).astype(np.float32)  # zeros and sums of zero abound
    truth = np.zeros((count, count + 1), np.int64)
    upward = values.sum(0) >= 0
    for i in range(count):
        truth[i, i] = np.sum(values[i] != 0)
        truth[i, -1] = np.sum(np.where(upward, values[i] < 0, values[i] > 0))
    for i, j in itertools.combinations(range(count), 2):
        truth[i, j] = np.sum(values[i] * values[j] < 0)
    for backend in ("reference", "compiled"):
        counts = np.zeros_like(truth)
        for _ in range(2):
            kernels.load(backend).sign_counts(values, counts)
        np.testing.assert_array_equal(counts, 2 * truth)


# ---- damage ----


def test_damage_is_counted_and_counts_as_not_moved(tmp_path: Path) -> None:
    base, a, b = (some((300, 7), seed) for seed in range(3))
    clean = {"c": base.copy(), "a": a.copy(), "b": b.copy()}
    base[0, 0] = np.inf
    a[1], a[2, 0] = np.nan, -np.inf
    for name in clean:
        clean[name][0, 0] = 0.0
    clean["a"][1], clean["a"][2, 0] = clean["c"][1], clean["c"][2, 0]
    for name, array in {"c": base, "a": a, "b": b}.items():
        write_model(tmp_path / name, {"layer.0.w.weight": array, "layer.0.v.weight": some((3,))})
        write_model(tmp_path / f"clean-{name}", {"layer.0.w.weight": clean[name], "layer.0.v.weight": some((3,))})
    found = inspect([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "c"))
    truth = inspect([str(tmp_path / "clean-a"), str(tmp_path / "clean-b")], str(tmp_path / "clean-c"))
    for name, other in [("a", "b"), ("b", "a")]:
        entry, expected = found["models"][name], truth["models"][f"clean-{name}"]
        assert [entry["nan"], entry["inf"]] == ([7, 1] if name == "a" else [0, 0])
        assert entry["norm"] == pytest.approx(expected["norm"], rel=1e-12)
        assert entry["cosine"][other] == pytest.approx(expected["cosine"][f"clean-{other}"], rel=1e-12)
        for key in ("density", "sign_conflict"):
            assert entry[key] == expected[key]
    assert found["base"]["norm"] == pytest.approx(truth["base"]["norm"], rel=1e-12)
    assert [found["base"]["nan"], found["base"]["inf"]] == [0, 1]
    assert found["damaged"] == [
        {"tensor": "layer.0.w.weight", "model": "a", "nan": 7, "inf": 1},
        {"tensor": "layer.0.w.weight", "model": "c", "nan": 0, "inf": 1},
    ]
    json.loads(json.dumps(found), parse_constant=pytest.fail)  # NaN and Infinity are no JSON


@pytest.mark.parametrize("kind", ["f2", "f8"])
def test_damage_in_other_dtypes(kind: str, tmp_path: Path) -> None:
    array = some((50,)).astype(kind)
    array[3], array[4] = np.nan, np.inf
    write_model(tmp_path / "a", {"w": array})
    assert [inspect([str(tmp_path / "a")])["models"]["a"][key] for key in ("nan", "inf", "parameters")] == [1, 1, 50]


def test_values_beyond_float32_count_as_infinite(tmp_path: Path) -> None:
    write_model(tmp_path / "a", {"w": np.array([1e300, -1e300, 2.0])})
    entry = inspect([str(tmp_path / "a")])["models"]["a"]
    assert [entry["inf"], entry["nan"], entry["norm"]] == [2, 0, 2.0]


# ---- differences ----


def test_differences_are_reported_and_the_rest_is_measured(tmp_path: Path) -> None:
    base = write_model(tmp_path / "c", tiny(0, head__weight=some((3, 4)), ids=np.arange(3)))
    a = tiny(1, head__weight=some((2, 4)), ids=np.arange(3))
    a["layer.0.dense.weight"] = np.asarray(a["layer.0.dense.weight"]).astype("f2")
    b = tiny(2, ids=np.array([0, 1, 7]), extra__weight=np.array([np.nan, 1], np.float32))
    folders = [write_model(tmp_path / "a", a), write_model(tmp_path / "b", b)]
    result = inspect([str(folder) for folder in folders], str(base))
    assert result["differences"] == [
        {"tensor": "layer.0.dense.weight", "kind": "dtype", "values": {"a": "F16", "b": "F32", "c": "F32"}},
        {"tensor": "head.weight", "kind": "missing", "models": ["b"]},
        {"tensor": "head.weight", "kind": "shape", "values": {"a": [2, 4], "c": [3, 4]}},
        {"tensor": "ids", "kind": "values", "models": ["a", "b", "c"]},
        {"tensor": "extra.weight", "kind": "missing", "models": ["a", "c"]},
    ]
    shared = {name: np.asarray(tensor, np.float32) for name, tensor in tiny(0).items()}
    arrays = {"a": {name: np.asarray(a[name], np.float32) for name in shared}, "b": {n: tiny(2)[n] for n in shared}}
    truth = oracle(arrays, shared)
    truth["b"]["nan"] = 1  # in a tensor that only b has: no task vector, but damage all the same
    truth["a"]["distance"]["b"] = truth["b"]["distance"]["a"] = pytest.approx(truth["a"]["distance"]["b"], rel=1e-3)
    for entry in truth.values():
        del entry["distance"]
    for entry in result["models"].values():
        del entry["distance"]
    assert_same(result["models"], truth)
    assert result["tensors"] == 8


def test_cosine_is_over_what_both_models_have(tmp_path: Path) -> None:
    shared, own = some((10, 4)), some((50, 4), 1, spread=100)
    folders = [write_model(tmp_path / "a", {"w": shared, "head": own}), write_model(tmp_path / "b", {"w": shared})]
    entries = inspect([str(folder) for folder in folders])["models"]
    assert entries["a"]["cosine"]["b"] == pytest.approx(1, abs=1e-12)
    assert entries["a"]["distance"]["b"] == 0
    assert entries["a"]["norm"] > 50 * entries["b"]["norm"]


def test_nothing_in_common(tmp_path: Path) -> None:
    folders = [write_model(tmp_path / name, {name: some((3,))}) for name in "abc"]
    entry = inspect([str(folder) for folder in folders[:2]], str(folders[2]))["models"]["a"]
    assert entry["density"] is entry["sign_conflict"] is entry["relative_norm"] is entry["cosine"]["b"] is None
    assert entry["parameters"] == entry["norm"] == 0


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, {"none": some((0, 3)), "one": some((), seed)})
    entry = inspect([str(tmp_path / "a")], str(tmp_path / "b"))["models"]["a"]
    assert entry["parameters"] == 1
    assert entry["norm"] == pytest.approx(abs(float(some((), 0)) - float(some((), 1))))


def test_prefixed_names_are_the_same_tensors(tmp_path: Path) -> None:
    write_model(tmp_path / "a", {f"model.{name}": tensor for name, tensor in tiny(1).items()})
    write_model(tmp_path / "b", tiny(1))
    result = inspect([str(tmp_path / "a")], str(tmp_path / "b"))
    assert result["differences"] == []
    assert result["models"]["a"]["norm"] == 0


def test_a_head_tied_to_the_embedding_is_compared_with_it(tmp_path: Path) -> None:
    embedding = some((9, 4))
    embedding[0, 0] = np.nan
    tied = {"model.embed_tokens.weight": embedding, "model.norm.weight": some((4,))}
    write_model(tmp_path / "tied", tied, {"tie_word_embeddings": True})
    write_model(tmp_path / "untied", {**tied, "lm_head.weight": embedding}, {"tie_word_embeddings": False})
    result = inspect([str(tmp_path / "tied")], str(tmp_path / "untied"))
    assert result["differences"] == []
    assert result["models"]["tied"]["norm"] == 0
    assert result["models"]["tied"]["parameters"] == 76
    assert result["models"]["tied"]["nan"] == 1  # it is stored once
    assert result["base"]["nan"] == 2


def test_adapters_are_measured_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_PIECE", 100)  # pieces of whole rows
    name, scale = "encoder.layer.0.attention.self.query", 16 / 2
    weights = {f"{name}.weight": some((40, 24)), f"{name}.bias": some((40,))}
    a, b = some((2, 24), 1), some((40, 2), 2)
    write_model(tmp_path / "base", weights)
    adapter = write_model(tmp_path / "adapter", {})
    (adapter / "model.safetensors").unlink()
    factors = {f"base_model.model.{name}.lora_{letter}.weight": array for letter, array in (("A", a), ("B", b))}
    write_model(tmp_path / "factors", factors)
    (tmp_path / "factors" / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "target_modules": ["query"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    base = tmp_path / "base"
    result = inspect([f"{base}+{adapter}"], str(base))
    entry = result["models"]["base+adapter"]
    assert entry["norm"] == pytest.approx(np.linalg.norm(scale * b.astype("f8") @ a), rel=1e-5)
    assert entry["density"] == pytest.approx(40 * 24 / (40 * 24 + 40), abs=0.01)


# ---- names ----


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/b", "c"], ["b", "c"]),
        (["runs/a/final", "runs/b/final"], ["a/final", "b/final"]),
        (["x/a/final", "y/a/final", "z"], ["x/a/final", "y/a/final", "z"]),
        (["owner/name@v1", "owner/name@v2"], ["name@v1", "name@v2"]),
        (["m+x/lora", "m"], ["m+lora", "m"]),
        (["m+x/lora", "m+y/lora"], ["m+x/lora", "m+y/lora"]),
        (["a", "a", "a"], ["a", "a (2)", "a (3)"]),
        (["/"], ["/"]),
    ],
)
def test_short_names_tell_the_models_apart(paths: list[str], names: list[str], tmp_path: Path) -> None:
    assert short_names([ModelRef.parse(path) for path in paths]) == names


# ---- mistakes ----


@pytest.mark.parametrize("models", [[], [""], ["./nowhere"], ["a", "./nowhere"], ["a+"], ["pickled"], ["truncated"]])
def test_mistakes_are_told_in_one_line(models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "a", tiny())
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    header = {"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}
    write_model(tmp_path / "truncated", container(header, b"\0" * 20))
    for base in (None, "a"):
        with pytest.raises(CuveeError) as caught:
            inspect(models, base)
        assert "\n" not in str(caught.value)
    assert run("inspect", *models, cwd=tmp_path).code == 2


def test_unreadable_bases_leave_no_open_files(tmp_path: Path) -> None:
    write_model(tmp_path / "a", tiny())
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for _ in range(3):
        with pytest.raises(CuveeError):
            inspect([str(tmp_path / "a")], str(tmp_path / "nowhere"))
        inspect([str(tmp_path / "a")])
    assert before is None or len(os.listdir("/proc/self/fd")) == before


def test_packed_dtypes_are_compared_but_not_measured(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    write_model(tmp_path / "a", container(header, b"\1\2\3\4"))
    write_model(tmp_path / "b", container(header, b"\1\2\3\5"))
    result = inspect([str(tmp_path / "a"), str(tmp_path / "b")])
    assert result["models"]["a"]["parameters"] == 0
    assert result["differences"] == [{"tensor": "w", "kind": "values", "models": ["a", "b"]}]


# ---- the command and its tables ----


def test_command_prints_tables_or_the_promised_object(family: tuple[Path, list[Path]]) -> None:
    base, folders = family
    done = run("inspect", *folders, "--base", base)
    assert done.code == 0
    assert "3 models against model: 22.7 M parameters" in done.out
    assert "encoder.layer.5" in done.out
    assert "encoder.layer.5" not in run("inspect", *folders, "--base", base, "--no-groups").out
    found = run("inspect", *folders, "--base", base, "--json").json
    for key in ("command", "out", "seconds", "seed", "device", "cuvee_version"):
        assert key in found
    for name, others in (("sparse", {"everywhere", "layers"}), ("layers", {"everywhere", "sparse"})):
        entry = found["models"][name]
        assert {"norm", "sign_conflict", "cosine"} <= entry.keys()
        assert entry["cosine"].keys() == others


def printed(result: dict[str, Any], groups: bool = True) -> str:
    stream = io.StringIO()
    show_tables(result, groups, Console(file=stream, width=100, highlight=False))
    return stream.getvalue()


def test_tables_of_six_deep_models_fit_a_hundred_columns(tmp_path: Path) -> None:
    for seed in range(7):
        tensors = {"model.embed_tokens.weight": some((30, 4), seed), "lm_head.weight": some((30, 4), seed)}
        for layer in range(80):
            tensors |= {f"model.layers.{layer}.{part}.weight": some((4, 4), seed) for part in ("attn", "mlp")}
        write_model(tmp_path / f"a-model-with-quite-a-long-name-indeed-number-{seed}", tensors)
    folders = sorted(str(folder) for folder in tmp_path.iterdir())
    for base in (folders[0], None):
        result = inspect(folders[1:], base)
        text = printed(result)
        assert max(map(len, text.splitlines())) <= 100
        assert "model.layers.0-6" in text
        assert "model.layers.77-79" in text
        for name in result["models"]:
            assert f"{name[:40]}" in text
        assert len(text.splitlines()) < 60
        assert "…" not in text.split("norm", 1)[1].replace("a-model", "")[-2000:]


def test_tables_tell_what_is_odd(tmp_path: Path) -> None:
    odd = tiny(1, only__weight=some((2,)))
    odd["layer.0.norm.bias"] = np.array([np.nan, 1, 2, np.inf], np.float32)
    odd["layer.1.norm.bias"] = some((4,)).astype("f2")
    odd["embeddings.weight"] = some((8, 4))
    folders = [write_model(tmp_path / "[odd]", odd), *(write_model(tmp_path / n, tiny(2)) for n in "xy")]
    text = printed(inspect([str(folder) for folder in folders[:2]], str(folders[2])))
    for line in (
        "shape: [8, 4] in [odd], [9, 4] elsewhere — embeddings.weight",
        "dtype: F16 in [odd], F32 elsewhere — layer.1.norm.bias",
        "only in [odd] — only.weight",
        "NaN or infinite values in [odd] — layer.0.norm.bias",
    ):
        assert line in text
    assert "NaN  Inf" in text


@pytest.mark.parametrize("count", [1, 2, 12, 13, 24, 28, 80, 126])
def test_deep_stacks_collapse_to_a_dozen_rows(count: int) -> None:
    groups = ["embeddings", *(f"layers.{i}" for i in range(count)), "norm"]
    rows = list(collapse(groups))
    assert [group for _, members in rows for group in members] == groups
    assert len(rows) <= 14
    assert len(rows) == count + 2 or math.ceil(count / 12) == max(len(members) for _, members in rows)
