"""Calibration examples: drawn once, by a seed, whatever the columns are called; mistakes in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from merging import CuveeError
from merging.statistics.calibration import Example, draw


def table(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def texts(found: Sequence[Example]) -> list[tuple[str, ...]]:
    return [each.texts for each in found]


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    return table(tmp_path / "n.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(50)])


def test_draws_without_replacement_by_a_seed_in_the_datas_order(numbers: Path) -> None:
    found = draw([numbers], 20, seed=3)
    rows = [each.row for each in found.examples]
    assert len(set(rows)) == 20 and rows == sorted(rows) and found.rows == 50
    assert texts(draw([numbers], 20, seed=3).examples) == texts(found.examples)
    assert texts(draw([numbers], 20, seed=4).examples) != texts(found.examples)
    assert len({each.key for each in found.examples}) == 20
    assert [each.row for each in draw([numbers], 99).examples] == list(range(50))


def test_parts_are_the_whole(numbers: Path) -> None:
    whole = draw([numbers], 20, complete=True).examples
    parts = [draw([numbers], 20, part=(i, 3), complete=True).examples for i in (1, 2, 3)]
    assert sorted((each for part in parts for each in part), key=lambda each: each.row) == list(whole)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a", "label": "x"}, ("a",)),
        ({"sentence": "a"}, ("a",)),
        ({"query": "a", "positive": "b"}, ("a", "b")),
        ({"question": "a", "answer": ["b", "c"], "neg": ["d"]}, ("a", "b", "c", "d")),
        ({"anchor": "a", "positive": "b", "negative_2": "d", "negative_1": "c"}, ("a", "b", "c", "d")),
        ({"sentence1": "a", "sentence2": "b", "score": 0.5}, ("a", "b")),
        ({"query": "a", "pos": ["b"], "neg": list("cdefghijkl")}, tuple("abcdefghi")),
        ({"query": "a", "positive": None}, ("a",)),
    ],
)
def test_columns_by_their_usual_names(row: dict[str, Any], expected: tuple[str, ...], tmp_path: Path) -> None:
    assert draw([table(tmp_path / "d.jsonl", [row])], 9).examples[0].texts == expected


def test_other_names_and_formats(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("mine,yours\na,b\n")
    assert texts(draw([tmp_path / "a.csv"], 9, columns={"query": "mine", "positive": "yours"}).examples) == [("a", "b")]
    (tmp_path / "b.txt").write_text("first line\n\n second\n")
    assert texts(draw([tmp_path / "b.txt"], 9).examples) == [("first line",), (" second",)]
    both = draw([tmp_path / "b.txt", table(tmp_path / "c.jsonl", [{"text": "x"}])], 9)
    assert [each.row for each in both.examples] == [0, 1, 2] and [Path(d["file"]).name for d in both.data] == [
        "b.txt",
        "c.jsonl",
    ]


def test_an_image_lies_beside_its_table(tmp_path: Path) -> None:
    (tmp_path / "i.png").write_bytes(b"")
    (found,) = draw([table(tmp_path / "d.jsonl", [{"text": "a", "image": "i.png"}])], 9).examples
    assert found.image == tmp_path / "i.png"
    with pytest.raises(CuveeError, match="missing"):
        draw([table(tmp_path / "e.jsonl", [{"text": "a", "image": "j.png"}])], 9)


def test_queries_get_other_rows_positives_for_candidates(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "positive": f"p{i % 7}"} for i in range(20)]
    file = table(tmp_path / "d.jsonl", rows)
    for each in draw([file], 20, candidates=5, complete=True).examples:
        assert each.texts[:2] == (f"q{each.row}", f"p{each.row % 7}")
        assert len(set(each.candidates)) == 5 and all(text.startswith("p") for text in each.candidates)
    rows[3]["negative"] = "mine"  # type: ignore[assignment]
    own = draw([table(tmp_path / "e.jsonl", rows)], 20, candidates=5, complete=True).examples[3]
    assert own.candidates == ("p3", "mine")


def test_single_texts_get_one_of_their_label_and_others(numbers: Path) -> None:
    for each in draw([numbers], 50, candidates=4, complete=True).examples:
        labels = [int(text[1:]) % 2 for text in each.texts]
        assert len(set(each.texts)) == 5 and labels[0] == labels[1] != labels[2] == labels[3] == labels[4]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, r"d\.jsonl: holds no row"),
        (
            [{"text": "a"}, {"words": "b"}],
            {},
            r"d\.jsonl:2: has no 'text', nor 'query' and 'positive'; the row has 'words'",
        ),
        ([{"text": "a"}], {"columns": {"text": "body"}}, r"d\.jsonl:1: has no 'body'; the row has 'text'"),
        ([{"text": "a"}], {"columns": {"txet": "body"}}, "'txet' is no column; did you mean 'text'"),
        ([{"text": ""}], {}, r"d\.jsonl:1: 'text' is empty"),
        ([{"text": 7}], {}, r"'text' must be text, not 7"),
        ([{"text": "a"}], {"count": 0}, "0 examples are none"),
        ([{"text": "a"}], {"candidates": 1}, "1 candidates leave no choice"),
        ([{"text": "a"}], {"part": (3, 2)}, "3/2 is no part"),
        ([{"text": "a"}], {"part": (2, 2)}, "nothing is left for part 2 of 2"),
    ],
)
def test_mistakes_are_told_in_one_line(
    rows: list[dict[str, Any]], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CuveeError, match=message):
        draw([table(tmp_path / "d.jsonl", rows)], **{"count": 5, **options})


def test_files_that_are_none(tmp_path: Path) -> None:
    for name in ("none.jsonl", "none.txt"):
        with pytest.raises(CuveeError, match="no such file"):
            draw([tmp_path / name], 5)
    with pytest.raises(CuveeError, match="names no file"):
        draw([], 5)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CuveeError, match="UTF-8"):
        draw([tmp_path / "bad.txt"], 5)
