"""Recipe: mergekit's YAML schema, typed and validated; every mistake is told with its line and its mend.

Precedence of a parameter: model, then recipe, then the method's default. Within a setting the first condition whose
`filter` is part of the tensor's name holds; where none does, the next level speaks. Gradients run over a stack's
layers, see `merging.layers`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from merging.errors import RecipeError, did_you_mean, quoted
from merging.node import Node, read
from merging.resolution import Resolution, check_names
from merging.setting import Setting, refuse_unknown_keys, settings
from merging.sources import ModelRef, Source, StatsRef

if TYPE_CHECKING:
    from merging.methods.registry import Method

__all__ = ["DTYPES", "MISSING", "ModelRef", "Recipe", "Setting", "Source", "StatsRef"]

#: What `dtype` and `out_dtype` may be.
DTYPES = ("float32", "bfloat16", "float16")
#: What `missing` may be: what becomes of a tensor that only some of the models have.
MISSING = ("error", "keep", "drop")

_KEYS = (
    *("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype"),
    *("tokenizer", "tokenizer_source", "chat_template", "missing"),
)
_BODIES = ("models", "slices", "modules")
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, init=False)
class Recipe:
    """What to merge, and how.

    Attributes:
        models: one entry for each model, in the order written; empty where `slices` or `modules` is given.
        base_model: the model that the others were fine-tuned from.
        parameters: the global settings by name.
        dtype: of what is written, unless `out_dtype` says otherwise; one of `DTYPES`. Arithmetic is float32 always.
        tokenizer, slices, modules: as written; they are mergekit's business.
        missing: what becomes of a tensor that only some of the models have, one of `MISSING`.
        where: the file's name.
    """

    merge_method: str
    models: tuple[Source, ...]
    base_model: ModelRef | None
    parameters: Mapping[str, Setting]
    dtype: str | None
    out_dtype: str | None
    tokenizer: Mapping[str, Any] | None
    tokenizer_source: str | None
    chat_template: str | None
    missing: str
    slices: Any
    modules: Any
    where: str = field(compare=False)
    _text: str | None = field(init=False, compare=False, repr=False)
    _lines: Mapping[str, str] = field(init=False, compare=False, repr=False)
    _resolutions: dict[str, Resolution] = field(init=False, compare=False, repr=False)

    def __init__(
        self,
        merge_method: str | Node,
        models: Sequence[Mapping[str, Any] | str | Source] | Node = (),
        base_model: str | Mapping[str, Any] | ModelRef | Node | None = None,
        parameters: Mapping[str, Any] | Node | None = None,
        dtype: str | Node | None = None,
        out_dtype: str | Node | None = None,
        tokenizer: Mapping[str, Any] | Node | None = None,
        tokenizer_source: str | Node | None = None,
        chat_template: str | Node | None = None,
        missing: str | Node = "error",
        slices: Any = None,
        modules: Any = None,
        where: str = "recipe",
    ) -> None:
        """Takes what YAML would say as Python values: `models=[{"model": "a", "parameters": {"weight": 1}}, …]`.

        Raises:
            RecipeError: not a recipe; `check` says whether it suits its method.
        """
        given = {
            **{"merge_method": merge_method, "base_model": base_model, "models": models or None, "slices": slices},
            **{"modules": modules, "parameters": parameters, "dtype": dtype, "out_dtype": out_dtype},
            **{"tokenizer": tokenizer, "tokenizer_source": tokenizer_source, "chat_template": chat_template},
            "missing": missing,
        }
        nodes = {key: Node.of(value, where if value is None else f"{where}.{key}") for key, value in given.items()}
        near = os.path.dirname(where)
        _refuse_bodies(nodes)

        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("where", where)
        put("_text", None)
        put("_lines", {key: node.where for key, node in nodes.items() if node.value is not None})
        put("_resolutions", {})
        put("merge_method", _required_text(nodes["merge_method"], "merge_method"))
        put("models", _models(nodes["models"], near))
        put("base_model", None if nodes["base_model"].value is None else ModelRef.of(nodes["base_model"], near))
        put("parameters", settings(nodes["parameters"]))
        put("dtype", _dtype(nodes["dtype"], "dtype"))
        put("out_dtype", _dtype(nodes["out_dtype"], "out_dtype"))
        put("tokenizer", _tokenizer(nodes["tokenizer"]))
        put("tokenizer_source", _optional_text(nodes["tokenizer_source"], "tokenizer_source"))
        put("chat_template", _optional_text(nodes["chat_template"], "chat_template"))
        put("missing", _choice(nodes["missing"], "missing", MISSING))
        put("slices", nodes["slices"].plain())
        put("modules", nodes["modules"].plain())
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise RecipeError(
                "'tokenizer_source' and 'tokenizer' exclude each other",
                where=self.at("tokenizer_source"),
                mend="keep one of them",
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Reads a recipe's file.

        Raises:
            RecipeError: no file, not readable, not UTF-8, not YAML, not a recipe.
        """
        return cls.parse(read_file(path), os.fspath(path))

    @classmethod
    def parse(cls, text: str, where: str = "recipe") -> Recipe:
        """Reads a recipe's text; mistakes are told at `where:line`.

        Raises:
            RecipeError: not YAML, or not a recipe.
        """
        root = read(text, where)
        if not isinstance(root.value, dict):
            raise RecipeError(
                f"a recipe is a mapping, not {root}", where=root.where, mend="write 'merge_method:' and 'models:'"
            )
        refuse_unknown_keys(root, _KEYS, "a recipe")
        recipe = cls(**{"merge_method": Node(None, where), **root.value}, where=where)
        object.__setattr__(recipe, "_text", text)
        return recipe

    @property
    def text(self) -> str:
        """The YAML it was read from; of a recipe made in Python, `to_yaml()`."""
        return self.to_yaml() if self._text is None else self._text

    def to_yaml(self) -> str:
        """Canonical YAML; parses to an equal recipe."""
        content: dict[str, Any] = {
            "merge_method": self.merge_method,
            "base_model": self.base_model and self.base_model.plain(),
            "models": [source.plain() for source in self.models] or None,
            "slices": self.slices,
            "modules": self.modules,
            "parameters": {name: setting.plain() for name, setting in self.parameters.items()} or None,
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            "tokenizer": self.tokenizer,
            "tokenizer_source": self.tokenizer_source,
            "chat_template": self.chat_template,
            "missing": None if self.missing == MISSING[0] else self.missing,
        }
        content = {key: value for key, value in content.items() if value is not None}
        return yaml.dump(content, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)

    def at(self, key: str) -> str:
        """Where the recipe says it: "recipe.yml:3" for a top-level key; the file where it says nothing."""
        return self._lines.get(key, self.where)

    def merged(self, method: Method) -> tuple[Source, ...]:
        """The models that take part as models: all but the base, for a method that has one."""
        if method.base == "none" or self.base_model is None:
            return self.models
        base = self.base_model.identity
        return tuple(source for source in self.models if source.model.identity != base)

    def wants_statistics(self, method: Method) -> bool:
        """Whether the method, with these parameters, works by statistics of its models."""
        if not method.statistics or method.statistics_if is None:
            return bool(method.statistics)
        name, value = method.statistics_if
        setting = self.parameters.get(name)
        if setting is None:
            return bool(method.parameters[name].default == value)
        said = [c.value if isinstance(c.value, tuple) else (c.value,) for c in setting.conditions]
        return any(value in each for each in said)

    def scales(self, method: Method) -> tuple[float, ...] | None:
        """Of each of `merged(method)` the s where the method takes its statistics of θ₀ + s·τ; None: of the models as they are.

        Raises:
            RecipeError: the s differ from tensor to tensor.
        """
        if method.statistics_at is None:
            return None
        name, option, value = method.statistics_at
        setting = self.parameters.get(option)
        if setting is not None and not setting.constant:
            raise RecipeError(f"'{option}' cannot differ by tensor", where=setting.where, mend="give one value")
        if (method.parameters[option].default if setting is None else setting.conditions[0].value) != value:
            return None
        mend = f"give each model one '{name}', or set '{option}' otherwise"
        return tuple(self._resolution(method).constant_of(name, "at which statistics are taken", mend))

    def values(self, method: Method, tensor_name: str, t: float) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        """A method's parameters for one tensor.

        Args:
            t: the tensor's position in its stack of layers, in [0, 1]; see `merging.layers.fractions`.

        Returns:
            Shared values by name, and lists of one value for each of `merged(method)` by name. The same objects come
            again where nothing is filtered or graded: they are for reading only.

        Raises:
            RecipeError: what `check` raises of parameters; a required parameter of which no condition matches.
        """
        return self._resolution(method).values(tensor_name, t)

    def check(self, method: Method | None, mergekit_only: bool = False) -> list[str]:
        """Whether the recipe suits its method.

        Args:
            method: the registry's entry; None where only mergekit knows the method.
            mergekit_only: the merge is handed over to mergekit, which counts models and resolves parameters itself:
                only what it would accept in silence is checked.

        Returns:
            Notes for the user, such as what is ignored.

        Raises:
            RecipeError: the first mistake, with its line and mend.
        """
        notes = check_names(method, self.parameters, self.models) if method else []
        _check_duplicates(self)
        if mergekit_only or method is None:
            _refuse_statistics(self)
        if mergekit_only or method is None:
            if self.missing != MISSING[0]:
                raise RecipeError(
                    "mergekit, which runs this merge, knows no 'missing'", where=self.at("missing"), mend="remove it"
                )
            return []
        if not self.models:
            body = "slices" if self.slices is not None else "modules"
            raise RecipeError(f"'{body}' are for mergekit alone", where=self.at(body), mend="list 'models' instead")
        notes += _check_base(self, method)
        _check_count(self, method)
        notes += _check_statistics(self, method)
        self._resolution(method).refuse_weights_of_sum_0()
        return notes

    def unmatched(self, tensor_names: Iterable[str]) -> list[str]:
        """Notes on filters that are part of no tensor's name: most likely misspelt."""
        names = list(tensor_names)
        parts = sorted({part for name in names for part in re.split(r"[./]", name) if not part.isdigit()})
        levels = [*(source.parameters for source in self.models), self.parameters]
        conditions = [c for level in levels for setting in level.values() for c in setting.conditions]
        notes = []
        for condition in conditions:
            if condition.filter is not None and not any(condition.filter in name for name in names):
                near = difflib.get_close_matches(condition.filter, parts, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                notes.append(f"{condition.where}: the filter '{condition.filter}' matches no tensor{hint}")
        return notes

    def _resolution(self, method: Method) -> Resolution:
        resolution = self._resolutions.get(method.name)
        if resolution is None or resolution.method is not method:
            resolution = Resolution(method, self.merged(method), self.parameters, self.at("merge_method"))
            self._resolutions[method.name] = resolution
        return resolution


def read_file(path: str | os.PathLike[str]) -> str:
    """The text of a recipe's file.

    Raises:
        RecipeError: no file, not readable, too large, not UTF-8.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except IsADirectoryError:
        raise RecipeError("is a folder, not a recipe", where=name, mend="give the path of a YAML file") from None
    except FileNotFoundError:
        raise RecipeError("no such file", where=name) from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot be read: {getattr(error, 'strerror', error)}", where=repr(name)[1:-1]) from None
    if len(raw) > _MAX_BYTES:
        raise RecipeError("is larger than 1 MiB: no recipe", where=name, mend="give the path of a YAML file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError("is not UTF-8 text", where=f"{name}:{line}", mend="save it as UTF-8") from None
    return text


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _refuse_bodies(nodes: Mapping[str, Node]) -> None:
    given = [body for body in _BODIES if nodes[body].value is not None]
    if not given:
        raise RecipeError(
            "a recipe needs 'models'", where=nodes["models"].where, mend="add 'models:' with one entry a model"
        )
    if len(given) > 1:
        raise RecipeError(f"{quoted(given)} exclude each other", where=nodes[given[1]].where, mend="keep one of them")
    for body in given:
        kind = dict if body == "modules" else list
        if not isinstance(nodes[body].value, kind):
            shape = "a mapping" if body == "modules" else "a list"
            raise RecipeError(f"'{body}' must be {shape}, not {nodes[body]}", where=nodes[body].where)
        if not nodes[body].value:
            raise RecipeError(f"'{body}' is empty", where=nodes[body].where, mend="list what to merge")


def _models(node: Node, near: str) -> tuple[Source, ...]:
    return tuple(Source.of(item, near) for item in node.value) if node.value is not None else ()


def _required_text(node: Node, key: str) -> str:
    text = _optional_text(node, key)
    if not text:
        raise RecipeError(f"a recipe needs '{key}'", where=node.where, mend=f"add '{key}: linear', say")
    return text


def _optional_text(node: Node, key: str) -> str | None:
    if node.value is None:
        return None
    if node.text is None:
        raise RecipeError(f"'{key}' must be text, not {node}", where=node.where)
    return node.text


def _choice(node: Node, key: str, choices: tuple[str, ...]) -> str:
    text = choices[0] if node.value is None else _optional_text(node, key) or ""
    if text not in choices:
        mend = did_you_mean(text, choices, f"choose one of {quoted(choices)}")
        raise RecipeError(f"'{text}' is no choice for '{key}'", where=node.where, mend=mend)
    return text


def _dtype(node: Node, key: str) -> str | None:
    text = _optional_text(node, key)
    if text is None:
        return None
    name = text.removeprefix("torch.")
    if name == "float64":
        raise RecipeError(
            f"'{key}: {text}' would add no digit: arithmetic is float32", where=node.where, mend="store as float32"
        )
    return _choice(Node(name, node.where, name), key, DTYPES)


def _tokenizer(node: Node) -> Mapping[str, Any] | None:
    if node.value is None:
        return None
    if not isinstance(node.value, dict):
        raise RecipeError(
            f"'tokenizer' must be a mapping, not {node}",
            where=node.where,
            mend=f"write 'tokenizer: {{source: {node.text}}}'",
        )
    refuse_unknown_keys(node, ("source", "tokens", "pad_to_multiple_of"), "'tokenizer'")
    plain: Mapping[str, Any] = node.plain()
    return plain


def _check_duplicates(recipe: Recipe) -> None:
    first: dict[Any, Source] = {}
    for source in recipe.models:
        twin = first.setdefault(source.model.identity, source)
        if twin is not source:
            raise RecipeError(
                f"the model '{source.model}' is listed twice",
                where=source.where,
                mend=f"remove this entry, or that at {twin.where}",
            )


def _check_base(recipe: Recipe, method: Method) -> list[str]:
    base, merged = recipe.base_model, recipe.merged(method)
    if base is None:
        if method.base == "required":
            raise RecipeError(
                f"'{method.name}' needs a base",
                where=recipe.at("merge_method"),
                mend="add 'base_model:', the model that the others were fine-tuned from",
            )
        return []
    if not merged:
        raise RecipeError(
            f"the only model is the base itself, '{base}'",
            where=recipe.at("models"),
            mend="add models to merge onto it",
        )
    listed = [source for source in recipe.models if source.model.identity == base.identity]
    if method.base == "none" and not listed:
        return [f"{recipe.at('base_model')}: '{method.name}' has no base: '{base}' only lends its config and tokenizer"]
    if method.base != "none" and listed and listed[0].parameters:
        return [
            f"{listed[0].where}: the parameters of the base '{base}' are ignored: it is what others are merged onto"
        ]
    return []


def _check_count(recipe: Recipe, method: Method) -> None:
    count, low, high = len(recipe.merged(method)), method.min_models, method.max_models
    if low <= count and (high is None or count <= high):
        return
    amount = f"exactly {low}" if low == high else f"at least {low}" if count < low else f"at most {high}"
    models = "model" if (low if count < low or low == high else high) == 1 else "models"
    beside = " besides its base" if method.base != "none" and recipe.base_model else ""
    mend = f"list {low - count} more" if count < low else f"remove {count - (high or 0)}"
    raise RecipeError(
        f"'{method.name}' merges {amount} {models}{beside}, not {count}", where=recipe.at("models"), mend=mend
    )


def _refuse_statistics(recipe: Recipe) -> None:
    for source in recipe.models:
        if source.stats is not None:
            raise RecipeError(
                "mergekit, which runs this merge, knows no 'stats'", where=source.stats.where, mend="remove it"
            )


def _check_statistics(recipe: Recipe, method: Method) -> list[str]:
    wanted, merged = recipe.wants_statistics(method), recipe.merged(method)
    if wanted:
        for source in merged:
            if source.stats is None:
                kind = method.statistics[0]
                raise RecipeError(
                    f"'{method.name}' needs statistics of every model, and '{source.model}' has none",
                    where=source.where,
                    mend=f"add 'stats: FOLDER' under the model, made by 'cuvee stats MODEL --data FILE --kind {kind} "
                    "--out FOLDER', or 'stats: {data: FILE}'",
                )
            kind = str(source.stats.options.get("kind", method.statistics[0]))
            if kind not in method.statistics:
                raise RecipeError(
                    f"'{method.name}' cannot use statistics of kind '{kind}'",
                    where=source.stats.where,
                    mend=did_you_mean(kind, method.statistics, f"it takes {quoted(method.statistics)}"),
                )
        recipe.scales(method)
    unused = [s for s in recipe.models if s.stats is not None and not (wanted and s in merged)]
    if not unused:
        return []
    where = unused[0].stats.where if unused[0].stats else ""
    if wanted:
        return [f"{where}: the statistics of the base are ignored: it is what others are merged onto"]
    if method.statistics_if is None:
        return [f"{where}: 'stats' are ignored: '{method.name}' takes none"]
    name, value = method.statistics_if
    return [f"{where}: 'stats' are ignored: '{method.name}' takes them with '{name}: {value}'"]
