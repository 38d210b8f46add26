"""Linear layers for encoding on a CPU, their weights laid out once as oneDNN wants them.

torch multiplies float32 matrices on x86 by MKL, which lays the weights out anew in every call: of a small embedding
model that is a quarter of the time (`scripts/bench_encode.py`). The numbers are the same up to float32 rounding.
"""

from __future__ import annotations

import copy
import platform
from typing import Any

_ROWS = 2048  # of a batch, tokens: what the layout is chosen for


def pack_linears(module: Any) -> int:
    """Replaces the float32 linear layers below `module`, for inference only; how many.

    None on machines where this is no gain: with another processor than x86, or a torch without oneDNN.
    """
    return len(_pack(module))


def _pack(module: Any) -> list[tuple[Any, Any]]:
    """Each packed layer, and the one whose place it took."""
    import torch

    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return []
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return []
    packed: list[tuple[Any, Any]] = []
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if _can_be_packed(child):
                packed.append((_packed_linear(child, gelu=_takes_gelu_of(parent, name)), child))
                setattr(parent, name, packed[-1][0])
                if _takes_gelu_of(parent, name):
                    parent.intermediate_act_fn = torch.nn.Identity()
    return packed


class PackedTwin:
    """A module's twin for encoding while something else rewrites the module's weights: all is shared but the packed layers.

    Attributes:
        module: the twin; where nothing can be packed, the module itself.
    """

    def __init__(self, module: Any) -> None:
        twin = _twin(module, {})
        self._layers = _pack(twin)
        self.module = twin if self._layers else module

    def refresh(self) -> None:
        """Takes the weights as they are now."""
        for packed, linear in self._layers:
            packed.pack(linear)


def _twin(module: Any, known: dict[int, Any]) -> Any:
    """Modules of its own, with the same parameters, buffers and all else; a module that is used twice stays one."""
    if id(module) not in known:
        known[id(module)] = new = copy.copy(module)
        new._modules = {name: None if child is None else _twin(child, known) for name, child in module._modules.items()}
    return known[id(module)]


def _can_be_packed(child: Any) -> bool:
    import torch

    # A subclass may compute something else, and hooks of a layer would be lost.
    plain = type(child) is torch.nn.Linear and not child._forward_hooks and not child._forward_pre_hooks
    return plain and child.weight.dtype == torch.float32 and child.weight.device.type == "cpu"


def _takes_gelu_of(parent: Any, name: str) -> bool:
    """Whether it is the `dense` of a BERT-like `…Intermediate`, all of which compute intermediate_act_fn(dense(x))."""
    import torch

    function = getattr(parent, "intermediate_act_fn", None)
    is_gelu = getattr(function, "act", function) is torch.nn.functional.gelu
    return name == "dense" and is_gelu and type(parent).__name__.endswith("Intermediate")


def _packed_linear(linear: Any, *, gelu: bool) -> Any:
    import torch

    class PackedLinear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.bias = linear.bias
            self.pack(linear)

        def pack(self, linear: Any) -> None:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)

        @property
        def weight(self) -> Any:
            """(out, in), a copy: some architectures ask their layers for its dtype."""
            return self._weight.to_dense()

        def forward(self, inputs: Any) -> Any:
            after, form = ("gelu", "none") if gelu else ("none", "")  # "none" is the exact form, by erf
            return torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self.bias, after, [], form)

    return PackedLinear()
