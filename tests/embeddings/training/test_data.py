"""Training data: every format and type in one form, checked with file and line, cached, and written back."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from embeddings.training import set_builder
from embeddings.training.config import TrainingConfig, data_settings, parse
from embeddings.training.data import TrainingSet, load_sets, read_texts, write_rows
from merging.errors import CuveeError

Rows = list[dict[str, Any]]


class Words:
    """A tokenizer whose ids are its words', so that tokens can be read; counts the texts that it saw."""

    def __init__(self, digest: str = "words") -> None:
        self.digest, self.seen, self.most = digest, 0, 0

    def prompt_of(self, side: str | None) -> str | None:
        return None

    def __call__(self, texts: list[str], side: str, prompt: str | None) -> list[list[int]]:
        self.seen += len(texts)
        self.most = max(self.most, len(texts))
        return [[word_id(word) for word in ((prompt or "") + text).split()] for text in texts]


def word_id(word: str) -> int:
    return int(xxhash.xxh32_intdigest(word.encode()) >> 1)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., TrainingConfig]:
    """A configuration of some `data:` entries, in a folder with a model."""
    (tmp_path / "model").mkdir()

    def config(data: str, more: str = "") -> TrainingConfig:
        text = f"model: model\ndata:\n{data}\n{more}\n"
        return parse(text, str(tmp_path / "config.yml"))

    return config


def write(file: Path, rows: Rows) -> Path:
    plain = file.name.removesuffix(".gz")
    if plain.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), file)
        return file
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "wt", encoding="utf-8", newline="") as stream:
        if plain.endswith(".jsonl"):
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(stream, rows[0].keys(), delimiter="\t" if plain.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    return file


def texts(found: TrainingSet) -> Rows:
    return [read_texts(found, row) for row in range(len(found))]


def load_one(config: TrainingConfig, tmp_path: Path, tokenize: Words | None = None, **more: Any) -> TrainingSet:
    return load_sets(config, tokenize or Words(), tmp_path / "cache", **more)[0]


PAIRS = [{"query": f"how {i}", "positive": f"so\nit, is “{i}”"} for i in range(5)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.tsv", "a.parquet"])
def test_every_format_says_the_same(name: str, tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    write(tmp_path / name, PAIRS)
    found = load_one(make(f"- file: {name}"), tmp_path)
    assert texts(found) == [{"query": r["query"], "positive": [r["positive"]], "negative": []} for r in PAIRS]
    write(tmp_path / "plain.jsonl", PAIRS)
    assert found.digest == load_one(make("- file: plain.jsonl"), tmp_path).digest


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "positive": "p", "negative": ["n", "m"]},
        {"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m"},
        {"anchor": "q", "pos": ["p"], "neg": ["n", "m"]},
        {"question": "q", "answer": "p", "negative_2": "m", "negative_1": "n", "negative_10": None},
        {"query": "q", "document": "p", "negative": "n", "negative_1": "m"},
        {"sentence1": "q", "sentence2": "p", "negatives": ["n", "m", "n"]},
    ],
)
def test_the_fields_spellings_of_columns(
    row: dict[str, Any], tmp_path: Path, make: Callable[..., TrainingConfig]
) -> None:
    write(tmp_path / "a.jsonl", [row])
    found = load_one(make("- file: a.jsonl"), tmp_path)
    assert texts(found) == [{"query": "q", "positive": ["p"], "negative": ["n", "m"]}]


def test_columns_can_be_renamed_and_csv_rows_may_have_fewer_negatives(
    tmp_path: Path, make: Callable[..., TrainingConfig]
) -> None:
    rows = [
        {"ask": "q", "good": "p", "bad_1": "n", "bad_2": "m"},
        {"ask": "r", "good": "s", "bad_1": "n", "bad_2": ""},
    ]
    write(tmp_path / "a.csv", rows)
    found = load_one(make("- {file: a.csv, columns: {query: ask, positive: good, negative: bad}}"), tmp_path)
    assert [row["negative"] for row in texts(found)] == [["n", "m"], ["n"]]


