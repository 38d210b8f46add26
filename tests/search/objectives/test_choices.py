"""What a model believes: against the model itself, one input at a time; and against labels that nobody may look at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merging.errors import CuveeError
from merging.node import Node
from merging.sources import ModelRef
from merging.statistics import calibration
from merging.statistics.calibration import only
from merging.statistics.network import Network, open_network
from search import objective
from search.objective import Candidate
from search.objectives.choices import Choices, ordinal
from search.objectives.inputs import Input, readable, unlabelled
from search.objectives.over_choices import OverChoices, choices_of
from search.objectives.tasks import Task, tasks_of
from tests.merging.statistics.models import classifier, model, sentences

#: One token, two, and one that another begins with.
SCORES = ["w1", "w2 w3", "w2 w4 w5", "w2"]


def table(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def task(file: Path, labelled: bool = False, **said: Any) -> tuple[Task, Any]:
    settings = Node.of({"loss": {"data": str(file), **said}})
    tasks, opening = tasks_of(settings, "loss", Path(), examples=None, labelled=labelled)
    return tasks[0], opening


def choices(file: Path, network: Network, labelled: bool = False, **said: Any) -> Choices:
    own, opening = task(file, labelled, **said)
    return choices_of(own, network, opening, with_answers=labelled)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(sentences(23))]
    return table(tmp_path_factory.mktemp("texts") / "texts.jsonl", rows)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Network:
    return open_network(str(classifier(tmp_path_factory.mktemp("classes"), 3)))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def language_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Network:
    return open_network(str(model(request.param, tmp_path_factory.mktemp("lm"))), head="lm")


@pytest.fixture(scope="module")
def embedder(minilm: Path) -> Network:
    return open_network(str(minilm))


# ---- against the model itself ----


def test_a_classifiers_choices_are_its_softmax(texts: Path, classes: Network) -> None:
    found = choices(texts, classes)
    for row, text in zip(found.probabilities(), sentences(23), strict=True):
        features = classes.reader(text, return_tensors="pt", truncation=True, max_length=20)
        features.pop("token_type_ids", None)
        with torch.no_grad():
            expected = classes.module(**features).logits.softmax(1)[0]
        np.testing.assert_allclose(row, expected, atol=1e-6)


def test_scores_of_one_token_are_next_token_probabilities_renormalised(texts: Path, language_model: Network) -> None:
    names = ["w1", "w2", "w3"]
    found = choices(texts, language_model, scores=names, template="w7 {text} w8 w9")
    tokenizer = language_model.reader
    ids = tokenizer.convert_tokens_to_ids(names)
    valid = []
    for row, text in zip(found.probabilities(), sentences(23), strict=True):
        prompt = torch.tensor([tokenizer(f"w7 {text} w8 w9")["input_ids"][:-1]])  # without the end of text
        with torch.no_grad():
            probabilities = language_model.module(input_ids=prompt).logits[0, -1].softmax(0)
        np.testing.assert_allclose(row, probabilities[ids] / probabilities[ids].sum(), atol=1e-6)
        valid.append(int(probabilities.argmax()) in ids)
    assert found.valid == pytest.approx(np.mean(valid))


def test_longer_scores_by_their_mean_log_probability_a_token(texts: Path, language_model: Network) -> None:
    found = choices(texts, language_model, scores=SCORES, template="w7 {text} w8 ")
    tokenizer = language_model.reader
    for row, text in zip(found.probabilities(), sentences(23), strict=True):
        prompt = tokenizer(f"w7 {text} w8")["input_ids"][:-1]
        means = []
        for score in SCORES:
            end = tokenizer(score, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = language_model.module(input_ids=torch.tensor([prompt + end])).logits[0].double()
            log_p = logits.log_softmax(1)[len(prompt) - 1 :]
            own = [float(log_p[i, token]) for i, token in enumerate(end)]
            if score == "w2":  # it ends where the two that begin like it do not go on
                onward = tokenizer.convert_tokens_to_ids(["w3", "w4"])
                own.append(float(torch.log1p(-log_p[-1, onward].exp().sum())))
            means.append(np.mean(own))
        np.testing.assert_allclose(row, torch.tensor(means).softmax(0), atol=1e-6)


def test_a_text_that_is_too_long_is_cut_and_what_stands_after_it_is_kept(
    tmp_path: Path, language_model: Network
) -> None:
    long = " ".join(sentences(30))
    file = table(tmp_path / "long.jsonl", [{"text": long}, {"text": " ".join(long.split()[:13])}])
    found = choices(file, language_model, scores=["w1", "w2 w3"], template="w7 {text} w8 w9")
    assert language_model.max_length == 20  # <s> w7, 14 words, w8 w9, and the first token of a score
    long_row, _ = found.probabilities()
    same = table(tmp_path / "same.jsonl", [{"text": " ".join(long.split()[:15])}])
    cut = choices(same, language_model, scores=["w1", "w2 w3"], template="w7 {text} w8 w9").probabilities()[0]
    np.testing.assert_allclose(long_row, cut, atol=1e-6)
    with pytest.raises(CuveeError, match="leaves no room"):
        choices(file, language_model, scores=["w1", "w2"], template="{text} " + " ".join(sentences(9)))


def test_scores_that_the_tokenizer_cannot_tell_apart_are_refused(texts: Path, language_model: Network) -> None:
    with pytest.raises(CuveeError, match="cannot tell the score 'no' from others"):
        choices(texts, language_model, scores=["yes", "no"])


def test_prototypes_against_sentence_transformers(tmp_path: Path, embedder: Network, minilm: Path) -> None:
    from sentence_transformers import SentenceTransformer

    words = ["turn on the lamp", "a fever and a rash", "prune the vines in winter", "no"]
    file = table(tmp_path / "t.jsonl", [{"text": text} for text in words])
    prototypes = {"home": ["switch the light", "open the window"], "illness": ["a disease"], "wine": ["vineyard work"]}
    found = choices(file, embedder, prototypes=prototypes, temperature=0.1).probabilities()
    plain = SentenceTransformer(str(minilm), device="cpu")
    vectors = plain.encode(words, normalize_embeddings=True)
    means = np.array([plain.encode(own, normalize_embeddings=True).sum(0) for own in prototypes.values()])
    cosines = vectors @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    np.testing.assert_allclose(found, torch.tensor(cosines / 0.1).softmax(1), atol=1e-5)
    rows = [{"text": text, "label": name} for name, own in prototypes.items() for text in own]
    same = choices(file, embedder, prototypes=str(table(tmp_path / "p.jsonl", rows)), temperature=0.1)
    np.testing.assert_allclose(same.probabilities(), found, atol=1e-6)
    assert same.names == tuple(prototypes)


def test_candidates_against_sentence_transformers(tmp_path: Path, embedder: Network, minilm: Path) -> None:
    from sentence_transformers import SentenceTransformer

    rows = [
        {"query": "bread", "positive": "Knead the dough.", "negative": ["A train.", "The moon is far."]},
        {"query": "a journey", "positive": "A train.", "negative": ["Knead the dough."]},
    ]
    file = table(tmp_path / "q.jsonl", rows)
    found = choices(file, embedder, labelled=True, temperature=0.2)
    plain = SentenceTransformer(str(minilm), device="cpu")
    assert found.answers == (0, 0) and found.counts == (3, 2)
    for row, own in zip(found.probabilities(), rows, strict=True):
        candidates = [own["positive"], *own["negative"]]
        vectors = plain.encode([str(own["query"]), *candidates], normalize_embeddings=True)
        expected = torch.tensor(vectors[0] @ vectors[1:].T / 0.2).softmax(0)
        np.testing.assert_allclose(row[: len(candidates)], expected, atol=1e-5)
        assert row[len(candidates) :].sum() < 1e-30
    asked = choices(file, embedder, temperature=0.2).probabilities()
    np.testing.assert_allclose(asked.sort(1).values, found.probabilities().sort(1).values, atol=1e-6)


@pytest.mark.parametrize("head", ["coral", "corn"])
def test_an_ordinal_head_gives_ranks(head: str, texts: Path, tmp_path: Path) -> None:
    network = open_network(str(classifier(tmp_path, 3)), head="classification")
    found = choices(texts, network, head=head, scores=[1, 2, 3, 4])
    rows = found.probabilities()
    assert rows.shape == (23, 4) and found.names == ("1", "2", "3", "4")
    np.testing.assert_allclose(rows.sum(1), 1, atol=1e-6)
    exceeded = torch.tensor([[0.9, 0.6, 0.2]]).logit()
    expected = [0.1, 0.3, 0.4, 0.2] if head == "coral" else [0.1, 0.36, 0.432, 0.108]
    np.testing.assert_allclose(ordinal(exceeded, head).exp()[0], expected, atol=1e-6)


def test_any_inputs_in_any_order_and_with_gradient(texts: Path, classes: Network, language_model: Network) -> None:
    for network, said in ((classes, {}), (language_model, {"scores": SCORES})):
        found = choices(texts, network, **said)
        items = [7, 2, 19, 3]
        parameter = next(iter(network.module.parameters()))
        parameter.requires_grad_(True)
        log_p = found.log_p(items)
        (gradient,) = torch.autograd.grad(log_p[:, 0].sum(), parameter)
        parameter.requires_grad_(False)
        assert gradient.abs().sum() > 0
        np.testing.assert_allclose(log_p.detach().double().exp(), found.probabilities()[items], atol=1e-6)


def test_gradients_are_those_of_the_model(texts: Path, classes: Network) -> None:
    found, weight = choices(texts, classes), classes.module.classifier.weight
    weight.requires_grad_(True)
    (own,) = torch.autograd.grad(found.log_p([4, 1])[:, 2].sum(), weight)
    expected = torch.zeros_like(own)
    for place in (4, 1):
        features = classes.reader(sentences(23)[place], return_tensors="pt", truncation=True, max_length=20)
        features.pop("token_type_ids", None)
        expected += torch.autograd.grad(classes.module(**features).logits.log_softmax(1)[0, 2], weight)[0]
    weight.requires_grad_(False)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)


# ---- labels ----


INPUTS = ("text", "query", "document")
RANKED = ("query", "positive", "negative")


class Poisoned(dict[str, Any]):
    """A row that fails where anything but an input is touched, or everything at once."""

    def __init__(self, row: Mapping[str, Any], inputs: Sequence[str] = INPUTS) -> None:
        super().__init__(row)
        self._inputs = inputs

    def __getitem__(self, key: str) -> Any:
        assert key in self._inputs, f"'{key}' was read"
        return super().__getitem__(key)

    def _fail(self, *_: Any) -> Any:
        raise AssertionError("all cells were read")

    get = items = values = pop = copy = __or__ = _fail  # type: ignore[assignment]


def test_labels_are_not_touched(texts: Path) -> None:
    own, _ = task(texts)
    poison = {"label": 1, "labels": 1, "score": 2, "answer": "b", "positive": "c", "is_duplicate": 1, "grade": 3}
    row = Poisoned({"text": "a", "query": "q", "document": "d", **poison})
    assert only(row, readable(own, ranking=False)) == {"text": "a", "query": "q", "document": "d"}


def test_what_is_asked_without_labels_has_no_place_for_them(texts: Path) -> None:
    assert {each.name for each in fields(Input)} == {"texts", "candidates", "image"}
    own, _ = task(texts)
    with pytest.raises(CuveeError, match="it looks at no label"):
        task(texts, columns={"label": "grade"})
    assert {each.texts for each in unlabelled(own)} == {(text,) for text in sentences(23)}


def test_which_candidate_is_right_is_forgotten(tmp_path: Path) -> None:
    first = {"query": "q", "positive": "b", "negative": ["a", "c"]}
    second = {"query": "q", "positive": "c", "negative": ["b", "a"]}
    files = [table(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate((first, second))]
    found = [unlabelled(task(file)[0], ranking=True) for file in files]
    assert found[0] == found[1] == (Input(("q",), ("a", "b", "c")),)


#: What a model chooses between: its kind, and what is said of the task.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "classes": ("classifier", {}),
    "ranks": ("classifier", {"head": "coral"}),
    "scores": ("llama", {"head": "lm", "scores": SCORES}),
    "prototypes": ("bert", {"prototypes": ["w1", "w2 w3", "w4"]}),
    "candidates": ("bert", {"candidates": 3}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_file_to_the_score_no_label_is_touched(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, said = KINDS[kind]
    folder = classifier(tmp_path / look, 3) if look == "classifier" else model(look, tmp_path)
    inputs = RANKED if kind == "candidates" else ("text",)
    columns = zip(*(sentences(9, seed) for seed in range(len(inputs))), strict=True)
    rows = [{**dict(zip(inputs, own, strict=True)), "label": 1, "score": 2, "grade": 3} for own in columns]
    file, read = table(tmp_path / "t.jsonl", rows), calibration.raw_rows
    monkeypatch.setattr(
        calibration, "raw_rows", lambda file: ((line, Poisoned(row, inputs)) for line, row in read(file))
    )
    names = ["entropy", "pim", *(["perplexity"] if kind == "scores" else [])]
    for name in names:
        own = {"prior": "uniform"} if name == "pim" else {}
        told = {"data": str(file), **({} if name == "perplexity" else said), **own}
        made = objective.get(name).make(Node.of({name: told}), Path())
        made.check(ModelRef.parse(str(folder)))
        made.prepare(ModelRef.parse(str(folder)), "cpu")
        assert np.isfinite(made(Candidate({})).total or np.nan)
    with pytest.raises(AssertionError, match="all cells were read"):
        scored("loss", {"data": str(file), **said}, folder)


def test_pim_draws_64_rows_and_none_twice(tmp_path: Path) -> None:
    file = table(tmp_path / "t.jsonl", [{"text": f"w{i}"} for i in range(100)])

    def drawn(**said: Any) -> list[str]:
        settings = Node.of({"pim": {"data": str(file), "prior": "uniform", **said}})
        made: Any = objective.get("pim").make(settings, Path())
        return [each.texts[0] for each in unlabelled(made._tasks[0])]

    assert len(drawn()) == len(set(drawn())) == 64 and drawn() == drawn(seed=0) != drawn(seed=1)


@pytest.mark.parametrize("name", ["entropy", "pim"])
def test_objectives_without_labels_are_the_same_whatever_the_labels_are(name: str, tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model", 3)
    labels: list[Iterator[Any]] = [
        iter(["0", "1", "2"] * 5), iter([2, 0, 1] * 5), iter([{"no": "label"}] * 15), iter([None] * 15)
    ]  # fmt: skip
    scores = []
    for number, own in enumerate(labels):
        rows = [{"text": text, "label": label, "score": label} for text, label in zip(sentences(15), own, strict=True)]
        file = table(tmp_path / f"{number}.jsonl", rows)
        said = {"data": str(file), "examples": 9, **({"prior": [1, 2, 3]} if name == "pim" else {})}
        scores.append(scored(name, said, folder))
    assert len({tuple(each.items()) for each in scores}) == 1


# ---- settings ----


def scored(name: str, said: Any, folder: Path) -> dict[str, float]:
    made = objective.get(name).make(Node.of({name: said}), Path())
    assert isinstance(made, OverChoices)
    made.prepare(ModelRef.parse(str(folder)), "cpu")
    return dict(made(Candidate({})).tasks)


def test_several_tasks_each_with_its_own_settings(tmp_path: Path, texts: Path, classes: Network) -> None:
    folder = classifier(tmp_path / "model", 3)
    other = table(tmp_path / "o.jsonl", [{"body": text, "label": 0} for text in sentences(5, 1)])
    data = {"one": str(texts), "two": {"data": [str(other)], "columns": {"text": "body"}, "examples": 3}}
    found = scored("entropy", {"data": data, "examples": 7}, folder)
    assert found.keys() == {"one", "two"}
    alone = scored("entropy", {"data": str(other), "columns": {"text": "body"}, "examples": 3}, folder)
    assert found["two"] == alone["entropy"]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (None, "needs 'data'; write 'pim: {data: texts.jsonl}'"),
        ({"data": "none.jsonl"}, "no such file 'none.jsonl'; it is looked for in"),
        ({"data": "t.jsonl"}, "'pim' needs a 'prior'; name the sources' folders"),
        ({"data": "t.jsonl", "prior": "nowhere"}, "no such folder 'nowhere'"),
        ({"data": "t.jsonl", "prior": {"beta": [[1, 0]]}}, "'beta' is 0"),
        ({"data": "t.jsonl", "prior": [0, 0]}, "the shares of 'prior' sum to 0"),
        ({"data": "t.jsonl", "priors": "uniform"}, "did you mean 'prior'?"),
        ({"data": {"a": {"files": "t.jsonl"}}}, "'files'"),
        ({"data": "t.jsonl", "scores": [1]}, "'scores' must be two or more"),
        ({"data": "t.jsonl", "scores": {"low": 3}}, "'scores' need 'low' and 'high'"),
        ({"data": "t.jsonl", "template": "no place"}, "must say once where the text goes: {text}"),
        ({"data": "t.jsonl", "columns": {"label": "grade"}}, "it looks at no label"),
    ],
)
def test_a_users_mistake_is_told_at_its_line(said: Any, told: str, tmp_path: Path) -> None:
    table(tmp_path / "t.jsonl", [{"text": "a"}])
    with pytest.raises(CuveeError) as caught:
        objective.get("pim").make(Node.of({"pim": said}, "search.yml:7"), tmp_path)
    assert told in str(caught.value) and str(caught.value).startswith("search.yml:7"), str(caught.value)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"scores": [1, 2]}, "2 scores, and the model has 3 choices"),
        ({"prior": {"best": 1}}, "'best' is no choice"),
        ({"prior": [1, 1]}, "2 shares for 3 choices"),
        ({"scores": [3, 2, 1], "prior": {"beta": [[2, 2]]}}, "in ascending order"),
    ],
)
def test_what_does_not_fit_the_model_is_told(said: Any, told: str, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(CuveeError, match=told):
        scored("pim", {"data": str(texts), "prior": "uniform", **said}, classifier(tmp_path, 3))


@pytest.mark.parametrize("prior", [[1, 1, 1], {"a": 1}, {"beta": [[2, 2]]}])
def test_a_prior_of_choices_that_every_query_has_its_own_of_is_told(prior: Any, tmp_path: Path) -> None:
    rows = [{"query": f"w{i}", "positive": "w1", "negative": ["w2", "w3"]} for i in range(3)]
    said = {"data": str(table(tmp_path / "t.jsonl", rows)), "prior": prior}
    made = objective.get("pim").make(Node.of({"pim": said}), Path())
    with pytest.raises(CuveeError, match=r"every query has choices of its own.*write 'prior: uniform'"):
        made.check(ModelRef.parse(str(model("bert", tmp_path))))


def test_a_line_break_that_yaml_did_not_read_is_told(texts: Path, tmp_path: Path) -> None:
    folder = ModelRef.parse(str(model("llama", tmp_path)))
    for template, told in (("{text}\nw8", 0), (r"{text}\nw8", 1)):
        said = {"data": str(texts), "head": "lm", "scores": ["w1", "w2"], "template": template}
        notes = objective.get("entropy").make(Node.of({"entropy": said}, "search.yml:3"), Path()).check(folder)
        assert len(notes) == told
        assert all(n.startswith("search.yml:3") and r"the template has \n as two characters" in n for n in notes)


def test_an_ordinal_head_of_a_language_model_is_told(texts: Path, tmp_path: Path) -> None:
    said = {"data": str(texts), "head": "coral", "scores": ["w1", "w2"]}
    made = objective.get("entropy").make(Node.of({"entropy": said}, "search.yml:3"), Path())
    with pytest.raises(CuveeError, match=r"search.yml:3.*'head: coral' is of a sequence classifier, and .* 'lm'"):
        made.check(ModelRef.parse(str(model("llama", tmp_path))))


def test_a_label_that_is_no_choice_is_told(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model", 3)
    file = table(tmp_path / "t.jsonl", [{"text": "w1", "label": "7"}])
    with pytest.raises(CuveeError, match="the label '7' is no choice; the choices are 'LABEL_0'"):
        scored("loss", str(file), folder)
    with pytest.raises(CuveeError, match="row 1 has no label"):
        scored("loss", str(table(tmp_path / "u.jsonl", [{"text": "w1"}])), folder)
    with pytest.raises(CuveeError, match="row 1 has no label that is a word or a whole number"):
        scored("loss", str(table(tmp_path / "v.jsonl", [{"text": "w1", "label": 2.5}])), folder)


def test_a_query_needs_a_right_candidate_and_a_wrong_one(tmp_path: Path) -> None:
    from search.objectives.inputs import labelled

    both = {"query": "q", "positive": ["a", "b"]}
    file = table(tmp_path / "q.jsonl", [{**both, "negative": ["c", "d"]}])
    found, _ = labelled(task(file, labelled=True)[0], ranking=True)
    assert found == (Input(("q",), ("a", "c", "d")),), "another positive is no wrong answer"
    for row, told in ((both, "fewer than two candidates"), ({"text": "a"}, "fewer than two candidates")):
        with pytest.raises(CuveeError, match=f"row 1 has {told}"):
            labelled(task(table(tmp_path / "r.jsonl", [row]), labelled=True)[0], ranking=True)
    rows = [{"text": text} for text in "abcde"]
    with pytest.raises(CuveeError, match="row 1 has no 'positive'"):
        labelled(task(table(tmp_path / "s.jsonl", rows), labelled=True)[0], ranking=True)
