"""Build: from a checked recipe and its open models to a finished folder: plan, read, compute, write.

Memory is bounded by a chunk for each worker, whatever the models. Statistics are what the models' views hold; nothing is
made on the way and nothing handed over, which is the engine's part.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging import handover, lineage, methods, provenance
from merging.errors import MergeError
from merging.execution import Execution
from merging.methods import Method
from merging.model_card import Ingredient, model_card
from merging.output import refuse_full_disk, staged
from merging.plan import Plan, make_plan
from merging.processes import default_threads
from merging.progress import Progress
from merging.recipe import Recipe
from merging.sidefiles import copy_sidefiles
from merging.views import View

SHARD_SIZE = 5 * 10**9


@dataclass(frozen=True)
class Views:
    """The models of a merge, open.

    Attributes:
        models: of `recipe.merged(method)`, in that order.
        base: where the method uses one.
        donor: of config, tokenizer and all other files.
        all: each once.
    """

    models: list[View]
    base: View | None
    donor: View
    all: list[View]


@contextmanager
def open_views(recipe: Recipe, method: Method, out: Path, relative_to: Path | None = None) -> Iterator[Views]:
    """The models of a recipe, open for a while.

    Args:
        relative_to: a second place to look for relative model folders, after the working directory.

    Raises:
        CuveeError: a model that cannot be read; one that the output would replace.
    """
    opened: dict[str, View] = {}

    def view(ref: Any) -> View:
        if str(ref) not in opened:
            opened[str(ref)] = View.open(ref, relative_to)
        return opened[str(ref)]

    try:
        models = [view(source.model) for source in recipe.merged(method)]
        base = view(recipe.base_model) if recipe.base_model else None
        refuse_replacing(out, opened.values())
        yield Views(models, base if method.base != "none" else None, base or models[0], list(opened.values()))
    finally:
        for each in opened.values():
            each.close()


def build(
    recipe: Recipe,
    method: Method,
    views: Views,
    out: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    shard_size: int = SHARD_SIZE,
    backend: str = "auto",
    relative_to: Path | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda line: None,
    began: float | None = None,
) -> dict[str, Any]:
    """Writes the merged model, whole or not at all.

    Args:
        recipe: checked against the method.
        views: with their statistics, where the method works by them.
        out, seed, device, threads, force, dry_run, shard_size, backend, relative_to, progress, note: as `engine.merge`.
        began: when the work on it did, by `time.perf_counter`; None: now.

    Returns:
        What `cuvee merge --json` prints.

    Raises:
        CuveeError: of the kind that fits; nothing is written then.
    """
    began = time.perf_counter() if began is None else began
    plan = make_plan(recipe, method, views.models, views.base)
    for line in plan.notes:
        note(line)
    summary = {**_summary(recipe, plan, views, out), "seed": seed, "device": device}
    _check_space(out, plan)
    if dry_run:
        return {**summary, "dry_run": True, "seconds": since(began), "cuvee_version": lineage.cuvee_version()}
    with staged(out, force=force) as staging:
        execution = Execution(plan, seed, backend, device, threads or default_threads(), progress)
        written = execution.run(staging, shard_size)
        for line in execution.notes:
            note(line)
        inputs = [_input(view) for view in views.all]
        digests = {str(i["model"]): str(i["digest"]) for i in inputs}
        provenance.refuse_other_models(views.models, digests, views.base)
        if execution.owners:
            summary["owned"] = execution.owners.shares
        _add_side_files(staging, recipe, method, views, plan, digests, relative_to)
        summary["seconds"] = since(began)
        more = {"recipe": recipe.text, "inputs": inputs, "output": written, "shard_size": shard_size}
        write_lineage(staging, summary, more, relative_to)
    return {**summary, "digest": written, "cuvee_version": lineage.cuvee_version()}


def build_plain(recipe: Recipe, out: Path) -> None:
    """Merges by a method of ours that takes no statistics, without a word; what is loaded or measured next.

    Raises:
        CuveeError: as `build`.
    """
    method = methods.get(recipe.merge_method)
    recipe.check(method)
    with open_views(recipe, method, out) as views:
        build(recipe, method, views, out)


def refuse_replacing(out: Path, views: Iterable[View]) -> None:
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
    return {**place, "digest": view.digest(), "notes": list(view.notes), **provenance.described(view)}


def write_lineage(staging: Path, summary: dict[str, Any], more: dict[str, Any], relative_to: Path | None) -> None:
    """Puts cuvee.json beside the weights.

    Args:
        summary: what was merged. more: what it can be made again from.
    """
    folders = {
        "working_directory": os.getcwd(),
        "recipe_directory": str(relative_to.absolute()) if relative_to else None,
    }
    versions = lineage.versions("numpy", "numba", "torch", "xxhash")
    content = {k: v for k, v in summary.items() if k != "out"}
    lineage.write(staging, {**content, **more, **folders, "versions": versions})


def since(began: float) -> float:
    """Seconds, to the millisecond."""
    return round(time.perf_counter() - began, 3)


def _add_side_files(
    staging: Path,
    recipe: Recipe,
    method: Method,
    views: Views,
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
        title=f"{method.title} merge",
        method=method.title,
        ingredients=ingredients,
        base=base,
        donor=donor.path,
    )
    (staging / "README.md").write_text(card, encoding="utf-8")


def _summary(recipe: Recipe, plan: Plan, views: Views, out: Path) -> dict[str, Any]:
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
