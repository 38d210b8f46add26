"""Figures: matplotlib without a word on the terminal, and its figures as SVG that is the same for the same figure."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def quietly() -> Iterator[None]:
    """Keeps matplotlib's remarks, on its cache and on letters that its font lacks, off the terminal; import it within."""
    logger = logging.getLogger("matplotlib")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logger.setLevel(before)


def svg(figure: Figure) -> str:
    """The text of a file with the figure."""
    import matplotlib

    content = io.StringIO()
    # Without them each file has other ids, and letters are outlines that nobody can search.
    with quietly(), matplotlib.rc_context({"svg.hashsalt": "cuvee", "svg.fonttype": "none"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def literal(text: str) -> str:
    """A text that is shown as it is: matplotlib reads "$x$" as a formula and leaves "_x" out of a legend."""
    return re.sub("^_", " _", text.replace("$", r"\$"))
