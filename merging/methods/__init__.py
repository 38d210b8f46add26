"""Merge methods: pure functions of one tensor's inputs, one family a file, one registry."""

from merging.methods import averages, importance, obim, selective, spherical, task_vectors
from merging.methods.registry import METHODS, REQUIRED, Method, Parameter, PerModel, Range, get, keywords, known, method

__all__ = [
    "METHODS", "REQUIRED", "Method", "Parameter", "PerModel", "Range", "averages", "get", "importance", "keywords",
    "known", "method", "obim", "selective", "spherical", "task_vectors",
]  # fmt: skip
