"""Perplexity: how well a language model foresees texts: `objective: {perplexity: texts.jsonl}`.

The score is the negative mean log-loss by token, in nats: minus the logarithm of the perplexity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merging.checkpoint import Checkpoint
from merging.errors import CuveeError
from merging.node import Node
from merging.sources import ModelRef
from merging.statistics.job import micro_batches
from merging.statistics.network import Network, head_of, open_network
from merging.statistics.tokens import Tokens
from search.objective import Candidate, Scores, objective
from search.objectives.inputs import unlabelled
from search.objectives.tasks import Opening, Task, digests, tasks_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_EXAMPLES = 64
_TOKENS = 2048  # of a micro-batch at most
_LOGITS = 1 << 26  # numbers at a time


class Perplexity:
    """Mean log-probability of each token after those before it."""

    def __init__(self, tasks: Sequence[Task], opening: Opening) -> None:
        self._tasks, self._opening = tuple(tasks), opening
        self._texts: dict[str, list[Tokens]] = {}
        self._network: Network | None = None

    def data(self) -> Mapping[str, str]:
        """Of the tasks' files."""
        return digests(self._tasks)

    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self._tasks if task.name)

    def check(self, model: ModelRef) -> tuple[str, ...]:
        """Reads the texts, and what kind of model it is.

        Raises:
            CuveeError: data that cannot be read, no language model.
        """
        for task in self._tasks:
            unlabelled(task)
        with Checkpoint.open(model) as checkpoint:
            if head_of(checkpoint) != "lm":
                what = "is no language model, so it foresees no token"
                raise CuveeError(what, where=str(model), mend="choose another objective")
        return ()

    def prepare(self, model: ModelRef, device: str) -> torch.nn.Module:
        """Opens the language model and reads the texts.

        Raises:
            CuveeError: a model or data that cannot be read; a task whose texts are a token each.
        """
        opening = self._opening
        network = open_network(model, head="lm", device=device, dtype=opening.dtype, max_length=opening.max_length)
        for task in self._tasks:
            read = network.read(["\n".join(each.texts) for each in unlabelled(task)])
            self._texts[task.name] = [each for each in read if len(each) > 1]
            if not self._texts[task.name]:
                raise CuveeError("no text has a token to foresee", where=str(task.files[0]))
        self._network = network
        return network.module

    def __call__(self, candidate: Candidate, /) -> Scores:
        assert self._network is not None
        found = {name: mean_log_p(self._network, texts) for name, texts in self._texts.items()}
        total = sum(found.values()) / len(found)
        return Scores(total, {name: score for name, score in found.items() if name})


def mean_log_p(network: Network, texts: Sequence[Tokens]) -> float:
    """Over all tokens of all texts but the first of each: the mean log-probability, in nats."""
    import torch

    vocabulary = network.config.get_text_config().vocab_size
    tokens = max(1, min(_TOKENS, _LOGITS // vocabulary))
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in micro_batches([len(each) for each in texts], [1] * len(texts), tokens):
            features = network.features([texts[place] for place in batch])
            log_p = next_log_p(network.logits(features), features["input_ids"])
            real = features["attention_mask"][:, 1:].bool()
            total += float(log_p[real].double().sum())
            count += int(real.sum())
    return total / count


def next_log_p(logits: Tensor, ids: Tensor) -> Tensor:
    """(texts, tokens - 1): of each token after the first. logits: (texts, tokens, vocabulary); ids: (texts, tokens)."""
    before = logits[:, :-1]
    picked: Tensor = before.gather(2, ids[:, 1:, None]).squeeze(2)
    return picked - before.logsumexp(2)


@objective("perplexity", "how well a language model foresees texts: the negative mean log-loss by token")
def _perplexity(settings: Node, near: Path) -> Perplexity:
    tasks, opening = tasks_of(settings, "perplexity", near, examples=_EXAMPLES, labelled=False, choices=False)
    return Perplexity(tasks, opening)
