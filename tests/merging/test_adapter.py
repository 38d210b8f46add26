"""`model+adapter` against peft's own `merge_and_unload`, on real architectures of toy size."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import merging.lowrank
from merging.adapter import Adapter
from merging.checkpoint import Checkpoint
from merging.errors import CheckpointError, CuveeError, MergeError
from merging.lowrank import read_rows

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft, torch and transformers while they train and save

TEXT = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**changes: Any) -> Any:
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=1, **changes)
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**TEXT, max_position_embeddings=8))


def bert_classifier() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, max_position_embeddings=8))


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=48, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=8,
        max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperModel(config)


ATTENTION = ["q_proj", "v_proj"]
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (llama, {"target_modules": [*ATTENTION, "o_proj", "down_proj"]}),
    "llama, rsLoRA, patterns": (
        llama,
        {
            "target_modules": [*ATTENTION, "o_proj"],
            "use_rslora": True,
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "llama, DoRA": (llama, {"target_modules": [*ATTENTION, "up_proj"], "use_dora": True}),
    "llama, embedding": (lambda: llama(tie_word_embeddings=False), {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama, embedding, tied": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens"]}),
    "llama, embedding, DoRA": (lambda: llama(), {"target_modules": ["embed_tokens"], "use_dora": True}),
    "llama, head": (lambda: llama(tie_word_embeddings=False), {"target_modules": ["lm_head", "q_proj"]}),
    "llama, whole modules": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]}),
    "bert": (bert, {"target_modules": ["query", "value", "dense"]}),
    "bert, all biases": (bert, {"target_modules": ["query"], "bias": "all"}),
    "bert, biases of LoRA layers": (bert, {"target_modules": ["query"], "bias": "lora_only"}),
    "bert, bias of B": (bert, {"target_modules": ["query", "value"], "lora_bias": True}),
    "bert, task head": (bert_classifier, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2, square only": (gpt2, {"target_modules": r".*attn\.c_proj", "fan_in_fan_out": True}),
    "gpt2, DoRA": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "whisper, convolutions": (whisper, {"target_modules": ["conv1", "conv2", "k_proj"]}),
    "whisper, convolutions, DoRA": (whisper, {"target_modules": ["conv1", "fc1"], "use_dora": True}),
}


def trained(folder: Path, model: Any, **settings: Any) -> dict[str, np.ndarray]:
    """Saves base and adapter under `folder`, every weight of the adapter random; returns what peft merges them to."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(folder / "adapter")
    adapted = peft.PeftModel.from_pretrained(type(model).from_pretrained(folder / "base"), folder / "adapter")
    return {name: tensor.float().numpy() for name, tensor in adapted.merge_and_unload().state_dict().items()}


def opened(folder: Path) -> tuple[Checkpoint, Adapter]:
    base = Checkpoint.open(folder / "base")
    return base, Adapter.open(folder / "adapter", base)


def in_chunks(base: Checkpoint, adapter: Adapter, name: str, rows: int) -> np.ndarray:
    """The merged tensor, made `rows` rows at a time."""
    info = adapter.replacements.get(name, base.tensors[name])
    correction = adapter.corrections[name]
    chunks = []
    for first in range(0, info.shape[0], rows):
        chunk = read_rows(base, info, first, min(rows, info.shape[0] - first))
        assert chunk.shape[1] == correction.columns
        correction.apply(chunk, first)
        chunks.append(chunk)
    return np.concatenate(chunks).reshape(info.shape)


@pytest.mark.parametrize("case", CASES)
def test_adapter_equals_peft_merge_and_unload(tmp_path: Path, case: str) -> None:
    build, settings = CASES[case]
    expected = trained(tmp_path, build(), **settings)
    base, adapter = opened(tmp_path)
    assert adapter.corrections or adapter.replacements
    changed = 0
    for name in base.tensors:
        merged = adapter.read(base, name)
        np.testing.assert_allclose(merged, expected[name], rtol=2e-6, atol=1e-6, err_msg=name)
        changed += not np.array_equal(merged, base.read(base.tensors[name]))
    assert changed == len({*adapter.corrections, *adapter.replacements})


