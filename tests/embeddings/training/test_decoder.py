"""Decoders as backbones: what training sees is what plain SentenceTransformer(path) sees of the saved folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embeddings.training import decoder
from embeddings.training.backbone import Backbone
from embeddings.training.config import LoraSettings
from merging.errors import CuveeError
from tests.embeddings.training.test_backbone import close, embed, gradients, opened, plain, words

TEXTS = ["a short one", "a somewhat longer sentence about nothing at all", "word", "word " * 60]
LENGTHS = {"query": 16, "document": 24}
_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # at the usual 0.02 random layers hardly move what goes through them
}
_GPT2 = {
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", _SIZES),
    "Mistral": ("MistralConfig", {**_SIZES, "sliding_window": 6}),
    "Qwen2": ("Qwen2Config", {key: value for key, value in _SIZES.items() if key != "head_dim"}),
    "Qwen3": ("Qwen3Config", {**_SIZES, "tie_word_embeddings": True}),
    "Gemma": ("GemmaConfig", _SIZES),
    "Gemma3": ("Gemma3TextConfig", {**_SIZES, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "GPT2": ("GPT2Config", _GPT2),
}
_HEADS = {"Gemma3": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}


def bpe(kind: str, **options: Any) -> Any:
    """A real tokenizer class of transformers with a vocabulary of a few letters."""
    import transformers

    letters = [*"abcdefghijklmnopqrstuvwxyz,", "Ġ", "▁"]
    vocabulary = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", "<pad>", "<eos>", "<bos>", *letters])}
    return getattr(transformers, kind)(
        vocab=vocabulary, merges=[], eos_token="</s>", bos_token="<s>", unk_token="<unk>", **options
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Text generators as the hub has them: no modules.json, no token to pad with, no EOS after a text, a chat template."""
    import transformers

    root = tmp_path_factory.mktemp("decoders")
    tokenizer = words(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
    with torch.random.fork_rng():
        for name, (config, sizes) in DECODERS.items():
            torch.manual_seed(0)
            model = getattr(transformers, _HEADS.get(name, f"{name}ForCausalLM"))
            model(getattr(transformers, config)(**sizes)).save_pretrained(root / name)
            (bpe("Qwen2Tokenizer") if name == "Qwen2" else tokenizer).save_pretrained(root / name)
    return {name: root / name for name in DECODERS}


def each(backbone: Backbone) -> Any:
    """The texts one by one, so that nothing is padded."""
    with torch.no_grad():
        return torch.cat([embed(backbone, [text]) for text in TEXTS])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_a_saved_decoder_gives_the_same_vectors_to_sentence_transformers(
    folders: dict[str, Path], tmp_path: Path, name: str, bidirectional: bool
) -> None:
    backbone = opened(folders[name], LENGTHS, bidirectional=bidirectional)
    vectors = embed(backbone, TEXTS)
    gradients(backbone)
    assert decoder.looks_ahead(backbone.transformer[0]) == bidirectional
    assert backbone.transformer[1].pooling_mode == ("mean" if bidirectional else "lasttoken")
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    close(vectors, each(backbone), 2e-6)
    backbone.save(tmp_path / "saved")
    for attention in ("sdpa", "eager"):
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(tmp_path / "saved"), model_kwargs={"attn_implementation": attention})
        model.max_seq_length = LENGTHS["query"]
        close(model.encode(TEXTS), vectors, 2e-6)
    again = opened(tmp_path / "saved", LENGTHS)
    close(embed(again, TEXTS), vectors, 2e-6)


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bidirectional_is_a_mask_that_hides_the_padding_only(
    folders: dict[str, Path], name: str, attention: str
) -> None:
    from transformers import AutoModel

    backbone = opened(folders[name], LENGTHS, bidirectional=True)
    backbone.transformer[0].model.set_attn_implementation(attention)
    features = backbone.pad([np.array(row, np.int32) for row in backbone.tokenize(TEXTS, "query")])
    untouched = AutoModel.from_pretrained(folders[name], attn_implementation="sdpa")
    hidden = features["attention_mask"] == 0  # (texts, tokens)
    mask = torch.zeros(*hidden.shape[:1], 1, hidden.shape[1], hidden.shape[1])
    mask = mask.masked_fill(hidden[:, None, None, :], -torch.inf)
    with torch.no_grad():
        expected = untouched(input_ids=features["input_ids"], attention_mask=mask)[0]
        got = backbone.transformer[0].model(**features)[0]
    real = ~hidden
    torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3"])
def test_the_side_of_the_padding_does_not_matter(folders: dict[str, Path], name: str, bidirectional: bool) -> None:
    backbone = opened(folders[name], LENGTHS, bidirectional=bidirectional)
    assert backbone.transformer.tokenizer.padding_side == "right"
    expected = embed(backbone, TEXTS)
    backbone._pad_left = True
    close(embed(backbone, TEXTS), expected, 2e-6)


