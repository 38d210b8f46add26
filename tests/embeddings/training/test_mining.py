"""Mining: the negatives are those of sentence-transformers' own function, with a real model on real pairs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embeddings.evaluation import suite
from embeddings.training.config import parse
from embeddings.training.data import load_sets, read_texts
from embeddings.training.mining import mine
from embeddings.training.mining_settings import MiningSettings
from embeddings.training.rows import Example
from merging.errors import CuveeError


@pytest.fixture(scope="module")
def transformer(minilm: Path) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(1)
    return SentenceTransformer(str(minilm), device="cpu")


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    task = next(task for task in suite.load() if task.name == "word")
    return [Example(row["query"], (row["positive"],)) for row in task.read("train")[:80]]


def cosines(transformer: Any, queries: list[str], documents: list[str]) -> Any:
    a, b = (transformer.encode(texts, normalize_embeddings=True) for texts in (queries, documents))
    return np.asarray(a, np.float64) @ np.asarray(b, np.float64).T


def test_top_negatives_equal_a_float64_search(transformer: Any, rows: list[Example]) -> None:
    found = mine(rows, MiningSettings(negatives=3, relative_margin=0.05, range_max=len(rows)), transformer)
    positives: dict[str, set[str]] = {}
    for row in rows:
        positives.setdefault(row.query, set()).update(row.positives)
    corpus = list(dict.fromkeys(row.positives[0] for row in rows))
    similar = cosines(transformer, [row.query for row in rows], corpus)
    for row, new, scores in zip(rows, found, similar, strict=True):
        best = scores[corpus.index(row.positives[0])]
        wanted = [
            corpus[i]
            for i in np.argsort(-scores)
            if corpus[i] not in positives[row.query] and scores[i] <= best - 0.05 * abs(best)
        ][:3]
        assert new.query == row.query and new.positives == row.positives
        assert set(new.negatives) == set(wanted)


def test_own_negatives_stay_first_and_positives_of_a_query_are_never_mined(
    transformer: Any, rows: list[Example]
) -> None:
    query = rows[0].query
    several = [
        Example(query, (rows[0].positives[0], rows[1].positives[0]), ("an own negative",), teacher=(3.0, 2.0, 1.0)),
        Example(query, (rows[2].positives[0],)),
        *rows[3:30],
    ]
    settings = MiningSettings(negatives=4, relative_margin=None)
    found = mine(several, settings, transformer, most=3)
    first = found[0]
    assert first.negatives[0] == "an own negative" and len(first.negatives) == 3
    assert first.teacher[:3] == (3.0, 2.0, 1.0) and np.isnan(first.teacher[3:]).all() and len(first.teacher) == 5
    known = {rows[i].positives[0] for i in range(3)}
    assert not known & set(first.negatives) and not known & set(found[1].negatives)
    assert len(found[1].negatives) == 3


def test_random_negatives_follow_the_seed_and_leave_the_global_generator_alone(
    transformer: Any, rows: list[Example]
) -> None:
    settings = MiningSettings(negatives=2, range_max=20, relative_margin=None, sampling="random")
    random.seed(7)
    before = random.getstate()
    first, again, other = (mine(rows[:40], settings, transformer, seed=seed) for seed in (1, 1, 2))
    assert random.getstate() == before
    assert first == again != other


def test_too_few_ranks_are_told_with_the_line(transformer: Any, rows: list[Example]) -> None:
    settings = MiningSettings(negatives=5, range_min=3, range_max=4)
    with pytest.raises(CuveeError, match=r"c\.yml:3: hard negatives cannot be mined"):
        mine(rows[:5], settings, transformer, where="c.yml:3")


def test_mined_sets_are_cached_and_nothing_is_said(
    minilm: Path, transformer: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Letters:
        digest = "letters"

        def prompt_of(self, side: str | None) -> str | None:
            return None

        def __call__(self, texts: list[str], side: str, prompt: str | None) -> list[list[int]]:
            return [list(map(ord, text)) for text in texts]

    text = f"model: {minilm}\ndata: [{{suite: shipped, task: word, limit: 60, mine: {{negatives: 2}}}}]"
    opened = []

    def opens() -> Any:
        opened.append(1)
        return transformer

    config = parse(text, str(tmp_path / "config.yml"))
    (first,), (again,) = (load_sets(config, Letters(), tmp_path / "cache", transformer=opens) for _ in range(2))
    assert len(opened) == 1 and len(first) == 60
    assert [read_texts(first, i) for i in range(60)] == [read_texts(again, i) for i in range(60)]
    assert first.negatives.lengths.mean() > 1
    (own,) = load_sets(config, Letters(), tmp_path / "other")  # opens the configuration's model itself
    assert own.digest == first.digest
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""
