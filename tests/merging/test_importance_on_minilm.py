"""Fisher merging, RegMean and OBIM of real specialists of all-MiniLM-L6-v2, by their real statistics, against the oracles."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import merging
from merging import Recipe
from merging.ownership import FOLDER, OWNERS
from merging.statistics import Statistics, open_statistics
from tests.conftest import MiniLMFamily
from tests.oracles.merge_methods import oracle
from tests.oracles.thinning import Array, task_vector

pytestmark = pytest.mark.slow

EPS = 2.0**-23
WORDS = ("iron", "salt", "river", "lens", "choir", "tax", "moss", "engine")


@dataclass(frozen=True)
class Family:
    base: dict[str, Array]
    models: list[dict[str, Array]]
    paths: MiniLMFamily
    stats: dict[str, list[Statistics]]  # by kind, of each model


@pytest.fixture(scope="module")
def family(minilm_family: MiniLMFamily, tmp_path_factory: pytest.TempPathFactory) -> Family:
    pytest.importorskip("sentence_transformers")
    from merging.statistics import collect

    folder = tmp_path_factory.mktemp("statistics")
    texts = folder / "texts.jsonl"
    rows = [{"query": f"what is {word}", "positive": f"all about {word}, at length"} for word in WORDS]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stats: dict[str, list[Statistics]] = {}
    for kind in ("fisher", "moments", "gram"):
        for i, path in enumerate(minilm_family.specialists):
            collect(str(path), texts, kind, folder / f"{kind}-{i}", examples=8, candidates=3)
            stats.setdefault(kind, []).append(open_statistics(folder / f"{kind}-{i}"))
    return Family(tensors(minilm_family.base), [tensors(p) for p in minilm_family.specialists], minilm_family, stats)


def tensors(folder: Path) -> dict[str, Array]:
    from safetensors.numpy import load_file

    return {name: t for name, t in load_file(folder / "model.safetensors").items() if t.dtype == np.float32}


def merged(family: Family, out: Path, method: str, kind: str, **parameters: Any) -> dict[str, Array]:
    models = [
        {"model": str(path), "stats": str(stats.path)}
        for path, stats in zip(family.paths.specialists, family.stats[kind], strict=True)
    ]
    merging.merge(Recipe(method, models, str(family.paths.base), parameters or None, "float32"), out)
    return tensors(out)


def assert_equals(
    family: Family, result: dict[str, Array], method: str, kind: str, units: Any = (1.0, 1.0, 1.0), **parameters: Any
) -> None:
    """Within eight roundings; statistics are divided by `units`."""
    assert result.keys() == family.base.keys()
    for name, tensor in result.items():
        statistics = [
            stats.array(name) / unit if name in stats else None
            for stats, unit in zip(family.stats[kind], units, strict=True)
        ]
        models = [model[name] for model in family.models]
        exact = oracle(method, None, models, statistics=statistics, **parameters)
        largest = max(float(np.abs(model).max()) for model in models)
        np.testing.assert_allclose(tensor, exact, rtol=0, atol=8 * EPS * largest, err_msg=name)


def test_fisher_equals_the_oracle_whose_norm_is_over_the_whole_model(family: Family, tmp_path: Path) -> None:
    result = merged(family, tmp_path / "out", "fisher", "fisher")
    units = []
    for stats in family.stats["fisher"]:
        squares = [float((stats.array(name).astype(np.float64) ** 2).sum()) for name in stats.names]
        units.append(np.sqrt(sum(squares) / sum(stats.array(name).size for name in stats.names)))
    assert_equals(family, result, "fisher", "fisher", units, normalize=False, floor_is="absolute")


def test_regmean_equals_the_oracle(family: Family, tmp_path: Path) -> None:
    """Damping as large as the rounding of the Gram matrices asks for: few texts leave most directions of 384 open."""
    result = merged(family, tmp_path / "out", "regmean", "gram", damping=1e-4)
    assert_equals(family, result, "regmean", "gram", damping=1e-4)


def test_regmean_is_nearer_to_what_the_layers_put_out_than_the_average(family: Family, tmp_path: Path) -> None:
    """Σ tr((W − Wᵢ) Gᵢ (W − Wᵢ)ᵀ), the loss that its formula minimises, layer by layer."""
    result = merged(family, tmp_path / "out", "regmean", "gram", alpha=1.0)
    mean = {name: np.mean([model[name] for model in family.models], axis=0) for name in result}

    def loss(weights: dict[str, Array], name: str) -> float:
        total = 0.0
        for model, stats in zip(family.models, family.stats["gram"], strict=True):
            apart = weights[name].astype(float) - model[name]
            total += float(np.sum((apart @ stats.array(name)) * apart))
        return total

    names = family.stats["gram"][0].names
    assert len(names) >= 36
    ratios = [loss(result, name) / loss(mean, name) for name in names if loss(mean, name) > 0]
    assert max(ratios) <= 1.001
    assert np.median(ratios) < 0.9


@pytest.mark.parametrize("kind", ["moments", "fisher"])
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_obim_is_one_models_at_every_coordinate_and_the_map_says_whose(
    kind: str, scope: str, family: Family, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    result = merged(family, tmp_path / "out", "obim", kind, scope=scope)
    owners = load_file(tmp_path / "out" / FOLDER / OWNERS)
    for name, tensor in result.items():
        base, models = family.base[name], [model[name] for model in family.models]
        moved = [base, *(base + (model - base) for model in models)]
        np.testing.assert_array_equal(tensor, np.choose(owners[name], moved), err_msg=name)
        assert (owners[name] > 0).sum() <= 3 * max(1, tensor.size // 3)
        if scope == "tensor":  # of what it was free to claim, nobody left anything better behind
            for i, stats in enumerate(family.stats[kind]):
                weight = stats.array(name).astype(np.float64) if name in stats else 1.0
                score = np.broadcast_to(weight, base.shape) * task_vector(models[i], base) ** 2
                mine, free = owners[name] == i + 1, (owners[name] == 0) | (owners[name] > i + 1)
                if mine.any() and free.any():
                    assert score[mine].min() >= score[free].max() * (1 - 1e-5)


def test_the_merge_loads_and_encodes(family: Family, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    merged(family, tmp_path / "out", "obim", "moments")
    embedding = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(["a text"])
    assert np.isfinite(embedding).all() and embedding.shape == (1, 384)
