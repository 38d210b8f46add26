"""`collect` as a whole: parts combine, runs that were killed go on, mistakes cost one line and leave nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merging import CuveeError
from merging.checkpoint import Checkpoint
from merging.lineage import weights_digest
from merging.statistics import collect, combine, open_statistics
from merging.statistics import resume as resuming
from merging.statistics.collect import refuse_too_much
from merging.statistics.job import micro_batches
from merging.views import fingerprint
from tests.commands import ROOT, environment, run
from tests.merging.statistics.models import classifier, model, sentences

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(sentences(30)) + "\n")
    return file


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    texts = sentences(60, seed=1)
    file = tmp_path / "pairs.jsonl"
    rows = [{"query": a, "positive": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def arrays(folder: Path) -> dict[str, Any]:
    found = open_statistics(folder)
    return {name: found.array(name) for name in found.names}


def close(a: Path, b: Path) -> None:
    one, two = arrays(a), arrays(b)
    assert one.keys() == two.keys() and one
    largest = max(np.abs(own).max() for own in one.values())
    for name, own in one.items():  # what is zero but for rounding, as the gradient of a key's bias, may differ
        np.testing.assert_allclose(two[name], own, rtol=2e-5, atol=2e-6 * np.abs(own).max() + 1e-12 * largest)
    assert open_statistics(a).rows == open_statistics(b).rows


def test_what_the_folder_says(gpt2: Path, data: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    result = collect(
        str(gpt2), data, "moments", tmp_path / "s", examples=10, seed=5, progress=lambda *step: told.append(step)
    )
    found = open_statistics(tmp_path / "s")
    assert {
        "command",
        "out",
        "seconds",
        "seed",
        "device",
        "cuvee_version",
        "kind",
        "examples",
        "parameters",
    } <= result.keys()
    assert (result["kind"], result["examples"]) == (found.kind, found.examples) == ("moments", 10)
    assert result["parameters"] == sum(own.size for own in arrays(tmp_path / "s").values())
    with Checkpoint.open(gpt2) as checkpoint:
        assert found.model_digest == weights_digest(checkpoint) and found.fingerprint == fingerprint(checkpoint)
        assert set(found.names) <= checkpoint.tensors.keys()
    assert found.manifest["seed"] == 5 and found.manifest["data"][0]["file"] == str(data)
    assert set(found.axes.values()) == {0} and len(set(found.rows.values())) == 1
    assert told[0] == ("moments", 0, 10) and told[-1] == ("moments", 10, 10)
    assert not (tmp_path / "s.partial").exists()


@pytest.mark.parametrize("kind", ["moments", "gram", "fisher"])
def test_parts_combine_to_the_whole(kind: str, bert: Path, pairs: Path, tmp_path: Path) -> None:
    collect(str(bert), pairs, kind, tmp_path / "all", examples=20)
    parts = [tmp_path / "1", tmp_path / "2"]
    for i, part in enumerate(parts, start=1):
        collect(str(bert), pairs, kind, part, examples=20, part=(i, 2))
    result = combine(parts, tmp_path / "combined")
    assert result["examples"] == 20
    close(tmp_path / "all", tmp_path / "combined")
    with pytest.raises(CuveeError, match="has examples that"):
        combine([tmp_path / "all", parts[0]], tmp_path / "twice")


def test_two_files_combine_to_both(gpt2: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n".join(sentences(7, seed=9)))
    collect(str(gpt2), [data, other], "gram", tmp_path / "all")
    for name, file in (("1", data), ("2", other)):
        collect(str(gpt2), file, "gram", tmp_path / name)
    combine([tmp_path / "1", tmp_path / "2"], tmp_path / "combined")
    close(tmp_path / "all", tmp_path / "combined")


def test_another_models_statistics_do_not_combine(gpt2: Path, data: Path, tmp_path: Path) -> None:
    other = model("gpt2", tmp_path / "other")
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    collect(str(gpt2), data, "moments", tmp_path / "1", part=(1, 2))
    collect(str(other), data, "moments", tmp_path / "2", part=(2, 2))
    with pytest.raises(CuveeError, match="another model"):
        combine([tmp_path / "1", tmp_path / "2"], tmp_path / "combined")


@pytest.mark.parametrize("kind", ["gram", "fisher"])
def test_the_size_of_batches_changes_nothing_but_rounding(kind: str, bert: Path, pairs: Path, tmp_path: Path) -> None:
    collect(str(bert), pairs, kind, tmp_path / "1", batch_size=1, examples=12)
    collect(str(bert), pairs, kind, tmp_path / "2", batch_size=50, examples=12)
    close(tmp_path / "1", tmp_path / "2")


def test_bfloat16_is_near(bert: Path, pairs: Path, tmp_path: Path) -> None:
    collect(str(bert), pairs, "moments", tmp_path / "1")
    collect(str(bert), pairs, "moments", tmp_path / "2", dtype="bfloat16")
    one, two = arrays(tmp_path / "1"), arrays(tmp_path / "2")
    for name, own in one.items():
        np.testing.assert_allclose(two[name], own, rtol=0.1, atol=0.05 * own.max())


def test_a_pairs_classifier_reads_pairs(pairs: Path, tmp_path: Path) -> None:
    collect(str(classifier(tmp_path / "c", 1)), pairs, "moments", tmp_path / "s", examples=9)
    rows = open_statistics(tmp_path / "s").rows
    assert (
        rows["classifier.weight"] == 9 and open_statistics(tmp_path / "s").manifest["settings"]["head"] == "regression"
    )


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["moments", "gram", "fisher"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    kind: str, gpt2: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect(str(gpt2), data, kind, tmp_path / "whole", batch_size=4)
    monkeypatch.setattr(resuming, "EVERY", 0.0)
    seen: list[int] = []

    def stop(what: str, done: int, total: int) -> None:
        seen.append(done)
        if done == 12:
            raise Stop

    with pytest.raises(Stop):
        collect(str(gpt2), data, kind, tmp_path / "s", batch_size=4, progress=stop)
    assert not (tmp_path / "s").exists() and (tmp_path / "s.partial").is_dir()
    seen.clear()
    lines: list[str] = []
    collect(
        str(gpt2),
        data,
        kind,
        tmp_path / "s",
        batch_size=4,
        note=lines.append,
        progress=lambda w, d, t: seen.append(d),
    )
    assert seen[0] == 8 and any("goes on from" in line for line in lines)
    assert (tmp_path / "s" / "statistics.safetensors").read_bytes() == (
        tmp_path / "whole" / "statistics.safetensors"
    ).read_bytes()
    assert not (tmp_path / "s.partial").exists()


def test_another_runs_sums_are_not_gone_on_with(
    gpt2: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "EVERY", 0.0)

    def stop(what: str, done: int, total: int) -> None:
        if done == 12:
            raise Stop

    with pytest.raises(Stop):
        collect(str(gpt2), data, "gram", tmp_path / "s", batch_size=4, progress=stop)
    collect(str(gpt2), data, "moments", tmp_path / "s", batch_size=4)
    collect(str(gpt2), data, "moments", tmp_path / "t", batch_size=4)
    close(tmp_path / "s", tmp_path / "t")


def test_an_interrupted_run_saves_first(gpt2: Path, data: Path, tmp_path: Path) -> None:
    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 12:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            collect(str(gpt2), data, "moments", tmp_path / "s", batch_size=4, progress=interrupt)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    seen: list[int] = []
    collect(str(gpt2), data, "moments", tmp_path / "s", batch_size=4, progress=lambda w, d, t: seen.append(d))
    assert seen[0] == 12


def test_micro_batches_hold_like_lengths_and_no_more_than_fit() -> None:
    lengths, rows = [3, 9, 4, 4, 9, 1], [1, 1, 2, 1, 1, 1]
    for tokens in (1, 12, 18, 100):
        found = micro_batches(lengths, rows, tokens)
        assert sorted(i for batch in found for i in batch) == list(range(6))
        for batch in found:
            assert len(batch) == 1 or max(lengths[i] for i in batch) * sum(rows[i] for i in batch) <= tokens
    assert micro_batches(lengths, rows, 18, batch_size=4) == [[1, 4, 2, 3], [0, 5]]
    assert micro_batches(lengths, rows, 99, equal=True) == [[1, 4], [2, 3], [0], [5]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fihser"}, "no kind of statistics 'fihser'; did you mean 'fisher'"),
        ({"head": "lmm"}, "no head 'lmm'; did you mean 'lm'"),
        ({"batch_size": 0}, "--batch-size"),
        ({"temperature": 0.0}, "0.0 is no temperature"),
        ({"device": "cuda:9"}, "device cuda:9: cannot be used"),
        ({"columns": {"text": "body"}}, "has no 'body'"),
        ({"model": "none/such/model"}, "no such folder"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(
    options: dict[str, Any], message: str, gpt2: Path, data: Path, tmp_path: Path
) -> None:
    own = {"model": str(gpt2), "data": data, "kind": "moments", **options}
    with pytest.raises(CuveeError, match=message) as error:
        collect(out=tmp_path / "s", **own)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["texts.txt"]


def test_sums_that_do_not_fit_are_refused_before_the_first_text() -> None:
    refuse_too_much(1000, "cpu")
    with pytest.raises(CuveeError, match=r"take 6,000,000,000\.0 GB.*--kind moments"):
        refuse_too_much(10**18, "cpu")


def test_an_existing_folder_costs_no_work(gpt2: Path, data: Path, tmp_path: Path) -> None:
    collect(str(gpt2), data, "moments", tmp_path / "s", examples=3)
    with pytest.raises(CuveeError, match="exists already"):
        collect("not-even-a-model", data, "moments", tmp_path / "s")
    collect(str(gpt2), data, "moments", tmp_path / "s", examples=4, force=True)
    assert open_statistics(tmp_path / "s").examples == 4


def test_a_plan_writes_nothing(gpt2: Path, data: Path, tmp_path: Path) -> None:
    plan = collect(str(gpt2), data, "gram", tmp_path / "s", dry_run=True)
    assert plan["dry_run"] and not (tmp_path / "s").exists()
    assert plan["parameters"] == collect(str(gpt2), data, "gram", tmp_path / "s")["parameters"]


def test_the_command(gpt2: Path, data: Path, tmp_path: Path) -> None:
    options = ("--data", str(data), "--kind", "moments", "--examples", "20")
    done = run("stats", str(gpt2), *options, "--out", str(tmp_path / "s"), "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert (result["kind"], result["examples"]) == ("moments", 20) and "moments" in done.err
    for i in (1, 2):
        done = run("stats", str(gpt2), *options, "--out", str(tmp_path / f"{i}"), "--part", f"{i}/2")
        assert (done.code, done.out) == (0, ""), done.err
    done = run("stats", "--combine", str(tmp_path / "1"), str(tmp_path / "2"), "--out", str(tmp_path / "b"), "--json")
    assert done.code == 0 and json.loads(done.out.splitlines()[-1])["examples"] == 20
    close(tmp_path / "s", tmp_path / "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "moments", "--data", "{data}", "--out", "{out}"], "wants a model"),
        (["{model}", "--kind", "moments", "--out", "{out}"], "--data"),
        (["{model}", "--kind", "moments", "--data", "{data}"], "--out"),
        (["{model}", "--data", "{data}", "--out", "{out}"], "--kind"),
        (["{model}", "--kind", "x", "--data", "{data}", "--out", "{out}"], "no kind of statistics 'x'"),
        (["{model}", "--kind", "gram", "--data", "none.jsonl", "--out", "{out}"], "no such file"),
        (["{model}", "--kind", "gram", "--data", "{data}", "--out", "{out}", "--part", "2"], "'2' is no part"),
        (["{model}", "--kind", "gram", "--data", "{data}", "--out", "{out}", "--column", "x"], "'x' names no column"),
        (["--combine", "{model}", "{model}", "--out", "{out}"], "holds no cuvee.json"),
        (["--combine", "{model}", "--out", "{out}"], "at least two"),
    ],
)
def test_the_commands_mistakes_are_one_line(
    arguments: list[str], message: str, gpt2: Path, data: Path, tmp_path: Path
) -> None:
    places = {"data": data, "out": tmp_path / "s", "model": gpt2}
    done = run("stats", *(argument.format(**places) for argument in arguments))
    assert (done.code, done.out) == (2, "") and message in done.err and done.err.count("\n") == 1


@pytest.mark.slow
def test_a_killed_process_goes_on(gpt2: Path, data: Path, tmp_path: Path) -> None:
    """Killed by SIGKILL right after it has saved."""
    code = f"""
import os, signal
from merging.statistics import collect, resume
resume.EVERY = 0.0
def stop(what, done, total):
    if done == 16:
        os.kill(os.getpid(), signal.SIGKILL)
collect({str(gpt2)!r}, {str(data)!r}, "gram", {str(tmp_path / "s")!r}, batch_size=4, progress=stop)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    seen: list[int] = []
    collect(str(gpt2), data, "gram", tmp_path / "s", batch_size=4, progress=lambda w, d, t: seen.append(d))
    collect(str(gpt2), data, "gram", tmp_path / "t", batch_size=4)
    assert seen[0] == 12
    np.testing.assert_array_equal(
        *(a["transformer.h.0.attn.c_attn.weight"] for a in map(arrays, (tmp_path / "s", tmp_path / "t")))
    )
