"""Backbone against sentence-transformers: the same vectors before and after saving, and gradients that are right."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embeddings.training.backbone import Backbone, open_backbone
from embeddings.training.config import ModelSettings
from merging.errors import CuveeError
from tests.architectures import ARCHITECTURES
from tests.embeddings.runs import config_of, sets_of

TEXTS = [
    "a short one",
    "a somewhat longer sentence about nothing at all",
    "Über 100 Jahre: noch ein Satz",
    "word " * 400,
]
LENGTHS = {"query": 512, "document": 512}


def opened(folder: Path, lengths: dict[str, int] = LENGTHS, **settings: Any) -> Backbone:
    return open_backbone(
        replace(ModelSettings(str(folder)), **settings), max_length=lengths, device="cpu", where="config.yml:1"
    )


def embed(backbone: Backbone, texts: Sequence[str] = TEXTS, side: str = "query", prompt: str | None = None) -> Any:
    rows = [np.array(row, np.int32) for row in backbone.tokenize(texts, side, prompt)]
    return backbone.embed(backbone.pad(rows))


def plain(folder: Path, texts: Sequence[str] = TEXTS, **options: Any) -> Any:
    """What sentence-transformers alone makes of a folder."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(list(texts), **options)


def close(one: Any, other: Any, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(
        *(x.detach().numpy() if isinstance(x, torch.Tensor) else x for x in (one, other)), rtol=0, atol=atol
    )


@pytest.fixture(scope="module")
def backbone(minilm: Path) -> Backbone:
    return opened(minilm)


# What comes in.


@pytest.mark.parametrize("prompt", [None, "query: "])
def test_vectors_are_those_of_encode(backbone: Backbone, minilm: Path, prompt: str | None) -> None:
    vectors = embed(backbone, prompt=prompt)
    assert vectors.dtype == torch.float32 and vectors.requires_grad and vectors.shape == (4, backbone.dimension)
    close(vectors, plain(minilm, prompt=prompt))


def test_a_text_is_cut_to_the_length_of_its_side_and_never_over_the_models(minilm: Path) -> None:
    backbone = opened(minilm, {"query": 7, "document": 1000})
    assert backbone.max_length == {"query": 7, "document": 256}
    for side, length in backbone.max_length.items():
        row = backbone.tokenize(TEXTS, side)[3]
        assert len(row) == length and row[-1] == backbone.transformer.tokenizer.sep_token_id


def test_the_tokenizers_digest_changes_with_the_ids_alone(backbone: Backbone, minilm: Path, tmp_path: Path) -> None:
    before = backbone.tokenizer_digest
    backbone.tokenize(TEXTS, "document")
    assert backbone.tokenizer_digest == before == opened(minilm, dtype="bfloat16").tokenizer_digest
    changed = Path(shutil.copytree(minilm, tmp_path / "changed"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (changed / name).read_text("utf-8")
        (changed / name).write_text(re.sub(r'(lower_?case"): *true', r"\1: false", text), "utf-8")
    others = {opened(changed).tokenizer_digest, opened(minilm, {"query": 8, "document": 512}).tokenizer_digest}
    assert len({before, *others}) == 3


def test_no_texts_and_single_tokens_make_batches(backbone: Backbone) -> None:
    assert backbone.tokenize([], "query") == []
    features = backbone.pad([np.array([5], np.int32), np.array([], np.int32), np.array([7, 8, 9], np.int32)])
    assert features["input_ids"].tolist() == [[5, 0, 0], [0, 0, 0], [7, 8, 9]]
    assert features["attention_mask"].tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 1]]


def test_a_pooling_that_leaves_out_the_prompt_does_so_here(minilm: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm), device="cpu")
    model.set_pooling_include_prompt(False)
    model.save(str(tmp_path / "model"), create_model_card=False)
    backbone = opened(tmp_path / "model")
    vectors = embed(backbone, prompt="a prompt: ")
    close(vectors, model.encode(TEXTS, prompt="a prompt: "))
    close(embed(backbone), model.encode(TEXTS))
    assert np.abs(vectors.detach().numpy() - plain(minilm, prompt="a prompt: ")).max() > 0.01


# What goes out.


def test_a_saved_folder_is_the_same_model_for_sentence_transformers(
    backbone: Backbone, minilm: Path, tmp_path: Path
) -> None:
    backbone.save(tmp_path / "saved")
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".bin", ".pt")]
    np.testing.assert_array_equal(plain(tmp_path / "saved"), plain(minilm))


