"""A language model under our masks: every layer heeds them, no token reaches another by a way that is closed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embeddings.reconstruction.batch import EOS, NO_LABEL, PADDING, SOURCE, TARGET, Batch, Row, stack
from embeddings.reconstruction.model import Reconstructor, open_reconstructor
from embeddings.training import checkpointing
from embeddings.training.config import LoraSettings, ModelSettings
from merging.errors import CuveeError
from tests.embeddings.reconstruction.models import (
    ARCHITECTURES,
    EOS_ID,
    FIRST_WORD,
    PAD,
    TEXT_MODELS,
    VOCABULARY,
    WINDOWED,
    folder,
    module,
    reconstructor,
    tokenizer,
)

LENGTHS = ((6, 5), (3, 2), (2, 6))  # tokens of source and target


def rows(lengths: tuple[tuple[int, int], ...] = LENGTHS, seed: int = 0) -> list[Row]:
    """[source][EOS][target] of random words; EOS and every target token but the last predict."""
    draw, found = np.random.default_rng(seed), []
    for source, target in lengths:
        ids = draw.integers(FIRST_WORD, 50, source + 1 + target)
        ids[source] = EOS_ID
        segments = np.repeat([SOURCE, EOS, TARGET], [source, 1, target])
        found.append(Row(ids, segments, np.where(segments == TARGET, ids, NO_LABEL)))
    return found


def batch_of(pattern: str, *, left: bool = False, pack: int = 0, seed: int = 0) -> Batch:
    return stack(rows(seed=seed), pattern, pad_id=PAD, pad_left=left, pack=pack)


def changed(batch: Batch, row: int, token: int) -> Batch:
    ids = batch.ids.clone()
    ids[row, token] = FIRST_WORD + (ids[row, token] - FIRST_WORD + 1) % 40
    return replace(batch, ids=ids)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, atol=2e-5, rtol=1e-4)


# ---- against transformers' own forward ----


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("pattern", ["causal", "bidirectional"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_states_are_transformers_own(name: str, pattern: str, left: bool) -> None:
    model, batch = reconstructor(name), batch_of(pattern, left=left)
    with torch.inference_mode():
        ours = model.hidden(batch)
        model.module.config.get_text_config().is_causal = pattern == "causal"
        real = (batch.segments != PADDING).long()
        places = (real.cumsum(1) - 1).clamp(min=0)  # Qwen2-VL's own without images begin at the padding
        theirs = model.module.base_model(input_ids=batch.ids, attention_mask=real, position_ids=places, use_cache=False)
    assert same(ours[real.bool()], theirs.last_hidden_state[real.bool()])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_at_places_are_transformers_own(name: str) -> None:
    model, batch = reconstructor(name), batch_of("causal")
    with torch.inference_mode():
        ours = model.logits(model.hidden(batch), batch.places)
        theirs = model.module(input_ids=batch.ids, use_cache=False).logits
    assert same(ours, theirs[batch.places[:, 0], batch.places[:, 1]])


@pytest.mark.parametrize("pattern", ["collaborative", "attention_stop"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gemma2"])
def test_eager_equals_sdpa(name: str, pattern: str) -> None:
    batch = batch_of(pattern, left=True)
    real = batch.segments != PADDING
    with torch.inference_mode():
        sdpa, eager = (reconstructor(name, attention).hidden(batch)[real] for attention in ("sdpa", "eager"))
    assert same(sdpa, eager)


# ---- padding and packing ----


@pytest.mark.parametrize("pattern", ["causal", "bidirectional", "collaborative", "attention_stop"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_and_packing_change_nothing(name: str, pattern: str) -> None:
    model = reconstructor(name)
    with torch.inference_mode():
        alone = [model.hidden(stack([row], pattern, pad_id=PAD))[0] for row in rows()]
        for left in (False, True):
            batch = batch_of(pattern, left=left)
            hidden = model.hidden(batch)
            for own, states, segments in zip(alone, hidden, batch.segments, strict=True):
                assert same(own, states[segments != PADDING])
            packed = batch_of(pattern, left=left, pack=20)
            assert packed.rows == 2
            assert packed.documents is not None
            of_pack = model.hidden(packed)
            for row, document, number in ((0, 0, 0), (1, 0, 2), (0, 1, 1)):
                assert same(alone[number], of_pack[row][packed.documents[row] == document])


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2-vl"])
def test_gradients_of_packed_rows_are_those_of_unpacked_ones(name: str) -> None:
    found = []
    for pack in (0, 20):
        model, batch = reconstructor(name), batch_of("collaborative", pack=pack)
        logits = model.logits(model.hidden(batch), batch.places)
        torch.nn.functional.cross_entropy(logits, batch.labels).backward()
        found.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys()
    for parameter, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][parameter], atol=1e-5), parameter


# ---- no way but the open ones ----


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_may_not_be_seen_changes_nothing(name: str, left: bool) -> None:
    model = reconstructor(name)
    strict = {"eos_sees_b": False}
    with torch.inference_mode():
        for pattern, options in (("collaborative", strict), ("attention_stop", {})):
            batch = batch_of(pattern, left=left)
            before = model.hidden(batch, **options)
            for row in range(batch.rows):
                kept = (batch.segments[row] == SOURCE) | (batch.segments[row] == EOS)
                token = int((batch.segments[row] == TARGET).nonzero()[0])
                after = model.hidden(changed(batch, row, token), **options)
                assert torch.equal(before[row][kept], after[row][kept])  # the target reaches neither
                assert not same(before[row][~kept], after[row][~kept])
                others = torch.arange(batch.rows) != row
                assert torch.equal(before[others], after[others])


@pytest.mark.parametrize(
    ("pattern", "options"),
    [("collaborative", {}), ("collaborative", {"eos_sees_b": False}), ("attention_stop", {})],
    ids=["published", "strict", "stop"],
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_source_token_reaches_the_target_through_eos_alone(name: str, pattern: str, options: dict[str, bool]) -> None:
    batch = batch_of(pattern)
    for cut in (False, True):
        model = reconstructor(name)
        read = watched(model, batch if cut else None)
        hidden = model.hidden(batch, **options)
        behind = batch.segments[batch.places[:, 0], batch.places[:, 1]] == TARGET
        losses = torch.nn.functional.cross_entropy(model.logits(hidden, batch.places), batch.labels, reduction="none")
        losses[behind].sum().backward()
        gradient = read[0].grad
        of_source, of_target = gradient[batch.segments == SOURCE], gradient[batch.segments == TARGET]
        assert bool(of_target.abs().sum(1).count_nonzero())
        if cut:  # EOS's states take no gradient further
            assert not bool(of_source.count_nonzero())
        elif name not in WINDOWED:
            assert bool((of_source.abs().sum(1) > 0).all())


def watched(model: Reconstructor, cut_at_eos: Batch | None) -> list[torch.Tensor]:
    """What the layers read for tokens, with its gradient kept; and every layer's states at EOS cut from what made them."""
    read: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output.retain_grad()
        read.append(output)
        return output

    def cut(_module: Any, _inputs: Any, output: Any) -> Any:
        assert cut_at_eos is not None
        at_eos = (cut_at_eos.segments == EOS)[..., None]
        states = output[0] if isinstance(output, tuple) else output
        states = torch.where(at_eos, states.detach(), states)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    model.module.get_input_embeddings().register_forward_hook(keep)
    if cut_at_eos is not None:
        for layer in layers(model):
            layer.register_forward_hook(cut)
    return read


