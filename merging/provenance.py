"""Provenance: whether a model's statistics were made from that very model, and what a lineage says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from merging.errors import MergeError
from merging.views import View

if TYPE_CHECKING:
    from merging.statistics.folder import Statistics


def refuse_other_models(models: Sequence[View], digests: Mapping[str, str], base: View | None = None) -> None:
    """The certain check, once every byte of the models has been read: fingerprints may agree by chance.

    Args:
        digests: of the models' weights and the base's, by reference.

    Raises:
        MergeError: statistics of other weights.
    """
    for view in models:
        known = view.statistics
        if known and known.model_digest != digests[str(view.ref)]:
            raise other_model(known, view, str(known.path))
        if known and known.base and base and known.base["digest"] != digests[str(base.ref)]:
            raise other_base(known, base, str(known.path))


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
        **({} if known.scale is None else {"scale": known.scale}),
    }
    return {"statistics": content}


def other_base(folder: Statistics, base: View, where: str) -> MergeError:
    """What to tell of statistics of a model on another base."""
    made_from = (folder.base or {}).get("ref", "another model")
    return MergeError(
        f"the statistics were made with another base ({made_from}) than {base.ref}",
        where=where,
        mend="make them anew by 'cuvee stats' with this base",
    )


def other_model(folder: Statistics, view: View, where: str) -> MergeError:
    """What to tell of statistics of other weights."""
    made_from = folder.manifest["model"].get("ref", "another model")
    return MergeError(
        f"the statistics were made from other weights ({made_from}) than those of {view.ref}",
        where=where,
        mend="make them anew by 'cuvee stats' from the model itself",
    )
