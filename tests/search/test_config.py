from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from merging.errors import CuveeError
from search import config as search_config
from search.config import SearchConfig, Until
from search.design import Start
from search.objective import Goal
from search.space import Vary
from tests.commands import code_blocks

GOOD = """\
base_model: base
models:
  - one
  - {model: two+adapter, stats: statistics}
method: ties
vary:
  weight: {low: 0, high: 2, per: layers}
  density: {low: 0.2, high: 1, log: true}
  normalize: [true, false]
  lambda: 0.5
objective: {function: "score:ndcg", aggregate: {weighted: {a: 2, b: 1}}, floors: {a: 0.5}}
engine: tpe
trials: 40
start:
  - uniform
  - {weight: [0.1, 0.2], density: 0.5}
  - sobol: 4
  - random: 3
until: {seconds: 60, no_gain: 15}
recommend: posterior
seed: 3
storage: sqlite
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("base", "one", "two", "adapter", "statistics"):
        (tmp_path / name).mkdir()
    return tmp_path


def parse(folder: Path, text: str) -> SearchConfig:
    return search_config.parse(text, str(folder / "search.yml"))


def test_everything_that_can_be_said(folder: Path) -> None:
    config = parse(folder, GOOD)
    assert config.base_model is not None and config.base_model.path == str(folder / "base")
    assert [source.model.path for source in config.models] == [str(folder / "one"), str(folder / "two")]
    assert config.models[1].model.adapter == str(folder / "adapter")
    assert config.models[1].stats is not None and config.models[1].stats.path == str(folder / "statistics")
    assert config.method.name == "ties"
    assert config.vary["weight"] == Vary(low=0, high=2, per="layers", where=config.vary["weight"].where)
    assert config.vary["normalize"].choices == (True, False)
    assert config.vary["lambda"].value == 0.5
    assert config.goal == Goal("weighted", {"a": 2, "b": 1}, {"a": 0.5})
    assert [start.kind for start in config.start] == ["uniform", "point", "sobol", "random"]
    assert config.start[2] == Start("sobol", 4, where=config.start[2].where)
    assert config.start[3] == Start("random", 3, where=config.start[3].where)
    assert config.until == Until(60, 15)
    assert (config.engine, config.trials, config.recommend, config.seed) == ("tpe", 40, "posterior", 3)


def test_what_a_search_leaves_of_its_yaml_holds_no_password(folder: Path) -> None:
    address = "postgresql+psycopg://me:se/c:ret@host/studies"
    config = parse(folder, GOOD.replace("storage: sqlite", f"storage: {address}?sslpassword=hush"))
    assert config.storage == f"{address}?sslpassword=hush"
    assert config.told() == GOOD.replace("storage: sqlite", "storage: postgresql+psycopg://host/studies")
    assert parse(folder, GOOD).told() == GOOD


def test_what_must_be_said_is_little(folder: Path) -> None:
    config = parse(folder, "base_model: base\nmodels: [one, two, base]\nobjective: {function: 'a:b'}\n")
    assert len(config.models) == 2, "the base is no model of its own"
    assert (config.method.name, config.engine, config.goal) == ("task_arithmetic", "gp", Goal())
    assert (config.trials_for(3), config.trials_for(8)) == (30, 50)


def _without(key: str) -> str:
    return "".join(line for line in GOOD.splitlines(keepends=True) if not line.startswith(key))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("engine: tpe", "engin: tpe", "search.yml:12: 'engin' is no key of a search; did you mean 'engine'?"),
        ("method: ties", "method: tise", "search.yml:5: no merge method 'tise'; did you mean 'ties'"),
        ("  density", "  desnity", "search.yml:8: 'desnity' is no parameter of 'ties'; did you mean 'density'?"),
        ("{low: 0.2, high: 1,", "{low: 0.2, high: 3,", "search.yml:8: 'density' is 3, outside [0, 1]"),
        (
            "{low: 0.2, high: 1,",
            "{low: 0, high: 1,",
            "search.yml:8: 'density' on a logarithmic scale needs a 'low' above 0",
        ),
        (
            "{low: 0, high: 2, per: layers}",
            "{low: 0}",
            "search.yml:7: what varies in 'weight' has no 'high'; add 'high:'",
        ),
        (
            "high: 2, per: layers",
            "high: 2, per: layer",
            "search.yml:7: 'layer' is no choice for 'per'; did you mean 'layers'?",
        ),
        ("[true, false]", "{low: 0}", "search.yml:9: 'normalize' has no bounds: it is true or false"),
        (
            "lambda: 0.5",
            "lambda: {value: 1, high: 2}",
            "search.yml:10: 'high' of 'lambda' has no meaning beside 'value'",
        ),
        ("[true, false]", "{choices: [true], log: true}", "search.yml:9: 'log' of 'normalize' has no meaning beside"),
        ("lambda: 0.5", "lambda: a", "search.yml:10: 'lambda' must be a number, not 'a'"),
        ("lambda: 0.5", "lambda: {low: 0, high: 1, per: model}", "search.yml:10: 'lambda' is one for all models"),
        ("function: ", "funktion: ", "search.yml:11: 'objective' names none; did you mean 'function'?"),
        ("score:ndcg", "score", "search.yml:11: 'score' names no function; write 'function: module:function'"),
        ("floors: {a: 0.5}", "front: [a, b, c, d]", "search.yml:11: a front of 4 objectives is not searched"),
        ("{weighted: {a: 2, b: 1}}", "weighted", "search.yml:11: 'weighted' needs weights"),
        ("trials: 40", "trials: 0", "search.yml:13: 'trials' is 0; it must be at least 1"),
        ("  - uniform", "  - unifrom", "search.yml:15: 'unifrom' is no choice for 'start'; did you mean 'uniform'?"),
        ("no_gain: 15", "no_gains: 15", "search.yml:19: 'no_gains' is no key of 'until'; did you mean 'no_gain'?"),
        ("storage: sqlite", "storage: sqlit", "search.yml:22: 'sqlit' is no storage"),
        (
            "  - one",
            "  - {model: one, parameters: {weight: 1}}",
            "search.yml:3: 'parameters' of a model are what a search",
        ),
    ],
)
def test_a_mistake_is_told_with_its_line_and_its_mend(folder: Path, old: str, new: str, told: str) -> None:
    assert old in GOOD
    with pytest.raises(CuveeError) as caught:
        parse(folder, GOOD.replace(old, new))
    assert str(caught.value).startswith(str(folder / told))


@pytest.mark.parametrize("key", ["models", "objective"])
def test_what_is_missing_is_told(folder: Path, key: str) -> None:
    text = {"models": "objective: {function: 'a:b'}\n", "objective": "models: [one]\n"}[key]
    with pytest.raises(CuveeError, match=f"a search needs .*'{key}'"):
        parse(folder, text)


def test_limits_on_the_command_line(folder: Path) -> None:
    config = search_config.until(["trials=9", "no_gain=3", "seconds=1.5"], parse(folder, GOOD))
    assert (config.trials, config.until) == (9, Until(1.5, 3))
    with pytest.raises(CuveeError, match="--until: 'soon' is no limit"):
        search_config.until(["soon"], config)


def test_a_file_is_read(folder: Path) -> None:
    (folder / "search.yml").write_text(GOOD)
    config = search_config.load(folder / "search.yml")
    assert config.at("engine") == f"{folder}{os.sep}search.yml:12"


def test_the_pages_configuration_is_one(folder: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "search.md"
    configurations = code_blocks(page, "yaml")
    assert configurations
    for text in configurations:
        for name in re.findall(r"[\w-]+\.(?:jsonl|txt)\b", text):
            (folder / name).touch()
        for name in re.findall(r"[\w-]+-prior\b", text):
            (folder / name).mkdir()
        assert parse(folder, text).models
