"""The gradient of each example of a batch, from one backward over all of them.

Hooks on the layers see what goes in and the gradient of what comes out, for every row of the batch; the gradient of a
layer's weight for one row is a product of the two, and is never formed whole: `squares` adds up its squares by blocks.
The weights themselves need no gradient, which spares a third of a plain backward.

Known are Linear, Conv1D (GPT-2's), Embedding, LayerNorm, every RMSNorm, Conv1d, Conv2d, and relative position biases
(T5, MPNet). What a model does with its other parameters `PerExample.unknown` tells, and `disagreeing` finds layers
that use theirs in another way than their class says; these need another way to their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from merging.statistics.layer_terms import Terms, Uses, is_table, uses_of
from merging.statistics.squares import BUDGET, Rows, Term, add_squares, weighted

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merging.statistics.sums import Sum

_LOOKED_UP = "_cuvee_looked_up"


class PerExample:
    """Hooks on a module, from `with PerExample(module) as own:` to the end of the block.

    Within it the module's parameters need no gradient. The rows of a batch, leading axis of all that the layers are fed,
    belong to units, each with a gradient of its own.

    Attributes:
        parameters: by name, as the module names them; tied ones once.
        unknown: names of those that no known layer holds.
        failed: names of those whose layers were, since the last `recording` began, fed something with another leading
            axis than the rows. Their gradients are left out.
    """

    def __init__(self, module: nn.Module, *, budget: int = BUDGET) -> None:
        self.module, self.budget = module, budget
        self.parameters: dict[str, nn.Parameter] = dict(module.named_parameters())
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._layers = [(layer, uses) for layer in module.modules() if (uses := uses_of(layer)) is not None]
        held = {self._names[id(own)] for layer, _ in self._layers for own in layer.parameters(recurse=False)}
        self.unknown = frozenset(self.parameters.keys() - held)
        self.failed: set[str] = set()
        self._skipped: frozenset[str] = frozenset()
        self._units = 0
        self._unit: Tensor | None = None  # (rows,) of the call that is being recorded
        self._expected: dict[str, int] = {}
        self._arrived: dict[str, list[Term]] = {}
        self._take: Callable[[str, list[Term]], None] | None = None
        self._handles: list[Any] = []
        self._bias: tuple[nn.Module, Tensor | None] | None = None

    def __enter__(self) -> PerExample:
        self._needed = {name: own.requires_grad for name, own in self.parameters.items()}
        for own in self.parameters.values():
            own.requires_grad_(False)
        for layer, uses in self._layers:
            if is_table(layer):
                self._handles.append(layer.register_forward_pre_hook(self._spread))
                if _has_its_own_way(layer):
                    self._handles += self._watch_lookups(layer)
            self._handles.append(layer.register_forward_hook(partial(self._saw, uses), with_kwargs=True))
        self._restore = [self._watch_bias(layer) for layer in self.module.modules() if _bias_method(layer)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for restore in self._restore:
            restore()
        for name, own in self.parameters.items():
            own.requires_grad_(self._needed[name])
        self._handles.clear()
        self._expected.clear()
        self._arrived.clear()

    @contextmanager
    def recording(self, units: int, skipped: frozenset[str] = frozenset()) -> Iterator[Callable[[Tensor], None]]:
        """Forward passes of a batch of so many units. Those before are forgotten.

        Gives a function to call before each call of the module, with the unit of each of its rows: (rows,).

        Args:
            skipped: parameters to leave out.
        """
        import torch

        def rows(unit: Tensor) -> None:
            self._unit = unit

        self._units, self._skipped = units, skipped
        self._expected.clear()
        self.failed.clear()
        with torch.enable_grad():
            try:
                yield rows
            finally:
                self._unit = None

    def forget(self, names: frozenset[str]) -> None:
        """Leaves these parameters out of what was recorded, too."""
        self._skipped |= names

    def add_squares(
        self, output: Tensor, cotangent: Tensor, sums: Mapping[str, Sum], mix: Tensor | None = None, *, again: bool
    ) -> None:
        """One backward from `output`: to each sum the squares of the units' gradients are added.

        Args:
            output: of what was recorded.
            cotangent: its gradient, of its shape.
            mix: (examples, choices), see `squares`.
            again: whether another backward of the same output follows.
        """

        def take(name: str, terms: list[Term]) -> None:
            add_squares(sums[name], terms, self._units, mix, self.budget)

        self._backward(output, cotangent, take, again=again)

    def disagreeing(
        self, output: Tensor, cotangent: Tensor, weights: Tensor, plain: Mapping[str, Tensor | None], *, again: bool
    ) -> set[str]:
        """Names of those whose gradients, weighted by unit and added up, are not those of a plain backward.

        Weights that differ tell units that were mistaken for each other, too.

        Args:
            weights: (units,).
            plain: the gradients of a plain backward in which each unit had its weight; None for none.
        """
        import torch

        found: dict[str, tuple[Tensor, float]] = {}

        def take(name: str, terms: list[Term]) -> None:
            found[name] = weighted(self.parameters[name].shape, terms, weights)

        self._backward(output, cotangent, take, again=again)
        wrong = set()
        for name, parameter in self.parameters.items():
            if name in self._skipped or name in self.failed:
                continue
            given = plain[name]
            theirs = torch.zeros_like(parameter) if given is None else given
            ours, bound = found.get(name, (torch.zeros_like(parameter), 0.0))
            error = float((ours - theirs.to(ours.dtype)).norm())
            if not error <= _tolerance(parameter.dtype) * (bound + float(theirs.norm())):
                wrong.add(name)
        return wrong

    def _backward(
        self, output: Tensor, cotangent: Tensor, take: Callable[[str, list[Term]], None], *, again: bool
    ) -> None:
        import torch

        self._take, self._arrived = take, {}
        try:
            torch.autograd.backward(output, cotangent, retain_graph=again)
            for name, terms in self._arrived.items():  # where a call's output did not count
                take(name, terms)
        finally:
            self._take, self._arrived = None, {}

    # ---- forward ----

    def _spread(self, layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """Positions that all rows share are looked up once; looked up for each row they have a gradient for each."""
        if self._unit is None or self._bias is not None or len(self._unit) == 1 or not inputs:
            return None
        index = inputs[0]
        if getattr(index, "ndim", 0) == 2 and len(index) == 1:
            return (index.expand(len(self._unit), -1), *inputs[1:])
        return None

    def _saw(
        self,
        uses: Uses,
        layer: nn.Module,
        inputs: tuple[Any, ...],
        named: Mapping[str, Any],
        output: Any,
    ) -> Any:
        import torch

        if self._unit is None or not torch.is_grad_enabled():
            return None
        given = inputs[0] if inputs else next(iter(named.values()), None)
        if _has_its_own_way(layer):
            given = layer.__dict__.pop(_LOOKED_UP, None)
        if self._bias is not None and is_table(layer):
            self._bias = (layer, given)
            return None
        known = isinstance(given, torch.Tensor) and isinstance(output, torch.Tensor)
        terms = uses(layer, given, output, self._unit) if known else None
        if terms is None:
            self.failed |= {self._names[id(own)] for own in layer.parameters(recurse=False)}
        if not isinstance(output, torch.Tensor):
            return None
        first = not output.requires_grad
        if first:
            output = output.detach().requires_grad_().clone()  # what follows may change it in place
        self._expect(layer, terms, output)
        return output if first else None

    def _expect(self, layer: nn.Module, terms: Terms | None, output: Tensor) -> None:
        own = {
            self._names[id(getattr(layer, key))]: term
            for key, term in (terms or {}).items()
            if getattr(layer, key, None) is not None
        }
        own = {name: term for name, term in own.items() if name not in self._skipped}
        if not own:
            return
        for name in own:
            self._expected[name] = self._expected.get(name, 0) + 1
        output.register_hook(partial(self._arrive, own))

    def _watch_lookups(self, layer: nn.Module) -> list[Any]:
        modes: list[Any] = []

        def begin(*_: Any) -> None:
            if self._unit is not None:
                modes.append(_lookups(layer, len(self._unit)))
                modes[-1].__enter__()

        def end(*_: Any) -> None:
            if modes:
                modes.pop().__exit__(None, None, None)

        return [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end, always_call=True)]

    def _watch_bias(self, layer: nn.Module) -> Callable[[], None]:
        """Of a position bias that all rows share, a copy for each row."""
        method = _bias_method(layer)
        own = getattr(layer, method)

        def compute(*arguments: Any, **named: Any) -> Any:
            if self._unit is None:
                return own(*arguments, **named)
            self._bias = (layer, None)
            try:
                bias = own(*arguments, **named)  # (1 or rows, heads, queries, keys)
                table, index = self._bias
            finally:
                self._bias = None
            unit = self._unit
            if index is None or index.ndim != 2 or bias.shape[0] not in (1, len(unit)):
                self.failed |= {self._names[id(each)] for each in layer.relative_attention_bias.parameters()}
                return bias
            bias = bias.detach().expand(len(unit), -1, -1, -1).clone().requires_grad_()
            index = index.reshape(1, -1).expand(len(unit), -1)
            self._expect(table, {"weight": lambda gradient: Rows(index, gradient.flatten(2).mT, unit)}, bias)
            return bias

        setattr(layer, method, compute)
        return partial(delattr, layer, method)

    # ---- backward ----

    def _arrive(self, own: Mapping[str, Callable[[Tensor], Term]], gradient: Tensor) -> None:
        if self._take is None:
            return
        for name, term in own.items():
            if name in self.failed or name in self._skipped:
                continue
            arrived = self._arrived.setdefault(name, [])
            arrived.append(term(gradient))
            if len(arrived) == self._expected[name]:
                self._take(name, self._arrived.pop(name))


def _bias_method(layer: nn.Module) -> str:
    if not is_table(getattr(layer, "relative_attention_bias", None)):
        return ""
    return next((name for name in ("compute_bias", "compute_position_bias") if hasattr(layer, name)), "")


def _has_its_own_way(layer: nn.Module) -> bool:
    """Whether an Embedding looks up something else than what it is given: positions from a mask or a shape (OPT, BART)."""
    from torch import nn

    return is_table(layer) and type(layer).forward is not nn.Embedding.forward


def _lookups(layer: nn.Module, rows: int) -> Any:
    """A context that keeps in the layer what it looks up, and spreads it as `PerExample._spread` does."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Lookups(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            if function is torch.nn.functional.embedding:
                index = arguments[0]
                if index.ndim == 2 and len(index) == 1:
                    index = index.expand(rows, -1)
                layer.__dict__[_LOOKED_UP], arguments = index, (index, *arguments[1:])
            return function(*arguments, **(named or {}))

    return Lookups()


def _tolerance(dtype: Any) -> float:
    """By how much a gradient may be off, of the product of its factors' norms. Parts of a float64 model are float32."""
    import torch

    arithmetic = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else dtype
    if torch.is_autocast_enabled("cpu"):
        arithmetic = torch.get_autocast_dtype("cpu")
    eps = float(torch.finfo(arithmetic).eps)
    return 3 * eps if eps > 1e-4 else 32 * float(torch.finfo(torch.float32).eps)
