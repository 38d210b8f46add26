"""Networks: which stored tensor each parameter is, what a folder's model is for, and how texts are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merging import CuveeError
from merging.checkpoint import Checkpoint
from merging.statistics.matching import match
from merging.statistics.network import head_of, open_network
from tests.architectures import build
from tests.checkpoints import bf16, read_model, some, write_model
from tests.merging.statistics.models import HEADS, classifier, model, sentences, stored, with_tokenizer

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("name", HEADS)
def test_every_parameter_is_the_stored_tensor_of_its_values(name: str, tmp_path: Path) -> None:
    folder = model(name, tmp_path)
    network = open_network(str(folder))
    tensors = stored(folder)
    values = {name: own.double() for name, own in network.module.named_parameters()}
    assert network.parameters().keys() == values.keys()
    found = network.stored(values)
    for stored_name, own in found.items():
        np.testing.assert_array_equal(own.numpy(), tensors[stored_name])
    if name != "t5":  # whose decoder does not embed
        assert found.keys() == tensors.keys()


def test_experts_that_are_loaded_into_one_tensor_are_told_apart(tmp_path: Path) -> None:
    network = open_network(str(model("mixtral", tmp_path)))
    pieces = [piece for own in network.pieces.values() for piece in own]
    assert len(pieces) == 2 * 4 * 3 and any(".w1." in piece.name for piece in pieces)


def test_names_with_a_prefix_and_modules_in_folders(minilm: Path) -> None:
    network = open_network(str(minilm))
    assert network.names["0.model.embeddings.LayerNorm.weight"] == "embeddings.LayerNorm.weight"
    assert len(network.names) == len(list(network.module.named_parameters())) == 103


def test_a_dense_module_is_named_by_its_folder(minilm: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    transformer = SentenceTransformer(str(minilm))
    transformer.append(Dense(384, 16))
    transformer.save(str(tmp_path / "dense"))
    network = open_network(str(tmp_path / "dense"))
    dense = {stored for stored in network.names.values() if "/" in stored}
    assert dense == {"3_Dense/linear.weight", "3_Dense/linear.bias"}


def named(folder: Path, parameters: dict[str, Any], tied: dict[str, str] | None = None) -> Any:
    with Checkpoint.open(folder) as checkpoint:
        return match(parameters, checkpoint, tied, rows=True)


def test_equal_tensors_go_by_their_names(tmp_path: Path) -> None:
    ones = np.ones(3, np.float32)
    folder = write_model(tmp_path, {f"encoder.layer.{i}.norm.{n}": ones for i in range(3) for n in ("weight", "bias")})
    parameters = {f"model.layers.{i}.norm.{n}": torch.ones(3) for i in (2, 0, 1) for n in ("bias", "weight")}
    found = named(folder, parameters).names
    assert all(a.split(".")[-3:] == b.split(".")[-3:] for a, b in found.items()) and len(found) == 6


def test_values_decide_not_names(tmp_path: Path) -> None:
    a, b = some((4, 3)), some((4, 3), 1)
    folder = write_model(tmp_path, {"a": a, "b": b})
    found = named(folder, {"a": torch.from_numpy(b), "b": torch.from_numpy(a), "c": torch.zeros(4, 3)})
    assert found.names == {"a": "b", "b": "a"} and not found.pieces


def test_values_are_compared_as_they_are_loaded(tmp_path: Path) -> None:
    values = some((600, 3))
    half = torch.from_numpy(values).bfloat16()
    folder = write_model(tmp_path, {"a": values, "b": bf16(half.float().numpy() + 1)})
    assert named(folder, {"x": half, "y": half + 1}).names["x"] == "a"
    last = torch.from_numpy(values.copy())
    last[-1, -1] += 1
    assert not named(folder, {"x": last}).names


def test_a_second_stored_name_of_a_tied_weight(tmp_path: Path) -> None:
    a = some((4, 3))
    folder = write_model(tmp_path, {"embed.weight": a, "lm_head.weight": a})
    found = named(folder, {"embed.weight": torch.from_numpy(a)}, {"lm_head.weight": "embed.weight"})
    assert found.names == {"embed.weight": "embed.weight"}
    assert [piece.name for piece in found.pieces["embed.weight"]] == ["lm_head.weight"]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("turned", [False, True])
def test_matrices_side_by_side(axis: int, turned: bool, tmp_path: Path) -> None:
    shapes = [(2, 5), (3, 5), (4, 5)] if axis == 0 else [(5, 2), (5, 3), (5, 4)]
    parts = [some(shape, i) for i, shape in enumerate(shapes)]
    folder = write_model(tmp_path, {f"p{i}": np.ascontiguousarray(p.T) if turned else p for i, p in enumerate(parts)})
    whole = torch.from_numpy(np.concatenate(parts, axis))
    pieces = named(folder, {"qkv": whole}).pieces["qkv"]
    assert [piece.name for piece in pieces] == ["p0", "p1", "p2"]
    found: dict[str, Any] = {}
    for piece in pieces:
        piece.put(whole, found)
    for own, part in zip(found.values(), parts, strict=True):
        np.testing.assert_array_equal(own.numpy(), part.T if turned else part)


def test_a_projection_that_is_loaded_as_several(tmp_path: Path) -> None:
    whole, bias = some((16, 5)), some((16,), 1)
    folder = write_model(tmp_path, {"qkv.weight": whole, "qkv.bias": bias, "other.weight": some((16, 5), 2)})
    ends = {"q": (0, 8), "k": (8, 12), "v": (12, 16)}
    parameters = {f"{n}.weight": torch.from_numpy(whole[a:b]) for n, (a, b) in ends.items()}
    parameters |= {f"{n}.bias": torch.from_numpy(bias[a:b]) for n, (a, b) in ends.items()}
    pieces = named(folder, {**parameters, "alone.weight": torch.from_numpy(some((16, 5), 2)[4:8])}).pieces
    assert pieces.keys() == parameters.keys()
    found: dict[str, Any] = {}
    for name, own in parameters.items():
        pieces[name][0].put(own, found)
    np.testing.assert_array_equal(found["qkv.weight"].numpy(), whole)
    np.testing.assert_array_equal(found["qkv.bias"].numpy(), bias)


def test_biases_that_are_loaded_into_one(tmp_path: Path) -> None:
    parts = [some((n,), n) for n in (2, 3, 4)]
    folder = write_model(tmp_path, {f"p{i}": part for i, part in enumerate(parts)})
    pieces = named(folder, {"qkv": torch.from_numpy(np.concatenate(parts))}).pieces["qkv"]
    assert [(piece.name, piece.part) for piece in pieces] == [
        ("p0", (slice(0, 2),)),
        ("p1", (slice(2, 5),)),
        ("p2", (slice(5, 9),)),
    ]


def test_weights_that_the_file_lacks_are_refused(tmp_path: Path) -> None:
    folder = model("bert", tmp_path)
    tensors = {name: raw for name, raw in read_model(folder).items() if "layer.1.output.dense.weight" not in name}
    write_model(folder, tensors, json.loads((folder / "config.json").read_text()))
    with pytest.raises(CuveeError, match=r"layer\.1\.output\.dense\.weight"):
        open_network(str(folder))


def test_a_head_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    folder = model("bert", tmp_path)
    with pytest.raises(CuveeError, match="no weights for 'classifier"):
        open_network(str(folder), head="classification")
    with pytest.raises(CuveeError, match="'words' is no head"):
        open_network(str(folder), head="words")
    with pytest.raises(CuveeError, match="'int8' is no dtype"):
        open_network(str(folder), dtype="int8")


def test_what_a_folder_is_for(tmp_path: Path, minilm: Path) -> None:
    def head(folder: Path) -> str:
        with Checkpoint.open(folder) as checkpoint:
            return head_of(checkpoint)

    assert head(minilm) == "embedding"
    assert head(classifier(tmp_path / "1", 1)) == "regression"
    assert head(classifier(tmp_path / "3", 3)) == "classification"
    assert head(build("qwen3-embedding", tmp_path / "q").base) == "embedding"
    assert head(build("bert-mlm", tmp_path / "m").base) == "embedding"


def test_no_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "x", {"a": some((3,))}, {})
    with pytest.raises(CuveeError, match=r"no config\.json"):
        open_network(str(folder))
    with pytest.raises(CuveeError):
        open_network(str(tmp_path / "none"))


def test_vectors_equal_sentence_transformers(minilm: Path) -> None:
    network = open_network(str(minilm))
    texts = ["one", "a longer text about two things", "three"]
    module: Any = network.module
    with torch.no_grad():
        found = network.vectors(network.features(network.read(texts)))
    np.testing.assert_allclose(found.numpy(), module.encode(texts), atol=1e-6)


def test_prompts_stand_before_texts_and_pooling_may_leave_them_out(minilm: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    transformer = SentenceTransformer(str(minilm), prompts={"query": "ask for: ", "document": "told: "})
    transformer[1].include_prompt = False
    transformer.save(str(tmp_path / "prompts"))
    network = open_network(str(tmp_path / "prompts"))
    texts = ["one", "a longer text about two things"]
    with torch.no_grad():
        both = network.vectors(network.features([*network.read(texts, "query"), *network.read(texts, "document")]))
    np.testing.assert_allclose(both[:2].numpy(), transformer.encode_query(texts), atol=1e-6)
    np.testing.assert_allclose(both[2:].numpy(), transformer.encode_document(texts), atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_changes_no_logits(name: str, tmp_path: Path) -> None:
    network = open_network(str(model(name, tmp_path)))
    tokens = network.read(sentences(5))
    with torch.no_grad():
        together = network.logits(network.features(tokens))
        for row, own in zip(together, tokens, strict=True):
            alone = network.logits(network.features([own]))[0]
            np.testing.assert_allclose(row[: len(own)].numpy(), alone.numpy(), atol=1e-5)


def test_a_pair_is_read_as_one(tmp_path: Path) -> None:
    network = open_network(str(classifier(tmp_path, 2)))
    (pair,) = network.read([("w1 w2", "w3")])
    assert list(pair.sequence["input_ids"]) == [2, 5, 6, 3, 7, 3]


def test_a_language_model_reads_a_pair_as_two_lines_of_one_text(tmp_path: Path) -> None:
    network = open_network(str(model("llama", tmp_path)))
    pair, alone = network.read([("w1 w2", "w3"), "w1 w2\nw3"])
    assert list(pair.sequence["input_ids"]) == list(alone.sequence["input_ids"]) == [2, 5, 6, 7, 3]


def test_answers_stand_after_their_question_which_is_cut(tmp_path: Path) -> None:
    network = open_network(str(model("llama", tmp_path)), max_length=6)
    short, long, longest = network.read_answers([("w1 w2", "w3"), ("w1 w2 w3 w4", "w5 w6"), ("w1", "w2 " * 9)])
    assert (list(short.sequence["input_ids"]), short.prompt) == ([2, 5, 6, 7, 3], 3)
    assert (list(long.sequence["input_ids"]), long.prompt) == ([2, 5, 6, 9, 10, 3], 3)
    assert (list(longest.sequence["input_ids"]), longest.prompt) == ([2, 6, 6, 6, 6, 6], 1)


def test_texts_are_cut(tmp_path: Path) -> None:
    folder = model("llama", tmp_path)
    assert [len(each) for each in open_network(str(folder), max_length=4).read(["w1 " * 30, "w1"])] == [4, 3]
    assert len(open_network(str(folder), max_length=4000).read(["w1 " * 30])[0]) == 20  # its tokenizer's limit


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft calls it
def test_an_adapter_is_merged_in_first(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = model("llama", tmp_path / "m")
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), peft.LoraConfig(target_modules=["q_proj"])
    )
    for name, own in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(own)
    adapted.save_pretrained(tmp_path / "adapter")
    network = open_network(f"{base}+{tmp_path / 'adapter'}")
    features = network.features(network.read(["w1 w2 w3"]))
    with torch.no_grad():
        np.testing.assert_allclose(network.logits(features), adapted(**features).logits, atol=1e-5)
    assert set(network.names.values()) == set(stored(base))


def test_a_missing_device_and_tokenizer_are_told_in_one_line(tmp_path: Path) -> None:
    folder = model("bert", tmp_path / "a")
    with pytest.raises(CuveeError, match="cannot be used"):
        open_network(str(folder), device="cuda:99")
    bare = build("llama", tmp_path / "b").base
    with pytest.raises(CuveeError, match="cannot be loaded for its lm head"):
        open_network(str(bare))
    with_tokenizer(bare)
    assert open_network(str(bare)).head == "lm"
