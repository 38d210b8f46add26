"""Objectives: what their collators make of texts, what their losses are, and that each teaches each architecture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from embeddings.reconstruction.batch import EOS, PADDING, SOURCE, TARGET, Batch
from embeddings.reconstruction.cocoa import Bridge, WarmUp, through_embedding
from embeddings.reconstruction.example import Example
from embeddings.reconstruction.llm_ql import QueryLikelihood, corrupted
from embeddings.reconstruction.model import Reconstructor
from embeddings.reconstruction.objective import Objective
from embeddings.reconstruction.reader import Reader
from embeddings.reconstruction.retromae import RetroMAE
from embeddings.training.decoder import append_eos
from merging.errors import CuveeError
from tests.embeddings.reconstruction.models import (
    ARCHITECTURES,
    BOS,
    EOS_ID,
    MASK,
    PAD,
    reconstructor,
    texts,
    tokenizer,
)

OBJECTIVES: dict[str, Objective] = {
    "warm_up": WarmUp(),
    "bridge": Bridge(),
    "strict": Bridge(eos_sees_b=False),
    "embedding": Bridge(bridge="embedding"),
    "llm_ql": QueryLikelihood(),
    "llm_ql on all": QueryLikelihood(loss_on="all"),
    "retromae": RetroMAE(),
}


def reader_of(*, pack: int = 0, left: bool = False, bos: bool = True, length: int = 64) -> Reader:
    lengths = {"source": length, "target": length}
    return Reader(tokenizer(bos=bos), EOS_ID, MASK, PAD, pad_left=left, max_length=lengths, pack=pack)


def examples(reader: Reader, count: int = 6, seed: int = 0) -> list[Example]:
    sources, targets = texts(count, seed), texts(count, seed + 1)
    ids, others = reader.ids(sources), reader.ids(targets, "target")
    return [
        Example(own, other, text=text, where=f"rows.jsonl:{number}")
        for number, (own, other, text) in enumerate(zip(ids, others, sources, strict=True), 1)
    ]


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def sequences(batch: Batch) -> list[tuple[list[int], list[int], dict[int, int]]]:
    """Of each row without padding: ids, segments, and label by the place of the token that is predicted."""
    found = []
    for row in range(batch.rows):
        real = (batch.segments[row] != PADDING).nonzero()[:, 0].tolist()
        labels = {
            int(token) + 1 - real[0]: int(label)
            for (of, token), label in zip(batch.places.tolist(), batch.labels.tolist(), strict=True)
            if of == row
        }
        found.append((batch.ids[row, real].tolist(), batch.segments[row, real].tolist(), labels))
    return found


# ---- the reader ----


def test_reader_leaves_eos_out_and_cuts() -> None:
    reader = reader_of(length=4)
    assert reader.ids(["w5 w6 w7 w8 w9"]) == [[BOS, 5, 6]]  # and EOS is the fourth
    assert reader.ids(["w5 w6 w7 w8 w9"], "target") == [[5, 6, 7, 8]]
    assert reader.cut([5, EOS_ID, EOS_ID]) == [5]
    assert reader.ids([]) == []
    closing = reader_of(length=4)
    append_eos(closing.tokenizer, "tokenizer")
    assert closing.ids(["w5 w6 w7 w8 w9", "w5"]) == [[BOS, 5, 6], [BOS, 5]]
    assert reader.start_tokens == 1 and reader_of(bos=False).start_tokens == 0


# ---- the collators ----


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_warm_up_masks_a_text_and_predicts_what_is_masked(left: bool) -> None:
    reader = reader_of(left=left)
    own = examples(reader, 40)
    batch = WarmUp(mask=0.3).collate(own, reader, draw())
    assert batch.pattern == "bidirectional"
    share = []
    for example, (ids, segments, labels) in zip(own, sequences(batch), strict=True):
        whole = [*example.source, *(example.target or ()), EOS_ID]
        assert segments == [SOURCE] * (len(whole) - 1) + [EOS]
        assert labels == {place: whole[place] for place in range(len(ids)) if ids[place] == MASK}
        assert [labels.get(place, token) for place, token in enumerate(ids)] == whole
        assert 0 not in labels and len(whole) - 1 not in labels and labels
        share.append(len(labels) / (len(whole) - 2))
    assert 0.22 < np.mean(share) < 0.38


def test_warm_up_of_a_single_text() -> None:
    reader = reader_of()
    single = replace(examples(reader, 1)[0], target=None)
    ((ids, _, labels),) = sequences(WarmUp(mask=1.0).collate([single], reader, draw()))
    assert labels == dict(enumerate(single.source[1:], 1)) and ids[-1] == EOS_ID


@pytest.mark.parametrize("share", [0.01, 0.7, 1.0])
def test_bridge_masks_the_target_and_its_first_token_always(share: float) -> None:
    reader = reader_of()
    own = examples(reader, 30)
    batch = Bridge(mask=share).collate(own, reader, draw())
    assert batch.pattern == "collaborative"
    for example, (ids, segments, labels) in zip(own, sequences(batch), strict=True):
        source, target = len(example.source), len(example.target or ())
        assert segments == [SOURCE] * source + [EOS] + [TARGET] * target
        assert ids[: source + 1] == [*example.source, EOS_ID]
        assert source + 1 in labels  # EOS predicts it
        assert [labels.get(place, token) for place, token in enumerate(ids)][source + 1 :] == list(example.target or ())
        assert {place for place in range(source + 1, len(ids)) if ids[place] == MASK} == labels.keys()
        assert share < 1 or len(labels) == target
        assert share > 0.1 or len(labels) <= 2


@pytest.mark.parametrize("loss_on", ["query", "all"])
def test_query_likelihood_is_document_eos_query_eos(loss_on: str) -> None:
    reader = reader_of()
    own = examples(reader)
    batch = QueryLikelihood(corruption=0.0, loss_on=loss_on).collate(own, reader, draw())
    assert batch.pattern == "attention_stop"
    for example, (ids, segments, labels) in zip(own, sequences(batch), strict=True):
        source, target = len(example.source), list(example.target or ())
        assert ids == [*example.source, EOS_ID, *target, EOS_ID]
        assert segments == [SOURCE] * source + [EOS] + [TARGET] * (len(target) + 1)
        counted = range(1 if loss_on == "all" else source + 1, len(ids))
        assert labels == {place: ids[place] for place in counted}


def test_words_are_corrupted_at_their_share() -> None:
    text = " ".join(texts(200))
    found = corrupted(f"  {text}\n", 0.6, draw()).split(" ")
    assert len(found) == len(text.split())
    assert 0.55 < np.mean([word == "_" for word in found]) < 0.65
    assert all(word in ("_", own) for word, own in zip(found, text.split(), strict=True))
    assert corrupted(text, 0.0, draw()) == text and set(corrupted(text, 1.0, draw())) == {"_", " "}


def test_query_likelihood_corrupts_the_text() -> None:
    reader = reader_of()
    batch = QueryLikelihood(corruption=1.0).collate(examples(reader), reader, draw())
    for ids, segments, _ in sequences(batch):
        source = segments.count(SOURCE)
        assert ids[:source] == [BOS] + [MASK] * (source - 1)


def prompted(reader: Reader, prompt: str, count: int = 30) -> list[Example]:
    """Examples whose sources begin with a prompt."""
    own = [example for example in examples(reader, count) if example.text]
    ids = reader.ids([prompt + (example.text or "") for example in own])
    return [replace(example, source=source, prompt=prompt) for example, source in zip(own, ids, strict=True)]


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "plain"])
@pytest.mark.parametrize(
    "objective",
    [
        WarmUp(mask=1.0),
        QueryLikelihood(corruption=1.0, loss_on="all"),
        RetroMAE(encoder_mask=0.99, decoder_mask=1.0),
    ],
    ids=["warm_up", "llm_ql", "retromae"],
)
def test_a_prompt_is_read_and_neither_masked_nor_told_again(objective: Objective, bos: bool) -> None:
    reader = reader_of(bos=bos)
    own = prompted(reader, "w7 w8: ")
    before = reader.before(own[0].source, "w7 w8: ")
    assert before == 2 + bos
    for example, (ids, segments, labels) in zip(own, sequences(objective.collate(own, reader, draw())), strict=True):
        assert ids[:before] == list(example.source[:before])
        assert min(labels) >= before
        if isinstance(objective, RetroMAE):
            assert segments.count(TARGET) == len(example.source) - before
        else:
            assert all(token in (MASK, EOS_ID) for token in ids[before : len(example.source)])


def test_a_token_that_prompt_and_text_share_is_the_texts() -> None:
    reader = reader_of()
    assert reader.before(reader.ids(["w7 w8 w9"])[0], "w7 w") == 2  # <s> w7, and what w is alone is not in it
    assert reader.before(reader.ids(["w7 w8"])[0], "w7 w8 ") == 3 == len(reader.ids(["w7 w8"])[0])


def test_retromae_reads_a_text_twice() -> None:
    reader = reader_of()
    own = examples(reader, 40)
    batch = RetroMAE().collate(own, reader, draw())
    light, heavy = [], []
    for example, (ids, segments, labels) in zip(own, sequences(batch), strict=True):
        source = len(example.source)
        assert segments == [SOURCE] * source + [EOS] + [TARGET] * (source - 1)
        whole = [labels.get(place, token) for place, token in enumerate(ids)]
        assert whole == [*example.source, EOS_ID, *example.source[1:]]
        assert {place for place in range(len(ids)) if ids[place] == MASK} == labels.keys()
        assert source + 1 in labels and 0 not in labels
        light.append(sum(place < source for place in labels) / (source - 1))
        heavy.append((sum(place > source for place in labels) - 1) / max(1, source - 2))
    assert 0.22 < np.mean(light) < 0.38 and 0.6 < np.mean(heavy) < 0.8


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_follows_from_its_seed(name: str) -> None:
    reader, objective = reader_of(), OBJECTIVES[name]
    one, two, other = (objective.collate(examples(reader), reader, draw(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.ids, two.ids) and torch.equal(one.places, two.places)
    assert not torch.equal(one.ids, other.ids)


@pytest.mark.parametrize("objective", [Bridge(), QueryLikelihood()], ids=["bridge", "llm_ql"])
def test_an_example_without_a_target_is_told_by_its_row(objective: Objective) -> None:
    reader = reader_of()
    lone = replace(examples(reader, 1)[0], target=None)
    with pytest.raises(CuveeError, match=r"rows\.jsonl:1: has no text to reconstruct"):
        objective.collate([lone], reader, draw())


def test_corruption_without_a_text_is_told_by_its_row() -> None:
    reader = reader_of()
    with pytest.raises(CuveeError, match=r"rows\.jsonl:1: has no text to corrupt"):
        QueryLikelihood().collate([replace(examples(reader, 1)[0], text=None)], reader, draw())


# ---- the losses ----


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("embedding", "retromae")])
def test_loss_is_the_mean_over_a_loop_in_float64(name: str) -> None:
    model, objective = reconstructor("llama"), OBJECTIVES[name]
    reader = model.reader()
    batch = objective.collate(examples(reader), reader, draw())
    with torch.inference_mode():
        outcome = objective.loss(model, batch)
        states = model.hidden(batch, eos_sees_b=name != "strict")
        everywhere = model.module.lm_head(states).double().numpy()
    losses, right = [], []
    for (row, token), label in zip(batch.places.tolist(), batch.labels.tolist(), strict=True):
        logits = everywhere[row, token]
        losses.append(np.log(np.exp(logits - logits.max()).sum()) - logits[label] + logits.max())
        right.append(logits.argmax() == label)
    plain = outcome.plain()
    assert plain["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert outcome.predictions == len(losses)
    if name != "llm_ql on all":
        assert plain["accuracy"] == pytest.approx(np.mean(right))


def test_retromae_adds_the_mean_of_each_copy() -> None:
    model = reconstructor("llama")
    reader = model.reader()
    batch = RetroMAE().collate(examples(reader), reader, draw())
    with torch.inference_mode():
        both = RetroMAE().loss(model, batch).plain()
        heavy = RetroMAE(encoder_weight=0.0).loss(model, batch).plain()
        logits = model.logits(model.hidden(batch, eos_sees_b=False), batch.places)
        losses = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    of_target = batch.predicted_segments() == TARGET
    assert heavy["loss"] == pytest.approx(float(losses[of_target].mean()), rel=1e-5) == both["decoder_loss"]
    assert both["encoder_loss"] == pytest.approx(float(losses[~of_target].mean()), rel=1e-5)
    assert both["loss"] == pytest.approx(both["decoder_loss"] + both["encoder_loss"], rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_of_a_batch_add_up_to_it(name: str) -> None:
    """Long texts and short ones apart: what is masked differs in its share from part to part."""
    model, objective = reconstructor("llama"), OBJECTIVES[name]
    reader = model.reader()
    own = sorted(examples(reader), key=lambda example: len(example.source))
    whole, seed = objective.collate(own, reader, draw()), draw()  # row after row, the same draws
    parts = [objective.collate(some, reader, seed) for some in (own[:1], own[1:3], own[3:])]
    with torch.inference_mode():
        wanted = objective.loss(model, whole).plain()
        found = [objective.loss(model, part, whole.counts).plain() for part in parts]
    for number, value in wanted.items():
        assert sum(part[number] for part in found) == pytest.approx(value, rel=1e-5), number


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "gpt2"])
def test_packing_changes_no_loss(architecture: str, name: str) -> None:
    model, objective = reconstructor(architecture), OBJECTIVES[name]
    found = []
    for pack, left in ((0, False), (0, True), (48, False), (48, True)):
        reader = replace(model.reader(), pack=pack, pad_left=left)
        batch = objective.collate(examples(reader), reader, draw())
        assert (batch.rows < 6) == bool(pack)
        with torch.inference_mode():
            found.append(objective.loss(model, batch).plain()["loss"])
    assert found == pytest.approx([found[0]] * 4, rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_few_steps_teach(architecture: str, name: str) -> None:
    model, objective = reconstructor(architecture), OBJECTIVES[name]
    reader = model.reader()
    batch = objective.collate(examples(reader, 3), reader, draw())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.module.train()
    losses = []
    for _ in range(3):
        outcome = objective.loss(model, batch)
        outcome.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outcome.plain()["loss"])
    assert np.isfinite(losses).all() and losses[-1] < 0.9 * losses[0]


def test_texts_of_one_token_teach_nothing_and_harm_nothing() -> None:
    model = reconstructor("llama")
    batch = WarmUp().collate([Example([5])], model.reader(), draw())
    outcome = WarmUp().loss(model, batch)
    outcome.loss.backward()
    assert outcome.plain() == {"loss": 0.0, "accuracy": 0.0} and outcome.predictions == 0


# ---- the bridge by the embedding ----


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen2-vl"])
def test_every_targets_loss_reaches_the_vector_that_is_pooled(architecture: str) -> None:
    """In one pass only EOS's own prediction does."""
    model = reconstructor(architecture)
    reader = model.reader()
    batch = Bridge(mask=1.0).collate(examples(reader, 3), reader, draw())
    for bridge in ("attention", "embedding"):
        states = watched(model)
        hidden, of = (model.hidden(batch), batch) if bridge == "attention" else through_embedding(model, batch)
        first = states[0]
        logits = model.logits(hidden, of.places)
        losses = torch.nn.functional.cross_entropy(logits, of.labels, reduction="none")
        behind = of.segments[of.places[:, 0], of.places[:, 1]] == TARGET
        losses[behind].sum().backward()
        row, token = batch.eos_places().unbind(1)  # padded on the right: the source's own EOS has the same place
        reached = first.grad[row, token].abs().sum(1) > 0
        assert bool(reached.all()) == (bridge == "embedding") and bool(reached.any()) == (bridge == "embedding")


def watched(model: Reconstructor) -> list[Any]:
    """The last states of every pass, with their gradients kept."""
    found: list[Any] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        found.append(output.last_hidden_state)

    model.module.base_model.register_forward_hook(keep)
    return found


def test_the_embedding_bridge_is_two_passes_by_hand() -> None:
    model = reconstructor("llama")
    reader = replace(model.reader(), pack=60)
    own = examples(reader)
    batch = Bridge(mask=1.0).collate(own, reader, draw())
    with torch.inference_mode():
        ours = Bridge(bridge="embedding").loss(model, batch).plain()["loss"]
        total, count = 0.0, 0
        model.module.config.is_causal = False
        for example in own:
            ids = torch.tensor([[*example.source, EOS_ID]])
            vector = model.module.base_model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0, -1]
            vector = vector / vector.norm() * model.embedding_length
            target = list(example.target or ())
            read = model.module.get_input_embeddings()(torch.tensor([EOS_ID] + [MASK] * len(target)))
            read[0] = vector
            mask = torch.ones(1, 1, len(read), len(read), dtype=torch.bool)
            logits = model.module(inputs_embeds=read[None], attention_mask=mask).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum"))
            count += len(target)
    assert ours == pytest.approx(total / count, rel=1e-4)
