"""Checkpoints in, one checkpoint out."""

from merging.errors import CheckpointError, CuveeError, MergeError, RecipeError
from merging.memory import merge_arrays as apply

__all__ = ["CheckpointError", "CuveeError", "MergeError", "RecipeError", "apply"]
