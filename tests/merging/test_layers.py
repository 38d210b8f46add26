"""Positions and layer groups, told from tensor names."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.layers import fractions, group

PATIENT = settings(deadline=None)  # a busy machine is no failure

BERT = (
    "attention.self.query.weight",
    "attention.output.LayerNorm.bias",
    "intermediate.dense.weight",
    "output.dense.bias",
)
LLAMA = ("input_layernorm.weight", "self_attn.q_proj.weight", "mlp.up_proj.weight", "post_attention_layernorm.weight")


def layers(stack: str, count: int, tensors: tuple[str, ...]) -> list[str]:
    return [f"{stack}.{i}.{tensor}" for i in range(count) for tensor in tensors]


@PATIENT
@given(
    st.integers(2, 40),
    st.sampled_from(["encoder.layer", "model.layers", "h", "0.auto_model.encoder.layer", "x/layers"]),
)
def test_layer_i_of_L_is_at_i_over_L_minus_1(count: int, stack: str) -> None:
    positions = fractions(layers(stack, count, LLAMA))
    assert positions == {f"{stack}.{i}.{tensor}": i / (count - 1) for i in range(count) for tensor in LLAMA}


def test_a_single_layer_is_at_1_as_in_mergekit() -> None:
    assert set(fractions(layers("encoder.layer", 1, BERT)).values()) == {1.0}


def test_layers_count_by_their_largest_index_also_where_some_are_not_there() -> None:
    names = [name for name in layers("h", 9, LLAMA) if not name.startswith(("h.0.", "h.5."))]
    assert fractions(names)["h.6.mlp.up_proj.weight"] == 6 / 8


@pytest.mark.parametrize(
    "name",
    [
        *(
            "embeddings.word_embeddings.weight",
            "bert.embeddings.LayerNorm.bias",
            "model.embed_tokens.weight",
            "wte.weight",
        ),
        *("transformer.wpe.weight", "shared.weight", "encoder.embed_tokens.weight", "visual.patch_embed.proj.weight"),
        *("vision_model.pre_layrnorm.weight", "vision_model.embeddings.class_embedding", "model.encoder.conv1.weight"),
        *("model.encoder.conv2.bias", "model.encoder.embed_positions.weight", "encoder.relative_attention_bias.weight"),
        *("visual.positional_embedding", "embeddings.token_type_embeddings.weight", "visual.ln_pre.weight"),
        *("feature_extractor.conv_layers.0.conv.weight", "0_WordEmbeddings/emb_layer.weight"),
    ],
)
def test_what_reads_the_input_is_at_0_and_called_embeddings(name: str) -> None:
    assert fractions([*layers("encoder.layer", 4, BERT), name])[name] == 0.0
    if "conv_layers" not in name:
        assert group(name) == "embeddings"


@pytest.mark.parametrize(
    ("name", "called"),
    [
        *(("pooler.dense.weight", "pooler"), ("model.norm.weight", "norm"), ("transformer.ln_f.bias", "norm")),
        *(("lm_head.weight", "head"), ("encoder.final_layer_norm.weight", "norm"), ("proj_out.weight", "head")),
        *(("vision_model.post_layernorm.weight", "norm"), ("text_projection.weight", "head"), ("logit_scale", "head")),
        *(
            ("cls.predictions.transform.LayerNorm.weight", "head"),
            ("score.weight", "head"),
            ("embed_out.weight", "head"),
        ),
        *(("classifier.0.weight", "head"), ("classifier.3.bias", "head"), ("visual.merger.mlp.2.weight", "head")),
        *(("visual.deepstack_merger_list.1.norm.weight", "head"), ("patch_merger.merging_layer.weight", "head")),
        *(("2_Dense/linear.weight", "2_Dense"), ("model.encoder.layer_norm.weight", "norm"), ("0.weight", "head")),
    ],
)
def test_what_follows_the_layers_is_at_1(name: str, called: str) -> None:
    assert fractions([*layers("encoder.layer", 4, BERT), name])[name] == 1.0
    assert group(name) == called


def test_encoder_and_decoder_are_stacks_of_their_own() -> None:
    names = layers("encoder.block", 3, ("layer.0.SelfAttention.q.weight", "layer.1.DenseReluDense.wi.weight"))
    names += layers("decoder.block", 5, ("layer.0.SelfAttention.q.weight", "layer.1.EncDecAttention.q.weight"))
    positions = fractions(names)
    assert positions["encoder.block.1.layer.1.DenseReluDense.wi.weight"] == 1 / 2
    assert positions["decoder.block.1.layer.0.SelfAttention.q.weight"] == 1 / 4


def test_vision_tower_and_language_model_are_stacks_of_their_own() -> None:
    positions = fractions(
        layers("visual.blocks", 3, ("norm1.weight", "mlp.fc1.weight")) + layers("model.layers", 5, LLAMA)
    )
    assert positions["visual.blocks.2.norm1.weight"] == 1.0
    assert positions["model.layers.2.mlp.up_proj.weight"] == 0.5


def test_an_expert_belongs_to_its_layer() -> None:
    experts = tuple(f"mlp.experts.{e}.w1.weight" for e in range(8))
    positions = fractions(layers("model.layers", 4, (*LLAMA, *experts)))
    assert positions["model.layers.3.mlp.experts.5.w1.weight"] == 1.0
    assert positions["model.layers.1.mlp.experts.7.w1.weight"] == 1 / 3
    assert group("model.layers.3.mlp.experts.5.w1.weight") == "model.layers.3"


def test_a_hybrid_of_several_kinds_of_layers_is_one_stack() -> None:
    kinds = (
        ("norm.weight", "mamba.A_log"),
        ("norm.weight", "attn.q.weight"),
        ("norm.weight", "moe.experts.0.w.weight"),
    )
    names = [f"layers.{i}.{tensor}" for i in range(9) for tensor in kinds[i % 3]]
    assert fractions(names) == {name: int(name.split(".")[1]) / 8 for name in names}


def test_bare_modules_in_a_row_are_no_layers() -> None:
    names = [*layers("encoder.layer", 2, BERT), "fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"]
    assert {name: t for name, t in fractions(names).items() if name.startswith("fc")} == dict.fromkeys(names[-4:], 1.0)


def test_a_list_that_holds_one_list_is_passed_by_for_the_inner_one() -> None:
    positions = fractions(layers("encoder.towers.0.model.layers", 3, ("attention.query.weight", "ffn.weight")))
    assert positions["encoder.towers.0.model.layers.1.ffn.weight"] == 0.5


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("encoder.layer.3.output.dense.weight", "encoder.layer.3"),
        ("0.auto_model.encoder.layer.11.output.dense.weight", "0.auto_model.encoder.layer.11"),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "encoder.block.0"),
        ("h.0.ln_1.weight", "h.0"),
        ("0_Transformer/layers.4.mlp.weight", "0_Transformer/layers.4"),
    ],
)
def test_a_layers_group_is_its_stack_and_index(name: str, called: str) -> None:
    assert group(name) == called


@PATIENT
@given(st.lists(st.text(alphabet="ab.01/_", max_size=12), max_size=20))
def test_any_names_get_a_position_in_0_to_1_in_any_order(names: list[str]) -> None:
    positions = fractions(names)
    assert set(positions) == set(names)
    assert all(0 <= t <= 1 for t in positions.values())
    assert positions == fractions(reversed(names))
    assert all(group(name) for name in names)


def test_ten_thousand_experts_take_a_fraction_of_a_second() -> None:
    experts = tuple(f"mlp.experts.{e}.{w}.weight" for e in range(128) for w in ("gate", "up"))
    names = layers("model.layers", 40, (*LLAMA, *experts))
    start = time.perf_counter()
    fractions(names)
    assert time.perf_counter() - start < 3  # 0.1 on an idle machine
