"""Times merges against mergekit and the physical floor, in one run.

    python scripts/bench_merge.py [--sizes 0.5 1] [--repeats 3] [--methods linear ties …] [--work DIR] [--no-mergekit]

Work: four Llama-shaped bfloat16 checkpoints of the size in billions of parameters, sharded; made once under DIR and kept.
Peers: `cuvee merge` and `mergekit-yaml -j 1`, each as a whole process; the floor reads every input byte once (`cat`) and
writes the output's bytes once (`cp`). Peers take turns within a repeat, so that a change of the machine's speed meets all
of them; what is printed are medians. Pages are warm. Writes one table and one JSON (DIR/bench_merge.json).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from merging.checkpoint import CheckpointWriter

METHODS: dict[str, tuple[dict, dict]] = {  # method: (parameters of the merge, of each model)
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
}
SHAPES = {0.5: (1024, 4096, 24, 32000), 1.0: (1536, 6144, 24, 32000)}  # hidden, intermediate, layers, vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.5], choices=sorted(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--work", type=Path, default=Path("bench"))
    parser.add_argument("--no-mergekit", action="store_true")
    options = parser.parse_args()
    rows = []
    print("| size | method | floor s | cuvee s (CPU) | × floor | mergekit s (CPU) | mergekit ÷ cuvee |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for size in options.sizes:
        models = make_models(options.work, size)
        for method in options.methods:
            row = bench(options.work, models, method, options.repeats, not options.no_mergekit) | {"size": size}
            rows.append(row)
            print(line(row), flush=True)
    start_up = [timed([sys.executable, "-m", "cuvee", "--help"])[0] for _ in range(5)]
    print(f"\nstart-up alone, `cuvee --help`: {statistics.median(start_up):.2f} s")
    (options.work / "bench_merge.json").write_text(json.dumps({"rows": rows, "help_seconds": start_up}, indent=2))


def line(row: dict) -> str:
    ours, theirs = row["cuvee"], row.get("mergekit")
    peer = f"{theirs[0]:.1f} ({theirs[1]:.1f}) | {theirs[0] / ours[0]:.1f}" if theirs else "– | –"
    return (
        f"| {row['size']} B | {row['method']} | {row['floor'][0]:.2f} | {ours[0]:.2f} ({ours[1]:.2f}) | "
        f"{ours[0] / row['floor'][0]:.1f} | {peer} |"
    )


def bench(work: Path, models: list[Path], method: str, repeats: int, with_mergekit: bool) -> dict:
    """Median wall and CPU seconds of each peer."""
    recipe, used = write_recipe(work, models, method)
    inputs = [str(f) for m in used for f in sorted(m.glob("*.safetensors"))]
    out = work / "out"
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
            "-j",
            "1",
            "--no-copy-tokenizer",
        ]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    for repeat in range(repeats + 1):
        for name, command in peers.items():
            shutil.rmtree(out, ignore_errors=True)
            spent = timed(command)
            if repeat:  # the first round warms pages and caches
                times[name].append(spent)
    shutil.rmtree(out, ignore_errors=True)
    medians = {n: tuple(statistics.median(t[i] for t in ts) for i in (0, 1)) for n, ts in times.items()}
    return {"method": method, **medians, "all": times}


def timed(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_recipe(work: Path, models: list[Path], method: str) -> tuple[Path, list[Path]]:
    shared, each = METHODS[method]
    plain = method in ("linear", "karcher")
    used = models[:2] if method == "slerp" else models
    entries = [{"model": str(m), **({"parameters": each} if each else {})} for m in (used if plain else used[1:])]
    if method == "slerp":
        entries = [{"model": str(m)} for m in used[1:]]
    recipe = {"merge_method": method, "models": entries, "dtype": "bfloat16"}
    recipe |= {} if plain else {"base_model": str(models[0])}
    recipe |= {"parameters": shared} if shared else {}
    file = work / f"{method}.yml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file, used


def make_models(work: Path, size: float) -> list[Path]:
    """A base and three models beside it: random weights, since only bytes and shapes matter to the clock."""
    hidden, intermediate, layers, vocabulary = SHAPES[size]
    shapes = list(llama_shapes(hidden, intermediate, layers, vocabulary))
    config = {
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
    folders = []
    for model in range(4):
        folder = work / f"llama-{size}b-{model}"
        folders.append(folder)
        if (folder / "config.json").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        writer = CheckpointWriter(folder, [(name, "BF16", shape) for name, shape in shapes], 600_000_000)
        for number, (name, shape) in enumerate(shapes):
            count = int(np.prod(shape))
            values = np.random.default_rng(number).standard_normal(count, dtype=np.float32) * np.float32(0.02)
            if model:
                change = np.random.default_rng([number, model]).standard_normal(count, dtype=np.float32)
                values += change * np.float32(0.002)
            bits = values.view(np.uint32)
            stored = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            writer.write(name, 0, stored.view(np.uint8).data)
        writer.close()
        (folder / "config.json").write_text(json.dumps(config))
    return folders


def llama_shapes(hidden: int, intermediate: int, layers: int, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            yield f"{prefix}self_attn.{name}_proj.weight", (hidden, hidden)
        yield f"{prefix}mlp.gate_proj.weight", (intermediate, hidden)
        yield f"{prefix}mlp.up_proj.weight", (intermediate, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, intermediate)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


if __name__ == "__main__":
    main()
