"""Scores as the end of a prompt, in the tokens of the tokenizers that language models have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merging.errors import CuveeError
from merging.statistics.network import Network, open_network
from search.objectives.inputs import Input
from search.objectives.score_tokens import ScoreTokens

TEXTS = ["the quick brown fox", "grade it, please: 12 of 60?", "naïve café, 3 mice", "x"]


def byte_level() -> Any:
    """As GPT-2 and Llama 3 split: a blank goes with the word after it; digits one by one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    own.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        _corpus(), trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL)
    )
    return own


def metaspace() -> Any:
    """As Llama 2 splits: a blank before the first word, too; and a token that texts begin with."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    own = Tokenizer(models.BPE(unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    own.train_from_iterator(_corpus(), trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL))
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return own


SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|answer|>"]


def _corpus() -> list[str]:
    return [*TEXTS, "Score: 1 2 3 10 11 12", "Score:\n5", "grade best good bad worst"] * 3


@pytest.fixture(scope="module", params=[byte_level, metaspace], ids=["byte level", "metaspace"])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Network:
    import transformers

    make: Callable[[], Any] = request.param
    folder, own = tmp_path_factory.mktemp("lm"), make()
    config = transformers.LlamaConfig(
        vocab_size=own.get_vocab_size(), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    specials = {"additional_special_tokens": SPECIAL[3:], "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="</s>", model_max_length=512, **specials
    )
    fast.save_pretrained(folder)
    return open_network(str(folder), head="lm", max_length=256)


def answers(network: Network, prompt: str, scores: list[str]) -> list[torch.Tensor]:
    """By score, the log-probabilities of its tokens in the whole text, after what all scores begin with, and of its end.

    One whole text at a time. A score ends where none of the others goes on from it.
    """
    tokenizer: Any = network.reader
    whole = [tokenizer(prompt + score)["input_ids"] for score in scores]
    start = len(tokenizer(prompt.rstrip(" "))["input_ids"])
    while len({tuple(ids[start : start + 1]) for ids in whole}) == 1 and all(len(ids) > start + 1 for ids in whole):
        start += 1
    found = []
    for ids in whole:
        with torch.no_grad():
            log_p = network.module(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(1)
        own = [log_p[i - 1, ids[i]] for i in range(start, len(ids))]
        if onward := {other[len(ids)] for other in whole if other != ids and other[: len(ids)] == ids}:
            own.append(torch.log1p(-sum(log_p[-1, token].exp() for token in onward)))
        found.append(torch.stack(own))
    return found


CASES = [
    ("{text} Score: ", ["1", "2", "10", "12"]),
    ("{text}\nScore:", [" 1", " 2", " 11"]),
    ("Grade: {text}\nScore:\n", ["1", "2", "3"]),
    ("<|user|>{text}<|answer|>", ["good", "bad", "worst"]),
    ("{text}", [" best", " good", " bad"]),
    ("{text} Score: ", ["1", "10"]),
]


@pytest.mark.parametrize("tokens", ["mean", "sum"])
@pytest.mark.parametrize(("template", "scores"), CASES)
def test_a_score_is_in_the_tokens_that_the_whole_text_has(
    network: Network, template: str, scores: list[str], tokens: str
) -> None:
    inputs = [Input((text,)) for text in TEXTS]
    found = ScoreTokens(network, inputs, scores, template, tokens=tokens).probabilities()
    for row, text in zip(found, TEXTS, strict=True):
        own = answers(network, template.replace("{text}", text), scores)
        values = torch.stack([each.mean() if tokens == "mean" else each.sum() for each in own])
        np.testing.assert_allclose(row, values.softmax(0), atol=1e-6)


def test_a_blank_that_is_a_token_of_its_own_is_the_prompts(network: Network) -> None:
    """Scores of one token after it are its next-token probabilities, and `valid` asks what follows the blank."""
    tokenizer: Any = network.reader
    whole = {digit: tokenizer(f"x Score: {digit}")["input_ids"] for digit in "123"}
    digits = [ids[-1] for ids in whole.values()]
    assert len({tuple(ids[:-1]) for ids in whole.values()}) == 1
    after = [tokenizer(f"{text} Score: 1")["input_ids"][:-1] for text in TEXTS]
    with torch.no_grad():
        next_p = torch.stack([network.module(input_ids=torch.tensor([i])).logits[0, -1].softmax(0) for i in after])
    found = ScoreTokens(network, [Input((text,)) for text in TEXTS], [*whole], "{text} Score: ")
    expected = next_p[:, digits] / next_p[:, digits].sum(1, keepdim=True)
    np.testing.assert_allclose(found.probabilities(), expected, atol=1e-6)
    assert found.valid == np.mean([int(row.argmax()) in digits for row in next_p])


def test_scores_exclude_one_another(network: Network) -> None:
    """What begins 10 is not 1's: both, and 12, share the probability of the token that they begin with."""
    tokenizer: Any = network.reader
    names = ["1", "2", "10", "12"]
    found = ScoreTokens(network, [Input(("x",))], names, "{text} Score: ", tokens="sum").probabilities()[0]
    whole = [tokenizer(f"x Score: {name}")["input_ids"] for name in names]
    one, two = whole[:2]
    with torch.no_grad():
        first = network.module(input_ids=torch.tensor([one])).logits[0, -2].double().softmax(0)
    begun = sum(float(p) for p, ids in zip(found, whole, strict=True) if ids[: len(one)] == one)
    assert begun / float(found[1]) == pytest.approx(float(first[one[-1]] / first[two[-1]]), rel=1e-4)


def test_images_are_refused(network: Network) -> None:
    with pytest.raises(CuveeError, match="not of images"):
        ScoreTokens(network, [Input(("a",), image=Path("a.png"))], ["1", "2"], "{text}")
