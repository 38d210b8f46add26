"""The objective `suite`: what `cuvee evaluate` says of the merged folder, for a model whose weights are rewritten in place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from embeddings.evaluation import evaluate as evaluation
from embeddings.evaluation import suite, tasks
from embeddings.evaluation.search_objective import SuiteObjective
from merging import node
from merging.engine import merge_text
from merging.errors import CuveeError
from merging.live import LiveMerge
from merging.sources import ModelRef
from search.objective import Candidate, get
from tests.commands import run
from tests.conftest import MiniLMFamily
from tests.embeddings.runs import intents, pairs, rows_of, table

pytest.importorskip("mteb")

TASKS = {
    "words": {"type": "Retrieval", "files": {"validation": "words.jsonl"}},
    "sentences": {"type": "STS", "files": {"validation": "sentences.jsonl", "test": "sentences.jsonl"}},
    "intents": {"type": "Classification", "files": {"train": "intents.jsonl", "validation": "intents.jsonl"}},
}


def write_suite(folder: Path) -> Path:
    """Three small tasks."""
    table(folder / "words.jsonl", rows_of("word", 40))
    table(folder / "sentences.jsonl", pairs(24))
    table(folder / "intents.jsonl", intents(4, 9))
    for name, task in TASKS.items():
        (folder / f"{name}.yml").write_text(yaml.safe_dump(task), "utf-8")
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("own"))


def made(text: str, near: Path = Path()) -> SuiteObjective:
    found = get("suite").make(node.read(text, "search.yml"), near)
    assert isinstance(found, SuiteObjective)
    return found


def evaluated(models: list[Path], suite_folder: Path, out: Path) -> list[dict[str, float]]:
    result, _ = evaluation.evaluate([str(model) for model in models], out, suites=[suite_folder], split="validation")
    return [dict(scores) for scores in result["scores"].values()]


def test_scores_are_those_of_cuvee_evaluate(minilm_family: MiniLMFamily, own: Path, tmp_path: Path) -> None:
    """Of every merge that the weights become, in any order."""
    base, models = minilm_family.base, minilm_family.specialists
    objective = made(f"suite: {own}")
    module = objective.prepare(ModelRef.parse(str(base)), "cpu")
    assert module is not None
    live = LiveMerge(module, base, models)
    vectors = {"one": {"weight": [0.9, 0.0, 0.0]}, "all": {"weight": [0.4, 0.5, 0.6]}}
    found = [objective(Candidate({})).tasks]
    for name, coefficients in vectors.items():
        live.set(coefficients)
        found.append(objective(Candidate(coefficients)).tasks)
        merge_text(live.recipe(coefficients), tmp_path / name)
    truth = evaluated([base, *(tmp_path / name for name in vectors)], own, tmp_path / "truth")
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.keys() == set(TASKS) and ours == pytest.approx(theirs, abs=1e-6)
    assert found[0] != found[1] != found[2]
    live.set(vectors["one"])
    assert objective(Candidate({})).tasks == found[1], "nothing of the model between is left"
    live.reset()
    assert objective(Candidate({})).tasks == found[0]


def test_texts_are_tokenised_once(minilm: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers import SentenceTransformer

    objective = made(f"{{suite: {own}, tasks: [words, intents]}}")
    objective.prepare(ModelRef.parse(str(minilm)), "cpu")
    first = objective(Candidate({}))
    monkeypatch.setattr(SentenceTransformer, "preprocess", None, raising=False)
    assert objective(Candidate({})) == first


def test_a_search_by_it_ends_in_a_model_with_that_score(minilm_family: MiniLMFamily, own: Path, tmp_path: Path) -> None:
    content = {
        "base_model": str(minilm_family.base),
        "models": list(map(str, minilm_family.specialists)),
        "objective": {"suite": str(own), "tasks": ["words", "sentences"], "aggregate": "worst"},
        **{"trials": 4, "engine": "random"},
    }
    (tmp_path / "search.yml").write_text(yaml.safe_dump(content), "utf-8")
    done = run("search", tmp_path / "search.yml", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    scores = done.json["scores"]
    assert done.json["best"]["score"] == min(scores.values()) and done.json["failed"] == 0
    (truth,) = evaluated([tmp_path / "out" / "model"], own, tmp_path / "truth")
    assert scores == pytest.approx({name: truth[name] for name in scores}, abs=1e-5)


def test_a_choice_by_test_rows_is_told(own: Path, minilm: Path) -> None:
    """Of mteb's tasks too, and where the rows of both splits are the same."""
    model = ModelRef.parse(str(minilm))
    assert made(f"{{suite: {own}, tasks: [words]}}").check(model) == ()
    (line,) = made(f"{{suite: {own}, tasks: [words, sentences, STSBenchmark]}}").check(model)
    assert line.startswith("scores on test rows (sentences, STSBenchmark): ")
    assert made("{suite: shipped, tasks: [word], split: test}").check(model)[0].startswith("scores on test rows (word)")


