"""Converters: scored candidates become rows with several positives, by the rules of Agentic-R's code."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from embeddings.training.converters import Candidate, convert_candidates, grouped, multi_positive, write_jsonl
from merging.errors import CuveeError


def row(candidates: list[Candidate], **settings: float) -> dict[str, object] | None:
    return multi_positive("q", candidates, rng=random.Random(0), **settings)  # type: ignore[arg-type]


def test_ties_at_the_top_are_positives_and_never_negatives() -> None:
    candidates = [
        *(Candidate(f"best {i}", 0.9, True) for i in range(5)),
        Candidate("less useful", 0.7, True),
        Candidate("useful, but the answer was wrong", 1.0, False),
    ]
    found = row(candidates)
    assert found is not None and found["positive"] == ["best 0", "best 1", "best 2"]
    assert sorted(found["negative"]) == ["less useful", "useful, but the answer was wrong"]  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "candidates",
    [
        [],
        [Candidate("a", 0.5, True)],
        [Candidate("a", 1.0, False)],
        [Candidate("a", 0.59, True), Candidate("b", 1, False)],
    ],
)
def test_a_query_whose_best_is_not_good_enough_is_left_out(candidates: list[Candidate]) -> None:
    assert row(candidates) is None


def test_correctness_counts_before_utility() -> None:
    found = row([Candidate("wrong", 1.0, False), Candidate("right", 0.6, True)])
    assert found == {"query": "q", "positive": ["right"], "negative": ["wrong"]}


def test_negatives_are_a_sample_of_the_others() -> None:
    candidates = [Candidate("good", 1.0, True), *(Candidate(f"bad {i}", 0.1, False) for i in range(40))]
    found = row(candidates)
    assert found is not None
    negatives = found["negative"]
    assert isinstance(negatives, list) and len(set(negatives)) == 15 and "good" not in negatives
    assert row(candidates) == found


def test_files_are_converted_and_read_by_training(tmp_path: Path) -> None:
    from embeddings.training.config import data_settings
    from embeddings.training.rows import examples

    lines = [
        {
            "query": "q",
            "candidates": [{"text": "a", "utility": 0.8, "correct": True}, {"text": "b", "utility": 0, "correct": 0}],
        },
        {"query": "r", "candidates": [{"text": "a", "utility": 0.1, "correct": True}]},
    ]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    out = tmp_path / "rows.jsonl"
    assert write_jsonl(convert_candidates(tmp_path / "scored.jsonl"), out) == 1
    (example,) = examples(data_settings(out)[0][0])
    assert (example.query, example.positives, example.negatives) == ("q", ("a",), ("b",))
    packed = tmp_path / "rows.jsonl.gz"
    write_jsonl(convert_candidates(tmp_path / "scored.jsonl"), packed)
    assert list(examples(data_settings(packed)[0][0])) == [example]


def test_rows_are_written_all_or_none(tmp_path: Path) -> None:
    (tmp_path / "scored.jsonl").write_text('{"query": "q", "candidates": []}\n{"query": ""}\n', encoding="utf-8")
    out = tmp_path / "rows.jsonl"
    out.write_text("what was there\n", encoding="utf-8")
    with pytest.raises(CuveeError, match=r"scored\.jsonl:2: "):
        write_jsonl(convert_candidates(tmp_path / "scored.jsonl"), out)
    assert out.read_text("utf-8") == "what was there\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.jsonl", "scored.jsonl"]
    with pytest.raises(CuveeError, match="cannot write: No such file"):
        write_jsonl([], tmp_path / "nowhere" / "rows.jsonl")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"candidates": []}, "'query' must be text"),
        ({"query": "q"}, "'candidates' must be a list"),
        ({"query": "q", "candidates": [{"text": "a"}]}, "a candidate must be"),
        ({"query": "q", "candidates": [{"text": "", "utility": 1, "correct": 1}]}, "must not be empty"),
        ({"query": "q", "candidates": [{"text": "a", "utility": 2, "correct": 1}]}, "must be a number in"),
        (
            {"query": "q", "candidates": [{"text": "a", "utility": 1, "correct": "yes"}]},
            "'correct' must be true or false",
        ),
    ],
)
def test_a_wrong_row_is_told_with_its_line(line: dict[str, object], says: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(line), encoding="utf-8")
    with pytest.raises(CuveeError) as error:
        list(convert_candidates(tmp_path / "a.jsonl"))
    assert says in str(error.value) and str(error.value).startswith(f"{tmp_path / 'a.jsonl'}:2: ")


def test_scored_pairs_are_grouped_by_query() -> None:
    pairs = [("q", "a", 0.9), ("q", "b", 0.1), ("q", "b", 0.7), ("r", "a", 0.2), ("s", "c", 0.5)]
    assert list(grouped(pairs, threshold=0.5)) == [
        {"query": "q", "positive": ["a", "b"], "negative": []},
        {"query": "s", "positive": ["c"], "negative": []},
    ]
