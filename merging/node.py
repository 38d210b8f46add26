"""Node: a value together with the place where it was written; YAML text in, nodes out.

Safe for a stranger's file: no tags, no code, no unbounded nesting, no aliases that multiply without end, no key twice.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from merging.errors import RecipeError

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MAX_DEPTH = 32  # a recipe with filters needs 7
MAX_NODES = 100_000  # after aliases are followed

_MERGE = "tag:yaml.org,2002:merge"
_TYPED = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float")}


@dataclass(frozen=True)
class Node:
    """One value of a recipe.

    Attributes:
        value: None, bool, int, float or str; list[Node]; dict[str, Node]; or an object that needs no parsing.
        where: "recipe.yml:12", the line of the key that names the value (of the value itself in a list), or, for a
            value that was made in Python, the way to it: "recipe.models[0].parameters".
        text: a scalar as it was written (`1e5`, `2024-01-01`), for places where any scalar is a name; else None.
    """

    value: Any
    where: str
    text: str | None = None

    @classmethod
    def of(cls, value: Any, where: str = "recipe") -> Node:
        """A node, and nodes below it, of a Python value; numpy's scalars and paths become plain."""
        if isinstance(value, Node):
            return value
        if isinstance(value, os.PathLike):
            value = os.fsdecode(os.fspath(value))
        if value is None or isinstance(value, bool):
            return cls(value, where, None if value is None else str(value).lower())
        if isinstance(value, str):
            return cls(str(value), where, str(value))
        if isinstance(value, numbers.Real):
            value = int(value) if isinstance(value, numbers.Integral) else float(value)
            return cls(value, where, repr(value))
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise RecipeError(f"the key {key!r} is not text", where=where)
            return cls({key: cls.of(item, f"{where}.{key}") for key, item in value.items()}, where)
        if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
            return cls([cls.of(item, f"{where}[{i}]") for i, item in enumerate(value)], where)
        return cls(value, where)

    def plain(self) -> Any:
        """The value as None, scalars, lists and dicts."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def __str__(self) -> str:
        """What an error message calls it."""
        if self.value is None:
            return "nothing"
        if isinstance(self.value, dict | list):
            return "a mapping" if isinstance(self.value, dict) else "a list"
        return f"'{self.value if self.text is None else self.text}'"


def read(text: str, where: str) -> Node:
    """Reads one YAML document.

    Args:
        where: the file's name; nodes are at `where:line`.

    Raises:
        RecipeError: not YAML, empty, several documents, a tag, a key twice, too deep, too large.
    """
    try:
        _refuse_hostile(text, where)
        root = yaml.compose(text, Loader=LOADER)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, where) from None
    except yaml.reader.ReaderError as error:
        raise _bad_character(text, error.position, where) from None
    except UnicodeEncodeError as error:  # a lone surrogate
        raise _bad_character(text, error.start, where) from None
    if root is None:
        raise RecipeError("is empty", where=where, mend="write at least 'merge_method:' and 'models:'")
    return _Composer(where).node(root, _line(root, where), depth=0)


class _Composer:
    """Turns yaml's nodes into ours."""

    def __init__(self, where: str) -> None:
        self.where, self.seen = where, 0
        self.scalars = yaml.constructor.SafeConstructor()

    def node(self, node: yaml.Node, where: str, depth: int) -> Node:
        self.seen += 1
        if self.seen > MAX_NODES:
            raise RecipeError(f"holds more than {MAX_NODES:,} values once its aliases are followed", where=where)
        if depth > MAX_DEPTH:  # _refuse_hostile saw no such depth: an alias leads back into itself
            raise RecipeError("an alias contains itself", where=where)
        if isinstance(node, yaml.MappingNode):
            return Node(self.mapping(node, depth), where)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.node(item, _line(item, self.where), depth + 1) for item in node.value], where)
        value = node.value
        if node.tag in _TYPED:
            try:
                value = self.scalars.construct_object(node)
            except ValueError:  # `0x_`, or more digits than Python cares to read
                raise RecipeError(f"'{node.value:.40}' is no number", where=where, mend="put text in quotes") from None
        return Node(value, where, None if value is None else node.value)

    def mapping(self, mapping: yaml.MappingNode, depth: int) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}  # from `<<: *alias`; a mapping's own keys win, then the alias named first
        for key, value in mapping.value:
            where = _line(key, self.where)
            if key.tag == _MERGE:
                for other in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(other, yaml.MappingNode):
                        raise RecipeError("'<<' must name a mapping, or a list of them", where=where)
                    merged = {**self.node(other, where, depth + 1).value, **merged}
                continue
            if not isinstance(key, yaml.ScalarNode) or key.tag in _TYPED:
                shown = f"'{key.value}' " if isinstance(key, yaml.ScalarNode) else ""
                raise RecipeError(f"the key {shown}is not text", where=where, mend="put it in quotes")
            if key.value in own:
                raise RecipeError(
                    f"'{key.value}' is given twice", where=where, mend=f"the first is at {own[key.value].where}"
                )
            own[key.value] = self.node(value, where, depth + 1)
        return {**merged, **own}


def _refuse_hostile(text: str, where: str) -> None:
    """Looks at the stream of events, which needs no recursion, before anything recursive sees the text."""
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        tag = getattr(event, "tag", None)
        if tag not in (None, "!"):  # "!" says no more than quotes do
            raise RecipeError(f"the tag '{tag}' is not allowed", where=_line(event, where), mend="remove it")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise RecipeError(f"is nested more than {MAX_DEPTH} levels deep", where=_line(event, where))
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _line(marked: yaml.Node | yaml.Event, where: str) -> str:
    return f"{where}:{marked.start_mark.line + 1}" if marked.start_mark else where


def _syntax_error(error: yaml.MarkedYAMLError, text: str, where: str) -> RecipeError:
    mark = error.problem_mark or error.context_mark
    lines = text.splitlines() or [""]
    number = min(mark.line + 1, len(lines)) if mark else 1  # libyaml counts past the end
    problem = error.problem or error.context or "unknown"
    if "document" in problem and "incompatible" not in problem:
        return RecipeError("holds several documents", where=f"{where}:{number}", mend="one recipe a file")
    mend = "indent with spaces, not tabs" if "\t" in lines[number - 1] else ""
    return RecipeError(f"is not valid YAML: {problem}", where=f"{where}:{number}", mend=mend)


def _bad_character(text: str, position: int, where: str) -> RecipeError:
    code = ord(text[position]) if position < len(text) else 0
    number = text.count("\n", 0, position) + 1
    return RecipeError(f"is not valid YAML: the character U+{code:04X} is not allowed", where=f"{where}:{number}")
