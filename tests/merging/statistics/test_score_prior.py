"""The Beta of a source's scores: against scipy and the likelihood; and how little of the data leaves the source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merging.errors import CuveeError
from merging.sources import ModelRef
from merging.statistics.score_prior import KIND, fit, open_score_prior, read_scores
from merging.views import View
from tests.checkpoints import write_model
from tests.commands import run


def drawn(count: int = 4000) -> list[int]:
    """Scores from 1 to 6, of Beta(3.5, 2)."""
    values = np.random.default_rng(0).beta(3.5, 2.0, count)
    return [int(value) for value in np.minimum(np.floor(values * 6), 5) + 1]


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_it_is_where_the_likelihood_is_greatest() -> None:
    from scipy.stats import beta

    scores = drawn()
    found = fit(scores, 1, 6)
    scaled = (np.array(scores) + 0.5 - 1) / 6
    best = beta.logpdf(scaled, found.alpha, found.beta).sum()
    for a, b in ((1.01, 1), (0.99, 1), (1, 1.01), (1, 0.99)):
        assert beta.logpdf(scaled, found.alpha * a, found.beta * b).sum() < best
    assert (found.alpha, found.beta) == pytest.approx((3.5, 2.0), rel=0.1)
    assert (found.low, found.high, found.count) == (1, 6, 4000)


def test_the_range_is_what_was_seen_unless_it_is_said() -> None:
    assert (fit([2, 3, 3, 4]).low, fit([2, 3, 3, 4]).high) == (2, 4)
    assert fit([2, 3, 3, 4], 0, 4).alpha > fit([2, 3, 3, 4]).alpha
    for scores, told in (([3, 3, 3], "3 scores, all the same"), ([], "no score"), ([0, 7], "the score 7 is outside")):
        with pytest.raises(CuveeError, match=told):
            fit(scores, 0, 6)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", {"a": np.arange(6, dtype=np.float32)})
    rows = [{"essay": f"private {i}", "grade": score} for i, score in enumerate(drawn(200))]
    write(tmp_path / "private-scores.jsonl", rows)
    return tmp_path


def test_the_command_and_what_leaves_the_source(place: Path) -> None:
    command = ("stats", "model", "--kind", KIND, "--data", "private-scores.jsonl", "--column", "label=grade")
    done = run(*command, "--scores", "1:6", "--out", "prior", "--json", cwd=place)
    assert done.code == 0, done.err
    assert done.json["kind"] == KIND and (done.json["examples"], done.json["parameters"]) == (200, 2)
    said = json.loads((place / "prior" / "cuvee.json").read_text())
    assert said.keys() == {"cuvee_version", "command", "kind", "examples", "alpha", "beta", "scores", "model"}
    assert [each.name for each in (place / "prior").iterdir()] == ["cuvee.json"]
    assert said["model"] == {"digest": View.open(ModelRef.parse(str(place / "model"))).digest()}
    assert "private" not in json.dumps(said)
    found = open_score_prior(place / "prior")
    expected = fit(drawn(200), 1, 6)
    assert (found.alpha, found.beta, found.low, found.high, found.count) == (expected.alpha, expected.beta, 1, 6, 200)


def test_mistakes_are_one_line(place: Path) -> None:
    command = ("stats", "model", "--kind", KIND, "--data", "private-scores.jsonl", "--out", "prior")
    for more, told in (
        ((), "private-scores.jsonl:1: has no 'score'"),
        (("--column", "text=essay"), "'text' is not read for a score prior"),
        (("--column", "label=essay"), "'essay' must be a number, not 'private 0'"),
        (("--column", "label=grade", "--scores", "6:1"), "'6:1' is no range of scores; write 1:6"),
        (("--column", "label=grade", "--scores", "1:3"), "is outside 1 … 3"),
        (("--column", "label=grade", "--examples", "64"), "--examples: a score prior is of all rows"),
        (("--column", "label=grade", "--max-length", "64"), "--max-length: a score prior is of all rows"),
    ):
        done = run(*command, *more, cwd=place)
        assert done.code == 2 and told in done.err.splitlines()[-1], done.err
        assert not (place / "prior").exists()
    other = run("stats", "model", "--kind", "fisher", "--data", "d.jsonl", "--out", "x", "--scores", "1:6", cwd=place)
    assert other.code == 2 and "--scores: belongs to --kind score-prior" in other.err


def test_scores_by_their_usual_names(tmp_path: Path) -> None:
    assert read_scores(write(tmp_path / "s.jsonl", [{"score": 1}, {"label": "2"}, {"similarity": 2.5}])) == [1, 2, 2.5]


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CuveeError, match=r"holds no cuvee\.json"):
        open_score_prior(tmp_path)
    sound = {"command": "stats", "kind": KIND, "examples": 3, "alpha": 1.0, "beta": 2.0, "scores": [1, 6]}
    for change, told in (({"kind": "fisher"}, "is no score prior"), ({"beta": None}, "lacks a number"),
                         ({"alpha": -1}, "says something impossible")):  # fmt: skip
        (tmp_path / "cuvee.json").write_text(json.dumps({**sound, **change}))
        with pytest.raises(CuveeError, match=told):
            open_score_prior(tmp_path)
