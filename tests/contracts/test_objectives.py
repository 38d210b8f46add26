"""What every objective that works on a module must keep: it looks, and changes nothing; the same weights, the same score."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from merging.errors import CuveeError
from merging.node import Node
from merging.sources import ModelRef
from search import objective
from search.objective import Candidate, Objective
from tests.merging.statistics.models import classifier, model, sentences
from tests.search.objectives.test_choices import table

#: Settings of each, and what it is tried on.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "entropy": ("classifier", {}),
    "pim": ("classifier", {"prior": [1, 2, 1]}),
    "loss": ("classifier", {}),
    "score": ("classifier", {"metric": "macro_f1"}),
    "perplexity": ("lm", {}),
}
SMOOTH = ("entropy", "pim", "loss")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    classifier(folder / "classifier", 3)
    model("llama", folder / "zoo").rename(folder / "lm")
    table(folder / "t.jsonl", [{"text": text, "label": i % 3} for i, text in enumerate(sentences(17))])
    return folder


@pytest.fixture(params=SETTINGS)
def prepared(request: pytest.FixtureRequest, place: Path) -> Iterator[tuple[Objective, torch.nn.Module]]:
    folder, said = SETTINGS[request.param]
    made = make(request.param, {"data": "t.jsonl", **said}, place)
    module = made.prepare(ModelRef.parse(str(place / folder)), "cpu")
    assert module is not None
    yield made, module


def make(name: str, said: Any, near: Path) -> Objective:
    return objective.get(name).make(Node.of({name: said}, "search.yml:3"), near)


def test_every_objective_of_ours_is_here() -> None:
    ours = [each.name for each in objective.known().values() if each.make.__module__.startswith("search.")]
    assert set(ours) - {"function"} == set(SETTINGS)


def test_it_looks_and_changes_nothing(prepared: tuple[Objective, torch.nn.Module]) -> None:
    made, module = prepared
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    generator = torch.get_rng_state()
    first, second = made(Candidate({})), made(Candidate({}))
    assert first == second
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in module.parameters()) and not module.training


def test_other_weights_have_another_score(prepared: tuple[Objective, torch.nn.Module]) -> None:
    made, module = prepared
    before = made(Candidate({}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    assert made(Candidate({})) != before


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_right_is_checked_without_the_weights(name: str, place: Path, tmp_path: Path) -> None:
    folder, said = SETTINGS[name]
    whole = Path(shutil.copytree(place / folder, tmp_path / folder))
    size = (whole / "model.safetensors").stat().st_size
    with (whole / "model.safetensors").open("r+b") as weights:
        weights.seek(8 + int.from_bytes(weights.read(8), "little"))  # after what names them
        weights.write(b"\xff" * (size - weights.tell()))
    before = {file: file.read_bytes() for file in whole.iterdir()}
    assert list(make(name, {"data": "t.jsonl", **said}, place).check(ModelRef.parse(str(whole)))) == []
    assert {file: file.read_bytes() for file in whole.iterdir()} == before


@pytest.mark.parametrize("name", SETTINGS)
def test_data_that_cannot_be_read_are_told_by_the_check(name: str, place: Path) -> None:
    folder, said = SETTINGS[name]
    (place / "broken.jsonl").write_text("{\n")
    with pytest.raises(CuveeError, match=r"broken\.jsonl:1: is not JSON"):
        make(name, {"data": "broken.jsonl", **said}, place).check(ModelRef.parse(str(place / folder)))


def test_settings_that_nobody_knows_are_refused_at_their_line(place: Path) -> None:
    for name, (_, said) in SETTINGS.items():
        with pytest.raises(CuveeError, match=r"search\.yml:3.*'exampels'.*did you mean 'examples'"):
            make(name, {"data": "t.jsonl", **said, "exampels": 3}, place)


@pytest.mark.parametrize("name", SMOOTH)
def test_a_smooth_one_has_the_gradient_of_its_score(name: str, place: Path) -> None:
    from search.adamerging import Smooth

    folder, said = SETTINGS[name]
    made = make(name, {"data": "t.jsonl", **said}, place)
    assert isinstance(made, Smooth)
    module = made.prepare(ModelRef.parse(str(place / folder)), "cpu")
    assert module is not None
    ((task, size),) = made.sizes().items()
    bias: Any = module.classifier.bias
    bias.requires_grad_(True)
    value = made.smooth(task, range(size))
    assert float(value.detach()) == pytest.approx(made(Candidate({})).tasks[task], abs=1e-5)
    (gradient,) = torch.autograd.grad(value, bias)
    step, found = 1e-2, []
    for i in range(len(bias)):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                bias[i] += sign * step
                sides.append(float(made.smooth(task, range(size)).detach()))
                bias[i] -= sign * step
        found.append((sides[0] - sides[1]) / (2 * step))
    torch.testing.assert_close(gradient, torch.tensor(found), rtol=1e-2, atol=1e-3)


def test_what_has_no_gradient_does_not_say_so(place: Path) -> None:
    from search.adamerging import Smooth

    assert not isinstance(make("score", "t.jsonl", place), Smooth)
