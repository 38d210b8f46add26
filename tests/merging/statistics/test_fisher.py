"""The diagonal of the Fisher information: against autograd example by example, on every architecture and a real model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merging.statistics.fisher import Fisher
from merging.statistics.heads import Batch
from tests.architectures import ARCHITECTURES
from tests.oracles import fisher as oracle

Forward = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
LANGUAGE_MODELS = ("gpt2", "llama", "qwen3", "gemma3", "qwen2-vl")
ENCODERS = ("bert", "roberta", "distilbert", "mpnet", "modernbert", "t5-encoder")


def features(rows: int, width: int, seed: int = 0, left: bool = False) -> dict[str, torch.Tensor]:
    """Random tokens, every row of a length of its own; the first is the longest."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (rows, width), generator=generator)
    lengths = torch.randint(2, width + 1, (rows, 1), generator=generator)
    lengths[0] = width
    places = torch.arange(width)
    mask = places >= width - lengths if left else places < lengths
    return {"input_ids": ids.where(mask, torch.ones_like(ids)), "attention_mask": mask.long()}


def mean_pooled(module: torch.nn.Module) -> Forward:
    def forward(own: Mapping[str, torch.Tensor]) -> torch.Tensor:
        hidden, mask = module(**own).last_hidden_state, own["attention_mask"].unsqueeze(2)
        return (hidden * mask).sum(1) / mask.sum(1)

    return forward


def logits(module: torch.nn.Module) -> Forward:
    return lambda own: module(**own).logits


def fisher(module: torch.nn.Module, forward: Forward, *batches: Batch, **options: Any) -> dict[str, torch.Tensor]:
    with Fisher(module, forward, **options) as own:
        for batch in batches:
            own.add(batch)
        return own.mean()


