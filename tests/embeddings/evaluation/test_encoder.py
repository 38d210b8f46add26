"""Encoder against mteb's own wrapper of sentence-transformers: the same prompts, vectors and scores, with less work."""

from __future__ import annotations

import gzip
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings.evaluation.embedding_cache import EmbeddingCache
from embeddings.evaluation.encoder import Encoder, batches, token_lengths
from embeddings.model import EmbeddingModel, open_model
from merging.errors import CuveeError

pytestmark = [
    pytest.mark.filterwarnings("ignore:The fill_missing parameter is deprecated"),  # mteb's wrapper warns of itself
    pytest.mark.filterwarnings("ignore:The task '.*' is superseded"),  # which is which matters not here
]

SHARED = Path(__file__).parents[4] / "shared" / "data"
TEXTS = [
    "a short one",
    "a short one",
    "",
    "Über 100 Jahre: ein etwas längerer Satz, der mehr Tokens hat.",
    "word " * 400,
]


@pytest.fixture(scope="module")
def model(minilm: Path) -> EmbeddingModel:
    return open_model(minilm)


@pytest.fixture
def prompted(model: EmbeddingModel) -> Iterator[Any]:
    """Sets prompts on the model for the time of a test, cut to one layer; gives it as opened with them."""
    transformer = model.transformer
    encoder = transformer[0].model.encoder
    layers = encoder.layer
    encoder.layer = layers[:1]
    before = (transformer.prompts, transformer.default_prompt_name)

    def with_prompts(prompts: Mapping[str, str], default: str | None = None) -> EmbeddingModel:
        transformer.prompts, transformer.default_prompt_name = dict(prompts), default
        return replace(model, prompts=dict(prompts))

    yield with_prompts
    transformer.prompts, transformer.default_prompt_name = before
    encoder.layer = layers


def read(task: str, split: str, rows: int) -> list[dict[str, Any]]:
    file = SHARED / task / f"{split}.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"{task} may not be copied into the project, and the folder with it is not here")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][:rows]


def of_mteb(model: EmbeddingModel, prompts: Mapping[str, str] | None = None) -> Any:
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls what sentence-transformers has renamed
        return SentenceTransformerEncoderWrapper(model.transformer, model_prompts=dict(prompts) if prompts else None)


def loader(texts: Sequence[str]) -> Any:
    from datasets import Dataset
    from torch.utils.data import DataLoader

    return DataLoader(Dataset.from_dict({"text": list(texts)}), batch_size=32)


def metadata(name: str = "STSBenchmark") -> Any:
    import mteb

    return mteb.get_task(name).metadata


def encoded(encoder: Any, texts: Any, task: Any, prompt_type: Any = None) -> Any:
    inputs = loader(texts) if isinstance(texts, list) else texts
    return encoder.encode(inputs, task_metadata=task, hf_split="test", hf_subset="default", prompt_type=prompt_type)


def scores(encoder: Any, task: Any) -> dict[str, Any]:
    import mteb

    result = mteb.evaluate(encoder, task, cache=None, co2_tracker=False, show_progress_bar=False)
    found: dict[str, Any] = result.task_results[0].scores["test"][0]
    return {key: value for key, value in found.items() if isinstance(value, float)}


def sts(rows: Sequence[Mapping[str, Any]]) -> Any:
    """MTEB's STSBenchmark on those rows."""
    import mteb
    from datasets import Dataset, DatasetDict

    task = mteb.get_task("STSBenchmark")
    task.dataset = DatasetDict({"test": Dataset.from_list([dict(row) for row in rows])})
    task.data_loaded = True
    return task


# The oracle: mteb's wrapper.


