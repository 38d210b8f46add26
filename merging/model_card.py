"""The model card of a merge: what it was made of and how, as the hub reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

#: What of the donor's front matter says how the result is used.
_FROM_DONOR = ("library_name", "pipeline_tag", "language")
_USE_TAGS = ("sentence-transformers", "sentence-similarity", "feature-extraction", "cross-encoder", "sparse-encoder")
_LICENCE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Ingredient:
    """One input of a merge.

    Attributes:
        name: as the recipe says it.
        folder: where it lies.
        digest: of its weights.
    """

    name: str
    folder: Path
    digest: str = ""


def model_card(
    recipe_yaml: str,
    *,
    title: str,
    method: str,
    ingredients: Sequence[Ingredient],
    base: Ingredient | None = None,
    donor: Path | None = None,
    merged_by: str = "Cuvee",
) -> str:
    """README.md of the merged model.

    Args:
        title: heading.
        method: the method's title, as its paper says it.
        ingredients: all inputs but the base.
        base: the model that task vectors were measured from.
        donor: the folder that lent config and tokenizer; its card says what the result is for.
        merged_by: the program that did the arithmetic.
    """
    everything = [*ingredients, *([base] if base and base.name not in {i.name for i in ingredients} else [])]
    header = _header(everything, donor)
    lines = ["---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(), "---", "", f"# {title}", ""]
    relative_to = f", relative to `{base.name}`" if base else ""
    lines += [f"A merge of {len(ingredients)} models by {method}{relative_to}, made with {merged_by}.", ""]
    lines += ["| input | weights |", "| --- | --- |"]
    for ingredient in everything:
        name = f"{ingredient.name} (base)" if base and ingredient.name == base.name else ingredient.name
        lines.append(f"| {_cell(name)} | `{ingredient.digest or 'not recorded'}` |")
    fence = "```"
    while fence in recipe_yaml:
        fence += "`"
    lines += ["", "## Recipe", "", f"{fence}yaml", recipe_yaml.rstrip(), fence, ""]
    lines += ["To make it again, from this folder and with the inputs in place:", ""]
    lines += ["```sh", "cuvee merge --from cuvee.json OUT", "```", ""]
    return "\n".join(lines)


def front_matter(folder: Path) -> dict[str, Any]:
    """What the card in a model's folder says at its head; empty where there is no card, or no such head."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8-sig")
        if not text.startswith("---\n") or "\n---" not in text[4:]:
            return {}
        value = yaml.safe_load(text[4 : text.index("\n---", 3)])
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def hub_id(folder: Path) -> str | None:
    """`owner/name` of a folder in the hub's cache."""
    cache = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not cache.startswith("models--"):
        return None
    return cache.removeprefix("models--").replace("--", "/")


def _header(ingredients: Sequence[Ingredient], donor: Path | None) -> dict[str, Any]:
    cards = [front_matter(ingredient.folder) for ingredient in ingredients]
    lent = front_matter(donor) if donor else {}
    if donor and (donor / "modules.json").is_file():
        lent.setdefault("library_name", "sentence-transformers")
        lent.setdefault("pipeline_tag", "sentence-similarity")
    ids = [name for ingredient in ingredients if (name := hub_id(ingredient.folder))]
    tags = lent.get("tags")
    use = [tag for tag in tags if tag in _USE_TAGS] if isinstance(tags, list) else []
    if lent.get("library_name") == "sentence-transformers" and "sentence-transformers" not in use:
        use.insert(0, "sentence-transformers")
    header: dict[str, Any] = {"base_model": list(dict.fromkeys(ids))} if ids else {}
    header |= {key: lent[key] for key in _FROM_DONOR if isinstance(lent.get(key), str | list)}
    header |= _common_licence(cards)
    if ids:
        header["base_model_relation"] = "merge"
    return {**header, "tags": ["merge", "cuvee", *use]}


def _common_licence(cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The licence, if all cards name one and the same."""
    licences = [{key: card[key] for key in _LICENCE if isinstance(card.get(key), str)} for card in cards]
    return licences[0] if licences and "license" in licences[0] and all(e == licences[0] for e in licences) else {}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
