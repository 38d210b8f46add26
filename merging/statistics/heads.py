"""What a model chooses between, and how probable it finds each: the labels of the Fisher information.

Never gold labels: the expectation is over the model's own distribution. Over the candidates of a query, a language model's
answers, the classes of a classifier and the one output of a regression it is exact; of a language model that has no answers
to choose from one sequence of labels is sampled.
Source: arXiv 2504.18992, section 3 and the authors' code (answers of a language model); for embedding models, regression and
language models without answers our own reading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    #: From features to what the head reads: vectors (rows, dimension) or logits.
    Forward = Callable[[Mapping[str, Tensor]], Tensor]

HEADS = ("embedding", "classification", "regression", "lm")
_SAMPLED_BYTES = 1 << 26  # of a temporary of the sampling


@dataclass(frozen=True)
class Choices:
    """What a model gives for the examples of a batch.

    The Fisher information of example e is the sum over c of weights[e, c] times the squared gradient of log_p()[e, c].

    Attributes:
        values: (examples, choices) with gradient: log-probabilities; with `scores`, what their softmax is taken of.
        weights: (examples, choices), without gradient: the probabilities, each times the example's own factor.
        apart: value [e, c] depends on row e * choices + c of the batch only, and not on row e.
    """

    values: Tensor
    weights: Tensor
    apart: bool = False
    scores: bool = False

    def log_p(self) -> Tensor:
        """(examples, choices) with gradient. Where a choice is none its entry is -inf and its weight 0."""
        return self.values.log_softmax(1) if self.scores else self.values


@dataclass(frozen=True)
class Batch:
    """Examples in tokens, on the model's device.

    Attributes:
        head: one of `HEADS`.
        features: what the model takes, each (rows, tokens, …): a row an example; "embedding": a row for the query of each
            example, then `candidates` rows for the candidates of each; "lm" with candidates: only these, each after its
            query.
        candidates: of each example ("embedding"; "lm", where there are several).
        real: (examples, candidates), False where a row only fills up the batch; None for all True.
        temperature: of the candidates' distribution.
        seeds: of each example's sampled labels ("lm").
        answers: (rows, tokens), True for those of the candidate itself ("lm" with candidates).
    """

    head: str
    features: Mapping[str, Tensor]
    candidates: int = 0
    real: Tensor | None = None
    temperature: float = 0.05
    seeds: tuple[int, ...] = ()
    answers: Tensor | None = None

    @property
    def examples(self) -> int:
        rows = len(self.features["attention_mask"])
        return rows // (self.candidates if self.answers is not None else 1 + self.candidates)

    @property
    def units(self) -> int:
        """What has a gradient of its own: the examples, or the candidates of each."""
        return self.examples * (self.candidates or 1)

    def one(self, example: int) -> Batch:
        """The batch of a single example."""
        first = example * self.candidates
        if self.answers is None:
            rows = [example, *range(self.examples + first, self.examples + first + self.candidates)]
        else:
            rows = list(range(first, first + self.candidates))
        features = {key: value[rows] for key, value in self.features.items()}
        real = None if self.real is None else self.real[example : example + 1]
        answers = None if self.answers is None else self.answers[rows]
        return replace(self, features=features, real=real, seeds=self.seeds[example : example + 1], answers=answers)

    def choices(self, forward: Forward, rows: Callable[[Tensor], None] = lambda unit: None) -> Choices:
        """Runs the model.

        Args:
            rows: told the unit of each row before each call of the model.
        """
        import torch

        mask = self.features["attention_mask"]
        if self.head == "embedding":
            queries, candidates = self._vectors(forward, rows)
            return over_candidates(queries, candidates, self.candidates, self.temperature, self.real)
        rows(torch.arange(self.units, device=mask.device))
        logits = forward(self.features)
        if self.answers is not None:
            return over_answers(logits, self.features["input_ids"], self.answers, self.candidates, self.real)
        if self.head == "classification":
            return over_classes(logits)
        if self.head == "regression":
            return of_regression(logits)
        return of_next_tokens(logits, mask, self.seeds)

    def _vectors(self, forward: Forward, rows: Callable[[Tensor], None]) -> tuple[Tensor, Tensor]:
        """(units, dimension) each: the query of each candidate, once for each, and the candidate. Short texts by themselves."""
        import torch

        mask = self.features["attention_mask"]
        unit = torch.arange(self.units, device=mask.device)
        text = torch.cat([unit // self.candidates, self.examples + unit])  # (2 * units,): rows of the features
        lengths = mask.sum(1)[text]
        order = lengths.argsort(stable=True)
        vectors = []
        for start, stop in calls(lengths[order].tolist()):
            own = order[start:stop]
            features = {key: value[text[own]] for key, value in self.features.items()}
            rows(own % self.units)
            vectors.append(forward(trimmed(features)))
        found = torch.cat(vectors)[order.argsort()]
        return found[: self.units], found[self.units :]


def calls(lengths: Sequence[int], spare: int = 64) -> list[tuple[int, int]]:
    """Cuts a sorted list of texts so that padding them to the longest of their part wastes few tokens.

    Args:
        lengths: tokens of each text, ascending.
        spare: tokens that a call of the model costs beside.
    """
    parts, stop = [], len(lengths)
    while stop:
        start, waste = stop - 1, 0
        while start and waste + (more := lengths[stop - 1] - lengths[start - 1]) <= spare:
            waste += more
            start -= 1
        parts.append((start, stop))
        stop = start
    return parts[::-1]


def trimmed(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the columns that are padding in every row."""
    mask = features["attention_mask"]
    columns = mask.any(0).nonzero().squeeze(1)
    own = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 1)
    return {key: value[:, own] if value.shape[:2] == mask.shape else value for key, value in features.items()}


