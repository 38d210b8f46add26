"""The job of Fisher statistics: batches of examples with all that the model chooses between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from merging.progress import Note
from merging.statistics.calibration import Calibration
from merging.statistics.fisher import Fisher
from merging.statistics.folder import StatsError
from merging.statistics.heads import Batch
from merging.statistics.job import Found, Job, text_tokens
from merging.statistics.network import Network
from merging.statistics.tokens import Tokens

if TYPE_CHECKING:
    from torch import Tensor

_TOKENS = 2048  # of a micro-batch at most
_LARGE = 10**9  # parameters, from which on sums are compensated float32 instead of float64
_OF = "of"  # among a batch's features: which text of the table each row is


def fisher_job(
    network: Network,
    calibration: Calibration,
    settings: Mapping[str, Any],
    seed: int,
    batch_size: int | None,
    note: Note,
) -> Job:
    """Each example once, with the gradients of all of its choices.

    Raises:
        StatsError: a head whose Fisher information is not known here, a query without choice, or one that has while others
            have none.
    """
    if getattr(network.config, "problem_type", None) == "multi_label_classification":
        raise StatsError(
            "gives several labels at once, of which no Fisher information is made", where=type(network.module).__name__
        )
    batches = FisherBatches(network, calibration, settings, seed)
    compensated = sum(own.numel() for own in network.module.parameters()) > _LARGE

    def open_(state: Mapping[str, Any]) -> Fisher:
        alone = frozenset(state["alone"]) if "alone" in state else None
        return Fisher(network.module, batches.forward, compensated=compensated, alone=alone, note=note)

    def finish(fisher: Fisher) -> Found:
        means = network.stored(fisher.mean())
        return Found({name: own.contiguous().cpu().numpy() for name, own in means.items()})

    return Job(
        what="fisher",
        lengths=batches.lengths,
        rows=batches.rows,
        tokens=_TOKENS,
        batch_size=1 if batches.images else batch_size,  # not every text has an image: there is no axis of texts
        parameters=sum(own.numel() for own in network.parameters().values()),
        open=open_,
        batch=batches.batch,
        finish=finish,
    )


def has_answers(head: str, calibration: Calibration) -> bool:
    """Whether a language model is asked which of several answers it would choose.

    Raises:
        StatsError: of some questions only.
    """
    if head != "lm" or any(each.image for each in calibration.examples):
        return False
    several = [len(each.candidates) > 1 for each in calibration.examples]
    if any(several) and not all(several):
        lonely = calibration.examples[several.index(False)]
        raise StatsError(
            f"row {lonely.row + 1} has fewer than two answers to choose from, and others have more",
            where=str(calibration.data[0]["file"]),
            mend="give all of them negatives, or none",
        )
    return any(several)


class FisherBatches:
    """The drawn examples as batches.

    Attributes:
        lengths: of each example's longest text, in tokens.
        rows: texts that go through the model for each example.
        images: whether some have one.
    """

    def __init__(self, network: Network, calibration: Calibration, settings: Mapping[str, Any], seed: int) -> None:
        self.network, self._temperature = network, settings.get("temperature", 1.0)
        examples = calibration.examples
        self._seeds = [int(np.random.SeedSequence([seed, 3, each.row]).generate_state(1)[0]) for each in examples]
        self._candidates: list[list[Tokens]] = []
        if network.head == "embedding":
            if lonely := next((each for each in examples if len(each.candidates) < 2), None):
                raise StatsError(
                    f"row {lonely.row + 1} has fewer than two candidates to choose from",
                    where=str(calibration.data[0]["file"]),
                    mend="give more rows, or negatives",
                )
            self._texts = network.read([each.query for each in examples], "query", [each.image for each in examples])
            documents = network.read([text for each in examples for text in each.candidates], "document")
            starts = np.cumsum([0, *(len(each.candidates) for each in examples)]).tolist()
            self._candidates = [documents[start:stop] for start, stop in pairwise(starts)]
            self.lengths = [max(map(len, each)) for each in self._choices()]
            self.rows = [2 * len(own) for own in self._candidates]
        elif has_answers(network.head, calibration):
            pairs = [[(each.query, answer) for answer in each.candidates] for each in examples]
            self._candidates = [network.read_answers(own) for own in pairs]
            self._texts, documents = [], [text for own in self._candidates for text in own]
            self.lengths, self.rows = [max(map(len, own)) for own in self._candidates], list(map(len, self._candidates))
        else:
            self._texts, documents = text_tokens(network, examples, seed), []
            self.lengths, self.rows = [len(each) for each in self._texts], [1] * len(examples)
        self._table = [*self._texts, *documents]
        self._places = {id(each): place for place, each in enumerate(self._table)}
        self.images = any(each.more for each in self._table)

    def batch(self, items: Sequence[int]) -> Batch:
        """Some examples as a micro-batch."""
        import torch

        seeds = tuple(self._seeds[place] for place in items)
        texts = [self._texts[place] for place in items] if self._texts else []
        if not self._candidates:
            return Batch(self.network.head, self._features(texts), seeds=seeds)
        own = [self._candidates[place] for place in items]
        most = max(map(len, own))
        filled = [text for each in own for text in (*each, *[each[0]] * (most - len(each)))]
        real = torch.tensor([[c < len(each) for c in range(most)] for each in own], device=self.network.device)
        features = self._features([*texts, *filled])
        return Batch(
            self.network.head,
            features,
            candidates=most,
            real=None if bool(real.all()) else real,
            temperature=self._temperature,
            seeds=seeds,
            answers=None if texts else features.pop("pooling_mask").bool(),
        )

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Vectors or logits of some rows of a batch."""
        if _OF not in features:
            return self.network.forward(features)
        all_ = self.network.features([self._table[place] for place in features[_OF].tolist()])
        return self.network.forward({**all_, **{key: own for key, own in features.items() if key != _OF}})

    def _features(self, tokens: Sequence[Tokens]) -> dict[str, Tensor]:
        """What the model takes, a row a text; images, which have no such axis, come in when the rows are known."""
        import torch

        features = self.network.features(tokens)
        if self.images:
            images = {key for each in tokens for key in each.more}
            features = {key: own for key, own in features.items() if key not in images}
            features[_OF] = torch.tensor([self._places[id(each)] for each in tokens])
        return features

    def _choices(self) -> list[list[Tokens]]:
        return [[query, *own] for query, own in zip(self._texts, self._candidates, strict=True)]
