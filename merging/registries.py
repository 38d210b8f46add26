"""Registries of names that installed packages add to, each by an entry point group of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from merging.errors import CuveeError, did_you_mean, quoted

Entry = TypeVar("Entry")


def load_installed(group: str) -> None:
    """Imports what installed packages register under an entry point group."""
    from importlib.metadata import entry_points

    for entry in entry_points(group=group):
        entry.load()


def find(name: str, entries: Mapping[str, Entry], *, group: str, noun: str, where: str = "") -> Entry:
    """The entry of that name, built in or from an installed package.

    Args:
        entries: the registry, which grows when packages are loaded.
        noun: what an entry is, for the error.

    Raises:
        CuveeError: no such entry; names the nearest.
    """
    if name not in entries:
        load_installed(group)
    if name not in entries:
        mend = did_you_mean(name, entries, f"known: {quoted(entries)}")
        raise CuveeError(f"no {noun} '{name}'", where=where, mend=mend)
    return entries[name]