def test_tokens_are_of_distinct_texts_with_the_prompt_of_their_side(
    tmp_path: Path, make: Callable[..., TrainingConfig]
) -> None:
    rows = [{"query": "a b", "positive": ["c", "a b"], "negative": ["d"]}, {"query": "c", "positive": ["d"]}]
    write(tmp_path / "a.jsonl", rows)
    tokenize = Words()
    found = load_one(make('- {file: a.jsonl, prompt: {query: "ask: "}}'), tmp_path, tokenize)
    assert (len(found.query_tokens), len(found.document_tokens)) == (2, 3)
    assert found.query_tokens is not found.document_tokens
    for row, said in enumerate(rows):
        assert found.query_tokens[found.queries[row]].tolist() == [word_id(w) for w in f"ask: {said['query']}".split()]
        got = [found.document_tokens[i].tolist() for i in found.positives[row]]
        assert got == [[word_id(w) for w in text.split()] for text in said["positive"]]
    assert found.query_tokens.lengths.tolist() == [3, 2]
    assert found.query_tokens[0].dtype == np.int32 and found.query_tokens.text(0) == "a b"
    shared = load_one(make("- file: a.jsonl"), tmp_path)
    assert shared.query_tokens is shared.document_tokens and len(shared.query_tokens) == 3
    assert shared.digest == found.digest


def test_minilms_own_tokenizer(minilm: Path, tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(minilm))

    class Own(Words):
        def __call__(self, texts: list[str], side: str, prompt: str | None) -> list[list[int]]:
            ids: list[list[int]] = tokenizer([(prompt or "") + t for t in texts], truncation=True, max_length=64)[
                "input_ids"
            ]
            return ids

    found = load_one(make("- {suite: shipped, task: word}"), tmp_path, Own("minilm"))
    row = read_texts(found, 17)
    assert tokenizer.decode(found.query_tokens[found.queries[17]]) == f"[CLS] {row['query'].lower()} [SEP]"
    assert len(found) > 1000 and found.query_tokens.lengths.max() <= 64


