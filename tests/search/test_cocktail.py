from __future__ import annotations

import itertools
import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merging.errors import CuveeError
from merging.methods import registry
from search.choose import Trial
from search.cocktail import alone, mixed, shares
from search.design import COCKTAIL, Start, design
from search.objective import Scores
from search.space import Space, Vary, make_space
from search.study import Settings, open_study, work
from tests.checkpoints import tiny, write_model
from tests.commands import run

LOSSES = (0.2, 1.1, 3.0)


def space(method: str = "linear", **vary: Vary) -> Space:
    return make_space(registry.get(method), 3, vary)


# ---- the closed form ----


def test_the_closed_form_by_hand() -> None:
    raised = [math.exp(-loss / 5) for loss in LOSSES]
    assert shares(LOSSES) == pytest.approx([each / sum(raised) for each in raised], abs=1e-15)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_shares_sum_to_one_in_the_order_of_the_losses(losses: list[float], temperature: float) -> None:
    found = shares(losses, temperature)
    assert sum(found) == pytest.approx(1) and min(found) >= 0
    order = np.argsort(losses, kind="stable")
    assert all(found[a] >= found[b] for a, b in itertools.pairwise(order))


def test_the_temperature_goes_from_the_best_to_the_average() -> None:
    assert shares(LOSSES, 1e-3) == pytest.approx([1, 0, 0])
    assert shares(LOSSES, 1e6) == pytest.approx([1 / 3] * 3, abs=1e-5)


def test_a_model_without_a_score_gets_nothing() -> None:
    assert shares([1.0, math.inf, 1.0]) == [0.5, 0, 0.5]
    assert shares([math.inf, math.inf]) == [0.5, 0.5]


# ---- as a start point ----


def test_each_model_alone_then_what_their_scores_make() -> None:
    points = design(space(), (Start("uniform"), Start(COCKTAIL, temperature=0.5)), seed=0)
    assert [[*point.values()] for point in points[1:4]] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert points[4:] == [{COCKTAIL: 0.5}]


def test_other_parameters_stay_at_their_default() -> None:
    one = alone(space("ties", density=Vary(low=0.1, high=0.6)))[1]
    assert one == {"weight.0": 0, "weight.1": 1, "weight.2": 0, "density": 0.6}
    assert mixed(space("ties", density=Vary(low=0.1, high=0.6)), LOSSES)["density"] == 0.6


@pytest.mark.parametrize(
    ("vary", "told"),
    [
        ({"weight": Vary(value=0.5), "normalize": Vary(choices=(True, False))}, "a weight of each model"),
        ({"weight": Vary(low=0, high=1, per="all")}, "a weight of each model"),
        ({"weight": Vary(low=0.1, high=1, per="model")}, "from 0 to 1"),
    ],
)
def test_a_space_without_models_alone_is_told_at_its_line(vary: dict[str, Vary], told: str) -> None:
    with pytest.raises(CuveeError, match=f"^search.yml:9: .*{told}"):
        design(space(**vary), (Start(COCKTAIL, where="search.yml:9"),), 0)


def searched(folder: Path, killed_at: int | None = None, temperature: float = 0.5) -> list[Trial]:
    """A study whose models lose `LOSSES` alone."""
    own = space()
    starts = (Start("uniform"), Start(COCKTAIL, temperature=temperature), Start("sobol", 2))
    settings = Settings(own, "gp", 0, design(own, starts, 0), 8)
    seen = []

    def evaluate(coefficients: dict[str, Any]) -> Scores:
        seen.append(coefficients)
        if len(seen) == killed_at:
            raise KeyboardInterrupt
        return Scores(-float(np.dot(coefficients["weight"], LOSSES)))

    study = open_study(settings, folder)
    try:
        work(study, evaluate, orphans=study.orphans())  # type: ignore[arg-type]
    except KeyboardInterrupt:
        return searched(folder, temperature=temperature)
    return study.trials()


def test_the_mixture_is_tried_after_the_models(tmp_path: Path) -> None:
    trials = searched(tmp_path)
    assert [*trials[4].point.values()] == pytest.approx(shares(LOSSES, 0.5))
    assert len(trials) == 8


