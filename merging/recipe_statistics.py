"""The statistics that a recipe names for its models: found, made on the way, and held to the model they were made from."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from merging import lineage
from merging.errors import CuveeError, MergeError
from merging.methods import Method
from merging.progress import Note
from merging.provenance import other_base, other_model
from merging.recipe import Recipe
from merging.sources import ModelRef, Source, StatsRef
from merging.views import View, fingerprint

if TYPE_CHECKING:
    from merging.statistics.folder import Statistics


def attach(
    recipe: Recipe,
    method: Method,
    models: Sequence[View],
    out: Path,
    *,
    base: View | None = None,
    relative_to: Path | None,
    seed: int,
    device: str,
    trust_remote_code: bool = False,
    dry_run: bool = False,
    note: Note = lambda line: None,
) -> None:
    """Gives each model its statistics, if the method works by them.

    What the recipe names data for is computed into `OUT.stats`, and found there by the next merge; not so in a dry run.
    `refuse_other_scales` says whether they belong to these coefficients.

    Args:
        models: the views of `recipe.merged(method)`, in that order.
        base: the base's view if the method uses one.
        relative_to: a second place to look for relative paths, after the working directory.
        seed, device: of a computation, where the recipe says no other.

    Raises:
        CuveeError: no such statistics, of another kind than the method takes, or of another model.
    """
    if not recipe.wants_statistics(method):
        return
    merged = recipe.merged(method)
    for source, view, scale in zip(merged, models, recipe.scales(method) or [None] * len(merged), strict=True):
        assert source.stats is not None  # or the recipe would not have passed its check
        if source.stats.path is None:
            options = options_of(source.stats, method, seed=seed, device=device)
            more = {"dry_run": dry_run, "trust_remote_code": trust_remote_code, "note": note}
            origin = None if base is None or scale is None else (base, scale)
            folder = _computed(source, view, options, Path(f"{out}.stats"), relative_to, more, origin)
            if folder is None:
                continue
        else:
            folder = _opened(source.stats, relative_to)
        _refuse_mismatch(folder, source, view, method, base)
        view.statistics = folder


def options_of(stats: StatsRef, method: Method, *, seed: int, device: str) -> dict[str, Any]:
    """Arguments of `cuvee stats` for statistics that a recipe names data for.

    Args:
        seed, device: where the recipe says no other.
    """
    defaults: dict[str, Any] = {"kind": method.statistics[0], "seed": seed, "device": device}
    if method.statistics_examples is not None:
        defaults["examples"] = method.statistics_examples
    return {**defaults, **stats.options}


def refuse_other_scales(recipe: Recipe, method: Method, models: Sequence[View]) -> None:
    """Statistics of models that are scaled back to their base hold for that scale only.

    Args:
        models: with their statistics, in the order of `recipe.merged(method)`.

    Raises:
        MergeError: they were taken at another scale than the recipe's.
    """
    if not recipe.wants_statistics(method):
        return
    merged = recipe.merged(method)
    for source, view, scale in zip(merged, models, recipe.scales(method) or [None] * len(merged), strict=True):
        known = view.statistics
        if known is None or _same_scale(known.scale, scale):
            continue
        where = f"{source.stats.where or known.path}" if source.stats else str(known.path)
        taken = "of the model itself" if known.scale is None else f"at {known.scale:g} of its task vector"
        data = "write 'stats: {data: FILE}', which takes them at whatever scale"
        if scale is None:
            raise MergeError(f"the statistics were taken {taken}, not of the model itself", where=where, mend=data)
        name = method.statistics_at[0] if method.statistics_at else ""
        what = f"the statistics were taken {taken}, and '{name}' is {scale:g}"
        raise MergeError(what, where=where, mend=f"{data}, or make them by --base BASE --scale {scale:g}")


def _same_scale(taken: float | None, wanted: float | None) -> bool:
    """The model itself is that at scale 1."""
    return taken == wanted or math.isclose(1.0 if taken is None else taken, 1.0 if wanted is None else wanted)


def refuse_changed(recipe: Recipe, past: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Raises CuveeError where a folder of statistics is not what it was in a past merge.

    Args:
        past: the lineage's inputs.
        folder: that relative paths count from.
    """
    digests = {str(entry["model"]): entry["statistics"].get("digest") for entry in past if entry.get("statistics")}
    for source in recipe.models:
        known = digests.get(str(source.model))
        if known is None or source.stats is None or source.stats.path is None:
            continue
        if _opened(source.stats, folder).digest != known:
            mend = "restore them, or merge anew"
            raise MergeError("statistics have changed since that merge", where=source.stats.path, mend=mend)