def test_it_is_an_encoder_to_mteb(model: EmbeddingModel) -> None:
    from mteb.models.models_protocols import EncoderProtocol

    encoder = Encoder(model)
    assert isinstance(encoder, EncoderProtocol)
    meta = encoder.mteb_model_meta
    assert meta.name == model.name and meta.revision == model.digest
    assert meta.max_tokens == 256 and meta.embed_dim == 384
    assert Encoder(replace(model, name="mine")).mteb_model_meta.name == "local/mine"
    type(meta).model_validate(meta.model_dump())  # as mteb does when it reads it back


def test_vectors_equal_those_of_mtebs_wrapper(model: EmbeddingModel) -> None:
    ours, theirs = encoded(Encoder(model), TEXTS, metadata()), encoded(of_mteb(model), TEXTS, metadata())
    assert ours.shape == theirs.shape == (len(TEXTS), 384) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_array_equal(ours[0], ours[1])


ALL_PROMPTS = {
    "SciFact-query": "one: ",
    "SciFact": "two: ",
    "Retrieval-document": "three: ",
    "Retrieval": "four: ",
    "query": "five: ",
    "document": "six: ",
    "STS": "seven: ",
    "no task of anyone": "eight: ",
}
PROMPTS = [
    {},
    ALL_PROMPTS,
    {"query": "q: "},
    {"document": "d: "},
    {"query": "", "document": ""},
    {"passage": "p: "},
    {"corpus": "c: ", "passage": "p: "},
    {"Retrieval": "r: ", "document": "d: "},
]
EACH_LEFT_OUT = [{name: text for name, text in ALL_PROMPTS.items() if name != left_out} for left_out in ALL_PROMPTS]


@pytest.mark.parametrize("own", [True, False], ids=["of the model", "of the user"])
@pytest.mark.parametrize("default", [None, "default"])
def test_prompts_are_those_of_mtebs_wrapper(prompted: Any, own: bool, default: str | None) -> None:
    from mteb.types import PromptType

    tasks, text = [metadata("SciFact"), metadata("STSBenchmark")], loader(["text"])
    for prompts in PROMPTS if default else PROMPTS[:4] + EACH_LEFT_OUT:
        extra = {"default": "standing: "} if default else {}
        model = prompted({**prompts, **extra} if own else {"query": "built in: ", "document": "", **extra}, default)
        given_prompts = None if own else {**prompts, **extra}
        ours = Encoder(model, prompts=given_prompts)
        theirs = of_mteb(model, given_prompts)
        for task in tasks:
            for prompt_type in (None, PromptType.query, PromptType.document):
                expected = encoded(theirs, text, task, prompt_type)
                got = encoded(ours, text, task, prompt_type)
                assert abs(got - expected).max() < 1e-5, (prompts, task.name, prompt_type)


def test_a_prompt_by_the_name_of_a_task_of_ones_own_is_used(model: EmbeddingModel) -> None:
    task = metadata().model_copy(update={"name": "my own task"})
    got = encoded(Encoder(model, prompts={"my own task": "mine: "}), ["text"], task)
    np.testing.assert_allclose(got, model.transformer.encode(["text"], prompt="mine: "), atol=1e-5)


def test_similarity_is_the_models_own(model: EmbeddingModel) -> None:
    encoder = Encoder(model)
    a, b = encoder.encode_texts(TEXTS[:3]), encoder.encode_texts(TEXTS[2:])
    assert np.allclose(encoder.similarity(a, b), of_mteb(model).similarity(a, b))
    assert np.allclose(encoder.similarity_pairwise(a, b), of_mteb(model).similarity_pairwise(a, b))


def test_scores_of_sts_benchmark_equal_mtebs(model: EmbeddingModel) -> None:
    rows = read("stsb-en", "test", 60)
    ours, theirs = scores(Encoder(model), sts(rows)), scores(of_mteb(model), sts(rows))
    assert ours.keys() == theirs.keys() and len(ours) > 5
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert 0.7 < ours["main_score"] < 0.95


