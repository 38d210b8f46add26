"""Where a tensor stands in its model, told from names alone: its place in a stack of layers, and its layer group.

What is a layer? A name is read from the left, and the first integer in it counts whose stack qualifies (the stack is
what precedes the integer; it holds at least one word, so the `0.` of a torch Sequential is passed by). A stack
qualifies if at least half of its indices are *blocks*, holding two or more sub-modules (`attention` and `output`,
`layer.0` and `layer.1`), and if some tensor is in at least half of them, so that hybrids (attention here, a state
space there, experts in between) still are one stack by the norm that they share. So `encoder.block.3.layer.1.wi` is
layer 3, and so is `layers.3.mlp.experts.5.w1`, while `classifier.0.weight` and `merger.mlp.2.weight`, bare modules in
a row, are no layers; nor are lists that are called a head themselves (`deepstack_merger_list.1`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

#: Outside any stack: what reads the input, and so stands before the first layer …
_BEFORE = re.compile(
    r"embed(?!_out)|emb_ln|wte|wpe|shared|patch(?!_merger)|position|token_type|cls_token|rotary_emb|inv_freq"
    r"|relative_attention_bias|project_in|feature_extractor|feature_projection|norm_pre|pre_?layr?norm"
    r"|(^|\.)ln_pre(\.|$)|(^|\.)conv[12](\.|$)"
)
#: … unless it carries the name of something that stands after the last one.
_AFTER = re.compile(r"unembed|merger|lm_head|(^|[./])(cls|classifier|score|head|pooler|predictions|qa_outputs)(\.|$)")
_NORM = re.compile(r"norm|(^|\.)ln_(f|post|final)(\.|$)")


def fractions(names: Iterable[str]) -> dict[str, float]:
    """The position t of each tensor in its model, for parameters that are gradients over the layers.

    Args:
        names: all tensors of one model; a sub-module's folder (`2_Dense/`) is part of the name.

    Returns:
        By name, t in [0, 1]: i / (L - 1) for layer i of a stack, where L is one more than its largest index (a stack of
        one layer has t = 1, as in mergekit); outside the stacks 0 for embeddings and whatever else stands before them,
        1 for final norms, heads, poolers and projections (mergekit gives those 0).
    """
    names = list(names)
    stacks = _stacks(names)
    positions = {}
    for name in names:
        layer = next(((i, stacks[stack]) for stack, i, _ in _splits(name) if stack in stacks), None)
        if layer is None:
            positions[name] = 0.0 if _stands_before(name) else 1.0
        else:
            index, last = layer
            positions[name] = index / last if last else 1.0
    return positions


def group(name: str) -> str:
    """The layer group of a tensor: its layer ("encoder.layer.3"), "embeddings", "pooler", "norm", "head", or the folder
    of a sub-module ("2_Dense").

    One name says less than all of them: here the first integer that a sub-module follows counts as a layer.
    """
    for stack, index, rest in _splits(name):
        if "." in rest:
            return f"{stack}.{index}"
    if _stands_before(name):
        return "embeddings"
    folder = name.rpartition("/")[0]
    if folder:
        return folder
    module = name.rpartition(".")[0] or name
    if "pooler" in module:
        return "pooler"
    return "norm" if _NORM.search(module.lower()) and not _AFTER.search(name.lower()) else "head"


def _splits(name: str) -> Iterator[tuple[str, int, str]]:
    """Every (stack, index, rest) that a name may be read as, from the left; rest is not empty."""
    parts = name.split(".")
    for at, part in enumerate(parts[1:-1], start=1):
        if part.isdecimal() and not all(map(str.isdecimal, parts[:at])) and not _AFTER.search(parts[at - 1].lower()):
            yield ".".join(parts[:at]), int(part), ".".join(parts[at + 1 :])


def _stacks(names: Iterable[str]) -> dict[str, int]:
    """The stacks among the names, each with its largest index."""
    layers: dict[str, dict[int, set[str]]] = {}
    for name in names:
        for stack, index, rest in _splits(name):
            layers.setdefault(stack, {}).setdefault(index, set()).add(rest)
    return {stack: max(indices) for stack, indices in layers.items() if _qualifies(indices)}


def _qualifies(indices: dict[int, set[str]]) -> bool:
    half = len(indices) / 2
    blocks = sum(len({child for child in map(_child, rests) if child}) >= 2 for rests in indices.values())
    # Two layers of a mixture may hold different numbers of experts: their numbers do not count.
    tensors = Counter(tensor for rests in indices.values() for tensor in {re.sub(r"\d+", "#", rest) for rest in rests})
    return blocks >= half and max(tensors.values()) >= half


def _child(rest: str) -> str:
    """The sub-module that a tensor of a layer lies in, with its number in a list; "" for the layer's own tensors."""
    parts = rest.split(".")
    if len(parts) == 1:
        return ""
    return ".".join(parts[:2]) if len(parts) > 2 and parts[1].isdecimal() else parts[0]


def _stands_before(name: str) -> bool:
    return bool(_BEFORE.search(name.lower())) and not _AFTER.search(name.lower())
