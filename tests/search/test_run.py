"""`cuvee search` end to end on tiny models: the search finds the coefficients that a model was made of."""

from __future__ import annotations

import csv
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from merging import engine
from merging.errors import CuveeError
from merging.methods import registry
from merging.node import Node
from merging.sources import ModelRef
from search import config as search_config
from search import objective
from search import run as search_run
from search.choose import Trial, posterior_means
from search.config import load
from search.objective import Candidate
from search.space import make_space
from tests.checkpoints import floats, read_model, tiny, write_model
from tests.commands import run, start
from tests.conftest import MiniLMFamily

SHARES = (0.3, 0.7)
SCORE = """\
import sqlite3
import time
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file

def near(folder):
    places = folder, Path(__file__).parent / "wanted"
    found, wanted = (load_file(place / "model.safetensors") for place in places)
    off = {name: float(np.square(found[name] - wanted[name]).mean()) for name in wanted}
    return {"embeddings": -off.pop("embeddings.weight"), "layers": -sum(off.values())}

def slow(folder):
    time.sleep(0.15)
    return sum(near(folder).values())

def drops(folder):
    sqlite3.connect(Path(folder).parents[1] / "study.db").execute("alter table trials rename to gone")
    return 1.0


def named_as_columns(folder):
    return {"score": 1.0, "weight.0": 3.0}

def leaves(folder):
    raise SystemExit("usage: score.py FOLDER")

def broken(folder):
    raise RuntimeError("no data")
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two models, their base, and the model to find: the base and 0.3 and 0.7 of what they have learnt."""
    base, models = tiny(0), [tiny(1), tiny(2)]
    for name, model in {"base": base, "a": models[0], "b": models[1]}.items():
        write_model(tmp_path / name, model)
    learnt = {name: [np.asarray(model[name]) - base[name] for model in models] for name in base}
    wanted = {name: base[name] + sum(s * t for s, t in zip(SHARES, learnt[name], strict=True)) for name in base}
    write_model(tmp_path / "wanted", {name: np.asarray(values, np.float32) for name, values in wanted.items()})
    (tmp_path / "score.py").write_text(SCORE)
    (tmp_path / "script.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['--what'])\n")
    return tmp_path


def write(place: Path, **said: Any) -> Path:
    content = {
        **{"base_model": "base", "models": ["a", "b"], "objective": {"function": "score:near"}, "trials": 12},
        **said,
    }
    file = place / "search.yml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def rows(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "trials.jsonl").read_text().splitlines()]


def points(run_folder: Path) -> list[Any]:
    return [(row["number"], row["point"], row["values"]) for row in rows(run_folder)]


def test_a_search_finds_what_the_wanted_model_was_made_of(place: Path) -> None:
    out = place / "out"
    done = run("search", write(place, trials=16), out, "--json", cwd=place)
    assert done.code == 0, done.err
    result = done.json
    assert {"command", "out", "seconds", "seed", "device", "cuvee_version"} <= result.keys()
    assert result["best"]["coefficients"]["weight"] == pytest.approx(SHARES, abs=0.05)
    assert (result["trials"], result["failed"]) == (16, 0)
    first, second = (row["values"][0] for row in rows(out)[:2])
    assert result["equal_weights"] == max(first, second) < result["best"]["score"]
    assert result["scores"].keys() == {"embeddings", "layers"}
    assert len(rows(out)) == 16 and len((out / "trials.csv").read_text().splitlines()) == 17
    assert not (out / ".scratch").exists()
    drawn = (out / "search.svg").read_text("utf-8")
    assert "weight of a" in drawn and "weight of b" in drawn and "equal weights: " in drawn
    engine.merge_file(out / "best.yml", place / "again")
    assert read_model(place / "again") == read_model(out / "model"), "best.yml is ready for cuvee merge"


def test_a_start_from_another_study_stays_when_that_goes_on_or_is_gone(place: Path) -> None:
    coarse = search_config.load(write(place, engine="random", trials=3))
    search_run.search_run(coarse, place / "coarse")
    fine = search_config.load(write(place, engine="random", start=[{"study": "coarse"}, {"sobol": 2}], trials=2))
    search_run.search_run(fine, place / "fine")
    begun = points(place / "fine")
    search_run.search_run(search_config.until(["trials=9"], coarse), place / "coarse")
    search_run.search_run(search_config.until(["trials=4"], fine), place / "fine")
    shutil.rmtree(place / "coarse")
    search_run.search_run(search_config.until(["trials=6"], fine), place / "fine")
    found = points(place / "fine")
    assert found[:2] == begun and len(found) == 6
    anew = place / "anew"
    with pytest.raises(CuveeError, match="holds no study"):
        search_run.search_run(fine, anew)


