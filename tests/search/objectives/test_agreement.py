"""Metrics against scikit-learn's; losses and perplexities against plain loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merging.node import Node
from merging.sources import ModelRef
from search import objective
from search.objective import Candidate, Scores
from search.objectives.agreement import METRICS
from tests.merging.statistics.models import classifier, model, sentences
from tests.search.objectives.test_choices import table

LABELS = [0, 2, 1, 1, 0, 2, 2, 1]


@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_scikit_learns(seed: int) -> None:
    from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score

    rng = np.random.default_rng(seed)
    given, found = rng.integers(0, 6, 50), rng.integers(0, 5, 50)
    every = range(6)
    assert METRICS["qwk"](given, found, 6) == pytest.approx(
        cohen_kappa_score(given, found, weights="quadratic", labels=list(every))
    )
    assert METRICS["accuracy"](given, found, 6) == accuracy_score(given, found)
    assert METRICS["macro_f1"](given, found, 6) == pytest.approx(f1_score(given, found, average="macro"))


def test_agreement_that_cannot_be_better_or_worse() -> None:
    given = np.array([0, 1, 2, 3])
    assert METRICS["qwk"](given, given, 4) == 1 and METRICS["qwk"](given, given[::-1], 4) == pytest.approx(-1)
    assert METRICS["qwk"](given * 0, given * 0, 4) == 1


def scores(name: str, said: Any, folder: Path) -> Scores:
    made = objective.get(name).make(Node.of({name: said}), Path())
    made.prepare(ModelRef.parse(str(folder)), "cpu")
    return made(Candidate({}))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, torch.Tensor]:
    """A classifier, texts with labels, and the classifier's logits."""
    from merging.statistics.network import open_network

    place = tmp_path_factory.mktemp("labelled")
    folder, texts = classifier(place / "model", 3), sentences(len(LABELS))
    file = table(place / "t.jsonl", [{"text": t, "label": float(y)} for t, y in zip(texts, LABELS, strict=True)])
    network = open_network(str(folder))
    with torch.no_grad():
        return folder, file, torch.cat([network.logits(network.features(network.read([text]))) for text in texts])


def test_loss_is_the_cross_entropy(labelled: tuple[Path, Path, torch.Tensor]) -> None:
    folder, file, logits = labelled
    expected = -torch.nn.functional.cross_entropy(logits.double(), torch.tensor(LABELS))
    assert scores("loss", str(file), folder).total == pytest.approx(float(expected), abs=1e-6)


def test_score_is_the_metric_of_the_most_probable(labelled: tuple[Path, Path, torch.Tensor]) -> None:
    from sklearn.metrics import cohen_kappa_score

    folder, file, logits = labelled
    found = scores("score", {"data": str(file), "metric": "qwk"}, folder)
    expected = cohen_kappa_score(LABELS, logits.argmax(1).numpy(), weights="quadratic", labels=[0, 1, 2])
    assert found.total == pytest.approx(expected) and found.tasks == {"score": found.total}
    assert scores("score", str(file), folder).total == float((logits.argmax(1) == torch.tensor(LABELS)).double().mean())


def test_entropy_is_what_it_says(labelled: tuple[Path, Path, torch.Tensor]) -> None:
    folder, file, logits = labelled
    p = logits.double().softmax(1).numpy()
    expected = np.mean([sum(share * math.log(share) for share in row) for row in p])
    assert scores("entropy", str(file), folder).total == pytest.approx(expected, abs=1e-6)


def test_a_language_models_scores_tell_how_many_outputs_are_valid(tmp_path: Path) -> None:
    folder = model("llama", tmp_path / "model")
    rows = [{"text": text, "label": i % 2 + 1} for i, text in enumerate(sentences(6))]
    said = {"data": str(table(tmp_path / "t.jsonl", rows)), "scores": ["w1", "w2"], "head": "lm"}
    with pytest.raises(Exception, match="the label '2' is no choice"):
        scores("score", said, folder)
    rows = [{**row, "label": f"w{row['label']}"} for row in rows]
    table(tmp_path / "t.jsonl", rows)
    found = scores("score", said, folder)
    assert found.tasks.keys() == {"score", "valid"} and 0 <= found.tasks["valid"] <= 1
    assert found.total == found.tasks["score"] and [*found.beside] == ["valid"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_perplexity_equals_a_loop(name: str, tmp_path: Path) -> None:
    import transformers

    folder, texts = model(name, tmp_path / "model"), sentences(9)
    file = table(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    found = scores("perplexity", str(file), folder)
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    losses = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            log_p = own(input_ids=torch.tensor([ids])).logits[0].log_softmax(1)
        losses += [float(log_p[i, token]) for i, token in enumerate(ids[1:])]
    assert found.total == pytest.approx(np.mean(losses), abs=1e-5) and found.tasks == {}
