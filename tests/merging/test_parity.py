"""Agreement with mergekit on real weights: all-MiniLM-L6-v2 and three specialists fine-tuned from it.

The engine runs on the folders, mergekit's methods on the same tensors in memory (its command refuses BertModel). What
may differ, and by how much, stands beside each tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import merging
from merging import Recipe
from tests.conftest import MiniLMFamily
from tests.oracles.merge_methods import oracle
from tests.oracles.parity import mergekit_merge
from tests.oracles.thinning import Array, keep_probability, task_vector

torch = pytest.importorskip("torch")
pytest.importorskip("mergekit")

pytestmark = pytest.mark.slow

EPS = 2.0**-23
WEIGHTS = [0.6, 0.3, 0.9]
EMBEDDINGS = "embeddings.word_embeddings.weight"  # (30522, 384): half of the model
BIG = "encoder.layer.3.intermediate.dense.weight"  # (1536, 384): for the statistics of random draws
StateDict = dict[str, Any]
Excuse = Callable[[Array, list[Array]], Array]


@dataclass(frozen=True)
class Weights:
    """The family's tensors, float32; `models` in the order of `paths`."""

    paths: MiniLMFamily
    base: StateDict
    models: tuple[StateDict, ...]

    def arrays(self, name: str, count: int) -> tuple[Array, list[Array]]:
        return self.base[name].numpy(), [model[name].numpy() for model in self.models[:count]]


def tensors(folder: Path) -> StateDict:
    """The floating-point tensors: the base also stores its position ids, which newer libraries leave out."""
    from safetensors.torch import load_file

    return {name: t for name, t in load_file(folder / "model.safetensors").items() if t.is_floating_point()}


@pytest.fixture(scope="module")
def weights(minilm_family: MiniLMFamily) -> Weights:
    return Weights(minilm_family, tensors(minilm_family.base), tuple(map(tensors, minilm_family.specialists)))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ours(weights: Weights, out: Path, method: str, parameters: dict[str, Any], count: int, seed: int = 0) -> StateDict:
    """The engine's result. A parameter that is a list goes to the models one by one."""
    shared = {key: value for key, value in parameters.items() if not isinstance(value, list)}
    models = [
        {"model": str(path), "parameters": {key: parameters[key][i] for key in parameters if key not in shared}}
        for i, path in enumerate(weights.paths.specialists[:count])
    ]
    merging.merge(Recipe(method, models, str(weights.paths.base), shared, "float32"), out, seed=seed)
    return tensors(out)


def assert_agree(mine: StateDict, theirs: StateDict, weights: Weights, count: int, excused: Excuse | None) -> None:
    """Every entry within eight float32 roundings of its tensor's largest weight (four were seen), or excused.

    `excused` says which entries of a tensor, given base and models, may differ; less than one in ten thousand does.
    """
    assert mine.keys() == weights.base.keys()
    strays = 0
    for name in theirs:
        base, models = weights.arrays(name, count)
        largest = max(float(np.abs(array).max()) for array in [base, *models])
        apart = np.abs(mine[name].numpy() - theirs[name].numpy())
        far = apart > 8 * EPS * largest
        if far.any():
            assert excused, f"{name}: {far.sum()} entries differ, by up to {apart.max() / largest / EPS:.0f} roundings"
            inexcusable = far & ~excused(base, models)
            assert not inexcusable.any(), f"{name}: {inexcusable.sum()} entries differ without excuse"
        strays += int(far.sum())
    assert strays < 1e-4 * sum(tensor.numel() for tensor in theirs.values())


# ---- methods without draws ----


def nearly_opposite_columns(base: Array, models: list[Array]) -> Array:
    """Between opposite task vectors we go straight; near that, float32 and float64 differ by more than a few roundings."""
    first, second = (task_vector(model, base) for model in models)
    norms = np.linalg.norm(first, axis=0) * np.linalg.norm(second, axis=0)
    cosine = np.sum(first * second, axis=0) / np.where(norms == 0, 1, norms)
    return np.broadcast_to(cosine < -0.99, base.shape)


