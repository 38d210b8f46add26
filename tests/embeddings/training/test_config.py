"""The configuration of a training run: what it says, what it means by default, and every mistake with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embeddings.training import config as training_config
from embeddings.training.config import LoraSettings, MiningSettings, data_settings, load, parse
from merging.errors import CuveeError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "minilm").mkdir()
    for name in ("faq.jsonl", "more.jsonl.gz", "pairs.csv"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def read(folder: Path, text: str) -> training_config.TrainingConfig:
    (folder / "config.yml").write_text(text, encoding="utf-8")
    return load(folder / "config.yml")


def mistake(folder: Path, text: str) -> str:
    with pytest.raises(CuveeError) as error:
        read(folder, text)
    return str(error.value).replace(str(folder), "…")


SMALL = "model: minilm\ndata: [{file: faq.jsonl}]\n"


def test_defaults_are_those_of_the_paper(folder: Path) -> None:
    config = read(folder, SMALL)
    assert config.model.path == str(folder / "minilm")
    assert (config.schedule, config.batch_size, config.epochs, config.steps) == ("batch_level", 128, 1.0, None)
    assert (config.learning_rate, config.warmup, config.max_length) == (5e-5, 0.1, {"query": 512, "document": 512})
    assert (config.merge.method, config.merge_weights, config.core) == ("multislerp", "size", 40.0)
    assert config.bags == () and config.evaluate is None
    assert config.data[0].name == "faq" and config.data[0].files == (str(folder / "faq.jsonl"),)
    assert config.text == SMALL


def test_everything_that_can_be_said(folder: Path) -> None:
    config = read(
        folder,
        """
model:
  path: minilm
  pooling: lasttoken
  bidirectional: true
  normalize: false
  dtype: bfloat16
  lora: {r: 8, alpha: 16, targets: [q_proj, v_proj]}
data:
  - suite: shipped
    task: [word, intent]
    weight: 0.5
  - file: [faq.jsonl, more.jsonl.gz]
    name: both
    columns: {query: question, negative: wrong}
    instruction: Find the answer
    limit: 100
    batch_size: 64
    loss: disj
    negatives: 7
    mine: {negatives: 3, range_max: 50, relative_margin: null, max_score: 0.9}
  - file: pairs.csv
    type: STS
    prompt: "Sentence: "
    loss: {name: angle, scale: 20.0}
  - hub: sentence-transformers/all-nli
    subset: triplet
