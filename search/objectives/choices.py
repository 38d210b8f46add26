"""Choices: what a model believes of fixed inputs: for each a distribution over all that it may choose.

The inputs are read and tokenised once; the weights may be others at every call. What there is to choose between:

    classification      the classes; of a head that is ordinal (`coral`, `corn`) the ranks
    lm                  the scores that it may answer, see `score_tokens`
    embedding           prototypes, or the candidates of each query: softmax of cosine / temperature
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from merging.statistics.job import micro_batches
from merging.statistics.network import Network
from merging.statistics.tokens import Tokens
from search.objectives.inputs import Input
from search.objectives.tasks import CORAL, CORN

if TYPE_CHECKING:
    from torch import Tensor

_TOKENS = 4096  # of a micro-batch at most
LEAST = -100.0  # logarithm of what counts as impossible


class Choices(ABC):
    """N inputs, and what a model may choose for each.

    Attributes:
        names: of the K choices, in order; () where every input has its own.
        counts: how many each input has, where it has its own; K of them at most.
        answers: (N,) the place of the right choice; None where no answer is known.
        valid: share of the inputs for which the model's most probable output is a choice at all, as `probabilities` found
            it last; None where there is no other.
    """

    names: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    answers: tuple[int, ...] | None = None
    valid: float | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def log_p(self, items: Sequence[int]) -> Tensor:
        """Log-probabilities of some inputs, (items, K), on the model's device, with gradient where there is one.

        What is no choice of an input, of those that have their own, has -100.
        """

    def probabilities(self) -> Tensor:
        """Of all inputs, (N, K), float64, on the CPU; without gradient."""
        import torch

        with torch.no_grad():
            return self.log_p(range(len(self))).cpu().double().exp()


class Classes(Choices):
    """Of a classifier.

    Args:
        head: "classification", whose softmax it is; or "coral" (arXiv 1901.07884) or "corn" (arXiv 2111.08851), whose
            K - 1 outputs say how probable it is that a rank is exceeded, the latter if those below are.
        names: of the choices.
    """

    def __init__(self, network: Network, inputs: Sequence[Input], head: str, names: Sequence[str]) -> None:
        self.names, self.head = tuple(names), head
        self._network, self._tokens = network, _read(network, inputs)

    def __len__(self) -> int:
        return len(self._tokens)

    def log_p(self, items: Sequence[int]) -> Tensor:
        outputs = forward(self._network, [self._tokens[item] for item in items])
        return ordinal(outputs, self.head) if self.head in (CORAL, CORN) else outputs.log_softmax(1)


class Prototypes(Choices):
    """Of an embedding model: which of some texts an input is nearest to.

    Args:
        prototypes: texts by the name of the choice; of several the mean of their directions is taken.
    """

    def __init__(
        self,
        network: Network,
        inputs: Sequence[Input],
        prototypes: Mapping[str, Sequence[str]],
        temperature: float,
    ) -> None:
        self.names = tuple(prototypes)
        self._network, self._temperature = network, temperature
        self._tokens = _read(network, inputs)
        self._texts = network.read([text for own in prototypes.values() for text in own])
        self._of = [place for place, own in enumerate(prototypes.values()) for _ in own]

    def __len__(self) -> int:
        return len(self._tokens)

    def log_p(self, items: Sequence[int]) -> Tensor:
        import torch

        vectors = forward(self._network, [*(self._tokens[item] for item in items), *self._texts])
        directions = torch.nn.functional.normalize(vectors)
        texts, several = directions[: len(items)], directions[len(items) :]
        sums = torch.zeros(len(self.names), texts.shape[1], dtype=texts.dtype, device=texts.device)
        sums = sums.index_add(0, torch.tensor(self._of, device=texts.device), several)
        cosines = texts @ torch.nn.functional.normalize(sums).T
        return (cosines / self._temperature).log_softmax(1)


class Candidates(Choices):
    """Of an embedding model: which of a query's own candidates answers it. A text that several have is read once."""

    def __init__(self, network: Network, inputs: Sequence[Input], temperature: float) -> None:
        self._network, self._temperature = network, temperature
        self._queries = network.read([each.texts[0] for each in inputs], "query", [each.image for each in inputs])
        distinct = {text: place for place, text in enumerate(dict.fromkeys(t for e in inputs for t in e.candidates))}
        self._documents = network.read(list(distinct), "document")
        self._of = [[distinct[text] for text in each.candidates] for each in inputs]
        self.counts = tuple(map(len, self._of))

    def __len__(self) -> int:
        return len(self._queries)

    def log_p(self, items: Sequence[int]) -> Tensor:
        import torch

        most = max(self.counts)
        wanted = {place: row for row, place in enumerate(dict.fromkeys(p for item in items for p in self._of[item]))}
        tokens = [*(self._queries[item] for item in items), *(self._documents[place] for place in wanted)]
        directions = torch.nn.functional.normalize(forward(self._network, tokens))
        filled = [[wanted[p] for p in self._of[item]] for item in items]
        rows = torch.tensor([own + own[:1] * (most - len(own)) for own in filled], device=directions.device)
        real = torch.tensor([[c < len(own) for c in range(most)] for own in filled], device=directions.device)
        documents = directions[len(items) :][rows]  # (items, candidates, dimension)
        cosines = (directions[: len(items), None] * documents).sum(2)
        scores = (cosines / self._temperature).masked_fill(~real, -torch.inf)
        return scores.log_softmax(1).clamp(min=LEAST)


def ordinal(outputs: Tensor, head: str) -> Tensor:
    """Log-probabilities of K ranks, (inputs, K), from log-odds of exceeding each but the last, (inputs, K - 1).

    CORAL's are each for itself, and where they are not in order what is below 0 counts as 0; CORN's hold if the rank below
    is exceeded.
    """
    import torch

    exceeded = outputs.sigmoid()
    if head == CORN:
        exceeded = exceeded.cumprod(1)
    one = torch.ones_like(exceeded[:, :1])
    shares = (torch.cat([one, exceeded], 1) - torch.cat([exceeded, 0 * one], 1)).clamp(min=0)
    return (shares / shares.sum(1, keepdim=True)).clamp(min=1e-43).log().clamp(min=LEAST)


def forward(network: Network, tokens: Sequence[Tokens]) -> Tensor:
    """Vectors or logits, (texts, …), in the order of the texts; run in micro-batches of like length."""
    import torch

    batches = micro_batches([len(each) for each in tokens], [1] * len(tokens), _TOKENS)
    found = [network.forward(network.features([tokens[place] for place in places_])) for places_ in batches]
    back = np.argsort(np.concatenate([np.asarray(own) for own in batches]), kind="stable")
    return torch.cat(found)[torch.from_numpy(back).to(found[0].device)]


def _read(network: Network, inputs: Sequence[Input]) -> list[Tokens]:
    return network.read([each.text for each in inputs], None, [each.image for each in inputs])
