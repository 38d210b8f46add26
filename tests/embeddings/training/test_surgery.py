"""Modular gradient surgery against its oracle, and what it promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from embeddings.training.surgery import modular_gradient_surgery, modules
from tests.oracles.surgery import surgery

torch = pytest.importorskip("torch")
SHAPES = [(4, 3), (3,), (5,), (2, 2, 2)]


def gradients(tasks: int, seed: int = 0, dtype: Any = None) -> list[list[Any]]:
    random = torch.Generator().manual_seed(seed)
    dtype = dtype or torch.float64
    return [
        [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in SHAPES] for _ in range(tasks)
    ]


def generator(seed: int = 0) -> Any:
    return torch.Generator().manual_seed(seed)


def orders(groups: int, tasks: int, seed: int = 0) -> list[list[list[int]]]:
    """The orders that a generator of this seed gives, group by group and task by task."""
    random = generator(seed)
    return [[torch.randperm(tasks, generator=random).tolist() for _ in range(tasks)] for _ in range(groups)]


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
@pytest.mark.parametrize("groups", [None, ["a", "a", "b", "a"], [0, 0, 0, 0]], ids=["tensors", "modules", "all"])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_float64_loop(tasks: int, groups: list[Any] | None, seed: int) -> None:
    given = gradients(tasks, seed)
    result = modular_gradient_surgery(given, generator(seed), groups)
    labels = list(range(len(SHAPES))) if groups is None else groups
    names = list(dict.fromkeys(labels))
    for label, order in zip(names, orders(len(names), tasks, seed), strict=True):
        members = [i for i, name in enumerate(labels) if name == label]
        vectors = [np.concatenate([task[i].numpy().ravel() for i in members]) for task in given]
        mine = np.concatenate([result[i].numpy().ravel() for i in members])
        np.testing.assert_allclose(mine, surgery(vectors, order), rtol=1e-10, atol=1e-12)


def test_order_of_the_others_matters_so_the_oracle_sees_it() -> None:
    vectors = [np.array(v) for v in ([1.0, 0.0], [-1.0, 0.2], [-1.0, -0.7])]
    assert not np.allclose(surgery(vectors, [[1, 2], [0, 2], [0, 1]]), surgery(vectors, [[2, 1], [2, 0], [1, 0]]))


def test_without_conflict_it_is_the_sum() -> None:
    given = [[gradient.abs() for gradient in task] for task in gradients(3)]
    for tensor, result in enumerate(modular_gradient_surgery(given, generator())):
        torch.testing.assert_close(result, sum(task[tensor] for task in given))


def test_of_two_tasks_neither_is_worked_against() -> None:
    for seed in range(20):
        given = gradients(2, seed)
        for tensor, result in enumerate(modular_gradient_surgery(given, generator())):
            for task in given:
                assert (result * task[tensor]).sum() > -1e-12


def test_opposite_gradients_cancel_and_vanished_ones_are_harmless() -> None:
    (one,) = gradients(1)
    for result in modular_gradient_surgery([one, [-2 * gradient for gradient in one]], generator()):
        assert result.abs().max() < 1e-12
    for gradient, result in zip(
        one, modular_gradient_surgery([one, [0 * gradient for gradient in one]], generator()), strict=True
    ):
        torch.testing.assert_close(result, gradient)


def test_a_task_that_does_not_reach_a_tensor_has_no_say_in_it() -> None:
    one, two = gradients(2)
    result = modular_gradient_surgery([[one[0], None, None, one[3]], [None, two[1], None, two[3]]], generator())
    torch.testing.assert_close(result[0], one[0])
    torch.testing.assert_close(result[1], two[1])
    assert result[2] is None
    assert result[3] is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_are_kept_and_sums_are_rounded_once(dtype: str) -> None:
    given = gradients(3, dtype=getattr(torch, dtype))
    wide = modular_gradient_surgery([[g.double() for g in task] for task in given], generator())
    for result, truth in zip(modular_gradient_surgery(given, generator()), wide, strict=True):
        assert result.dtype == getattr(torch, dtype)
        torch.testing.assert_close(result, truth.to(result.dtype))


def test_repeats_by_seed_and_leaves_its_inputs() -> None:
    given = gradients(4)
    copies = [[gradient.clone() for gradient in task] for task in given]
    first, again, other = (modular_gradient_surgery(given, generator(seed)) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))
    assert all(torch.equal(a, b) for one, two in zip(given, copies, strict=True) for a, b in zip(one, two, strict=True))


def test_modules_are_the_names_without_their_last_part() -> None:
    names = ["layer.0.dense.weight", "layer.0.dense.bias", "norm.weight", "scale"]
    assert modules(names) == ["layer.0.dense", "layer.0.dense", "norm", ""]
