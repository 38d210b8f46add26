"""Merges that mergekit runs for us, and which those are."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merging import handover
from merging.checkpoint import Checkpoint
from merging.errors import CuveeError, RecipeError
from merging.mergekit_recipe import is_mixture, references
from merging.recipe import Recipe

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("mergekit")
from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and tokenizers, where the models are made

WORDS = ["[UNK]", "<s>", "</s>", "a", "b", "c", "d", "e"]
LINEAR = """merge_method: linear
models:
- {{model: a, parameters: {{weight: 0.5}}}}
- {{model: {other}, parameters: {{weight: 0.5}}}}
"""
STACKED = """merge_method: passthrough
slices:
- sources: [{model: b, layer_range: [0, 2]}]
- sources: [{model: a, layer_range: [1, 3]}]
dtype: float32
"""
MIXTURE = """base_model: a
experts:
- {source_model: a, positive_prompts: [a b]}
- {source_model: b, positive_prompts: [c d]}
gate_mode: hidden
dtype: float32
"""


def tokenizer(folder: Path, words: list[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def llama(folder: Path, seed: int, words: list[str]) -> None:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(folder, words)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llamas a and b, c with two words more, and a BERT."""
    folder = tmp_path_factory.mktemp("zoo")
    llama(folder / "a", 0, WORDS)
    llama(folder / "b", 1, WORDS)
    llama(folder / "c", 2, [*WORDS, "f", "g"])
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.BertModel(config).save_pretrained(folder / "bert")
    return folder


@pytest.fixture
def merged(zoo: Path, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], dict[str, Any], list[str]]]:
    """Runs a recipe and finishes it: (tensors, config, notes). The folder is tmp_path/out."""

    def run(text: str, **options: Any) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        notes = handover.run(text, out, where="recipe.yml", relative_to=zoo, **options)
        donor = Checkpoint.open(references(text, relative_to=zoo)[0], relative_to=zoo)
        notes += handover.finish(out, donor)
        return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text()), notes

    return run


