"""Whole searches without labels: language models with LoRA adapters by PIM, classifiers by their entropy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from search.objectives.pim import information
from tests.commands import run
from tests.merging.statistics.models import classifier, sentences, with_tokenizer
from tests.search.objectives.test_agreement import scores
from tests.search.objectives.test_choices import table

PRIOR = [[3.0, 2.0], [2.0, 4.0]]
NAMES = ["w1", "w2 w3", "w4"]


def classifiers(place: Path) -> list[str]:
    """A base and two others, a little apart."""
    import transformers

    classifier(place / "base", 3)
    for seed, name in enumerate(("a", "b")):
        own = transformers.AutoModelForSequenceClassification.from_pretrained(place / "base", dtype=torch.float32)
        _disturb(own, seed)
        own.save_pretrained(place / name)
        with_tokenizer(place / name)
    return ["a", "b"]


def adapters(place: Path) -> list[str]:
    """A small language model and two adapters on it."""
    peft = pytest.importorskip("peft")
    import transformers

    from tests.architectures import ARCHITECTURES

    ARCHITECTURES["llama"].new(0).to(torch.float32).save_pretrained(place / "base")
    with_tokenizer(place / "base")
    for seed, name in enumerate(("a", "b")):
        own = transformers.AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        adapted = peft.get_peft_model(own, settings)
        _disturb(adapted, seed, 0.3)
        adapted.save_pretrained(place / name)
    return ["base+a", "base+b"]


def _disturb(own: torch.nn.Module, seed: int, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in own.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)


def search(place: Path, models: list[str], said: dict[str, Any]) -> dict[str, Any]:
    content = {"base_model": "base", "models": models, "objective": said, "engine": "random", "trials": 4}
    (place / "search.yml").write_text(yaml.safe_dump(content, sort_keys=False))
    done = run("search", place / "search.yml", place / "out", "--json", cwd=place)
    assert done.code == 0, done.err
    return done.json


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft calls it
def test_pim_on_adapters_of_a_language_model(tmp_path: Path) -> None:
    models = adapters(tmp_path)
    file = table(tmp_path / "essays.jsonl", [{"text": text, "label": {"poison": 1}} for text in sentences(20)])
    said = {"data": file.name, "examples": 12, "scores": NAMES, "template": "{text} w9", "prior": {"beta": PRIOR}}
    result = search(tmp_path, models, {"pim": said})
    trials = [json.loads(line) for line in (tmp_path / "out/trials.jsonl").read_text().splitlines()]
    assert len(trials) == 4 and not any(trial["error"] for trial in trials)
    assert len({trial["values"][0] for trial in trials}) == 4
    assert result["scores"].keys() == {"pim", "valid"} and -10 < result["best"]["score"] < 0
    again = scores("pim", {**said, "data": str(file)}, tmp_path / "out/model")
    assert again.total == pytest.approx(result["best"]["score"], abs=1e-4), "what was written scores what was found"


def test_entropy_on_whole_classifiers(tmp_path: Path) -> None:
    models = classifiers(tmp_path)
    files = [table(tmp_path / f"{name}.jsonl", [{"text": text} for text in sentences(9, ord(name))]) for name in "xy"]
    result = search(tmp_path, models, {"entropy": {"data": {"x": files[0].name, "y": files[1].name}}})
    assert result["scores"].keys() == {"x", "y"}
    again = scores("entropy", {"data": {"x": str(files[0]), "y": str(files[1])}}, tmp_path / "out/model")
    assert again.tasks == pytest.approx(result["scores"], abs=1e-5)
    assert result["best"]["score"] == pytest.approx(np.mean(list(result["scores"].values())))
    table(files[1], [{"text": text} for text in sentences(9, 5)])
    refused = run("search", tmp_path / "search.yml", tmp_path / "out", cwd=tmp_path)
    assert refused.code == 2 and "study of another data" in refused.err, "scores of other texts are no scores of these"


def test_a_score_prior_of_each_source_is_all_that_pim_needs_of_them(tmp_path: Path) -> None:
    models = classifiers(tmp_path)
    for seed, name in enumerate(models):
        given = np.random.default_rng(seed).integers(1, 4, 30)
        table(tmp_path / f"{name}.jsonl", [{"score": int(score)} for score in given])
        command = ("stats", name, "--kind", "score-prior", "--data", f"{name}.jsonl", "--scores", "1:3")
        assert run(*command, "--out", f"{name}-prior", cwd=tmp_path).code == 0
    file = table(tmp_path / "target.jsonl", [{"text": text} for text in sentences(20)])
    said = {"data": file.name, "scores": [1, 2, 3], "prior": ["a-prior", "b-prior"]}
    result = search(tmp_path, models, {"pim": said})
    assert information(torch.full((1, 3), 1 / 3), torch.full((3,), 1 / 3)) < result["best"]["score"] < 0