@pytest.mark.parametrize("case", ["llama", "llama, DoRA", "llama, embedding, DoRA", "bert, bias of B", "gpt2, DoRA"])
def test_chunking_changes_no_bit(tmp_path: Path, case: str) -> None:
    build, settings = CASES[case]
    trained(tmp_path, build(), **settings)
    base, adapter = opened(tmp_path)
    for name in adapter.corrections:
        whole = in_chunks(base, adapter, name, 1 << 20)
        for rows in (1, 2, 3, 7, 16):
            np.testing.assert_array_equal(in_chunks(base, adapter, name, rows), whole, err_msg=f"{name}, {rows} rows")


def test_threads_share_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging.lowrank, "_CACHE_BYTES", 1)  # every other tensor drops the one before
    monkeypatch.setattr(merging.lowrank, "_BLOCK_ELEMENTS", 40)
    build, settings = CASES["llama, DoRA"]
    expected = trained(tmp_path, build(), **settings)
    base, adapter = opened(tmp_path)
    got: dict[str, np.ndarray] = {}

    def work(names: list[str]) -> None:
        for name in names:
            got[name] = in_chunks(base, adapter, name, 3)

    names = sorted(adapter.corrections)
    workers = [threading.Thread(target=work, args=(names[start::3],)) for start in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for name in names:
        np.testing.assert_allclose(got[name], expected[name], rtol=2e-6, atol=1e-6, err_msg=name)


def test_prefixes_that_one_side_lacks_are_bridged(tmp_path: Path) -> None:
    expected = trained(tmp_path, llama(), target_modules=ATTENTION)
    bare = {
        name.removeprefix("model."): value for name, value in load_file(tmp_path / "base/model.safetensors").items()
    }
    (tmp_path / "bare").mkdir()
    save_file(bare, tmp_path / "bare/model.safetensors")
    (tmp_path / "nested/0_Transformer").mkdir(parents=True)
    save_file(bare, tmp_path / "nested/0_Transformer/model.safetensors")
    modules = [{"path": "0_Transformer"}, {"path": "1_Pooling"}]
    (tmp_path / "nested/modules.json").write_text(json.dumps(modules))
    (tmp_path / "short").mkdir()
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    save_file(
        {name.replace("base_model.model.model.", "base_model.model."): value for name, value in weights.items()},
        tmp_path / "short/adapter_model.safetensors",
    )
    (tmp_path / "short/adapter_config.json").write_bytes((tmp_path / "adapter/adapter_config.json").read_bytes())

    for base_name, adapter_name, part in [
        ("bare", "adapter", ""), ("nested", "adapter", "0_Transformer/"), ("base", "short", "model."),
    ]:  # fmt: skip
        base = Checkpoint.open(tmp_path / base_name)
        adapter = Adapter.open(tmp_path / adapter_name, base)
        assert len(adapter.corrections) == 4
        name = f"{part}layers.1.self_attn.q_proj.weight"
        np.testing.assert_allclose(
            adapter.read(base, name), expected["model.layers.1.self_attn.q_proj.weight"], rtol=2e-6, atol=1e-6
        )


def test_a_base_in_bfloat16_is_corrected_in_float32(tmp_path: Path) -> None:
    trained(tmp_path, llama(), target_modules=["q_proj"], use_dora=True)
    weights = load_file(tmp_path / "base/model.safetensors")
    save_file({name: value.bfloat16() for name, value in weights.items()}, tmp_path / "base/model.safetensors")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    base, adapter = opened(tmp_path)
    for name in adapter.corrections:
        np.testing.assert_allclose(adapter.read(base, name), merged[name].numpy(), rtol=2e-6, atol=1e-6)


def test_a_head_that_the_base_lacks_is_an_addition(tmp_path: Path) -> None:
    trained(tmp_path, bert_classifier(), target_modules=["query"], task_type="SEQ_CLS")
    weights = load_file(tmp_path / "base/model.safetensors")
    bare = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    save_file(bare, tmp_path / "base/model.safetensors")
    base, adapter = opened(tmp_path)
    assert set(adapter.additions) == {"classifier.weight", "classifier.bias"}
    assert adapter.read(base, "classifier.weight").shape == (2, 16)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and a plain adapter for it, to be damaged in copies."""
    folder = tmp_path_factory.mktemp("plain")
    trained(folder, llama(), target_modules=ATTENTION)
    return folder


def damaged(plain: Path, tmp_path: Path, weights: dict[str, Any] | None = None, **config: Any) -> None:
    """Copies the pair with keys of adapter_config.json set and tensors added, or removed where None."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "base").symlink_to(plain / "base")
    settings = json.loads((plain / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**settings, **config}))
    tensors = {**load_file(plain / "adapter/adapter_model.safetensors"), **(weights or {})}
    tensors = {name: value for name, value in tensors.items() if value is not None}
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "other types": ({}, {"peft_type": "IA3"}, "is a IA3 adapter, only LORA is merged exactly; merge it first"),
    "inits that change the base": ({}, {"init_lora_weights": "pissa_niter_4"}, "changed the base when training"),
    "replicated layers": ({}, {"layer_replication": [[0, 2]]}, "repeats layers of its base"),
    "bare parameters": ({}, {"target_parameters": ["experts.down_proj"]}, "bare parameters"),
    "another rank": ({}, {"r": 8}, "has rank 4, adapter_config.json says 8"),
    "rank 0": ({}, {"r": 0}, "is 0"),
    "no number": ({}, {"lora_alpha": "x"}, "lora_alpha is 'x', not a number"),
    "a bad pattern": ({}, {"rank_pattern": {"(": 2}}, "is no regular expression"),
    "half a pair": ({f"{Q0}.lora_B.weight": None}, {}, "has only lora_A; save it again"),
    "no magnitude": ({}, {"use_dora": True}, "has no lora_magnitude_vector"),
    "nothing fits": (
        {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)},
        {},
        "layers.7.self_attn.q_proj.lora_A.weight' fits no tensor of",
    ),
    "two fit": (
        {"base_model.model.q_proj.lora_A.weight": torch.ones(4, 16)},
        {},
        "'base_model.model.q_proj.lora_A.weight' fits 'model.layers.0.self_attn.q_proj.weight' and 'model.layers.1",
    ),
    "another shape": (
        {f"{Q0}.lora_A.weight": torch.ones(4, 17)},
        {},
        f"'{Q0}.lora_A.weight' of shape [4, 17] does not fit 'model.layers.0.self_attn.q_proj.weight' of shape",
    ),
    "a resized vocabulary": (
        {"base_model.model.model.embed_tokens.weight": torch.ones(50, 16)},
        {},
        "of shape [50, 16] does not fit 'model.embed_tokens.weight' of shape [48, 16]; the vocabulary was resized",
    ),
    "an unsharded save": ({f"{Q0}.lora_A.weight": torch.ones(0)}, {}, "has the shape [0]; it was saved from a sharded"),
    "an unknown factor": ({f"{Q0}.lora_C.weight": torch.ones(4)}, {}, "belongs to no kind of LoRA known here"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_merged_is_refused_in_one_line(plain: Path, tmp_path: Path, what: str) -> None:
    weights, config, message = REFUSED[what]
    damaged(plain, tmp_path, weights, **config)
    with pytest.raises(CuveeError) as caught:
        opened(tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "adapter"))
    assert "\n" not in str(caught.value)