def _located(path: str, relative_to: Path | None) -> Path:
    home = Path(os.path.expanduser(path))
    beside = relative_to / home if relative_to else home
    return beside if not home.exists() and beside.exists() else home


def _opened(stats: StatsRef, relative_to: Path | None) -> Statistics:
    from merging.statistics import open_statistics

    assert stats.path is not None
    try:
        return open_statistics(_located(stats.path, relative_to))
    except CuveeError as error:
        raise type(error)(f"{error.where}: {error.what}", where=stats.where, mend=error.mend) from None


def _computed(
    source: Source,
    view: View,
    options: dict[str, Any],
    cache: Path,
    relative_to: Path | None,
    more: dict[str, Any],
    origin: tuple[View, float] | None,
) -> Statistics | None:
    """Statistics of earlier merges into the same output, if nothing that they depend on has changed; else made now.

    Args:
        origin: base and scale, for statistics of the model scaled back to it; those of earlier scales go.
    """
    from merging.statistics import collect, open_statistics

    assert source.stats is not None
    data = _located(options.pop("data"), relative_to)
    if not data.is_file():
        raise CuveeError(f"no such file of texts: {data}", where=source.stats.where, mend="name a file in 'data'")
    # Not the device: it changes rounding at most, and processes side by side have one each.
    asked = {name: value for name, value in options.items() if name != "device"}
    parts = [fingerprint(view), lineage.file_digest(data), asked, *([fingerprint(origin[0])] if origin else [])]
    key = json.dumps(parts, sort_keys=True)
    name = re.sub(r"[^\w.-]+", "-", Path(view.ref.path).name)[:60] or "model"
    name = f"{name}-{xxhash.xxh3_64_hexdigest(key.encode())}"
    folder = cache / (f"{name}-at-{origin[1]!r}" if origin else name)
    if folder.is_dir():
        return open_statistics(folder)
    kind, note = options.pop("kind"), more["note"]
    if origin:
        options |= {"base": _found(origin[0]), "scale": origin[1]}
    if not more["dry_run"]:
        for past in cache.glob(f"{name}-at-*") if origin else ():
            shutil.rmtree(past, ignore_errors=True)
        at = f" at {origin[1]:g}" if origin else ""
        note(f"computing {kind} statistics of {source.model}{at} on {data} into {folder}")
    collect(_found(view), data, kind, folder, **options, **more)
    return None if more["dry_run"] else open_statistics(folder)


def _found(view: View) -> ModelRef:
    """The model where it was found."""
    return ModelRef(str(view.checkpoint.path), adapter=str(view.adapter.file.parent) if view.adapter else None)


def _refuse_mismatch(folder: Statistics, source: Source, view: View, method: Method, base: View | None) -> None:
    where = source.stats.where if source.stats else ""
    if folder.kind not in method.statistics:
        takes = " or ".join(method.statistics)
        raise MergeError(
            f"'{method.name}' takes {takes}, and {folder.path} holds {folder.kind}",
            where=where,
            mend=f"make them by 'cuvee stats --kind {method.statistics[0]}'",
        )
    if folder.fingerprint != fingerprint(view):
        raise other_model(folder, view, where)
    if folder.base and base and folder.base["fingerprint"] != fingerprint(base):
        raise other_base(folder, base, where)
