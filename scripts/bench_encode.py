"""Times the evaluation of a suite against mteb with SentenceTransformer's defaults, in one run.

    python scripts/bench_encode.py [--suite FOLDER] [--model MODEL] [--tasks …] [--repeats 3] [--dtype float32] [--out FILE]

Peers, each from opening the model to the last score, with nothing remembered from before:

    mteb      `mteb.evaluate(SentenceTransformer(MODEL), tasks)`: batches of 32 in the order of their characters
    cuvee     `cuvee evaluate MODEL`, its table and intervals included
    changed   the same again, after one text of one task was changed: only that task runs, only that text is encoded

Peers take turns within a repeat, so that a change of the machine's speed meets all of them; what is printed are medians.
Imports are paid before. Prints one table of times and one of scores, and writes one JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
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

Scores = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, help="by default the suite that comes with the package")
    parser.add_argument("--model", help="by default the demo model")
    parser.add_argument("--tasks", nargs="+", help="by default all of the suite")
    parser.add_argument("--change", default="phenotype", help="the task of which one text is changed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="of the peer cuvee")
    parser.add_argument("--out", type=Path, default=Path("bench_encode.json"))
    options = parser.parse_args()
    silence()
    from embeddings.quickstart import demo_model

    model = options.model or str(demo_model())
    rows: list[dict[str, dict[str, Any]]] = []
    for repeat in range(options.repeats):
        rows.append(one_round(model, options.suite, options.tasks, options.change, options.dtype))
        spent = ", ".join(f"{name} {row['seconds']:.1f} s" for name, row in rows[-1].items())
        print(f"repeat {repeat + 1}: {spent}", flush=True)
    result = summary(rows)
    print("\n" + times_table(result) + "\n\n" + scores_table(rows[0]))
    result |= {"model": model, "suite": str(options.suite or "shipped"), "dtype": options.dtype, "rounds": rows}
    options.out.write_text(json.dumps(result, indent=2) + "\n")


def one_round(
    model: str, suite: Path | None, tasks: list[str] | None, changed: str, dtype: str
) -> dict[str, dict[str, Any]]:
    """Every peer once."""
    from embeddings.evaluation.suite import SHIPPED

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        other = folder / "suite"
        shutil.copytree(suite or SHIPPED, other)
        change_one_text(other, changed)
        return {
            "mteb": timed(lambda: with_mteb(model, suite, tasks, folder / "mteb")),
            "cuvee": timed(lambda: with_cuvee(model, suite, tasks, folder / "cuvee", dtype)),
            "changed": timed(lambda: with_cuvee(model, other, tasks, folder / "cuvee", dtype)),
        }


def with_mteb(model: str, suite: Path | None, tasks: list[str] | None, folder: Path) -> tuple[Scores, int]:
    import mteb
    from sentence_transformers import SentenceTransformer

    from embeddings.evaluation.mteb_tasks import mteb_task
    from embeddings.evaluation.suite import load

    transformer = SentenceTransformer(model, device="cpu")
    scores = {}
    for task in load(suite):
        if tasks is None or task.name in tasks:
            results = mteb.ResultCache(folder / task.name)  # it knows neither models nor data by what is in them
            result = mteb.evaluate(
                transformer, mteb_task(task), cache=results, co2_tracker=False, show_progress_bar=False
            )
            scores[task.name] = float(result.task_results[0].get_score())
    return scores, -1


def with_cuvee(model: str, suite: Path | None, tasks: list[str] | None, folder: Path, dtype: str) -> tuple[Scores, int]:
    from embeddings.evaluation.evaluate import Settings, evaluate, refuse_failures

    began = time.time()
    content, _ = evaluate([model], folder, names=tasks or (), suites=[suite], settings=Settings(dtype=dtype))
    refuse_failures(content)
    (scores,) = content["scores"].values()
    new = [file for file in folder.glob("results/*/*/*.json") if file.stat().st_mtime >= began]
    return scores, sum(json.loads(file.read_text())["made_by"]["encoded"] for file in new)


def change_one_text(suite: Path, task: str) -> None:
    """One text of the task's test split becomes another; a JSONL of rows."""
    file = suite / task / "test.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    column = next(key for key, value in rows[-1].items() if isinstance(value, str))
    rows[-1][column] += " indeed"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def timed(peer: Callable[[], tuple[Scores, int]]) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    scores, encoded = peer()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "scores": scores,
        "encoded": encoded,
    }


def summary(rows: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    peers = {
        name: {
            "seconds": statistics.median(row[name]["seconds"] for row in rows),
            "cpu_seconds": statistics.median(row[name]["cpu_seconds"] for row in rows),
            "encoded": rows[0][name]["encoded"],
        }
        for name in rows[0]
    }
    mteb, cuvee = (rows[0][name]["scores"] for name in ("mteb", "cuvee"))
    return {
        "peers": peers,
        "speedup": statistics.median(row["mteb"]["seconds"] / row["cuvee"]["seconds"] for row in rows),
        "largest_difference": max(abs(mteb[task] - cuvee[task]) for task in mteb),
    }


def times_table(result: dict[str, Any]) -> str:
    lines = ["| peer | wall s | CPU s | times mteb's speed | texts encoded |", "| --- | --- | --- | --- | --- |"]
    first = result["peers"]["mteb"]["seconds"]
    for name, row in result["peers"].items():
        encoded = row["encoded"] if row["encoded"] >= 0 else "–"
        speed = first / row["seconds"]
        lines.append(f"| {name} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {speed:.2f} | {encoded} |")
    lines.append(f"\nscores differ by {result['largest_difference']:.1e} at most")
    return "\n".join(lines)


def scores_table(row: dict[str, dict[str, Any]]) -> str:
    lines = ["| task | mteb | cuvee | changed |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {task} | " + " | ".join(f"{row[peer]['scores'][task]:.5f}" for peer in ("mteb", "cuvee", "changed")) + " |"
        for task in row["mteb"]["scores"]
    ]
    return "\n".join(lines)


def silence() -> None:
    """Imports what both peers need, and keeps mteb's remarks off the terminal."""
    import datasets
    import mteb
    import sentence_transformers
    import transformers

    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for package in (mteb, sentence_transformers, transformers):
        logging.getLogger(package.__name__).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
