"""What is wrong with a suite."""

from __future__ import annotations

from merging.tables import TableError


class SuiteError(TableError):
    """A suite, or a file of it, that says something impossible."""