def test_no_two_columns_of_the_table_have_one_name(place: Path) -> None:
    file = write(place, objective={"function": "score:named_as_columns"}, engine="random", trials=1)
    search_run.search_run(search_config.load(file), place / "out")
    with open(place / "out/trials.csv", newline="") as stream:
        header, row = csv.reader(stream)
    assert len(set(header)) == len(header) == len(row)
    found = dict(zip(header, row, strict=True))
    assert (found["score"], found["task score"], found["task weight.0"]) == ("2.0", "1.0", "3.0")


def test_the_best_recipe_says_the_seed_that_its_model_was_drawn_by(place: Path) -> None:
    file = write(place, method="dare_linear", engine="random", trials=2, seed=7, vary={"density": 0.5})
    search_run.search_run(search_config.load(file), place / "out")
    assert (place / "out/best.yml").read_text().startswith("# cuvee merge best.yml OUT --seed 7\nmerge_method: ")
    again, other = (engine.merge_file(place / "out/best.yml", place / str(seed), seed=seed) for seed in (7, 0))
    made = json.loads((place / "out/model/cuvee.json").read_text())["output"]
    assert again["digest"] == made != other["digest"]


def test_the_answer_by_the_posterior_mean_is_a_point_that_was_tried(place: Path) -> None:
    said = write(place, recommend="posterior", engine="random", trials=6)
    done = run("search", said, place / "out", "--json", cwd=place)
    assert done.code == 0, done.err
    space = make_space(registry.get("task_arithmetic"), 2, {})
    trials = [Trial(row["number"], row["point"], tuple(row["values"])) for row in rows(place / "out")]
    means = posterior_means(space, trials)
    assert done.json["best"]["trial"] == int(np.argmax(means))
    assert done.json["best"]["score"] == trials[int(np.argmax(means))].values[0], "and its score is the observed one"


def test_a_search_of_which_nothing_succeeded_says_how_to_try_again(place: Path) -> None:
    file, out = write(place, trials=2, objective={"function": "score:broken"}), place / "out"
    done = run("search", file, out)
    assert done.code == 2 and done.err.splitlines()[-1].endswith(
        "no trial succeeded, the last one: RuntimeError: no data; "
        "mend it, and add --force to begin anew, or '--until trials=' with more of them"
    )


def test_a_device_that_is_none_is_told_before_anything_is_tried(place: Path) -> None:
    for more in ([], ["--dry-run"]):
        done = run("search", write(place), place / "out", "--device", "abacus", *more)
        assert done.code == 2 and "--device abacus: no such device" in done.err
        assert not (place / "out").exists()


def test_a_search_that_is_done_is_not_done_again(place: Path) -> None:
    file, out = write(place, engine="random", trials=3), place / "out"
    first = run("search", file, out, "--json").json
    drawn = (out / "search.svg").read_bytes()
    (place / "wanted" / "model.safetensors").unlink()  # no trial would succeed
    again = run("search", file, out, "--json")
    assert again.code == 0 and again.json["best"] == first["best"]
    assert (out / "search.svg").read_bytes() == drawn