def assert_close(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    """Every entry to `tolerance` of its parameter's largest."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        largest = float(expected.abs().max())
        error = float((ours[name].double() - expected).abs().max())
        assert error <= tolerance * largest + 1e-25, f"{name}: {error / largest:.1e}"


def assert_exact(module: torch.nn.Module, forward: Forward, batch: Batch, alone: int = 0) -> None:
    """As the definition has it; in one backward but for `alone` parameters."""
    module.double().eval()
    expected = oracle.fisher(module, forward, batch)
    with Fisher(module, forward) as own:
        own.add(batch)
        assert len(own.alone) == alone, own.alone
        assert_close(own.mean(), expected)
    assert all(parameter.requires_grad for parameter in module.parameters())


# ---- against the definition ----


@pytest.mark.parametrize("name", ENCODERS)
def test_embedding_models_of_every_kind_equal_autograd_example_by_example(name: str) -> None:
    module = ARCHITECTURES[name].new(0)
    batch = Batch("embedding", features(12, 6), candidates=3, temperature=0.2)
    assert_exact(module, mean_pooled(module), batch)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_of_every_kind_equal_autograd_example_by_example(name: str) -> None:
    module = ARCHITECTURES[name].new(0)
    assert_exact(module, logits(module), Batch("lm", features(3, 7), seeds=(1, 2, 3)))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_answers_of_a_language_model_equal_its_loop(name: str) -> None:
    """Answers of several lengths, of one question two and of the other three; the rows are read without padding there."""
    module = ARCHITECTURES[name].new(0).double().eval()
    rows = features(6, 7)
    lengths = rows["attention_mask"].sum(1).tolist()
    starts = [1, 1, max(1, lengths[2] - 2), 1, lengths[4] - 1, 1]  # of the answers
    answers = torch.tensor(
        [[start <= place < length for place in range(7)] for start, length in zip(starts, lengths, strict=True)]
    )
    real = torch.tensor([[True, True, True], [True, True, False]])
    expected = {name: torch.zeros_like(own) for name, own in module.named_parameters()}
    for question in ([0, 1, 2], [3, 4]):
        means = []
        for row in question:
            ids = rows["input_ids"][row, : lengths[row]]
            log_p = module(input_ids=ids[None]).logits[0].log_softmax(1)
            own = [log_p[place - 1, ids[place]] for place in range(starts[row], lengths[row])]
            means.append(sum(own) / len(own))
        for mean, p in zip(means, torch.stack(means).detach().softmax(0), strict=True):
            gradients = torch.autograd.grad(mean, list(module.parameters()), retain_graph=True, allow_unused=True)
            for own, gradient in zip(expected.values(), gradients, strict=True):
                own += 0 if gradient is None else p * gradient**2 / 2
    batch = Batch("lm", rows, candidates=3, real=real, answers=answers)
    assert_close(fisher(module, logits(module), batch), expected)
    assert_exact(module, logits(module), batch)


def test_a_mixture_of_experts_does_what_it_cannot_know_one_example_at_a_time() -> None:
    module = ARCHITECTURES["mixtral"].new(0)  # its experts multiply in float32 only
    batch = Batch("lm", features(3, 7), seeds=(1, 2, 3))
    notes: list[str] = []
    expected = oracle.fisher(module, logits(module), batch)
    assert_close(fisher(module, logits(module), batch, note=notes.append), expected, 1e-4)
    assert len(notes) == 1 and "experts" in notes[0]


def test_texts_of_clip_equal_autograd_example_by_example() -> None:
    import transformers

    config = ARCHITECTURES["clip"].new(0).config.text_config
    module = transformers.CLIPTextModel(config)
    assert_exact(module, mean_pooled(module), Batch("embedding", features(9, 6), candidates=2, temperature=0.2))


def test_albert_whose_layers_share_their_weights_equals_autograd_example_by_example() -> None:
    import transformers

    sizes = {"hidden_size": 32, "embedding_size": 16, "num_attention_heads": 2, "intermediate_size": 48}
    module = transformers.AlbertModel(transformers.AlbertConfig(vocab_size=64, num_hidden_layers=3, **sizes))
    assert_exact(module, mean_pooled(module), Batch("embedding", features(9, 6), candidates=2, temperature=0.2))


@pytest.mark.parametrize("left", [False, True])
def test_a_classifier_equals_autograd_example_by_example(left: bool) -> None:
    module = classifier(labels=4)
    assert_exact(module, logits(module), Batch("classification", features(5, 8, left=left)))


def test_a_regression_head_equals_autograd_example_by_example() -> None:
    module = classifier(labels=1)
    assert_exact(module, logits(module), Batch("regression", features(5, 8)))


@pytest.mark.slow
def test_the_real_minilm_equals_autograd_example_by_example(minilm: Path) -> None:
    from merging.statistics.network import open_network

    network = open_network(str(minilm))
    module = network.module.double().requires_grad_(True)
    texts = ["how do I bake bread", "Knead the dough, let it rise, bake it.", "Paris", "a train to the coast and back"]
    pairs = [texts[0], texts[3], texts[1], texts[2], texts[3], texts[2]]
    batch = Batch("embedding", network.features(network.read(pairs)), candidates=2)
    forward = exactly(network)
    expected = oracle.fisher(module, forward, batch)
    with Fisher(module, forward) as own:
        own.add(batch)
        assert not own.alone
        assert_close(own.mean(), expected)


def test_candidates_that_only_fill_up_change_nothing() -> None:
    module = ARCHITECTURES["bert"].new(0).double()
    whole = features(8, 6)
    real = torch.tensor([[True, True, True], [True, True, False]])
    batch = Batch("embedding", whole, candidates=3, real=real, temperature=0.2)
    assert_exact(module, mean_pooled(module), batch)
    alone = batch.one(1)
    rows = [0, 1, 2]  # without the third
    fewer = Batch("embedding", {key: value[rows] for key, value in alone.features.items()}, 2, temperature=0.2)
    forward = mean_pooled(module)
    assert_close(fisher(module, forward, alone), oracle.fisher(module, forward, fewer))


# ---- parameters that are used in other ways ----


class Odd(torch.nn.Module):
    """Tied, reused, convolved, scaled by a bare parameter, and a linear layer that is fed in another order."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.table = torch.nn.Embedding(64, 8, padding_idx=1)
        self.positions = torch.nn.Embedding(16, 8)
        self.convolution = torch.nn.Conv1d(8, 8, 3, padding=1, stride=1)
        self.linear = torch.nn.Linear(8, 8)
        self.norm = torch.nn.RMSNorm(8)
        self.gain = torch.nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.unused = torch.nn.Linear(3, 3)
        self.head = torch.nn.Linear(8, 64, bias=False)
        if how == "tied":
            self.head.weight = self.table.weight

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.table(input_ids)
        hidden += self.positions(torch.arange(input_ids.shape[1])[None])  # in place, on what a hook saw
        hidden = hidden + self.convolution(hidden.mT).mT
        for _ in range(3 if self.how == "reused" else 1):
            hidden = hidden + torch.tanh(self.linear(self.norm(hidden)))
        if self.how == "bare":
            hidden = hidden * self.gain
        if self.how == "transposed":
            hidden = hidden + self.linear(hidden.transpose(0, 1).contiguous()).transpose(0, 1)
        if self.how == "flat":
            hidden = hidden + self.linear(hidden.flatten(0, 1)).view_as(hidden)
        return self.head(hidden)


@pytest.mark.parametrize(
    ("how", "alone"), [("plain", 0), ("tied", 0), ("reused", 0), ("flat", 0), ("bare", 1), ("transposed", 2)]
)
def test_whatever_use_a_model_makes_of_its_parameters_the_result_is_right(how: str, alone: int) -> None:
    torch.manual_seed(0)
    module = Odd(how)
    forward: Forward = lambda own: module(**own)  # noqa: E731
    assert_exact(module, forward, Batch("lm", features(4, 8), seeds=(1, 2, 3, 4)), alone)


def test_images_are_read_by_patches() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, (3, 2), stride=2, padding=1, dilation=(1, 2)), torch.nn.Flatten(2), torch.nn.Linear(16, 5)
    )
    forward: Forward = lambda own: module(own["pixels"]).sum(1)  # noqa: E731
    pixels = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    batch = Batch("classification", {"attention_mask": torch.ones(4, 1), "pixels": pixels})
    assert_exact(module, forward, batch)