def test_prefixes_must_agree(plain: Path, tmp_path: Path) -> None:
    weights = {"base_model.model.norm.weight": torch.ones(16), "base_model.model.x.lm_head.weight": torch.ones(48, 16)}
    damaged(plain, tmp_path, weights, modules_to_save=["norm", "lm_head"])
    with pytest.raises(MergeError, match="by another prefix"):
        opened(tmp_path)


def test_a_head_tied_to_the_embedding_cannot_be_adapted(plain: Path, tmp_path: Path) -> None:
    head = "base_model.model.lm_head.lora_A.weight"
    damaged(plain, tmp_path, {head: torch.ones(4, 16), head.replace("_A.", "_B."): torch.ones(48, 4)})
    (tmp_path / "base").unlink()
    weights = load_file(plain / "base/model.safetensors")
    (tmp_path / "base").mkdir()
    save_file({n: value for n, value in weights.items() if n != "lm_head.weight"}, tmp_path / "base/model.safetensors")
    with pytest.raises(MergeError, match=r"tied to the embedding"):
        opened(tmp_path)


def test_pickled_missing_and_empty_adapters_are_refused(plain: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(plain / "base")
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
        Adapter.open(tmp_path, base)
    (tmp_path / "adapter_config.json").write_bytes((plain / "adapter/adapter_config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors"):
        Adapter.open(tmp_path, base)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickled")
    with pytest.raises(CheckpointError, match=r"is pickled, .* convert it where you trust it"):
        Adapter.open(tmp_path, base)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        Adapter.open(tmp_path, base)