def layers(model: Reconstructor) -> Any:
    return next(
        own for name, own in model.module.named_modules() if name.endswith(("layers", ".h")) and "visual" not in name
    )


@pytest.mark.parametrize("pattern", ["collaborative", "attention_stop"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_eos_vector_that_is_pooled_learns(name: str, pattern: str) -> None:
    model, batch = reconstructor(name), batch_of(pattern)
    hidden = model.hidden(batch)
    hidden.retain_grad()
    torch.nn.functional.cross_entropy(model.logits(hidden, batch.places), batch.labels).backward()
    row, token = batch.eos_places().unbind(1)
    assert hidden.grad is not None
    assert bool((hidden.grad[row, token].abs().sum(1) > 0).all())


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_is_heeded(name: str) -> None:
    """One layer that sees four tokens: what is farther away than its window changes nothing."""
    config_class, model_class, sizes = ARCHITECTURES[name]
    import transformers

    sizes = {**sizes, "num_hidden_layers": 1, "max_window_layers": 0}
    if name in ("gemma2", "gemma3"):
        sizes["layer_types"] = ["sliding_attention"]
    config = getattr(transformers, config_class)(**sizes)
    config._attn_implementation = "eager" if name == "gemma2" else "sdpa"
    model = Reconstructor(getattr(transformers, model_class)(config).eval(), tokenizer(), base=name)
    batch = stack(rows(((8, 6),)), "bidirectional", pad_id=PAD)
    with torch.inference_mode():
        before, after = model.hidden(batch)[0], model.hidden(changed(batch, 0, 7))[0]
    distance = (torch.arange(15) - 7).abs()
    assert torch.equal(before[distance > 4], after[distance > 4])
    assert not bool((before == after)[distance <= 4].all(1).any())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "qwen2-vl"])
