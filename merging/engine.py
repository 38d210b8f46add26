"""The engine: runs a recipe. Plan, read, compute, write; memory bounded by a chunk for each worker, whatever the models."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging import handover, lineage, methods, recipe_statistics
from merging.checkpoint import Checkpoint
from merging.errors import CheckpointError, MergeError
from merging.execution import Execution, Progress
from merging.mergekit_recipe import is_mixture, references
from merging.methods import Method
from merging.model_card import Ingredient, model_card
from merging.output import refuse_existing, refuse_full_disk, staged
from merging.plan import Plan, make_plan
from merging.recipe import Recipe, read_file
from merging.sidefiles import copy_sidefiles
from merging.views import View

SHARD_SIZE = 5 * 10**9


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
    options = {"seed": seed, "device": device}
    if entry is None or reason is not None:
        kept = {"shard_size": shard_size, "threads": threads, "trust_remote_code": trust_remote_code}
        return _hand_over(
            recipe.text, recipe.where, out, str(reason), relative_to, force, dry_run, note, {**options, **kept}
        )
    views = _open(recipe, entry, out, relative_to)
    try:
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
        plan = make_plan(recipe, entry, views.models, views.base)
        for line in plan.notes:
            note(line)
        summary = {**_summary(recipe, plan, views, out), **options}
        _check_space(out, plan)
        if dry_run:
            return {**summary, "dry_run": True, "seconds": _since(began), "cuvee_version": lineage.cuvee_version()}
        with staged(out, force=force) as staging:
            execution = Execution(plan, seed, backend, device, threads or default_threads(), progress)
            written = execution.run(staging, shard_size)
            for line in execution.notes:
                note(line)
            inputs = [_input(view) for view in views.all]
            digests = {str(i["model"]): str(i["digest"]) for i in inputs}
            recipe_statistics.refuse_other_models(views.models, digests, views.base)
            if execution.owners:
                summary["owned"] = execution.owners.shares
            _add_side_files(staging, recipe, entry, views, plan, digests, relative_to)
            summary["seconds"] = _since(began)
            more = {"recipe": recipe.text, "inputs": inputs, "output": written, "shard_size": shard_size}
            _write_lineage(staging, summary, more, relative_to)
        return {**summary, "digest": written, "cuvee_version": lineage.cuvee_version()}
    finally:
        for view in views.all:
            view.close()


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


def default_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Views:
    models: list[View]
    base: View | None  # where the method uses one
    donor: View  # of config, tokenizer and all other files
    all: list[View]


def _open(recipe: Recipe, entry: Method, out: Path, relative_to: Path | None) -> _Views:
    opened: dict[str, View] = {}

    def view(ref: Any) -> View:
        if str(ref) not in opened:
            opened[str(ref)] = View.open(ref, relative_to)
        return opened[str(ref)]

    models = [view(source.model) for source in recipe.merged(entry)]
    base = view(recipe.base_model) if recipe.base_model else None
    _refuse_replacing(out, opened.values())
    return _Views(models, base if entry.base != "none" else None, base or models[0], list(opened.values()))


def _refuse_replacing(out: Path, views: Iterable[View]) -> None:
    """Raises MergeError where an input lies at `out` or in it, by whatever name."""
    real = Path(os.path.realpath(out))
    folders = [
        f for view in views for f in (view.checkpoint.path, *([view.adapter.file.parent] if view.adapter else []))
    ]
    if any(real in (folder.resolve(), *folder.resolve().parents) for folder in folders):
        raise MergeError("the output would replace an input", where=str(out), mend="choose another folder")


def _input(view: View) -> dict[str, Any]:
    """What a lineage says of a model that went in."""
    place = {"model": str(view.ref), "path": str(view.checkpoint.path)}
    return {**place, "digest": view.digest(), "notes": list(view.notes), **recipe_statistics.described(view)}


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
    _refuse_replacing(out, views)
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
        return {**summary, "dry_run": True, "seconds": _since(began), "cuvee_version": lineage.cuvee_version()}
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
        summary["seconds"] = _since(began)
        more = {"recipe": text, "inputs": inputs, "output": written, "shard_size": options["shard_size"]}
        _write_lineage(staging, summary, more, relative_to)
    for view in views:
        view.checkpoint.close()
    return {**summary, "digest": written, "cuvee_version": lineage.cuvee_version()}


def _add_side_files(
    staging: Path,
    recipe: Recipe,
    entry: Method,
    views: _Views,
    plan: Plan,
    digests: dict[str, str],
    relative_to: Path | None,
) -> None:
    donor = views.donor.checkpoint
    dtypes = {step.dtype for step in plan.steps if step.action == "merge"}
    copy_sidefiles(
        donor,
        staging,
        out_dtype=dtypes.pop() if len(dtypes) == 1 else None,
        tokenizer_from=handover.tokenizer_donor(recipe, relative_to),
        chat_template=recipe.chat_template,
        inputs=[view.checkpoint.path for view in views.all],
        weights=[str(file.relative_to(donor.path)) for file in donor.weight_files],
    )
    base = (
        Ingredient(str(views.base.ref), views.base.checkpoint.path, digests[str(views.base.ref)])
        if views.base
        else None
    )
    ingredients = [Ingredient(str(v.ref), v.checkpoint.path, digests[str(v.ref)]) for v in views.models]
    card = model_card(
        recipe.text,
        title=f"{entry.title} merge",
        method=entry.title,
        ingredients=ingredients,
        base=base,
        donor=donor.path,
    )
    (staging / "README.md").write_text(card, encoding="utf-8")


def _write_lineage(staging: Path, summary: dict[str, Any], more: dict[str, Any], relative_to: Path | None) -> None:
    folders = {
        "working_directory": os.getcwd(),
        "recipe_directory": str(relative_to.absolute()) if relative_to else None,
    }
    versions = lineage.versions("numpy", "numba", "torch", "xxhash")
    content = {k: v for k, v in summary.items() if k != "out"}
    lineage.write(staging, {**content, **more, **folders, "versions": versions})


def _summary(recipe: Recipe, plan: Plan, views: _Views, out: Path) -> dict[str, Any]:
    return {
        "command": "merge",
        "out": str(out),
        "method": recipe.merge_method,
        "models": [str(view.ref) for view in views.models],
        "base": str(views.base.ref) if views.base else None,
        "tensors": len(plan.steps),
        "parameters": sum(math.prod(step.shape) for step in plan.steps),
        "bytes_read": sum(step.nbytes - step.written for step in plan.steps),
        "bytes_written": sum(step.written for step in plan.steps),
    }


def _check_space(out: Path, plan: Plan) -> None:
    needed = sum(step.written for step in plan.steps) + sum(math.prod(shape) for _, shape in plan.owned)
    refuse_full_disk(out, needed, "the result takes", "free some, choose another disk, or set a smaller 'out_dtype'")


def _method(recipe: Recipe) -> Method | None:
    """Our method of that name; None where mergekit may have it."""
    try:
        return methods.get(recipe.merge_method)
    except MergeError:
        if handover.has_method(recipe.merge_method):
            return None
        raise


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 3)