schedule: mgs
loss: {temperature: 2e-2, matryoshka: [384, 128], in_batch: false}
batch_size: 32
steps: 10
learning_rate: 1e-4
max_length: {query: 64}
gradient_cache: 4096
bags: [40, complement, 100]
merge: {method: ties, parameters: {density: 0.5}}
merge_weights: equal
core: 0
evaluate: {tasks: [word], every: 5}
""",
    )
    model = config.model
    assert model.lora == LoraSettings(8, 16.0, 0.0, ("q_proj", "v_proj"))
    assert (model.pooling, model.bidirectional, model.normalize, model.dtype) == ("lasttoken", True, False, "bfloat16")
    assert [data.name for data in config.data] == ["word", "intent", "both", "pairs", "all-nli-triplet"]
    assert [data.type for data in config.data] == ["Retrieval", "Classification", "Retrieval", "STS", "Retrieval"]
    word, _, both, pairs, hub = config.data
    assert word.task == "word" and word.suite is None and word.weight == 0.5
    assert both.prompt == {"query": "Instruct: Find the answer\nQuery: ", "document": ""}
    assert both.mine == MiningSettings(negatives=3, range_max=50, relative_margin=None, max_score=0.9)
    assert both.loss is not None and both.loss.name == "disj" and (both.limit, both.negatives) == (100, 7)
    assert both.columns == {"query": "question", "negative": "wrong"} and len(both.files) == 2
    assert pairs.prompt == {"query": "Sentence: ", "document": "Sentence: "}
    assert pairs.loss is not None and (pairs.loss.name, pairs.loss.parameters) == ("angle", {"scale": 20.0})
    assert (hub.hub, hub.subset, hub.split) == ("sentence-transformers/all-nli", "triplet", "train")
    assert config.loss.parameters == {"temperature": 0.02, "matryoshka": [384, 128]} and config.loss.in_batch is False
    assert (config.steps, config.epochs, config.max_length) == (10, None, {"query": 64, "document": 512})
    assert config.bags == (40.0, "complement", 100.0)
    assert (config.merge.method, config.merge.parameters) == ("ties", {"density": 0.5})
    assert config.evaluate is not None and (config.evaluate.tasks, config.evaluate.every) == (("word",), 5)
    assert config.at("schedule").endswith("config.yml:28") and config.at("seed").endswith("config.yml")


def test_a_suite_without_task_means_all_that_can_be_trained_on(folder: Path) -> None:
    config = read(folder, "model: minilm\ndata: [{suite: shipped}]\nevaluate: {}")
    assert [data.name for data in config.data] == ["code", "intent", "phenotype", "sentiment", "word"]
    assert config.evaluate is not None and config.evaluate.tasks == ("code", "intent", "phenotype", "sentiment", "word")


def test_an_instruction_stands_before_both_sides_of_a_symmetric_task(folder: Path) -> None:
    config = read(folder, "model: minilm\ndata: [{file: pairs.csv, type: STS, instruction: Compare}]")
    assert config.data[0].prompt == dict.fromkeys(("query", "document"), "Instruct: Compare\nQuery: ")


def test_plain_is_json_and_the_same_for_the_same_settings(folder: Path) -> None:
    config, twin = read(folder, SMALL), read(folder, "\n# a remark\n" + SMALL + "seed: 0\n")
    assert config.plain() == twin.plain() == json.loads(json.dumps(config.plain()))
    assert config == twin
    assert config.plain() != read(folder, SMALL + "seed: 1").plain()
    assert "where" not in json.dumps(config.plain())


def test_what_runs_of_before_have_written_is_still_the_same_run(folder: Path) -> None:
    """A setting that came later is not in what they know of themselves."""
    plain = read(folder, "model: minilm\ndata: [{file: pairs.csv, type: STS, columns: {score: grade}}]").plain()
    assert list(plain["data"][0]) == [
        *("name", "type", "suite", "task", "files", "hub", "subset", "split", "revision", "columns", "prompt"),
        *("weight", "limit", "batch_size", "loss", "negatives", "mine"),
    ]
    scaled = read(folder, "model: minilm\ndata: [{file: pairs.csv, type: STS, scale: [1, 5]}]").plain()
    assert scaled["data"][0]["scale"] == [1.0, 5.0]


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("", "config.yml: is empty"),
        ("- 1", "config.yml:1: is no mapping"),
        ("data: [{file: faq.jsonl}]", "has no 'model'"),
        ("model: minilm", "config.yml:1: has no 'data'"),
        (
            SMALL + "bathc_size: 3",
            "config.yml:3: 'bathc_size' is no key of a configuration; did you mean 'batch_size'?",
        ),
        (SMALL + "batch_size: 0", "config.yml:3: 'batch_size' is 0; it must be at least 1"),
        (SMALL + "batch_size: 1.5", "config.yml:3: 'batch_size' must be a whole number, not '1.5'"),
        (SMALL + "batch_size: true", "config.yml:3: 'batch_size' must be a number, not 'true'"),
        (SMALL + "learning_rate: fast", "config.yml:3: 'learning_rate' must be a number, not 'fast'"),
        (SMALL + "learning_rate: 0", "it must be greater than 0"),
        (SMALL + "learning_rate: .nan", "must be a number"),
        (SMALL + "warmup: 100", "'warmup' is 100; it must be at least 0 and at most 1"),
        (SMALL + "epochs: 1\nsteps: 2", "config.yml:4: 'epochs' and 'steps' exclude each other"),
        (SMALL + "max_length: {qury: 3}", "'qury' is no key of 'max_length'; did you mean 'query'?"),
        (SMALL + "bags: 40", "'bags' must be a list of percentages"),
        (SMALL + "bags: [0]", "'bags' is 0; it must be greater than 0 and at most 100"),
        (SMALL + "bags: [complement]", "a complement has no part before it"),
        (SMALL + "bags: [100, complement]", "the complement of 100 % is empty"),
        (SMALL + "bags: [50, complment]", "did you mean 'complement'?"),
        (SMALL + "merge_weights: sizes", "'sizes' is no choice for 'merge_weights'; did you mean 'size'?"),
        (SMALL + "merge: {methd: ties}", "did you mean 'method'?"),
        (SMALL + "merge: [ties]", "'merge' must be text, not a list"),
        (SMALL + "loss: {temperature: .inf}", "config.yml:3: 'temperature' is .inf: it must be finite"),
        (SMALL + "loss: {temperature: {a: 1}}", "must be a value or a list of values"),
        (SMALL + "loss: {in_batch: 1}", "'in_batch' must be true or false"),
        (SMALL + "schedule: batch_levl", "config.yml:3: no schedule 'batch_levl'; did you mean 'batch_level'?"),
        (SMALL + "loss: infonse", "config.yml:3: no loss 'infonse'; did you mean 'infonce'?"),
        (SMALL + "loss: {temprature: 1}", "config.yml:3: 'temprature' is no parameter of any loss; did you mean"),
        (SMALL + "loss: {name: infonce, temperature: -1}", "config.yml:3: 'temperature' is -1, outside"),
        ("model: minilm\ndata:\n- file: faq.jsonl\n  loss: disk", "config.yml:4: no loss 'disk'; did you mean 'disj'?"),
        ("model: minilm\ndata:\n- file: faq.jsonl\n  loss: {name: disj, scale: 3}", "is no parameter of 'disj'"),
        ("model: minilm\ndata:\n- file: faq.jsonl\n  loss: cosent", "config.yml:4: the loss 'cosent' needs scores"),
        ("model: minilm\ndata:\n- {file: faq.jsonl, type: STS, loss: disj}", "the usual one is 'cosent'"),
        (SMALL + "merge: tis", "config.yml:3: no merge method 'tis'; did you mean 'ties'"),
        (SMALL + "merge: {method: ties, parameters: {desnity: 1}}", "did you mean 'density'?"),
        (SMALL + "evaluate: {tasks: [wrod]}", "'wrod' is no task of the suite; did you mean 'word'?"),
        (SMALL + "evaluate: {tasks: [sense]}", "'sense' has no validation split"),
        (SMALL + "evaluate: {suite: nowhere}", "no such suite: nowhere"),
        (
            "model: ./nowhere\ndata: [{file: faq.jsonl}]",
            "config.yml:1: no such model: ./nowhere; it is looked for in …",
        ),
        ("model: {pth: x}\ndata: []", "'pth' is no key of 'model'; did you mean 'path'?"),
        ("model: {path: minilm, pooling: max}\ndata: []", "'max' is no choice for 'pooling'"),
        ("model: {path: minilm, lora: 8}\ndata: []", "'lora' must be a mapping, not '8'; write 'lora: {r: 32}'"),
        ("model: minilm\ndata: []", "'data' must be a list of data sets"),
        ("model: minilm\ndata:\n- {fle: faq.jsonl}", "config.yml:3: a data set has no source; did you mean 'file'?"),
        ("model: minilm\ndata:\n- {file: faq.jsonl, hub: x}", "'file', 'hub' exclude each other"),
        ("model: minilm\ndata:\n- {file: no.jsonl}", "config.yml:3: no such file: no.jsonl; it is looked for in …"),
        ("model: minilm\ndata:\n- {file: config.yml}", "config.yml is of no known format"),
        ("model: minilm\ndata:\n- {file: faq.jsonl, type: Retreival}", "did you mean 'Retrieval'?"),
        ("model: minilm\ndata:\n- {file: faq.jsonl, columns: {qery: q}}", "did you mean 'query'?"),
        (
            "model: minilm\ndata:\n- {file: faq.jsonl, scale: [0, 5]}",
            "rows of Retrieval have no scores on a scale; rem",
        ),
        ("model: minilm\ndata:\n- {file: faq.jsonl, type: STS, scale: 5}", "write 'scale: [0, 5]'"),
        ("model: minilm\ndata:\n- {file: faq.jsonl, type: STS, scale: [5, 0]}", "'scale' goes from 5 to 0"),
        ("model: minilm\ndata:\n- {file: faq.jsonl, type: STS, scale: [a, 5]}", "'scale' must be a number, not 'a'"),
        ("model: minilm\ndata:\n- {file: faq.jsonl, weight: 0}", "must be greater than 0"),
        ("model: minilm\ndata:\n- {file: faq.jsonl, prompt: {query: 3}}", "the prompt of 'query' must be text"),
        ("model: minilm\ndata:\n- {file: faq.jsonl, prompt: a, instruction: b}", "exclude each other"),
        ("model: minilm\ndata:\n- {file: faq.jsonl, mine: {negative: 3}}", "did you mean 'negatives'?"),
        ("model: minilm\ndata:\n- {file: faq.jsonl, mine: {range_max: 3}}", "ranks 0 to 3 leave fewer than 5"),
        ("model: minilm\ndata:\n- {file: faq.jsonl, type: STS, mine: {}}", "hard negatives are not mined for STS"),
        (
            "model: minilm\ndata:\n- {file: faq.jsonl}\n- {file: faq.jsonl}",
            "config.yml:4: two data sets are named 'faq'",
        ),
        ("model: minilm\ndata:\n- {file: faq.jsonl, name: a/b}", "'a/b' is no name of a data set"),
        ("model: minilm\ndata:\n- {suite: shipped, task: wrd}", "the suite has no task 'wrd'; did you mean 'word'?"),
        ("model: minilm\ndata:\n- {suite: shipped, task: sense}", "the task 'sense' has no train split"),
        ("model: minilm\ndata:\n- {suite: shipped, name: x}", "one name for several tasks"),
        ("model: minilm\ndata:\n- {suite: shpped}", "no such suite: shpped; did you mean 'shipped'?"),
        ("model: minilm\ndata:\n- {suite: shipped, columns: {}}", "'columns' is no key of a data set of a suite"),
        ("model: minilm\ndata: *a", "is not valid YAML"),
        ("model: !!python/none x\ndata: []", "the tag"),
    ],
)
def test_a_mistake_is_told_with_its_line_and_its_mend(folder: Path, yaml: str, says: str) -> None:
    told = mistake(folder, yaml)
    assert says in told and "recipe" not in told and "\n" not in told


def test_paths_are_looked_for_near_the_configuration_and_then_in_the_working_directory(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path_factory.mktemp("work")
    suite = "type: STS\nfiles: {train: ../pairs.csv}\n"
    for name in ("minilm", "other", "suite", "table"):
        (work / name).mkdir()
    (work / "suite" / "pairs.yml").write_text(suite, "utf-8")
    (work / "faq.jsonl").write_bytes(b"")
    (work / "new.jsonl").write_bytes(b"")
    (work / "pairs.csv").write_text("sentence1,sentence2,score\na,b,1\n", "utf-8")
    monkeypatch.chdir(work)
    both = read(folder, "model: minilm\ndata: [faq.jsonl, new.jsonl, {hub: table}, {suite: suite}]\n")
    assert both.model.path == str(folder / "minilm")
    faq, new, table, pairs = both.data
    assert (faq.files, new.files) == ((str(folder / "faq.jsonl"),), (str(work / "new.jsonl"),))
    assert (table.hub, pairs.suite) == (str(work / "table"), str(work / "suite"))
    assert read(folder, SMALL.replace("minilm", "other")).model.path == str(work / "other")
    for wrong in ("model: ./nowhere\n", "model: minilm\ndata: [no.jsonl]", "model: minilm\ndata: [{suite: no}]"):
        assert f"it is looked for in … and in {work}" in mistake(folder, wrong)


def test_a_hub_id_is_left_as_it_is(folder: Path) -> None:
    config = read(folder, "model: {path: BAAI/bge-m3, revision: abc}\ndata: [{file: faq.jsonl}]")
    assert (config.model.path, config.model.revision) == ("BAAI/bge-m3", "abc")


def test_new_data_are_a_list_a_mapping_or_a_bare_table(folder: Path) -> None:
    (folder / "list.yml").write_text("- file: faq.jsonl\n- pairs.csv\n", encoding="utf-8")
    (folder / "data.yml").write_text("data:\n- file: faq.jsonl\n- file: pairs.csv\n", encoding="utf-8")
    assert data_settings(folder / "list.yml") == data_settings(folder / "data.yml")
    assert [data.name for data in data_settings(folder / "list.yml")[0]] == ["faq", "pairs"]
    bare = data_settings(folder / "more.jsonl.gz")[0]
    assert bare[0].name == "more" and bare[0].files == (str(folder / "more.jsonl.gz"),)
    with pytest.raises(CuveeError, match="no such file"):
        data_settings(folder / "none.jsonl")


def test_paths_start_from_the_configuration_and_not_from_where_one_stands(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(folder, SMALL)
    monkeypatch.chdir(folder.parent)
    assert load(f"{folder.name}/config.yml").plain() == first.plain()
    assert parse(SMALL, f"{folder.name}/other.yml").data == first.data
