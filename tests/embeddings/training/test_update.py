"""Updates: from lineage alone, again and again, of models without one; and what a user can get wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embeddings.training.bag import train_run
from embeddings.training.config import data_settings, load
from embeddings.training.options import Options
from embeddings.training.update import update_model
from merging import lineage
from merging.engine import merge_file
from merging.errors import CuveeError
from tests.embeddings.runs import same_weights, table, triplets, weights, write_config
from tests.embeddings.training.test_bag import stamps


@pytest.fixture(scope="module")
def place(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A trained model in `run`, whose configuration and data are gone; and new data."""
    folder = tmp_path_factory.mktemp("update")
    more = "epochs: 1\nsave_every: 0\ncore: 25\nseed: 3\nloss: {matryoshka: [384, 128], temperature: 0.05}\n"
    config = write_config(folder / "gone", minilm, more + "evaluate: {tasks: [word], every: 100}\n")
    train_run(load(config), folder / "run")
    shutil.rmtree(folder / "gone")
    table(folder / "new.jsonl", triplets(8, 200))
    table(folder / "Word.jsonl", triplets(8, 300))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def updated(place: Path) -> dict[str, Any]:
    return update_model(place / "run", place / "new.jsonl", place / "updated")


def names_in(folder: Path) -> dict[str, int]:
    with np.load(folder / "core" / "rows.npz") as rows:
        return {name: len(rows[name]) for name in rows}


def test_lineage_is_all_that_is_needed(place: Path, updated: dict[str, Any]) -> None:
    """Neither the old data nor the configuration: base, settings and core set are known."""
    member = lineage.read(place / "updated" / "members" / "update")
    settings = member["made_by"]["settings"]
    assert settings["loss"]["parameters"] == {"matryoshka": [384, 128], "temperature": 0.05}
    assert settings["seed"] == 3
    assert {name: each["rows"] for name, each in member["made_by"]["data"].items()} == {
        "word": 4,
        "intent": 4,
        "new": 8,
    }
    assert updated["cost"] == 4 + 4 + 8 and updated["cost_full_retraining"] == 32 + 8
    assert updated["model"] == str(place / "updated" / "model")


def test_the_update_is_merged_in_with_equal_weight(place: Path, updated: dict[str, Any], tmp_path: Path) -> None:
    models = [place / "run" / "model", place / "updated" / "members" / "update"]
    lines = "".join(f"  - {{model: {model}, parameters: {{weight: 1}}}}\n" for model in models)
    (tmp_path / "recipe.yml").write_text(f"merge_method: multislerp\nmodels:\n{lines}dtype: float32\n", "utf-8")
    merge_file(tmp_path / "recipe.yml", tmp_path / "merged")
    assert same_weights(tmp_path / "merged", place / "updated" / "model")
    shutil.rmtree(tmp_path)


def test_the_core_grows_by_the_same_share(place: Path, updated: dict[str, Any]) -> None:
    core = data_settings(place / "updated" / "core" / "data.yml")[0]
    assert [each.name for each in core] == ["word", "intent", "new"]
    assert names_in(place / "updated") == {"word": 4, "intent": 4, "new": 2}


def test_updates_chain_and_names_that_clash_get_a_number(place: Path, updated: dict[str, Any]) -> None:
    """The second begins at the base again, and "Word" clashes with "word" where file names know no case."""
    again = update_model(place / "updated", place / "Word.jsonl", place / "second")
    assert names_in(place / "second") == {"word": 4, "intent": 4, "new": 2, "Word-2": 2}
    assert again["cost_full_retraining"] == 32 + 8 + 8
    trained = lineage.read(place / "second" / "model")["trained"]
    assert trained["base"] == lineage.read(place / "run" / "model")["trained"]["base"]
    third = update_model(place / "second", place / "new.jsonl", place / "third", dry_run=True)
    assert third["rows"] == {"word": 4, "intent": 4, "new": 2, "Word-2": 2, "new-2": 8}
    assert third["command"] == "update" and not (place / "third").exists()
    shutil.rmtree(place / "second")


def test_run_again_nothing_is_made_again(place: Path, updated: dict[str, Any]) -> None:
    before = stamps(place / "updated")
    again = update_model(place / "run" / "model", place / "new.jsonl", place / "updated")
    assert stamps(place / "updated") == before and again["cost"] == updated["cost"]
    with pytest.raises(CuveeError, match=r"holds a run of another configuration; .*--force"):
        update_model(place / "run", place / "Word.jsonl", place / "updated")
    with pytest.raises(CuveeError, match=r"holds a run of another configuration"):
        update_model(place / "updated" / "model", place / "new.jsonl", place / "updated")
    with pytest.raises(CuveeError, match=r"run: is an output of `cuvee train`"):
        update_model(place / "run", place / "new.jsonl", place / "run")