def test_the_second_start_reads_only_the_cache(tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    file = write(tmp_path / "a.jsonl", PAIRS)
    config, tokenize = make("- file: a.jsonl"), Words()
    first = load_one(config, tmp_path, tokenize)
    seen = tokenize.seen
    again = load_one(config, tmp_path, tokenize)
    assert tokenize.seen == seen and texts(first) == texts(again) and first.digest == again.digest
    load_one(make("- {file: a.jsonl, weight: 0.5, batch_size: 3, name: other}", "seed: 3"), tmp_path, tokenize)
    assert tokenize.seen == seen  # nothing of this concerns the arrays
    other = Words("other words")
    load_one(config, tmp_path, other)
    assert other.seen > 0
    write(file, [*PAIRS, {"query": "new", "positive": "row"}])
    changed = load_one(config, tmp_path, tokenize)
    assert len(changed) == 6 and changed.digest != first.digest
    assert len(first) == 5 and texts(first) == texts(again)  # what is open stays what it was


@pytest.mark.parametrize("harm", ["truncated", "shorter", "missing", "no marker"])
def test_a_damaged_cache_is_made_again(harm: str, tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    write(tmp_path / "a.jsonl", PAIRS)
    config = make("- file: a.jsonl")
    whole = texts(load_one(config, tmp_path))
    folder = next(path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    if harm == "truncated":
        (folder / "queries.npy").write_bytes(b"\x93NUMPY")
    elif harm == "shorter":
        np.save(folder / "query" / "tokens.npy", np.load(folder / "query" / "tokens.npy")[:-1])
    elif harm == "missing":
        (folder / "query" / "tokens.npy").unlink()
    else:
        (folder / "set.json").unlink()
    assert texts(load_one(config, tmp_path)) == whole


def test_of_several_at_once_one_reads_and_the_others_wait(tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    write(tmp_path / "a.jsonl", PAIRS)
    config, tokenize = make("- file: a.jsonl"), Words()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_one(config, tmp_path, tokenize), range(4)))
    assert len({each.digest for each in found}) == 1
    assert tokenize.seen == 2 * len(PAIRS) + 4  # each text once, and the probe of the two sides


def test_a_mistake_leaves_nothing_in_the_cache(tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    write(tmp_path / "a.jsonl", [*PAIRS, {"query": "q", "positive": ""}])
    with pytest.raises(CuveeError, match=r"a\.jsonl:6: 'positive' is empty; remove the row"):
        load_one(make("- file: a.jsonl"), tmp_path)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("type_", "row", "says"),
    [
        ("Retrieval", {"query": "q"}, "has no 'positive'; the row has 'query'"),
        ("Retrieval", {"query": "q", "postive": "p"}, "did you mean 'postive'?"),
        ("Retrieval", {"query": "q", "positive": None}, "'positive' is null"),
        ("Retrieval", {"query": " ", "positive": "p"}, "'query' is empty"),
        ("Retrieval", {"query": 3, "positive": "p"}, "'query' must be text, not 3"),
        ("Retrieval", {"query": "q", "positive": []}, "'positive' names no positive"),
        ("Retrieval", {"query": "q", "positive": "p", "negative": ["p"]}, "'p' is positive and negative"),
        ("Retrieval", {"query": "q", "positive": "p", "negative": ["n", ""]}, "'negative' is empty"),
        ("Retrieval", {"query": "q", "positive": "p", "negative": [1]}, "'negative' must be text"),
        ("Retrieval", {"query": "q", "positive": "p", "scores": [1.0, 2.0]}, "a score for each of 1 candidates"),
        ("Retrieval", {"query": "q", "positive": "p", "scores": ["x"]}, "must be a finite number"),
        ("Retrieval", {"sentence1": "a", "sentence2": "b", "score": 3.0}, "add 'type: STS'"),
        ("Retrieval", {"sentence1": "a", "sentence2": "b", "label": 1}, "add 'type: PairClassification'"),
        ("STS", {"sentence1": "a", "sentence2": "b", "score": float("nan")}, "'score' must be a finite number"),
        ("STS", {"sentence1": "a", "sentence2": "b"}, "has no 'score'"),
        ("PairClassification", {"sentence1": "a", "sentence2": "b", "label": 2}, "'label' must be 0 or 1, not 2"),
        ("Classification", {"text": "a", "label": 1.5}, "'label' must be text or a whole number"),
        ("Classification", {"text": "a", "label": None}, "'label' is null"),
        ("Clustering", {"text": "a"}, "has no 'label'"),
        ("Regression", {"text": "a", "score": "high"}, "'score' must be a finite number"),
    ],
)
def test_a_wrong_row_is_told_with_file_and_line(
    type_: str, row: dict[str, Any], says: str, tmp_path: Path, make: Callable[..., TrainingConfig]
) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(CuveeError) as error:
        load_one(make(f"- {{file: a.jsonl, type: {type_}}}"), tmp_path)
    assert says in str(error.value) and error.value.where == f"{tmp_path / 'a.jsonl'}:3"


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    (tmp_path / "a.jsonl").write_text('{"query": "\\ud800", "positive": "p"}', encoding="utf-8")
    with pytest.raises(CuveeError, match="half of a surrogate pair"):
        load_one(make("- file: a.jsonl"), tmp_path)


def test_an_empty_source_is_no_data_set(tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    with pytest.raises(CuveeError, match=r"config\.yml:3: the data set 'a' holds no row"):
        load_one(make("- file: a.jsonl"), tmp_path)


def test_graded_pairs_have_scores_between_0_and_1(tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i} for i in range(6)]
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b.jsonl", [{**row, "score": row["score"] / 10} for row in rows])
    write(tmp_path / "c.csv", [{**row, "label": i % 2} for i, row in enumerate(rows)])
    data = "- {file: a.jsonl, type: STS}\n- {file: b.jsonl, type: STS}\n- {file: c.csv, type: PairClassification}"
    first, second, third = load_sets(make(data), Words(), tmp_path / "cache")
    assert first.scores is not None and np.allclose(first.scores, np.arange(6) / 5) and first.scores.dtype == np.float32
    assert second.scores is not None and np.allclose(second.scores, np.arange(6) / 10)
    assert third.scores is not None and third.scores.tolist() == [0, 1, 0, 1, 0, 1]
    assert texts(third)[1] == {"sentence1": "a 1", "sentence2": "b 1", "label": 1}
    assert all(len(first.positives[i]) == 1 and len(first.negatives[i]) == 0 for i in range(6))


def test_a_scale_means_the_same_in_all_data_whatever_scores_they_have(
    tmp_path: Path, make: Callable[..., TrainingConfig]
) -> None:
    """As in updates: the old data may have all of the scale, and the new a part of it."""
    pairs = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i} for i in range(6)]
    write(tmp_path / "old.jsonl", pairs)
    write(tmp_path / "new.jsonl", pairs[3:5])
    write(tmp_path / "text.jsonl", [{"text": t, "score": s} for t, s in (("bad", 0), ("fair", 1), ("good", 2))])
    data = "".join(f"- {{file: {name}.jsonl, type: STS, scale: [0, 5]}}\n" for name in ("old", "new"))
    config = make(data + "- {file: text.jsonl, type: Regression, scale: [-1, 3]}")
    old, new, text = load_sets(config, Words(), tmp_path / "cache")
    assert old.scores is not None and np.allclose(old.scores, np.arange(6) / 5) and not old.notes
    assert new.scores is not None and np.allclose(new.scores, [0.6, 0.8])
    grade = {"bad": 0, "fair": 1, "good": 2}
    for row in texts(text):
        assert row["score"] == 1 - abs(grade[row["sentence1"]] - grade[row["sentence2"]]) / 4
    (core,) = data_settings(write_rows([new], {"new": [0, 1]}, tmp_path / "core"))[0]
    (again,) = load_sets(config, Words(), tmp_path / "cache", data=[core])
    assert core.scale is None and again.scores is not None and np.allclose(again.scores, [0.6, 0.8])
    stretched = load_one(make("- {file: new.jsonl, type: STS}"), tmp_path)
    assert stretched.scores is not None and stretched.scores.tolist() == [0, 1]
    assert stretched.notes == (
        "new: scores from 3 to 4 become 0 to 1; 'scale: [lowest, highest]' makes that of other data the same",
    )


