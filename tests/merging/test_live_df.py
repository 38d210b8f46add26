"""DF-Merge in memory: what `cuvee merge` makes of the same recipe, which takes the statistics into folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import merging
from merging import CuveeError, Recipe
from merging.live_df import LiveDF
from tests.architectures import Family, build
from tests.commands import run
from tests.conftest import MiniLMFamily
from tests.merging.statistics.models import classifier, sentences, with_tokenizer
from tests.merging.test_live import adapter

torch = pytest.importorskip("torch")

SEED = 5


def write_rows(file: Path, texts: list[str]) -> Path:
    rows = [{"query": a, "positive": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def weights(module: Any) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def assert_merged(
    live: LiveDF, module: Any, coefficients: Mapping[str, Any], load: Any, out: Path, tolerance: float = 4e-7
) -> None:
    """In float32, whatever the checkpoints' dtype; by default to a few roundings."""
    recipe = Recipe.parse(f"{live.recipe(coefficients)}out_dtype: float32\n")
    live.apply(recipe)
    merging.merge(recipe, out, force=True, seed=SEED)
    written = dict(load(out).named_parameters())
    for name, own in module.named_parameters():
        torch.testing.assert_close(own, written[name], rtol=0, atol=tolerance, msg=name)


# ---- every kind of model ----


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    folder = tmp_path_factory.mktemp("zoo")

    def family(name: str) -> Family:
        found = build(name, folder / name, spread=0.2)
        for path in (found.base, *found.specialists):
            with_tokenizer(path)
        return found

    return family


