"""Checkpoints in, one checkpoint out."""

from merging.engine import merge, remake
from merging.errors import CheckpointError, CuveeError, MergeError, RecipeError
from merging.memory import merge_arrays as apply
from merging.recipe import Recipe

__all__ = ["CheckpointError", "CuveeError", "MergeError", "Recipe", "RecipeError", "apply", "merge", "remake"]
