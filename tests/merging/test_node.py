"""YAML text into values with lines; nothing that a stranger's file holds can hurt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from merging import node
from merging.errors import RecipeError
from merging.node import Node, read

PATIENT = settings(deadline=None)  # a busy machine is no failure


@pytest.fixture(params=sorted({yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)}, key=str), autouse=True)
def each_loader(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whether libyaml is there or not must make no difference."""
    kept, node.LOADER = node.LOADER, request.param
    yield
    node.LOADER = kept


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as error:
        read(text, "r.yml")
    return str(error.value)


def test_reads_what_yaml_reads() -> None:
    text = "a: 'q'\nb: \"1\"\nc: [1, 0x10, -2.5, .inf, 1e-5, yes, ~]\nd:\n- x: {y: z}\n- =\ne: |\n  t\n"
    assert read(text, "r.yml").plain() == {**yaml.safe_load(text.replace("- =", "- '='"))}


def test_a_node_knows_the_line_of_its_key_and_an_item_its_own() -> None:
    root = read("a: 1\nb:\n  c:\n\n  - x\n  - [y,\n     z]\n", "r.yml")
    assert root.value["b"].where == "r.yml:2"
    items = root.value["b"].value["c"]
    assert items.where == "r.yml:3"
    assert [item.where for item in items.value] == ["r.yml:5", "r.yml:6"]
    assert [item.where for item in items.value[1].value] == ["r.yml:6", "r.yml:7"]


def test_a_scalar_keeps_the_text_it_was_written_as() -> None:
    assert {k: n.text for k, n in read("a: 2024-01-01\nb: 1e5\nc: 012\nd: ~", "r").value.items()} == {
        **{"a": "2024-01-01", "b": "1e5", "c": "012", "d": None}
    }


def test_aliases_and_merge_keys_are_followed_and_own_keys_win() -> None:
    text = "p: &p {x: 1, y: 2}\nq: &q {y: 3, z: 4}\na: *p\nb: {<<: *p, x: 9}\nc:\n  <<: [*p, *q]\n  w: 0\n"
    assert read(text, "r.yml").plain() == yaml.safe_load(text)
    assert "'<<' must name a mapping" in refusal("a: &a 1\nb: {<<: *a}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yml: is empty; write at least 'merge_method:' and 'models:'"),
        ("# nothing\n", "r.yml: is empty; write at least 'merge_method:' and 'models:'"),
        (
            "a: 1\nb: !!python/object:os.system x",
            "r.yml:2: the tag 'tag:yaml.org,2002:python/object:os.system' is not allowed",
        ),
        ("a: !!int 3", "r.yml:1: the tag 'tag:yaml.org,2002:int' is not allowed; remove it"),
        ("- !local [x]", "r.yml:1: the tag '!local' is not allowed; remove it"),
        ("a: 1\n\na: 2", "r.yml:3: 'a' is given twice; the first is at r.yml:1"),
        ("a:\n  1: 2", "r.yml:2: the key '1' is not text; put it in quotes"),
        ("on: 2", "r.yml:1: the key 'on' is not text; put it in quotes"),
        ("? [a]\n: 2", "r.yml:1: the key is not text; put it in quotes"),
        ("a: 1\n---\nb: 2", "r.yml:2: holds several documents; one recipe a file"),
        ("a: 1\nb: c: d", "r.yml:2: is not valid YAML: mapping values are not allowed"),
        ("a: 1\nb: [1,", "r.yml:2: is not valid YAML: "),
        ("a:\n\tb: c", "r.yml:2: is not valid YAML: found character"),
        ("a: 1\nb: *q", "r.yml:2: is not valid YAML: found undefined alias"),
        ("a: 1\nb: \x07", "r.yml:2: is not valid YAML: the character U+0007 is not allowed"),
        ("a: 1\nb: \ud800", "r.yml:2: is not valid YAML: the character U+D800 is not allowed"),
        ("a: 1\nb: 0x_", "r.yml:2: '0x_' is no number; put text in quotes"),
        ("a: &x [*x]", "r.yml:1: an alias contains itself"),
        ("a: 1\nb: " + "[" * 300_000, "r.yml:2: is nested more than 32 levels deep"),
        ("a: 1\nb:\n " + "- " * 100_000, "r.yml:3: is nested more than 32 levels deep"),
    ],
    ids=lambda text: text[:40],
)
def test_what_it_refuses_it_refuses_with_the_line(text: str, message: str) -> None:
    assert refusal(text).startswith(message)


def test_tabs_are_told() -> None:
    assert refusal("a:\n\tb: c").endswith("; indent with spaces, not tabs")


def test_a_billion_laughs_are_refused_at_once() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "holds more than 100,000 values once its aliases are followed" in refusal("\n".join(lines))


@PATIENT
@given(st.text() | st.text(alphabet="ab:-[]{}&*!|> \n'\"#,?1.<~%@`\t"))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        read(text, "r.yml")
    except RecipeError as error:
        assert str(error).startswith("r.yml")
        assert "\n" not in str(error)


def test_python_values_are_found_by_the_way_to_them() -> None:
    root = Node.of({"a": [1, {"b": (np.float64(0.5), np.int64(3), np.float32(0.5))}], "p": Path("x/y")}, "recipe")
    assert root.plain() == {"a": [1, {"b": [0.5, 3, 0.5]}], "p": "x/y"}
    assert root.value["a"].value[1].value["b"].value[0].where == "recipe.a[1].b[0]"
    assert {type(item.value) for item in root.value["a"].value[1].value["b"].value} == {float, int}
    with pytest.raises(RecipeError, match="recipe: the key 1 is not text"):
        Node.of({1: 2})
