"""Fields: the typed values of a YAML mapping; each mistake is told with its line, what is meant and how to mend it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merging.errors import CuveeError, RecipeError, did_you_mean, quoted
from merging.node import Node

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@contextmanager
def told_as(noun: str) -> Iterator[None]:
    """Lets the readers that were written for recipes speak of a `noun`."""
    try:
        yield
    except RecipeError as error:
        what, mend = (said.replace("recipe", noun) for said in (error.what, error.mend))
        if "merge_method" in mend:
            mend = ""
        raise CuveeError(what, where=error.where, mend=mend) from None


def given(root: Node, key: str) -> Node | None:
    """The node of a key; None where it is absent or says nothing."""
    node: Node | None = root.value.get(key)
    return None if node is None or node.value is None else node


def number(
    root: Node,
    key: str,
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    whole: bool = False,
) -> Any:
    """A finite number in [low, high], or greater than `above`; an int where `whole`.

    Raises:
        CuveeError: it is none.
    """
    node = given(root, key)
    return default if node is None else number_of(node, key, low=low, high=high, above=above, whole=whole)


def number_of(
    node: Node,
    key: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    whole: bool = False,
) -> Any:
    """As `number`, of the node itself."""
    value = node.value
    if isinstance(value, str) and _NUMBER.fullmatch(value):  # YAML 1.1 reads `5e-5` as text
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise CuveeError(f"'{key}' must be a number, not {node}", where=node.where)
    if whole and value != int(value):
        raise CuveeError(f"'{key}' must be a whole number, not {node}", where=node.where)
    low_enough, high_enough = high is None or value <= high, low is None or value >= low
    if not low_enough or not high_enough or (above is not None and value <= above):
        raise CuveeError(f"'{key}' is {node.text or value}", where=node.where, mend=_bounds(low, high, above))
    return int(value) if whole else float(value)


def flag(root: Node, key: str, default: Any) -> Any:
    """true or false.

    Raises:
        CuveeError: it is neither.
    """
    node = given(root, key)
    if node is None:
        return default
    if not isinstance(node.value, bool):
        raise CuveeError(f"'{key}' must be true or false, not {node}", where=node.where)
    return node.value


def text(root: Node, key: str, default: Any) -> Any:
    """Any scalar, as it was written.

    Raises:
        CuveeError: a list or a mapping, or empty.
    """
    node = given(root, key)
    return default if node is None else text_of(node, key)


def text_of(node: Node, key: str) -> str:
    """As `text`, of the node itself."""
    if node.text is None:
        raise CuveeError(f"'{key}' must be text, not {node}", where=node.where)
    if not node.text.strip():
        raise CuveeError(f"'{key}' is empty", where=node.where)
    return node.text


def choice(root: Node, key: str, choices: Iterable[str], default: Any) -> Any:
    """One of some texts.

    Raises:
        CuveeError: none of them.
    """
    node = given(root, key)
    if node is None:
        return default
    value, known = text_of(node, key), list(choices)
    if value not in known:
        mend = did_you_mean(value, known, f"choose one of {quoted(known)}")
        raise CuveeError(f"'{value}' is no choice for '{key}'", where=node.where, mend=mend)
    return value


def texts(root: Node, key: str) -> tuple[tuple[str, str], ...]:
    """One text or a list of them, each with its line; () where the key is absent.

    Raises:
        CuveeError: an empty list, or something in it that is no text.
    """
    node = given(root, key)
    if node is None:
        return ()
    items = node.value if isinstance(node.value, list) else [node]
    if not items:
        raise CuveeError(f"'{key}' is an empty list", where=node.where)
    return tuple((text_of(item, key), item.where) for item in items)


def mapping(root: Node, key: str, example: str) -> Node | None:
    """The node of a mapping.

    Raises:
        CuveeError: it is something else.
    """
    node = given(root, key)
    if node is not None and not isinstance(node.value, dict):
        raise CuveeError(f"'{key}' must be a mapping, not {node}", where=node.where, mend=f"write '{key}: {example}'")
    return node


def located(name: str, near: Path, is_there: Callable[[Path], bool]) -> str | None:
    """The absolute path of what a YAML names, near the YAML or else in the working directory; None: in neither."""
    paths = (folder / os.path.expanduser(name) for folder in (near, Path()))
    return next((os.path.abspath(path) for path in paths if is_there(path)), None)


def looked_for(near: Path) -> str:
    """The mend for what `located` does not find."""
    return f"it is looked for in {' and in '.join(dict.fromkeys(map(os.path.abspath, (near, Path()))))}"


def named(node: Node, key: str) -> tuple[str | None, Mapping[str, Node]]:
    """A name alone, or a mapping whose `name` is one: the name and the rest.

    Raises:
        CuveeError: a list, or an empty name.
    """
    if isinstance(node.value, dict):
        rest = {name: item for name, item in node.value.items() if name != "name"}
        return text(node, "name", None), rest
    return text_of(node, key), {}


def parameters(nodes: Mapping[str, Node], of: str) -> dict[str, Any]:
    """Settings that someone else checks: scalars and lists of scalars, as Python values.

    Raises:
        CuveeError: deeper, or a number that is not finite.
    """
    found = {}
    for name, node in nodes.items():
        if node.value is None:
            continue
        items = node.value if isinstance(node.value, list) else [node]
        values = [_scalar(name, item, of) for item in items]
        found[name] = values if isinstance(node.value, list) else values[0]
    return found


def _scalar(name: str, node: Node, of: str) -> Any:
    if isinstance(node.value, dict | list) or node.value is None:
        raise CuveeError(f"'{name}' of {of} must be a value or a list of values, not {node}", where=node.where)
    if isinstance(node.value, str) and _NUMBER.fullmatch(node.value):
        return float(node.value)
    if isinstance(node.value, float) and not math.isfinite(node.value):
        raise CuveeError(f"'{name}' is {node.text}: it must be finite", where=node.where)
    return node.value


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int of four hundred digits
        return False


def _bounds(low: float | None, high: float | None, above: float | None) -> str:
    parts = [
        *([f"greater than {above:g}"] if above is not None else []),
        *([f"at least {low:g}"] if low is not None else []),
        *([f"at most {high:g}"] if high is not None else []),
    ]
    return f"it must be {' and '.join(parts)}"
