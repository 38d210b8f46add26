"""The statistics that a recipe names for its models: found, made on the way, and held to the model they were made from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from merging import lineage
from merging.errors import CuveeError, MergeError
from merging.methods import Method
from merging.recipe import Recipe
from merging.sources import ModelRef, Source, StatsRef
from merging.views import View

if TYPE_CHECKING:
    from merging.statistics import Statistics

Note = Callable[[str], None]


def attach(
    recipe: Recipe,
    method: Method,
    models: Sequence[View],
    out: Path,
    *,
    relative_to: Path | None,
    seed: int,
    device: str,
    trust_remote_code: bool = False,
    dry_run: bool = False,
    note: Note = lambda line: None,
) -> None:
    """Gives each model its statistics, if the method works by them.

    What the recipe names data for is computed into `OUT.stats`, and found there by the next merge; not so in a dry run.

    Args:
        models: the views of `recipe.merged(method)`, in that order.
        relative_to: a second place to look for relative paths, after the working directory.
        seed, device: of a computation, where the recipe says no other.

    Raises:
        CuveeError: no such statistics, of another kind than the method takes, or of another model.
    """
    if not recipe.wants_statistics(method):
        return
    for source, view in zip(recipe.merged(method), models, strict=True):
        assert source.stats is not None  # or the recipe would not have passed its check
        if source.stats.path is None:
            defaults = {"kind": method.statistics[0], "seed": seed, "device": device}
            options = {**defaults, **source.stats.options}
            more = {"dry_run": dry_run, "trust_remote_code": trust_remote_code, "note": note}
            folder = _computed(source, view, options, Path(f"{out}.stats"), relative_to, more)
            if folder is None:
                continue
        else:
            folder = _opened(source.stats, relative_to)
        _refuse_mismatch(folder, source, view, method)
        view.statistics = folder


def refuse_other_models(models: Sequence[View], digests: Mapping[str, str]) -> None:
    """The certain check, once every byte of the models has been read: fingerprints may agree by chance.

    Args:
        digests: of the models' weights, by reference.

    Raises:
        MergeError: statistics of other weights.
    """
    for view in models:
        if view.statistics and view.statistics.model_digest != digests[str(view.ref)]:
            raise _other_model(view.statistics, view, str(view.statistics.path))


def described(view: View) -> dict[str, Any]:
    """What a lineage says of a model's statistics; empty where it has none."""
    known = view.statistics
    if known is None:
        return {}
    content = {
        "path": str(known.path.absolute()),
        "kind": known.kind,
        "examples": known.examples,
        "digest": known.digest,
    }
    return {"statistics": content}


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
) -> Statistics | None:
    """Statistics of earlier merges into the same output, if nothing that they depend on has changed; else made now."""
    from merging.statistics import collect, fingerprint, open_statistics

    assert source.stats is not None
    data = _located(options.pop("data"), relative_to)
    if not data.is_file():
        raise CuveeError("no such file of texts", where=f"{source.stats.where}: {data}", mend="name a file in 'data'")
    key = json.dumps([fingerprint(view), lineage.file_digest(data), options], sort_keys=True)
    name = re.sub(r"[^\w.-]+", "-", Path(view.ref.path).name)[:60] or "model"
    folder = cache / f"{name}-{xxhash.xxh3_64_hexdigest(key.encode())}"
    if folder.is_dir():
        return open_statistics(folder)
    kind, note = options.pop("kind"), more["note"]
    found = ModelRef(str(view.checkpoint.path), adapter=str(view.adapter.file.parent) if view.adapter else None)
    if not more["dry_run"]:
        note(f"computing {kind} statistics of {source.model} on {data} into {folder}")
    collect(found, data, kind, folder, **options, **more)
    return None if more["dry_run"] else open_statistics(folder)


def _refuse_mismatch(folder: Statistics, source: Source, view: View, method: Method) -> None:
    from merging.statistics import fingerprint

    where = source.stats.where if source.stats else ""
    if folder.kind not in method.statistics:
        takes = " or ".join(method.statistics)
        raise MergeError(
            f"'{method.name}' takes {takes}, and {folder.path} holds {folder.kind}",
            where=where,
            mend=f"make them by 'cuvee stats --kind {method.statistics[0]}'",
        )
    if folder.fingerprint != fingerprint(view):
        raise _other_model(folder, view, where)


def _other_model(folder: Statistics, view: View, where: str) -> MergeError:
    made_from = folder.manifest["model"].get("ref", "another model")
    return MergeError(
        f"the statistics were made from other weights ({made_from}) than those of {view.ref}",
        where=where,
        mend="make them anew by 'cuvee stats' from the model itself",
    )
