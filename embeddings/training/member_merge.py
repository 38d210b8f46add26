"""The merge of a run's members into its model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embeddings.training.config import TrainingConfig
from embeddings.training.draws import Member, draw_members
from embeddings.training.members import open_backbone
from embeddings.training.past import add_lineage
from embeddings.training.run_folder import BASE, MEMBERS, MODEL, WORK
from merging import lineage
from merging.errors import CuveeError
from merging.output import staged
from merging.progress import Work

if TYPE_CHECKING:
    from merging.recipe import Recipe


def merge_members(
    config: TrainingConfig, members: Sequence[Member], run: Path, content: Mapping[str, Any], progress: Work
) -> None:
    """Merges the members into `run`/model, weighted by their size or equally."""
    recipe = _members_recipe(config, members, run)
    if recipe.base_model is not None and recipe.base_model.path == str(run / BASE):
        _write_base(config, run / BASE)
    merge_models(
        recipe, [told_by(run / MEMBERS / member.name) for member in members], run, config.seed, content, progress
    )


def merge_models(
    recipe: Recipe, inputs: Sequence[str], run: Path, seed: int, content: Mapping[str, Any], progress: Work
) -> None:
    """Merges models into `run`/model with more in its lineage, unless that was done already.

    Args:
        inputs: a digest of each model.
    """
    from merging.engine import merge

    out, scratch, old = run / MODEL, run / WORK / "merged", run / WORK / "replaced"
    made_by = {"recipe": recipe.text, "inputs": list(inputs)}
    if out.exists() and lineage.read(out).get("trained", {}).get("merged_by") == made_by:
        return
    progress("merge", 0, 1)
    merge(recipe, scratch, seed=seed, force=scratch.exists())
    add_lineage(scratch, {**content, "merged_by": made_by})
    if out.exists():  # a folder that is removed file by file would be half a model to whoever comes in between
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    scratch.rename(out)
    progress("merge", 1, 1)


def refuse_recipe(config: TrainingConfig, run: Path) -> None:
    """Raises CuveeError for a merge that cannot be: before the members are trained, and not after."""
    from merging import methods

    entry = methods.known().get(config.merge.method)
    if config.bags and entry is not None:
        try:
            _members_recipe(config, draw_members(config, ()), run).check(entry)
        except CuveeError as error:
            where = config.merge.where or config.at("bags")
            raise CuveeError(error.what, where=where, mend=error.mend) from None


def told_by(model: Path) -> str:
    """A digest of what we trained: of its cuvee.json, whose numbers no second training has."""
    return lineage.file_digest(model / lineage.FILE)


def _members_recipe(config: TrainingConfig, members: Sequence[Member], run: Path) -> Recipe:
    from merging import methods
    from merging.recipe import Recipe

    entry = methods.known().get(config.merge.method)  # None: mergekit's
    mean = sum(member.percent for member in members) / len(members)
    weights = [member.percent / mean if config.merge_weights == "size" else 1.0 for member in members]
    takes_weight = entry is not None and "weight" in entry.parameters
    return Recipe(
        merge_method=config.merge.method,
        models=[
            {"model": str(run / MEMBERS / member.name)} | ({"parameters": {"weight": weight}} if takes_weight else {})
            for member, weight in zip(members, weights, strict=True)
        ],
        base_model=_base_folder(config, run) if entry is None or entry.base == "required" else None,
        parameters=dict(config.merge.parameters) or None,
        dtype="float32",
        where=config.merge.where or config.where,
    )


def _base_folder(config: TrainingConfig, run: Path) -> str:
    """The base as a sentence-transformers folder: a merge takes its tokenizer and modules from there."""
    path = config.model.path
    return path if os.path.isfile(os.path.join(path, "modules.json")) else str(run / BASE)


def _write_base(config: TrainingConfig, folder: Path) -> None:
    if not folder.exists():
        with staged(folder) as staging:
            open_backbone(config, "cpu", 0).save(staging)
            lineage.write(staging, {"command": "train", "base": config.model.path})
