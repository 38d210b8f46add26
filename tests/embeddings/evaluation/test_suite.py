"""Suites: every type and format runs as an ordinary mteb task, with the scores of mteb's own; mistakes have lines."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import pytest

from embeddings.evaluation import suite, suite_check
from embeddings.evaluation.mteb_tasks import mteb_task
from merging.errors import CuveeError

Rows = list[dict[str, Any]]
ROWS = 48  # enough for scores that differ, few enough for a second


def jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)


def write_task(folder: Path, yaml: str, **files: Rows) -> suite.SuiteTask:
    for name, rows in files.items():
        jsonl(folder / f"{name}.jsonl", rows)
    (folder / "task.yml").write_text(yaml, encoding="utf-8")
    return suite.load(folder)[0]


def few(name: str, split: str, rows: int = ROWS) -> Rows:
    return next(task for task in suite.load() if task.name == name).read(split)[:rows]


@pytest.fixture(scope="module")
def model(minilm: Path) -> Any:
    """The real all-MiniLM-L6-v2 as mteb itself wraps it."""
    import warnings

    import mteb
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mteb calls what sentence-transformers has renamed
        return mteb.models.SentenceTransformerEncoderWrapper(SentenceTransformer(str(minilm), device="cpu"))


def scores(model: Any, task: Any, split: str = "test") -> dict[str, float]:
    """All numbers that mteb reports, those inside lists and mappings too."""
    import mteb

    result = mteb.evaluate(
        model,
        [task],
        cache=None,
        encode_kwargs={"batch_size": 16, "show_progress_bar": False},
        show_progress_bar=False,
    )
    return dict(numbers("", result.task_results[0].scores[split][0]))


def numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, Real):
        yield name, float(value)


# The same as mteb's own tasks, which read the files their own way

#: type: rows as the suite has them, mteb's class, and mteb's names of the columns
TABLES: dict[str, tuple[dict[str, Rows], str, dict[str, str]]] = {
    "STS": (
        {
            "test": [
                {"sentence1": r["query"], "sentence2": r["positive"], "score": i % 7}
                for i, r in enumerate(few("phenotype", "test"))
            ]
        },
        *("AbsTaskSTS", {}),
    ),
    "PairClassification": ({"test": few("same-sense", "test")}, "AbsTaskPairClassification", {"label": "labels"}),
    "BitextMining": ({"test": few("emoji-german", "test")}, "AbsTaskBitextMining", {}),
    "Classification": (
        {
            "test": [{**r, "label": len(r["label"]) % 3} for r in few("intent", "test")],
            "train": [{**r, "label": len(r["label"]) % 3} for r in few("intent", "train")],
        },
        *("AbsTaskClassification", {}),
    ),
    "Regression": (
        {split: few("sentiment", split) for split in ("test", "train")},
        *("AbsTaskRegression", {"score": "value"}),
    ),
    "Clustering": (
        {"test": few("organ-system", "test")},
        *("AbsTaskClustering", {"text": "sentences", "label": "labels"}),
    ),
}


@pytest.mark.filterwarnings("ignore")  # of scikit-learn, about labels that a small sample lacks
@pytest.mark.parametrize("kind", TABLES)
def test_scores_equal_those_of_mteb_on_the_same_rows(
    kind: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import mteb.abstasks as theirs
    from mteb.abstasks.regression import AbsTaskRegression
    from mteb.abstasks.task_metadata import TaskMetadata

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows, parent, names = TABLES[kind]
    for split in rows:
        jsonl(tmp_path / "theirs" / f"{split}.jsonl", [{names.get(k, k): v for k, v in r.items()} for r in rows[split]])
    files = ", ".join(f"{split}: {split}.jsonl" for split in rows)
    ours = write_task(tmp_path / "ours", f"type: {kind}\nfiles: {{{files}}}\n", **rows)
    metadata = TaskMetadata(
        name="Theirs",
        description="the same rows",
        dataset={"path": str(tmp_path / "theirs"), "revision": "main"},
        type=kind,
        eval_langs=["eng-Latn"],
        main_score=ours.metric,
    )
    more = (
        {"max_fraction_of_documents_to_embed": None, "max_documents_per_cluster": ROWS} if kind == "Clustering" else {}
    )
    base = AbsTaskRegression if kind == "Regression" else getattr(theirs, parent)
    expected = scores(model, type("Theirs", (base,), {"metadata": metadata, **more})())
    assert len(expected) > 3
    assert scores(model, mteb_task(ours)) == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Retrieval", "Reranking"])
def test_ranking_equals_that_of_mteb_on_the_same_judgments(kind: str, model: Any, tmp_path: Path) -> None:
    import mteb.abstasks as theirs
    from mteb.abstasks.task_metadata import TaskMetadata

    pairs = few("word", "test")
    corpus = [{"_id": f"d{i}", "title": "word" if i % 2 else "", "text": r["positive"]} for i, r in enumerate(pairs)]
    queries = [{"_id": f"q{i}", "text": r["query"]} for i, r in enumerate(pairs)]
    judged = {f"q{i}": {f"d{(i + k) % ROWS}": grade for k, grade in enumerate((2, 1, 0, 0))} for i in range(ROWS)}
    qrels = [{"query-id": q, "corpus-id": d, "score": s} for q, docs in judged.items() for d, s in docs.items()]
    yaml = f"type: {kind}\nfiles: {{test: {{corpus: corpus.jsonl, queries: queries.jsonl, qrels: qrels.jsonl}}}}\n"
    ours = write_task(tmp_path, yaml, corpus=corpus, queries=queries, qrels=qrels)
    metadata = TaskMetadata(
        name="TheirRanking",
        description="the same judgments",
        dataset={"path": "none", "revision": "none"},
        type=kind,
        eval_langs=["eng-Latn"],
        main_score=ours.metric,
    )

    class Theirs(theirs.AbsTaskRetrieval):  # in mteb's first form, which mteb converts
        def load_data(self, *args: Any, **kwargs: Any) -> None:
            self.corpus = {"test": {d["_id"]: {"title": d["title"], "text": d["text"]} for d in corpus}}
            self.queries = {"test": {q["_id"]: q["text"] for q in queries}}
            self.relevant_docs = {"test": judged}
            if kind == "Reranking":
                self.top_ranked = {"test": {query: list(docs) for query, docs in judged.items()}}
            self.data_loaded = True

    Theirs.metadata = metadata
    expected = scores(model, Theirs())
    assert 0 < expected["main_score"] < 1
    assert scores(model, mteb_task(ours)) == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.filterwarnings("ignore")
def test_plain_pairs_score_as_the_same_pool_written_out(model: Any, tmp_path: Path) -> None:
    pairs = few("phenotype", "test")
    pairs.append({"query": pairs[0]["query"], "positive": pairs[1]["positive"]})  # a query with two right answers
    plain = write_task(tmp_path / "plain", "type: Retrieval\nfiles: {test: rows.jsonl}\n", rows=pairs)
    documents = sorted({row["positive"] for row in pairs})
    questions = sorted({row["query"] for row in pairs})
    written = write_task(
        tmp_path / "written",
        "type: Retrieval\nfiles: {test: {corpus: corpus.jsonl, queries: queries.jsonl, qrels: qrels.jsonl}}\n",
        corpus=[{"id": f"d{i}", "text": text} for i, text in enumerate(documents)],
        queries=[{"id": i, "text": text} for i, text in enumerate(questions)],
        qrels=[
            {"query": questions.index(r["query"]), "doc": f"d{documents.index(r['positive'])}", "relevance": 1}
            for r in pairs
        ],
    )
    assert scores(model, mteb_task(plain))["main_score"] == scores(model, mteb_task(written))["main_score"]
    key = lambda row: (row["query"], row["positive"])  # noqa: E731
    assert sorted(plain.read("test"), key=key) == sorted(written.read("test"), key=key)


@pytest.mark.filterwarnings("ignore")
def test_every_model_is_clustered_on_the_same_samples(model: Any, tmp_path: Path) -> None:
    yaml = "type: Clustering\nfiles: {test: rows.jsonl}\n"
    task = mteb_task(write_task(tmp_path, yaml, rows=few("organ-system", "test")))
    assert scores(model, task) == scores(model, task)


def test_tasks_keep_name_metadata_and_digest_after_mteb_unloads_them() -> None:
    for task in suite.load():
        made = mteb_task(task)
        made.data_loaded = True
        made.unload_data()
        assert (made.metadata.name, made.metadata.main_score) == (task.name, task.metric)
        assert made.metadata.dataset == {"path": f"cuvee/suite/{task.name}", "revision": task.digest}
        assert list(made.eval_splits) == ["test"]


def test_validation_and_train_are_evaluated_on_their_own_rows() -> None:
    for task in suite.load():
        for split in task.splits:
            made = mteb_task(task, split)
            assert list(made.eval_splits) == [split]
            made.load_data()
            data = made.dataset["default"] if task.type in ("Retrieval", "Reranking") else made.dataset
            assert split in data


# Files


def _csv(file: Path, rows: Rows, delimiter: str = ",") -> None:
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def _parquet(file: Path, rows: Rows) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), file)


FORMATS: dict[str, Callable[[Path, Rows], None]] = {
    "jsonl": jsonl,
    "jsonl.gz": jsonl,
    "csv": _csv,
    "tsv": lambda file, rows: _csv(file, rows, "\t"),
    "parquet": _parquet,
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_rows(form: str, tmp_path: Path) -> None:
    rows = [
        {"sentence1": 'says "a, b"\nand goes on', "sentence2": "größer\tals", "score": 1.5},
        {"sentence1": "second", "sentence2": " ", "score": -2.0},
    ]
    FORMATS[form](tmp_path / f"rows.{form}", rows)
    task = write_task(tmp_path, f"type: STS\nfiles: {{test: rows.{form}}}\n")
    assert task.read("test") == rows


def test_columns_are_found_by_the_names_the_author_gives(tmp_path: Path) -> None:
    yaml = """
        type: Retrieval
        files: {test: {corpus: c.jsonl, queries: q.jsonl, qrels: r.jsonl}, train: t.jsonl}
        columns: {corpus: {text: body}, queries: {id: number, text: question}, query: asks}
    """
    task = write_task(
        tmp_path,
        yaml,
        c=[{"_id": "x", "body": "an answer"}],
        q=[{"number": 7, "question": "what?"}],
        r=[{"asks": 7, "doc": "x", "relevance": 1}],
        t=[{"asks": "why?", "positive": "because", "negative": "no column of ours"}],
    )
    assert task.read("test") == [{"query": "what?", "positive": "an answer"}]
    assert task.read("train") == [{"query": "why?", "positive": "because"}]


def test_digest_follows_the_data_and_the_settings_but_not_the_words(tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "score": 1}, {"sentence1": "c", "sentence2": "d", "score": 2}]
    yaml = "type: STS\nfiles: {test: rows.jsonl}\n"
    first = write_task(tmp_path, yaml, rows=rows).digest
    assert write_task(tmp_path, yaml + "description: pairs\n").digest == first
    assert write_task(tmp_path, yaml + "metric: cosine_pearson\n").digest != first
    assert write_task(tmp_path, yaml, rows=[*rows, rows[0]]).digest != first


def test_a_task_that_changed_since_it_was_loaded_is_not_scored_under_its_old_digest(tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "score": 1}, {"sentence1": "c", "sentence2": "d", "score": 2}]
    task = write_task(tmp_path, "type: STS\nfiles: {test: rows.jsonl}\n", rows=rows)
    made = mteb_task(task)
    jsonl(tmp_path / "rows.jsonl", [*rows, rows[0]])
    with pytest.raises(CuveeError, match=r"task.yml: the task has changed since it was loaded"):
        made.load_data()


def test_the_documentations_suite_is_sound(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "your-own-data.md").read_text(encoding="utf-8")
    files = re.findall(r"^`([^`\n]+)`:\n\n```\w*\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for name, text in files:
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert [task.name for task in suite.load(tmp_path)] == ["support-questions", "ticket-kind"]
    assert suite_check.check(tmp_path) == []


# Mistakes

YAML_MISTAKES = {
    "": r"task.yml: is empty; write at least 'type:' and 'files:'",
    "- STS\n": r"task.yml:1: is no mapping",
    "files: {test: rows.jsonl}": r"task.yml:1: has no 'type'; known: 'Retrieval', ",
    "type: Retreival\nfiles: {test: rows.jsonl}": r"task.yml:1: 'Retreival' is no type of task; did you mean 'Retrieval'\?",
    "type: STS\nfile: {test: rows.jsonl}": r"task.yml:2: 'file' is no key of a task; did you mean 'files'\?",
    "type: STS\n": r"task.yml:1: needs 'files'",
    "type: STS\nfiles:\n  tset: rows.jsonl": r"task.yml:3: 'tset' is no split; did you mean 'test'\?",
    "type: STS\nfiles:\n  test: none.jsonl": r"task.yml:3: no such file: none.jsonl",
    "type: STS\nfiles:\n  test: {corpus: rows.jsonl}": r"task.yml:3: must name a file, not a mapping",
    "type: Retrieval\nfiles:\n  test: {corpus: rows.jsonl}": r"task.yml:3: 'queries' is missing",
    "type: STS\nmetric: ndcg_at_10\nfiles: {test: rows.jsonl}": r"task.yml:2: 'ndcg_at_10' is no metric of STS; the usual",
    "type: STS\nfiles: {test: rows.jsonl}\ncolumns: {sentense1: a}": r"task.yml:3: 'sentense1' is no column of the task; did",
    "type: Classification\nfiles: {test: rows.jsonl}": r"task.yml:2: needs a train split",
    "type: STS\nfiles: {test: rows.jsonl}\nlanguages: en": r"task.yml:3: 'en' is no language; write it as mteb does",
    "type: STS\nfiles: {test: rows.jsonl}\nprompt: {passage: a}": r"task.yml:3: 'passage' is no prompt",
    "type: STS\ntype: STS": r"task.yml:2: 'type' is given twice",
    "type: [STS": r"task.yml:\d: is not valid YAML",
}


@pytest.mark.parametrize("yaml", YAML_MISTAKES, ids=range(len(YAML_MISTAKES)))
def test_a_mistake_in_the_yaml_is_told_with_its_line(yaml: str, tmp_path: Path) -> None:
    with pytest.raises(CuveeError, match=YAML_MISTAKES[yaml]) as error:
        write_task(tmp_path, yaml, rows=[{}])
    assert "recipe" not in str(error.value)


PAIR = '{"sentence1": "a", "sentence2": "b", "score": 1}\n'
FILE_MISTAKES = {
    PAIR + '{"sentence1": "a"': r"rows.jsonl:2: is not JSON",
    PAIR + "[1]": r"rows.jsonl:2: is no JSON object",
    PAIR + '{"sentence1": "a", "sentence_2": "b"}': r"rows.jsonl:2: has no 'sentence2'; did you mean 'sentence_2'\?",
    PAIR + PAIR.replace("1}", "NaN}"): r"rows.jsonl:2: 'score' must be a finite number, not nan",
    PAIR.replace("1}", '"high"}'): r"rows.jsonl:1: 'score' must be a finite number, not 'high'",
    PAIR.replace('"a"', "1"): r"rows.jsonl:1: 'sentence1' must be text, not 1",
    PAIR.replace('"a"', "null"): r"rows.jsonl:1: 'sentence1' is null",
    "\n": r"rows.jsonl: holds no row",
    "\udcff": r"rows.jsonl:1: is not UTF-8 text",
}


@pytest.mark.parametrize("text", FILE_MISTAKES, ids=range(len(FILE_MISTAKES)))
def test_a_mistake_in_a_table_is_told_with_its_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    task = write_task(tmp_path, "type: STS\nfiles: {test: rows.jsonl}\n")
    with pytest.raises(CuveeError, match=FILE_MISTAKES[text]):
        task.read("test")


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.parquet", "rows.txt", "rows.csv"])
def test_a_damaged_or_unknown_file_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(PAIR.encode() * 100)[:40] if name.endswith("gz") else b"a\n1,2\n\x00")
    task = write_task(tmp_path, f"type: STS\nfiles: {{test: {name}}}\n")
    with pytest.raises(CuveeError, match=name):
        task.read("test")


def test_judgments_of_unknown_ids_and_an_empty_corpus_are_refused(tmp_path: Path) -> None:
    yaml = "type: Retrieval\nfiles: {test: {corpus: c.jsonl, queries: q.jsonl, qrels: r.jsonl}}\n"
    rows = {
        "c": [{"id": "x", "text": "t"}],
        "q": [{"id": "y", "text": "t"}],
        "r": [{"query": "y", "doc": "z", "relevance": 1}],
    }
    with pytest.raises(CuveeError, match=r"r.jsonl:1: judges the document 'z', which c.jsonl does not have"):
        write_task(tmp_path, yaml, **rows).read("test")
    with pytest.raises(CuveeError, match=r"c.jsonl:2: the id 'x' occurs twice"):
        write_task(tmp_path, yaml, **{**rows, "c": rows["c"] * 2}).read("test")
    with pytest.raises(CuveeError, match=r"c.jsonl: holds no row"):
        write_task(tmp_path, yaml, **{**rows, "c": []}).read("test")
    with pytest.raises(CuveeError, match=r"r.jsonl: judges no document as relevant"):
        write_task(tmp_path, yaml, **{**rows, "r": [{"query": "y", "doc": "x", "relevance": 0}]}).read("test")


def test_a_missing_split_and_a_missing_suite_say_so(tmp_path: Path) -> None:
    task = write_task(tmp_path, "type: STS\nfiles: {test: rows.jsonl}\n", rows=[{}])
    for use in (task.read, partial(mteb_task, task)):
        with pytest.raises(CuveeError, match=r"task.yml: the task 'task' has no split 'train'; it has 'test'"):
            use("train")
    with pytest.raises(CuveeError, match=r"none: cannot be read: No such file or directory; a suite is a folder"):
        suite.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CuveeError, match=r"empty: holds no task"):
        suite.load(tmp_path / "empty")
    (tmp_path / "task.yaml").write_text("type: STS\n")
    with pytest.raises(CuveeError, match=r"task.yml: names the same task as task.yaml"):
        suite.load(tmp_path)