def test_a_layer_that_a_later_batch_feeds_in_another_shape_is_done_one_example_at_a_time() -> None:
    module = Odd("plain").double()

    def forward(own: Mapping[str, torch.Tensor]) -> torch.Tensor:
        result: torch.Tensor = module(**own)
        if own["input_ids"].shape[1] == 5:
            result = result + module.linear(torch.ones(7, 8, dtype=torch.float64)).mean()
        return result

    first, second = (Batch("lm", features(4, width), seeds=(1, 2, 3, 4)) for width in (8, 5))
    expected = [oracle.fisher(module, forward, batch) for batch in (first, second)]
    whole = {name: (own + expected[1][name]) / 2 for name, own in expected[0].items()}
    assert_close(fisher(module, forward, first, second), whole)


# ---- sums ----


@pytest.mark.parametrize("sizes", [(6,), (1, 1, 1, 1, 1, 1), (4, 2)])
@pytest.mark.parametrize("head", ["classification", "lm"])
def test_micro_batches_change_nothing_beyond_rounding(sizes: tuple[int, ...], head: str) -> None:
    module = classifier(labels=3) if head == "classification" else ARCHITECTURES["qwen3"].new(0)
    module.double().eval()
    whole = Batch(head, features(6, 8), seeds=tuple(range(6)))
    starts = np.cumsum([0, *sizes])
    parts = [
        Batch(head, {key: value[a:b] for key, value in whole.features.items()}, seeds=whole.seeds[a:b])
        for a, b in pairwise(starts)
    ]
    expected = {name: own.double() for name, own in oracle.fisher(module, logits(module), whole).items()}
    assert_close(fisher(module, logits(module), *parts), expected)


def test_blocks_of_any_size_give_the_same() -> None:
    module = ARCHITECTURES["qwen3"].new(0).double()
    batch = Batch("lm", features(3, 7), seeds=(1, 2, 3))
    whole = fisher(module, logits(module), batch)
    assert_close(
        fisher(module, logits(module), batch, budget=1000), {name: own.double() for name, own in whole.items()}
    )


def test_float32_and_bfloat16_come_close_to_float64() -> None:
    batch = Batch("embedding", features(12, 6), candidates=3, temperature=0.2)
    module = ARCHITECTURES["bert"].new(0).double()
    exact = fisher(module, mean_pooled(module), batch)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):
        module.to(dtype)
        notes: list[str] = []
        found = fisher(module, mean_pooled(module), batch, note=notes.append)
        assert not notes
        assert all(own.dtype == torch.float32 for own in found.values())
        for name, expected in exact.items():
            if "key.bias" not in name:  # 0 but for rounding
                assert (found[name] - expected).norm() <= tolerance * expected.norm(), name