@pytest.fixture
def stats(tmp_path: Path) -> list[dict[str, Any]]:
    return [
        {"data": str(write_rows(tmp_path / f"{i}.jsonl", sentences(20, seed=i))), "examples": 5 + i, "candidates": 3}
        for i in range(3)
    ]


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5-encoder", "mixtral"])
def test_it_is_the_merge_of_its_recipe(
    name: str, zoo: Callable[[str], Family], stats: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Tied heads, stored transposes, experts that are loaded into one tensor."""
    family = zoo(name)

    def load(folder: Path) -> Any:
        return family.architecture.model_class().from_pretrained(folder, dtype=torch.float32).eval()

    module = load(family.base)
    start = weights(module)
    live = LiveDF(module, family.base, family.specialists, stats=stats, seed=SEED)
    for coefficients in ({"weight": [0.3, 0.8, 0.0]}, {"weight": [0.3, 0.5, 1.0]}, {"weight": 0.4, "fisher": "frozen"}):
        assert_merged(live, module, coefficients, load, tmp_path / "out")
    live.reset()
    assert all(torch.equal(own, start[name]) for name, own in module.named_parameters())


def test_what_was_before_leaves_no_trace(
    zoo: Callable[[str], Family], stats: list[dict[str, Any]], tmp_path: Path
) -> None:
    family = zoo("bert")

    def live() -> tuple[Any, LiveDF]:
        module = family.architecture.model_class().from_pretrained(family.base)
        return module, LiveDF(module, family.base, family.specialists, stats=stats)

    (one, first), (other, second) = live(), live()
    for own in ({"weight": [0.1, 0.2, 0.3]}, {"weight": 1.0, "fisher": "frozen"}, {"weight": [0.5, 0.2, 0.4]}):
        first.set(own)
    second.set({"weight": [0.5, 0.2, 0.4]})
    assert all(torch.equal(own, weights(other)[name]) for name, own in one.named_parameters())


def test_models_may_be_read_in_ways_of_their_own(
    zoo: Callable[[str], Family], stats: list[dict[str, Any]], tmp_path: Path
) -> None:
    family = zoo("bert")

    def load(folder: Path) -> Any:
        return family.architecture.model_class().from_pretrained(folder).eval()

    stats[0]["max_length"] = 4
    stats[1] |= {"temperature": 0.5, "seed": 9, "batch_size": 1}
    module = load(family.base)
    live = LiveDF(module, family.base, family.specialists, stats=stats, seed=SEED)
    assert_merged(live, module, {"weight": [0.3, 0.8, 0.6]}, load, tmp_path / "out")


def test_adapters_on_the_base(zoo: Callable[[str], Family], stats: list[dict[str, Any]], tmp_path: Path) -> None:
    """Held as their factors; the products are rounded otherwise than where the statistics are taken into folders."""
    family = zoo("bert")
    refs = [adapter(family, tmp_path / f"a{i}", i, target_modules=["query", "dense"][: i + 1]) for i in range(2)]
    module = family.architecture.model_class().from_pretrained(family.base).eval()
    live = LiveDF(module, family.base, refs, stats=stats[:2], seed=SEED)
    live.set({"weight": [0.3, 0.8]})
    merging.merge(Recipe.parse(live.recipe({"weight": [0.3, 0.8]})), tmp_path / "out", seed=SEED)
    written = dict(family.architecture.model_class().from_pretrained(tmp_path / "out").named_parameters())
    for name, own in module.named_parameters():
        torch.testing.assert_close(own, written[name], rtol=0, atol=1e-4, msg=name)


def test_classifiers_choose_between_their_classes(tmp_path: Path) -> None:
    from merging.statistics.network import open_network

    base = classifier(tmp_path / "base", 3)
    models = [classifier(tmp_path / f"m{i}", 3, seed=i) for i in (1, 2)]
    stats = [{"data": str(tmp_path / f"{i}.txt"), "examples": 6} for i in range(2)]
    for i, each in enumerate(stats):
        Path(str(each["data"])).write_text("\n".join(sentences(8, seed=i)))
    module = open_network(str(base)).module
    live = LiveDF(module, base, models, stats=stats, seed=SEED)
    load: Callable[[Path], Any] = lambda folder: open_network(str(folder)).module  # noqa: E731
    # Their attention is so sharp that of some weights the gradient is 0 but for rounding.
    assert_merged(live, module, {"weight": [0.6, 0.3]}, load, tmp_path / "out", tolerance=1e-4)


def test_a_language_model_that_chooses_between_answers_equals_the_loop_of_the_paper(
    zoo: Callable[[str], Family], tmp_path: Path
) -> None:
    """In float64: F of θ₀ + λτ over the answers of each question, then θ₀ + M · ΣFλτ / ΣF; λ = 0.3 and 0.8."""
    import transformers

    family, weight = zoo("llama"), [0.3, 0.8]
    questions = [
        [("w1 w2 w3", ["w4", "w5 w6"]), ("w7 w8", ["w9", "w2 w1 w3"])],
        [("w9 w1", ["w3 w3", "w4", "w8"])],
    ]
    stats = []
    for i, rows in enumerate(questions):
        file = tmp_path / f"{i}.jsonl"
        lines = [{"query": query, "positive": right, "negative": wrong} for query, (right, *wrong) in rows]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        stats.append({"data": str(file)})
    load = family.architecture.model_class().from_pretrained
    read = transformers.AutoTokenizer.from_pretrained(family.base)
    network = load(family.base).double().eval()
    start = weights(network)
    vectors = [{n: v - start[n] for n, v in weights(load(each).double()).items()} for each in family.specialists[:2]]
    fishers: list[dict[str, Any]] = []
    for rows, own, scale in zip(questions, vectors, weight, strict=True):
        found = {name: torch.zeros_like(value) for name, value in start.items()}
        with torch.no_grad():
            for name, value in network.named_parameters():
                value.copy_(start[name] + scale * own[name])
        for query, answers in rows:
            means = []
            for answer in answers:
                ids = torch.tensor(read(f"{query} {answer}")["input_ids"])
                log_p = network(input_ids=ids[None]).logits[0].log_softmax(1)
                places = range(1 + len(query.split()), len(ids))  # the last is the end of the text
                means.append(torch.stack([log_p[place - 1, ids[place]] for place in places]).mean())
            for mean, p in zip(means, torch.stack(means).detach().softmax(0), strict=True):
                gradients = torch.autograd.grad(mean, list(network.parameters()), retain_graph=True)
                for value, gradient in zip(found.values(), gradients, strict=True):
                    value += p * gradient**2 / len(rows)
        fishers.append({name: value + 1e-12 for name, value in found.items()})
    module = load(family.base, dtype=torch.float32)
    live = LiveDF(module, family.base, family.specialists[:2], stats=stats)
    live.apply(Recipe.parse(f"{live.recipe({'weight': weight})}out_dtype: float32\n"))
    for name, value in module.named_parameters():
        above = sum(f[name] * w * v[name] for f, w, v in zip(fishers, weight, vectors, strict=True))
        expected = start[name] + 2 * above / sum(f[name] for f in fishers)
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-5, msg=name)


def test_mistakes_are_told_before_a_weight_changes(zoo: Callable[[str], Family], stats: list[dict[str, Any]]) -> None:
    family = zoo("bert")
    module = family.architecture.model_class().from_pretrained(family.base)
    start = weights(module)
    live = LiveDF(module, family.base, family.specialists, stats=stats)
    for wrong, said in (
        ({"weight": [0.5, 0.5]}, "2 values for 3 models"),
        ({"weight": 1.5}, r"outside \[0, 1\]"),
        ({}, "needs"),
        ({"weight": 0.5, "fisher": "dynamic"}, "is no choice for 'fisher'"),
    ):
        with pytest.raises(CuveeError, match=said):
            live.set(wrong)
    assert all(torch.equal(own, start[name]) for name, own in module.named_parameters())
    with pytest.raises(CuveeError, match="no such file"):
        LiveDF(module, family.base, family.specialists, stats=[*stats[:2], {"data": "nowhere.jsonl"}])
    with pytest.raises(CuveeError, match="statistics of 2 models are given for 3"):
        LiveDF(module, family.base, family.specialists, stats=stats[:2])


def test_a_head_that_the_module_has_not_is_refused(zoo: Callable[[str], Family], stats: list[dict[str, Any]]) -> None:
    transformers = pytest.importorskip("transformers")
    family = zoo("bert-mlm")
    module = transformers.AutoModel.from_pretrained(family.base, add_pooling_layer=False)
    with pytest.raises(CuveeError):
        LiveDF(module, family.base, family.specialists, stats=[{**each, "head": "classification"} for each in stats])


# ---- the real model ----


TASKS = ("the vineyard in autumn", "a symptom of the skin", "book me a table for two", "rust on the old bridge")


@pytest.mark.slow
def test_minilm_specialists(minilm_family: MiniLMFamily, tmp_path: Path) -> None:
    from merging.statistics.network import open_network

    stats = []
    for i in range(3):
        texts = [f"{text} {word}" for text in TASKS for word in ("here", "there", "now", f"{i} times")]
        stats.append({"data": str(write_rows(tmp_path / f"{i}.jsonl", texts)), "examples": 3, "candidates": 2})
    module = open_network(str(minilm_family.base)).module

    def load(folder: Path) -> Any:
        return open_network(str(folder)).module

    live = LiveDF(module, minilm_family.base, minilm_family.specialists, stats=stats, seed=SEED)
    assert_merged(live, module, {"weight": [0.35, 0.6, 0.2]}, load, tmp_path / "out")


# ---- a search ----

SCORE = """\
import torch

def near(module, reader):
    text = reader("w1 w2 w3", return_tensors="pt")
    with torch.no_grad():
        return -float(module(**text).logits.square().mean())

def folder(path):
    from safetensors.numpy import load_file
    return -float(sum((t ** 2).sum() for t in load_file(path / "model.safetensors").values()))
"""


@pytest.mark.parametrize("takes", ["model", "folder"])
def test_a_search_by_one_word(
    takes: str, zoo: Callable[[str], Family], stats: list[dict[str, Any]], tmp_path: Path
) -> None:
    family = zoo("gpt2")
    (tmp_path / "score.py").write_text(SCORE)
    content = {
        "base_model": str(family.base),
        "models": [{"model": str(model), "stats": own} for model, own in zip(family.specialists, stats, strict=True)],
        "method": "df_merge",
        "objective": {"function": "score:near" if takes == "model" else "score:folder", "takes": takes},
        "engine": "random",
        "trials": 3,
    }
    (tmp_path / "search.yml").write_text(yaml.safe_dump(content, sort_keys=False))
    done = run("search", tmp_path / "search.yml", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    assert (done.json["trials"], done.json["failed"]) == (3, 0)
    assert set(done.json["best"]["coefficients"]) == {"weight"}
    best = yaml.safe_load((tmp_path / "run" / "best.yml").read_text())
    assert best["merge_method"] == "df_merge" and best["models"][0]["stats"]["data"] == stats[0]["data"]
    assert (
        merging.engine.merge_file(tmp_path / "run" / "best.yml", tmp_path / "again")["digest"]
        == (json.loads((tmp_path / "run" / "model" / "cuvee.json").read_text())["output"])
    )
