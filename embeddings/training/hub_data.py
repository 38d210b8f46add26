"""Data sets of the hub: a run reads one revision, the one that it found first, and tells when the hub has another by now.

A local folder that `datasets.load_dataset` reads is no such data set: its files have digests like all others.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from embeddings.training.data_settings import DataSettings
from merging.errors import CuveeError
from merging.output import write_whole

_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubRevisions:
    """The revisions that a run reads, in a JSON file.

    Args:
        fresh: those of an earlier run do not count: what the hub has now is read. They stay for who reads other data sets.
    """

    def __init__(self, file: Path, *, fresh: bool = False) -> None:
        self._file = file
        self._known: dict[str, str] = {}
        if file.is_file():
            try:
                self._known = dict(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                self._known = {}  # damaged: what the data say then is compared with what was trained on
        self._counts = set() if fresh else set(self._known)

    def pinned(self, settings: DataSettings) -> tuple[DataSettings, tuple[str, ...]]:
        """The settings with the revision that the run reads, and a note where the hub has another one by now.

        Raises:
            CuveeError: it is read for the first time, and neither the hub nor the cache of `datasets` has it.
        """
        if settings.hub is None or os.path.isdir(settings.hub) or _COMMIT.fullmatch(settings.revision or ""):
            return settings, ()
        name = settings.hub + (f"@{settings.revision}" if settings.revision else "")
        known = self._known.get(name) if name in self._counts else None
        if known is None:
            known = self._known[name] = _revision(settings)
            self._counts.add(name)
            write_whole(self._file, json.dumps(self._known))
            return replace(settings, revision=known), ()
        try:
            now = _revision(settings)
        except CuveeError:  # the run has what it needs, or will say what it lacks
            now = known
        moved = (
            f"{name} has changed on the hub ({_short(known)} is {_short(now)} now): this run goes on with what it began"
        )
        return replace(settings, revision=known), (moved,) * (now != known)


def rows(settings: DataSettings, *, decoded: bool = True) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row of a hub id or a local folder, and the place where it stands.

    Args:
        decoded: images as Pillow's; else as `{"bytes": …, "path": …}`, so that a broken one breaks its own row alone.

    Raises:
        CuveeError: it cannot be loaded, or, for want of a connection, only at another revision.
    """
    number = 0
    table = _table(settings)
    for batch in (table if decoded else _undecoded(table)).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield f"{_name(settings)}, {settings.split}, row {number}", dict(zip(batch, values, strict=True))


def _undecoded(table: Any) -> Any:
    import datasets

    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def _table(settings: DataSettings) -> Any:
    """The `datasets.Dataset`."""
    import datasets

    wanted = _loadable(settings.revision)
    if wanted is not None and _COMMIT.fullmatch(wanted):
        found = _revision(settings)
        if found != wanted:  # without a connection the library takes what it has
            what = f"of {_name(settings)} there is {_short(found)} in the cache, not {_short(wanted)}"
            raise CuveeError(what, where=settings.where, mend="run it once with a connection")
    with _told(settings):
        return datasets.load_dataset(settings.hub, settings.subset, split=settings.split, revision=wanted)


def _revision(settings: DataSettings) -> str:
    """The commit that the hub has now, without it that of the newest copy in the cache; else a fingerprint of the files.

    Raises:
        CuveeError: there is no such data set.
    """
    import datasets

    with _told(settings):
        revision = _loadable(settings.revision)
        return str(datasets.load_dataset_builder(settings.hub, settings.subset, revision=revision).hash)


def _loadable(revision: str | None) -> str | None:
    """Without the fingerprints that `datasets` gives to what has no commits."""
    return None if revision is not None and re.fullmatch(r"[0-9a-f]{16}", revision) else revision


@contextmanager
def _told(settings: DataSettings) -> Iterator[None]:
    """Turns whatever the library raises into one line, and keeps its bars and remarks off the terminal."""
    import datasets

    logger, bars = logging.getLogger("datasets"), datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    except Exception as error:  # whatever the hub, its libraries and a stranger's files can raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CuveeError(f"{_name(settings)} cannot be loaded: {reason:.300}", where=settings.where) from error
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _name(settings: DataSettings) -> str:
    return f"{settings.hub} ({settings.subset})" if settings.subset else str(settings.hub)


def _short(revision: str) -> str:
    return revision[:12]
