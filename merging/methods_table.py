"""The merge methods as `cuvee methods` prints them and as docs/methods.md lists them, all of it from the registry."""

from __future__ import annotations

import inspect
import re
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from merging import lineage, methods
from merging.methods import REQUIRED, Method, Parameter

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 100  # of output that goes to a file or a pipe
_WIDE = 140  # enough for the titles too
_HEAD = """\
# Merge methods

<!-- Made by `cuvee methods --markdown`: change the methods' signatures and docstrings, not this file. -->

θ₀ is the base, θᵢ a model, τᵢ = θᵢ − θ₀ its task vector, wᵢ its weight. Every method works tensor by tensor in float32 and
rounds its result once. A parameter that is given *per model* stands under that model in the recipe, or once for all of them.
A number may be a gradient over the layers (`[0, 0.5, 1]`) or depend on the tensor's name (`filter:`).

Some methods know which weights matter: by statistics that `cuvee stats` computes from a few texts, named under each model as
`stats: FOLDER`, or as `stats: {data: FILE, examples: 64}` to be computed on the way.

Whatever else mergekit offers (slices, passthrough, mixtures of experts, tokenizer surgery) is handed over to it by the same
command. How to write one of your own: [adding-a-method.md](adding-a-method.md).
"""


def show(name: str | None = None, console: Console | None = None) -> None:
    """Prints all methods in one table, or one in full.

    Raises:
        MergeError: no such method.
    """
    from rich.console import Console

    console = console or Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    if name is not None:
        return _show_one(methods.get(name), console)
    table = _table()
    titled = console.width >= _WIDE
    for header in ("method", *(["title"] if titled else []), "models", "parameters"):
        table.add_column(header, overflow="fold", no_wrap=header != "parameters")
    for method in methods.known().values():
        parameters = ", ".join(map(_signature, method.parameters.values()))
        table.add_row(method.name, *([method.title] if titled else []), _models(method), parameters)
    console.print(table)
    console.print("\n* one value per model; 'cuvee methods NAME' tells more", style="dim", markup=False)


def entries(name: str | None = None) -> dict[str, Any]:
    """What `cuvee methods --json` prints: all methods or one, by name.

    Raises:
        MergeError: no such method.
    """
    began = time.perf_counter()
    chosen = methods.known().values() if name is None else [methods.get(name)]
    return {
        "command": "methods",
        "out": None,
        "methods": {method.name: _entry(method) for method in chosen},
        "seed": None,
        "device": "cpu",
        "seconds": round(time.perf_counter() - began, 3),
        "cuvee_version": lineage.cuvee_version(),
    }


def markdown(chosen: Mapping[str, Method] | None = None) -> str:
    """docs/methods.md: the methods that come with Cuvee, or those given."""
    if chosen is None:
        own = methods.__name__
        chosen = {name: m for name, m in methods.METHODS.items() if m.function.__module__.startswith(f"{own}.")}
    lines = [_HEAD, "| method | title | models |", "| --- | --- | --- |"]
    lines += [f"| [`{m.name}`](#{m.name}) | {m.title} | {_models(m)} |" for m in chosen.values()]
    for m in chosen.values():
        lines += ["", f"## {m.name}", "", f"**{m.title}** ({_linked(m.source)})", "", _details(m)]
        lines += ["", f"{_statistics(m, '`')}."] if m.statistics else []
        if m.parameters:
            lines += ["", "| parameter | default | values | |", "| --- | --- | --- | --- |"]
            lines += [_markdown_row(parameter) for parameter in m.parameters.values()]
    return "\n".join(lines) + "\n"


def _show_one(method: Method, console: Console) -> None:
    from rich.markup import escape

    console.print(f"[bold]{escape(method.name)}[/bold]  {escape(method.title)}")
    console.print(f"{escape(_details(method))}\n", soft_wrap=False)
    console.print(f"models: {_models(method)}; source: {escape(method.source)}")
    if method.statistics:
        console.print(_statistics(method))
    if not method.parameters:
        return console.print("no parameters")
    table = _table()
    for header in ("parameter", "default", "values", ""):
        table.add_column(header, overflow="fold")
    for parameter in method.parameters.values():
        table.add_row(parameter.name, _default(parameter), _values(parameter), escape(parameter.help))
    console.print()
    console.print(table)


def _entry(method: Method) -> dict[str, Any]:
    return {
        "title": method.title,
        "base": method.base,
        "models": [method.min_models, method.max_models],
        "summary": method.summary,
        "source": method.source,
        "statistics": (
            {"kinds": list(method.statistics), "if": method.statistics_if, "at": method.statistics_at}
            if method.statistics
            else None
        ),
        "parameters": {name: _parameter_entry(parameter) for name, parameter in method.parameters.items()},
    }


def _parameter_entry(parameter: Parameter) -> dict[str, Any]:
    required = parameter.default is REQUIRED
    return {
        "type": parameter.type.__name__,
        "per_model": parameter.per_model,
        "required": required,
        "default": None if required else parameter.default,
        "low": parameter.low,
        "high": parameter.high,
        "choices": list(parameter.choices),
        "help": parameter.help,
    }


def _details(method: Method) -> str:
    """The docstring, each paragraph on one line."""
    text = inspect.getdoc(method.function) or method.summary
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _models(method: Method) -> str:
    low, high = method.min_models, method.max_models
    count = f"{low} or more" if high is None else f"{low}" if low == high else f"{low} to {high}"
    return {"required": f"base + {count}", "optional": f"(base +) {count}", "none": count}[method.base]


def _statistics(method: Method, mark: str = "'") -> str:
    kinds = " or ".join(f"{mark}{kind}{mark}" for kind in method.statistics)
    when = method.statistics_if
    where = f" with {mark}{when[0]}: {when[1]}{mark}" if when else ""
    at = method.statistics_at
    scaled = f", with {mark}{at[1]}: {at[2]}{mark} of θ₀ + λᵢτᵢ, λ the {mark}{at[0]}{mark}" if at else ""
    return f"Statistics of every model: {kinds}{where}{scaled}"


def _signature(parameter: Parameter) -> str:
    name = f"{parameter.name}*" if parameter.per_model else parameter.name
    return name if parameter.default is REQUIRED else f"{name}={_default(parameter)}"


def _default(parameter: Parameter) -> str:
    value = parameter.default
    if value is None:
        return "auto"
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _values(parameter: Parameter) -> str:
    low, high = parameter.low, parameter.high
    kind = {float: "number", int: "whole number", bool: "true or false"}.get(parameter.type, "text")
    if parameter.choices:
        text = " or ".join(parameter.choices)
    elif low is not None and high is not None:
        text = f"{low:g} … {high:g}"
    elif low is not None:
        text = f"{kind} ≥ {low:g}"
    else:
        text = kind if high is None else f"{kind} ≤ {high:g}"
    return f"{text}, per model" if parameter.per_model else text


def _markdown_row(parameter: Parameter) -> str:
    default = _default(parameter)
    shown = default if parameter.default is REQUIRED else f"`{default}`"
    return f"| `{parameter.name}` | {shown} | {_values(parameter)} | {parameter.help.replace('|', chr(92) + '|')} |"


def _linked(source: str) -> str:
    source = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)
    return re.sub(r"(?<![(\w])(https?://\S+)", r"<\1>", source)


def _table() -> Any:
    from rich.table import Table

    return Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