def test_by_default_it_is_what_ships_with_a_validation_split() -> None:
    assert [target.name for target in made("suite:").targets] == [
        task.name for task in sorted(suite.load(), key=lambda task: task.group) if "validation" in task.splits
    ]


def test_tasks_of_mteb_go_with_those_of_a_suite(own: Path) -> None:
    targets = made(f"{{suite: {own}, tasks: [words, STSBenchmark, word]}}").targets
    assert [(target.name, target.splits) for target in targets] == [
        *[("words", ("validation",)), ("STSBenchmark", ("test",)), ("word", ("validation",))]
    ]


def test_a_limit_draws_the_same_rows_each_time(own: Path) -> None:
    (target,) = tasks.resolve(["words"], suites=[own], split="validation", limit=7)
    drawn = [target.fresh(42) for _ in range(2)]
    for task in drawn:
        task.load_data()
    first, second = (task.dataset["default"]["validation"] for task in drawn)
    assert len(first["queries"]) == 7 == len(first["corpus"]) and first["queries"]["text"] == second["queries"]["text"]
    (target,) = tasks.resolve(["intents"], suites=[own], split="validation", limit=7)
    task = target.fresh(42)
    task.load_data()
    assert (len(task.dataset["validation"]), len(task.dataset["train"])) == (7, 36)


def test_a_limit_of_judged_tables_is_of_queries(tmp_path: Path) -> None:
    table(tmp_path / "corpus.jsonl", [{"id": f"d{i}", "text": f"text {i}"} for i in range(9)])
    table(tmp_path / "queries.jsonl", [{"id": f"q{i}", "text": f"query {i}"} for i in range(6)])
    table(tmp_path / "qrels.jsonl", [{"query": f"q{i}", "doc": f"d{i}", "relevance": 1} for i in range(6)])
    files = {name: f"{name}.jsonl" for name in ("corpus", "queries", "qrels")}
    (tmp_path / "judged.yml").write_text(yaml.safe_dump({"type": "Retrieval", "files": {"test": files}}), "utf-8")
    (target,) = tasks.resolve(suites=[tmp_path], limit=2)
    task = target.fresh(42)
    task.load_data()
    data = task.dataset["default"]["test"]
    assert (len(data["queries"]), len(data["relevant_docs"]), len(data["corpus"])) == (2, 2, 9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("suite: nowhere", r"search.yml:1: no such suite: nowhere"),
        ("suite: shipped\nsplits: test", r"search.yml:2: .*'splits'.*split"),
        ("suite: shipped\nsplit: dev", r"search.yml:2: 'dev' is no choice for 'split'"),
        ("suite: shipped\ntasks:\n- word\n- organ-system", r"search.yml:4: 'organ-system' has no validation split"),
        ("suite: shipped\ntasks: [word, organ-system, STS17]", r"search.yml:2: 'organ-system' has no validation split"),
        (
            "suite: shipped\ntasks: [STSBenchmrk]",
            r"search.yml:2: 'STSBenchmrk' is no task.*STSBenchmark.*'suite: FOLDER'",
        ),
        ("suite: shipped\nlimit: 0", r"search.yml:2: 'limit' is 0"),
    ],
)
def test_mistakes_are_told_at_their_line(text: str, said: str) -> None:
    with pytest.raises(CuveeError, match=said):
        made(text)


def test_what_is_no_embedding_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CuveeError, match="nowhere"):
        made("suite: shipped").prepare(ModelRef.parse(str(tmp_path / "nowhere")), "cpu")