@pytest.mark.parametrize("type_", ["STS", "Regression"])
def test_a_score_outside_the_scale_is_told_with_file_and_line(
    type_: str, tmp_path: Path, make: Callable[..., TrainingConfig]
) -> None:
    row = {"sentence1": "a", "sentence2": "b"} if type_ == "STS" else {"text": "a"}
    write(tmp_path / "a.csv", [{**row, "score": 4.5}, {**row, "score": 5.5}])
    with pytest.raises(CuveeError) as error:
        load_one(make(f"- {{file: a.csv, type: {type_}, scale: [1, 5]}}"), tmp_path)
    assert str(error.value) == f"{tmp_path}/a.csv:3: 'score' is 5.5, outside the scale [1, 5]; mend the row or 'scale'"


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ("{query: qestion}", "no row has the column 'qestion', up to …/a.csv:2; did you mean 'question'?"),
        ("{query: question, positive: x}", "no row has the column 'x', up to …/a.csv:2; the row has 'question', "),
        ("{query: question, negative: wrong}", "no row has the column 'wrong', up to …/a.csv:3"),
    ],
)
def test_a_column_that_no_row_has_is_told_where_the_configuration_names_it(
    columns: str, says: str, tmp_path: Path, make: Callable[..., TrainingConfig]
) -> None:
    write(tmp_path / "a.csv", [{"question": "q", "answer": "p", "bad_1": ""}] * 2)
    with pytest.raises(CuveeError) as error:
        load_one(make(f"- file: a.csv\n  columns: {columns}"), tmp_path)
    said = str(error.value).replace(str(tmp_path), "…")
    assert said.startswith(f"…/config.yml:4: {says}")


