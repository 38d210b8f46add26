"""Repeated evaluation: the same tasks again and again, for a model whose weights change in place.

All that does not change is kept from one time to the next: the data of the tasks, and the tokens of all texts, in batches
(some twenty bytes a token). No vector is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import xxhash

from embeddings.evaluation.encoder import Batch, Encoder
from embeddings.evaluation.scoring import kept, score
from embeddings.evaluation.tasks import Target
from embeddings.model import EmbeddingModel
from embeddings.packed import PackedTwin


class RepeatedEvaluation:
    """Scores a model as it is now.

    Args:
        model: opened with `packed=False`; its linear layers are laid out for speed anew each time.
        targets: what it is scored on.

    Raises:
        CuveeError: data that are not there.
    """

    def __init__(self, model: EmbeddingModel, targets: Sequence[Target]) -> None:
        self._twin = PackedTwin(model.transformer)
        changing = replace(model, transformer=self._twin.module, digest="")
        own_prompts = any(model.prompts.values())
        self._tasks = [
            (kept(target), RepeatedEncoder(changing, prompts=None if own_prompts else target.prompts))
            for target in targets
        ]

    def scores(self) -> dict[str, float]:
        """Main scores by task, as `cuvee evaluate` has them.

        Raises:
            CuveeError: a model that gives no finite vectors, or what keeps mteb from a score.
        """
        self._twin.refresh()
        found = {}
        for target, encoder in self._tasks:
            parts, _, _ = score(encoder, target)
            found[target.name] = sum(part.score for part in parts) / len(parts)
        return found


class RepeatedEncoder(Encoder):
    """An encoder that keeps tokens, on the model's device."""

    def __init__(self, model: EmbeddingModel, *, prompts: Mapping[str, str] | None = None) -> None:
        super().__init__(model, prompts=prompts)
        self._kept: dict[bytes, list[Batch]] = {}

    def _batches(
        self, texts: Sequence[str], new: Sequence[int], prompt: str | None, kwargs: Mapping[str, Any]
    ) -> Iterable[Batch]:
        digest = xxhash.xxh3_128(repr((prompt, dict(kwargs))).encode("utf-8", "surrogatepass"))
        for text in texts:
            digest.update(f"\0{len(text)}\0{text}".encode("utf-8", "surrogatepass"))
        key = digest.digest()
        if key not in self._kept:
            made = super()._batches(texts, new, prompt, kwargs)
            self._kept[key] = [(rows, self._moved(features)) for rows, features in made]
        return self._kept[key]
