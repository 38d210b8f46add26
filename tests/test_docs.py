"""The documentation's code runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import merging
from merging import methods
from tests.checkpoints import floats, read_model, some, write_model
from tests.commands import ROOT, code_blocks, environment

DOC = ROOT / "docs" / "adding-a-method.md"
NAMES = ("unanimous", "balanced", "trimmed_sum", "salient_sum")


@pytest.fixture
def my_methods(tmp_path: Path) -> Iterator[Path]:
    """The page's Python as the file it says it is, imported; its methods are gone from the registry afterwards."""
    file = tmp_path / "my_methods.py"
    file.write_text("\n\n".join(code_blocks(DOC, "python")), encoding="utf-8")
    before = dict(methods.METHODS)
    spec = importlib.util.spec_from_file_location("my_methods", file)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert tuple(methods.METHODS.keys() - before.keys()) and set(methods.METHODS) - set(before) == set(NAMES)
    yield file
    methods.METHODS.clear()
    methods.METHODS.update(before)


def family(shape: tuple[int, ...] = (30, 40)) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
    base = some(shape)
    return base, [base + some(shape, seed, spread=0.1 * seed) for seed in (1, 2)]


@pytest.mark.usefixtures("my_methods")
def test_unanimous_moves_what_all_agree_on() -> None:
    base, models = family()
    first, second = (model.astype("f8") - base for model in models)
    truth = base + np.where(first * second > 0, 0.8 * (first + second) / 2, 0)
    np.testing.assert_allclose(merging.apply("unanimous", base, models, lambda_=0.8), truth, atol=1e-6)


@pytest.mark.usefixtures("my_methods")
def test_balanced_gives_all_task_vectors_one_length() -> None:
    base, models = family()
    taus = [model.astype("f8") - base for model in models]
    mean = np.mean([np.linalg.norm(tau) for tau in taus])
    truth = base + sum(w * tau * mean / np.linalg.norm(tau) for w, tau in zip((1, 0.5), taus, strict=True))
    np.testing.assert_allclose(merging.apply("balanced", base, models, weight=[1, 0.5]), truth, atol=1e-5)
    np.testing.assert_array_equal(merging.apply("balanced", base, [base, base], weight=1.0), base)


@pytest.mark.usefixtures("my_methods")
def test_trimmed_sum_keeps_the_largest_of_the_sum() -> None:
    base, models = family()
    merged = merging.apply("trimmed_sum", base, models, weight=1.0, density=0.25)
    assert np.sum(merged != base) == 300
    total = sum(model.astype("f8") - base for model in models)
    largest = np.abs(total) >= np.sort(np.abs(total), axis=None)[-300]
    np.testing.assert_allclose(merged, base + np.where(largest, total, 0), atol=1e-6)


@pytest.mark.usefixtures("my_methods")
def test_salient_sum_keeps_what_matters_most() -> None:
    base, models = family()
    moments = [np.abs(some((1, 40), seed)) for seed in (5, 6)]
    merged = merging.apply("salient_sum", base, models, statistics=moments, density=0.25)
    truth = base.astype("f8")
    for model, own in zip(models, moments, strict=True):
        tau = model - base
        saliency = 0.5 * own.astype("f8") * tau.astype("f8") ** 2
        truth += np.where(saliency >= np.sort(saliency, axis=None)[-300], tau, 0)
    np.testing.assert_allclose(merged, truth, atol=1e-6)


@pytest.mark.usefixtures("my_methods")
def test_the_pages_recipe_merges_checkpoints(tmp_path: Path) -> None:
    base, models = family()
    (recipe,) = code_blocks(DOC, "yaml")
    for name, array in zip(("base", "a", "b"), (base, *models), strict=True):
        folder = write_model(tmp_path / name, {"layer.0.weight": array})
        recipe = recipe.replace(f"path/to/{name}", str(folder))
    result = merging.merge(merging.Recipe.parse(recipe), tmp_path / "out")
    assert result["method"] == "unanimous"
    merged = floats(read_model(tmp_path / "out")["layer.0.weight"])
    np.testing.assert_array_equal(merged, merging.apply("unanimous", base, models, lambda_=0.8))
    with pytest.raises(merging.CuveeError, match="lamda"):
        merging.merge(merging.Recipe.parse(recipe.replace("lambda", "lamda")), tmp_path / "out2")


def test_the_pages_methods_pass_the_contract_by_the_pages_command(my_methods: Path) -> None:
    (line,) = (line for block in code_blocks(DOC, "sh") for line in block.splitlines() if "pytest" in line)
    arguments = [re.sub(r"\"", "", part) for part in re.findall(r"\"[^\"]*\"|\S+", line)]
    assert arguments[:3] == ["python", "-m", "pytest"]
    env = environment()
    env["PYTHONPATH"] += f":{my_methods.parent}"
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, *arguments[1:], "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 60


def test_the_page_on_training_shows_what_can_be_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configurations are read without a mistake, and its Python makes rows."""
    from embeddings.training import config
    from embeddings.training.rows import examples

    page = ROOT / "docs" / "train.md"
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    for name in ("pairs.jsonl.gz", "tickets.csv", "images.jsonl"):
        Path(name).write_bytes(b"")
    whole, update = code_blocks(page, "yaml")
    read = config.parse(whole, str(tmp_path / "config.yml"))
    assert {data.name for data in read.data} == {"word", "phenotype", "pairs", "all-nli-triplet"}
    assert [images.data.name for images in read.images] == ["images"]
    Path("new.yml").write_text(update, encoding="utf-8")
    assert [data.type for data in config.data_settings("new.yml")[0]] == ["Classification"]
    passages = [
        {"text": text, "utility": utility, "correct": True} for text, utility in (("a", 0.9), ("b", 0.9), ("c", 0.2))
    ]
    Path("scored.jsonl").write_text(json.dumps({"query": "q", "candidates": passages}) + "\n", encoding="utf-8")
    (code,) = code_blocks(page, "python")
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "1 rows\n"
    (row,) = examples(config.data_settings("rows.jsonl.gz")[0][0])
    assert (row.query, row.positives, row.negatives) == ("q", ("a", "b"), ("c",))


def test_the_page_on_pretraining_shows_what_can_be_pre_trained(tmp_path: Path) -> None:
    from embeddings.reconstruction import config

    for name in ("pairs.jsonl.gz", "images.jsonl"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "SmolLM2-135M").mkdir()
    whole, after = code_blocks(ROOT / "docs" / "pretrain.md", "yaml")
    read = config.parse(whole, "cocoa", str(tmp_path / "config.yml"))
    assert [stage.name for stage in read.stages] == ["warm_up", "bridge"] and len(read.images) == 1
    for objective in config.STAGES:
        found = config.parse(after, objective, str(tmp_path / "config.yml")).contrastive
        assert found is not None and found.gradient_cache == 8192


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target
