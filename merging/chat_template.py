"""Chat templates: by name, by the inputs' majority, or as a Jinja text, and where a folder keeps its own."""

from __future__ import annotations

import collections
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merging.checkpoint import read_json
from merging.errors import MergeError
from merging.layout import has_tokenizer, transformer_part, write_json


def template_names() -> list[str]:
    """Names of the templates that `chat_template` knows."""
    return sorted(name.removesuffix(".jinja") for name in _templates())


def find_template(wish: str, inputs: Sequence[Path] = ()) -> str | None:
    """The Jinja text that a recipe's `chat_template` means; None for "auto" where no input has one.

    Raises:
        MergeError: no such name, and no Jinja text either.
    """
    if wish == "auto":
        texts = [text.strip() for folder in inputs if (text := read_template(folder))]
        return collections.Counter(texts).most_common(1)[0][0] if texts else None
    if f"{wish}.jinja" in _templates():
        return _templates()[f"{wish}.jinja"]
    if "{" not in wish or len(wish) < 20:
        raise MergeError(
            f"chat_template '{wish[:60]}' is neither a known name nor a Jinja text",
            mend=f"write one of auto, {', '.join(template_names())}, or the template itself",
        )
    _check_jinja(wish)
    return wish


def read_template(folder: Path) -> str | None:
    """The default chat template of a model's folder."""
    folder = folder / transformer_part(folder)
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        value = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(value, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
            value = named.get("default")
        if isinstance(value, str):
            return value
    return None


def set_template(folder: Path, text: str) -> None:
    """Makes `text` the chat template of the tokenizer in a folder.

    Raises:
        MergeError: no tokenizer there.
    """
    if not has_tokenizer(folder):
        raise MergeError(
            "chat_template is given, but the model that lends the config has no tokenizer",
            mend="remove chat_template, or name a model with a tokenizer in tokenizer_source",
        )
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    settings = folder / "tokenizer_config.json"
    value = read_json(settings) if settings.is_file() else {}
    if value.pop("chat_template", None) is not None:
        write_json(settings, value)


def _templates() -> dict[str, str]:
    try:
        folder = importlib.resources.files("mergekit._data.chat_templates")
        return {
            file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.name.endswith(".jinja")
        }
    except ModuleNotFoundError:
        return {}


def _check_jinja(text: str) -> None:
    try:
        import jinja2
    except ModuleNotFoundError:  # transformers will tell
        return
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _generation_tag()]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise MergeError(f"line {error.lineno} of chat_template: {error.message}") from error


def _generation_tag() -> Any:
    """Chat templates may mark the assistant's words by {% generation %}, a tag that transformers adds to Jinja."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation
