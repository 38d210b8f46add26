"""Measure: what a model is worth on rows that are held out: how it tells texts again from EOS, how its embeddings spread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from embeddings.images.reader import Picture
from embeddings.reconstruction.batch import EOS, NO_LABEL, SOURCE, TARGET, Batch, Row
from embeddings.reconstruction.cocoa import Bridge, WarmUp, image_ids, stacked, through_embedding
from embeddings.reconstruction.data import Material, Sides
from embeddings.reconstruction.example import Example
from embeddings.reconstruction.images import pictures_of
from embeddings.reconstruction.metrics import Reconstruction, alignment, effective_rank, uniformity
from embeddings.reconstruction.objective import Objective
from embeddings.reconstruction.reader import Reader
from embeddings.reconstruction.retromae import RetroMAE

if TYPE_CHECKING:
    import torch

    from embeddings.reconstruction.model import Reconstructor

_ROWS = 16  # at once
_DIGITS = 6


class Measure:
    """Measures models on the same rows, masked in the same way.

    Args:
        objective: of the stage.
        materials: what the stage reads; of them what is held out.
        pairs: whose held-out rows are embedded.
        pattern: in which the embedding model attends.
        seed: of what is masked.
    """

    def __init__(
        self,
        objective: Objective,
        materials: Sequence[Material],
        pairs: Sequence[Sides],
        reader: Reader,
        *,
        pattern: str,
        seed: int,
    ) -> None:
        self._objective, self._pattern = objective, pattern
        self._reader, self._seed = replace(reader, pack=0), seed
        draw = np.random.default_rng([seed, 2])
        self._examples = [material.example(int(unit), draw) for material in materials for unit in material.held]
        both = [own.sides(int(unit)) for own in pairs for unit in own.held]
        self._first, self._second = ([sides[place] for sides in both] for place in (0, 1))

    def __len__(self) -> int:
        """How many rows are embedded."""
        return len(self._first)

    def __call__(self, model: Reconstructor) -> dict[str, float]:
        """Its numbers by name, each explained in docs/pretrain.md; empty where nothing is held out."""
        import torch

        if not self._examples:
            return {}
        before = model.module.training
        model.module.eval()
        with torch.inference_mode():
            found = self._reconstruction(model, self._objective)
            for name, value in self._reconstruction(model, blind(self._objective)).items():
                found[f"blind_{name}"] = value
            found |= self._spread(model)
        model.module.train(before)
        return {name: round(value, _DIGITS) for name, value in found.items()}

    def _reconstruction(self, model: Reconstructor, objective: Objective | None) -> dict[str, float]:
        if objective is None:
            return {}
        found, draw = Reconstruction(), np.random.default_rng([self._seed, 3])
        for examples in _in_parts(self._examples):
            batch = objective.collate(examples, self._reader, draw).to(model.device)
            hidden, batch = _through_eos_alone(objective, model, batch)
            places, labels = batch.places, batch.labels
            if not isinstance(objective, WarmUp):
                told = batch.predicted_segments() == TARGET
                places, labels = places[told], labels[told]
            found.add(model.logits(hidden, places), labels, places[:, 0])
        return found.numbers()

    def _spread(self, model: Reconstructor) -> dict[str, float]:
        if len(self._first) < 2:
            return {}
        first, second = (embed(model, texts, self._reader, self._pattern) for texts in (self._first, self._second))
        import torch

        both = torch.cat([first, second])
        return {
            "rank": effective_rank(both),
            "rank_centred": effective_rank(both, centred=True),
            "alignment": alignment(first, second),
            "uniformity": uniformity(both),
        }


def blind(objective: Objective) -> Any:
    """The same objective with the whole of the target masked, so that EOS alone tells it; None where that means nothing.

    Of LLM-QL a text that is told right token by token is the text that would be told without help.
    """
    if isinstance(objective, Bridge):
        return replace(objective, mask=1.0)
    if isinstance(objective, RetroMAE):
        return replace(objective, decoder_mask=1.0)
    return None


def embed(model: Reconstructor, examples: Sequence[Example], reader: Reader, pattern: str) -> torch.Tensor:
    """(examples, width) float32, of length one: EOS's states of the last layer, as the model that is written pools them.

    Args:
        examples: their sources, and their images where they have some.
        pattern: "bidirectional" or "causal".
    """
    import torch

    plain, parts = replace(reader, pack=0), []
    for own in _in_parts(examples):
        pictures = pictures_of(own, plain)
        rows = [_row(*each, plain) for each in zip(own, pictures, strict=True)]
        batch = stacked(rows, pictures, pattern, plain).to(model.device)
        parts.append(model.eos_states(model.hidden(batch), batch))
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def _row(example: Example, picture: Picture | None, reader: Reader) -> Row:
    ids = np.array([*image_ids(picture, reader), *reader.cut(example.source), reader.eos_id], np.int64)
    segments = np.full(len(ids), SOURCE, np.int64)
    segments[-1] = EOS
    return Row(ids, segments, np.full(len(ids), NO_LABEL, np.int64))


def _through_eos_alone(objective: Objective, model: Reconstructor, batch: Batch) -> tuple[torch.Tensor, Batch]:
    """The states that predict, where nothing of the target is in EOS, and the batch that they are of."""
    if isinstance(objective, Bridge) and objective.bridge == "embedding":
        return through_embedding(model, batch)
    return model.hidden(batch, eos_sees_b=False), batch


def _in_parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), _ROWS):
        yield items[start : start + _ROWS]
