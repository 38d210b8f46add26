"""`cuvee train` and `update` as processes: killed anywhere, out of disk, misused; and models of every kind end to end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cuvee
from embeddings.training.bag import train_run
from embeddings.training.config import load
from embeddings.training.update import update_model
from tests import commands
from tests.embeddings.runs import metrics, same_weights, table, triplets, write_config
from tests.embeddings.training.test_backbone import TEXTS, words
from tests.embeddings.training.test_bag import stamps
from tests.merging.test_reliability import NOBODY, refused

BAGS = "bags: [50, complement]\nsteps: 6\nsave_every: 2\ncore: 25\n"


@pytest.fixture(scope="module")
def place(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A configuration, and in `run` and `updated` what comes of it when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("cli")
    write_config(folder, minilm, BAGS)
    table(folder / "new.jsonl", triplets(8, 200))
    done = commands.run("train", folder / "config.yml", folder / "run", "--json")
    assert done.code == 0, done.err
    assert done.json["cost"] == 48 and done.json["steps"] == 6 and done.out.count("\n") == 1
    done = commands.run("update", folder / "run", "--data", folder / "new.jsonl", "--out", folder / "updated", "--json")
    assert done.code == 0, done.err
    assert done.json["cost_full_retraining"] > done.json["cost"] > 0
    yield folder
    shutil.rmtree(folder)


def killed_again_and_again(*arguments: object) -> int:
    """Runs a command that is killed at ever later changes of the file system until it ends; how often it was killed."""
    for kills, die_at in enumerate((0, 1, 2, 3, 5, 8, 12, 20, 28, 36, 50, 70, None)):
        done = commands.run(*arguments, die_at=die_at)
        if done.code == 0:
            return kills
        assert done.code == -9, done.err
    raise AssertionError(done.err)


def test_a_run_killed_again_and_again_is_the_run_that_nobody_disturbed(place: Path) -> None:
    out = place / "killed"
    assert killed_again_and_again("train", place / "config.yml", out) > 8
    for part in ("members/1-50", "members/2-50", "model"):
        assert same_weights(out / part, place / "run" / part), part
    for part in ("members/1-50", "members/2-50"):
        assert metrics(out / part) == metrics(place / "run" / part)
    assert (out / "core" / "word.jsonl.gz").read_bytes() == (place / "run" / "core" / "word.jsonl.gz").read_bytes()
    ours, theirs = (json.loads((run / "cuvee.json").read_text("utf-8")) for run in (out, place / "run"))
    for key in ("state", "cost", "steps", "loss", "row_passes", "data", "config"):
        assert ours[key] == theirs[key], key
    left = {file.name for file in out.rglob(".*") if file.is_file() and "lock" not in file.name}
    assert not left and not (out / "work").exists(), left
    shutil.rmtree(out)


def test_an_update_killed_again_and_again_is_the_same(place: Path) -> None:
    out = place / "killed-update"
    assert killed_again_and_again("update", place / "run", "--data", place / "new.jsonl", "--out", out) > 6
    assert same_weights(out / "model", place / "updated" / "model")
    assert metrics(out / "members" / "update") == metrics(place / "updated" / "members" / "update")
    shutil.rmtree(out)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(60000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to that")


def test_killed_between_the_members_the_first_is_not_trained_again(place: Path) -> None:
    out = place / "between"
    running = commands.start("train", place / "config.yml", out)
    until((out / "members" / "1-50" / "cuvee.json").exists)
    running.kill()
    assert running.wait().code in (-9, 0)
    before = stamps(out / "members" / "1-50")
    assert commands.run("train", place / "config.yml", out).code == 0
    assert stamps(out / "members" / "1-50") == before
    assert same_weights(out / "model", place / "run" / "model")
    shutil.rmtree(out)


def test_killed_in_the_merge_nothing_is_trained_again(place: Path) -> None:
    out = Path(shutil.copytree(place / "run", place / "merging"))
    for die_at in range(0, 16, 3):
        shutil.rmtree(out / "model", ignore_errors=True)
        before = stamps(out / "members")
        done = commands.run("train", place / "config.yml", out, die_at=die_at)
        assert done.code in (-9, 0), done.err
        assert stamps(out / "members") == before
    assert commands.run("train", place / "config.yml", out).code == 0
    assert stamps(out / "members") == before and same_weights(out / "model", place / "run" / "model")
    shutil.rmtree(out)


# ---- misused ----


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        ({"learning_rate": "fast"}, (), r"config.yml:8: 'learning_rate'"),
        ({"batch": 3}, (), "did you mean 'batch_size'"),
        ({"model": "./nowhere"}, (), "no such model: ./nowhere"),
        ({}, ("--seed", -1), "Invalid value for '--seed'"),
        ({}, ("--workers", 0), "Invalid value for '--workers'"),
        ({}, ("--log", "tensorbord"), "--log: 'tensorbord' is no log"),
        ({}, ("--device", "abacus"), "abacus"),
    ],
)
def test_mistakes_are_one_line(
    place: Path, minilm: Path, change: dict[str, Any], arguments: tuple[object, ...], said: str
) -> None:
    folder = place / "wrong"
    file = write_config(folder, minilm, BAGS)
    lines = [line for line in file.read_text("utf-8").splitlines() if line.partition(":")[0] not in change]
    file.write_text("\n".join([*lines, *(f"{key}: {value}" for key, value in change.items())]) + "\n", "utf-8")
    error = refused(commands.run("train", file, place / "never", *arguments))
    assert (said.split(":8: ")[-1]) in error and "Traceback" not in error
    assert not (place / "never" / "members").exists()
    shutil.rmtree(folder)
    shutil.rmtree(place / "never", ignore_errors=True)


def test_missing_data_and_foreign_folders_are_one_line(place: Path, minilm: Path) -> None:
    file = write_config(place / "wrong", minilm, BAGS)
    (place / "wrong" / "word.jsonl").unlink()
    assert "config.yml:3: no such file: word.jsonl" in refused(commands.run("train", file, place / "never"))
    assert "is an output of `cuvee merge`" in refused(
        commands.run("train", place / "config.yml", place / "run" / "model")
    )
    assert "none of our outputs" in refused(commands.run("train", place / "config.yml", place / "wrong"))
    assert "none of our outputs" in refused(commands.run("train", place / "config.yml", place / "wrong", "--dry-run"))
    update = ("update", place / "run", "--data", place / "config.yml", "--out")
    assert "is an output of `cuvee train`" in refused(commands.run(*update, place / "run"))
    shutil.rmtree(place / "wrong")


def test_a_loss_that_is_no_number_is_one_line(place: Path, minilm: Path) -> None:
    file = write_config(place / "hot", minilm, "steps: 30\nwarmup: 0.0\n")
    file.write_text(file.read_text("utf-8").replace("1.0e-3", "1.0e+6"), "utf-8")
    done = commands.run("train", file, place / "hot" / "run")
    assert done.code == 2 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("error: ") and "is not finite at step" in done.err
    shutil.rmtree(place / "hot")


@pytest.mark.parametrize("size", [300, 20_000, 2_000_000])
def test_a_full_disk_is_one_line_and_once_there_is_room_it_goes_on(place: Path, size: int) -> None:
    out = place / "full"
    done = commands.run("train", place / "config.yml", out, file_size=size)
    lines = done.err.splitlines()
    assert done.code == 2 and "Traceback" not in done.err, done.err
    assert lines[-1].startswith("error: ") and ("cannot write" in lines[-1]), done.err
    if size == 2_000_000:
        assert commands.run("train", place / "config.yml", out).code == 0
        assert same_weights(out / "model", place / "run" / "model")
    shutil.rmtree(out, ignore_errors=True)


@pytest.mark.skipif(NOBODY is None, reason="run as root, who may become nobody")
def test_an_unwritable_folder_is_one_line(minilm: Path) -> None:
    if not all(parent.stat().st_mode & 0o001 for parent in minilm.parents):
        pytest.skip("nobody cannot come to the model")
    with tempfile.TemporaryDirectory() as name:
        open_to_all = Path(name)
        open_to_all.chmod(0o755)
        file = write_config(open_to_all, minilm, BAGS)
        (open_to_all / "empty").mkdir()
        (open_to_all / "secret").mkdir(mode=0o700)
        for folder, said in (("new", "cannot write"), ("empty", "cannot write"), ("secret", "Permission denied")):
            error = refused(commands.run("train", file, open_to_all / folder, user=NOBODY, cwd=open_to_all))
            assert said in error, error


# ---- what is said ----


def test_ctrl_c_is_told(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("embeddings.training.bag.plan", interrupt)
    monkeypatch.setattr("sys.argv", ["cuvee", "train", str(place / "config.yml"), str(place / "planned"), "--dry-run"])
    with pytest.raises(SystemExit, match="130"):
        cuvee.main()
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_says_that_the_same_command_goes_on_and_it_does(place: Path) -> None:
    out = place / "stopped"
    running = commands.start("train", place / "config.yml", out)
    until((out / "work" / "1-50" / "checkpoint" / "state.json").exists)
    os.kill(running.pid, signal.SIGINT)
    done = running.wait()
    assert done.code in (130, 0) and not done.out  # 0: it was done before we looked
    assert done.code == 0 or done.err.splitlines()[-1] == "interrupted: the same command goes on from what is saved"
    assert commands.run("train", place / "config.yml", out).code == 0
    assert same_weights(out / "model", place / "run" / "model")
    shutil.rmtree(out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("train", "--force"), ""), (("update",), ": the same command"), (("evaluate",), ": the same command")],
)
def test_ctrl_c_promises_what_is_kept_and_no_more(
    arguments: tuple[str, ...],
    said: str,
    place: Path,
    minilm: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    command, *flags = arguments
    out = place / "never"
    of: dict[str, tuple[str, list[object]]] = {
        "train": ("training.bag.train_run", [place / "config.yml", out]),
        "update": ("training.update.update_model", [place / "run", "--data", place / "new.jsonl", "--out", out]),
        "evaluate": ("evaluation.evaluate.evaluate", [minilm, "--tasks", "word", "--out", out]),
    }
    monkeypatch.setattr(f"embeddings.{of[command][0]}", interrupt)
    monkeypatch.setattr("sys.argv", ["cuvee", command, *map(str, of[command][1]), *flags])
    with pytest.raises(SystemExit, match="130"):
        cuvee.main()
    error = capsys.readouterr().err
    assert error.startswith(f"interrupted{said}") and error.count("\n") == 1
    assert said or error == "interrupted\n"


def test_a_plan_and_a_result_are_told_in_a_line(place: Path) -> None:
    done = commands.run("train", place / "config.yml", place / "planned", "--dry-run")
    assert done.code == 0 and not (place / "planned").exists() and not done.out
    assert done.err == "would train 2 models in 6 steps: 48 rows\n"
    again = commands.run("train", place / "config.yml", place / "run")
    assert again.code == 0 and not again.out
    (line,) = again.err.splitlines()
    assert line.startswith(f"{place / 'run' / 'model'}: 6 steps, 48 rows, ")
    update = ("update", place / "run", "--data", place / "new.jsonl", "--out")
    planned = commands.run(*update, place / "other", "--dry-run", "--json")
    assert planned.json["dry_run"] and planned.json["members"] == {"update": {"steps": planned.json["steps"]}}
    done = commands.run(*update, place / "updated")
    assert done.code == 0 and "of a full retraining" in done.err.splitlines()[-1]


@pytest.mark.slow
def test_evaluation_on_the_way_is_in_the_metrics(place: Path, minilm: Path) -> None:
    pytest.importorskip("mteb")
    suite = place / "suite"
    table(suite / "rows.jsonl", [{"query": row["query"], "positive": row["positive"]} for row in triplets(10)])
    (suite / "words.yml").write_text("type: Retrieval\nfiles: {validation: rows.jsonl}\n", "utf-8")
    data = "  - {file: word.jsonl}\n"
    more = f"steps: 4\ncore: 0\nevaluate: {{suite: {suite}, every: 2}}\n"
    done = commands.run("train", write_config(place / "scored", minilm, more, data), place / "scored" / "run")
    assert done.code == 0, done.err
    lines = metrics(place / "scored" / "run" / "model")
    assert [(line["step"], list(line["scores"])) for line in lines if "scores" in line] == [
        (2, ["words"]),
        (4, ["words"]),
    ]
    shutil.rmtree(place / "scored")


# ---- models of every kind ----


@pytest.mark.slow
def test_lora_from_end_to_end(minilm: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    pytest.importorskip("peft")
    file = write_config(tmp_path, minilm, BAGS.replace("save_every: 2", "save_every: 1"))
    text = file.read_text("utf-8").replace(f"model: {minilm}", f"model: {{path: {minilm}, lora: {{r: 2, alpha: 4}}}}")
    file.write_text(text, "utf-8")
    result = train_run(load(file), tmp_path / "run")
    vectors = SentenceTransformer(result["model"], device="cpu").encode(TEXTS[:2])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.abs(vectors - SentenceTransformer(str(minilm), device="cpu").encode(TEXTS[:2])).max() > 1e-4
    assert (tmp_path / "run" / "members" / "1-50" / "adapter" / "adapter_config.json").is_file()
    new = table(tmp_path / "new.jsonl", triplets(8, 200))
    update = update_model(tmp_path / "run", new, tmp_path / "updated")
    assert SentenceTransformer(update["model"], device="cpu").encode("one").shape == (384,)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_decoder_from_end_to_end(tmp_path: Path, bidirectional: bool) -> None:
    """A text generator as the hub has them, in bags, merged over its base, and updated."""
    from sentence_transformers import SentenceTransformer
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, eos_token_id=2, bos_token_id=1, **sizes))
    model.save_pretrained(tmp_path / "llama")
    words(bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "llama")
    known = sorted(set(" ".join(TEXTS).split()))
    rows = [{"query": f"{a} {b}", "positive": b, "negative": a} for a in known for b in known if a < b][:24]
    table(tmp_path / "pairs.jsonl", rows[:16])
    table(tmp_path / "new.jsonl", rows[16:])
    (tmp_path / "config.yml").write_text(
        f"model: {{path: llama, bidirectional: {str(bidirectional).lower()}}}\n"
        "data: [{file: pairs.jsonl, instruction: a short one}]\nbatch_size: 4\nmax_length: 16\nsave_every: 1\n"
        "learning_rate: 1.0e-3\nbags: [50, complement]\nmerge: {method: ties, parameters: {density: 0.8}}\n",
        "utf-8",
    )
    config = load(tmp_path / "config.yml")
    result = train_run(config, tmp_path / "run")
    assert (tmp_path / "run" / "base" / "modules.json").is_file()
    update = update_model(tmp_path / "run", tmp_path / "new.jsonl", tmp_path / "updated")
    for folder in (result["model"], update["model"]):
        vectors = SentenceTransformer(folder, device="cpu").encode(TEXTS[:2])
        assert vectors.shape == (2, 32) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    from dataclasses import replace

    from tests.embeddings.runs import opened
    from tests.embeddings.training.test_backbone import embed

    again = opened(replace(config, model=replace(config.model, path=result["model"])))
    ours = embed(again, TEXTS[:2]).detach().numpy()
    theirs = SentenceTransformer(result["model"], device="cpu").encode(TEXTS[:2])
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