def test_the_mixture_waits_for_models_that_others_have_at_work(tmp_path: Path) -> None:
    own = space()
    study = open_study(Settings(own, "gp", 0, design(own, (Start(COCKTAIL, temperature=0.5),), 0), 8), tmp_path)
    first, *others = [study.ask() for _ in LOSSES]
    assert first is not None
    study.tell(first, Scores(-LOSSES[0]), 0.0)

    def tell_late() -> None:
        time.sleep(0.3)
        for trial, loss in zip(others, LOSSES[1:], strict=True):
            assert trial is not None
            study.tell(trial, Scores(-loss), 0.0)

    late = threading.Thread(target=tell_late)
    late.start()
    mixture = study.ask()
    late.join()
    assert mixture is not None and [*mixture.params.values()] == pytest.approx(shares(LOSSES, 0.5))


@pytest.mark.parametrize("killed_at", [4, 6, 7])
def test_the_same_mixture_after_a_kill(tmp_path: Path, killed_at: int) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    killed, whole = searched(tmp_path / "killed", killed_at), searched(tmp_path / "whole")
    assert [(t.number, t.point, t.values) for t in killed] == [(t.number, t.point, t.values) for t in whole]


# ---- as an engine ----

SCORE = """\
import json, re
from pathlib import Path

def loss(folder):
    said = json.loads((Path(folder) / "cuvee.json").read_text())["recipe"]
    with (Path(__file__).parent / "seen").open("a") as seen:
        seen.write("x")
    weights = map(float, re.findall(r"weight: ([0-9.e-]+)", said))
    return -sum(w * l for w, l in zip(weights, (0.2, 1.1, 3.0), strict=True))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for i, name in enumerate(("a", "b", "c")):
        write_model(tmp_path / name, tiny(i))
    (tmp_path / "score.py").write_text(SCORE)
    return tmp_path


def write(place: Path, more: str = "", engine: str = "{lm_cocktail: {temperature: 0.5}}") -> Path:
    file = place / "search.yml"
    text = "models: [a, b, c]\nmethod: linear\nobjective: {function: 'score:loss'}\n"
    file.write_text(f"{text}engine: {engine}\n{more}")
    return file


def test_a_search_of_one_trial(place: Path) -> None:
    done = run("search", write(place), place / "out", "--json", cwd=place)
    assert done.code == 0, done.err
    assert done.json["best"]["coefficients"]["weight"] == pytest.approx(shares(LOSSES, 0.5))
    assert (done.json["trials"], (place / "seen").read_text()) == (1, "x" * 4)
    told = json.loads((place / "out/lm_cocktail.json").read_text())
    assert told["losses"] == pytest.approx(LOSSES) and [Path(m).name for m in told["models"]] == ["a", "b", "c"]
    again = run("search", write(place), place / "out", "--json", cwd=place)
    assert again.code == 0 and (place / "seen").read_text() == "x" * 4, "what is done is not done again"


@pytest.mark.parametrize(
    ("more", "engine", "told"),
    [
        ("trials: 9", "lm_cocktail", "search.yml:5: LM-Cocktail is one trial"),
        ("start: [uniform]", "lm_cocktail", "search.yml:5: LM-Cocktail has no start"),
        ("vary: {weight: {low: 0, high: 0.5}}", "lm_cocktail", "search.yml:5: LM-Cocktail needs weights from 0 to 1"),
        ("", "{lm_cocktail: {temperture: 1}}", "search.yml:4: 'temperture' is no key of the engine 'lm_cocktail'"),
        ("", "{lm_cocktail: {temperature: 0}}", "search.yml:4: 'temperature' is 0"),
        ("", "lm_coctail", "search.yml:4: no engine 'lm_coctail'"),
    ],
)
def test_mistakes_are_told_at_their_line(place: Path, more: str, engine: str, told: str) -> None:
    done = run("search", write(place, more, engine), place / "out", cwd=place)
    assert done.code == 2 and told in done.err and "Traceback" not in done.err


def test_it_goes_alone(place: Path) -> None:
    done = run("search", write(place), place / "out", "--workers", "2", cwd=place)
    assert done.code == 2 and "--workers" in done.err
