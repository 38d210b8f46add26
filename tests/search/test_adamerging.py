"""AdaMerging: its gradient is that of finite differences, it ends at a known optimum, and a kill changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merging import layers
from merging.errors import CuveeError
from merging.sources import ModelRef
from search import adamerging
from search import config as search_config
from search import objective as objectives
from search.adamerging import Slopes, batch, shares
from search.candidates import Candidates
from search.objective import Candidate, Goal, ObjectiveKind, Scores
from search.recipes import space_of
from search.run import search_run
from tests.architectures import Family, build
from tests.commands import run
from tests.conftest import MiniLMFamily

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

AIMS = ((0.2, 0.7, 0.5), (0.6, 0.0, 0.35), (0.9, 0.45, 0.1))  # by layer group, in order, the rest as the last; by model


class Near:
    """How near the weights are to those of the base with `AIMS` of each task vector: 0 there, -1 at about the base.

    An objective for these tests, whose optimum is known; its two tasks are the layers, and what is about them.
    """

    whole = False

    def __init__(self, family: Family, broken: Callable[[int], None] = lambda call: None) -> None:
        self.family, self.broken, self.calls = family, broken, 0

    def data(self) -> dict[str, str]:
        return {}

    def check(self, model: ModelRef) -> Sequence[str]:
        return ()

    def prepare(self, model: ModelRef, device: str) -> Any:
        load = self.family.architecture.model_class().from_pretrained
        self.module = load(model.path)
        base = dict(self.module.named_parameters())
        models = [dict(load(folder).named_parameters()) for folder in self.family.specialists]
        groups = list(dict.fromkeys(layers.group(name) for name in base))
        self.aims, self.norms = {}, {"layers": 0.0, "about": 0.0}
        for name, own in base.items():
            row = AIMS[min(groups.index(layers.group(name)), len(AIMS) - 1)]
            learnt = [(other[name] - own).detach() for other in models]
            self.aims[name] = (own + sum(a * t for a, t in zip(row, learnt, strict=True))).detach().double()
            self.norms[self.task(name)] += sum(float(t.square().sum()) for t in learnt)
        return self.module

    @staticmethod
    def task(name: str) -> str:
        return "layers" if ".layer." in name else "about"

    def sizes(self) -> Mapping[str, int]:
        return {"layers": 4, "about": 4}

    def smooth(self, task: str, items: Sequence[int]) -> Any:
        self.calls += 1
        self.broken(self.calls)
        off = [
            (own.double() - self.aims[name]).square().sum()
            for name, own in self.module.named_parameters()
            if self.task(name) == task
        ]
        return -torch.stack(off).sum() / self.norms[task]

    def __call__(self, candidate: Candidate, /) -> Scores:
        with torch.no_grad():
            return Scores(None, {task: float(self.smooth(task, [])) for task in self.sizes()})


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return build("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    return lambda near: monkeypatch.setitem(
        objectives.OBJECTIVES, "near", ObjectiveKind("near", "for tests", lambda settings, folder: near)
    )


def written(family: Family, engine: str = "adamerging", more: str = "", objective: str = "near") -> str:
    models = "".join(f"  - {folder}\n" for folder in family.specialists)
    return f"base_model: {family.base}\nmodels:\n{models}objective: {objective}\nengine: {engine}\n{more}"


def parsed(family: Family, engine: str = "adamerging", more: str = "", objective: str = "near") -> Any:
    return search_config.parse(written(family, engine, more, objective), "search.yml")


def slopes_of(config: Any, folder: Path) -> tuple[Slopes, Candidates]:
    candidates = Candidates(config, folder / "run", folder / "scratch")
    return Slopes(config, candidates, space_of(config)), candidates


def differences(config: Any, candidates: Candidates, place: np.ndarray[Any, Any], step: float) -> list[float]:
    """Central differences of the loss."""
    space = space_of(config)

    def loss(at: np.ndarray[Any, Any]) -> float:
        point = {d.name: float(x) for d, x in zip(space.dimensions, at, strict=True)}
        return -config.goal.values(candidates(space.coefficients(point)))[0]

    moves = np.eye(len(place)) * step
    return [(loss(place + move) - loss(place - move)) / (2 * step) for move in moves]


# ---- the gradient ----


@pytest.mark.parametrize(
    "more",
    [
        "",
        "vary: {weight: {low: -1, high: 2, per: model}, lambda: 0.7}\n",
        "vary: {weight: {low: 0, high: 1, per: all}}\n",
        "vary: {weight: {low: 0, high: 1, per: module}}\n",
    ],
)
def test_the_gradient_is_that_of_finite_differences(
    more: str, family: Family, register: Callable[[Any], None], tmp_path: Path
) -> None:
    register(Near(family))
    config = parsed(family, more=more)
    slopes, candidates = slopes_of(config, tmp_path)
    place = np.random.default_rng(0).uniform(0.2, 0.8, len(space_of(config).dimensions))
    found = slopes(place, 0)
    assert found == pytest.approx(differences(config, candidates, place, 0.1), rel=1e-4, abs=1e-6)


def test_weighted_tasks(family: Family, register: Callable[[Any], None], tmp_path: Path) -> None:
    register(Near(family))
    config = parsed(family, objective="{near: , aggregate: {weighted: {layers: 3, about: 1}}}")
    slopes, candidates = slopes_of(config, tmp_path)
    place = np.full(len(space_of(config).dimensions), 0.3)
    assert slopes(place, 0) == pytest.approx(differences(config, candidates, place, 0.1), rel=1e-4, abs=1e-6)


def test_tensors_of_a_layer_add_up_to_it(family: Family, register: Callable[[Any], None], tmp_path: Path) -> None:
    """And more coefficients may be descended on than searched for."""
    register(Near(family))
    config = parsed(family, more="vary: {weight: {low: 0, high: 1, per: tensor}}\n")
    space = space_of(config)
    assert len(space.dimensions) > 100
    found = slopes_of(config, tmp_path)[0](np.full(len(space.dimensions), 0.3), 0)
    by_layer: dict[tuple[int | None, str], float] = {}
    for dimension, slope in zip(space.dimensions, found, strict=True):
        key = dimension.model, layers.group(str(dimension.group))
        by_layer[key] = by_layer.get(key, 0.0) + slope
    config = parsed(family)
    space = space_of(config)
    whole = slopes_of(config, tmp_path)[0](np.full(len(space.dimensions), 0.3), 0)
    assert whole == pytest.approx([by_layer[d.model, str(d.group)] for d in space.dimensions], rel=1e-6)


@pytest.mark.parametrize("objective", ["entropy", "pim", "loss"])
def test_the_gradient_of_every_smooth_objective(objective: str, minilm_family: MiniLMFamily, tmp_path: Path) -> None:
    """Through the real MiniLM, on all inputs; in float32, so but for its rounding."""
    texts = ["a glass of red wine", "the engine of a car", "a sunny day", "the cat sleeps", "brakes and wheels"]
    lines = [json.dumps({"text": text, "label": i % 3}) for i, text in enumerate(texts)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    prior = "prior: uniform, " if objective == "pim" else ""
    said = (
        f"{{{objective}: {{data: {tmp_path}/data.jsonl, {prior}prototypes: [wine, cars, weather], temperature: 0.1}}}}"
    )
    config = parsed(minilm_family, "{adamerging: {batch: 16}}", "vary: {weight: {low: 0, high: 1, per: model}}\n", said)  # type: ignore[arg-type]
    slopes, candidates = slopes_of(config, tmp_path)
    place = np.array([0.3, 0.2, 0.4])
    found = slopes(place, 0)
    assert np.abs(found).max() > 1e-3
    assert found == pytest.approx(differences(config, candidates, place, 0.02), rel=0.02, abs=2e-4)


def test_batches_are_drawn_by_seed_and_step() -> None:
    assert batch(5, 16, 0, 0, 0) == [0, 1, 2, 3, 4]
    drawn = [batch(100, 16, 0, step, task) for step in range(50) for task in range(2)]
    assert all(len(set(items)) == 16 for items in drawn)
    assert len(set(map(tuple, drawn))) == 100
    assert {item for items in drawn for item in items} == set(range(100))
    assert drawn[3] == batch(100, 16, 0, 1, 1) != batch(100, 16, 1, 1, 1)


def test_what_tasks_count() -> None:
    assert shares(Goal(), ["a", "b"], "") == {"a": 0.5, "b": 0.5}
    assert shares(Goal("weighted", {"b": 3, "a": 0}), ["a", "b"], "") == {"b": 1.0}
    with pytest.raises(CuveeError, match=r"^search.yml:3: .*no task 'c'"):
        shares(Goal("weighted", {"c": 3}), ["a", "b"], "search.yml:3")


# ---- the search ----

QUICK = "{adamerging: {rate: 0.02, every: 20}}"


def test_it_ends_at_the_optimum(family: Family, register: Callable[[Any], None], tmp_path: Path) -> None:
    near = Near(family)
    register(near)
    result = search_run(parsed(family, QUICK, "trials: 11\n"), tmp_path / "out")
    found = rows(tmp_path / "out")
    assert len(found) == result["trials"] == 11
    assert set(found[0]["point"].values()) == {0.3}
    scores = [row["values"][0] for row in found]
    assert scores[0] < -0.05 and scores[-1] > -1e-3
    for place, weights in enumerate(result["best"]["coefficients"]["weight"].values()):
        assert weights == pytest.approx(AIMS[min(place, len(AIMS) - 1)], abs=0.03)
    assert (tmp_path / "out/best.yml").is_file() and (tmp_path / "out/model/model.safetensors").is_file()


def test_a_start_point_of_ones_own(family: Family, register: Callable[[Any], None], tmp_path: Path) -> None:
    register(Near(family))
    more = "trials: 1\nvary: {weight: {low: 0, high: 1, per: model}}\nstart: [{weight: [0.1, 0.2, 0.9]}, uniform]\n"
    result = search_run(parsed(family, more=more), tmp_path / "out")
    assert result["best"]["coefficients"]["weight"] == [0.1, 0.2, 0.9]


@pytest.fixture(scope="module")
def whole(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that nothing killed."""
    out = tmp_path_factory.mktemp("adamerging") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        kind = ObjectiveKind("near", "for tests", lambda settings, folder: Near(family))
        patch.setitem(objectives.OBJECTIVES, "near", kind)
        search_run(parsed(family, QUICK, "trials: 4\n"), out)
    return out