def test_a_picture_is_drawn_while_the_search_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every now and then."""
    (place / "look.py").write_text("def drawn(folder):\n    return (folder.parent.parent / 'search.svg').exists()\n")
    config = load(write(place, engine="random", trials=3, objective={"function": "look:drawn"}))
    monkeypatch.setattr(search_run, "_EVERY", 3600.0)
    search_run.search_run(config, place / "patient")
    monkeypatch.setattr(search_run, "_EVERY", 0.0)
    search_run.search_run(config, place / "eager")
    found = {name: [row["values"] for row in rows(place / name)] for name in ("patient", "eager")}
    assert found == {"patient": [[0], [0], [0]], "eager": [[0], [1], [1]]}
    assert all((place / name / "search.svg").exists() for name in found)


def test_scores_of_another_text_of_the_function_are_not_mixed_in(place: Path) -> None:
    file, out = write(place, engine="random", trials=3), place / "out"
    assert run("search", file, out).code == 0
    (place / "score.py").write_text(SCORE.replace("-off.pop", "2 * -off.pop"))
    done = run("search", file, out, "--until", "trials=5")
    assert done.code == 2 and "holds a study of another data (score); choose another folder" in done.err
    assert run("search", file, out, "--until", "trials=5", "--force").code == 0


def test_in_one_process_each_search_has_the_function_beside_it(place: Path, tmp_path_factory: Any) -> None:
    """A module of the same name in another folder, or changed since, is not the one that was imported first."""
    near = Node.of({"function": "score:one"}, "search.yml:1")
    for number, folder in enumerate([place, tmp_path_factory.mktemp("other"), place]):
        (folder / "score.py").write_text(f"def one(folder):\n    return {number}\n")
        made = objective.get("function").make(near, folder)
        assert made.prepare(ModelRef("a"), "cpu") is None
        assert made(Candidate({}, folder)).total == number


def test_a_search_of_a_model_that_was_trained_anew_is_another(place: Path) -> None:
    file, out = write(place, engine="random", trials=3), place / "out"
    assert run("search", file, out).code == 0
    write_model(place / "b", tiny(3))
    done = run("search", file, out)
    assert done.code == 2 and "holds a study of another model content" in done.err
    assert run("search", file, out, "--force").code == 0


def test_a_killed_search_goes_on_as_if_nothing_had_been(place: Path) -> None:
    file = write(place, engine="tpe", objective={"function": "score:slow"})
    assert run("search", file, place / "whole").code == 0
    search = start("search", file, place / "killed")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
        (place / "killed" / "trials.jsonl").exists() and len(rows(place / "killed")) >= 9
    ):
        time.sleep(0.01)
    search.kill()
    assert search.wait().code < 0
    assert run("search", file, place / "killed").code == 0
    assert points(place / "killed") == points(place / "whole")
    assert (place / "killed/best.yml").read_text() == (place / "whole/best.yml").read_text()


def test_workers_share_a_study(place: Path) -> None:
    done = run("search", write(place, engine="random"), place / "out", "--workers", "2", "--json")
    assert done.code == 0, done.err
    assert [row["number"] for row in rows(place / "out")] == list(range(12))
    assert len({str(row["point"]) for row in rows(place / "out")}) == 12


def test_layers_have_coefficients_of_their_own(place: Path) -> None:
    vary = {"weight": {"low": 0, "high": 1, "per": "layers"}}
    done = run("search", write(place, vary=vary, engine="random", trials=3), place / "out", "--json")
    assert done.code == 0, done.err
    weight = done.json["best"]["coefficients"]["weight"]
    assert weight.keys() == {"embeddings", "layer.0", "layer.1"}
    base, found, a, b = (read_model(place / name) for name in ("base", "out/model", "a", "b"))
    for name in base:
        group = next(group for group in weight if name.startswith(f"{group}."))
        own = floats(base[name])
        expected = own + sum(w * (floats(m[name]) - own) for w, m in zip(weight[group], (a, b), strict=True))
        np.testing.assert_allclose(floats(found[name]), expected, atol=1e-5)


def test_a_front(place: Path) -> None:
    objective = {"function": "score:near", "front": ["embeddings", "layers"]}
    done = run("search", write(place, objective=objective, engine="random", trials=6), place / "out", "--json")
    assert done.code == 0, done.err
    front = json.loads((place / "out/front.json").read_text())
    assert done.json["best"]["trial"] in [point["trial"] for point in front]
    assert len(done.json["best"]["score"]) == 2


def test_a_plan_writes_nothing(place: Path) -> None:
    done = run("search", write(place), place / "out", "--dry-run", "--json")
    assert done.code == 0 and done.json["dimensions"] == ["weight.0", "weight.1"]
    assert not (place / "out").exists()


@pytest.mark.parametrize(("engine", "blind"), [("cma", True), ("skopt", True), ("gp", False)])
def test_that_an_engine_does_not_look_at_floors_is_told(place: Path, engine: str, blind: bool) -> None:
    file = write(place, engine=engine, objective={"function": "score:near", "floors": {"layers": -1.0}})
    done = run("search", file, place / "out", "--dry-run")
    assert done.code == 0 and (f"'{engine}' does not look at floors" in done.err) == blind, done.err


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            {"objective": {"function": "nowhere:near"}},
            "search.yml:5: 'nowhere' cannot be imported: ModuleNotFoundError",
        ),
        ({"objective": {"function": "score:far"}}, "search.yml:5: 'score' has no function 'far'"),
        (
            {"objective": {"function": "score:leaves"}},
            "8 trials in a row failed, the last one: SystemExit: usage: score.py FOLDER",
        ),
        ({"objective": {"function": "script:near"}}, "search.yml:5: 'script' cannot be imported: SystemExit: 2"),
        (
            {"objective": {"function": "search:near"}},
            "search.yml:5: 'search' is the name of a module of Python's or of",
        ),
        ({"objective": {"function": "score:broken"}}, "8 trials in a row failed, the last one: RuntimeError: no data"),
        ({"engine": "gpp"}, "search.yml:8: no engine 'gpp'; did you mean 'gp'?"),
        ({"base_model": None}, "'task_arithmetic' needs a base; add 'base_model:'"),
        ({"models": ["a", "c"]}, "c: "),
    ],
)
def test_a_users_mistake_is_one_line(place: Path, said: dict[str, Any], told: str) -> None:
    done = run("search", write(place, **said), place / "out")
    assert done.code == 2, done.err
    assert told in done.err.splitlines()[-1], done.err
    assert "Traceback" not in done.err


def test_a_folder_of_something_else_is_left_alone(place: Path) -> None:
    file, out = write(place, engine="random", trials=2), place / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert "none of our outputs" in run("search", file, out, "--force").err
    (out / "thesis.txt").unlink()
    assert run("search", file, out).code == 0
    other = write(place, engine="random", trials=2, seed=1)
    assert "holds a study of another seed" in run("search", other, out).err
    assert run("search", other, out, "--force").code == 0


def test_a_study_in_a_database_by_its_url(place: Path) -> None:
    file = write(place, engine="random", trials=2, storage=f"sqlite:///{place}/all.db")
    first, second = (run("search", file, place / name, "--json") for name in ("one", "two"))
    assert (first.json["trials"], second.json["trials"]) == (2, 2), "each folder has a study of its own"
    again = run("search", file, place / "one", "--force", "--until", "trials=3", "--json")
    assert again.json["trials"] == 3 and [row["number"] for row in rows(place / "one")] == [0, 1, 2]
    assert "another storage" in run("search", write(place, trials=2), place / "one").err


def test_trials_whose_study_is_in_another_place_are_not_written_over(place: Path) -> None:
    """A study in a database goes by its folder's name: moved, or asked for in another database, it would begin anew."""
    file = write(place, engine="random", trials=2, storage=f"sqlite:///{place}/all.db")
    assert run("search", file, place / "one").code == 0
    (place / "one").rename(place / "two")
    found = rows(place / "two")
    done = run("search", file, place / "two")
    assert done.code == 2 and "holds trials of a study that is not in its storage" in done.err, done.err
    assert rows(place / "two") == found
    (place / "two").rename(place / "one")
    assert run("search", file, place / "one", "--until", "trials=3", "--json").json["trials"] == 3


