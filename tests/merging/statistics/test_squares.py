"""Squares of gradients from their factors: against loops over the units, within a budget of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from merging.statistics.squares import Outer, Rows, Term, Whole, add_squares
from merging.statistics.sums import Sum


def naive(shape: tuple[int, ...], terms: Sequence[Term], units: int, mix: torch.Tensor | None) -> torch.Tensor:
    """Every gradient whole, one after another."""
    gradients = torch.zeros((units, *shape), dtype=torch.float64)
    for term in terms:
        for row, unit in enumerate(term.unit.tolist()):
            if isinstance(term, Outer):
                gradients[unit] += (term.left[row].double().T @ term.right[row].double()).view(shape)
            elif isinstance(term, Rows):
                for index, values in zip(term.index[row].tolist(), term.values[row].double(), strict=True):
                    if index >= 0:
                        gradients[unit, index] += values
            else:
                gradients[unit] += term.values[row].double().sum(0)
    if mix is not None:
        own = gradients.view(*mix.shape, -1)
        m = mix.double()[:, None]  # (examples, 1, choices)
        gradients = own - m.mT @ (m @ own)
    return gradients.view(units, *shape).square().sum(0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit_vectors(examples: int, choices: int) -> torch.Tensor:
    return random(examples, choices, seed=9).softmax(1).sqrt()


UNITS = torch.arange(6)
RAGGED = torch.tensor([5, 0, 3, 3, 1, 2, 4, 0])  # rows out of order, two units with two


def dense(unit: torch.Tensor, seed: int = 0) -> Outer:
    return Outer(random(len(unit), 3, 7, seed=seed), random(len(unit), 3, 5, seed=seed + 1), unit)


def sparse(unit: torch.Tensor) -> Rows:
    index = torch.randint(-1, 7, (len(unit), 4), generator=torch.Generator().manual_seed(3))
    return Rows(index, random(len(unit), 4, 5, seed=4), unit)


CASES: dict[str, list[Term]] = {
    "one call": [dense(UNITS)],
    "several rows of a unit, in any order": [dense(RAGGED)],
    "two calls of different lengths": [dense(RAGGED), Outer(random(6, 2, 7), random(6, 2, 5), UNITS)],
    "a tied table": [dense(UNITS), sparse(RAGGED)],
    "a table": [sparse(RAGGED)],
    "a table looked up twice": [sparse(RAGGED), sparse(UNITS)],
}


@pytest.mark.parametrize("terms", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("choices", [0, 3])
@pytest.mark.parametrize("budget", [100, 1 << 20])
def test_squares_equal_loops_over_the_units(terms: list[Term], choices: int, budget: int) -> None:
    mix = unit_vectors(6 // choices, choices) if choices else None
    total = Sum((7, 5))
    add_squares(total, terms, 6, mix, budget)
    add_squares(total, terms, 6, mix, budget)
    torch.testing.assert_close(total.value(), 2 * naive((7, 5), terms, 6, mix), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("choices", [0, 2])
def test_vectors_equal_loops_over_the_units(choices: int) -> None:
    mix = unit_vectors(6 // choices, choices) if choices else None
    terms: list[Term] = [Whole(random(8, 3, 5), RAGGED), Whole(random(6, 2, 5), UNITS)]
    total = Sum((5,))
    add_squares(total, terms, 6, mix)
    torch.testing.assert_close(total.value(), naive((5,), terms, 6, mix), rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """The largest result of an operation that has memory of its own, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        results = function(*arguments, **(named or {}))
        known = {own.untyped_storage().data_ptr() for own in arguments if isinstance(own, torch.Tensor)}
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return results


def test_the_largest_temporary_stays_under_the_budget() -> None:
    unit, mix, total = torch.arange(16), unit_vectors(4, 4), Sum((512, 256))
    term = Outer(random(16, 4, 512), random(16, 4, 256), unit)
    with Largest() as largest:
        add_squares(total, [term], 16, mix, budget=1 << 19)
    whole = 4 * 16 * 512 * 256
    assert largest.bytes <= max(1 << 19, 4 * term.left.numel()) < whole / 8


def test_a_table_never_costs_the_memory_of_its_vocabulary() -> None:
    total, budget = Sum((50_000, 64)), 1 << 18
    index = torch.randint(0, 50_000, (16, 32), generator=torch.Generator().manual_seed(0))
    term = Rows(index, random(16, 32, 64), torch.arange(16))
    with Largest() as largest:
        add_squares(total, [term], 16, unit_vectors(4, 4), budget)
    assert largest.bytes <= max(budget, 4 * term.values.numel()) < 50_000 * 64 * 4 / 8


def test_compensated_sums_lose_nothing_to_their_size() -> None:
    plain, kept, exact = torch.zeros(3), Sum((3,), compensated=True), Sum((3,))
    for _ in range(4_000):
        values = torch.tensor([0.1, 1e-4, 3.3])
        plain += values
        kept.add(values)
        exact.add(values)
    torch.testing.assert_close(kept.value().double(), exact.value(), rtol=2e-7, atol=0)
    assert (plain - exact.value()).abs().max() > 20 * (kept.value() - exact.value()).abs().max()


@pytest.mark.parametrize("compensated", [False, True])
def test_rows_that_stand_there_repeatedly_are_all_added(compensated: bool) -> None:
    total = Sum((4, 3), compensated=compensated)
    total.add_rows(torch.tensor([1, 3, 1]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), 1, 3)
    total.add(torch.ones(2, 3), 2, 4)
    expected = torch.tensor([[0.0, 0, 0], [0, 6, 8], [1, 1, 1], [1, 4, 5]])
    torch.testing.assert_close(total.value().float(), expected)


def test_a_sum_refuses_a_state_of_another_form() -> None:
    with pytest.raises(ValueError, match="another"):
        Sum((3,)).load(Sum((3,), compensated=True).state())
    with pytest.raises(ValueError, match="another"):
        Sum((3,)).load(Sum((4,)).state())
