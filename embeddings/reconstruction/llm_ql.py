"""LLM-QL: the likelihood of a query given its document, all of which has to go through EOS (arXiv 2504.05216)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from embeddings.reconstruction.batch import NO_LABEL, TARGET, Batch, Counts, Row, stack
from embeddings.reconstruction.cocoa import needed_target
from embeddings.reconstruction.example import Example
from embeddings.reconstruction.images import refuse_images
from embeddings.reconstruction.objective import Outcome, bridged, cross_entropy
from embeddings.reconstruction.reader import Reader
from merging.errors import CuveeError

if TYPE_CHECKING:
    from embeddings.reconstruction.model import Reconstructor

BLANK = "_"
LOSSES_ON = ("query", "all")


@dataclass(frozen=True)
class QueryLikelihood:
    """[corrupted document][EOS][query][EOS], causal; after the first EOS no one sees the document.

    An example's source is the document, whose text is needed where it is corrupted, its target the query. The query's
    tokens and the EOS behind them are predicted, the first of them by the state of EOS that is pooled later.

    Attributes:
        corruption: probability that a word between white space becomes "_", in [0, 1].
        loss_on: "query", or "all": the corrupted document's tokens and its EOS too, as the public code counts them.
    """

    corruption: float = 0.6
    loss_on: str = "query"
    name: str = "llm_ql"

    def collate(self, examples: Sequence[Example], reader: Reader, draw: np.random.Generator) -> Batch:
        refuse_images(examples, "llm-ql")
        sources = self._sources(examples, reader, draw)
        rows = [self._row(example, source, reader) for example, source in zip(examples, sources, strict=True)]
        return stack(rows, "attention_stop", pad_id=reader.pad_id, pad_left=reader.pad_left, pack=reader.pack)

    def _sources(
        self, examples: Sequence[Example], reader: Reader, draw: np.random.Generator
    ) -> Sequence[Sequence[int]]:
        if not self.corruption:
            return [reader.cut(example.source) for example in examples]
        texts = []
        for example in examples:
            if example.text is None:
                raise CuveeError("has no text to corrupt", where=example.where, mend="say 'corruption: 0'")
            texts.append(example.prompt + corrupted(example.text, self.corruption, draw))
        return reader.ids(texts)

    def _row(self, example: Example, source: Sequence[int], reader: Reader) -> Row:
        target = np.append(needed_target(example, reader), reader.eos_id)
        ids, segments = bridged(np.asarray(source, np.int64), target, reader.eos_id)
        before = max(1, reader.before(source, example.prompt))  # nothing is before the first to predict it
        counted = segments == TARGET if self.loss_on == "query" else np.arange(len(ids)) >= before
        return Row(ids, segments, np.where(counted, ids, NO_LABEL))

    def loss(self, model: Reconstructor, batch: Batch, whole: Counts | None = None) -> Outcome:
        losses, right = cross_entropy(model, model.hidden(batch), batch)
        whole = whole or batch.counts
        query, count = batch.predicted_segments() == TARGET, max(1, whole.targets)
        numbers = {"accuracy": (right & query).sum() / count}
        if self.loss_on == "all":
            numbers["query_loss"] = (losses.detach() * query).sum() / count
        return Outcome(losses.sum() / max(1, whole.predictions), numbers, len(losses))


def corrupted(text: str, share: float, draw: np.random.Generator) -> str:
    """The text with each word between white space replaced by "_" with this probability."""
    words = text.split()
    lost = draw.random(len(words)) < share
    return " ".join(BLANK if gone else word for word, gone in zip(words, lost, strict=True))