def test_compensated_sums_are_as_good_as_float64() -> None:
    module = ARCHITECTURES["gpt2"].new(0)
    batches = [Batch("lm", features(3, 7, seed), seeds=(1, 2, 3)) for seed in range(8)]
    exact = fisher(module, logits(module), *batches)
    found = fisher(module, logits(module), *batches, compensated=True)
    for name, expected in exact.items():
        torch.testing.assert_close(found[name], expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("compensated", [False, True])
def test_a_state_goes_on_where_it_was_taken(compensated: bool) -> None:
    module = ARCHITECTURES["bert"].new(0)
    forward = mean_pooled(module)
    batches = [Batch("embedding", features(9, 6, seed), candidates=2) for seed in range(3)]
    whole = fisher(module, forward, *batches, compensated=compensated)
    with Fisher(module, forward, compensated=compensated) as own:
        own.add(batches[0])
        state = {name: value.clone() for name, value in own.state().items()}
    with Fisher(module, forward, compensated=compensated, alone=own.alone) as own:
        own.load(state)
        assert own.examples == 3
        own.add(batches[1])
        own.add(batches[2])
        found = own.mean()
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_a_state_of_another_model_is_refused() -> None:
    module, other = classifier(labels=3), classifier(labels=4)
    with Fisher(other, logits(other)) as own:
        state = own.state()
    with Fisher(module, logits(module)) as own, pytest.raises(ValueError, match="another"):
        own.load(state)
    with Fisher(module, logits(module)) as own, pytest.raises(ValueError, match="another model"):
        own.load({})


def test_the_module_is_left_as_it_was() -> None:
    module = classifier(labels=3).train()
    module.classifier.bias.requires_grad_(False)
    batch = Batch("classification", features(4, 8))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    first = fisher(module, logits(module), batch)
    second = fisher(module, logits(module), batch)
    assert module.training and not module.classifier.bias.requires_grad and module.classifier.weight.requires_grad
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(own._forward_hooks or own._forward_pre_hooks for own in module.modules())


# ---- what it is for ----


@pytest.mark.slow
def test_saliency_ranks_single_weights_as_their_deletion_does(minilm: Path) -> None:
    """F theta^2 / 2 against the measured KL divergence from the model's own distribution, weight by weight."""
    from scipy.stats import spearmanr

    from merging.statistics.network import open_network

    network = open_network(str(minilm))
    module, forward = network.module.double(), exactly(network)
    texts = ["fresh bread", "a warm loaf", "the train is late", "stock prices fell", "my dog sleeps", "rain tomorrow"]
    batch = Batch("embedding", network.features(network.read(texts)), candidates=2)
    found = fisher(module, forward, batch)
    with torch.no_grad():
        p = batch.choices(forward).log_p()
    generator = torch.Generator().manual_seed(0)
    weights = {name: own for name, own in module.named_parameters() if own.ndim == 2 and ".layer." in name}
    saliency, change = [], []
    for name in list(weights)[:: max(1, len(weights) // 12)][:12]:
        own = weights[name].detach().view(-1)
        for place in torch.randint(own.numel(), (5,), generator=generator).tolist():
            before = own[place].item()
            saliency.append(float(found[name].view(-1)[place]) * before**2 / 2)
            own[place] = 0.0
            with torch.no_grad():
                change.append(float((p.exp() * (p - batch.choices(forward).log_p())).sum(1).mean()))
            own[place] = before
    assert spearmanr(saliency, change).statistic > 0.95


def classifier(labels: int) -> torch.nn.Module:
    import transformers

    torch.manual_seed(labels)
    config = transformers.BertConfig(**ARCHITECTURES["bert"].sizes, num_labels=labels)
    return transformers.BertForSequenceClassification(config).eval()


def exactly(network: Any) -> Forward:
    """Vectors of a SentenceTransformer in whatever precision its weights have."""
    return lambda own: network.module(dict(own))["sentence_embedding"]
