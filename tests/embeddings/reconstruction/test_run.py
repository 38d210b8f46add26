"""`cuvee pretrain` from a YAML to an embedding model: what it leaves, that it learns, killed anywhere, misused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embeddings.reconstruction.config import load
from embeddings.reconstruction.example import Example
from embeddings.reconstruction.measure import embed
from embeddings.reconstruction.model import open_reconstructor
from embeddings.reconstruction.run import plan, pretrain_run
from embeddings.training.config import ModelSettings
from embeddings.training.options import Options
from merging.errors import CuveeError
from tests import commands
from tests.embeddings.reconstruction import models
from tests.embeddings.reconstruction.models import texts
from tests.embeddings.reconstruction.runs import ROWS, losses, metrics, rows, write_config
from tests.embeddings.runs import same_weights, table
from tests.merging.test_reliability import refused

SHORT = "save_every: 2\nmeasure_every: 3\nwarm_up: {steps: 4}\nbridge: {steps: 5}\n"
OBJECTIVES = {"cocoa": "warm_up: {steps: 2}\nbridge: {steps: 2}\n", "llm-ql": "steps: 2\n", "retromae": "steps: 2\n"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A configuration, and in `run` what comes of it when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("pretrain")
    done = commands.run("pretrain", "cocoa", write_config(folder, SHORT), folder / "run", "--json")
    assert done.code == 0, done.err
    assert done.out.count("\n") == 1
    yield folder
    shutil.rmtree(folder)


def run_of(place: Path, more: str, objective: str = "cocoa", name: str = "run", **options: Any) -> Path:
    config = load(write_config(place, more, name=f"{name}.yml"), objective)
    pretrain_run(config, place / name, options=Options(**options))
    return place / name


# ---- what it leaves ----


def test_a_run_leaves_what_the_page_says(place: Path) -> None:
    run = place / "run"
    there = {file.name for file in run.iterdir() if not file.name.startswith(".")}
    assert there == {
        "config.yml",
        "curves.svg",
        "cuvee.json",
        "data",
        "language_model",
        "metrics.jsonl",
        "model",
        "stages",
    }
    assert {stage.name for stage in (run / "stages").iterdir()} == {"warm_up", "bridge"}
    assert same_weights(run / "stages" / "bridge", run / "language_model")
    assert not same_weights(run / "stages" / "warm_up", run / "language_model")
    past = json.loads((run / "cuvee.json").read_text("utf-8"))
    assert past["state"] == "done" and past["steps"] == 9 and past["cost"] == 72
    assert past["members"].keys() == {"warm_up", "bridge"} and past["data"]["pairs"]["rows"] == ROWS
    for key in ("command", "out", "seconds", "seed", "device", "cuvee_version", "pairs_per_second", "loss", "cost"):
        assert key in past, key
    assert past["held_out"]["rank"] > 1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_plain_sentence_transformers_gives_the_vectors_that_training_saw(objective: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    run = run_of(tmp_path, OBJECTIVES[objective], objective)
    model = open_reconstructor(ModelSettings(str(run / "language_model")))
    reader = model.reader({"source": 12, "target": 12})
    some = [*texts(5, seed=9), "w7 " * 30]
    with torch.inference_mode():
        ours = embed(
            model,
            [Example(ids) for ids in reader.ids(some)],
            reader,
            "causal" if objective == "llm-ql" else "bidirectional",
        ).numpy()
    theirs = SentenceTransformer(str(run / "model"), device="cpu").encode(some)
    np.testing.assert_allclose(theirs, ours, atol=2e-6)
    config = json.loads((run / "model" / "config.json").read_text("utf-8"))
    assert config.get("is_causal", True) is (objective == "llm-ql")
    card = (run / "model" / "README.md").read_text("utf-8")
    assert ('"transformers>=5.2"' in card) is (objective != "llm-ql") and 'SentenceTransformer("model")' in card


def test_the_language_model_loads_as_one(place: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "run" / "language_model")
    ids = AutoTokenizer.from_pretrained(place / "run" / "language_model")("w7 w8", return_tensors="pt")
    assert model(ids["input_ids"]).logits.shape[:2] == (1, 3)


def test_the_metrics_tell_both_stages_in_one_count(place: Path) -> None:
    lines = metrics(place / "run")
    told = [(line["step"], line["stage"]) for line in lines if "loss" in line]
    assert told == [(4, "warm_up"), (9, "bridge")]
    measured = [(line["step"], line["stage"]) for line in lines if "held_out" in line]
    assert measured == [(0, "warm_up"), (3, "warm_up"), (4, "warm_up"), (4, "bridge"), (7, "bridge"), (9, "bridge")]
    last = lines[-1]["held_out"]
    assert {"loss", "entropy", "accuracy", "exact", "blind_accuracy", "blind_exact"} <= last.keys()
    assert {"rank", "rank_centred", "alignment", "uniformity"} <= last.keys()


# ---- that it learns ----


def test_the_bridge_teaches_a_model_to_tell_texts_again_from_eos_alone(tmp_path: Path) -> None:
    data = [{"query": f"w{7 + i} w{9 + i}", "positive": f"w{7 + i}"} for i in range(8)] * 12
    write_config(tmp_path)
    table(tmp_path / "easy.jsonl", data)
    more = "warm_up: false\nbridge: {steps: 90, learning_rate: 1.0e-2}\n"
    file = write_config(tmp_path, more, "  - {file: easy.jsonl}\n")
    # rows are copies of each other, so none can be held out: measured on the way instead
    file.write_text(file.read_text("utf-8").replace("held_out: 6", "held_out: 0"), encoding="utf-8")
    config = load(file, "cocoa")
    pretrain_run(config, tmp_path / "run")
    (lines,) = [losses(tmp_path / "run", "bridge")]
    assert lines[0] > 2 and lines[-1] < 0.2
    assert metrics(tmp_path / "run")[-1]["accuracy"] > 0.95


def test_micro_batches_are_the_whole_batch(tmp_path: Path) -> None:
    """Without randomness: everything masked, no dropout."""
    more = "warm_up: false\nbridge: {steps: 3, mask: 1%s}\n"
    whole = run_of(tmp_path, more % "", name="whole")
    parts = run_of(tmp_path, more % ", micro_batch: 3", name="parts")
    np.testing.assert_allclose(losses(parts, "bridge"), losses(whole, "bridge"), rtol=1e-5)
    packed = run_of(tmp_path, more % ", pack: 32", name="packed")
    np.testing.assert_allclose(losses(packed, "bridge"), losses(whole, "bridge"), rtol=1e-5)


def test_texts_of_one_token_teach_nothing_and_do_no_harm(tmp_path: Path) -> None:
    """Their tokenizer puts no BOS before them, so nothing predicts them."""
    write_config(tmp_path)
    models.tokenizer(bos=False).save_pretrained(tmp_path / "llama")
    table(
        tmp_path / "short.jsonl",
        [{"query": f"w{7 + i}", "positive": f"w{8 + i} w9" * (i % 2) or "w7"} for i in range(24)],
    )
    more = "bridge: false\nwarm_up: {epochs: 1, batch_size: 4, micro_batch: 1}\n"
    config = load(write_config(tmp_path, more, "  - {file: short.jsonl}\n"), "cocoa")
    pretrain_run(config, tmp_path / "run")
    assert all(np.isfinite(loss) for loss in losses(tmp_path / "run", "warm_up"))


def test_rows_without_a_token_stop_no_run(tmp_path: Path) -> None:
    """They are left out where the data is read, and told of in a line."""
    wordless = [{"query": "</s>", "positive": "w9"}, {"query": "w8", "positive": "</s> </s>"}]
    for objective, more in OBJECTIVES.items():
        file = write_config(tmp_path, more, name=f"{objective}.yml")
        table(tmp_path / "pairs.jsonl", [*rows(20), *wordless, *rows(40)[20:]])
        told: list[str] = []
        result = pretrain_run(load(file, objective), tmp_path / objective, note=told.append)
        assert np.isfinite(result["loss"]) and "rank" in result["held_out"]
        noted = "pairs: 2 of 42 rows have a text without a token and are left out, first row 21, '</s>'"
        assert told.count(noted) == 1


def test_lora_is_merged_into_what_is_written(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    file = write_config(tmp_path, SHORT)
    text = file.read_text("utf-8").replace("model: llama", "model: {path: llama, lora: {r: 2}, dtype: bfloat16}")
    file.write_text(text, encoding="utf-8")
    pretrain_run(load(file, "cocoa"), tmp_path / "run")
    for part in ("stages/warm_up", "language_model", "model"):
        config = json.loads((tmp_path / "run" / part / "config.json").read_text("utf-8"))
        assert config["model_type"] == "llama" and not list((tmp_path / "run" / part).glob("adapter*"))
    assert not same_weights(tmp_path / "run" / "stages" / "warm_up", tmp_path / "run" / "language_model")


def test_the_contrastive_stage_trains_the_result(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    more = "warm_up: {steps: 2}\nbridge: false\ncontrastive: {batch_size: 8, steps: 2, core: 0}\n"
    config = load(write_config(tmp_path, more), "cocoa")
    result = pretrain_run(config, tmp_path / "run")
    assert result["model"] == str(tmp_path / "run" / "contrastive" / "model")
    assert result["contrastive"]["steps"] == 2
    assert '"transformers>=5.2"' in (tmp_path / "run" / "contrastive" / "model" / "README.md").read_text("utf-8")
    some = texts(4)
    before, after = (
        SentenceTransformer(str(tmp_path / "run" / name), device="cpu").encode(some)
        for name in ("model", "contrastive/model")
    )
    assert before.shape == after.shape and not np.allclose(before, after)
    stamp = (tmp_path / "run" / "contrastive" / "model" / "model.safetensors").stat().st_mtime_ns
    assert pretrain_run(config, tmp_path / "run")["contrastive"]["loss"] == result["contrastive"]["loss"]
    assert (tmp_path / "run" / "contrastive" / "model" / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("more", "arguments", "said"),
    [
        ("contrastive: {steps: 2, data: [{file: wrong.jsonl}]}\n", ((), ("--dry-run",)), "jsonl:2: has no 'positive'"),
        ("contrastive: {steps: 2, loss: {name: infonse}}\n", ((),), "did you mean 'infonce'?"),
        ("contrastive: {steps: 2, bags: [50, 100], merge: {method: slerp}}\n", ((),), "slerp"),
    ],
)
def test_mistakes_in_the_contrastive_stage_are_told_before_anything_is_trained(
    place: Path, more: str, arguments: tuple[tuple[str, ...], ...], said: str
) -> None:
    table(place / "wrong.jsonl", [*rows(1), {"query": "w7"}])
    config = write_config(place, SHORT + more, name="wrong.yml")
    for own in arguments:
        assert said in refused(commands.run("pretrain", "cocoa", config, place / "never", *own))
        assert not (place / "never" / "stages").exists()
    shutil.rmtree(place / "never", ignore_errors=True)


def test_another_contrastive_stage_in_a_run_is_told_at_once(tmp_path: Path) -> None:
    more = "warm_up: {steps: 2}\nbridge: false\ncontrastive: {batch_size: 8, steps: %d, core: 0}\n"
    pretrain_run(load(write_config(tmp_path, more % 1), "cocoa"), tmp_path / "run")
    with pytest.raises(CuveeError, match="contrastive: holds a run of another configuration"):
        pretrain_run(load(write_config(tmp_path, more % 2), "cocoa"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "contrastive")
    assert pretrain_run(load(write_config(tmp_path, more % 2), "cocoa"), tmp_path / "run")["contrastive"]["steps"] == 2


# ---- killed ----


def same_run(one: Path, other: Path) -> None:
    for part in ("stages/warm_up", "stages/bridge", "language_model", "model"):
        assert same_weights(one / part, other / part), part
    assert metrics(one) == metrics(other)
    assert (one / "curves.svg").read_text("utf-8") == (other / "curves.svg").read_text("utf-8")
    ours, theirs = (json.loads((run / "cuvee.json").read_text("utf-8")) for run in (one, other))
    for key in ("state", "cost", "steps", "loss", "held_out", "data", "config"):
        assert ours[key] == theirs[key], key


def test_a_run_killed_again_and_again_is_the_run_that_nobody_disturbed(place: Path) -> None:
    """By SIGKILL before each part of the run is written, the one before it being the last there is."""
    checkpoints = ("work/warm_up/checkpoint", "work/bridge/checkpoint")
    parts = ("data", "stages/warm_up", "stages/bridge", "curves.svg", "language_model", "model")
    out = place / "killed"
    for number, part in enumerate(parts):
        done = commands.run("pretrain", "cocoa", place / "config.yml", out, die_at=str(out / part))
        assert done.code == -9, done.err
        assert [(out / each).exists() for each in parts] == [each < number for each in range(len(parts))], part
        if part.startswith("stages"):
            assert (out / checkpoints[number - 1]).exists()
    assert commands.run("pretrain", "cocoa", place / "config.yml", out).code == 0
    same_run(out, place / "run")
    left = {file.name for file in out.rglob(".*") if file.is_file() and "lock" not in file.name}
    assert not left and not (out / "work").exists(), left
    shutil.rmtree(out)


def test_killed_in_the_middle_of_a_stage_it_goes_on_from_the_checkpoint(place: Path) -> None:
    out = place / "middle"
    running = commands.start("pretrain", "cocoa", place / "config.yml", out)
    until_there(out / "work" / "bridge" / "checkpoint" / "state.json")
    running.kill()
    assert running.wait().code in (-9, 0)
    before = (out / "stages" / "warm_up" / "model.safetensors").stat().st_mtime_ns
    assert commands.run("pretrain", "cocoa", place / "config.yml", out).code == 0
    assert (out / "stages" / "warm_up" / "model.safetensors").stat().st_mtime_ns == before
    same_run(out, place / "run")
    shutil.rmtree(out)


def test_ctrl_c_says_that_the_same_command_goes_on(place: Path) -> None:
    out = place / "stopped"
    running = commands.start("pretrain", "cocoa", place / "config.yml", out)
    until_there(out / "work" / "warm_up" / "checkpoint" / "state.json")
    os.kill(running.pid, signal.SIGINT)
    done = running.wait()
    assert done.code in (130, 0)  # 0: it was done before we looked
    assert done.code == 0 or done.err.splitlines()[-1] == "interrupted: the same command goes on from what is saved"
    shutil.rmtree(out)


def until_there(file: Path) -> None:
    for _ in range(6000):
        if file.exists():
            return
        time.sleep(0.01)
    raise AssertionError(file)


def test_what_is_done_is_not_done_again_and_with_force_it_is(place: Path) -> None:
    """What is saved on the way, and how often, may change."""
    weights = place / "run" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    other = write_config(place, SHORT.replace("save_every: 2", "save_every: 3"), name="other.yml")
    done = commands.run("pretrain", "cocoa", other, place / "run")
    assert done.code == 0 and not done.out and weights.stat().st_mtime_ns == before
    assert done.err.startswith(f"{place / 'run' / 'model'}: 9 steps, 72 rows, ") and done.err.count("\n") == 1
    kept = Path(shutil.copytree(place / "run", place / "kept"))
    assert commands.run("pretrain", "cocoa", place / "config.yml", place / "run", "--force").code == 0
    assert weights.stat().st_mtime_ns != before
    same_run(place / "run", kept)
    shutil.rmtree(kept)


# ---- misused ----


@pytest.mark.parametrize(
    ("objective", "more", "arguments", "said"),
    [
        ("cocoa", "bridge: {mask: 2}\n", (), "wrong.yml:8: 'mask' is 2"),
        ("cocoa", "lerning_rate: 1\n", (), "wrong.yml:8: 'lerning_rate' is no key"),
        ("llm-ql", "encoder_mask: 0.1\n", (), "wrong.yml:8: 'encoder_mask' is a setting of retromae"),
        ("cocoa", "", ("--device", "abacus"), "abacus"),
        ("cocoa", "", ("--log", "paper"), "--log: 'paper' is no log"),
        ("cocoa", "", ("--seed", "-1"), "--seed"),
    ],
)
def test_mistakes_are_one_line(place: Path, objective: str, more: str, arguments: tuple[str, ...], said: str) -> None:
    file = write_config(place, more, name="wrong.yml")
    error = refused(commands.run("pretrain", objective, file, place / "never", *arguments))
    assert said in error and "Traceback" not in error
    assert not (place / "never").exists()


def test_an_objective_that_there_is_not_is_one_line(place: Path) -> None:
    assert "No such command 'coca'" in refused(commands.run("pretrain", "coca", place / "config.yml", place / "never"))
    assert "Missing command" in refused(commands.run("pretrain"))


@pytest.mark.parametrize(
    ("file", "said"),
    [("nowhere.jsonl", "no such file: nowhere.jsonl"), ("wrong.jsonl", "wrong.jsonl:2: has no 'positive'")],
)
def test_mistakes_in_the_data_are_told_with_file_and_line(place: Path, file: str, said: str) -> None:
    table(place / "wrong.jsonl", [*rows(1), {"query": "w7"}])
    config = write_config(place, SHORT, f"  - {{file: {file}}}\n", name="wrong.yml")
    for arguments in ((), ("--dry-run",))[file == "nowhere.jsonl" :]:
        assert said in refused(commands.run("pretrain", "cocoa", config, place / "never", *arguments))
    shutil.rmtree(place / "never", ignore_errors=True)


def test_models_that_cannot_be_pre_trained_are_one_line(place: Path, minilm: Path) -> None:
    config = write_config(place, SHORT, name="wrong.yml")
    config.write_text(config.read_text("utf-8").replace("model: llama", f"model: {minilm}"), encoding="utf-8")
    error = refused(commands.run("pretrain", "cocoa", config, place / "never"))
    assert "take a checkpoint with its language model head" in error
    shutil.rmtree(place / "never", ignore_errors=True)


def test_what_cannot_be_written_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    """Cut on the left, a text loses its beginning and not what stands before EOS."""
    config = load(write_config(tmp_path, OBJECTIVES["llm-ql"]), "llm-ql")
    left = models.tokenizer()
    left.add_tokens(["few"])  # where all words are unknown no one can tell which are lost
    left.save_pretrained(tmp_path / "llama")
    settings = tmp_path / "llama" / "tokenizer_config.json"
    told = json.loads(settings.read_text("utf-8"))
    settings.write_text(json.dumps({**told, "truncation_side": "left"}), encoding="utf-8")
    for refused_by in (plan, pretrain_run):
        with pytest.raises(CuveeError, match=r"config.yml:1: EOS cannot be appended .*; take another"):
            refused_by(config, tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


def test_what_would_be_causal_again_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": models.VOCABULARY, "d_model": 32, "n_layers": 1, "n_heads": 4, "initializer_range": 0.2}
    transformers.MptForCausalLM(transformers.MptConfig(**sizes)).save_pretrained(tmp_path / "llama")
    models.tokenizer().save_pretrained(tmp_path / "llama")
    with pytest.raises(CuveeError, match=r"would be written with a causal mask again .*or run `cuvee pretrain llm-ql`"):
        plan(load(write_config(tmp_path, SHORT), "cocoa"), tmp_path / "run")


@pytest.mark.parametrize(("objective", "length"), [("cocoa", 32), ("llm-ql", 31), ("retromae", 32)])
def test_texts_too_long_for_a_model_with_learned_places(objective: str, length: int, tmp_path: Path) -> None:
    models.folder("gpt2", tmp_path / "llama")
    file = write_config(tmp_path, OBJECTIVES[objective])
    table(tmp_path / "pairs.jsonl", [{"query": f"w{7 + i} " * 90, "positive": "w9 " * 90} for i in range(24)])
    fits = file.read_text("utf-8").replace("max_length: 12", f"max_length: {length}")
    file.write_text(fits, encoding="utf-8")
    (pretrain_run if objective == "llm-ql" else plan)(load(file, objective), tmp_path / "run")
    file.write_text(fits.replace(f"max_length: {length}", f"max_length: {length + 1}"), encoding="utf-8")
    with pytest.raises(CuveeError, match=r"config.yml:5: sequences of up to \d+ tokens .* 64 places"):
        plan(load(file, objective), tmp_path / "longer")


def test_a_base_that_looks_to_both_sides_attends_as_it_is_trained_to(tmp_path: Path) -> None:
    file = write_config(tmp_path, OBJECTIVES["llm-ql"])
    settings = json.loads((tmp_path / "llama" / "config.json").read_text("utf-8"))
    (tmp_path / "llama" / "config.json").write_text(json.dumps({**settings, "is_causal": False}), encoding="utf-8")
    pretrain_run(load(file, "llm-ql"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text("utf-8")).get("is_causal", True)


def test_other_configurations_and_foreign_folders_are_refused(place: Path) -> None:
    other = write_config(place, SHORT.replace("steps: 5", "steps: 6"), name="other.yml")
    for folder, said, arguments in (
        ("run", "holds a run of another configuration; choose another folder, or add --force", ()),
        ("run", "holds a run of another configuration; choose another folder, or add --force", ("--dry-run",)),
        ("llama", "none of our outputs", ()),
        ("run/model", "is a model, no run's folder", ("--dry-run",)),
    ):
        assert said in refused(commands.run("pretrain", "cocoa", other, place / folder, *arguments))
    assert "is an output of `cuvee pretrain`" in refused(commands.run("train", train_config(place), place / "run"))


def train_config(place: Path) -> Path:
    (place / "train.yml").write_text("model: run/model\ndata: [{file: pairs.jsonl}]\n", encoding="utf-8")
    return place / "train.yml"


def test_a_loss_that_is_no_number_is_one_line(place: Path) -> None:
    file = write_config(place, "warm_up: {steps: 40, warmup: 0, learning_rate: 1.0e+30}\n", name="hot.yml")
    error = commands.run("pretrain", "cocoa", file, place / "hot")
    assert error.code == 2 and "Traceback" not in error.err
    assert "not finite at step" in error.err.splitlines()[-1] and "hot.yml:8" in error.err
    shutil.rmtree(place / "hot")


def test_a_full_disk_is_one_line_and_once_there_is_room_it_goes_on(place: Path) -> None:
    out = place / "full"
    done = commands.run("pretrain", "cocoa", place / "config.yml", out, file_size=60_000)
    assert done.code == 2 and "Traceback" not in done.err and "cannot write" in done.err.splitlines()[-1], done.err
    assert commands.run("pretrain", "cocoa", place / "config.yml", out).code == 0
    same_run(out, place / "run")
    shutil.rmtree(out)


# ---- what is said ----


def test_a_plan_is_told_in_a_line_and_writes_nothing(place: Path) -> None:
    done = commands.run("pretrain", "cocoa", place / "config.yml", place / "planned", "--dry-run")
    assert done.code == 0 and not (place / "planned").exists() and not done.out
    assert done.err == "would train warm_up in 4 steps, bridge in 5 steps: 72 rows; 6 held out\n"
    found = plan(load(place / "config.yml", "cocoa"), place / "planned")
    assert (
        found["dry_run"]
        and found["steps"] == 9
        and found["members"]
        == {
            "warm_up": {"steps": 4},
            "bridge": {"steps": 5},
        }
    )


def test_what_is_measured_is_told_on_the_way(tmp_path: Path) -> None:
    told: list[str] = []
    config = load(write_config(tmp_path, "warm_up: false\nbridge: {steps: 2}\n"), "cocoa")
    pretrain_run(config, tmp_path / "run", note=told.append)
    assert len(told) == 2 and told[0].startswith("bridge, step 0, held out: loss ") and "from EOS alone" in told[1]


def test_a_mistaken_claim_is_taken_back(tmp_path: Path) -> None:
    """A configuration whose data were refused can be mended in the same folder."""
    file = write_config(tmp_path, SHORT)
    table(tmp_path / "pairs.jsonl", [{"query": "w7"}])
    with pytest.raises(CuveeError, match="has no 'positive'"):
        pretrain_run(load(file, "cocoa"), tmp_path / "run")
    mended = write_config(tmp_path, OBJECTIVES["cocoa"])
    pretrain_run(load(mended, "cocoa"), tmp_path / "run")
    assert (tmp_path / "run" / "model").is_dir()
