"""Scores in a model's card, in the `model-index` that the hub reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embeddings.evaluation.result import Result
from merging.errors import CuveeError
from merging.output import write_whole

# The hub's own names of tasks; what is not among them goes by mteb's.
_HUB_TASKS = {
    "Retrieval": "information-retrieval",
    "Reranking": "text-ranking",
    "STS": "semantic-similarity",
    "PairClassification": "text-classification",
    "Classification": "text-classification",
    "Clustering": "feature-extraction",
    "BitextMining": "translation",
}


def card_file(ref: str) -> Path:
    """The README.md of a model's folder, there or not.

    Raises:
        CuveeError: the model is no folder that can be written to, or its card's head cannot be read.
    """
    folder = Path(os.path.abspath(os.path.expanduser(ref)))
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise CuveeError("is no folder that can be written to", where=ref, mend="leave out --card")
    _read(folder / "README.md")
    return folder / "README.md"


def write_card(file: Path, results: Sequence[Result]) -> None:
    """Puts the results of one model into its card, in place of older ones of the same data and metric.

    All else in the card stays; without a card there is a new one.

    Raises:
        CuveeError: the card's head is no YAML that can be read, or the file cannot be written.
    """
    card = _read(file)
    new = [entry for result in results for entry in _entries(result)]
    replaced = {_same(entry) for entry in new}
    kept = [entry for entry in card.data.eval_results or [] if _same(entry) not in replaced]
    card.data.model_name = card.data.model_name or file.parent.name
    card.data.eval_results = [*kept, *new]
    write_whole(file, str(card))


def _read(file: Path) -> Any:
    from huggingface_hub import ModelCard

    try:
        text = file.read_text(encoding="utf-8") if file.exists() else f"\n# {file.parent.name}\n"
        return ModelCard(text if text.startswith("---") else f"---\n{{}}\n---\n{text}")
    except Exception as error:  # the file's, yaml's, and the hub library's own checks
        reason = next(iter(str(error).splitlines()), "")[:120]
        raise CuveeError(f"its head cannot be read: {reason}", where=str(file), mend="mend it, or remove it") from error


def _entries(result: Result) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=_HUB_TASKS.get(result.type, result.type.lower()),
            task_name=result.type,
            dataset_type=result.dataset["path"],
            dataset_name=f"{result.task} ({part.subset})",
            dataset_config=part.subset,
            dataset_split=part.split,
            dataset_revision=result.dataset["revision"],
            metric_type=result.metric,
            metric_name=result.metric,
            metric_value=round(part.score, 6),
        )
        for part in result.parts
    ]


def _same(entry: Any) -> tuple[Any, ...]:
    return (entry.dataset_type, entry.dataset_config, entry.dataset_split, entry.metric_type)