def test_every_text_ends_with_eos_cut_ones_too(folders: dict[str, Path], tmp_path: Path) -> None:
    backbone = opened(folders["Llama"], LENGTHS)
    for side, length in LENGTHS.items():
        rows = backbone.tokenize(["", *TEXTS], side, "a prompt ")
        assert all(row[-1] == 2 and 2 not in row[:-1] for row in rows) and max(map(len, rows)) == length
    backbone.save(tmp_path / "saved")
    again = opened(tmp_path / "saved", LENGTHS)
    assert again.tokenize(TEXTS, "query") == backbone.tokenize(TEXTS, "query")
    assert again.tokenizer_digest == backbone.tokenizer_digest
    without = opened(folders["Llama"], LENGTHS, append_eos=False)
    assert [[*row, 2] for row in without.tokenize(TEXTS[:3], "query")] == backbone.tokenize(TEXTS[:3], "query")
    assert without.tokenizer_digest != backbone.tokenizer_digest


def _template(*names: str) -> Any:
    from tokenizers.processors import TemplateProcessing

    special = [(name, number) for number, name in enumerate(["<unk>", "<s>", "</s>"]) if name in names]
    return TemplateProcessing(single=[*names], pair=[*names, "$B"], special_tokens=special)


def _llama3() -> Any:
    from tokenizers.processors import ByteLevel, Sequence

    tokenizer = words(bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False), _template("<s>", "$A")])
    return tokenizer


def _template_only() -> Any:
    tokenizer = words(bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = _template("<s>", "$A")
    return tokenizer


def _byte_level() -> Any:
    from tokenizers.processors import ByteLevel, Sequence

    tokenizer = words(eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False)])
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "words": lambda: words(eos_token="</s>"),
    "template": _template_only,
    "sequence": _byte_level,
    "template in a sequence, as Llama 3": _llama3,
    "Llama": lambda: bpe("LlamaTokenizer", add_bos_token=True),
    "Llama without BOS": lambda: bpe("LlamaTokenizer"),
    "Qwen2": lambda: bpe("Qwen2Tokenizer"),
    "Gemma": lambda: bpe("GemmaTokenizer", add_bos_token=True),
    "GPT2": lambda: bpe("GPT2Tokenizer"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_eos_comes_after_what_the_tokenizer_adds_itself(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = TOKENIZERS[kind]()
    eos = tokenizer.eos_token_id
    before = [tokenizer(text)["input_ids"] for text in ("a word", "a word " * 9)]
    assert (before[0][0] == 1) == ("Llama 3" in kind or kind in ("template", "Llama", "Gemma"))
    decoder.append_eos(tokenizer, "here")
    decoder.append_eos(tokenizer, "here")  # once is enough
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert one("a word")["input_ids"] == [*before[0], eos]
        assert one("a word " * 9, truncation=True, max_length=5)["input_ids"] == [*before[1][:4], eos]


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(CuveeError, match=r"no EOS to append.*append_eos: false"):
        decoder.append_eos(words(), "config.yml:2")


def test_texts_are_not_put_into_a_chat(folders: dict[str, Path], tmp_path: Path) -> None:
    backbone = opened(folders["Llama"], LENGTHS)
    tokenizer = backbone.transformer.tokenizer
    assert backbone.tokenize(["a word"], "query") == [[*tokenizer.convert_tokens_to_ids(["a", "word"]), 2]]
    backbone.save(tmp_path / "saved")
    close(plain(tmp_path / "saved", TEXTS[:3]), embed(backbone, TEXTS[:3]), 2e-6)


def test_a_sentence_transformers_folder_keeps_its_chat_and_its_tokenizer(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folders["Qwen3"]), device="cpu")
    model.tokenizer.pad_token = "</s>"
    model.save(str(tmp_path / "model"), create_model_card=False)
    backbone = opened(tmp_path / "model", LENGTHS)
    assert backbone.tokenize(["a word"], "query")[0][0] == 1  # of the template
    close(embed(backbone, TEXTS[:3]), plain(tmp_path / "model", TEXTS[:3]), 2e-6)


def test_an_encoder_is_bidirectional_already_and_gets_no_eos(minilm: Path) -> None:
    close(embed(opened(minilm, bidirectional=True)), embed(opened(minilm)))


def test_what_heeds_no_mask_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    transformers.MambaModel(config).save_pretrained(tmp_path)
    words(eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(CuveeError, match=r"config.yml:1: MambaModel cannot be made bidirectional"):
        opened(tmp_path, LENGTHS, bidirectional=True)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_recomputed_activations_give_the_same_gradients(folders: dict[str, Path], bidirectional: bool) -> None:
    expected = gradients(opened(folders["Llama"], LENGTHS, bidirectional=bidirectional))
    got = gradients(opened(folders["Llama"], LENGTHS, bidirectional=bidirectional, gradient_checkpointing=True))
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["Qwen3", "GPT2"])
def test_lora_on_a_decoder_is_merged_when_saved(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    backbone = opened(folders[name], LENGTHS, lora=LoraSettings(r=2, alpha=16), bidirectional=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    backbone.save(tmp_path / "saved")
    close(embed(opened(tmp_path / "saved", LENGTHS), TEXTS), embed(backbone, TEXTS), 5e-6)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["is_causal"] is False
