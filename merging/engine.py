"""The engine: runs whatever recipe: builds it, with the statistics that it asks for, or hands it over to mergekit."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merging import handover, lineage, methods, recipe_statistics
from merging.build import SHARD_SIZE, build, open_views, refuse_replacing, since, write_lineage
from merging.checkpoint import Checkpoint
from merging.errors import CheckpointError, MergeError
from merging.mergekit_recipe import is_mixture, references
from merging.methods import Method
from merging.model_card import Ingredient, model_card
from merging.output import refuse_existing, staged
from merging.progress import Progress
from merging.recipe import Recipe, read_file
from merging.views import View


def merge(
    recipe: Recipe,
    out: str | Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    shard_size: int = SHARD_SIZE,
    backend: str = "auto",
    trust_remote_code: bool = False,
    relative_to: Path | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Runs a recipe and writes the merged model, whole or not at all.

    Args:
        out: the folder to make.
        seed: of every random draw; same seed, same bytes, whatever the threads.
        device: "cpu" or a torch device.
        threads: workers; by default one for each core this process may use.
        force: replace an earlier output.
        dry_run: plan and check only.
        shard_size: bytes in a file at most.
        backend: kernels, see `merging.kernels.load`.
        trust_remote_code: for what is handed over to mergekit, which loads configs.
        relative_to: a second place to look for relative model folders, after the working directory.
        progress: called with bytes done and in all, from any worker.
        note: called with each line that the user should know.

    Returns:
        What `cuvee merge --json` prints.

    Raises:
        CuveeError: of the kind that fits; nothing is written then.
    """
    began = time.perf_counter()
    out = Path(out)
    refuse_existing(out, force=force)
    entry = _method(recipe)
    reason = handover.needs_mergekit(recipe, entry is not None, relative_to)
    if reason is not None and entry is not None and not handover.has_method(entry.name):
        raise MergeError(
            f"mergekit would have to run this merge, because {reason}, and has no '{entry.name}'",
            where=recipe.at("merge_method"),
            mend="merge whole models of one vocabulary",
        )
    for line in recipe.check(entry, mergekit_only=reason is not None):
        note(line)
    if entry is None or reason is not None:
        kept = {"seed": seed, "device": device, "shard_size": shard_size}
        kept |= {"threads": threads, "trust_remote_code": trust_remote_code}
        return _hand_over(recipe.text, recipe.where, out, str(reason), relative_to, force, dry_run, note, kept)
    with open_views(recipe, entry, out, relative_to) as views:
        recipe_statistics.attach(
            recipe,
            entry,
            views.models,
            out,
            base=views.base,
            relative_to=relative_to,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
            dry_run=dry_run,
            note=note,
        )
        recipe_statistics.refuse_other_scales(recipe, entry, views.models)
        return build(
            recipe, entry, views, out, seed=seed, device=device, threads=threads, force=force, dry_run=dry_run,
            shard_size=shard_size, backend=backend, relative_to=relative_to, progress=progress, note=note, began=began,
        )  # fmt: skip


def merge_text(text: str, out: str | Path, *, where: str = "recipe", **options: Any) -> dict[str, Any]:
    """As `merge`, from a recipe's YAML; mergekit-moe's schema is understood too, and handed over.

    Args:
        where: the recipe's file name, for errors.
        options: of `merge`.
    """
    if not is_mixture(text, where):
        return merge(Recipe.parse(text, where), out, **options)
    wanted = ("seed", "device", "shard_size", "threads", "trust_remote_code")
    kept = {"seed": 0, "device": "cpu", "shard_size": SHARD_SIZE, **{k: options[k] for k in wanted if k in options}}
    force, dry_run = options.get("force", False), options.get("dry_run", False)
    refuse_existing(Path(out), force=force)
    note = options.get("note", lambda line: None)
    return _hand_over(
        text,
        where,
        Path(out),
        "a mixture of experts is its own",
        options.get("relative_to"),
        force,
        dry_run,
        note,
        kept,
    )


