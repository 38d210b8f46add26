"""ModelRef and Source: which models a recipe names, and what it says about each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merging.errors import RecipeError
from merging.node import Node
from merging.setting import Setting, refuse_unknown_keys, settings

#: What a recipe may say of statistics to be computed on the way, and of which type.
STATS_OPTIONS: Mapping[str, tuple[type, ...]] = {
    "data": (str,), "kind": (str,), "examples": (int,), "seed": (int,), "device": (str,), "dtype": (str,),
    "batch_size": (int,), "max_length": (int,), "head": (str,), "columns": (dict,), "temperature": (float, int),
    "candidates": (int,),
}  # fmt: skip


@dataclass(frozen=True)
class ModelRef:
    """A model: a local folder or hub id, at a revision, with a LoRA adapter or none.

    Attributes:
        architecture: mergekit's `override_architecture`; of use only to mergekit.
    """

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    architecture: str | None = None

    @classmethod
    def parse(cls, value: str | os.PathLike[str] | Mapping[str, Any], *, where: str = "", near: str = "") -> ModelRef:
        """Reads "path[@revision][+adapter[@revision]]", or mergekit's mapping {model: {path, revision}, lora: …}.

        A folder that exists is taken as it is, whatever '+' and '@' its name holds; so is a `path:` in a mapping.

        Args:
            near: where to look, after the working directory, for relative folders.

        Raises:
            RecipeError: nothing, a part that is empty, more than one adapter or revision, an unknown key.
        """
        return cls.of(Node.of(value, where), near)

    @classmethod
    def of(cls, node: Node, near: str = "") -> ModelRef:
        """The same from a recipe's node."""
        if isinstance(node.value, ModelRef):
            return node.value
        if isinstance(node.value, dict):
            refuse_unknown_keys(node, ("model", "lora", "override_architecture"), "a model reference")
            if "model" not in node.value:
                raise RecipeError("a model reference has no 'model'", where=node.where, mend="add 'model: {path: …}'")
            path, revision = _located(node.value["model"], near)
            adapter, adapter_revision = None, None
            if "lora" in node.value and node.value["lora"].value is not None:
                adapter, adapter_revision = _located(node.value["lora"], near)
            architecture = node.value.get("override_architecture", node).text
            return cls(path, revision, adapter, adapter_revision, architecture)
        text = _text(node)
        if _exists(text, near):
            return cls(text)
        model, adapter_text = _split(text, "+", node, near)
        path, revision = _at(model, node, near)
        if adapter_text is None:
            return cls(path, revision)
        return cls(path, revision, *_at(adapter_text, node, near))

    @property
    def identity(self) -> tuple[str | None, ...]:
        """Equal for two spellings of one model: `a`, `./a/`, or a link to it."""

        def real(path: str | None) -> str | None:
            if not path:
                return path
            return os.path.realpath(os.path.expanduser(path)) if _exists(path, "") else os.path.normpath(path)

        return (real(self.path), self.revision, real(self.adapter), self.adapter_revision)

    def plain(self) -> Any:
        """What `of` reads, whatever exists on disk: text, or a mapping where text would be read otherwise."""
        parts = (self.path, self.revision, self.adapter, self.adapter_revision)
        if self.architecture is None and not any("+" in part or "@" in part for part in parts if part):
            return str(self)
        mapping: dict[str, Any] = {"model": _mapping(self.path, self.revision)}
        if self.adapter is not None:
            mapping["lora"] = _mapping(self.adapter, self.adapter_revision)
        if self.architecture is not None:
            mapping["override_architecture"] = self.architecture
        return mapping

    def __str__(self) -> str:
        text = f"{self.path}@{self.revision}" if self.revision else self.path
        if self.adapter:
            text += f"+{self.adapter}@{self.adapter_revision}" if self.adapter_revision else f"+{self.adapter}"
        return text


@dataclass(frozen=True)
class StatsRef:
    """`stats:` of a model: a folder that `cuvee stats` has written, or the data to make one from on the way.

    Attributes:
        path: the folder; None where there is data.
        options: of `cuvee stats`, `data` among them; empty where there is a folder.
        where: "recipe.yml:5".
    """

    path: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    @classmethod
    def of(cls, node: Node) -> StatsRef:
        """Reads `FOLDER`, or `{data: FILE, examples: 64, …}`.

        Raises:
            RecipeError: neither, an unknown key, no data, a value of the wrong type.
        """
        if isinstance(node.value, StatsRef):
            return node.value
        if not isinstance(node.value, dict):
            if node.text is None or not node.text.strip():
                shown = "empty text" if node.text is not None else node
                mend = "write 'stats: FOLDER', or 'stats: {data: FILE}'"
                raise RecipeError(
                    f"'stats' must be a folder that 'cuvee stats' has made, not {shown}", where=node.where, mend=mend
                )
            return cls(node.text, {}, node.where)
        refuse_unknown_keys(node, tuple(STATS_OPTIONS), "'stats'")
        options = {key: item.plain() for key, item in node.value.items() if item.value is not None}
        for key, value in options.items():
            if isinstance(value, bool) or not isinstance(value, STATS_OPTIONS[key]):
                kind = {str: "text", dict: "a mapping", int: "a whole number", float: "a number"}[STATS_OPTIONS[key][0]]
                item = node.value[key]
                raise RecipeError(f"'{key}' of 'stats' must be {kind}, not {item}", where=item.where)
        if "data" not in options:
            raise RecipeError("'stats' names no data", where=node.where, mend="add 'data: FILE'")
        return cls(None, options, node.where)

    def plain(self) -> Any:
        """What `of` reads, as Python values."""
        return self.path if self.path is not None else dict(self.options)


