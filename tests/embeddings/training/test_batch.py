"""What one step sees: its texts, and which of them is positive, negative or neither, against a loop over rows."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embeddings.training.batch import Batch, build_batch, objectives
from embeddings.training.config import TrainingConfig, parse
from embeddings.training.data import TrainingSet, load_sets
from embeddings.training.schedule import Part
from merging.errors import CuveeError
from tests.embeddings.runs import Rows, config_of, sets_of, table
from tests.embeddings.training.test_data import Words

WORDS = [*"abcdefg"]
words = st.sampled_from(WORDS)


@st.composite
def ranked(draw: Any) -> Rows:
    """Rows of few texts, so that many are shared: as query, positive and negative, within a row and between rows."""
    rows = []
    for _ in range(draw(st.integers(1, 7))):
        positive = draw(st.lists(words, min_size=1, max_size=2, unique=True))
        negative = draw(st.lists(words.filter(lambda w, p=positive: w not in p), max_size=3, unique=True))
        row = {"query": draw(words), "positive": positive, "negative": negative, "label": draw(st.sampled_from("xy"))}
        if draw(st.booleans()):
            row["teacher"] = [float(draw(st.integers(0, 9))) for _ in [*positive, *negative]]
        rows.append(row)
    return rows


def read(folder: Path, rows: Rows, more: str) -> tuple[TrainingConfig, list[TrainingSet]]:
    (folder / "model").mkdir(exist_ok=True)
    table(folder / "rows.jsonl", rows)
    config = parse(f"model: model\ndata:\n  - {{file: rows.jsonl{more}}}\n", str(folder / "config.yml"))
    return config, load_sets(config, Words(), folder / "cache")


def slowly(rows: Rows, *, labels: bool, in_batch: bool) -> tuple[set[Any], set[Any], dict[Any, float]]:
    """(row, candidate) pairs that are positive, and that are allowed; and the teacher's scores."""
    positive, allowed, scores = set(), set(), {}
    candidates = {text for row in rows for text in (*row["positive"], *row["negative"])}
    for i, row in enumerate(rows):
        for place, text in enumerate([*row["positive"], *row["negative"]]):
            if "teacher" in row:
                scores[i, text] = row["teacher"][place]
        for text in candidates:
            if text in row["positive"]:
                positive.add((i, text))
                allowed.add((i, text))
            elif text in row["negative"]:
                allowed.add((i, text))
            elif in_batch and text != row["query"]:
                kin = [o for o in rows if o["query"] == row["query"] or (labels and o["label"] == row["label"])]
                if not any(text in other["positive"] for other in kin):
                    allowed.add((i, text))
    return positive, allowed, scores


def texts_at(batch: Batch, places: Sequence[int], prompt: str) -> list[str]:
    """The words behind a batch's tokens."""
    by_ids = {tuple(ids): word for word, ids in zip(WORDS, Words()(WORDS, "", prompt), strict=True)}
    return [by_ids[tuple(batch.tokens[place].tolist())] for place in places]


@pytest.mark.parametrize("prompts", ["", ', prompt: {query: "q ", document: ""}'])
@pytest.mark.parametrize("type_", ["Retrieval", "Classification"])
@pytest.mark.parametrize("in_batch", [None, True, False])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ranked())
def test_targets_are_those_of_a_loop_over_rows(prompts: str, type_: str, in_batch: bool | None, rows: Rows) -> None:
    labels = type_ == "Classification"
    if labels:
        rows = [{key: value for key, value in row.items() if key != "teacher"} for row in rows]
    said = "" if in_batch is None else f", loss: {{in_batch: {str(in_batch).lower()}}}"
    with tempfile.TemporaryDirectory() as name:
        config, sets = read(Path(name), rows, f", type: {type_}{prompts}{said}")
        found = objectives(config, sets)
        batch = build_batch((Part(0, np.arange(len(rows))),), sets, found)
    (part,) = batch.parts
    wanted = not labels if in_batch is None else in_batch
    assert found[0].in_batch == (wanted and found[0].needs != "teacher")
    positive, allowed, scores = slowly(rows, labels=labels, in_batch=found[0].in_batch)
    queries = texts_at(batch, part.queries.tolist(), "q " if prompts else "")
    candidates = texts_at(batch, part.candidates.tolist(), "")
    assert queries == [row["query"] for row in rows]
    assert len(set(candidates)) == len(candidates)
    table_of = [(i, text) for i in range(len(rows)) for text in candidates]
    assert {pair for pair, is_so in zip(table_of, part.positive.flat, strict=True) if is_so} == positive
    assert {pair for pair, is_so in zip(table_of, part.allowed.flat, strict=True) if is_so} == allowed
    if part.scores is not None:
        said_of = {pair: x for pair, x in zip(table_of, part.scores.flat, strict=True) if not np.isnan(x)}
        assert said_of == scores
    else:
        assert not scores