def merge_file(recipe: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """As `merge_text`, from a recipe's file; relative model folders are also looked for beside it."""
    recipe = Path(recipe)
    return merge_text(read_file(recipe), out, where=str(recipe), **{"relative_to": recipe.absolute().parent, **options})


def remake(file: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Makes an output again from its lineage, byte for byte, after checking that its inputs are still the same.

    Args:
        file: cuvee.json, or the folder it lies in.
        options: of `merge`; by default those of the first time.

    Raises:
        CuveeError: no merge's lineage, or an input has changed since.
    """
    past = lineage.read_merge(Path(file))
    folder = _unchanged(past, str(file))
    options = {"seed": past["seed"], "device": past["device"], "shard_size": past["shard_size"], **options}
    result = merge_text(past["recipe"], out, where=str(file), relative_to=folder, **options)
    if "digest" in result and result["digest"] != past["output"] and (note := options.get("note")):
        note(f"the weights differ from the first time: {result['digest']}, then {past['output']}")
    return result


def _unchanged(past: dict[str, Any], where: str) -> Path:
    """The folder that relative names of models count from, the inputs found there and the same as they were.

    Raises:
        CuveeError: an input cannot be found any more, or has changed.
    """
    digests = {str(entry["model"]): entry["digest"] for entry in past["inputs"]}
    folders = [Path(past["working_directory"]), Path(past.get("recipe_directory") or past["working_directory"])]
    for folder in folders:
        try:
            for ref in references(past["recipe"], where, folder):
                view = View.open(ref, folder)
                if digests.get(str(ref)) not in (None, view.digest()):
                    raise MergeError("has changed since that merge", where=str(ref), mend="restore it, or merge anew")
                view.checkpoint.close()
            if any(entry.get("statistics") for entry in past["inputs"]):
                recipe_statistics.refuse_changed(Recipe.parse(past["recipe"], where), past["inputs"], folder)
            return folder
        except CheckpointError:
            if folder is folders[-1]:
                raise
    raise AssertionError


def _hand_over(
    text: str,
    where: str,
    out: Path,
    reason: str,
    relative_to: Path | None,
    force: bool,
    dry_run: bool,
    note: Callable[[str], None],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Lets mergekit run the whole recipe, and finishes its output like any of ours."""
    began = time.perf_counter()
    views = [View.open(ref, relative_to) for ref in references(text, where, relative_to)]
    refuse_replacing(out, views)
    note(f"handed over to mergekit: {reason}")
    method = "moe" if is_mixture(text, where) else Recipe.parse(text, where).merge_method
    summary: dict[str, Any] = {
        "command": "merge",
        "out": str(out),
        "method": method,
        "models": [str(view.ref) for view in views],
        "base": None,
        "bytes_read": sum(info.nbytes for view in views for info in view.tensors.values()),
        "seed": options["seed"],
        "device": options["device"],
        "by": "mergekit",
    }
    if dry_run:
        return {**summary, "dry_run": True, "seconds": since(began), "cuvee_version": lineage.cuvee_version()}
    with staged(out, force=force) as staging:
        for line in handover.run(text, staging, where=where, relative_to=relative_to, **options):
            note(line)
        for line in handover.finish(staging, views[0].checkpoint):
            note(line)
        with Checkpoint.open(staging) as made:
            summary |= {
                "tensors": len(made.tensors),
                "parameters": sum(info.numel for info in made.tensors.values()),
                "bytes_written": sum(info.nbytes for info in made.tensors.values()),
            }
            written = lineage.weights_digest(made)
        inputs = [{"model": str(v.ref), "path": str(v.checkpoint.path), "digest": v.digest()} for v in views]
        ingredients = [Ingredient(i["model"], Path(i["path"]), i["digest"]) for i in inputs]
        donor = views[0].checkpoint.path
        card = model_card(
            text, title=f"{method} merge", method=method, ingredients=ingredients, donor=donor, merged_by="mergekit"
        )
        (staging / "README.md").write_text(card, encoding="utf-8")
        summary["seconds"] = since(began)
        more = {"recipe": text, "inputs": inputs, "output": written, "shard_size": options["shard_size"]}
        write_lineage(staging, summary, more, relative_to)
    for view in views:
        view.checkpoint.close()
    return {**summary, "digest": written, "cuvee_version": lineage.cuvee_version()}


def _method(recipe: Recipe) -> Method | None:
    """Our method of that name; None where mergekit may have it."""
    try:
        return methods.get(recipe.merge_method)
    except MergeError:
        if handover.has_method(recipe.merge_method):
            return None
        raise