def test_embeddings_stand_where_eos_stood(name: str) -> None:
    model, batch = reconstructor(name), batch_of("collaborative")
    own = model.module.get_input_embeddings()(torch.full((3,), EOS_ID))
    with torch.inference_mode():
        assert same(model.hidden(batch), model.hidden(batch, embeddings=own))
    given = (2 * own.detach()).requires_grad_()
    hidden = model.hidden(batch, embeddings=given)
    hidden[batch.segments == TARGET].sum().backward()
    assert given.grad is not None and bool((given.grad.abs().sum(1) > 0).all())


# ---- opening, training, saving ----


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_what_is_saved_is_what_was_trained(name: str, tmp_path: Path) -> None:
    model = open_reconstructor(ModelSettings(str(folder(name, tmp_path / "base"))))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    model.save_language_model(tmp_path / "saved")
    again = open_reconstructor(ModelSettings(str(tmp_path / "saved")))
    batch = batch_of("causal")
    with torch.inference_mode():
        assert torch.equal(model.hidden(batch), again.hidden(batch))
    assert again.tokenizer("w7 w8")["input_ids"] == model.tokenizer("w7 w8")["input_ids"]


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2-vl"])
def test_lora_learns_alone_and_is_merged_into_what_is_saved(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    plain = reconstructor(name)
    batch = batch_of("collaborative")
    with torch.inference_mode():
        assert same(model.hidden(batch), plain.hidden(batch))
    assert all("lora_" in parameter for parameter, _ in model.named_parameters())
    step(model, batch)
    model.save_language_model(tmp_path)
    import transformers

    again = getattr(transformers, ARCHITECTURES[name][1]).from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        ours = model.hidden(batch)
        theirs = Reconstructor(again, tokenizer(), base=name).hidden(batch)
    assert not same(ours, plain.hidden(batch)) and torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(("target", "other"), [("lm_head", "model.embed_tokens"), ("embed_tokens", "lm_head")])
def test_lora_on_tied_weights_is_refused(target: str, other: str, tmp_path: Path) -> None:
    """Merged into one of the two, it would change the other, which did not have it while it learned."""
    tied, free = (str(folder(name, tmp_path / name)) for name in ("qwen3", "llama"))
    lora = LoraSettings(r=2, alpha=4, targets=("q_proj", target))
    with pytest.raises(CuveeError, match=rf"config\.yml:1: LoRA on '.*{target}' would change '{other}' too"):
        open_reconstructor(ModelSettings(tied, lora=lora), where="config.yml:1")
    model = open_reconstructor(ModelSettings(free, lora=lora))
    batch = batch_of("causal")
    step(model, batch)
    model.save_language_model(tmp_path / "saved")
    with torch.inference_mode():
        merged = open_reconstructor(ModelSettings(str(tmp_path / "saved")))
        ours, theirs = (each.logits(each.hidden(batch), batch.places) for each in (model, merged))
    assert torch.allclose(ours, theirs, atol=1e-4)


def adapted(name: str) -> Reconstructor:
    from embeddings.training import lora

    own = module(name)
    own.requires_grad_(False)
    lora.add_lora(own, LoraSettings(r=4, alpha=8), "model", 0)
    return Reconstructor(own, tokenizer(), base=name)


def step(model: Reconstructor, batch: Batch, rate: float = 0.05) -> float:
    logits = model.logits(model.hidden(batch), batch.places)
    loss = torch.nn.functional.cross_entropy(logits, batch.labels)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
                parameter.grad = None
    return float(loss.detach())


@pytest.mark.parametrize("adapter", [None, LoraSettings(r=2, alpha=4)], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3"])
def test_recomputed_activations_give_the_same_gradient(name: str, adapter: LoraSettings | None, tmp_path: Path) -> None:
    path, batch, found = str(folder(name, tmp_path)), batch_of("collaborative"), []
    for checkpointed in (False, True):
        model = open_reconstructor(ModelSettings(path, lora=adapter, gradient_checkpointing=checkpointed))
        model.module.train()
        torch.nn.functional.cross_entropy(model.logits(model.hidden(batch), batch.places), batch.labels).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for first, second in zip(*found, strict=True):
        assert first is not None and second is not None and torch.equal(first, second)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen2-vl"])
def test_bfloat16_is_close_and_heeds_its_masks(name: str) -> None:
    model, batch = reconstructor(name, dtype="bfloat16"), batch_of("collaborative")
    exact = reconstructor(name)
    with torch.inference_mode():
        low, high = (each.logits(each.hidden(batch), batch.places) for each in (model, exact))
    assert low.dtype == torch.float32
    assert float((low - high).norm() / high.norm()) < 0.05
    assert step(model, batch, 0.01) > 0


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    batch = batch_of("collaborative")
    one, two = reconstructor("llama"), reconstructor("llama")
    step(one, batch)
    checkpointing.save(tmp_path / "state", one, torch.optim.AdamW(one.parameters()), {"step": 1})
    assert checkpointing.load(tmp_path / "state", two, torch.optim.AdamW(two.parameters())) == {"step": 1}
    assert step(one, batch) == step(two, batch)
    with pytest.raises(CuveeError, match="not trained here"):
        two.load_state({**two.state(), "other": torch.zeros(1)})


def test_open_adds_lora_and_counts_from_the_same_seed(tmp_path: Path) -> None:
    path = str(folder("llama", tmp_path))
    settings = ModelSettings(path, lora=LoraSettings(r=2, alpha=4), dtype="bfloat16")
    first, second = (open_reconstructor(settings, seed=3).state() for _ in range(2))
    assert first and all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_without_its_head_is_refused(tmp_path: Path) -> None:
    module("llama").base_model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CuveeError, match=r"'lm_head\.weight', which would be random"):
        open_reconstructor(ModelSettings(str(tmp_path)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: mute(model, "attention_mask"), "sequences of a packed row mix|stays causal"),
        (lambda model: scaled(model), "logits in a way"),
    ],
    ids=["deaf", "scaled"],
)
def test_silent_errors_are_refused(spoil: Callable[[Any], None], message: str) -> None:
    model = module("llama")
    spoil(model)
    with pytest.raises(CuveeError, match=message):
        Reconstructor(model, tokenizer(), base="llama")