@pytest.mark.parametrize(("call", "save_every"), [(1, 30.0), (55, 30.0), (55, 0.0), (85, 30.0), (87, 0.0)])
def test_a_killed_search_goes_on_to_the_same(
    call: int,
    save_every: float,
    whole: Path,
    family: Family,
    register: Callable[[Any], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in the first trial, between trials, within one, and right after; saved between trials or not."""
    monkeypatch.setattr(adamerging, "SAVE_EVERY", save_every)

    def kill(number: int) -> None:
        if number == call:
            raise KeyboardInterrupt

    register(Near(family, kill))
    config = parsed(family, QUICK, "trials: 4\n")
    with pytest.raises(KeyboardInterrupt):
        search_run(config, tmp_path / "out")
    register(Near(family))
    search_run(config, tmp_path / "out")
    assert rows(tmp_path / "out") == rows(whole)
    assert (tmp_path / "out/best.yml").read_text() == (whole / "best.yml").read_text()


def test_a_descent_whose_state_is_lost_is_not_begun_anew_in_the_same_study(
    family: Family, register: Callable[[Any], None], tmp_path: Path
) -> None:
    register(Near(family))
    search_run(parsed(family, QUICK, "trials: 2\n"), tmp_path / "out")
    (tmp_path / "out" / adamerging.STATE).unlink()
    with pytest.raises(CuveeError, match=r"adamerging.json: is missing.* of 2 trials cannot go on; .*--force"):
        search_run(parsed(family, QUICK, "trials: 4\n"), tmp_path / "out")
    assert len(rows(tmp_path / "out")) == 2
    search_run(parsed(family, QUICK, "trials: 3\n"), tmp_path / "out", force=True)
    assert len(rows(tmp_path / "out")) == 3


def test_more_trials_go_on_from_the_last(
    whole: Path, family: Family, register: Callable[[Any], None], tmp_path: Path
) -> None:
    register(Near(family))
    search_run(parsed(family, QUICK, "trials: 2\n"), tmp_path / "out")
    search_run(parsed(family, QUICK, "trials: 4\n"), tmp_path / "out")
    assert rows(tmp_path / "out") == rows(whole)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The trials, without their times."""
    lines = map(json.loads, (folder / "trials.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in lines]


def test_other_settings_are_another_study(family: Family, register: Callable[[Any], None], tmp_path: Path) -> None:
    register(Near(family))
    search_run(parsed(family, QUICK, "trials: 1\n"), tmp_path / "out")
    with pytest.raises(CuveeError, match="another tuning"):
        search_run(parsed(family, "adamerging", "trials: 1\n"), tmp_path / "out")


# ---- mistakes ----


@pytest.mark.parametrize(
    ("more", "engine", "told"),
    [
        ("method: ties\n", "adamerging", "is a search of 'task_arithmetic', not of 'ties'"),
        ("vary: {lambda: {low: 0, high: 2}}\n", "adamerging", "'lambda' has no gradient"),
        ("vary: {normalize: true}\n", "adamerging", "not divided by their sum"),
        ("start: [uniform, cocktail]\n", "adamerging", "a descent begins at one point"),
        ("", "{adamerging: {rate: 0}}", "'rate' is 0"),
        ("", "{adamerging: {stepz: 3}}", "'stepz' is no key"),
        ("", "{adamerging: 3}", "must be a mapping"),
    ],
)
def test_mistakes_are_told_at_their_line(more: str, engine: str, told: str, family: Family, tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text("def one(folder):\n    return 1.0\n")
    file = tmp_path / "search.yml"
    file.write_text(written(family, engine, more, "{function: 'score:one'}"))
    done = run("search", file, tmp_path / "out", "--dry-run")
    assert done.code == 2 and told in done.err and "search.yml:" in done.err and "Traceback" not in done.err


def test_an_objective_without_a_gradient(family: Family, tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text("def one(folder):\n    return 1.0\n")
    file = tmp_path / "search.yml"
    file.write_text(written(family, objective="{function: 'score:one'}"))
    done = run("search", file, tmp_path / "out", "--dry-run", cwd=tmp_path)
    assert done.code == 2 and "search.yml:6: the objective 'function' has no gradient" in done.err


def test_a_gradient_that_is_not_finite(
    family: Family, register: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = Near(family)
    smooth = near.smooth
    monkeypatch.setattr(near, "smooth", lambda task, items: smooth(task, items) * (np.nan if items else 1.0))
    register(near)
    with pytest.raises(CuveeError, match="not finite at step 0"):
        search_run(parsed(family, QUICK, "trials: 3\n"), tmp_path / "out")