def test_a_database_that_fails_on_the_way_is_told_in_one_line(place: Path) -> None:
    file = write(place, engine="random", storage="sqlite", objective={"function": "score:drops"})
    done = run("search", file, place / "out")
    assert done.code == 2 and "Traceback" not in done.err, done.err
    assert "the study's storage failed: OperationalError: " in done.err and done.err.endswith("it goes on\n")


def test_a_function_takes_the_model_itself(minilm_family: MiniLMFamily, tmp_path: Path) -> None:
    """Real models: what the trial saw in memory is what `cuvee merge` writes, to the bit."""
    (tmp_path / "seen.py").write_text(
        "import torch\n"
        "def first(model):\n"
        "    vector = model.encode(['a red wine'], show_progress_bar=False)[0]\n"
        "    return {str(i): float(x) for i, x in enumerate(vector[:4])}\n"
    )
    content = {
        **{"base_model": str(minilm_family.base), "models": list(map(str, minilm_family.specialists))},
        **{"objective": {"function": "seen:first", "takes": "model"}, "engine": "random", "trials": 3},
    }
    (tmp_path / "search.yml").write_text(yaml.safe_dump(content))
    done = run("search", tmp_path / "search.yml", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    from sentence_transformers import SentenceTransformer

    vector = SentenceTransformer(str(tmp_path / "out/model"), device="cpu").encode(["a red wine"])[0]
    assert [done.json["scores"][str(i)] for i in range(4)] == pytest.approx(vector[:4].tolist(), abs=1e-6)
    assert len({str(row["tasks"]) for row in rows(tmp_path / "out")}) == 3
