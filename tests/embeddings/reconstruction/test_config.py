"""What `cuvee pretrain` is told: defaults as published, stages that replace what is said above them, mistakes at their line."""

from __future__ import annotations

from pathlib import Path

import pytest

from embeddings.reconstruction.config import STAGES, PretrainingConfig, parse
from merging.errors import CuveeError

HEAD = "model: base\ndata:\n  - {file: pairs.jsonl}\n"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with what the configurations name."""
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    Path("pairs.jsonl").write_text("", encoding="utf-8")


def read(more: str = "", objective: str = "cocoa", head: str = HEAD) -> PretrainingConfig:
    return parse(head + more, objective, "config.yml")


def mistake(more: str, objective: str = "cocoa", head: str = HEAD) -> str:
    with pytest.raises(CuveeError) as caught:
        read(more, objective, head)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_settings_cocoa_is_the_published_one() -> None:
    warm_up, bridge = read().stages
    assert (warm_up.name, bridge.name) == STAGES["cocoa"]
    assert dict(warm_up.parameters) == {"mask": 0.2, "patches": 0.3, "patch_weight": 0.5}
    assert dict(bridge.parameters) == {"mask": 0.7, "eos_sees_b": True, "bridge": "attention"}
    assert warm_up.learning_rate == bridge.learning_rate == 2e-5
    assert bridge.reads == "query" and warm_up.epochs == 1 and warm_up.steps is None


def test_the_other_objectives_have_one_stage_told_above() -> None:
    (query_likelihood,) = read("corruption: 0.5\nloss_on: all\n", "llm-ql").stages
    assert dict(query_likelihood.parameters) == {"corruption": 0.5, "loss_on": "all"}
    assert query_likelihood.reads == "document" and query_likelihood.learning_rate == 1e-5
    (retromae,) = read("encoder_mask: 0.15\nlearning_rate: 1e-4\n", "retromae").stages
    assert dict(retromae.parameters) == {"encoder_mask": 0.15, "decoder_mask": 0.7, "encoder_weight": 1.0}
    assert retromae.learning_rate == 1e-4 and retromae.rate_where == "config.yml:5"


def test_a_stage_replaces_what_is_said_above_it() -> None:
    config = read("batch_size: 8\nsteps: 100\nwarm_up: {epochs: 2, batch_size: 4}\nbridge: {learning_rate: 1e-3}\n")
    warm_up, bridge = config.stages
    assert (warm_up.epochs, warm_up.steps, warm_up.batch_size) == (2.0, None, 4)
    assert (bridge.epochs, bridge.steps, bridge.batch_size) == (None, 100, 8)
    assert (warm_up.learning_rate, bridge.learning_rate) == (2e-5, 1e-3)


@pytest.mark.parametrize(("left_out", "left"), [("warm_up", "bridge"), ("bridge", "warm_up")])
def test_a_stage_can_be_left_out(left_out: str, left: str) -> None:
    assert [stage.name for stage in read(f"{left_out}: false\n").stages] == [left]


def test_what_a_run_is_known_by_does_not_change_with_what_comes_afterwards() -> None:
    one, other = read(), read("save_every: 7\ncontrastive: {steps: 3}\n")
    assert one.plain() == other.plain()
    assert one.plain() != read("seed: 1\n").plain()
    assert read().seeded(1).plain() == read("seed: 1\n").plain()


def test_the_contrastive_stage_takes_over_what_it_does_not_say() -> None:
    head = "model: {path: base, dtype: bfloat16, lora: {r: 4}}\ndata:\n  - {file: pairs.jsonl}\n"
    config = read("seed: 3\nmax_length: 24\ncontrastive: {steps: 5, batch_size: 16}\n", head=head)
    after = config.contrastive_of(Path("/somewhere/model"))
    assert after is not None and after.model.path == "/somewhere/model"
    assert (after.steps, after.batch_size, after.seed) == (5, 16, 3)
    assert after.max_length == {"query": 24, "document": 24} and after.data == config.data
    assert after.model.dtype == "bfloat16" and after.model.lora is not None and after.model.lora.r == 4
    again = config.seeded(9).contrastive_of(Path("/somewhere/model"))
    assert again is not None and again.seed == 9 and "seed: 9" in again.text
    own = read("contrastive: {steps: 5, model: {lora: {r: 8, alpha: 64}}}\n").contrastive
    assert own is not None and own.model.lora is not None and own.model.lora.alpha == 64


def test_the_contrastive_stages_text_is_a_configuration_of_its_own() -> None:
    from embeddings.training import config as training

    after = read("contrastive: {steps: 5, loss: {temperature: 0.1}}\n").contrastive_of(Path("base").absolute())
    assert after is not None
    again = training.parse(after.text, after.where)
    assert again.plain() | {"where": ""} == after.plain() | {"where": ""}


@pytest.mark.parametrize(
    ("more", "objective", "said"),
    [
        ("corruption: 0.5\n", "cocoa", "config.yml:4: 'corruption' is a setting of llm-ql; "),
        ("bridge: {}\n", "retromae", "config.yml:4: 'bridge' is a setting of cocoa; "),
        ("bridg: {}\n", "cocoa", "did you mean 'bridge'?"),
        (
            "seed: 1\nbridge: {masks: 0.5}\n",
            "cocoa",
            "config.yml:5: 'masks' is no key of 'bridge'; did you mean 'mask'?",
        ),
        ("bridge: {mask: 0}\n", "cocoa", "config.yml:4: 'mask' is 0; it must be greater than 0 and at most 1"),
        ("bridge: {bridge: embeddings}\n", "cocoa", "did you mean 'embedding'?"),
        ("bridge: {source: answer}\n", "cocoa", "'answer' is no choice for 'source'"),
        ("bridge: true\n", "cocoa", "config.yml:4: 'bridge' must be a mapping, not 'true'"),
        ("warm_up: false\nbridge: false\n", "cocoa", "config.yml:5: leaves out all of its stages"),
        ("warm_up: {steps: 3, epochs: 1}\n", "cocoa", "config.yml:4: 'epochs' and 'steps' exclude each other"),
        ("loss_on: document\n", "llm-ql", "config.yml:4: 'document' is no choice for 'loss_on'"),
        ("encoder_mask: 2\n", "retromae", "config.yml:4: 'encoder_mask' is 2"),
        ("attention: flash\n", "cocoa", "config.yml:4: 'flash' is no choice for 'attention'"),
        ("held_out: -1\n", "cocoa", "config.yml:4: 'held_out' is -1"),
        ("contrastive: 5\n", "cocoa", "config.yml:4: 'contrastive' must be a mapping, not '5'"),
        (
            "contrastive: {step: 5}\n",
            "cocoa",
            "config.yml:4: 'step' is no key of a configuration; did you mean 'steps'?",
        ),
        ("contrastive: {model: {path: base}}\n", "cocoa", "config.yml:4: 'path' is no key of the pre-trained model"),
        ("contrastive: {model: base}\n", "cocoa", "config.yml:4: 'model' must be a mapping"),
    ],
)
def test_a_mistake_is_told_with_its_line(more: str, objective: str, said: str) -> None:
    assert said in mistake(more, objective)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("data: [{file: pairs.jsonl}]\n", "has no 'model'"),
        ("model: base\n", "has no 'data'"),
        ("- base\n", "is no mapping"),
        ("model: ./nowhere\ndata: [{file: pairs.jsonl}]\n", "config.yml:1: no such model: ./nowhere"),
        ("model: {path: base, pooling: mean}\ndata: [{file: pairs.jsonl}]\n", "'pooling' follows from the objective"),
        ("model: base\ndata:\n  - file: pairs.jsonl\n    mine: {negatives: 2}\n", "config.yml:4: 'mine' means nothing"),
        ("model: base\ndata:\n  - file: pairs.jsonl\n    loss: infonce\n", "config.yml:4: 'loss' means nothing"),
    ],
)
def test_a_mistake_in_model_or_data_is_told_with_its_line(head: str, said: str) -> None:
    assert said in mistake("", head=head)


def test_data_that_both_stages_read_may_say_what_is_for_the_contrastive_one() -> None:
    head = "model: base\ndata:\n  - {file: pairs.jsonl, loss: {temperature: 0.1}}\n"
    config = read("contrastive: {steps: 2}\n", head=head)
    assert config.data[0].loss is None
    assert config.contrastive is not None and config.contrastive.data[0].loss is not None
    assert "'loss' means nothing" in mistake("contrastive: {steps: 2, data: [{file: pairs.jsonl}]}\n", head=head)
