"""Recipes as mergekit reads them: which models they name, and the mistakes that it would accept in silence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merging.errors import RecipeError, did_you_mean, quoted
from merging.node import Node, read
from merging.setting import refuse_unknown_keys
from merging.sources import ModelRef

MIXTURE_KEYS = ("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts", "architecture")
_OURS = ("missing",)  # keys that mergekit would not know
_ORDER = ("base_model", "models", "slices", "modules", "experts")  # where references are looked for first
_EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")


def is_mixture(text: str, where: str = "recipe") -> bool:
    """Whether a recipe describes a mixture of experts, in the schema of mergekit-moe.

    Raises:
        RecipeError: not YAML.
    """
    root = read(text, where)
    return isinstance(root.value, dict) and "experts" in root.value


def references(text: str, where: str = "recipe", relative_to: Path | None = None) -> list[ModelRef]:
    """All models that a recipe names, of whatever form; the first is the donor of config and tokenizer.

    Raises:
        RecipeError: not YAML, no recipe, a reference that cannot be read.
    """
    found: list[ModelRef] = []
    with_references(read(text, where), found.append, relative_to)
    return list(dict.fromkeys(found))


def with_references(root: Node, function: Callable[[ModelRef], Any], relative_to: Path | None = None) -> Any:
    """The recipe as plain data, each model reference in it replaced by `function` of it; the donor's comes first."""
    near = str(relative_to) if relative_to else ""

    def walk(node: Node, key: str) -> Any:
        if node.value is not None and _is_reference(node, key):
            return function(ModelRef.of(node, near))
        if isinstance(node.value, dict):
            order = _ORDER if node is root else ("sources",)
            names = sorted(node.value, key=lambda name: order.index(name) if name in order else len(order))
            return {name: walk(node.value[name], name) for name in names if not (node is root and name in _OURS)}
        if isinstance(node.value, list):
            if key == "models":  # a model alone stands for {model: …}
                node = Node([i if isinstance(i.value, dict) else Node({"model": i}, i.where) for i in node.value], "")
            return [walk(item, "") for item in node.value]
        return node.value

    return walk(root, "")


def _is_reference(node: Node, key: str) -> bool:
    if key in ("base_model", "model", "source_model"):
        return True
    if key in ("tokenizer_source", "source"):  # of a token, a mapping with its 'kind' is no model
        return node.value not in ("union", "base") and not (isinstance(node.value, dict) and "kind" in node.value)
    return False


def as_mapping(ref: ModelRef, relative_to: Path | None) -> dict[str, Any]:
    """A reference in the form that mergekit reads whatever its paths hold."""

    def located(path: str) -> str:
        folder = relative_to / path if relative_to else Path(path)
        return str(folder.resolve()) if not Path(path).exists() and folder.exists() else path

    ref = replace(ref, path=located(ref.path), adapter=ref.adapter and located(ref.adapter))
    mapping: dict[str, Any] = {"model": {"path": ref.path, "revision": ref.revision}}
    if ref.adapter:
        mapping["lora"] = {"path": ref.adapter, "revision": ref.adapter_revision}
    if ref.architecture:
        mapping["override_architecture"] = ref.architecture
    return mapping


def check_keys(root: Node, mixture: bool) -> None:
    """Raises RecipeError, at its line, for a key that mergekit does not know below the recipe's own."""
    if not isinstance(root.value, dict):
        raise RecipeError(f"a recipe is a mapping, not {root}", where=root.where)
    if mixture:
        refuse_unknown_keys(root, MIXTURE_KEYS, "a mixture of experts")
        for key in ("experts", "shared_experts"):
            for expert in _items(root, key):
                _keys(expert, _EXPERT_KEYS, "an expert")
        return
    bodies = [root, *(module for module in _values(root, "modules"))]
    for body in bodies:
        if body is not root:
            _keys(body, ("slices", "models", "parameters"), "a module")
        for part in _items(body, "slices"):
            _keys(part, ("sources", "base_model", "residual_weight", "parameters"), "a slice")
            for source in _items(part, "sources"):
                _keys(source, ("model", "layer_range", "parameters"), "a source of a slice")
        for model in _items(body, "models") if body is not root else []:
            _keys(model, ("model", "parameters"), "a model")
    tokenizer = root.value.get("tokenizer")
    for token in _values(tokenizer, "tokens") if tokenizer is not None else []:
        if isinstance(token.value, dict):
            _keys(token, ("source", "force"), "a token")


def check_parameters(root: Node, method: str, known: Sequence[str]) -> None:
    """Raises RecipeError, at its line, for a parameter that mergekit's method does not take."""
    for node in _parameter_nodes(root):
        for name, item in node.value.items() if isinstance(node.value, dict) else ():
            if name not in known:
                mend = did_you_mean(name, known, f"it takes {quoted(known)}" if known else "it takes none")
                raise RecipeError(f"'{name}' is no parameter of '{method}' in mergekit", where=item.where, mend=mend)


def place(root: Node, way: Sequence[Any]) -> str:
    """Where the value lies that is reached by these keys and indices, or the last of them that exists."""
    node = root
    with contextlib.suppress(KeyError, IndexError, TypeError):
        for step in way:
            node = node.value[step]
    return node.where


def _parameter_nodes(node: Node) -> Iterator[Node]:
    if isinstance(node.value, dict):
        for key, item in node.value.items():
            if key == "parameters":
                yield item
            else:
                yield from _parameter_nodes(item)
    elif isinstance(node.value, list):
        for item in node.value:
            yield from _parameter_nodes(item)


def _keys(node: Node, known: tuple[str, ...], of: str) -> None:
    if not isinstance(node.value, dict):
        raise RecipeError(f"{of} must be a mapping, not {node}", where=node.where)
    refuse_unknown_keys(node, known, of)


def _items(node: Node, key: str) -> list[Node]:
    child = node.value.get(key) if isinstance(node.value, dict) else None
    if child is None or child.value is None:
        return []
    if not isinstance(child.value, list):
        raise RecipeError(f"'{key}' must be a list, not {child}", where=child.where)
    return list(child.value)


def _values(node: Node, key: str) -> list[Node]:
    child = node.value.get(key) if isinstance(node.value, dict) else None
    if child is None or child.value is None:
        return []
    if not isinstance(child.value, dict):
        raise RecipeError(f"'{key}' must be a mapping, not {child}", where=child.where)
    return list(child.value.values())
