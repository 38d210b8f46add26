"""mergekit as the second opinion: its methods on state dictionaries, in float32, whatever the architecture.

mergekit's command refuses many architectures (every BertModel, for one); its methods on tensors work on anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

StateDict = Mapping[str, torch.Tensor]

BASE = "base"
BASE_IS_ONE_OF_THE_MODELS = {"linear", "karcher"}
"""mergekit's methods that know no base: a base that is given is left out."""


def mergekit_merge(
    base: StateDict | None,
    models: Sequence[StateDict],
    method: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Merge by mergekit's `merge_state_dicts`, computing in `dtype` and returning float32 tensors.

    Args:
        base: tensors of the base, or None for a method (or a use of it) without one.
        models: tensors of the other models, in the recipe's order.
        method: mergekit's name of the method.
        parameters: the recipe's; a per-model one is one value for all models or a list in the order of `models`.
        seed: of torch's global generator, from which mergekit draws; None leaves the generator alone.
        dtype: float64 shows what mergekit means where its float32 sums are too coarse.

    Buffers of integers are copied when all models agree on them; mergekit raises ValueError when they do not.
    """
    from mergekit.merge_methods import merge_state_dicts

    states: dict[str, StateDict] = {f"model{i}": model for i, model in enumerate(models)}
    if base is not None and method not in BASE_IS_ONE_OF_THE_MODELS:
        states = {BASE: base, **states}
    with torch.random.fork_rng(), torch.no_grad():
        if seed is not None:
            torch.manual_seed(seed)
        return merge_state_dicts(
            states,
            method,
            parameters=dict(parameters or {}),
            base=BASE if BASE in states else None,
            dtype=dtype,
            out_dtype=torch.float32,
        )
