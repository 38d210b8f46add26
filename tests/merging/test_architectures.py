"""Every method on small checkpoints of every architecture: the result loads in its class and holds what it should."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import merging
from merging import Recipe
from merging.methods import METHODS, Method
from merging.statistics import Statistics
from tests.architectures import ARCHITECTURES, Architecture, Family, build
from tests.handmade_statistics import write_stats
from tests.oracles.merge_methods import RANDOM, oracle, ties_global
from tests.oracles.settings import count_of, masks_of, parameters_of
from tests.oracles.thinning import Array

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SEED = 11

#: One recipe for each method. Weights are powers of two: among bfloat16 weights sums of zero are common, and float32
#: then elects the sign that the oracle elects. A method that is not listed gets the simplest parameters it accepts.
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": [0.5, 1.0, 0.25]},
    "task_arithmetic": {"weight": [0.5, -0.25, 1.0], "lambda": 0.5},
    "ties": {"weight": [0.5, 1.0, 2.0], "density": [0.3, 0.7, 1.0]},
    "breadcrumbs": {"weight": [0.5, -0.25, 1.0], "density": 0.6, "gamma": 0.05},
    "breadcrumbs_ties": {"weight": [0.5, 1.0, 2.0], "density": [0.5, 0.9, 1.0], "gamma": 0.05, "lambda": 0.5},
    "dare_linear": {"weight": [0.5, -0.25, 1.0], "density": 0.5},
    "dare_ties": {"weight": [0.5, 1.0, 2.0], "density": [0.5, 0.25, 1.0], "normalize": True},
    "della_linear": {"weight": [0.5, -0.25, 1.0], "density": 0.5, "rescale_by": "norm"},
    "della": {"weight": [0.5, 1.0, 2.0], "density": 0.5, "epsilon": 0.25, "rescale": False},
    "slerp": {"t": 0.25},
    "nuslerp": {"weight": [0.5, 1.0]},
    "multislerp": {"weight": [0.5, 1.0, 0.25]},
    "karcher": {},
    "model_stock": {},
    "sce": {},
    "arcee_fusion": {},
    "nearswap": {"t": 0.01},
    "ram": {"epsilon": 0.01},
    "ramplus_tl": {"epsilon": 0.01},
    # Norms are the whole model's, and the oracle sees a tensor.
    "fisher": {"weight": [0.5, 1.0, 0.25], "normalize": False, "floor_is": "absolute"},
    "regmean": {"weight": [0.5, 1.0, 0.25], "damping": 0.01},
    "obim": {"density": [0.5, 0.25, 0.5], "lambda": 0.5},
}


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return _build(request.param, tmp_path_factory.getbasetemp() / "zoo" / request.param)


@functools.cache
def _build(name: str, folder: Path) -> Family:
    return build(name, folder)


@functools.cache
def statistics_of(path: Path, kind: str) -> Statistics:
    return write_stats(path.parent / f"{path.name}-{kind}", path, kind)


def recipe_for(method: Method, family: Family) -> tuple[Recipe, dict[str, Any], list[Path]]:
    """The recipe, its parameters, and the models that the method merges (the base apart)."""
    parameters = PARAMETERS.get(method.name) or parameters_of(method)
    paths = list(family.specialists[: count_of(method)])
    shared = {key: value for key, value in parameters.items() if not isinstance(value, list)}
    models = [
        {"model": str(path), "parameters": {key: value[i] for key, value in parameters.items() if key not in shared}}
        for i, path in enumerate(paths)
    ]
    if works_by_statistics(method):
        for entry, path in zip(models, paths, strict=True):
            entry["stats"] = str(statistics_of(path, method.statistics[0]).path)
    recipe = Recipe(merge_method=method.name, base_model=str(family.base), models=models, parameters=shared)
    return recipe, parameters, paths


@pytest.mark.parametrize("method", [pytest.param(method, id=name) for name, method in METHODS.items()])
@pytest.mark.parametrize("family", ARCHITECTURES, indirect=True)
def test_merge_of_any_architecture_loads_and_equals_the_oracle(method: Method, family: Family, tmp_path: Path) -> None:
    recipe, parameters, paths = recipe_for(method, family)
    out = tmp_path / "out"
    merging.merge(recipe, out, seed=SEED)

    base, result = tensors(family.base), tensors(out)
    assert {name: (t.shape, t.dtype) for name, t in result.items()} == {
        name: (t.shape, t.dtype) for name, t in base.items()
    }
    loads_in_its_class(family.architecture, out)
    if method.name in PARAMETERS:
        models = [tensors(path) for path in paths]
        known = statistics_of(paths[0], method.statistics[0]).names[:1] if works_by_statistics(method) else ()
        for name in [*sample(base), *known]:
            if known:
                parameters = parameters | read_statistics(
                    [statistics_of(path, method.statistics[0]) for path in paths], name
                )
            assert_rounded_once(result[name], truth(method, name, base, models, parameters), name)


def works_by_statistics(method: Method) -> bool:
    """With its default parameters."""
    name, value = method.statistics_if or ("", "")
    return bool(method.statistics) and (not name or method.parameters[name].default == value)


def read_statistics(folders: list[Statistics], name: str) -> dict[str, Any]:
    """What the oracles want to know of a tensor."""
    arrays = [folder.array(name) if name in folder else None for folder in folders]
    return {"statistics": arrays, **({"axis": folders[0].axes.get(name, 1)} if folders[0].kind == "gram" else {})}


@pytest.mark.parametrize("family", ["bert", "llama"], indirect=True)  # float32 and bfloat16
def test_global_ties_trims_over_the_whole_model(family: Family, tmp_path: Path) -> None:
    parameters = {"weight": [0.5, 1.0, 2.0], "density": [0.3, 0.05, 1.0]}
    models = [
        {"model": str(path), "parameters": {key: value[i] for key, value in parameters.items()}}
        for i, path in enumerate(family.specialists)
    ]
    merging.merge(Recipe("ties", models, str(family.base), {"scope": "global"}), tmp_path / "out")
    base, *others = (
        {name: tensor.float().numpy() for name, tensor in tensors(path).items()}
        for path in (family.base, *family.specialists)
    )
    exact = ties_global(base, others, **parameters)
    for name, tensor in tensors(tmp_path / "out").items():
        assert_rounded_once(tensor, exact[name], name)


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def loads_in_its_class(architecture: Architecture, out: Path) -> None:
    """No tensor is missing, unexpected or of another shape; what was tied is tied; the forward pass is finite."""
    model, info = architecture.model_class().from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    fresh = architecture.new(0)
    for name, parameter in fresh.named_parameters(remove_duplicate=False):
        aliases = [other for other, value in fresh.named_parameters(remove_duplicate=False) if value is parameter]
        assert model.get_parameter(name) is model.get_parameter(aliases[0])
    if architecture.forward:
        with torch.no_grad():
            outputs = model(**architecture.forward())
        values = [value for value in outputs.values() if isinstance(value, torch.Tensor)]
        assert values
        assert all(torch.isfinite(value).all() for value in values)


def sample(base: dict[str, Any]) -> list[str]:
    """A few tensors: the first of every number of dimensions, and the last of all."""
    first = {tensor.ndim: name for name, tensor in reversed(base.items())}
    return list(dict.fromkeys([*first.values(), list(base)[-1]]))


def truth(
    method: Method, name: str, base: dict[str, Any], models: list[dict[str, Any]], parameters: dict[str, Any]
) -> Array:
    """The oracle's result for one tensor, of a random method with the masks that its name and the seed draw."""
    start = base[name].float().numpy() if method.base != "none" else None
    arrays = [model[name].float().numpy() for model in models]
    if method.name in RANDOM:
        assert start is not None
        parameters = {**parameters, "masks": masks_of(method.name, start, arrays, SEED, key=name, **parameters)}
    return oracle(method.name, start, arrays, **parameters)


def assert_rounded_once(result: Any, exact: Array, name: str) -> None:
    """Half a unit in the last place of the stored dtype, and a few roundings of the float32 arithmetic before it."""
    half = torch.finfo(result.dtype).eps / 2
    slack = 8 * 2.0**-24 * float(np.abs(exact).max(initial=0))
    tiny = torch.finfo(result.dtype).smallest_normal * half
    np.testing.assert_allclose(result.double().numpy(), exact, rtol=half, atol=slack + tiny, err_msg=name)
