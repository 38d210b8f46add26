"""Times `cuvee train` against sentence-transformers' trainer, in one run: same model, pairs, batches, loss and dropout.

    python scripts/bench_train.py [--tasks code word …] [--batch-sizes 32 128] [--steps 12] [--repeats 3] [--device cuda]

Peers, both from texts to trained weights, without opening the model and without writing it:

    trainer   SentenceTransformerTrainer, MultipleNegativesRankingLoss(scale=20), its defaults otherwise
    cuvee     the data set read and tokenised, then `embeddings.training.train`: infonce at temperature 0.05
    floor     the matrix products of the texts' tokens, forward and backward, without padding: 6 operations a weight and
              token, at the rate of one large product of the same machine in the same minute

Peers take turns within a repeat; printed are medians. Both see the rows in an order of their own, so that their losses
agree but for noise: the mean of the last third of the steps is printed for both. Prints one table, writes one JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin for a busy core slow all of them down
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TEMPERATURE = 0.05
LEARNING_RATE = 5e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="by default the demo model")
    parser.add_argument("--tasks", nargs="+", default=["phenotype", "word"], help="of the suite that ships")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of both: bfloat16 is autocast")
    parser.add_argument("--out", type=Path, default=Path("bench_train.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from embeddings.quickstart import demo_model

    model = options.model or str(demo_model())
    results = []
    print(
        "| task | pairs a step | tokens a pair | trainer pairs/s | cuvee pairs/s | cuvee ÷ trainer | of the floor | losses |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for task in options.tasks:
        for size in options.batch_sizes:
            rounds = [one_round(model, task, size, options, repeat) for repeat in range(options.repeats)]
            results.append({"task": task, "batch_size": size, "rounds": rounds})
            print(line(task, size, rounds), flush=True)
    content = {
        "model": model,
        "steps": options.steps,
        "device": options.device,
        "dtype": options.dtype,
        "results": results,
    }
    options.out.write_text(json.dumps(content, indent=2) + "\n")


def one_round(model: str, task: str, size: int, options: argparse.Namespace, repeat: int) -> dict[str, Any]:
    """Every peer once; who begins alternates."""
    rows = pairs(task, size * options.steps)
    peers = [("trainer", with_trainer), ("cuvee", with_cuvee)]
    found: dict[str, Any] = {}
    for name, peer in peers if repeat % 2 == 0 else reversed(peers):
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = peer(model, rows, size, options, Path(scratch), seed=repeat)
    tokens = found["cuvee"].pop("tokens")
    operations = 6 * found["cuvee"].pop("weights") * tokens
    found["floor"] = {"seconds": operations / product_rate(options.device)}
    return {**found, "rows": len(rows), "tokens": tokens}


def pairs(task: str, count: int) -> list[dict[str, str]]:
    """Rows {query, positive} of a retrieval task's train split, again from the start where it is too small."""
    from embeddings.evaluation.suite import load

    rows = next(each for each in load() if each.name == task).read("train")
    rows = [{key: row[key] for key in ("query", "positive")} for row in rows]
    return [rows[i % len(rows)] for i in range(count)]


def with_trainer(
    model: str, rows: list[dict[str, str]], size: int, options: argparse.Namespace, scratch: Path, *, seed: int
) -> dict[str, Any]:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.training_args import SentenceTransformerTrainingArguments

    transformer = SentenceTransformer(model, device=options.device)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=size,
        max_steps=options.steps,
        learning_rate=LEARNING_RATE,
        warmup_steps=max(1, options.steps // 10),
        weight_decay=0.01,
        save_strategy="no",
        logging_steps=1,
        logging_strategy="steps",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        seed=seed,
        use_cpu=options.device == "cpu",
        bf16=options.dtype == "bfloat16",
    )
    trainer = SentenceTransformerTrainer(
        transformer,
        args=arguments,
        train_dataset=Dataset.from_list([{"anchor": row["query"], "positive": row["positive"]} for row in rows]),
        loss=MultipleNegativesRankingLoss(transformer, scale=1 / TEMPERATURE),
    )
    cpu, wall = time.process_time(), time.perf_counter()
    trainer.train()
    seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": seconds, "cpu_seconds": cpu, "losses": losses}


def with_cuvee(
    model: str, rows: list[dict[str, str]], size: int, options: argparse.Namespace, scratch: Path, *, seed: int
) -> dict[str, Any]:
    import numpy as np

    from embeddings.training import config as training_config
    from embeddings.training import members, metrics, train
    from embeddings.training.data import load_sets

    file = scratch / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = training_config.parse(
        f"model: {{path: {model}, dtype: {options.dtype}}}\ndata: [{{file: {file}}}]\nbatch_size: {size}\n"
        f"steps: {options.steps}\nlearning_rate: {LEARNING_RATE}\nloss: {{temperature: {TEMPERATURE}}}\nseed: {seed}",
        str(scratch / "config.yml"),
    )
    backbone = members.open_backbone(config, options.device, seed)
    tokenizer = members.Tokenizer(config)
    assert tokenizer.digest  # opened now, as the model is
    train.LOG_EVERY = 1
    times: list[float] = []

    def opened() -> Any:
        times.append(time.perf_counter())
        return backbone

    def saved(_: Any) -> None:
        times.append(time.perf_counter())

    backbone.save = saved  # type: ignore[method-assign, assignment]
    cpu, wall = time.process_time(), time.perf_counter()
    sets = load_sets(config, tokenizer, scratch / "data")
    every = {sets[0].name: np.arange(len(sets[0]), dtype=np.int64)}
    work, out = scratch / "work", scratch / "out"
    done = train.train(config, sets, train.Job("all", every, 1.0, seed, work, out), opened)
    seconds, cpu = times[-1] - wall, time.process_time() - cpu
    losses = [entry["loss"] for entry in metrics.read(out / train.METRICS)]
    queries = sets[0].query_tokens.lengths[sets[0].queries].sum()
    tokens = int(queries + sets[0].document_tokens.lengths[sets[0].positives.values].sum())
    assert done.rows == len(rows)
    matrices = [p for name, p in backbone.named_parameters() if p.ndim == 2 and "embeddings" not in name]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "losses": losses,
        "tokens": tokens,
        "weights": sum(p.numel() for p in matrices),
    }


def product_rate(device: str) -> float:
    """Operations a second of a large product in float32."""
    import torch

    size = 1536 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def line(task: str, size: int, rounds: list[dict[str, Any]]) -> str:
    rows = rounds[0]["rows"]
    rate = {name: statistics.median(rows / each[name]["seconds"] for each in rounds) for name in ("trainer", "cuvee")}
    ratio = statistics.median(each["trainer"]["seconds"] / each["cuvee"]["seconds"] for each in rounds)
    floor = statistics.median(each["floor"]["seconds"] / each["cuvee"]["seconds"] for each in rounds)
    last = {
        name: statistics.mean(
            loss for each in rounds for loss in each[name]["losses"][-len(each[name]["losses"]) // 3 :]
        )
        for name in ("trainer", "cuvee")
    }
    tokens = rounds[0]["tokens"] / rows
    return (
        f"| {task} | {size} | {tokens:.0f} | {rate['trainer']:.1f} | {rate['cuvee']:.1f} | {ratio:.2f} | {floor:.0%} "
        f"| {last['trainer']:.3f}, {last['cuvee']:.3f} |"
    )


if __name__ == "__main__":
    main()
