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


@pytest.mark.parametrize(
    ("template", "scores"),
    [
        ("{text} Score: ", ["1", "2", "10", "12"]),
        ("{text}\nScore:", [" 1", " 2", " 11"]),
        ("Grade: {text}\nScore:\n", ["1", "2", "3"]),
        ("<|user|>{text}<|answer|>", ["good", "bad", "worst"]),
        ("{text}", [" best", " good", " bad"]),
    ],
)
def test_a_score_is_in_the_tokens_that_the_whole_text_has(network: Network, template: str, scores: list[str]) -> None:
    """The log-probabilities are those of the whole text's tokens from the end of the prompt on."""
    tokenizer: Any = network.reader
    found = ScoreTokens(network, [Input((text,)) for text in TEXTS], scores, template).probabilities()
    for row, text in zip(found, TEXTS, strict=True):
        prompt = template.replace("{text}", text)
        means = []
        for score in scores:
            whole = tokenizer(prompt + score)["input_ids"]
            start = len(tokenizer(prompt.rstrip(" "))["input_ids"])
            with torch.no_grad():
                log_p = network.module(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(1)
            means.append(np.mean([float(log_p[i - 1, whole[i]]) for i in range(start, len(whole))]))
        np.testing.assert_allclose(row, torch.tensor(means).softmax(0), atol=1e-6)


def test_images_are_refused(network: Network) -> None:
    with pytest.raises(CuveeError, match="not of images"):
        ScoreTokens(network, [Input(("a",), image=Path("a.png"))], ["1", "2"], "{text}")
