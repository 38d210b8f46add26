"""Evaluation on the real MiniLM: mteb's own scores, never another model's, told apart into examples, and resumed."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embeddings.evaluation import suite
from embeddings.evaluation.evaluate import Settings, evaluate, refuse_failures
from embeddings.evaluation.mteb_tasks import mteb_task
from embeddings.evaluation.result import Result
from embeddings.evaluation.scoring import score
from embeddings.evaluation.tasks import Target, of_task, resolve
from merging.errors import CuveeError

SHARED = Path(__file__).parents[4] / "shared" / "data"
Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On busy cores the threads of one operation wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def some(task: str, split: str, rows: int) -> Rows:
    return next(each for each in suite.load() if each.name == task).read(split)[:rows]


def of_labels(task: str, split: str, labels: int, rows: int) -> Rows:
    """Rows of a few labels, the same ones in each split."""
    kept = sorted({row["label"] for row in some(task, "test", 10_000)})[:labels]
    return [row for row in some(task, split, 10_000) if row["label"] in kept][:rows]


def write_task(folder: Path, name: str, head: str, **splits: Rows) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}-{split}.jsonl").write_text(lines, encoding="utf-8")
    files = ", ".join(f"{split}: {name}-{split}.jsonl" for split in splits)
    (folder / f"{name}.yml").write_text(f"{head}\nfiles: {{{files}}}\n", encoding="utf-8")


@pytest.fixture(scope="module")
def every_type(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite with a task of each type, of a few real rows."""
    folder = tmp_path_factory.mktemp("suite")
    word = some("word", "test", 30)
    graded = [
        {"sentence1": a["query"], "sentence2": b["positive"], "score": float(i % 3 == 0) + i % 5 / 10}
        for i, a in enumerate(word)
        for b in [a if i % 3 == 0 else word[i - 1]]
    ]
    write_task(folder, "retrieval", "type: Retrieval\ngroup: in", test=word)
    write_task(folder, "mrr", "type: Retrieval\nmetric: mrr_at_5\ngroup: in", test=some("phenotype", "test", 20))
    write_task(folder, "reranking", "type: Reranking\ngroup: out", test=some("sense", "test", 6))
    write_task(folder, "sts", "type: STS\ngroup: in", test=graded)
    write_task(folder, "pairs", "type: PairClassification\ngroup: out", test=some("same-sense", "test", 24))
    classes = {split: of_labels("intent", split, 3, 36) for split in ("test", "train")}
    write_task(folder, "classes", "type: Classification\ngroup: in", **classes)
    values = {split: some("sentiment", split, rows) for split, rows in (("test", 40), ("train", 50))}
    write_task(folder, "values", "type: Regression\ngroup: in", **values)
    write_task(folder, "clusters", "type: Clustering\ngroup: out", test=of_labels("organ-system", "test", 3, 36))
    write_task(folder, "bitext", "type: BitextMining\ngroup: out", test=some("emoji-german", "test", 24))
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A suite of two quick tasks."""
    write_task(tmp_path / "small", "one", "type: Retrieval\ngroup: in", test=some("word", "test", 12))
    write_task(tmp_path / "small", "two", "type: Retrieval\ngroup: out", test=some("phenotype", "test", 12))
    return tmp_path / "small"


def changed(model: Path, out: Path, change: Callable[[str, Any], Any]) -> Path:
    """A copy of a model with other weights."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(model, out, dirs_exist_ok=True)
    tensors = {name: change(name, tensor) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def damaged(name: str, tensor: Any) -> Any:
    if "layer.3" not in name or tensor.ndim < 2:
        return tensor
    return (tensor + 0.1 * np.random.default_rng(0).normal(size=tensor.shape)).astype(tensor.dtype)


@pytest.fixture(scope="module")
def worse(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM with noise in one layer."""
    return changed(minilm, tmp_path_factory.mktemp("models") / "worse", damaged)


@dataclass(frozen=True)
class Run:
    out: Path
    content: dict[str, Any]

    @property
    def results(self) -> dict[tuple[str, str], Result]:
        found = [Result.load(file) for file in (self.out / "results").rglob("*.json")]
        return {(result.model, result.task): result for result in found}


@pytest.fixture(scope="module")
def run(every_type: Path, minilm: Path, worse: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """MiniLM and the worse one on a task of each type."""
    out = tmp_path_factory.mktemp("run") / "out"
    content, _ = evaluate([str(minilm), str(worse)], out, suites=[every_type])
    return Run(out, content)


@pytest.fixture(scope="module")
def theirs(minilm: Path) -> Callable[[Any], float]:
    """mteb's own score of MiniLM in its own wrapper, with sentence-transformers' defaults."""
    import mteb
    from sentence_transformers import SentenceTransformer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = mteb.models.SentenceTransformerEncoderWrapper(SentenceTransformer(str(minilm), device="cpu"))

    def of(task: Any) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
        return float(done.task_results[0].get_score())

    return of


def test_every_score_is_mtebs_own(run: Run, every_type: Path, theirs: Callable[[Any], float]) -> None:
    first = next(iter(run.content["scores"].values()))
    for task in suite.load(every_type):
        assert first[task.name] == pytest.approx(theirs(mteb_task(task)), abs=1e-4), task.name


def shared_task(name: str, rows: dict[str, Rows]) -> Target:
    """One of mteb's own tasks, with rows of ours in the columns that it has."""
    import datasets
    import mteb

    task = mteb.get_task(name)

    def load_data(self: Any, *args: Any, **kwargs: Any) -> None:
        self.dataset = datasets.DatasetDict({split: datasets.Dataset.from_list(data) for split, data in rows.items()})
        self.data_loaded = True

    local = type(f"Local{name}", (type(task),), {"load_data": load_data})
    about = task.metadata
    return Target(
        *(name, about.type, about.main_score, "mteb", dict(about.dataset), tuple(task.eval_splits), ("default",)),
        fresh=lambda seed: local(seed=seed),
    )


def shared_rows(folder: str, split: str, keep: Callable[[dict[str, Any]], bool], rows: int) -> Rows:
    file = SHARED / folder / f"{split}.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"no data of mteb's own tasks beside the checkout ({folder})")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [row for row in map(json.loads, lines) if keep(row)][:rows]


@pytest.mark.filterwarnings("ignore:The task '.*' is superseded")
@pytest.mark.parametrize("name", ["STSBenchmark", "Banking77Classification"])
def test_scores_of_mtebs_own_tasks_are_mtebs(name: str, minilm: Path, theirs: Callable[[Any], float]) -> None:
    from embeddings.evaluation.encoder import Encoder
    from embeddings.model import open_model

    if name == "STSBenchmark":
        rows = {"test": shared_rows("stsb-en", "test", lambda row: True, 1379)[::15]}
    else:
        of = sorted({row["label"] for row in shared_rows("banking77", "test", lambda row: True, 10_000)})[:4]
        rows = {s: shared_rows("banking77", s, lambda row: row["label"] in of, 400)[::4] for s in ("test", "train")}
        assert len({row["label"] for row in rows["train"]}) > 1
    target = shared_task(name, rows)
    parts, examples, _ = score(Encoder(open_model(minilm)), target)
    assert len(parts) == 1 and len(examples) == 1 and len(examples[0].ids) == len(rows["test"])
    assert parts[0].score == pytest.approx(theirs(target.fresh(42)), abs=1e-4)


def test_every_score_is_told_apart_into_examples_that_give_it_again(run: Run) -> None:
    for result in run.results.values():
        (examples,) = result.examples
        assert examples.score == pytest.approx(result.score, abs=2e-5), result.task
    sizes = {task: len(result.examples[0].ids) for (_, task), result in run.results.items()}
    assert sizes["retrieval"] == 30 and sizes["sts"] == 30 and sizes["reranking"] == 6 and sizes["clusters"] <= 36


def test_other_metrics_are_told_apart_too(minilm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "suite"
    classes = {split: of_labels("intent", split, 3, 24) for split in ("test", "train")}
    two = {
        split: [{**row, "label": int(row["label"] == rows[0]["label"])} for row in rows]
        for split, rows in classes.items()
    }
    metrics = ("f1", "f1_weighted", "precision", "recall_weighted")
    for metric in metrics:
        write_task(folder, metric, f"type: Classification\nmetric: {metric}", **classes)
    write_task(folder, "ap", "type: Classification\nmetric: ap", **two)
    values = {split: some("sentiment", split, rows) for split, rows in (("test", 15), ("train", 25))}
    write_task(folder, "r2", "type: Regression\nmetric: r2", **values)
    write_task(
        folder, "precision-bitext", "type: BitextMining\nmetric: precision", test=some("emoji-german", "test", 24)
    )
    write_task(folder, "ami", "type: Clustering\nmetric: ami", test=of_labels("organ-system", "test", 4, 40))
    content, comparison = evaluate([str(minilm)] * 2, tmp_path / "out", suites=[folder])
    assert not content["failed"] and comparison is not None
    found = {task: result for (_, task), result in Run(tmp_path / "out", {}).results.items()}
    assert not found.pop("ami").examples
    for task, result in found.items():
        (examples,) = result.examples
        assert examples.score == pytest.approx(result.score, abs=2e-5), task
    remarks = {row.name: row.remark for row in comparison.rows if row.kind == "task"}
    assert remarks.pop("ami") == "ami is not computed anew on drawn examples" and not any(remarks.values())


@pytest.mark.filterwarnings("ignore")
def test_tasks_of_several_labels_and_summaries_are_told_apart_too(minilm: Path) -> None:
    from embeddings.evaluation.encoder import Encoder
    from embeddings.model import open_model

    encoder = Encoder(open_model(minilm))
    rows = of_labels("intent", "train", 4, 60)
    names = sorted({row["label"] for row in rows})
    labelled = [
        {"text": row["text"], "label": sorted({names.index(row["label"]), 4 + len(row["text"]) % 2})} for row in rows
    ]
    for task in ("EmitClassification", "CovidDisinformationNLMultiLabelClassification"):  # by accuracy, by F1
        target = shared_task(task, {"train": labelled[::2], "test": labelled[1::2]})
        parts, (examples,), _ = score(encoder, target)
        assert examples.score == pytest.approx(parts[0].score, abs=2e-5) and len(examples.ids) == len(labelled[1::2])
    word = some("word", "test", 40)
    judged = [
        {
            "text": word[i]["query"],
            "human_summaries": [word[i]["query"]],
            "machine_summaries": [word[j]["positive"] for j in range(i, i + 4)],
            "relevance": [5.0, 1.0, 2.0, 1.0] if i != 3 else [2.0] * 4,
        }
        for i in range(8)
    ]
    parts, (examples,), _ = score(encoder, shared_task("SummEvalSummarization.v2", {"test": judged}))
    assert examples.ids == ("0", "1", "2", "4", "5", "6", "7")  # mteb leaves out what is judged alike
    assert examples.score == pytest.approx(parts[0].score, abs=2e-5)


def test_an_aggregate_has_the_examples_of_its_tasks(every_type: Path, minilm: Path) -> None:
    from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    from embeddings.evaluation.encoder import Encoder
    from embeddings.model import open_model

    tasks = [mteb_task(task) for task in suite.load(every_type) if task.name in ("clusters", "retrieval")]
    about = {"description": "both", "main_score": "main_score", "type": "Retrieval", "eval_splits": ["test"]}
    both = type("Both", (AbsTaskAggregate,), {"metadata": AggregateTaskMetadata(name="Both", tasks=tasks, **about)})
    target = of_task(both(), "mteb")
    once, again = (score(Encoder(open_model(minilm)), target)[:2] for _ in range(2))
    assert once[0] == again[0], "each model gets tasks that no other was scored on"
    parts, examples = once
    assert [each.part.split("/")[0] for each in examples] == ["clusters", "retrieval"]
    assert np.mean([each.score for each in examples]) == pytest.approx(parts[0].score, abs=2e-5)


def test_a_damaged_model_is_worse_beyond_the_noise(run: Run) -> None:
    first, second = run.content["models"]
    rows = {row["name"]: row for row in run.content["comparison"]}
    assert rows["mean over tasks"]["best"] == [first]
    gap = rows["mean over tasks"]["differences"][second]
    assert gap["low"] < gap["value"] < gap["high"] < 0
    assert rows["retrieval"]["differences"][second]["high"] < 0


def test_what_a_score_follows_from_stands_beside_it(run: Run, every_type: Path) -> None:
    by_name = {task.name: task for task in suite.load(every_type)}
    for (model, task), result in run.results.items():
        made = result.made_by
        assert made["digest"] == run.content["models"][model]["digest"]
        assert made["dataset"]["revision"] == by_name[task].digest
        assert made["seed"] == 42 and not any(made["prompts"].values()) and made["dtype"] == "float32"
        assert {"mteb", "torch", "python"} <= made["versions"].keys()
    assert json.loads((run.out / "cuvee.json").read_text("utf-8"))["state"] == "done"


def test_the_comparison_lies_in_the_run_in_three_forms(run: Run) -> None:
    first = next(iter(run.content["scores"]))
    value = run.content["scores"][first]["retrieval"]
    assert f"{100 * value:.2f}" in (run.out / "scores.md").read_text("utf-8")
    rows = list(csv.DictReader((run.out / "scores.csv").read_text("utf-8").splitlines()))
    assert float(next(r["score"] for r in rows if (r["name"], r["model"]) == ("retrieval", first))) == value
    assert json.loads((run.out / "scores.json").read_text("utf-8"))["rows"][0]["scores"][first] is not None
    assert set(run.content["means"][first]) == {"in", "out", "all", "types"}


def test_mtebs_own_files_hold_the_same_scores(run: Run) -> None:
    import mteb

    found = {}
    for file in (run.out / "mteb").rglob("retrieval.json"):
        found[file.parent.name] = mteb.results.TaskResult.from_disk(file).get_score()
    ours = {r.made_by["revision"]: r.score for (_, task), r in run.results.items() if task == "retrieval"}
    assert found == pytest.approx(ours)


def test_a_second_run_does_nothing_again(run: Run, every_type: Path, minilm: Path, worse: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in (run.out / "results").rglob("*.json")}
    content, _ = evaluate([str(minilm), str(worse)], run.out, suites=[every_type])
    assert content["reused"] == len(before) == 18
    assert {file: file.stat().st_mtime_ns for file in (run.out / "results").rglob("*.json")} == before
    assert content["scores"] == run.content["scores"] and content["comparison"] == run.content["comparison"]


def test_a_changed_model_is_never_given_anothers_score(minilm: Path, small: Path, tmp_path: Path) -> None:
    """The same folder, name and run; only the weights differ."""
    model, out = tmp_path / "mine", tmp_path / "out"
    shutil.copytree(minilm, model)
    good = evaluate([str(model)], out, suites=[small])[0]
    changed(minilm, model, damaged)
    bad = evaluate([str(model)], out, suites=[small])[0]
    assert bad["reused"] == 0 and bad["models"]["mine"]["digest"] != good["models"]["mine"]["digest"]
    assert all(bad["scores"]["mine"][task] < good["scores"]["mine"][task] - 0.05 for task in ("one", "two"))
    fresh = evaluate([str(model)], tmp_path / "other", suites=[small])[0]
    assert fresh["scores"] == bad["scores"]
    shutil.copy(minilm / "model.safetensors", model / "model.safetensors")
    again = evaluate([str(model)], out, suites=[small])[0]
    assert again["reused"] == 2 and again["scores"] == good["scores"]


def test_what_changes_vectors_beside_the_weights_is_another_model_too(
    minilm: Path, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plain = evaluate([str(minilm)], out, names=["one"], suites=[small])[0]
    (label,) = plain["scores"]
    for settings in (
        Settings(prompts={"query": "what is it: "}),
        Settings(truncate_dim=64),
        Settings(dtype="bfloat16"),
    ):
        other = evaluate([str(minilm)], out, names=["one"], suites=[small], settings=settings)[0]
        assert other["reused"] == 0
        assert settings.dtype == "bfloat16" or other["scores"] != plain["scores"]
    assert evaluate([str(minilm)], out, names=["one"], suites=[small])[0]["reused"] == 1
    assert evaluate([str(minilm)], out, names=["one"], suites=[small], settings=Settings(seed=1))[0]["reused"] == 0
    files = [Result.load(file) for file in (out / "results" / label.replace("/", "__")).rglob("one.json")]
    prompts = {result.made_by["prompts"].get("query") for result in files}
    assert prompts == {"", "what is it: "}


def test_changed_data_are_scored_again_and_nothing_else(minilm: Path, small: Path, tmp_path: Path) -> None:
    evaluate([str(minilm)], tmp_path / "out", suites=[small])
    rows = some("word", "test", 13)
    write_task(small, "one", "type: Retrieval\ngroup: in", test=rows)
    content, _ = evaluate([str(minilm)], tmp_path / "out", suites=[small])
    assert content["reused"] == 1
    (result,) = [r for (_, task), r in Run(tmp_path / "out", {}).results.items() if task == "one"]
    assert len(result.examples[0].ids) == 13 and result.made_by["encoded"] == 2  # the new query and its answer


def test_a_damaged_result_is_scored_again(minilm: Path, small: Path, tmp_path: Path) -> None:
    first = evaluate([str(minilm)], tmp_path / "out", suites=[small])[0]
    (file,) = (tmp_path / "out" / "results").rglob("one.json")
    for text in ("", "{", '{"score": 1}'):
        file.write_text(text, encoding="utf-8")
        again = evaluate([str(minilm)], tmp_path / "out", suites=[small])[0]
        assert again["reused"] == 1 and again["scores"] == first["scores"], text


def test_an_interrupted_run_goes_on_where_it_was(minilm: Path, small: Path, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what.endswith("on two"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate([str(minilm)], tmp_path / "out", suites=[small], progress=interrupt)
    assert json.loads((tmp_path / "out" / "cuvee.json").read_text("utf-8"))["state"] == "begun"
    content, _ = evaluate([str(minilm)], tmp_path / "out", suites=[small])
    assert content["reused"] == 1 and not content["failed"]
    assert content["scores"] == evaluate([str(minilm)], tmp_path / "other", suites=[small])[0]["scores"]


def test_a_second_model_is_scored_on_the_same_draws(minilm: Path, tmp_path: Path) -> None:
    """mteb's generators go on from call to call: a model listed twice would differ from itself."""
    rows = of_labels("organ-system", "test", 4, 40)
    write_task(tmp_path / "suite", "clusters", "type: Clustering", test=rows)
    content, comparison = evaluate([str(minilm)] * 2, tmp_path / "out", suites=[tmp_path / "suite"])
    first, second = content["scores"].values()
    assert first == second
    assert comparison is not None
    (gap,) = comparison.rows[0].differences.values()
    assert (gap.value, gap.low, gap.high) == (0, 0, 0)


def test_a_failing_task_is_told_in_one_line_and_the_rest_is_kept(minilm: Path, small: Path, tmp_path: Path) -> None:
    write_task(small, "broken", "type: STS", test=[{"sentence1": "a", "sentence2": "b", "score": 1}] * 3)
    (small / "lost.yml").write_text(
        "type: Retrieval\nfiles: {test: {corpus: c.jsonl, queries: q.jsonl, qrels: r.jsonl}}\n", encoding="utf-8"
    )
    (small / "c.jsonl").write_text('{"id": "d", "text": "some"}\n', encoding="utf-8")
    (small / "q.jsonl").write_text('{"id": "q", "text": "some"}\n', encoding="utf-8")
    (small / "r.jsonl").write_text('{"query": "q", "doc": "unheard", "relevance": 1}\n', encoding="utf-8")
    content, comparison = evaluate([str(minilm)], tmp_path / "out", suites=[small])
    (failed,) = content["failed"].values()
    assert set(failed) == {"broken", "lost"} and "not a number" in failed["broken"] and "unheard" in failed["lost"]
    assert comparison is not None and content["scores"][comparison.models[0]].keys() == {"one", "two"}
    others: list[str] = []
    with pytest.raises(CuveeError, match="2 scores are missing"):
        refuse_failures(content, others.append)
    assert len(others) == 1
    assert json.loads((tmp_path / "out" / "cuvee.json").read_text("utf-8"))["state"] == "incomplete"


def test_a_reason_that_models_share_is_told_once() -> None:
    lost, broken = "STS12: its data are not there", "b: has no config.json"
    failed = {"a": {"STS12": lost}, "b": {"STS12": broken, "word": broken}, "c": {"STS12": lost}}
    notes: list[str] = []
    with pytest.raises(CuveeError) as error:
        refuse_failures({"failed": failed, "out": "OUT"}, notes.append)
    assert str(error.value) == f"a, c: 4 scores are missing, some because: {lost}; what is done is kept in OUT"
    assert notes == [f"b: {broken}"]
    with pytest.raises(CuveeError, match=rf"^a, b, c and 2 more: 5 scores are missing: {lost}; what is"):
        refuse_failures({"failed": {name: {"STS12": lost} for name in "abcde"}, "out": "OUT"}, notes.append)
    assert len(notes) == 1


def test_a_model_of_nan_fails_alone(minilm: Path, small: Path, tmp_path: Path) -> None:
    def nan(name: str, tensor: Any) -> Any:
        return tensor * np.nan if name.endswith("layer.5.output.LayerNorm.weight") else tensor

    broken = changed(minilm, tmp_path / "broken", nan)
    content, _ = evaluate([str(broken), str(minilm)], tmp_path / "out", suites=[small])
    assert set(content["failed"]) == {"broken"} and len(content["scores"]) == 1
    assert all("not finite" in line for line in content["failed"]["broken"].values())


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"names": ["STSBenchmrk"]}, "'STSBenchmrk' is no task or benchmark of mteb.*'STSBenchmark'"),
        ({"names": ["organ-systm"]}, "'organ-systm' is no task .*'organ-system'.*add --suite FOLDER"),
        ({"names": ["MTEB(eng,v2)"]}, r"nearest are .*'MTEB\(eng, v2\)'"),
        ({"languages": ["xxq"]}, "'xxq' is no language"),
        ({"types": ["Retrievl"]}, "'Retrievl' is no type of task.*'Retrieval'"),
        ({"names": ["STSBenchmark"], "types": ["Retrieval"]}, "no task is left"),
        ({"suites": [Path("nowhere")]}, "nowhere"),
    ],
)
def test_what_names_no_task_is_refused_with_the_nearest(about: dict[str, Any], said: str) -> None:
    with pytest.raises(CuveeError, match=said):
        resolve(**about)


def test_benchmarks_languages_and_types_name_mtebs_tasks() -> None:
    english = resolve(["MTEB(eng, v2)"])
    assert len(english) == 41 and {target.group for target in english} == {"MTEB(eng, v2)"}
    sts = resolve(["MTEB(eng, v2)"], types=["STS"])
    assert {target.type for target in sts} == {"STS"} and 0 < len(sts) < 41
    (german,) = resolve(["AmazonCounterfactualClassification"], languages=["deu"])
    assert german.subsets == ("de",) and german.fresh(1).hf_subsets == ["de"]
    assert {t.type for t in resolve(languages=["dan"], types=["BitextMining"])} == {"BitextMining"}
    assert [target.name for target in resolve(["STS12", "STS12"])] == ["STS12"]


def test_two_tasks_of_one_name_are_refused(tmp_path: Path, small: Path) -> None:
    write_task(tmp_path / "other", "one", "type: Retrieval", test=some("word", "test", 9))
    assert [target.name for target in resolve(suites=[small, small])] == ["one", "two"]
    with pytest.raises(CuveeError, match="one: is the name of two tasks"):
        resolve(suites=[small, tmp_path / "other"])


def test_names_pick_from_the_suites_and_the_others_are_mtebs(small: Path) -> None:
    assert [t.name for t in resolve(["two"], suites=[small])] == ["two"]
    assert [t.name for t in resolve(["STS12"], suites=[small])] == ["STS12", "one", "two"]
    assert [t.name for t in resolve(["STS12", "one"], suites=[small])] == ["STS12", "one"]


def test_the_shipped_suite_is_the_default_and_other_splits_can_be_scored() -> None:
    assert {target.group for target in resolve(suites=[None])} == {"in-domain", "out-of-domain"}
    said: list[str] = []
    validated = resolve(suites=[None], split="validation", note=said.append)
    assert {target.group for target in validated} == {"in-domain"}
    assert {target.splits for target in validated} == {("validation",)}
    assert len(said) == 1 and "no split 'validation': emoji-german, organ-system" in said[0]
    with pytest.raises(CuveeError, match="has no split 'validation'"):
        resolve(["emoji-german"], suites=[None], split="validation")


def test_the_shipped_suites_tasks_need_no_suite(small: Path) -> None:
    (word,) = resolve(["word"])
    assert word == next(target for target in resolve(suites=[None]) if target.name == "word")
    assert [t.name for t in resolve(["word", "STS12", "intent"])] == ["STS12", "word", "intent"]
    assert [t.name for t in resolve(["one", "word"], suites=[small])] == ["one", "word"]
    assert [t.name for t in resolve(["word"], types=["Retrieval"])] == ["word"]


def test_data_that_are_not_in_the_cache_are_named(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    content, comparison = evaluate([str(minilm)], tmp_path / "out", names=["STS12"])
    (failed,) = content["failed"].values()
    assert comparison is None and "mteb/sts12-sts" in failed["STS12"] and "neither in the cache" in failed["STS12"]


def test_models_that_cannot_be_used_are_refused_before_any_work(minilm: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for model in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(CuveeError):
            evaluate([str(minilm), str(model)], out, suites=[small])
    with pytest.raises(CuveeError, match="no model is a hub id"):
        evaluate([str(minilm)], out, suites=[small], settings=Settings(revision="main"))
    with pytest.raises(CuveeError, match="prompts called 'qeury'; did you mean 'query'"):
        evaluate([str(minilm)], out, suites=[small], settings=Settings(prompts={"qeury": "x"}))
    with pytest.raises(CuveeError, match="wants a model"):
        evaluate([], out, suites=[small])
    assert not out.exists()


def test_a_model_of_the_hub_is_taken_at_its_revision(
    minilm: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "hub" / "models--our--mini"
    for branch, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        shutil.copytree(minilm, repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / branch).write_text(commit, encoding="utf-8")
    prompts = {"prompts": {"query": "find: "}}
    (repo / "snapshots" / ("b" * 40) / "config_sentence_transformers.json").write_text(json.dumps(prompts), "utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    models = ["our/mini", "our/mini@main", str(minilm)]
    settings = Settings(revision="v2")
    content, _ = evaluate(models, tmp_path / "out", names=["one"], suites=[small], settings=settings)
    first, second, third = content["models"]
    assert (first, second) == ("our/mini@v2", "our/mini@main") and content["reused"] == 0
    digest = {label: content["models"][label]["digest"] for label in content["models"]}
    assert digest[second] == digest[third] != digest[first]


def test_a_folder_that_is_no_run_is_left_alone(minilm: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(CuveeError, match=r"holds no cuvee\.json"):
        evaluate([str(minilm)], tmp_path / "home", suites=[small], dry_run=True)
    (tmp_path / "home" / "cuvee.json").write_text('{"command": "merge"}', encoding="utf-8")
    with pytest.raises(CuveeError, match="is an output of `cuvee merge`"):
        evaluate([str(minilm)], tmp_path / "home", suites=[small])


def test_the_card_gets_the_scores_in_the_form_that_the_hub_reads(minilm: Path, small: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    model = tmp_path / "model-with-card"
    shutil.copytree(minilm, model)
    (model / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n\n# Mine\n\nBy hand.\n", encoding="utf-8")
    first = evaluate([str(model)], tmp_path / "out", suites=[small], write_cards=True)[0]
    write_task(small, "two", "type: Retrieval\ngroup: out", test=some("phenotype", "test", 10))
    second = evaluate([str(model)], tmp_path / "out", suites=[small], write_cards=True)[0]
    assert first["models"] == second["models"], "the card is no part of what the model is"
    card = ModelCard.load(model / "README.md")
    assert card.data.license == "mit" and "By hand." in card.text and card.data.model_name == "model-with-card"
    values = {entry.dataset_name: entry.metric_value for entry in card.data.eval_results}
    scores = second["scores"]["model-with-card"]
    assert values == pytest.approx({f"{task} (default)": scores[task] for task in ("one", "two")}, abs=1e-6)


def test_a_card_that_cannot_be_written_is_refused_first(minilm: Path, small: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(minilm, model)
    (model / "README.md").write_text("---\n: [\n---\n", encoding="utf-8")
    with pytest.raises(CuveeError, match="its head cannot be read"):
        evaluate([str(model)], tmp_path / "out", suites=[small], write_cards=True)


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    import cuvee

    monkeypatch.setattr(sys, "argv", ["cuvee", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cuvee.main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_the_command_prints_one_object_that_keeps_its_promises(
    minilm: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (minilm, "--suite", small, "--out", tmp_path / "out")
    code, out, err = command(monkeypatch, capsys, *arguments, "--json", "--batch-size", 16, "--prompt", "query=q: ")
    assert code == 0, err
    content = json.loads(out.splitlines()[-1])
    promised = {"command", "out", "seconds", "seed", "device", "cuvee_version", "scores", "means"}
    assert promised <= content.keys() and content["settings"]["prompts"] == {"query": "q: "}
    (scores,) = content["scores"].values()
    assert scores.keys() == {"one", "two"} and all(0 < value <= 1 for value in scores.values())
    code, out, _ = command(monkeypatch, capsys, *arguments, "--dry-run", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["tasks"] == ["one", "two"]


def test_the_command_shows_a_table_and_ends_with_2_where_a_score_is_missing(
    minilm: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(small, "broken", "type: STS", test=[{"sentence1": "a", "sentence2": "b", "score": 1}] * 3)
    code, out, err = command(monkeypatch, capsys, minilm, "--suite", small, "--out", tmp_path / "out")
    assert code == 2 and "ndcg_at_10" in out and "mean of in" in out
    assert "not a number" in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "wants models"),
        (["m"], "wants models"),
        (["m", "--out", "o", "--batch-size", "many"], "'many' is no batch size"),
        (["m", "--out", "o", "--prompt", "query"], "'query' names no prompt"),
        (["m", "--out", "o", "--tasks", "Nothing like it, at all"], "is no task"),
        (["no/such", "--out", "o"], "no/such"),
        (["--check", "nowhere"], "nowhere"),
    ],
)
def test_the_command_tells_misuse_in_one_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(monkeypatch, capsys, *arguments)
    assert code == 2 and not out and said in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_command_checks_a_suite(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command(monkeypatch, capsys, "--check", small)
    assert code == 0 and "no errors" in err
    write_task(small, "one", "type: Retrieval", test=[*some("word", "test", 3), {"query": " ", "positive": "x"}])
    code, out, err = command(monkeypatch, capsys, "--check", small, "--json")
    assert code == 2 and "one-test.jsonl:4: error: 'query' is empty" in err
    assert json.loads(out.splitlines()[-1])["findings"]
