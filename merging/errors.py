"""The one family of errors that a user's mistake or a damaged file raises; the command prints each as one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def printable(text: str) -> str:
    """The text with control characters as escapes: a stranger's tensor name must not command the terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class CuveeError(Exception):
    """A mistake that its user can mend.

    Args:
        what: what is wrong, one line.
        where: the file, `file:line`, tensor or flag it is wrong in.
        mend: what to do about it, one line.
    """

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.mend = what, where, mend

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        line = f"{line}; {self.mend}" if self.mend else line
        return printable(" ".join(line.split()))


class CheckpointError(CuveeError):
    """A checkpoint that cannot be read: missing, truncated, lying about itself, unsafe or of an unknown form."""


class RecipeError(CuveeError):
    """A recipe that says something impossible."""


class MergeError(CuveeError):
    """Inputs that cannot be merged with each other, or a result that cannot be written."""


class Interrupted(Exception):
    """Ctrl-C, told with what the user may count on; no KeyboardInterrupt, which the command line's library swallows."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The mend of a misspelt name: "did you mean 'density'?", or `otherwise` where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean '{near[0]}'?" if near else otherwise


def quoted(names: Iterable[str]) -> str:
    """'a', 'b', 'c'"""
    return ", ".join(f"'{name}'" for name in names)
