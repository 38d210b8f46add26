"""Times `LiveMerge.set` against one pass over the same bytes, in one run.

    python scripts/bench_live.py [--works minilm-3 llama-3 …] [--methods linear ties …] [--repeats 15] [--device cuda]

Works are a base and so many models of its lineage, the base plus noise: `minilm` the real all-MiniLM-L6-v2 (23 million
parameters, float32), `llama` a Llama-shaped model with random weights (110 million); `-bf16` holds bfloat16 task vectors,
`-lora` adapters of rank 16 on all linear layers, `-module` gives the module bfloat16 weights.

The floor reads every byte that is held (a model held whole is read once, and so is the base where the method uses it) and
writes every weight once, in blocks, by as many threads, with an exclusive or for arithmetic; on a GPU it is torch's own copy
of as many bytes. Both take turns; printed are medians. The target is 1.5 x the floor's time for linear and task_arithmetic.
Adapters take arithmetic besides, 2·rank operations for each weight and model. Prints one table, writes one JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin for a busy core slow all of them down

WORKS = ("minilm-3", "minilm-8", "minilm-3-bf16", "minilm-3-module", "minilm-3-lora", "llama-3")
METHODS = ("linear", "task_arithmetic", "ties")
SLICE = 1 << 20


def main() -> None:
    from merging.processes import default_threads

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--works", nargs="+", default=list(WORKS), help="minilm-N or llama-N, then -bf16, -lora, -module"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--out", type=Path, default=Path("bench_live.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results = []
    print(
        "| models | method | held MB | moved MB | floor ms | floor GB/s | set ms | set ÷ floor | CPU time ÷ floor | load s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for work in options.works:
        with tempfile.TemporaryDirectory() as folder:
            base, models = family(work, Path(folder))
            for method in options.methods:
                found = {"work": work, "method": method, **measured(work, base, models, method, options)}
                results.append(found)
                print(line(found), flush=True)
    content = {"device": options.device, "threads": options.threads, "results": results}
    options.out.write_text(json.dumps(content, indent=2) + "\n")


def measured(work: str, base: Path, models: list[str], method: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModel

    from merging.live import LiveMerge

    module = AutoModel.from_pretrained(base, dtype=torch.bfloat16 if "module" in work else torch.float32)
    module.to(options.device)
    began = time.perf_counter()
    live = LiveMerge(
        module,
        base,
        models,
        method=method,
        dtype="bfloat16" if "bf16" in work else "float32",
        device=options.device,
        threads=options.threads,
    )
    load = time.perf_counter() - began
    written = sum(own.numel() * own.element_size() for own in module.parameters())
    unread = sum(own.numel() * 4 for own in module.parameters()) if method == "linear" and "-" not in work[7:] else 0
    read = live.nbytes - unread
    coefficients = [{"weight": [0.1 + 0.2 * i + 0.01 * j for i in range(len(models))]} for j in range(7)]
    floor = (
        device_floor(read, written, options.device) if options.device != "cpu" else host_floor(read, written, options)
    )
    spent: dict[str, list[float]] = {name: [] for name in ("floor", "set", "floor cpu", "set cpu")}
    for repeat in range(options.repeats + 2):
        peers: dict[str, Callable[[], Any]] = {
            "floor": floor,
            "set": lambda repeat=repeat: live.set(coefficients[repeat % 7]),  # type: ignore[misc]
        }
        for name in sorted(peers, reverse=bool(repeat % 2)):
            cpu, began = time.process_time(), time.perf_counter()
            peers[name]()
            if repeat > 1:  # the first two compile, load and warm up
                spent[name].append(time.perf_counter() - began)
                spent[f"{name} cpu"].append(time.process_time() - cpu)
    return {"held": live.nbytes, "read": read, "written": written, "load": load, "seconds": spent}


def host_floor(read: int, written: int, options: argparse.Namespace) -> Callable[[], None]:
    """A pass that reads and writes so many bytes: rows of the written's length, the last one shorter."""
    import numba

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def one_pass(rows: Any, rest: Any, out: Any, start: int, stop: int) -> None:
        for first in range(start, stop, 1024):
            last = min(first + 1024, stop)
            block = out[first:last]
            block[:] = np.uint32(0)
            for k in range(rows.shape[0]):
                row = rows[k, first:last]
                for i in range(block.size):
                    block[i] ^= row[i]
            more = rest[first : min(last, rest.size)]
            for i in range(more.size):
                block[i] ^= more[i]

    words = written // 4
    count, left = divmod(read // 4, words)
    rows, rest, out = np.ones((count, words), np.uint32), np.ones(left, np.uint32), np.zeros(words, np.uint32)
    slices = [(start, min(start + SLICE, words)) for start in range(0, words, SLICE)]
    pool = ThreadPoolExecutor(options.threads)

    def run() -> None:
        list(pool.map(lambda part: one_pass(rows, rest, out, *part), slices))

    return run


def device_floor(read: int, written: int, device: str) -> Callable[[], None]:
    import torch

    half = (read + written) // 2
    source = torch.zeros(half, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    return run


def family(work: str, folder: Path) -> tuple[Path, list[str]]:
    """Folders of the base and of its models, as references."""
    import torch
    import transformers

    from embeddings.quickstart import demo_model

    name, count, *_ = work.split("-")
    torch.manual_seed(0)
    if name == "minilm":
        model = transformers.AutoModel.from_pretrained(demo_model())
    else:
        config = transformers.LlamaConfig(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
        )
        model = transformers.LlamaModel(config)
    base = folder / "base"
    model.save_pretrained(base)
    models = []
    for i in range(int(count)):
        if "lora" in work:
            models.append(f"{base}+{adapter(base, folder / f'adapter{i}')}")
            continue
        with torch.no_grad():
            for own in model.parameters():
                own.add_(1e-3 * torch.randn_like(own))
        model.save_pretrained(folder / f"model{i}")
        models.append(str(folder / f"model{i}"))
    return base, models


def adapter(base: Path, folder: Path) -> Path:
    import peft
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    with torch.no_grad():
        for own in adapted.parameters():
            if own.requires_grad:
                own.add_(0.01 * torch.randn_like(own))
    adapted.save_pretrained(str(folder))
    return folder


def line(found: dict[str, Any]) -> str:
    spent = found["seconds"]
    floor, ours = (1e3 * statistics.median(spent[name]) for name in ("floor", "set"))
    ratio, busy = (
        statistics.median(own / bare for own, bare in zip(spent[f"set{kind}"], spent[f"floor{kind}"], strict=True))
        for kind in ("", " cpu")
    )
    moved = found["read"] + found["written"]
    return (
        f"| {found['work']} | {found['method']} | {found['held'] / 1e6:.0f} | {moved / 1e6:.0f} | {floor:.1f} "
        f"| {moved / floor / 1e6:.1f} | {ours:.1f} | {ratio:.2f} | {busy:.2f} | {found['load']:.1f} |"
    )


if __name__ == "__main__":
    main()