@dataclass(frozen=True)
class Source:
    """One entry of `models:`.

    Attributes:
        where: "recipe.yml:4".
        stats: statistics of the model, for methods that take them.
    """

    model: ModelRef
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    where: str = field(default="", compare=False)
    stats: StatsRef | None = None

    @classmethod
    def of(cls, node: Node, near: str = "") -> Source:
        """Reads `{model: …, parameters: {…}, stats: …}`, or a model alone.

        Raises:
            RecipeError: no model, an unknown key, a parameter that cannot be read.
        """
        if isinstance(node.value, Source):
            return node.value
        if not isinstance(node.value, dict):
            return cls(ModelRef.of(node, near), {}, node.where)
        refuse_unknown_keys(node, ("model", "parameters", "stats"), "a model")
        if "model" not in node.value:
            raise RecipeError("an entry of 'models' has no 'model'", where=node.where, mend="add 'model: PATH'")
        model = ModelRef.of(node.value["model"], near)
        stats = node.value.get("stats")
        return cls(
            model,
            settings(node.value.get("parameters", Node(None, node.where))),
            node.where,
            None if stats is None or stats.value is None else StatsRef.of(stats),
        )

    def plain(self) -> Any:
        """What `of` reads, as Python values."""
        entry = {"model": self.model.plain()}
        if self.parameters:
            entry["parameters"] = {name: setting.plain() for name, setting in self.parameters.items()}
        if self.stats is not None:
            entry["stats"] = self.stats.plain()
        return entry


def _located(node: Node, near: str) -> tuple[str, str | None]:
    """The path and revision of `{path, revision}` or "path@revision"."""
    if not isinstance(node.value, dict):
        return _at(_text(node), node, near)
    refuse_unknown_keys(node, ("path", "revision"), "a model reference")
    if "path" not in node.value:
        raise RecipeError("a model reference has no 'path'", where=node.where, mend="add 'path:'")
    revision = node.value.get("revision")
    return _text(node.value["path"]), None if revision is None or revision.value is None else _text(revision)


def _at(text: str, node: Node, near: str) -> tuple[str, str | None]:
    return (text, None) if _exists(text, near) else _split(text, "@", node, near)


def _split(text: str, sign: str, node: Node, near: str) -> tuple[str, str | None]:
    """Splits at the one sign; of several, at the last that has an existing folder beside it."""
    cuts = [i for i, letter in enumerate(text) if letter == sign]
    if not cuts:
        return text, None
    sides = [(i, side) for i in cuts for side in (text[:i], text[i + 1 :])]
    known = [i for i, side in sides if _exists(side, near) or _exists_at_revision(side, near)]
    if len(cuts) > 1 and not known:
        kind = "adapter" if sign == "+" else "revision"
        raise RecipeError(
            f"'{text}' has more than one '{sign}', and no such folder exists",
            where=node.where,
            mend=f"write the {kind} as a mapping: {{model: {{path: …, revision: …}}, lora: {{path: …}}}}",
        )
    cut = (known or cuts)[-1]
    left, right = text[:cut], text[cut + 1 :]
    if not left or not right:
        raise RecipeError(f"'{text}' has nothing on one side of '{sign}'", where=node.where)
    return left, right


def _text(node: Node) -> str:
    if node.text is None or not node.text.strip():
        shown = "empty text" if node.text is not None else node
        raise RecipeError(f"a model must be a folder or a hub id, not {shown}", where=node.where)
    return node.text


def _mapping(path: str, revision: str | None) -> dict[str, str]:
    return {"path": path} if revision is None else {"path": path, "revision": revision}


def _exists(path: str, near: str) -> bool:
    if not path or "\0" in path:
        return False
    path = os.path.expanduser(path)
    return os.path.exists(path) or (near != "" and os.path.exists(os.path.join(near, path)))


def _exists_at_revision(text: str, near: str) -> bool:
    path, _, revision = text.rpartition("@")
    return "+" not in revision and _exists(path, near)