def test_a_saved_state_goes_on_where_it_was(backbone: Backbone, minilm: Path) -> None:
    state = {name: value + 0.001 for name, value in backbone.state().items()}
    other = opened(minilm)
    other.load_state(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state().items())
    assert abs(embed(other) - embed(backbone)).max() > 1e-4
    name = next(iter(state))
    for wrong, message in [
        ({**state, "more": state[name]}, "'more'"),
        ({key: value for key, value in state.items() if key != name}, f"lacks the tensor '{name}'"),
        ({**state, name: state[name][:1]}, r"shape \(1, "),
    ]:
        with pytest.raises(CuveeError, match=message):
            other.load_state(wrong)


def test_what_no_vector_depends_on_is_not_trained(minilm: Path) -> None:
    backbone = opened(minilm)
    embed(backbone).sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    names = [name for name, _ in backbone.named_parameters()]
    assert names == list(backbone.state()) and not any("pooler" in name for name in names)


def gradients(backbone: Backbone, seed: int = 0) -> dict[str, torch.Tensor]:
    """Of a contrastive loss, dropout as configured."""
    backbone.transformer.train()
    torch.manual_seed(seed)
    vectors = embed(backbone, TEXTS[:3])
    loss = torch.nn.functional.cross_entropy(vectors @ vectors.roll(1, 0).T, torch.arange(3))
    for parameter in backbone.parameters():
        parameter.grad = None
    loss.backward()
    backbone.transformer.eval()
    found = {}
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad.clone()
    return found


def test_recomputed_activations_give_the_same_gradients(backbone: Backbone, minilm: Path) -> None:
    recomputing = opened(minilm, gradient_checkpointing=True)
    assert any(getattr(module, "gradient_checkpointing", False) for module in recomputing.transformer.modules())
    expected, got = gradients(backbone), gradients(recomputing)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_low_precision_is_of_the_arithmetic_only(backbone: Backbone, minilm: Path, tmp_path: Path) -> None:
    lower = opened(minilm, dtype="bfloat16")
    vectors, expected = embed(lower), embed(backbone)
    assert vectors.dtype == torch.float32
    similarity = torch.nn.functional.cosine_similarity(vectors, expected)
    assert 0.998 < similarity.min() < 0.9999999
    assert all(gradient.dtype == torch.float32 for gradient in gradients(lower).values())
    lower.save(tmp_path / "saved")
    np.testing.assert_array_equal(plain(tmp_path / "saved"), plain(minilm))


# Plain encoders.


