"""Times a trial of DF-Merge in memory: `LiveDF.set`, and what share of it goes to the Fisher information.

    python scripts/bench_df_merge.py [--models 3] [--examples 30] [--candidates 8] [--tasks word code] [--device cuda]

The models are the demo model (23 million parameters) plus noise; each reads so many rows of a task of the suite that ships. Of
a trial with new coefficients all Fisher information is taken anew; of the same coefficients again it is known, and what is
left is the merge. `on disk` is one `cuvee merge` of the same recipe, with its statistics. Medians over the repeats. Prints one
table, writes one JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin for a busy core slow all of them down
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--examples", type=int, default=30)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--tasks", nargs="+", default=["word", "code"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("bench_df_merge.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    results = []
    print("| task | models | examples each | trial s | CPU s | of it Fisher | merge ms | on disk s | held MB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for task in options.tasks:
        with tempfile.TemporaryDirectory() as folder:
            found = {"task": task, **measured(task, Path(folder), options)}
        results.append(found)
        print(line(found, options), flush=True)
    settings = {name: getattr(options, name) for name in ("models", "examples", "candidates", "device")}
    content = {**settings, "threads": torch.get_num_threads(), "results": results}
    options.out.write_text(json.dumps(content, indent=2) + "\n")


def measured(task: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from merging.engine import merge
    from merging.live_df import LiveDF
    from merging.recipe import Recipe
    from merging.statistics.network import open_network

    base, models = family(options.models, folder)
    data = rows(task, options.models, folder)
    stats = [{"data": str(own), "examples": options.examples, "candidates": options.candidates} for own in data]
    module = open_network(str(base), device=options.device).module
    live = LiveDF(module, base, models, stats=stats, device=options.device, threads=options.threads)
    spent: dict[str, list[float]] = {"trial": [], "cpu": [], "merge": []}

    def seconds(coefficients: dict[str, Any]) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        live.set(coefficients)
        if options.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu

    for repeat in range(options.repeats + 1):
        coefficients = {"weight": [0.2 + 0.1 * repeat + 0.01 * i for i in range(options.models)]}
        first, again = seconds(coefficients), seconds(coefficients)
        if repeat:  # the first time checks the gradients and compiles
            spent["trial"].append(first[0])
            spent["cpu"].append(first[1])
            spent["merge"].append(again[0])
    began = time.perf_counter()
    merge(Recipe.parse(live.recipe(coefficients)), folder / "out", device=options.device)
    return {"on_disk": time.perf_counter() - began, "held": live.nbytes, "seconds": spent}


def family(count: int, folder: Path) -> tuple[Path, list[Path]]:
    """Folders of the demo model and of so many of its lineage."""
    import torch
    from safetensors.torch import load_file, save_file

    from embeddings.quickstart import demo_model

    base = Path(shutil.copytree(demo_model(), folder / "base"))
    models = []
    torch.manual_seed(0)
    for i in range(count):
        model = Path(shutil.copytree(base, folder / f"model{i}"))
        tensors = load_file(model / "model.safetensors")
        noisy = {n: t + 1e-3 * torch.randn_like(t) if t.is_floating_point() else t for n, t in tensors.items()}
        save_file(noisy, model / "model.safetensors", {"format": "pt"})
        models.append(model)
    return base, models


def rows(task: str, parts: int, folder: Path) -> list[Path]:
    """Pairs of a task of the suite, dealt out to so many files."""
    import embeddings

    source = Path(embeddings.__file__).parent / "data" / "suite" / task / "train.jsonl.gz"
    with gzip.open(source, "rt") as stream:
        lines = [line for line in stream if line.strip()]
    files = [folder / f"{task}{part}.jsonl" for part in range(parts)]
    for part, file in enumerate(files):
        file.write_text("".join(lines[part::parts]))
    return files


def line(found: dict[str, Any], options: argparse.Namespace) -> str:
    middle: Callable[[str], float] = lambda name: statistics.median(found["seconds"][name])  # noqa: E731
    trial, merge = middle("trial"), middle("merge")
    cells = [
        *(found["task"], options.models, options.examples, f"{trial:.2f}", f"{middle('cpu'):.2f}"),
        *(f"{1 - merge / trial:.1%}", f"{1e3 * merge:.0f}", f"{found['on_disk']:.1f}", f"{found['held'] / 1e6:.0f}"),
    ]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