@dataclass(frozen=True)
class Case:
    method: str
    parameters: dict[str, Any]
    models: int = 3
    excused: Excuse | None = None
    dtype: Any = torch.float32


CASES = {
    "linear": Case("linear", {"weight": WEIGHTS}),
    "linear, not normalised": Case("linear", {"weight": WEIGHTS, "normalize": False}),
    "task_arithmetic": Case("task_arithmetic", {"weight": WEIGHTS, "lambda": 0.8}),
    "task_arithmetic, normalised": Case("task_arithmetic", {"weight": WEIGHTS, "normalize": True}),
    "slerp": Case("slerp", {"t": 0.3}, 1),
    "nuslerp": Case("nuslerp", {"weight": [0.3, 0.6]}, 2),
    "nuslerp by rows": Case("nuslerp", {"weight": [0.3, 0.6], "nuslerp_flatten": False}, 2),
    "nuslerp by columns": Case(
        "nuslerp",
        {"weight": [0.3, 0.6], "nuslerp_flatten": False, "nuslerp_row_wise": True},
        2,
        nearly_opposite_columns,
    ),
    "multislerp": Case("multislerp", {"weight": WEIGHTS[:2]}, 2),
    # mergekit's float32 dot product over the 1e7 entries of the embeddings is off by a thousand roundings
    "karcher": Case("karcher", {}, dtype=torch.float64),
    "model_stock": Case("model_stock", {}),
    "model_stock by filter": Case("model_stock", {"filter_wise": True}),
    "nearswap": Case("nearswap", {"t": 1e-4}, 1),
    "ram": Case("ram", {}),
    "ramplus_tl": Case("ramplus_tl", {"r": 0.3, "alpha": 0.5}),
    "sce": Case("sce", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_mergekit(case: str, weights: Weights, tmp_path: Path) -> None:
    method, parameters, count = CASES[case].method, CASES[case].parameters, CASES[case].models
    theirs = mergekit_merge(weights.base, weights.models[:count], method, parameters, dtype=CASES[case].dtype)
    mine = ours(weights, tmp_path / "out", method, parameters, count)
    assert_agree(mine, theirs, weights, count, CASES[case].excused)


def test_multislerp_of_three_task_vectors_agrees_where_mergekit_has_an_answer(weights: Weights, tmp_path: Path) -> None:
    """mergekit refuses a tensor that no model changed (the pooler, which the training leaves alone); ours keeps it."""
    changed = {name for name in weights.base if any((m[name] != weights.base[name]).any() for m in weights.models)}
    assert weights.base.keys() - changed == {"pooler.dense.weight", "pooler.dense.bias"}
    base, *models = ({name: state[name] for name in changed} for state in (weights.base, *weights.models))
    theirs = mergekit_merge(base, models, "multislerp", {"weight": WEIGHTS})
    mine = ours(weights, tmp_path / "out", "multislerp", {"weight": WEIGHTS}, 3)
    assert_agree(mine, theirs, weights, 3, None)
    for name in weights.base.keys() - changed:
        assert torch.equal(mine[name], weights.base[name])


# ---- methods that trim: entries that tie at the threshold are kept by position here, at will there ----


def tied_at(*largest: Callable[[int], int]) -> Excuse:
    """Entries where a task vector has the very magnitude of its k-th largest, for one of the functions n → k."""

    def excused(base: Array, models: list[Array]) -> Array:
        tied = np.zeros(base.shape, dtype=bool)
        for model in models:
            size = np.abs(task_vector(model, base))
            descending = np.sort(size.ravel())[::-1]
            for k in largest:
                tied |= size == descending[min(max(k(size.size), 1), size.size) - 1]
        return tied

    return excused


TRIMMED = {
    "ties": ({"weight": WEIGHTS, "density": 0.3}, tied_at(lambda n: int(0.3 * n))),
    "ties, rescaled": (
        {"weight": WEIGHTS, "density": 0.3, "rescale": True, "normalize": False, "lambda": 0.7},
        tied_at(lambda n: int(0.3 * n)),
    ),
    "breadcrumbs": (
        {"weight": WEIGHTS, "density": 0.6, "gamma": 0.05},
        tied_at(lambda n: int(0.05 * n), lambda n: int(0.05 * n) + int(0.6 * n)),
    ),
    "breadcrumbs_ties": (
        {"weight": WEIGHTS, "density": 0.6, "gamma": 0.05},
        tied_at(lambda n: int(0.05 * n), lambda n: int(0.05 * n) + int(0.6 * n)),
    ),
}


@pytest.mark.parametrize("case", TRIMMED)
def test_trimming_agrees_with_mergekit(case: str, weights: Weights, tmp_path: Path) -> None:
    parameters, excused = TRIMMED[case]
    method = case.split(",")[0]
    names = weights.base.keys() - {EMBEDDINGS}  # thousands of equals there, which mergekit orders at will and slowly
    base, *models = ({name: state[name] for name in names} for state in (weights.base, *weights.models))
    mine = ours(weights, tmp_path / "out", method, parameters, 3)
    assert_agree(mine, mergekit_merge(base, models, method, parameters), weights, 3, excused)
    if case == "ties":  # there the oracle tells: equals go by position
        exact = oracle(method, *weights.arrays(EMBEDDINGS, 3), **parameters)
        assert np.abs(mine[EMBEDDINGS].numpy() - exact).max() < 2 * EPS * np.abs(exact).max()


def test_sce_selection_agrees_with_mergekit(weights: Weights, tmp_path: Path) -> None:
    """Variances within float32 rounding of the k-th largest may fall either way."""

    def excused(base: Array, models: list[Array]) -> Array:
        variance = np.var([task_vector(model, base) for model in models], axis=0)
        descending = np.sort(variance.ravel())[::-1]
        threshold = descending[max(int(0.2 * np.count_nonzero(variance)), 1) - 1]
        return np.abs(variance - threshold) <= 1e-5 * threshold

    theirs = mergekit_merge(weights.base, weights.models, "sce", {"select_topk": 0.2})
    assert_agree(ours(weights, tmp_path / "out", "sce", {"select_topk": 0.2}, 3), theirs, weights, 3, excused)


def test_arcee_fusion_agrees_with_mergekit_in_float64(weights: Weights, tmp_path: Path) -> None:
    """In float32 mergekit's row divergences are mostly rounding; of tensors over 1e6 entries it samples the quantiles."""
    names = [name for name, tensor in weights.base.items() if tensor.numel() <= 1_000_000]
    base, model = ({name: state[name] for name in names} for state in (weights.base, weights.models[0]))
    theirs = mergekit_merge(base, [model], "arcee_fusion", dtype=torch.float64)
    mine = ours(weights, tmp_path / "out", "arcee_fusion", {}, 1)
    limits = {name: EPS * base[name].abs().max() for name in names}
    chosen_otherwise = sum(int((mine[name] - theirs[name]).abs().gt(limits[name]).sum()) for name in names)
    assert chosen_otherwise < 2e-5 * sum(tensor.numel() for tensor in base.values())
    for name, tensor in mine.items():
        model = weights.models[0][name]
        assert ((tensor == weights.base[name]) | (tensor - model).abs().le(EPS * model.abs().max())).all()


# ---- methods that draw: other random numbers than mergekit's, equal in distribution ----

DRAWN = {
    "dare_linear": {"density": 0.4},
    "dare_ties": {"density": 0.4},
    "della_linear": {"density": 0.4, "epsilon": 0.2},
    "della": {"density": 0.4, "epsilon": 0.2, "normalize": False},
}


def moments(values: Array) -> tuple[float, float, float, float]:
    """Mean and second moment, each with its standard error."""
    squares = values**2
    return (
        float(values.mean()), float(values.std() / np.sqrt(values.size)),
        float(squares.mean()), float(squares.std() / np.sqrt(values.size)),
    )  # fmt: skip


@pytest.mark.parametrize("method", DRAWN)
@pytest.mark.parametrize("rescale", [True, False], ids=["by norm", "not rescaled"])
def test_draws_equal_mergekits_in_distribution(method: str, rescale: bool, weights: Weights, tmp_path: Path) -> None:
    """What is added to the base, over the 6e5 entries of one matrix: how much is zero, its mean and its mean square.

    Five standard errors of a difference between two independent draws.
    """
    parameters = {"weight": WEIGHTS, "rescale": rescale, **DRAWN[method]}
    name, own = BIG, {"rescale_by": "norm"}
    mine = ours(weights, tmp_path / "out", method, {**parameters, **own}, 3, seed=3)[name]
    theirs = mergekit_merge(
        {name: weights.base[name]}, [{name: m[name]} for m in weights.models], method, parameters, seed=3
    )[name]
    added = [(result - weights.base[name]).double().numpy() for result in (mine, theirs)]
    zeros = [float((a == 0).mean()) for a in added]
    assert abs(zeros[0] - zeros[1]) < 5 * np.sqrt(2 * zeros[1] * (1 - zeros[1]) / added[0].size)
    (mean, mean_error, square, square_error), (mean1, mean_error1, square1, square_error1) = map(moments, added)
    assert abs(mean - mean1) < 5 * np.hypot(mean_error, mean_error1)
    assert abs(square - square1) < 5 * np.hypot(square_error, square_error1)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_share_kept_follows_the_magnitude_as_mergekits_does(method: str, weights: Weights, tmp_path: Path) -> None:
    """By tenths of the ranks within a row; a single model, so that what is kept shows in the result."""
    parameters = {"weight": [1.0], "rescale": False, **DRAWN[method]}
    mine = ours(weights, tmp_path / "out", method, parameters, 1)[BIG].numpy()
    theirs = mergekit_merge({BIG: weights.base[BIG]}, [{BIG: weights.models[0][BIG]}], method, parameters)[BIG].numpy()
    base, (model,) = weights.arrays(BIG, 1)
    tau = task_vector(model, base)
    tenth = np.abs(tau).argsort(axis=1).argsort(axis=1) * 10 // tau.shape[1]
    chance = keep_probability(tau, 0.4, DRAWN[method].get("epsilon"))
    for i in range(10):
        # an entry may be kept and yet leave no trace: smaller than half a rounding of the base's
        group = (tenth == i) & (base + tau.astype(np.float32) != base)
        error = np.sqrt(np.sum(chance[group] * (1 - chance[group]))) / group.sum()
        for result in (mine, theirs):
            assert abs(np.mean(result[group] != base[group]) - chance[group].mean()) < 5 * error


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_rescaling_by_probability_keeps_the_task_vectors_on_average(
    method: str, weights: Weights, tmp_path: Path
) -> None:
    """The default, which mergekit has not: the inner product with the undropped sum is that sum's own, within five
    standard errors; mergekit's norm rule gets it right for DARE only."""
    parameters = {"weight": WEIGHTS, **DRAWN[method]}
    mine = ours(weights, tmp_path / "out", method, parameters, 3)[BIG].double().numpy()
    base, models = weights.arrays(BIG, 3)
    full = oracle("task_arithmetic", base, models, weight=WEIGHTS) - base
    variance = np.zeros(base.shape)
    for weight, model in zip(WEIGHTS, models, strict=True):
        tau = task_vector(model, base)
        p = keep_probability(tau, 0.4, DRAWN[method].get("epsilon"))
        variance += (weight * tau) ** 2 * (1 - p) / p
    error = np.sqrt(np.sum(full**2 * variance)) / np.sum(full**2)
    assert abs(np.sum((mine - base) * full) / np.sum(full**2) - 1) < 5 * error
