"""`cuvee merge` when things go wrong: killed, out of disk, fed with damage, misused."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import merging
from merging.errors import CuveeError
from tests.attacks import FOLDERS, HEADERS
from tests.checkpoints import (
    Raw,
    bf16,
    some,
    tiny,
    write_model,
    write_recipe,
    write_shards,
)
from tests.commands import Finished, run, start

NOBODY = 65534 if os.geteuid() == 0 else None  # nothing is unreadable to root


def tree(folder: Path, *, without: tuple[str, ...] = ()) -> dict[str, bytes]:
    """All files by name, with their content; of cuvee.json all but how long it took. `without`: beginnings of names."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and not name.startswith(without):
            found[name] = file.read_bytes()
    for name, content in found.items():
        if Path(name).name == "cuvee.json":
            past = json.loads(content)
            del past["seconds"]
            found[name] = json.dumps(past).encode()
    return found


def refused(finished: Finished) -> str:
    """The one line that a user reads after a mistake, without its `error: `."""
    assert finished.code == 2, finished.err
    assert finished.out == ""
    assert finished.err.startswith("error: ")
    assert finished.err.endswith("\n")
    assert finished.err.count("\n") == 1, finished.err
    return finished.err.removeprefix("error: ").rstrip("\n")


# ---- killed ----


@dataclass(frozen=True)
class Work:
    """A merge that takes a while, among things that are none of its business."""

    place: Path
    arguments: tuple[object, ...]
    out: Path
    result: Mapping[str, bytes]  # of a run that nobody disturbed
    seconds: float

    def surroundings(self) -> dict[str, bytes]:
        """Everything but the output, and what a run in the making may leave until the next."""
        return tree(self.place, without=("made/out/", "made/.out.partial-"))  # a killed run's cuvee.json may be half

    def run_again(self) -> None:
        """The next run succeeds, and nothing is left but its output."""
        assert run(*self.arguments, "--force").code == 0
        assert tree(self.out) == self.result
        assert sorted(path.name for path in self.out.parent.iterdir()) == [".out.partial-mine", "neighbour", "out"]


@pytest.fixture
def work(tmp_path: Path) -> Work:
    models = []
    for seed in range(3):
        shards = {f"{n}.safetensors": {f"layer.{n}.w": some((80, 500), 7 * seed + n)} for n in range(5)}
        models.append(write_shards(tmp_path / f"model {seed}", shards))
        (models[-1] / "vocab.txt").write_text("word\n" * 1000)
    recipe = write_recipe(
        tmp_path / "r.yml", "dare_ties", *models[1:], base_model=models[0], parameters={"density": 0.5}
    )
    for neighbour in ("made/neighbour", "made/.out.partial-mine"):
        (tmp_path / neighbour).mkdir(parents=True)
        (tmp_path / neighbour / "notes.txt").write_text("mine")
    out = tmp_path / "made" / "out"
    arguments = ("merge", recipe, out, "--shard-size", "170KB", "--threads", 2)
    seconds, result = min(timed(*arguments, "--force") for _ in range(4)), tree(out)
    assert len(result) >= 8  # shards, index, config, vocabulary, card, lineage
    shutil.rmtree(out)
    return Work(tmp_path, arguments, out, result, seconds)


def timed(*arguments: object) -> float:
    """Seconds of a run."""
    began = time.perf_counter()
    assert run(*arguments).code == 0
    return time.perf_counter() - began


def test_killed_at_random_moments_out_is_absent_or_complete(work: Work) -> None:
    before, rng, killed = work.surroundings(), random.Random(0), 0
    for _ in range(50):
        running = start(*work.arguments)
        time.sleep(rng.uniform(0, work.seconds))
        running.kill()
        killed += running.wait().code < 0
        assert not work.out.exists() or tree(work.out) == work.result
        assert work.surroundings() == before
        if rng.random() < 0.2:  # otherwise the next one meets what this one left
            work.run_again()
        shutil.rmtree(work.out, ignore_errors=True)
    assert killed > 10
    work.run_again()