def test_scores_of_banking77_equal_mtebs(model: EmbeddingModel) -> None:
    import mteb
    from datasets import Dataset, DatasetDict

    test, train = read("banking77", "test", 10_000), read("banking77", "train", 10_000)
    labels = sorted({row["label"] for row in test})[:4]

    def task() -> Any:
        made: Any = mteb.get_task("Banking77Classification")
        made.n_experiments = 3
        rows = {
            split: Dataset.from_list(
                [{"text": row["text"], "label": labels.index(row["label"])} for row in part if row["label"] in labels]
            )
            for split, part in (("train", train[::5]), ("test", test[::5]))
        }
        made.dataset, made.data_loaded = DatasetDict(rows), True
        return made

    ours, theirs = scores(Encoder(model), task()), scores(of_mteb(model), task())
    assert ours == pytest.approx(theirs, abs=1e-5, nan_ok=True)  # average precision is for two classes
    assert 0.7 < ours["main_score"] <= 1


def test_a_changed_model_is_never_given_anothers_score(model: EmbeddingModel, minilm: Path, tmp_path: Path) -> None:
    """mteb alone files every local model under one name, and gives the second the score of the first."""
    import mteb
    from safetensors.numpy import load_file, save_file

    rows = [
        {"sentence1": one, "sentence2": two, "score": score}
        for one, two, score in [
            ("a cat sleeps", "a cat is asleep", 5.0),
            ("a man plays a guitar", "someone makes music", 3.5),
            ("the stock market fell", "a cat sleeps", 0.0),
            ("rain is expected", "it will probably rain", 4.5),
            ("he reads a book", "she rides a bicycle", 0.5),
        ]
    ]
    changed = tmp_path / "model"
    shutil.copytree(minilm, changed)
    weights = load_file(changed / "model.safetensors")
    generator = np.random.default_rng(0)
    for name in weights:
        if "layer.5" in name:
            weights[name] = generator.permutation(weights[name].reshape(-1)).reshape(weights[name].shape)
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    other = open_model(changed, name=model.name)
    results = mteb.ResultCache(tmp_path / "results")
    found = []
    with EmbeddingCache(tmp_path / "vectors") as cache:
        for each in (other, model, other):
            encoder = Encoder(each, cache)
            result = mteb.evaluate(encoder, sts(rows), cache=results, co2_tracker=False, show_progress_bar=False)
            found.append((result.task_results[0].get_score(), encoder.encoded))
    expected = scores(of_mteb(other), sts(rows))["main_score"]
    assert found[1][0] != found[0][0] == pytest.approx(expected, abs=1e-5)
    assert found[0][1] == found[1][1] == 9  # nothing of one is used for the other
    assert found[2] == (pytest.approx(expected, abs=1e-5), 0)


# Less work.