def test_a_run_that_was_moved_is_updated_all_the_same(place: Path, updated: dict[str, Any], tmp_path: Path) -> None:
    (place / "run").rename(place / "elsewhere")
    try:
        done = update_model(place / "elsewhere", place / "new.jsonl", tmp_path / "out")
        assert same_weights(tmp_path / "out" / "model", place / "updated" / "model")
        assert done["cost_full_retraining"] == 40
        shutil.copytree(place / "elsewhere" / "model", tmp_path / "alone")
        with pytest.raises(CuveeError, match=r"the core set is gone; give it by --core, or train anew"):
            update_model(tmp_path / "alone", place / "new.jsonl", tmp_path / "other", dry_run=True)
        core = place / "elsewhere" / "core" / "data.yml"
        plan = update_model(tmp_path / "alone", place / "new.jsonl", tmp_path / "other", core=core, dry_run=True)
        assert plan["rows"] == {"word": 4, "intent": 4, "new": 8}
    finally:
        (place / "elsewhere").rename(place / "run")
        shutil.rmtree(tmp_path)


def test_a_model_without_lineage_is_served_by_base_and_core(minilm: Path, place: Path, tmp_path: Path) -> None:
    with pytest.raises(CuveeError, match=r"minillm: no such folder; check the spelling"):
        update_model(minilm.with_name("minillm"), place / "new.jsonl", tmp_path / "out")
    with pytest.raises(CuveeError, match=r"does not say what it was trained from; say --base"):
        update_model(minilm, place / "new.jsonl", tmp_path / "out")
    notes: list[str] = []
    more = {"base": str(minilm), "note": notes.append, "config": write_config(tmp_path, minilm, "epochs: 1\n")}
    done = update_model(minilm, place / "new.jsonl", tmp_path / "out", core=place / "Word.jsonl", **more)  # type: ignore[arg-type]
    assert done["cost"] == 16 and done["cost_full_retraining"] is None and not notes
    assert names_in(tmp_path / "out") == {"Word": 8, "new": 3}
    again = update_model(tmp_path / "out", place / "Word.jsonl", tmp_path / "again", dry_run=True)
    assert again["rows"] == {"Word": 8, "new": 3, "Word-2": 8}
    bare = update_model(minilm, place / "new.jsonl", tmp_path / "bare", **more)  # type: ignore[arg-type]
    assert bare["cost"] == 8 and notes == [
        "no core set is known: what the model learned before is kept by the merge alone"
    ]
    plain = update_model(minilm, place / "new.jsonl", tmp_path / "plain", base=str(minilm), dry_run=True)
    assert plain["steps"] == 1
    shutil.rmtree(tmp_path)


def test_steps_are_shared_out_by_rows(minilm: Path, place: Path, tmp_path: Path) -> None:
    """What was trained for 8 steps on 32 rows is updated for 4 on 16; as if all 40 had taken 10."""
    config = write_config(tmp_path, minilm, "steps: 8\ncore: 25\nsave_every: 0\n")
    train_run(load(config), tmp_path / "run")
    done = update_model(tmp_path / "run", place / "new.jsonl", tmp_path / "out")
    assert done["steps"] == 4
    assert done["cost_full_retraining"] == round(40 * done["cost"] / 16)  # as often each row
    again = update_model(tmp_path / "out", place / "Word.jsonl", tmp_path / "next", dry_run=True)
    assert again["steps"] == round(10 * (4 + 4 + 2 + 8) / 40)
    shutil.rmtree(tmp_path)


def test_mistakes_are_one_line(minilm: Path, place: Path, tmp_path: Path) -> None:
    with pytest.raises(CuveeError, match=r"nowhere.jsonl: no such file"):
        update_model(place / "run", tmp_path / "nowhere.jsonl", tmp_path / "out")
    with pytest.raises(CuveeError):
        update_model(tmp_path / "nothing", place / "new.jsonl", tmp_path / "out")
    with pytest.raises(CuveeError):
        update_model(tmp_path / "nothing", place / "new.jsonl", tmp_path / "out", base=str(minilm))
    damaged = Path(shutil.copytree(place / "run" / "model", tmp_path / "model"))
    past = json.loads((damaged / "cuvee.json").read_text("utf-8"))
    for change in ({"config": {}}, {"config": {**past["trained"]["config"], "unheard": 1}}, {"config": None}):
        (damaged / "cuvee.json").write_text(json.dumps({**past, "trained": {**past["trained"], **change}}), "utf-8")
        with pytest.raises(CuveeError, match="holds no settings to train with"):
            update_model(damaged, place / "new.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path)


def test_the_base_that_is_gone_is_named(place: Path, minilm: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(place / "run" / "model", tmp_path / "model"))
    text = (moved / "cuvee.json").read_text("utf-8").replace(str(minilm), str(tmp_path / "lost"))
    (moved / "cuvee.json").write_text(text, "utf-8")
    with pytest.raises(CuveeError, match=r"lost: .*--base"):
        update_model(moved, place / "new.jsonl", tmp_path / "out")
    done = update_model(moved, place / "new.jsonl", tmp_path / "out", base=str(minilm), options=Options())
    assert done["cost"] == 16
    assert weights(tmp_path / "out" / "model")
    shutil.rmtree(tmp_path)