@pytest.mark.parametrize("replaced", [False, True], ids=["new", "replaced"])
def test_killed_before_any_change_of_the_disk_out_is_absent_or_complete(replaced: bool, work: Work) -> None:
    """At every single change, in order, the renames into place among them."""
    before, force, old = work.surroundings(), ["--force"] if replaced else [], {"cuvee.json": b"{}", "w": b"old"}
    step, code = 0, -9
    while code < 0:
        shutil.rmtree(work.out, ignore_errors=True)
        if replaced:
            work.out.mkdir()
            (work.out / "cuvee.json").write_text('{"seconds": 1}')
            (work.out / "w").write_text("old")
        code = run(*work.arguments, *force, die_at=step).code
        assert work.surroundings() == before
        if replaced and not work.out.exists():  # set aside in the last moment: the next run puts it back
            assert "exists already" in refused(run(*work.arguments))
        if work.out.exists():
            assert tree(work.out) in ([work.result, old] if replaced else [work.result])
        if step % 7 == 0:
            work.run_again()
        step += 1
    assert code == 0
    assert step > 20
    work.run_again()


# ---- the disk ----


def test_a_disk_that_fills_up_at_any_file_leaves_nothing(work: Work) -> None:
    before = work.surroundings()
    sizes = sorted({len(content) for content in work.result.values() if len(content) > 600})  # room for the message
    assert len(sizes) >= 4
    for size in sizes:
        said = refused(run(*work.arguments, file_size=size - 1))
        assert "File too large" in said
        assert not work.out.exists()
        assert work.surroundings() == before
    assert run(*work.arguments, file_size=2 * max(sizes)).code == 0


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that other users may enter, which pytest's are not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


@pytest.mark.parametrize(
    "closed",
    ["a", "a/model.safetensors", "a/config.json", "a/vocab.txt", "a/modules.json", "a/tokenizer.json", "r.yml"],
)
@pytest.mark.parametrize("keys", [{}, {"tokenizer_source": "base"}], ids=["", "tokenizer"])
def test_what_may_not_be_read_is_told(closed: str, keys: dict[str, str], shared: Path) -> None:
    a, b = (write_model(shared / name, tiny(seed)) for seed, name in enumerate("ab"))
    for model in (a, b):
        (model / "vocab.txt").write_text("word\n")
        (model / "tokenizer.json").write_text("{}")
        (model / "modules.json").write_text('[{"path": ""}]')
    recipe = write_recipe(shared / "r.yml", "task_arithmetic", b, base_model=a, **keys)
    (shared / closed).chmod(0)
    said = refused(run("merge", recipe, shared / "out", user=NOBODY))
    assert "Permission denied" in said or "PermissionError" in said
    assert Path(closed).name in said
    assert not (shared / "out").exists()
    assert [path.name for path in shared.glob(".*")] == []


@pytest.mark.parametrize("out", ["closed/out", "closed/deeper/out", "sealed/out", "sealed/deeper/out"])
def test_where_nothing_may_be_written_is_told(out: str, shared: Path) -> None:
    (shared / "closed").mkdir(mode=0o555)
    (shared / "sealed").mkdir(mode=0)
    recipe = write_recipe(shared / "r.yml", "linear", *(write_model(shared / f"{n}", tiny(n)) for n in range(2)))
    assert "Permission denied" in refused(run("merge", recipe, shared / out, user=NOBODY))