def test_each_distinct_text_is_encoded_once(model: EmbeddingModel, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with EmbeddingCache(tmp_path) as cache:
        encoder = Encoder(model, cache, progress=lambda *state: seen.append(state))
        first = encoder.encode_texts([*TEXTS, *TEXTS], what="one")
        assert (encoder.encoded, encoder.reused) == (4, 6)
        second = encoder.encode_texts([*TEXTS, "new"], task="query", what="two")
        assert (encoder.encoded, encoder.reused) == (5, 11)
        assert seen[-1] == ("two", 1, 1) and ("one", 4, 4) in seen
        np.testing.assert_array_equal(first[: len(TEXTS)], second[:-1])
        assert len(cache) == 5
        again = Encoder(model, cache)
        np.testing.assert_array_equal(again.encode_texts(TEXTS), first[: len(TEXTS)])
        assert (again.encoded, again.reused) == (0, 5)


@pytest.mark.parametrize("change", ["prompt", "digest", "length"])
def test_the_cache_tells_apart_what_gives_other_vectors(model: EmbeddingModel, tmp_path: Path, change: str) -> None:
    with EmbeddingCache(tmp_path) as cache:
        Encoder(model, cache).encode_texts(TEXTS)
        other = Encoder(replace(model, digest="other") if change == "digest" else model, cache)
        length = model.transformer.max_seq_length
        try:
            model.transformer.max_seq_length = 8 if change == "length" else length
            got = other.encode_texts(TEXTS, prompt="prompt: " if change == "prompt" else None)
            assert other.encoded == 4
            expected = model.transformer.encode(TEXTS, prompt="prompt: " if change == "prompt" else None)
            np.testing.assert_allclose(got, expected, atol=1e-5)
        finally:
            model.transformer.max_seq_length = length


def test_prompts_of_the_user_make_another_revision(model: EmbeddingModel) -> None:
    revisions = {
        Encoder(model, prompts=prompts).revision for prompts in (None, {}, {"query": "a"}, {"query": "b"}, {"STS": "a"})
    }
    assert len(revisions) == 4 and model.digest in revisions


@given(st.lists(st.integers(0, 600), max_size=60), st.integers(1, 2000), st.none() | st.integers(1, 9))
def test_batches_hold_every_text_once_and_keep_the_budget(lengths: list[int], budget: int, rows: int | None) -> None:
    found = [list(batch) for batch in batches(lengths, budget=budget, rows=rows)]
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    in_order = [lengths[i] for batch in found for i in batch]
    assert in_order == sorted(lengths, reverse=True)
    for batch in found:
        if rows is not None:
            assert len(batch) <= rows
        else:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch_size", ["auto", 1, 3])
def test_batch_size_and_threads_change_nothing_but_rounding(
    model: EmbeddingModel, batch_size: str | int, threads: int
) -> None:
    import torch

    before, expected = torch.get_num_threads(), model.transformer.encode(TEXTS)
    try:
        torch.set_num_threads(threads)
        got = Encoder(model, batch_size=batch_size).encode_texts(TEXTS)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_lengths_are_those_of_the_models_input(model: EmbeddingModel) -> None:
    for prompt in (None, "a prompt: "):
        lengths = token_lengths(model.transformer, TEXTS, prompt)
        for text, length in zip(TEXTS, lengths, strict=True):
            assert model.transformer.preprocess([text], prompt=prompt)["input_ids"].shape == (1, length)
    assert max(lengths) == model.max_length


def test_no_texts_give_no_vectors(model: EmbeddingModel) -> None:
    assert Encoder(model).encode_texts([]).shape == (0, 384)


# Mistakes.


def test_a_vector_that_is_not_finite_is_an_error_in_one_line(minilm: Path, tmp_path: Path) -> None:
    import torch

    damaged = open_model(minilm)
    with torch.no_grad():
        damaged.transformer[0].model.embeddings.word_embeddings.weight[2054] = torch.nan  # "what"
    with EmbeddingCache(tmp_path) as cache:
        encoder = Encoder(damaged, cache, batch_size=1)
        with pytest.raises(CuveeError, match=r"model on STSBenchmark: .*not finite \(NaN\) for 'what is wrong'"):
            encoded(encoder, ["something longer that is fine", "fine and good too", "what is wrong"], metadata())
        again = Encoder(damaged, cache)
        again.encode_texts(["something longer that is fine"])
        assert again.encoded == 0  # what was encoded before the error is kept


def test_what_cannot_be_encoded_is_refused(model: EmbeddingModel) -> None:
    for batch_size in (0, -1, "many", 1.5):
        with pytest.raises(CuveeError, match="no batch size"):
            Encoder(model, batch_size=batch_size)  # type: ignore[arg-type]
    with pytest.raises(CuveeError, match="precision 'int8'"):
        Encoder(model).encode(loader(["a"]), task_metadata=metadata(), hf_split="", hf_subset="", precision="int8")
    with pytest.raises(CuveeError, match="no texts"):
        Encoder(model).encode([{"image": [0]}], task_metadata=metadata(), hf_split="", hf_subset="")