def test_a_model_that_takes_no_mask_of_ours_is_one_line() -> None:
    import transformers

    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(CuveeError, match="BloomForCausalLM takes no mask of ours"):
        Reconstructor(transformers.BloomForCausalLM(config), tokenizer(), base="bloom")


def mute(model: Any, argument: str) -> None:
    """Its second layer does not get the argument."""
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *values, **named: forward(*values, **{**named, argument: None})


def scaled(model: Any) -> None:
    forward = model.forward

    def other(**named: Any) -> Any:
        found = forward(**named)
        found.logits = found.logits * 2
        return found

    model.forward = other


def test_weak_layers_are_no_silent_error() -> None:
    """Fresh weights hardly move what goes through them."""
    config_class, model_class, sizes = ARCHITECTURES["llama"]
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**sizes, "initializer_range": 0.005})
    Reconstructor(getattr(transformers, model_class)(config), tokenizer(), dtype="bfloat16", base="weak")


def test_flex_attention_is_for_a_gpu(tmp_path: Path) -> None:
    settings = ModelSettings(str(folder("llama", tmp_path)))
    with pytest.raises(CuveeError, match="does not learn on a CPU"):
        open_reconstructor(settings, attention="flex_attention")


def test_an_attention_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CuveeError, match="choose sdpa, eager, flex_attention"):
        open_reconstructor(ModelSettings(str(tmp_path)), attention="flash")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_embedding_length_is_that_of_what_the_layers_read(name: str) -> None:
    model = reconstructor(name)
    with torch.inference_mode():
        read = model.module.get_input_embeddings()(torch.arange(VOCABULARY))
    assert model.embedding_length == pytest.approx(float(read.norm(dim=1).mean()), rel=1e-5)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_only_keeps_what_is_asked_for(left: bool) -> None:
    batch = batch_of("collaborative", left=left)
    source = batch.only((batch.segments == SOURCE) | (batch.segments == EOS), "bidirectional")
    target = batch.only((batch.segments == EOS) | (batch.segments == TARGET), "bidirectional")
    assert not len(source.places) and target.pattern == "bidirectional"
    assert torch.equal(target.labels, batch.labels)
    for number, row in enumerate(rows()):
        own, segments = source.ids[number], source.segments[number]
        assert own[segments != PADDING].tolist() == row.ids[row.segments != TARGET].tolist()
        own, segments = target.ids[number], target.segments[number]
        assert own[segments != PADDING].tolist() == row.ids[row.segments != SOURCE].tolist()
        assert segments[segments != PADDING].tolist() == row.segments[row.segments != SOURCE].tolist()
    behind = target.ids[target.places[:, 0], target.places[:, 1] + 1]
    assert torch.equal(behind, target.labels)  # nothing is masked here


def test_a_tokenizer_without_eos_is_refused() -> None:
    lacking = tokenizer()
    lacking.eos_token = None
    with pytest.raises(CuveeError, match="no EOS"):
        Reconstructor(module("llama"), lacking, base="llama")