def test_an_input_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    models = [write_model(tmp_path / f"{n}", {f"{i}": some((50, 50), i) for i in range(9)}) for n in range(2)]
    file = models[1] / "model.safetensors"

    def shrink(done: int, total: int) -> None:
        if done > total / 3:
            os.truncate(file, file.stat().st_size // 2)

    recipe = merging.Recipe("linear", [str(model) for model in models], parameters={"weight": 1.0})
    with pytest.raises(CuveeError, match="ends early: the file shrank while it was read"):
        merging.merge(recipe, tmp_path / "out", threads=1, progress=shrink)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_too_many_files_for_the_system_are_told(tmp_path: Path) -> None:
    shards = {f"{n}.safetensors": {f"{n}": some((2,))} for n in range(40)}
    recipe = write_recipe(tmp_path / "r.yml", "linear", *(write_shards(tmp_path / f"{n}", shards) for n in range(2)))
    assert "Too many open files" in refused(run("merge", recipe, tmp_path / "out", files=30))
    assert not (tmp_path / "out").exists()


# ---- damaged inputs ----


class Mistake(NamedTuple):
    """One case.

    make: changes a folder with the models `a` and `b` and the recipe `r.yml`, which takes their mean into `out`.
    says: a part of the error.
    out: another folder to write to.
    more: arguments of the command.
    """

    make: Callable[[Path], object]
    says: str
    out: str = "out"
    more: tuple[str, ...] = ()


def _nothing(place: Path) -> None:
    """The files are as they should be."""


def _all(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda place: [change(place) for change in changes]


def _b(**tensors: Any) -> Callable[[Path], object]:
    """Model b with these tensors besides."""
    return lambda place: write_model(place / "b", tiny(1, **tensors))


def _number(value: float, at: int, dtype: str = "f4") -> Callable[[Path], object]:
    """Models of one large tensor, of which b holds this number at a place."""

    def make(place: Path) -> None:
        for model in "ab":
            values = some((300, 700), ord(model)).astype("f4" if dtype == "BF16" else dtype)
            if model == "b":
                values.reshape(-1)[at] = value
            write_model(place / model, {"w": bf16(values) if dtype == "BF16" else values})

    return make


def _recipe(method: str = "linear", **keys: Any) -> Callable[[Path], object]:
    return lambda place: write_recipe(place / "r.yml", method, place / "a", place / "b", **keys)


def _ties_onto_b(place: Path) -> None:
    write_recipe(place / "r.yml", "ties", place / "a", base_model=place / "b")


def _text(name: str, text: str) -> Callable[[Path], object]:
    return lambda place: (place / name).write_text(text)


def _outputs(place: Path) -> None:
    """All folders are earlier outputs of ours, which `--force` may replace; `link` is another name of their parent."""
    for folder in (place, place / "a", place / "b"):
        (folder / "cuvee.json").write_text("{}")
    (place / "link").symlink_to(".")


def _header(name: str) -> Callable[[Path], object]:
    return lambda place: write_model(place / "b", HEADERS[name].content)


def _folder(name: str) -> Callable[[Path], object]:
    return _all(lambda place: shutil.rmtree(place / "b"), lambda place: FOLDERS[name].make(place / "b"))


_INFINITE = {"embeddings__weight": np.full((9, 4), np.inf, np.float32)}
_SUM_OF_18: dict[str, Any] = {"parameters": {"weight": 9.0, "normalize": False}}

MISTAKES = {
    "NaN first": Mistake(_number(np.nan, 0), "b/model.safetensors: 'w' holds NaN or infinite values"),
    "NaN last": Mistake(_number(np.nan, -1), "b/model.safetensors: 'w' holds NaN or infinite values"),
    "NaN in bfloat16": Mistake(_number(np.nan, -1, "BF16"), "'w' holds NaN or infinite values"),
    "NaN in float16": Mistake(_number(np.nan, 777, "f2"), "'w' holds NaN or infinite values"),
    "NaN in float64": Mistake(_number(np.nan, 99_999, "f8"), "'w' holds NaN or infinite values"),
    "infinity": Mistake(_number(-np.inf, 209_999), "'w' holds NaN or infinite values"),
    "beyond float32": Mistake(_number(1e300, 5, "f8"), "'w' holds NaN or infinite values"),
    "infinite base": Mistake(_all(_ties_onto_b, _b(**_INFINITE)), "b/model.safetensors: 'embeddings.weight' holds NaN"),
    "too large a sum": Mistake(_all(_number(3e38, 5), _recipe(**_SUM_OF_18)), "'w' comes out infinite or NaN in F32"),
    "too large for float16": Mistake(
        _all(_number(3e6, 5), _recipe(dtype="float16")),
        "'w' comes out infinite or NaN in F16; set 'out_dtype: float32'",
    ),
    "another shape": Mistake(_b(layer__0__dense__weight=some((4, 5))), "'layer.0.dense.weight' is [4, 4] in "),
    "another vocabulary": Mistake(
        _b(embeddings__weight=some((11, 4))), "add 'tokenizer: {source: union}' to the recipe"
    ),
    "a tensor less": Mistake(lambda place: write_model(place / "b", {"w": some((2,))}), "add 'missing: keep'"),
    "a tensor more": Mistake(_b(head__weight=some((2,))), "'head.weight' is in "),
    "other whole numbers": Mistake(
        _all(*(lambda place, n=n: write_model(place / n, {"ids": np.array([1, ord(n)])}) for n in "ab")),
        "'ids' holds whole numbers (I64) that differ between the models",
    ),
    "whole numbers and others": Mistake(
        _b(layer__0__norm__bias=np.arange(4)), "'layer.0.norm.bias' is F32 in one model and I64 in another"
    ),
    "quantised": Mistake(
        _text("a/config.json", '{"quantization_config": {"quant_method": "gptq"}}'), "holds quantised weights (gptq)"
    ),
    "packed floats": Mistake(_b(w=Raw("F8_E4M3", (4,), bytes(4))), "holds quantised weights (F8_E4M3)"),
    "broken config": Mistake(_text("a/config.json", "{"), "a/config.json: cannot be read as JSON"),
    "config is a list": Mistake(_text("a/config.json", "[]"), "a/config.json: is no JSON object"),
    "truncated": Mistake(_header("data cut in half"), "truncated"),
    "header lies": Mistake(_header("overlap by half"), "header lies"),
    "a web page": Mistake(_header("a web page"), "truncated, or no safetensors file"),
    "pickled": Mistake(_folder("pickled"), "only pickled weights here (pytorch_model.bin)"),
    "index leads out": Mistake(_folder("shard above the folder"), "leads out of the folder"),
    "missing shard": Mistake(_folder("missing shard"), "which is missing"),
    "an adapter": Mistake(_folder("adapter"), "write 'BASE+"),
    "no such model": Mistake(lambda place: shutil.rmtree(place / "b"), "b: no such folder"),
    "out is an input": Mistake(_outputs, "the output would replace an input", "b", ("--force",)),
    "out is an input by another name": Mistake(_outputs, "the output would replace an input", "link/b", ("--force",)),
    "out is around an input": Mistake(_outputs, "the output would replace an input", ".", ("--force",)),
    "out is an input of mergekit's": Mistake(
        _all(_outputs, _recipe("passthrough")), "the output would replace an input", "b", ("--force",)
    ),
    "out exists": Mistake(_nothing, "b: exists already; choose another folder", "b"),
    "out is foreign": Mistake(_nothing, "b: holds no cuvee.json", "b", ("--force",)),
    "no recipe": Mistake(lambda place: (place / "r.yml").unlink(), "r.yml: no such file"),
    "no YAML": Mistake(_text("r.yml", "a: [1"), "r.yml:"),
    "no method": Mistake(_recipe("lineal"), "did you mean 'linear'"),
    "misspelt parameter": Mistake(_recipe(parameters={"wieght": 1}), "did you mean 'weight'?"),
    "no base": Mistake(_recipe("ties"), "'ties' needs a base"),
    "no size": Mistake(_nothing, "--shard-size: 'many' is no size", more=("--shard-size", "many")),
    "no finite size": Mistake(_nothing, "--shard-size: 'infGB' is no size", more=("--shard-size", "infGB")),
    "no device": Mistake(_nothing, "--device abacus: no such device", more=("--device", "abacus")),
    "no device that computes": Mistake(_nothing, "--device meta: no such device", more=("--device", "meta")),
    "no lineage": Mistake(_nothing, "no such lineage", more=("--from", "/nowhere/cuvee.json")),
}


@pytest.mark.parametrize("mistake", [pytest.param(mistake, id=name) for name, mistake in MISTAKES.items()])
def test_mistakes_are_one_line_and_no_output(mistake: Mistake, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, tiny(seed))
    recipe = write_recipe(tmp_path / "r.yml", "linear", tmp_path / "a", tmp_path / "b")
    mistake.make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    what = [] if "--from" in mistake.more else [recipe]
    assert mistake.says in refused(run("merge", *what, tmp_path / mistake.out, *mistake.more, "--json"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("header", HEADERS)
def test_no_damaged_header_gets_past_the_command(header: str, tmp_path: Path) -> None:
    models = [write_model(tmp_path / "a", tiny()), write_model(tmp_path / "b", HEADERS[header].content)]
    recipe = write_recipe(tmp_path / "r.yml", "linear", *models)
    assert HEADERS[header].says in refused(run("merge", recipe, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ---- whatever a stranger's side files hold ----

_WORDS = [
    *("model_type", "tie_word_embeddings", "text_config", "quantization_config", "torch_dtype", "dtype", "auto_map"),
    *("path", "type", "name", "license", "tags", "language", "base_model", "library_name", "model.Class", "../x.y.Z"),
    *("", ".", "1_Pooling", "a/b", "a" * 300, "\0", "\ud800", "\x1b[2J", "é", "mit", "chat_template", "vocab", "model"),
]
_json: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(_WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_WORDS), inner, max_size=4),
    max_leaves=12,
)
_modules = st.lists(st.fixed_dictionaries({"path": st.sampled_from(_WORDS), "type": _json}), max_size=3)
_CARDS = [
    *("---\nlicense: &a [*a]\n---\n", "---\n" + "[" * 1000 + "\n---\n", "---\ntags: 2024-99-99\n---\n", "---\n---\n"),
    *(
        "---\n\x07: 1\n---\n",
        "---\n? [a]\n: b\n---\n",
        "---\nlicense: !!python/name:os.system\n---\n",
        "\ufeff---\nx: 1\n",
    ),
]
_FILES = {
    "config.json": _json,
    "modules.json": _modules | _json,
    "tokenizer_config.json": _json,
    "tokenizer.json": _json,
    "1_Pooling/config.json": _json,
}


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries({}, optional=_FILES),
    st.sampled_from([{}, {"tokenizer_source": "base"}, {"dtype": "bfloat16"}, {"chat_template": "auto"}]),
)
def test_any_side_files_are_taken_or_told_in_one_line(contents: dict[str, Any], keys: dict[str, str]) -> None:
    taken_or_told({name: json.dumps(content) for name, content in contents.items()}, **keys)


@pytest.mark.parametrize("card", _CARDS, ids=lambda card: ascii(card[:30]))
def test_any_model_card_is_taken(card: str) -> None:
    assert taken_or_told({"README.md": card})


def taken_or_told(contents: dict[str, str], **keys: Any) -> bool:
    """Whether models with such side files, the cards in both, merge; asserts that an error is one line, with no output."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        models = [write_model(place / f"{number}", tiny(number)) for number in range(2)]
        for file, content in contents.items():
            for model in models if file == "README.md" else models[:1]:
                (model / file).parent.mkdir(exist_ok=True)
                (model / file).write_text(content)
        recipe = merging.Recipe("task_arithmetic", [str(models[1])], str(models[0]), {"weight": 1.0}, **keys)
        try:
            merging.merge(recipe, place / "out")
        except CuveeError as error:
            assert str(error).isprintable()
        assert sorted(path.name for path in place.iterdir() if path.name != "out") == ["0", "1"]
        taken = (place / "out" / "model.safetensors").is_file()
        assert taken == (place / "out").exists()
        return taken
