"""ScoreTokens: which score a language model gives to a text: how probable it finds each as the end of a prompt.

Of scores that are one token each, its next-token probabilities, renormalised; where some are longer, the softmax of their
mean log-probability by token, or of the sum ("reconstructed": the paper has scores of one token only). What all scores begin
with, a blank for many tokenizers, is part of the prompt; and a score that others go on from, 1 of 10, ends where they do not.
Source: arXiv 2505.18548, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from merging.errors import CuveeError
from merging.statistics.job import micro_batches
from merging.statistics.network import Network
from merging.statistics.tokens import Tokens
from search.objectives.choices import LEAST, Choices
from search.objectives.inputs import Input
from search.objectives.tasks import MEAN, TEXT

if TYPE_CHECKING:
    from torch import Tensor

Ids = tuple[int, ...]
DEFAULT_LENGTH = 2048
_TOKENS = 2048  # of a micro-batch at most
_LOGITS = 1 << 26  # numbers at a time
_TAIL = 24  # characters of a prompt that decide about the tokens after it


@dataclass(frozen=True)
class _Prompt:
    """A prompt with every score as its end. Scores that begin alike share what the model reads.

    Attributes:
        ids: of the prompt, and what all scores begin with.
        stems: what is read after it, one row each; every score but its last token is the beginning of one.
        scores: tokens of each score, after `ids`.
        onward: by score, the tokens by which others go on where it ends; () where none does.
        row: by score, which of the stems it is read in.
    """

    ids: Ids
    stems: tuple[Ids, ...]
    scores: tuple[Ids, ...]
    onward: tuple[Ids, ...]
    row: tuple[int, ...]


class ScoreTokens(Choices):
    """Of a language model: the scores that it may answer.

    Args:
        names: the scores, as they are written.
        template: of the prompt; see `Task`. Where it does not fit, the text is cut, never what stands after it.
        tokens: "mean" or "sum", of the log-probabilities of a score's tokens.

    Raises:
        CuveeError: scores that the tokenizer cannot tell apart; a template that leaves no room for a text.
    """

    def __init__(
        self,
        network: Network,
        inputs: Sequence[Input],
        names: Sequence[str],
        template: str,
        where: str = "",
        tokens: str = MEAN,
    ) -> None:
        self.names, self._network, self._mean = tuple(names), network, tokens == MEAN
        if any(each.image for each in inputs):
            raise CuveeError("scores are asked of texts, not of images", where=where)
        writer = _Writer(getattr(network.reader, "tokenizer", network.reader), self.names, template, where)
        self._prompts = [writer.prompt("\n".join(each.texts), network.max_length) for each in inputs]

    def __len__(self) -> int:
        return len(self._prompts)

    def log_p(self, items: Sequence[int]) -> Tensor:
        return self._read(items)[0]

    def probabilities(self) -> Tensor:
        import torch

        with torch.no_grad():
            log_p, begins = self._read(range(len(self)))
        self.valid = float(begins.double().mean())
        return log_p.cpu().double().exp()

    def _read(self, items: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(items, K) log-probabilities; (items,) whether the most probable next token is the first of a score."""
        import torch

        prompts = [self._prompts[item] for item in items]
        rows = [(item, stem) for item, prompt in enumerate(prompts) for stem in range(len(prompt.stems))]
        lengths = [len(prompts[item].ids) + len(prompts[item].stems[stem]) for item, stem in rows]
        values: list[Tensor] = []
        owners: list[int] = []  # of the values: item * K + score
        begins = torch.zeros(len(items), dtype=torch.bool)
        for batch in micro_batches(lengths, [1] * len(rows), _TOKENS):
            own = [rows[place] for place in batch]
            for (item, stem), log_p in zip(own, self._ends([(prompts[i], s) for i, s in own]), strict=True):
                prompt = prompts[item]
                scores = [score for score, row in enumerate(prompt.row) if row == stem]
                values.append(_values(log_p, prompt, scores, mean=self._mean))
                owners += [item * len(self.names) + score for score in scores]
                if stem == 0:
                    begins[item] = int(log_p[0].detach().argmax()) in {score[0] for score in prompt.scores}
        back = torch.from_numpy(np.argsort(owners)).to(values[0].device)
        return torch.cat(values)[back].view(len(items), -1).log_softmax(1), begins

    def _ends(self, rows: Sequence[tuple[_Prompt, int]]) -> Iterator[Tensor]:
        """Of each row (1 + stem, vocabulary): log-probabilities of what follows the prompt and each token of the stem."""
        import torch

        network = self._network
        tokens = [Tokens({"input_ids": np.array(prompt.ids + prompt.stems[stem], np.int64)}) for prompt, stem in rows]
        wanted = [range(len(prompt.ids) - 1, len(own)) for (prompt, _), own in zip(rows, tokens, strict=True)]
        positions = sorted({position for own in wanted for position in own})
        place = {position: row for row, position in enumerate(positions)}
        vocabulary = network.config.get_text_config().vocab_size
        step = max(1, _LOGITS // (len(positions) * vocabulary))
        kept = torch.tensor(positions, device=network.device)
        for start in range(0, len(rows), step):
            part = tokens[start : start + step]
            inside = kept[kept < max(map(len, part))]
            logits = network.logits(network.features(part), inside)
            for row, own in enumerate(wanted[start : start + step]):
                yield logits[row, [place[position] for position in own]].log_softmax(1)


class _Writer:
    """Prompts in tokens."""

    def __init__(self, tokenizer: Any, names: Sequence[str], template: str, where: str) -> None:
        self._tokenizer, self._names, self._where = tokenizer, names, where
        self._before, self._after = template.split(TEXT)
        self._known: dict[tuple[str, str], Ids] = {}

    def prompt(self, text: str, limit: int) -> _Prompt:
        """The prompt of a text, cut so that the longest score fits behind it."""
        kept = text
        while True:
            written = self._before + kept + self._after
            start = written.rstrip(" ")  # a blank belongs to the token that follows it
            ids, blank = self._ids(start), written[len(start) :]
            scores = tuple(self._score(start, blank + name) for name in self._names)
            excess = len(ids) + max(map(len, scores)) - 1 - limit
            if excess <= 0:
                shared = _beginning(scores)
                return _Prompt(ids + shared, *_rows(tuple(score[len(shared) :] for score in scores)))
            shorter = self._without(kept, excess)
            if not shorter or not ids:
                what = f"the template leaves no room for a text in {limit} tokens"
                raise CuveeError(what, where=self._where, mend="shorten it, or see 'max_length'")
            kept = shorter

    def _score(self, start: str, name: str) -> Ids:
        """The tokens of a score after a prompt; where it would change the prompt's own, those it has alone."""
        tail = start[-_TAIL:]
        if (tail, name) not in self._known:
            before, both = self._plain(tail), self._plain(tail + name)
            found = both[len(before) :] if both[: len(before)] == before else ()
            self._known[tail, name] = found or self._plain(name)
            own = [self._known[tail, each] for each in self._names if (tail, each) in self._known]
            if not all(own) or len(set(own)) < len(own):
                mend = "write them as the model would"
                raise CuveeError(
                    f"the tokenizer cannot tell the score '{name}' from others", where=self._where, mend=mend
                )
        return self._known[tail, name]

    def _ids(self, text: str) -> Ids:
        """With the special tokens that texts begin with, without those that they end with."""
        found = self._tokenizer(text, return_special_tokens_mask=True, return_attention_mask=False)
        ids, special = list(found["input_ids"]), list(found["special_tokens_mask"])
        while ids and special[-1]:
            ids.pop()
            special.pop()
        return tuple(ids)

    def _plain(self, text: str) -> Ids:
        return tuple(self._tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"])

    def _without(self, text: str, excess: int) -> str:
        """The text without so many tokens at its end."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text[: found[-excess][0]] if excess < len(found) else ""


def _values(log_p: Tensor, prompt: _Prompt, scores: Sequence[int], *, mean: bool) -> Tensor:
    """Mean or sum of the log-probabilities of each score's tokens, and of its end; (scores,).

    Args:
        log_p: (longest, vocabulary).
        scores: those that are read in this row, by their places.
    """
    import torch

    flat = [(row, *each) for row, score in enumerate(scores) for each in enumerate(prompt.scores[score])]
    ending = [(row, score) for row, score in enumerate(scores) if prompt.onward[score]]
    owners, places, tokens = torch.tensor(flat, device=log_p.device).T
    found = [log_p[places, tokens]]
    for row, score in ending:
        onward = torch.tensor(prompt.onward[score], device=log_p.device)
        after = log_p[len(prompt.scores[score])].index_fill(0, onward, -torch.inf)
        found.append(after.logsumexp(0, keepdim=True).clamp(min=LEAST))
        owners = torch.cat([owners, owners.new_tensor([row])])
    sums = torch.zeros(len(scores), dtype=log_p.dtype, device=log_p.device).index_add(0, owners, torch.cat(found))
    return sums / owners.bincount(minlength=len(scores)) if mean else sums


def _beginning(scores: tuple[Ids, ...]) -> Ids:
    """What all scores begin with, at least one token of each left out."""
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*scores, strict=False))
    return tuple(tokens[0] for tokens in alike)[: min(map(len, scores)) - 1]


def _rows(
    scores: tuple[Ids, ...],
) -> tuple[tuple[Ids, ...], tuple[Ids, ...], tuple[Ids, ...], tuple[int, ...]]:
    """Stems that are the beginning of no other, the scores, what goes on from each, and which stem each is read in."""
    stems = sorted({score[:-1] for score in scores})
    longest = tuple(stem for stem in stems if not any(other != stem and other[: len(stem)] == stem for other in stems))
    following: dict[Ids, set[int]] = {}
    for score in scores:
        for end in range(1, len(score)):
            following.setdefault(score[:end], set()).add(score[end])
    onward = tuple(tuple(sorted(following.get(own, ()))) for own in scores)
    read = [own if more else own[:-1] for own, more in zip(scores, onward, strict=True)]
    rows = tuple(next(row for row, stem in enumerate(longest) if stem[: len(own)] == own) for own in read)
    return longest, scores, onward, rows
