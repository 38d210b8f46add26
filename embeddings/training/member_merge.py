"""The merge of a run: of its members, or of a model and its update, with weights that are given or searched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from embeddings.training.config import TrainingConfig
from embeddings.training.draws import Member, draw_members
from embeddings.training.members import open_backbone
from embeddings.training.options import Options
from embeddings.training.past import add_lineage
from embeddings.training.run_folder import BASE, MEMBERS, MODEL, SEARCH, WORK
from embeddings.training.search_settings import SIZE, SearchSettings
from merging import lineage
from merging.errors import CuveeError
from merging.loading import only_our_words
from merging.output import staged, write_whole
from merging.progress import Note, Work
from merging.sources import ModelRef

if TYPE_CHECKING:
    from merging.recipe import Recipe

_SEARCHED = "search.yml"
_LONGER = ("trials", "until")  # of a search: what only says when it ends


@dataclass(frozen=True)
class Merge:
    """What a run merges into its model.

    Attributes:
        models: folders, or hub ids.
        weights: one a model; None: the method takes none.
        base: a folder; None: the method needs none.
        inputs: a digest of each model.
    """

    method: str
    models: tuple[str, ...]
    weights: tuple[float, ...] | None
    inputs: tuple[str, ...] = ()
    base: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    def recipe(self) -> Recipe:
        from merging.recipe import Recipe

        weights = [None] * len(self.models) if self.weights is None else self.weights
        return Recipe(
            merge_method=self.method,
            models=[
                {"model": model} | ({} if weight is None else {"parameters": {"weight": weight}})
                for model, weight in zip(self.models, weights, strict=True)
            ],
            base_model=self.base,
            parameters=dict(self.parameters) or None,
            dtype="float32",
            where=self.where,
        )


def merge_members(
    config: TrainingConfig,
    members: Sequence[Member],
    run: Path,
    content: Mapping[str, Any],
    options: Options,
    progress: Work,
    note: Note,
) -> dict[str, Any] | None:
    """Merges the members into `run`/model, weighted by their size, equally or as a search finds; what that found."""
    merge = _of_members(config, members, run)
    if merge.base == str(run / BASE):
        _write_base(config, run / BASE)
    return merge_models(merge, config.search, run, config.seed, content, options, progress, note)


def merge_models(
    merge: Merge,
    search: SearchSettings | None,
    run: Path,
    seed: int,
    content: Mapping[str, Any],
    options: Options,
    progress: Work,
    note: Note,
) -> dict[str, Any] | None:
    """Merges models into `run`/model with more in its lineage, unless that was done already; what a search found."""
    if search is not None:
        return _search(merge, search, run, seed, content, options, progress, note)
    from merging import engine

    recipe = merge.recipe()
    made_by = {"recipe": recipe.text, "inputs": list(merge.inputs)}
    if _lineage(run / MODEL).get("merged_by") == made_by:
        return None
    scratch = run / WORK / "merged"
    progress("merge", 0, 1)
    engine.merge(recipe, scratch, seed=seed, force=scratch.exists())
    _put_in_place(scratch, run, {**content, "merged_by": made_by})
    progress("merge", 1, 1)
    return None


def refuse_recipe(config: TrainingConfig, run: Path) -> None:
    """Raises CuveeError for a merge that cannot be: before the members are trained, and not after."""
    from merging import methods

    entry = methods.known().get(config.merge.method)
    if config.bags and entry is not None:
        try:
            _of_members(config, draw_members(config, ()), run, made=False).recipe().check(entry)
        except CuveeError as error:
            where = config.merge.where or config.at("bags")
            raise CuveeError(error.what, where=where, mend=error.mend) from None


def look_ahead(config: TrainingConfig, note: Note) -> None:
    """Tells what a search of the members' weights will stumble over, or what makes little sense, before they are trained.

    Raises:
        CuveeError: see `SearchSettings.look`.
    """
    if config.search is not None and config.bags:
        base = ModelRef(config.model.path, revision=config.model.revision)
        with only_our_words():
            config.search.look(config.merge.method, config.merge.parameters, base, note)


def told_by(model: Path) -> str:
    """A digest of what we trained: of its cuvee.json, whose numbers no second training has."""
    return lineage.file_digest(model / lineage.FILE)


def _search(
    merge: Merge,
    settings: SearchSettings,
    run: Path,
    seed: int,
    content: Mapping[str, Any],
    options: Options,
    progress: Work,
    note: Note,
) -> dict[str, Any]:
    """Goes on with the search in `run`/search, or begins it, and puts its best model in place.

    A search of other models or settings is begun anew; one that only ends later goes on.
    """
    from search import recipes
    from search.run import search_run

    weights = merge.weights or (1.0,) * len(merge.models)
    shares = [weight / sum(weights) for weight in weights]
    text = settings.text(merge.method, merge.parameters, merge.models, shares, merge.base, seed)
    made_by = {"search": text, "inputs": list(merge.inputs)}
    past = _lineage(run / MODEL)
    if past.get("merged_by") == made_by:
        return dict(past["weights"])
    file, folder = run / _SEARCHED, run / SEARCH
    written = (
        f"# What `cuvee search` was asked, of {' '.join(merge.inputs)}; files are looked for in {settings.near}\n{text}"
    )
    if _without_end(file) != _without_end(written):
        shutil.rmtree(folder, ignore_errors=True)
    write_whole(file, written)
    device = "cpu" if options.ray else options.device
    result = search_run(settings.config(text), folder, device=device, progress=progress, note=note)
    found = {
        "folder": str(folder),
        **{key: result[key] for key in ("best", "scores", "trials", "failed")},
    }
    _put_in_place(folder / recipes.MODEL, run, {**content, "weights": found, "merged_by": made_by})
    return found


def _without_end(search: Path | str) -> tuple[str, Any]:
    """What tells a search from another: the line that names its models, and its settings but for when it ends."""
    if isinstance(search, Path):
        search = search.read_text("utf-8") if search.is_file() else "\n"
    first, _, text = search.partition("\n")
    said = yaml.safe_load(text) or {}
    return first, {key: value for key, value in said.items() if key not in _LONGER}


def _put_in_place(made: Path, run: Path, content: Mapping[str, Any]) -> None:
    """A merged model becomes the run's."""
    out, old = run / MODEL, run / WORK / "replaced"
    add_lineage(made, content)
    if out.exists():  # a folder that is removed file by file would be half a model to whoever comes in between
        shutil.rmtree(old, ignore_errors=True)
        old.parent.mkdir(exist_ok=True)
        out.rename(old)
    made.rename(out)


def _lineage(model: Path) -> dict[str, Any]:
    return dict(lineage.read(model).get("trained", {})) if model.exists() else {}


def _of_members(config: TrainingConfig, members: Sequence[Member], run: Path, made: bool = True) -> Merge:
    """The merge of a run's members; with `made`, of those that are there."""
    from merging import methods

    entry = methods.known().get(config.merge.method)  # None: mergekit's
    mean = sum(member.percent for member in members) / len(members)
    by_size = config.merge_weights == SIZE or config.search is not None  # which a search begins with
    weights = tuple(member.percent / mean if by_size else 1.0 for member in members)
    folders = [run / MEMBERS / member.name for member in members]
    return Merge(
        method=config.merge.method,
        models=tuple(map(str, folders)),
        weights=weights if entry is not None and "weight" in entry.parameters else None,
        inputs=tuple(map(told_by, folders)) if made else (),
        base=_base_folder(config, run) if entry is None or entry.base == "required" else None,
        parameters=config.merge.parameters,
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
