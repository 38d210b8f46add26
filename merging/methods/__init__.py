"""Merge methods: pure functions of one tensor's inputs, one family a file, one registry."""

from merging.methods import averages, selective, spherical, task_vectors
from merging.methods.registry import METHODS, REQUIRED, Method, Parameter, PerModel, Range, get, keywords, known, method

__all__ = [
    "METHODS", "REQUIRED", "Method", "Parameter", "PerModel", "Range", "averages", "get", "keywords", "known", "method",
    "selective", "spherical", "task_vectors",
]  # fmt: skip