def test_a_column_that_some_rows_lack_is_told_at_the_row(tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    write(tmp_path / "a.jsonl", [{"ask": "q", "answer": "p"}, {"ask": "q", "answer": "p", "bad_2": "n"}, {"ask": "q"}])
    with pytest.raises(CuveeError, match=r"a\.jsonl:3: has no 'answer'"):
        load_one(make("- {file: a.jsonl, columns: {query: ask, positive: answer, negative: bad}}"), tmp_path)


def test_translations_and_teachers(tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    write(tmp_path / "a.tsv", [{"sentence1": "one", "sentence2": "eins"}])
    rows = [
        {"query": "q", "pos": ["a", "b"], "neg": ["c"], "pos_scores": [3.0, 2.0], "neg_scores": [0.5]},
        {"query": "r", "pos": ["a"], "neg": ["c"]},
        {"query": "s", "pos": ["a", "a"], "neg": ["c", "b"], "teacher": [3.0, 9.0, 0.5, None]},
    ]
    write(tmp_path / "b.jsonl", rows)
    bitext, taught = load_sets(
        make("- {file: a.tsv, type: BitextMining}\n- {file: b.jsonl, negatives: 2}"), Words(), tmp_path / "cache"
    )
    assert texts(bitext) == [{"sentence1": "one", "sentence2": ["eins"], "negative": []}]
    assert taught.teacher is not None and taught.teacher[0].tolist() == [3.0, 2.0, 0.5]
    assert np.isnan(taught.teacher[1]).all()
    assert texts(taught)[2] == {"query": "s", "positive": ["a"], "negative": ["c", "b"], "teacher": [3.0, 0.5, None]}


CLASSES = [{"text": f"text {i} of {label}", "label": label} for label in ("red", "green", "blue") for i in range(8)]


@pytest.mark.parametrize("type_", ["Classification", "Clustering"])
def test_class_rows_are_complete_in_themselves(type_: str, tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    rows = [*CLASSES, CLASSES[0], {"text": "alone", "label": "mauve"}]
    write(tmp_path / "a.jsonl", rows)
    config = make(f"- {{file: a.jsonl, type: {type_}, negatives: 5}}")
    found = load_one(config, tmp_path)
    assert len(found) == len(CLASSES) and found.labels is not None
    assert found.notes == (
        "a: 1 rows that come again are left out",
        "a: 1 labels with a single text are left out: 'mauve'",
    )
    label = {row["text"]: row["label"] for row in CLASSES}
    for row, said in zip(texts(found), CLASSES, strict=True):
        assert row["query"] == said["text"] and row["label"] == said["label"]
        (positive,) = row["positive"]
        assert label[positive] == said["label"] and positive != said["text"]
        assert len(row["negative"]) == len(set(row["negative"])) == 5
        assert {label[text] for text in row["negative"]} == set(label.values()) - {said["label"]}
    assert sorted(found.positives.values.tolist()) == sorted(found.queries.tolist())  # each is positive once
    other = load_one(make(f"- {{file: a.jsonl, type: {type_}, negatives: 5}}", "seed: 1"), tmp_path)
    assert other.digest != found.digest
    assert load_one(config, tmp_path / "elsewhere").digest == found.digest


def test_a_text_with_two_labels_is_no_negative_of_itself(tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    write(tmp_path / "a.jsonl", [{"text": t, "label": label} for label in "xy" for t in ("a", "b", "c")])
    found = load_one(make("- {file: a.jsonl, type: Classification}"), tmp_path)
    for row in texts(found):
        assert not {row["query"], *row["positive"]} & set(row["negative"]) and len(row["negative"]) == 1


def test_one_label_tells_nothing_apart(tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    write(tmp_path / "a.jsonl", [{"text": t, "label": "x"} for t in "abc"])
    with pytest.raises(CuveeError, match="fewer than two labels"):
        load_one(make("- {file: a.jsonl, type: Classification}"), tmp_path)


def test_texts_with_scores_become_graded_pairs(tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    found = load_one(make("- {suite: shipped, task: sentiment}"), tmp_path)
    assert (found.type, found.settings.type) == ("STS", "Regression") and found.scores is not None
    assert found.scores.min() >= 0 and found.scores.max() <= 1 and found.scores.std() > 0.1
    assert all(row["sentence1"] != row["sentence2"] for row in texts(found)[:200])
    write(tmp_path / "a.jsonl", [{"text": t, "score": s} for t, s in (("bad", -1), ("fair", 0), ("good", 1))])
    small = load_one(make("- {file: a.jsonl, type: Regression}"), tmp_path)
    grade = {"bad": -1, "fair": 0, "good": 1}
    for row in texts(small):
        assert row["score"] == 1 - abs(grade[row["sentence1"]] - grade[row["sentence2"]]) / 2


def test_a_limit_takes_the_first_rows_of_a_seeded_shuffle(tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    write(tmp_path / "a.jsonl", [{"query": f"q{i}", "positive": f"p{i}"} for i in range(50)])

    def queries(limit: int, seed: int = 0) -> set[str]:
        found = load_one(make(f"- {{file: a.jsonl, limit: {limit}}}", f"seed: {seed}"), tmp_path)
        return {row["query"] for row in texts(found)}

    assert len(queries(10)) == 10 and queries(10) < queries(20) and queries(10) != queries(10, seed=1)
    assert len(queries(80)) == 50


def test_a_rows_negatives_are_cut(tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    write(tmp_path / "a.jsonl", [{"query": "q", "positive": "p", "negative": ["a", "b", "c"]}])
    for most, left in ((0, []), (2, ["a", "b"]), (9, ["a", "b", "c"])):
        assert texts(load_one(make(f"- {{file: a.jsonl, negatives: {most}}}"), tmp_path))[0]["negative"] == left


def test_a_suites_judged_tables_give_rows_with_all_positives(
    tmp_path: Path, make: Callable[..., TrainingConfig]
) -> None:
    folder = tmp_path / "suite"
    folder.mkdir()
    write(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "T", "text": f"text {i}"} for i in range(4)])
    write(folder / "queries.jsonl", [{"_id": "q", "text": "ask"}])
    write(folder / "qrels.tsv", [{"query-id": "q", "corpus-id": f"d{i}", "score": 1} for i in (1, 2)])
    (folder / "task.yml").write_text(
        "type: Retrieval\nprompt: {query: 'Q: '}\n"
        "files: {train: {corpus: corpus.jsonl, queries: queries.jsonl, qrels: qrels.tsv}}\n",
        encoding="utf-8",
    )
    found = load_one(make("- suite: suite"), tmp_path)
    assert texts(found) == [{"query": "ask", "positive": ["T text 1", "T text 2"], "negative": []}]
    assert found.query_tokens[0].tolist() == [word_id("Q:"), word_id("ask")]


def test_a_suites_columns_are_followed(tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    (tmp_path / "suite").mkdir()
    write(tmp_path / "suite" / "rows.csv", [{"frage": "ask", "antwort": "say"}])
    (tmp_path / "suite" / "task.yml").write_text(
        "type: Retrieval\nfiles: {train: rows.csv}\ncolumns: {query: frage, positive: antwort}\n", encoding="utf-8"
    )
    assert texts(load_one(make("- suite: suite"), tmp_path)) == [{"query": "ask", "positive": ["say"], "negative": []}]


def test_a_folder_as_the_hubs_library_reads_it(
    tmp_path: Path, make: Callable[..., TrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "train.parquet", [{"anchor": "a", "positive": "b", "negative": "c"}])
    config = make("- {hub: ./hub, name: triplets}")
    expected = [{"query": "a", "positive": ["b"], "negative": ["c"]}]
    assert texts(load_one(config, tmp_path)) == expected
    with pytest.raises(CuveeError, match=r"config\.yml:3: .*cannot be loaded"):
        load_one(make("- {hub: ./hub, split: nowhere}"), tmp_path)


def test_written_rows_are_read_again(tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    write(tmp_path / "pairs.jsonl", [{**row, "negative": ["n"], "teacher": [1.0, 0.25]} for row in PAIRS])
    write(tmp_path / "classes.jsonl", CLASSES)
    write(tmp_path / "graded.jsonl", [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": i} for i in range(6)])
    write(tmp_path / "flags.jsonl", [{"sentence1": f"a{i}", "sentence2": f"b{i}", "label": i % 2} for i in range(6)])
    write(tmp_path / "bitext.jsonl", [{"sentence1": f"a{i}", "sentence2": f"ä{i}"} for i in range(6)])
    config = make("""
- {file: pairs.jsonl, prompt: "Q: ", weight: 0.5, loss: {name: disj, temperature: 0.1}}
- {file: classes.jsonl, type: Classification, negatives: 4}
- {file: graded.jsonl, type: STS, loss: angle}
- {file: flags.jsonl, type: PairClassification}
- {file: bitext.jsonl, type: BitextMining}
- {suite: shipped, task: sentiment}
""")
    sets = load_sets(config, Words(), tmp_path / "cache")
    rows = {found.name: [3, 1, 4] for found in sets}
    file = write_rows(sets, rows, tmp_path / "core")
    before = {path.name: path.read_bytes() for path in (tmp_path / "core").iterdir()}
    write_rows(sets, rows, tmp_path / "core")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "core").iterdir()}
    read = data_settings(file)[0]
    assert [data.loss for data in read] == [data.loss for data in config.data]
    assert [data.prompt for data in read] == [data.prompt for data in config.data]
    assert [data.weight for data in read] == [0.5, 1, 1, 1, 1, 1]
    again = load_sets(config, Words(), tmp_path / "cache", data=read)
    for old, new in zip(sets, again, strict=True):
        assert texts(new) == [read_texts(old, row) for row in rows[old.name]] and (new.name, new.type) == (
            old.name,
            old.type,
        )


def test_memory_is_bounded_by_a_chunk_of_texts(
    tmp_path: Path, make: Callable[..., TrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lengths(Words):
        def __call__(self, texts: list[str], side: str, prompt: str | None) -> list[list[int]]:
            return [[len(text)] * (len(text) // 5) for text in texts]

    size = 0
    for name in ("a.jsonl", "b.csv"):
        write(tmp_path / name, [{"query": f"q{i}", "positive": f"{i} word" * 1500} for i in range(2000)])
        size += (tmp_path / name).stat().st_size
    config = make("- {file: [a.jsonl, b.csv], name: both}")
    monkeypatch.setattr(set_builder, "_CHUNK_CHARACTERS", 1 << 18)
    tracemalloc.start()
    try:
        found = load_one(config, tmp_path, Lengths())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == 4000 and size > 3e7
    assert peak < size / 8


def test_progress_counts_rows(tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    write(tmp_path / "a.jsonl", PAIRS)
    said: list[tuple[str, int, int]] = []
    load_sets(make("- file: a.jsonl"), Words(), tmp_path / "cache", lambda *each: said.append(each))
    assert said[-1] == ("read a", 5, 5)


def test_several_files_are_one_data_set(tmp_path: Path, make: Callable[..., TrainingConfig]) -> None:
    write(tmp_path / "a.jsonl", PAIRS[:2])
    write(tmp_path / "b.csv", PAIRS[2:])
    found = load_one(make("- {file: [a.jsonl, b.csv], name: both}"), tmp_path)
    assert [row["query"] for row in texts(found)] == [row["query"] for row in PAIRS]