def test_passthrough_stacks_layers(zoo: Path, tmp_path: Path, merged: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, config, notes = merged(STACKED)
    a, b = (load_file(zoo / name / "model.safetensors") for name in "ab")
    norm = "model.layers.{}.input_layernorm.weight"
    up = "model.layers.{}.mlp.up_proj.weight"
    for position, (model, layer) in enumerate([(b, 0), (b, 1), (a, 1), (a, 2)]):
        for name in (norm, up):
            assert torch.equal(tensors[name.format(position)], model[name.format(layer)])
    assert config["num_hidden_layers"] == 4
    assert notes == []
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    assert capsys.readouterr().out == ""
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == 8


def test_a_union_of_vocabularies_makes_room_for_all_words(zoo: Path, tmp_path: Path, merged: Any) -> None:
    text = LINEAR.format(other="c") + "tokenizer: {source: union}\n"
    tensors, config, notes = merged(text)
    assert config["vocab_size"] == 10
    assert tensors["model.embed_tokens.weight"].shape == (10, 16)
    assert notes == ["mergekit computes in the models' own dtype where the recipe has no 'dtype'"]
    known = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert set(known) == {*WORDS, "f", "g"}
    c = load_file(zoo / "c/model.safetensors")["model.embed_tokens.weight"]
    assert torch.allclose(tensors["model.embed_tokens.weight"][known["g"]], c[9])


def test_a_mixture_of_experts_is_run_by_the_same_command(zoo: Path, tmp_path: Path, merged: Any) -> None:
    assert is_mixture(MIXTURE)
    assert not is_mixture(STACKED)
    tensors, config, notes = merged(MIXTURE)
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["num_local_experts"] == 2
    assert notes == []
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    _, _, notes = merged(MIXTURE.replace("hidden", "random"))
    assert notes == ["the gates are random: the mixture is of no use before it is trained"]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_adapter_is_merged_on_the_way(zoo: Path, tmp_path: Path, merged: Any) -> None:
    peft = pytest.importorskip("peft")
    model = transformers.LlamaForCausalLM.from_pretrained(zoo / "b")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.merge_and_unload().state_dict()
    tensors, _, _ = merged(STACKED.replace("model: b", f"model: b+{tmp_path / 'adapter'}"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(tensors[name], expected[name], atol=1e-6)
    assert not (tmp_path / "out/.lora").exists()


def test_a_run_leaves_no_trace_in_the_process(zoo: Path, tmp_path: Path, merged: Any) -> None:
    shutil.copytree(zoo / "b", tmp_path / "b")
    text = STACKED.replace("model: b", f"model: {tmp_path / 'b'}")
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state(), torch.get_num_threads()
    first, _, _ = merged(text, seed=5, threads=1)
    assert random.getstate() == states[0]
    assert str(np.random.get_state()) == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.get_num_threads() == states[3]
    # mergekit keeps files open by their path: a model that has changed since must be read anew.
    weights = load_file(tmp_path / "b/model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, tmp_path / "b/model.safetensors")
    second, _, _ = merged(text, seed=5)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(second[name], weights[name] + 1)
    assert not torch.equal(second[name], first[name])


def test_what_sentence_transformers_needs_is_brought_after_mergekit(zoo: Path, tmp_path: Path, merged: Any) -> None:
    shutil.copytree(zoo / "b", tmp_path / "b")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    files = {
        "modules.json": modules, "1_Pooling/config.json": {"pooling_mode_lasttoken": True}, "2_Dense/config.json": {},
        "config_sentence_transformers.json": {"prompts": {"query": "q: "}}, "preprocessor_config.json": {},
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / "b" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "b" / name).write_text(json.dumps(content))
    (tmp_path / "b/vocab.txt").write_text("of the old tokenizer")
    save_file({"linear.weight": torch.ones(2, 16)}, tmp_path / "b/2_Dense/model.safetensors")
    _, config, notes = merged(STACKED.replace("model: b", f"model: {tmp_path / 'b'}"))
    assert config["num_hidden_layers"] == 4  # mergekit's config, not the donor's
    assert notes == ["mergekit does not merge '2_Dense': it is the donor's"]
    for name, content in files.items():
        assert json.loads((tmp_path / "out" / name).read_text()) == content
    assert not (tmp_path / "out/vocab.txt").exists()
    assert Checkpoint.open(tmp_path / "out").tensors["2_Dense/linear.weight"].shape == (2, 16)


REFUSED = {
    "a misspelt key": (
        STACKED.replace("layer_range: [1", "layer_rang: [1"),
        "recipe.yml:4: 'layer_rang' is no key of a source of a slice; did you mean 'layer_range'?",
    ),
    "a misspelt parameter": (
        STACKED + "parameters: {scal: 2}\n",
        "recipe.yml:6: 'scal' is no parameter of 'passthrough' in mergekit; did you mean 'scale'?",
    ),
    "a wrong value": (STACKED.replace("[1, 3]", "[1]"), "recipe.yml:4: slices.1.sources.0.layer_range"),
    "too many layers": (STACKED.replace("[1, 3]", "[1, 9]"), "in model {zoo}/a; check 'layer_range'"),
    "no such method": (STACKED.replace("passthrough", "passthru"), "recipe.yml:1: no method 'passthru'; did you mean"),
    "BertModel": (STACKED.replace("model: b", "model: bert").replace("model: a", "model: bert"), "cannot take this"),
    "two architectures": (STACKED.replace("model: b", "model: bert"), "name models of one architecture"),
    "an expert without prompts": (MIXTURE.replace(", positive_prompts: [c d]", ""), "Expert 1 has no positive prompts"),
    "a misspelt key of an expert": (
        MIXTURE.replace("{source_model: b", "{model: b"),
        "recipe.yml:4: 'model' is no key of an expert",
    ),
    "a list that is none": (MIXTURE.replace("experts:\n", "shared_experts: 3\nexperts:\n"), "must be a list, not '3'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_mistakes_are_told_in_one_line(zoo: Path, merged: Any, what: str) -> None:
    text, message = REFUSED[what]
    with pytest.raises(CuveeError) as caught:
        merged(text)
    assert message.format(zoo=zoo) in str(caught.value)
    assert str(caught.value).startswith("recipe.yml")
    assert "\n" not in str(caught.value)


# Which merges are mergekit's.


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (STACKED, "it has slices"),
        ("merge_method: linear\nmodules: {default: {models: [{model: a}]}}\n", "it has modules"),
        (LINEAR.format(other="b").replace("linear", "passthrough"), "the method 'passthrough' is its own"),
        (LINEAR.format(other="b") + "tokenizer: {source: a, tokens: {a: {source: b}}}\n", "it gives tokens"),
        (LINEAR.format(other="b") + "tokenizer: {pad_to_multiple_of: 8}\n", "it pads the vocabulary"),
        (LINEAR.format(other="c") + "tokenizer: {source: union}\n", "the vocabularies of a and c differ"),
        (LINEAR.format(other="c") + "tokenizer_source: a\n", "the vocabularies of a and c differ"),
        (LINEAR.format(other="b") + "tokenizer_source: c\n", "the vocabularies of a and c differ"),
        (LINEAR.format(other="c") + "base_model: a\ntokenizer_source: base\n", "the vocabularies of a and c differ"),
        (LINEAR.format(other="b") + "tokenizer: {source: union}\n", None),
        (LINEAR.format(other="b") + "tokenizer_source: b\n", None),
        (LINEAR.format(other="b") + "tokenizer: {source: {model: {path: b}}}\n", None),
        (LINEAR.format(other="b") + "base_model: a\ntokenizer: {source: base}\n", None),
        (LINEAR.format(other="c"), None),
    ],
)
def test_who_runs_a_recipe(zoo: Path, text: str, reason: str | None) -> None:
    recipe = Recipe.parse(text)
    got = handover.needs_mergekit(recipe, "passthrough" not in text, zoo)
    assert (got or "").startswith(reason or "")
    assert (got is None) == (reason is None)


def test_the_tokenizer_may_be_another_models(zoo: Path) -> None:
    def donor(end: str) -> Path | None:
        return handover.tokenizer_donor(Recipe.parse(LINEAR.format(other="b") + end), zoo)

    assert donor("") is None
    assert donor("tokenizer: {source: union}\n") is None
    assert donor("tokenizer_source: b\n") == (zoo / "b").resolve()
    assert donor("base_model: a\ntokenizer: {source: base}\n") == (zoo / "a").resolve()
    with pytest.raises(RecipeError, match=r"recipe:\d+: the tokenizer of the base, but no base; add 'base_model:'"):
        donor("tokenizer_source: base\n")


def test_mergekits_methods_are_known_without_importing_it() -> None:
    from mergekit.merge_methods import registry

    assert {method.spec.name for method in registry.registered_methods()} == handover.KNOWN_METHODS
    assert handover.has_method("passthrough")
    assert not handover.has_method("tiess")


def test_references_are_found_wherever_they_stand() -> None:
    text = """merge_method: linear
tokenizer:
  source: t
  tokens: {x: {source: u}, y: {source: {kind: model_token, model: v, token_id: 1}}, z: {source: {kind: zero}}}
slices:
- base_model: s
  sources: [{model: b+l, layer_range: [0, 1]}, {model: {model: {path: c, revision: r}}, layer_range: [0, 1]}]
"""
    assert [str(ref) for ref in references(text)] == ["b+l", "c@r", "s", "t", "u", "v"]
    assert str(references(text + "base_model: a\n")[0]) == "a"
    assert [str(ref) for ref in references(MIXTURE)] == ["a", "b"]
    assert [str(ref) for ref in references("merge_method: linear\nmodels: [x, {model: y}]\n")] == ["x", "y"]
