"""Scores of a model while it is trained, on tasks of a suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from embeddings.evaluation import tasks
from embeddings.evaluation.encoder import Encoder
from embeddings.evaluation.scoring import score
from embeddings.model import EmbeddingModel
from embeddings.training.config import EvaluationSettings
from merging.loading import max_length

if TYPE_CHECKING:
    from embeddings.training.backbone import Backbone


def scorer(settings: EvaluationSettings, device: str) -> Callable[[Backbone], dict[str, float]]:
    """A function from a backbone in evaluation mode to its main scores by task, as mteb gives them.

    Raises:
        CuveeError: no such suite, task or split, or mteb is missing.
    """
    suite = None if settings.suite is None else Path(settings.suite)
    targets = tasks.resolve(settings.tasks, suites=(suite,), split=settings.split)

    def scores(backbone: Backbone) -> dict[str, float]:
        transformer = backbone.transformer
        model = EmbeddingModel(
            name="in-training",
            ref=backbone.base,
            digest="",  # nothing is remembered of a model that changes
            transformer=transformer,
            max_length=max_length(transformer),
            dimension=backbone.dimension,
            prompts={key: text or "" for key, text in (transformer.prompts or {}).items()},
            device=device,
        )
        encoder = Encoder(model)
        found = {}
        for target in targets:
            parts, _, _ = score(encoder, target)
            found[target.name] = round(sum(part.score for part in parts) / len(parts), 6)
        return found

    return scores
