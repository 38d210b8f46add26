"""References to models, as text and as mergekit's mappings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.errors import RecipeError
from merging.node import Node
from merging.sources import ModelRef, Source

PATIENT = settings(deadline=None)  # a busy machine is no failure

parts = st.text(alphabet="abc/.-_", min_size=1, max_size=8)
optional = st.none() | parts
anything = st.text(min_size=1, max_size=8).filter(str.strip)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("org/name", ModelRef("org/name")),
        ("org/name@v1", ModelRef("org/name", "v1")),
        ("org/name@refs/pr/1", ModelRef("org/name", "refs/pr/1")),
        ("base+lora", ModelRef("base", None, "lora")),
        ("base@v1+lora@v2", ModelRef("base", "v1", "lora", "v2")),
        ("base+lora@v2", ModelRef("base", None, "lora", "v2")),
    ],
)
def test_text_reads_and_prints(text: str, reference: ModelRef) -> None:
    assert ModelRef.parse(text) == reference
    assert str(reference) == text


@PATIENT
@given(parts, optional, optional, optional)
def test_text_round_trips(path: str, revision: str | None, adapter: str | None, adapter_revision: str | None) -> None:
    reference = ModelRef(path, revision, adapter, adapter_revision if adapter else None)
    assert ModelRef.parse(str(reference)) == reference


@PATIENT
@given(anything, st.none() | anything, st.none() | anything, st.none() | anything)
def test_plain_round_trips_whatever_the_names(path: str, revision: str, adapter: str, architecture: str) -> None:
    reference = ModelRef(path, revision, adapter, revision if adapter else None, architecture)
    assert ModelRef.parse(reference.plain()) == reference


@pytest.mark.parametrize(
    ("mapping", "reference"),
    [
        ({"model": "a@v1"}, ModelRef("a", "v1")),
        ({"model": {"path": "a@b+c", "revision": "v1"}}, ModelRef("a@b+c", "v1")),
        ({"model": {"path": "a"}, "lora": {"path": "l", "revision": "v2"}}, ModelRef("a", None, "l", "v2")),
        ({"model": "a", "lora": "l@v2"}, ModelRef("a", None, "l", "v2")),
        ({"model": "a", "lora": None}, ModelRef("a")),
        ({"model": "a", "override_architecture": "X"}, ModelRef("a", architecture="X")),
    ],
)
def test_mergekits_mappings_are_read(mapping: Any, reference: ModelRef) -> None:
    assert ModelRef.parse(mapping) == reference


def test_a_folder_that_exists_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("c++", "me@home", "me@home/a+b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("c++", "me@home", "./me@home/a+b", str(tmp_path / "me@home/a+b")):
        assert ModelRef.parse(name) == ModelRef(name)
    assert ModelRef.parse("c+++lora@1") == ModelRef("c++", None, "lora", "1")
    assert ModelRef.parse("me@home@v1+c++") == ModelRef("me@home", "v1", "c++")
    assert ModelRef.parse("me@home+me@home/a+b") == ModelRef("me@home", None, "me@home/a+b")
    assert ModelRef.parse(tmp_path / "c++") == ModelRef(str(tmp_path / "c++"))


def test_a_folder_beside_the_recipe_counts_too(tmp_path: Path) -> None:
    (tmp_path / "c++").mkdir()
    assert ModelRef.parse("c++", near=str(tmp_path)) == ModelRef("c++")


def test_two_spellings_of_a_model_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    spellings = ("a", "./a", "a/", str(tmp_path / "a"), "link")
    assert len({ModelRef(spelling).identity for spelling in spellings}) == 1
    assert ModelRef("org/name/").identity == ModelRef("org/name").identity != ModelRef("org/name", "v1").identity


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "a model must be a folder or a hub id, not nothing"),
        ("", "a model must be a folder or a hub id, not empty text"),
        (["a"], "a model must be a folder or a hub id, not a list"),
        ("a@", "'a@' has nothing on one side of '@'"),
        ("+lora", "'+lora' has nothing on one side of '+'"),
        ({}, "a model reference has no 'model'; add 'model: {path: …}'"),
        ({"model": {"revision": "x"}}, "a model reference has no 'path'; add 'path:'"),
        ({"model": "a", "lroa": "b"}, "'lroa' is no key of a model reference; did you mean 'lora'?"),
        (
            {"model": {"path": "a", "revison": "b"}},
            "'revison' is no key of a model reference; did you mean 'revision'?",
        ),
    ],
)
def test_refusals(value: Any, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        ModelRef.parse(value, where="r.yml:3")
    where, _, what = str(error.value).partition(": ")
    assert where.startswith("r.yml:3")
    assert what == message


@pytest.mark.parametrize(("text", "sign"), [("a@b@c", "@"), ("a+b+c", "+"), ("a+b@c@d", "@")])
def test_several_signs_are_refused_where_no_such_folder_exists(text: str, sign: str) -> None:
    with pytest.raises(RecipeError, match=f"more than one '[{sign}]', and no such folder exists; write the"):
        ModelRef.parse(text)


def test_a_source_is_a_model_alone_or_with_parameters() -> None:
    assert Source.of(Node.of("a")) == Source(ModelRef("a"))
    source = Source.of(Node.of({"model": "a@v1", "parameters": {"weight": [0, 1]}}))
    assert source.parameters["weight"].at("x", 0.5) == 0.5
    assert source.plain() == {"model": "a@v1", "parameters": {"weight": [0, 1]}}
    assert Source.of(Node.of({"model": "a", "parameters": None})) == Source(ModelRef("a"))
