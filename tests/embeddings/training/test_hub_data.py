"""Data sets of the hub, as the cache of `datasets` has them: a run stays with the revision that it began with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embeddings.training.config import TrainingConfig, parse
from embeddings.training.data import TrainingSet, load_sets
from embeddings.training.hub_data import HubRevisions
from merging.errors import CuveeError
from tests.embeddings.training.test_data import Words, texts

OLD, NEW = "a" * 40, "b" * 40
Put = Callable[..., None]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Put]:
    """Puts a revision of our/pairs into a cache without a hub, where the library takes the newest whatever is asked for."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache-of-datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    def put(revision: str, positive: str, name: str = "pairs") -> None:
        folder = tmp_path / "cache-of-datasets" / f"our___{name}" / "default" / "0.0.0" / revision
        folder.mkdir(parents=True)
        features = datasets.Features({"anchor": datasets.Value("string"), "positive": datasets.Value("string")})
        with ArrowWriter(path=str(folder / f"{name}-train.arrow"), features=features) as writer:
            writer.write({"anchor": "a", "positive": positive})
            rows, size = writer.finalize()
        split = {"name": "train", "num_bytes": size, "num_examples": rows, "dataset_name": name}
        about: dict[str, Any] = {"builder_name": "parquet", "dataset_name": name, "config_name": "default"}
        info = datasets.DatasetInfo(features=features, version="0.0.0", splits={"train": split}, **about)
        info.write_to_directory(str(folder))

    yield put


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    (tmp_path / "model").mkdir()
    return parse("model: model\ndata: [{hub: our/pairs}]\n", str(tmp_path / "config.yml"))


def load(config: TrainingConfig, run: Path, **more: bool) -> TrainingSet:
    return load_sets(config, Words(), run, **more)[0]


def test_a_run_stays_with_the_revision_that_it_began_with_and_says_so(
    put: Put, config: TrainingConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put(OLD, "old")
    first = load(config, tmp_path / "run")
    assert first.settings.revision == OLD and texts(first)[0]["positive"] == ["old"] and not first.notes
    assert json.loads((tmp_path / "run" / "hub.json").read_text("utf-8")) == {"our/pairs": OLD}
    put(NEW, "new")
    again = load(config, tmp_path / "run")
    assert again.digest == first.digest and again.settings.revision == OLD
    (note,) = again.notes
    assert note.startswith("our/pairs has changed on the hub (aaaaaaaaaaaa is bbbbbbbbbbbb now)")
    other = load(config, tmp_path / "other-run")
    assert texts(other)[0]["positive"] == ["new"] and not other.notes
    begun = load(config, tmp_path / "run", fresh=True)
    assert begun.digest == other.digest and not load(config, tmp_path / "run").notes
    assert capfd.readouterr() == ("", "")


def test_texts_and_images_that_are_read_anew_keep_both_revisions(
    put: Put, config: TrainingConfig, tmp_path: Path
) -> None:
    put(OLD, "old")
    put(OLD, "other", "others")
    load(config, tmp_path, fresh=True)
    (others,) = parse("model: model\ndata: [{hub: our/others}]\n", config.where).data
    HubRevisions(tmp_path / "hub.json", fresh=True).pinned(others)  # as `images:` are read, after the texts
    assert json.loads((tmp_path / "hub.json").read_text("utf-8")) == {"our/pairs": OLD, "our/others": OLD}


def test_another_revision_is_not_read_for_want_of_a_connection(
    put: Put, config: TrainingConfig, tmp_path: Path
) -> None:
    put(NEW, "new")
    pinned = parse(f"model: model\ndata: [{{hub: our/pairs, revision: {OLD}}}]\n", config.where)
    with pytest.raises(CuveeError) as error:
        load(pinned, tmp_path / "run")
    said = str(error.value).partition("config.yml:2: ")[2]
    assert said == "of our/pairs there is bbbbbbbbbbbb in the cache, not aaaaaaaaaaaa; run it once with a connection"
    assert texts(
        load(parse(config.text.replace("pairs}", f"pairs, revision: {NEW}}}"), config.where), tmp_path / "run")
    )


def test_a_data_set_that_is_nowhere_is_one_line(put: Put, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = parse("model: model\ndata: [{hub: our/none}]\n", str(tmp_path / "config.yml"))
    with pytest.raises(CuveeError, match=r"config\.yml:2: our/none cannot be loaded: Couldn't reach"):
        load(config, tmp_path / "run")


def test_a_run_goes_on_without_the_hub_and_without_its_cache(
    put: Put, config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(OLD, "old")
    first = load(config, tmp_path / "run")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "gone")
    again = load(config, tmp_path / "run")
    assert again.digest == first.digest and not again.notes
