"""scripts/experiments: what the experiment on BOOM compares, what that costs, its tables, and a tiny run of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[1] / "scripts" / "experiments"
MODULES = ("boom_arms", "boom_table", "boom_lab", "boom")
SIZES = {"word": 1000, "phenotype": 1000, "code": 500, "intent": 300, "sentiment": 200}
ROUNDS = [("word", "phenotype"), ("code",), ("intent", "sentiment")]


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The scripts' modules, imported as `python scripts/experiments/boom.py` does."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(FOLDER))
    yield SimpleNamespace(**{name: import_module(name) for name in MODULES})
    patch.undo()
    for name in MODULES:
        sys.modules.pop(name, None)


def test_costs_are_those_of_the_paper(scripts: SimpleNamespace) -> None:
    arms = scripts.boom_arms.static_arms(list(SIZES))
    passes = {name: arm.rows(SIZES) / sum(SIZES.values()) for name, arm in arms.items()}
    expected = {
        **{"zero-shot": 0, "full": 1, "full-1.8": 1.8, "full-3": 3, "soup-2": 2, "soup-3": 3, "per-task": 1},
        **{"boom-20-40-60-80-100": 3, "boom-40-60-80-100": 2.8, "boom-80-100": 1.8, "boom-60-60-60": 1.8},
        **{"boom-50-complement": 1, "mixed": 1, "mgs": 1, "two_stage": 1},
        **{"dataset_sequential": 1, "task_sequential": 1},
    }
    assert passes == pytest.approx(expected)


def test_members_of_one_draw_are_shared_and_have_a_folder_each(scripts: SimpleNamespace) -> None:
    arms = scripts.boom_arms.static_arms(list(SIZES))
    members = {member for arm in arms.values() for member in arm.members}
    assert len({member.name for member in members}) == len(members)
    assert arms["full"].members[0] in arms["boom-80-100"].members
    assert set(arms["boom-80-100"].members) < set(arms["boom-20-40-60-80-100"].members)
    assert set(arms["soup-2"].members) < set(arms["soup-3"].members)
    shared, apart, count = scripts.boom_arms.training_rows(arms.values(), [], ROUNDS, SIZES)
    # 20 to 100 %, two more of 60 % and of 100 %, two halves, 1.8 and 3 epochs, five schedules, a member a data set
    assert shared / 3000 == pytest.approx(3 + 2 * 0.6 + 2 + 1 + 4.8 + 5 + 1)
    assert (apart > shared, count) == (True, 5 + 2 + 2 + 2 + 2 + 5 + 5)


def test_other_merges_are_arms_of_the_same_members(scripts: SimpleNamespace) -> None:
    arms = scripts.boom_arms.static_arms(list(SIZES), ["multislerp", "linear"])
    assert arms["boom-80-100@linear"].members == arms["boom-80-100"].members
    assert arms["boom-80-100@linear"].merge == "linear"
    assert "full@linear" not in arms
    assert "boom-80-100" not in scripts.boom_arms.static_arms(list(SIZES), ["linear"])


def test_arms_are_chosen_by_name_or_group(scripts: SimpleNamespace) -> None:
    arms = scripts.boom_arms.static_arms(list(SIZES))
    static, strategies = scripts.boom_arms.chosen(["replay", "full", "update", "full"], arms)
    assert [arm.name for arm in static] == ["full"]
    assert [strategy.name for strategy in strategies] == ["update", "replay"]
    assert len(scripts.boom_arms.chosen(["static"], arms)[0]) == len(arms)
    with pytest.raises(ValueError, match="no arm 'fool'"):
        scripts.boom_arms.chosen(["fool"], arms)


def test_rounds_hold_each_task_once(scripts: SimpleNamespace) -> None:
    rounds_of = scripts.boom_arms.rounds_of
    assert rounds_of(list(SIZES)) == ROUNDS
    assert rounds_of(["a", "b", "c", "d"]) == [("a",), ("b", "c"), ("d",)]
    assert rounds_of(["a", "b", "c", "d"], ["d", "a,b", "c"]) == [("d",), ("a", "b"), ("c",)]
    for wrong in (["a", "b"], ["a", "b", "c,a"], ["a", "b", "e"]):
        with pytest.raises(ValueError, match="three groups"):
            rounds_of(["a", "b", "c"], wrong)


@pytest.mark.parametrize(
    ("strategy", "second", "third"),
    [("update", 1300, 1500), ("retrain", 2500, 3000), ("new-only", 500, 500), ("replay", 1300, 1500)],
)
def test_rounds_cost_what_they_show_the_model(scripts: SimpleNamespace, strategy: str, second: int, third: int) -> None:
    cost = [scripts.boom_arms.member_of_round(strategy, number, ROUNDS).rows(SIZES) for number in range(3)]
    assert cost == [2000, second, third]


def test_the_best_rate_is_told_with_the_edge_it_lies_at(scripts: SimpleNamespace) -> None:
    chosen_rate = scripts.boom_table.chosen_rate
    assert chosen_rate({1e-5: 0.5, 1e-4: 0.7, 1e-3: 0.6}) == (1e-4, "")
    assert chosen_rate({1e-5: 0.5, 1e-4: 0.7, 1e-3: 0.8}) == (1e-3, "high")
    assert chosen_rate({1e-5: 0.9, 1e-4: 0.9}) == (1e-5, "low")
    assert chosen_rate({1e-5: 0.9}) == (1e-5, "")


def test_tables_hold_means_spreads_and_paired_gaps(scripts: SimpleNamespace) -> None:
    made = scripts.boom_table.Record
    groups = {"in-domain": ("a", "b"), "out-of-domain": ("c",)}
    scores = {("full", 0): (0.5, 0.6, 0.2), ("full", 1): (0.6, 0.7, 0.4), ("boom", 0): (0.7, 0.6, 0.2)}
    scores[("boom", 1)] = (0.8, 0.7, 0.3)
    records = [
        made(arm, arm.upper(), seed, 0, 3000, 1e-4, "high", dict(zip("abc", test, strict=True)), {"cosine": 0.25})
        for (arm, seed), test in scores.items()
    ]
    table = scripts.boom_table.static_table(records, groups, 1000).splitlines()
    full, boom = table[2:]
    assert full.startswith("| FULL | 3.00 | 3,000 | 0.0001 ↑ | 60.00 ± 7.07 | 30.00 ± 14.14 |")
    assert "| 70.00 ± 7.07 | 25.00 ± 7.07 | +10.00 ± 0.00 | -5.00 ± 7.07 | 0.25 |" in boom
    assert "| FULL | 55.00 | 65.00 | 30.00 |" in scripts.boom_table.task_table(records)
    rounds = [
        made("update", "U", 0, 1, 500, 1e-4, "", {"a": 0.5}),
        made("update", "U", 0, 2, 900, 1e-4, "", {"a": 0.4}),
    ]
    rounds[1] = made("update", "U", 0, 2, 900, 1e-4, "", {"a": 0.4, "b": 0.8, "c": 0.1})
    table = scripts.boom_table.rounds_table(rounds, [["a"], ["b"]], groups, 1000).splitlines()
    assert table[0] == "| strategy | passes | pair-passes | lr | new 1 | old 2 | new 2 | in-domain | out-of-domain |"
    assert table[2] == "| U | 0.90 | 900 | 0.0001 | 50.00 | 40.00 | 80.00 | 60.00 | 10.00 |"


@pytest.mark.slow
def test_a_tiny_run_makes_tables_and_is_not_made_twice(
    scripts: SimpleNamespace, minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mteb")
    out = tmp_path / "run"
    few = ["--rows", "32", "--test-rows", "16", "--batch", "8", "--max-length", "16", "--seeds", "0"]
    few += ["--tasks", "word", "same-sense", "--model", str(minilm), "--learning-rates", "1e-4"]
    scripts.boom.main(["--out", str(out), *few, "--arms", "boom-50-complement"])
    told = capsys.readouterr().out
    assert "minutes from the beginning" in told and "| BOOM {50, complement} | 1.00 | 32 |" in told
    content = json.loads((out / "boom.json").read_text())
    assert {record["arm"]: record["rows"] for record in content["records"]} == {"boom-50-complement": 32}
    assert not [folder for folder in (out / "models").rglob("*") if (folder / "config.json").is_file()]
    scripts.boom.main(["--out", str(out), *few, "--arms", "boom-50-complement"])
    assert json.loads((out / "boom.json").read_text())["records"] == content["records"]
    assert not [folder for folder in (out / "models").rglob("*") if (folder / "config.json").is_file()]