def test_each_text_of_a_side_is_embedded_once(tmp_path: Path) -> None:
    rows = [{"query": "a", "positive": "b"}, {"query": "a", "positive": "c"}, {"query": "d", "positive": "b"}]
    config, sets = read(tmp_path, rows, "")
    batch = build_batch((Part(0, np.arange(3)),), sets, objectives(config, sets))
    assert len(batch.tokens) == 4 and batch.rows == 3
    (part,) = batch.parts
    assert part.queries[0] == part.queries[1] and len(part.candidates) == 2


def test_graded_pairs_keep_their_rows(tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "score": 0.25}, {"sentence1": "a", "sentence2": "b", "score": 1.0}]
    config, sets = read(tmp_path, rows, ", type: STS")
    (part,) = build_batch((Part(0, np.array([1, 0])),), sets, objectives(config, sets)).parts
    assert part.scores is not None and part.scores.tolist() == [1.0, 0.25]
    assert part.candidates[0] == part.candidates[1] and part.positive.tolist() == np.eye(2, dtype=bool).tolist()


def test_parts_of_a_step_do_not_see_each_other(minilm: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, minilm)
    sets = sets_of(config, tmp_path)
    step = (Part(0, np.arange(3)), Part(1, np.arange(4)))
    batch = build_batch(step, sets, objectives(config, sets))
    assert [part.rows for part in batch.parts] == [3, 4] and batch.rows == 7
    assert max(batch.parts[0].candidates) < min(batch.parts[1].queries)


@pytest.mark.parametrize(
    ("run", "own", "name", "temperature_given"),
    [
        ("", "", "infonce", False),
        ("loss: disj", "", "disj", False),
        ("loss: disj", ", loss: conj", "conj", False),
        ("loss: {temperature: 0.5}", "", "infonce", True),
        ("loss: cosent", "", "infonce", False),  # the run's loss is for the rows that it fits
    ],
)
def test_the_loss_is_the_data_sets_own_or_the_runs_or_the_types(
    tmp_path: Path, run: str, own: str, name: str, temperature_given: bool
) -> None:
    import torch

    (tmp_path / "model").mkdir()
    table(tmp_path / "rows.jsonl", [{"query": "a", "positive": "b", "negative": "c"}])
    config = parse(f"model: model\ndata:\n  - {{file: rows.jsonl{own}}}\n{run}\n", str(tmp_path / "config.yml"))
    sets = load_sets(config, Words(), tmp_path / "cache")
    (found,) = objectives(config, sets)
    assert found.name == name and found.in_batch
    (part,) = build_batch((Part(0, np.arange(1)),), sets, [found]).parts
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    expected = 0.5 if temperature_given else 0.02
    loss = found.loss(vectors[:1], vectors, part.targets("cpu"))
    assert float(loss) == pytest.approx(np.log1p(np.exp(-1 / expected)) if part.positive[0, 0] else 1 / expected)


def test_a_loss_that_does_not_fit_is_refused_at_its_line(tmp_path: Path) -> None:
    rows = [{"query": "a", "positive": "b", "negative": "c"}]
    config, sets = read(tmp_path, rows, ", loss: distill_kl")
    with pytest.raises(CuveeError, match=r"config.yml:3: .*distill_kl"):
        objectives(config, sets)