def over_candidates(
    queries: Tensor, candidates: Tensor, count: int, temperature: float, real: Tensor | None = None
) -> Choices:
    """The softmax of cosine / temperature over a query's candidates.

    Args:
        queries: (examples * count, dimension): each query as often as it has candidates, so that its part in each score
            is a row of its own.
        candidates: (examples * count, dimension).
        real: (examples, count), False for what is no candidate.
    """
    import torch

    dtype = torch.promote_types(queries.dtype, torch.float32)
    scores = torch.cosine_similarity(queries.to(dtype), candidates.to(dtype)).view(-1, count) / temperature
    if real is not None:
        scores = scores.masked_fill(~real, -torch.inf)
    return Choices(scores, scores.detach().softmax(1), apart=True, scores=True)


def over_answers(logits: Tensor, ids: Tensor, answers: Tensor, count: int, real: Tensor | None = None) -> Choices:
    """A language model's answers to a question: of each the mean log-probability of its tokens.

    Their softmax says how probable each is; what is differentiated are the means themselves, as in the authors' code.

    Args:
        logits: (examples * count, tokens, vocabulary).
        ids: (examples * count, tokens): the question and its answer.
        answers: (examples * count, tokens), True for the answer's own.
        real: (examples, count), False for what is no answer.

    Source: arXiv 2504.18992.
    """
    import torch

    exact = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    log_p = exact.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2) - exact.logsumexp(2)
    own = answers[:, 1:]
    values = ((log_p * own).sum(1) / own.sum(1)).view(-1, count)
    known = values.detach() if real is None else values.detach().masked_fill(~real, -torch.inf)
    return Choices(values, known.softmax(1), apart=True)


def over_classes(logits: Tensor) -> Choices:
    """A classifier's own distribution over its classes. logits: (examples, classes)."""
    import torch

    values = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return Choices(values, values.detach().exp())


def of_regression(outputs: Tensor) -> Choices:
    """A normal distribution of variance 1 about each output: the expectation is the squared gradient of the output.

    Args:
        outputs: (examples, outputs)
    """
    import torch

    values = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    return Choices(values, torch.ones_like(values))


def of_next_tokens(logits: Tensor, mask: Tensor, seeds: Sequence[int]) -> Choices:
    """One label for every token that another one follows, drawn from the model's distribution: (sum_t log p(y_t))^2 / T.

    Args:
        logits: (examples, tokens, vocabulary)
        mask: (examples, tokens), 0 for padding, at the beginning or the end.
        seeds: of each example; the labels do not depend on what else is in the batch.
    """
    import torch

    followed = mask.bool()
    followed[:, :-1] &= mask[:, 1:].bool()
    followed = torch.cat([followed[:, :-1], torch.zeros_like(followed[:, :1])], 1)  # (examples, tokens)
    labels = torch.stack(
        [_sample(own.detach(), here, seed) for own, here, seed in zip(logits, followed, seeds, strict=True)]
    )
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = exact.gather(2, labels.unsqueeze(2)).squeeze(2) - exact.logsumexp(2)
    values = (log_p * followed).sum(1, keepdim=True)
    return Choices(values, 1.0 / followed.sum(1, keepdim=True).clamp(min=1).to(values.dtype))


def _sample(logits: Tensor, where: Tensor, seed: int) -> Tensor:
    """(tokens,): a token of the vocabulary by inversion, one uniform number for each place `where`; 0 elsewhere."""
    import torch

    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    places = where.nonzero().squeeze(1)
    drawn = torch.rand(len(places), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(
        logits.device
    )
    step = max(1, _SAMPLED_BYTES // (8 * logits.shape[1]))
    for start in range(0, len(places), step):
        own = places[start : start + step]
        below = logits[own].double().softmax(1).cumsum(1)  # (places, vocabulary)
        aim = drawn[start : start + step, None] * below[:, -1:]
        labels[own] = torch.searchsorted(below, aim, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    return labels
