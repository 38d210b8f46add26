"""`suite_check`: what is wrong with a suite is found, each at its file and line; what is right is let alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from embeddings.evaluation import suite_check
from merging.errors import CuveeError

Rows = list[dict[str, Any]]


def findings(folder: Path, yaml: str, **tables: Rows) -> list[str]:
    """What `check` says of a suite of one task, without the folder."""
    for name, rows in tables.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "task.yml").write_text(yaml + "licence: mit\n", encoding="utf-8")
    return [str(finding).removeprefix(f"{folder}/") for finding in suite_check.check(folder)]


def texts(*pairs: tuple[str, Any]) -> Rows:
    return [{"text": text, "label": label} for text, label in pairs]


CLASSES = "type: Classification\nfiles: {test: test.jsonl, train: train.jsonl}\n"
GOOD = texts(("one", "a"), ("two", "a"), ("three", "b"), ("four", "b"))


def test_a_sound_task_has_no_finding(tmp_path: Path) -> None:
    assert findings(tmp_path, CLASSES, train=GOOD, test=texts(("five", "a"), ("six", "b"))) == []


def test_leaks_are_found_whatever_their_case_and_space(tmp_path: Path) -> None:
    found = findings(tmp_path, CLASSES, train=GOOD, test=texts(("five", "a"), (" TWO ", "b")))
    assert found == ["train.jsonl:2: error: leaks from train into test: test.jsonl:2 asks the same"]


def test_a_file_that_is_train_and_test_leaks(tmp_path: Path) -> None:
    found = findings(tmp_path, CLASSES.replace("train.jsonl", "test.jsonl"), test=GOOD)
    assert len(found) == 4 and all("leaks from train into test" in line for line in found)


def test_pairs_leak_in_either_order(tmp_path: Path) -> None:
    yaml = "type: STS\nfiles: {test: test.jsonl, train: train.jsonl}\n"
    test = [{"sentence1": s, "sentence2": t, "score": i} for i, (s, t) in enumerate(["ab", "cd"])]
    train = [{"sentence1": "b", "sentence2": "A", "score": 0}, {"sentence1": "b", "sentence2": "c", "score": 1}]
    found = findings(tmp_path, yaml, train=train, test=test)
    assert found == ["train.jsonl:1: error: leaks from train into test: test.jsonl:1 asks the same"]


def test_duplicates_say_whether_they_agree(tmp_path: Path) -> None:
    test = texts(("five", "a"), ("five", "a"), ("Five", "b"), ("six", "b"))
    assert findings(tmp_path, CLASSES, train=GOOD, test=test) == [
        "test.jsonl:2: warning: the same as line 1",
        "test.jsonl:3: warning: the same as line 1, with label 'a' there and label 'b' here",
    ]


def test_a_query_with_two_positives_is_no_duplicate(tmp_path: Path) -> None:
    rows = [{"query": "q", "positive": "p"}, {"query": "q", "positive": "r"}, {"query": "q", "positive": "P"}]
    found = findings(tmp_path, "type: Retrieval\nfiles: {test: test.jsonl}\n", test=rows)
    assert found == ["test.jsonl:3: warning: the same as line 1"]


def test_rare_unseen_and_only_labels_are_found(tmp_path: Path) -> None:
    test = texts(("five", "a"), ("six", "c"), ("seven", "c"))
    found = findings(tmp_path, CLASSES, train=[*GOOD, *texts(("eight", "d"))], test=test)
    assert found == [
        "train.jsonl:5: warning: the label 'd' has one example only",
        "test.jsonl:2: warning: the label 'c' (2 rows) is none of train: it cannot be told",
    ]
    found = findings(tmp_path, CLASSES, train=GOOD[:2], test=texts(("five", "a")))
    assert found == ["train.jsonl: error: every row has the label 'a'"]


def test_every_wrong_row_is_found_not_only_the_first(tmp_path: Path) -> None:
    rows = [
        {"sentence1": "a", "sentence2": " ", "score": 1},
        {"sentence1": "b", "sentence2": "c", "score": float("nan")},
        {"sentence1": None, "sentence2": "c", "score": 1},
        {"sentence1": "d", "score": 2},
        {"sentence1": "e", "sentence2": "f", "score": 3},
    ]
    found = findings(tmp_path, "type: STS\nfiles: {test: test.jsonl}\n", test=rows)
    assert sorted(line.partition(";")[0] for line in found) == [
        "test.jsonl:1: error: 'sentence2' is empty",
        "test.jsonl:2: error: 'score' must be a finite number, not nan",
        "test.jsonl:3: error: 'sentence1' is null",
        "test.jsonl:4: error: has no 'sentence2'",
    ]


def test_scores_that_are_all_the_same_correlate_with_nothing(tmp_path: Path) -> None:
    rows = [{"sentence1": s, "sentence2": "x", "score": 2} for s in "ab"]
    found = findings(tmp_path, "type: STS\nfiles: {test: test.jsonl}\n", test=rows)
    assert found == ["test.jsonl: error: every row has the score 2: nothing correlates with it"]


def test_candidates_without_a_positive_or_on_both_sides_are_found(tmp_path: Path) -> None:
    rows = [
        {"query": "q", "positive": [], "negative": ["a"]},
        {"query": "r", "positive": ["a"], "negative": []},
        {"query": "s", "positive": ["a"], "negative": ["a", "b"]},
    ]
    assert findings(tmp_path, "type: Reranking\nfiles: {test: test.jsonl}\n", test=rows) == [
        "test.jsonl:1: error: has no positive",
        "test.jsonl:2: warning: has no negative: any order is right",
        "test.jsonl:3: error: 'a' is positive and negative",
    ]


def test_a_sentence_with_two_translations_is_found(tmp_path: Path) -> None:
    rows = [{"sentence1": "cat", "sentence2": "Katze"}, {"sentence1": "Cat", "sentence2": "Kater"}]
    found = findings(tmp_path, "type: BitextMining\nfiles: {test: test.jsonl}\n", test=rows)
    assert found == ["test.jsonl:2: warning: 'sentence1' is that of line 1 too: either is right, one is counted"]


def test_judgments_ids_and_documents_are_checked(tmp_path: Path) -> None:
    yaml = "type: Retrieval\nfiles: {test: {corpus: corpus.jsonl, queries: queries.jsonl, qrels: qrels.jsonl}}\n"
    corpus = [
        {"id": 1, "text": "a"},
        {"id": 1, "text": "A"},
        {"id": 2, "text": ""},
        {"id": 3, "text": "", "title": "t"},
    ]
    queries = [{"id": "x", "text": "what?"}, {"id": "y", "text": "why?"}]
    qrels = [("x", 1, 1), ("x", 1, 1), ("x", 9, 1), ("z", 1, 1), ("y", 1, 0)]
    judged = [{"query": query, "doc": doc, "relevance": grade} for query, doc, grade in qrels]
    assert findings(tmp_path, yaml, corpus=corpus, queries=queries, qrels=judged) == [
        "corpus.jsonl:2: error: the id '1' is that of line 1",
        "corpus.jsonl:2: warning: the same text as line 1",
        "corpus.jsonl:3: error: 'text' is empty",
        "qrels.jsonl:2: warning: judges the same as line 1",
        "qrels.jsonl:3: error: judges '9', an id that corpus.jsonl does not have",
        "qrels.jsonl:4: error: judges 'z', an id that queries.jsonl does not have",
        "queries.jsonl:2: warning: has no relevant document: left out of the score",
    ]


def test_broken_yaml_and_broken_files_are_findings_and_the_rest_is_checked(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("type: STS\nfiles:\n  test: none.jsonl\n", encoding="utf-8")
    (tmp_path / "b.yml").write_text("type: STS\nlicence: mit\nfiles: {test: b.jsonl}\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "score": 1}\n{', encoding="utf-8")
    found = findings(tmp_path, CLASSES, train=GOOD, test=texts(("one", "a"), ("six", "b")))
    assert found[0] == f"a.yml:3: error: no such file: none.jsonl; it is looked for in {tmp_path}"
    assert found[1].startswith("b.jsonl:2: error: is not JSON")
    assert found[2] == "train.jsonl:1: error: leaks from train into test: test.jsonl:1 asks the same"
    assert len(found) == 3


def test_many_findings_of_one_sort_are_counted(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "positive": ""} for i in range(30)]
    found = findings(tmp_path, "type: Retrieval\nfiles: {test: test.jsonl}\n", test=rows)
    assert len(found) == 21
    assert found[-1] == "test.jsonl:30: error: and 10 more like the 20 above"


def test_training_on_what_another_task_tests_is_told_once_with_its_count(tmp_path: Path) -> None:
    (tmp_path / "other.yml").write_text(
        "type: Clustering\nlicence: mit\nfiles: {test: other.jsonl}\n", encoding="utf-8"
    )
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD), encoding="utf-8")
    found = findings(tmp_path, CLASSES, train=GOOD, test=texts(("five", "a"), ("six", "b")))
    where = f"{tmp_path.name}/train.jsonl:1"
    assert found == [f"other.jsonl:1: warning: asks what the train split of task holds: {where}, and 3 more do"]


def test_no_suite_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CuveeError, match="holds no task"):
        suite_check.check(tmp_path)
