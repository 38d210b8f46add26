"""Sums of squared gradients, from the factors of the gradients: block by block, never a whole gradient per example.

What one call of a layer contributes to the gradients of its weight is a term, for all rows of a batch at once. Rows belong
to units; a unit is what has a gradient of its own: an example, or one of an example's choices. Terms of one weight and
rows of one unit are added up before squaring: a weight that is used twice has one gradient.

With `mix` (examples, choices) the units are the choices of the examples, in that order, and what is squared is each
unit's gradient less its part along the unit vector mix: sum_c |(a - mix mix^T a)_c|^2. With mix = sqrt(p) and a_c =
sqrt(p_c) times the gradient of score c this is sum_c p_c (d log softmax(scores)_c)^2, by one backward for all choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from merging.statistics.sums import Sum

#: Bytes of the largest temporary, unless a caller says otherwise.
BUDGET = 1 << 26
#: Bytes of the block in which gradients are formed and squared on a processor: what its cache holds.
CACHE_BYTES = 1 << 21


@dataclass(frozen=True)
class Outer:
    """The gradient of a row is left^T right, a matrix of the weight's shape with all axes but the first taken together.

    left: (rows, places, height). right: (rows, places, columns). unit: (rows,), the unit of each row.
    """

    left: Tensor
    right: Tensor
    unit: Tensor


@dataclass(frozen=True)
class Rows:
    """The gradient of a row is 0 but for some of the weight's rows: values[p] is added to number index[p].

    index: (rows, places), -1 for none. values: (rows, places, columns). unit: (rows,).
    """

    index: Tensor
    values: Tensor
    unit: Tensor


@dataclass(frozen=True)
class Whole:
    """The gradient of a row is the sum over its places. values: (rows, places, elements). unit: (rows,)."""

    values: Tensor
    unit: Tensor


Term = Outer | Rows | Whole


def add_squares(total: Sum, terms: Sequence[Term], units: int, mix: Tensor | None, budget: int = BUDGET) -> None:
    """Adds to `total` the squares of the units' gradients, each the sum of its terms.

    Args:
        terms: all `Whole`, or none.
        units: how many.
        mix: (examples, choices), or None: every unit is an example.
        budget: bytes that a temporary may take beside copies of the factors; one row of the gradients of an example it
            may always take.
    """
    outer = [term for term in terms if isinstance(term, Outer)]
    sparse = [term for term in terms if isinstance(term, Rows)]
    if outer:
        _add_dense(total, outer, sparse, units, mix, budget)
    elif sparse:
        _add_sparse(total, sparse, mix, budget)
    else:
        _add_whole(total, [term for term in terms if isinstance(term, Whole)], units, mix)


def weighted(shape: Sequence[int], terms: Sequence[Term], weights: Tensor) -> tuple[Tensor, float]:
    """The sum over the units of weight times gradient, of the given shape, and a bound of the size of its summands.

    Args:
        weights: (units,)
    """
    import torch

    exact = _exact(weights.dtype)
    result = torch.zeros(tuple(shape), dtype=exact, device=weights.device)
    matrix, bound = result.view(shape[0], -1), 0.0
    for term in terms:
        own = weights[term.unit][:, None, None]
        if isinstance(term, Outer):
            left, right = term.left.to(exact) * own, term.right.to(exact)
            matrix += left.flatten(0, 1).T @ right.flatten(0, 1)
            bound += float(left.norm() * right.norm())
        elif isinstance(term, Rows):
            values, index = term.values.to(exact) * own, term.index.flatten()
            matrix.index_add_(0, index.clamp(min=0), values.flatten(0, 1) * (index >= 0)[:, None])
            bound += float(values.norm()) * len(index) ** 0.5
        else:
            values = term.values.to(exact) * own
            matrix += values.sum((0, 1)).reshape(matrix.shape)
            bound += float(values.norm()) * (values.shape[0] * values.shape[1]) ** 0.5
    return result, bound


def _exact(dtype: Any) -> Any:
    import torch

    return torch.promote_types(dtype, torch.float32)


def _add_whole(total: Sum, terms: Sequence[Whole], units: int, mix: Tensor | None) -> None:
    import torch

    first = terms[0].values
    dtype = _exact(first.dtype)
    gradients = torch.zeros(units, first.shape[2], dtype=dtype, device=first.device)
    for term in terms:
        gradients.index_add_(0, term.unit, term.values.sum(1, dtype=dtype))
    total.add(_squares(gradients, mix))


def _add_dense(
    total: Sum, outer: Sequence[Outer], sparse: Sequence[Rows], units: int, mix: Tensor | None, budget: int
) -> None:
    """Blocks of some rows of the gradients of some examples."""
    import torch

    dtype, device = _exact(outer[0].left.dtype), outer[0].left.device
    rows, columns = outer[0].left.shape[2], outer[0].right.shape[2]
    choices = 1 if mix is None else mix.shape[1]
    block_bytes = min(budget, CACHE_BYTES) if device.type == "cpu" else budget
    example = choices * columns * dtype.itemsize  # bytes of one row of an example's gradients
    height = max(1, min(rows, block_bytes // example))
    count = max(1, min(units // choices, block_bytes // (example * height))) * choices
    chunks = _chunks(outer, units, count, dtype)
    block = torch.empty(count * height * columns, dtype=dtype, device=device)
    partial = torch.empty(height * columns, dtype=dtype, device=device)
    for top in range(0, rows, height):
        bottom = min(rows, top + height)
        squares = partial[: (bottom - top) * columns].zero_()
        for start, (left, right) in zip(range(0, units, count), chunks, strict=True):
            values = block[: len(left) * len(squares)].view(len(left), bottom - top, columns)
            torch.bmm(left[:, :, top:bottom].mT, right, out=values)
            for term in sparse:
                _scatter(values, term, top, start)
            part = None if mix is None else mix[start // choices : (start + len(left)) // choices]
            squares += _squares(values.view(len(left), -1), part)
        total.add(squares, top, bottom)


def _chunks(terms: Sequence[Outer], units: int, count: int, dtype: Any) -> list[tuple[Tensor, Tensor]]:
    """The factors by unit, `count` units at a time: (units, places, height) and (units, places, columns).

    All places of a unit stand together; where a unit has fewer than others of its chunk, zeros fill up.
    """
    import torch

    term = terms[0]
    if len(terms) == 1 and torch.equal(term.unit, torch.arange(units, device=term.unit.device)):
        left, right = term.left.to(dtype), term.right.to(dtype)
        return list(zip(left.split(count), right.split(count), strict=True))
    unit = torch.cat([term.unit.repeat_interleave(term.left.shape[1]) for term in terms])  # (all places,)
    order = unit.argsort(stable=True)
    sizes = torch.bincount(unit, minlength=units)
    ends = sizes.cumsum(0)
    lefts = torch.cat([term.left.flatten(0, 1) for term in terms])
    rights = torch.cat([term.right.flatten(0, 1) for term in terms])
    chunks = []
    for start in range(0, units, count):
        own = slice(start, min(units, start + count))
        places = torch.arange(int(sizes[own].max()), device=unit.device)
        real = places < sizes[own, None]  # (units, places)
        index = order[((ends - sizes)[own, None] + places).clamp(max=len(order) - 1)]
        chunks.append((lefts[index].to(dtype) * real.unsqueeze(2), rights[index].to(dtype)))
    return chunks


def _scatter(values: Tensor, term: Rows, top: int, start: int) -> None:
    """Adds a term's rows to the block of gradients that begins with row `top` and unit `start`.

    Args:
        values: (units, height, columns)
    """
    units, height, columns = values.shape
    unit, index = term.unit[:, None] - start, term.index - top  # (rows, 1), (rows, places)
    inside = (index >= 0) & (index < height) & (term.index >= 0) & (unit >= 0) & (unit < units)
    row, place = inside.nonzero(as_tuple=True)
    slots = unit[row, 0] * height + index[row, place]
    values.view(-1, columns).index_add_(0, slots, term.values[row, place].to(values.dtype))


def _add_sparse(total: Sum, terms: Sequence[Rows], mix: Tensor | None, budget: int) -> None:
    """One small matrix for each row that an example touches: (touched rows, choices, columns), some columns at a time."""
    import torch

    dtype = _exact(terms[0].values.dtype)
    height, columns = total.shape[0], terms[0].values.shape[2]
    choices = 1 if mix is None else mix.shape[1]
    unit = torch.cat([term.unit.repeat_interleave(term.index.shape[1]) for term in terms])  # (all places,)
    index = torch.cat([term.index.flatten() for term in terms])
    unit, place = unit[index >= 0], (index >= 0).nonzero().squeeze(1)
    index = index[place]
    keys, own = (unit // choices * height + index).unique(return_inverse=True)
    slots = own * choices + unit % choices
    along = None if mix is None else mix.to(dtype)[keys // height].unsqueeze(1)  # (touched rows, 1, choices)
    width = max(1, min(columns, budget // max(1, (len(keys) * choices + len(slots)) * dtype.itemsize)))
    for first in range(0, columns, width):
        last = min(columns, first + width)
        gradients = torch.zeros(len(keys) * choices, last - first, dtype=dtype, device=index.device)
        values = torch.cat([term.values[:, :, first:last].flatten(0, 1) for term in terms])[place]
        gradients.index_add_(0, slots, values.to(dtype))
        gradients = gradients.view(len(keys), choices, last - first)
        if along is not None:
            gradients = torch.baddbmm(gradients, along.mT, torch.bmm(along, gradients), alpha=-1)
        total.add_rows(keys % height, gradients.square_().sum(1), first, last)


def _squares(values: Tensor, mix: Tensor | None) -> Tensor:
    """The sum of the squares over the units, in place. values: (units, elements), mix: (examples, choices)."""
    import torch

    if mix is not None:
        mix = mix.to(values.dtype)
        own = values.view(*mix.shape, -1)  # (examples, choices, elements)
        own.baddbmm_(mix.unsqueeze(2), torch.bmm(mix.unsqueeze(1), own), alpha=-1)
    values.square_()
    return values[0] if len(values) == 1 else values.sum(0)