def words(**special: str) -> Any:
    """A tokenizer of whole words, with what a decoder has by way of special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *sorted(set(" ".join(TEXTS).split()))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "mpnet", "xlm-roberta", "modernbert", "t5-encoder"])
def test_a_plain_encoder_pools_the_mean_and_normalizes(name: str, tmp_path: Path) -> None:
    ARCHITECTURES[name].new(0).save_pretrained(tmp_path / "plain")
    words(pad_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "plain")
    backbone = opened(tmp_path / "plain", {"query": 20, "document": 20})
    vectors = embed(backbone, TEXTS[:3])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    for text, vector in zip(TEXTS[:3], vectors, strict=True):  # no padding
        ids = torch.tensor(backbone.tokenize([text], "query"))
        hidden = backbone.transformer[0].model(input_ids=ids, attention_mask=torch.ones_like(ids))[0][0]
        close(vector, torch.nn.functional.normalize(hidden.mean(0), dim=0))
    gradients(backbone)
    backbone.save(tmp_path / "saved")
    close(vectors, plain(tmp_path / "saved", TEXTS[:3]))


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken", None])
@pytest.mark.parametrize("normalize", [True, False, None])
def test_pooling_and_normalisation_are_what_the_settings_say(
    minilm: Path, tmp_path: Path, pooling: str | None, normalize: bool | None
) -> None:
    backbone = opened(minilm, pooling=pooling, normalize=normalize)
    vectors = embed(backbone, TEXTS[:3])
    assert backbone.transformer[1].pooling_mode == (pooling or "mean")
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3)) == (normalize is not False)
    backbone.save(tmp_path / "saved")
    close(vectors, plain(tmp_path / "saved", TEXTS[:3]))


# Mistakes.


def _static(folder: Path, minilm: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    SentenceTransformer(modules=[StaticEmbedding(words(), embedding_dim=8)], device="cpu").save(
        str(folder), create_model_card=False
    )


def _reranker(folder: Path, minilm: Path) -> None:
    shutil.copytree(minilm, folder)
    (folder / "config_sentence_transformers.json").write_text('{"model_type": "CrossEncoder"}')


def _weighted(folder: Path, minilm: Path) -> None:
    shutil.copytree(minilm, folder)
    settings = {"embedding_dimension": 384, "pooling_mode": "weightedmean", "include_prompt": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))


def _types(folder: Path, minilm: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    ARCHITECTURES["llama"].new(0).save_pretrained(folder)
    tokenizer = words(pad_token="<s>", eos_token="</s>")
    end = TemplateProcessing(single=["$A", "</s>:2"], special_tokens=[("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = end
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _no_padding(folder: Path, minilm: Path) -> None:
    ARCHITECTURES["bert"].new(0).save_pretrained(folder)
    words().save_pretrained(folder)


def _bare(folder: Path, minilm: Path) -> None:
    shutil.copytree(minilm, folder, ignore=shutil.ignore_patterns("modules.json", "config.json"))


MISTAKES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "no transformer": (_static, "begins with StaticEmbedding"),
    "reranker": (_reranker, "is a reranker"),
    "weighted mean": (_weighted, "weighted mean that leaves out the prompt"),
    "token types": (_types, "types other than 0"),
    "no padding": (_no_padding, "no token to pad with"),
    "no config": (_bare, "no config.json"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_trained_is_refused_in_one_line(minilm: Path, tmp_path: Path, mistake: str) -> None:
    make, message = MISTAKES[mistake]
    make(tmp_path / "model", minilm)
    with pytest.raises(CuveeError, match=message) as caught:
        opened(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_settings_that_do_not_fit_are_refused_where_they_stand(minilm: Path) -> None:
    with pytest.raises(CuveeError, match=r"config.yml:1: 'float16' is no dtype to train in"):
        opened(minilm, dtype="float16")
    with pytest.raises(CuveeError, match=r"config.yml:1: 'middle' is no pooling"):
        opened(minilm, pooling="middle")
    with pytest.raises(CuveeError, match="no number of tokens for a document"):
        opened(minilm, {"query": 5})
    with pytest.raises(CuveeError, match="no folder of that name"):
        opened(Path("nobody/nothing"))


PROMPTS = {"query": "Ask: ", "document": "Told: ", "plain": "Text: "}
OF_TYPES = """\
  - {file: word.jsonl}
  - {file: pairs.jsonl, type: STS}
  - {file: word.jsonl, name: own, prompt: {query: "Mine: "}}
  - {file: word.jsonl, name: none, prompt: ""}
"""


@pytest.mark.parametrize("default", [None, "plain"])
def test_the_models_own_prompts_stand_before_texts_as_where_it_is_used(
    minilm: Path, tmp_path: Path, default: str | None
) -> None:
    """What `encode_query`, `encode_document` and `encode` put there; what the data say instead wins."""
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "model"
    SentenceTransformer(str(minilm), device="cpu", prompts=PROMPTS, default_prompt_name=default).save(str(folder))
    config = config_of(tmp_path / "data", folder, data=OF_TYPES)
    sets = {found.name: found for found in sets_of(config, tmp_path / "cache")}
    plain = SentenceTransformer(str(folder), device="cpu")
    words = plain.tokenizer
    before = {
        "word": (PROMPTS["query"], PROMPTS["document"]),
        "pairs": (PROMPTS["plain"] if default else "",) * 2,
        "own": ("Mine: ", ""),
        "none": ("", ""),
    }
    for name, sides in before.items():
        found = sets[name]
        for table, number, prompt in zip(
            (found.query_tokens, found.document_tokens), (found.queries[0], found.positives[0][0]), sides, strict=True
        ):
            wanted = words(prompt + table.text(int(number)), truncation=True, max_length=16)["input_ids"]
            assert table[int(number)].tolist() == wanted, name
    backbone, texts = open_backbone(config.model, max_length=config.max_length, device="cpu"), ["a short text"]
    used = {"query": plain.encode_query, "document": plain.encode_document, None: plain.encode}
    for side, encode in used.items():
        ids = backbone.tokenize(texts, side or "document", backbone.prompt_of(side))
        with torch.inference_mode():
            vectors = backbone.vectors([np.array(own, np.int32) for own in ids]).numpy()
        np.testing.assert_allclose(vectors, encode(texts), atol=1e-5)
    bare = open_backbone(ModelSettings(str(minilm)), max_length=config.max_length, device="cpu")
    assert bare.tokenizer_digest != backbone.tokenizer_digest
