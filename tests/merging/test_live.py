"""A live merge holds what `cuvee merge` writes with the recipe that it gives: to the bit, and for every method."""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import merging
from merging import CuveeError, Recipe, layers
from merging.checkpoint import Checkpoint
from merging.kernels import compiled, reference
from merging.live import LiveMerge
from merging.live_recipe import filters_of
from merging.methods import METHODS, Method
from tests.architectures import Family, build
from tests.commands import ROOT, code_blocks
from tests.conftest import MiniLMFamily
from tests.handmade_statistics import write_stats
from tests.oracles.settings import SETTINGS, count_of, parameters_of

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SEED = 5
SOME = settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
NUMBERS = st.floats(-2, 2).map(lambda x: round(x, 6))


# ---- models ----


@functools.cache
def _family(folder: Path, name: str) -> Family:
    return build(name, folder / name)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    folder = tmp_path_factory.mktemp("zoo")
    return lambda name: _family(folder, name)


def loaded(family: Family, folder: Path | None = None, dtype: Any = None) -> Any:
    dtype = dtype or family.architecture.dtype
    return family.architecture.model_class().from_pretrained(folder or family.base, dtype=dtype).eval()


def bits(module: Any) -> dict[str, Any]:
    return {
        name: value.detach().clone().view(torch.uint8) for name, value in module.named_parameters() if value.numel()
    }


def assert_same(module: Any, other: Any) -> None:
    ours, theirs = dict(module.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    different = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    assert not different


def assert_close(module: Any, other: Any, tolerance: float) -> None:
    theirs = dict(other.named_parameters())
    for name, value in module.named_parameters():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance, msg=name)


def merged(live: LiveMerge, coefficients: Mapping[str, Any], out: Path, **options: Any) -> Path:
    """What `cuvee merge` makes of the live merge's recipe."""
    merging.merge(Recipe.parse(live.recipe(coefficients)), out, force=True, seed=SEED, **options)
    return out


def refused(live: LiveMerge, coefficients: Mapping[str, Any], message: str) -> None:
    with pytest.raises(CuveeError, match=message):
        live.set(coefficients)


# ---- the real model ----


@pytest.fixture(scope="module")
def encoder(minilm: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(minilm)


@pytest.fixture(scope="module", params=["linear", "task_arithmetic"])
def minilm_live(request: pytest.FixtureRequest, minilm_family: MiniLMFamily, encoder: Any) -> Iterator[LiveMerge]:
    live = LiveMerge(
        encoder, minilm_family.base, minilm_family.specialists, method=request.param, groups=layers.group, threads=2
    )
    yield live
    live.reset()


@SOME
@given(data=st.data())
def test_minilm_holds_the_bits_of_the_merge(
    minilm_live: LiveMerge, encoder: Any, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    weights = st.lists(NUMBERS, min_size=3, max_size=3)
    if data.draw(st.booleans()):
        weights = st.fixed_dictionaries(dict.fromkeys(minilm_live.groups, weights))
    coefficients = {"weight": data.draw(weights), "normalize": False}
    live = minilm_live
    live.set(coefficients)
    with Checkpoint.open(merged(live, coefficients, tmp_path_factory.getbasetemp() / "minilm")) as checkpoint:
        for name, own in encoder.named_parameters():
            stored = checkpoint.read(checkpoint.tensors[name])
            assert np.array_equal(own.detach().numpy().view(np.uint32), stored.view(np.uint32)), name


def test_minilm_comes_back_and_embeds_like_the_specialist(minilm_family: MiniLMFamily) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm_family.base), device="cpu")
    specialist = SentenceTransformer(str(minilm_family.specialists[1]), device="cpu")
    texts = ["a vineyard in autumn", "stable storage"]
    before, start = model.encode(texts), bits(model)
    live = LiveMerge(model, minilm_family.base, minilm_family.specialists, method="linear")
    live.set({"weight": [0.0, 1.0, 0.0]})
    np.testing.assert_array_equal(model.encode(texts), specialist.encode(texts))
    live.reset()
    assert all(torch.equal(value, start[name]) for name, value in bits(model).items())
    np.testing.assert_array_equal(model.encode(texts), before)


def test_the_documented_code_runs(minilm_family: MiniLMFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, folder in zip(("base", "specialist-a", "specialist-b"), minilm_family.specialists, strict=True):
        (tmp_path / name).symlink_to(minilm_family.base if name == "base" else folder)
    (code,) = code_blocks(ROOT / "docs" / "live.md", "python")
    exec(code, {})
    merging.merge(Recipe.load("recipe.yml"), "OUT", dry_run=True)


# ---- every method, every kind of model ----


def statistics_for(method: Method, models: Sequence[Path]) -> list[str] | None:
    if not method.statistics:
        return None
    kind = method.statistics[0]
    folders = [model.parent / f"{model.name}-{kind}" for model in models]
    for folder, model in zip(folders, models, strict=True):
        if not folder.exists():
            write_stats(folder, model, kind)
    return [str(folder) for folder in folders]


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_gives_the_bits_of_its_merge(name: str, zoo: Callable[[str], Family], tmp_path: Path) -> None:
    method, family = METHODS[name], zoo("bert")
    models = family.specialists[: count_of(method)]
    module = loaded(family)
    live = LiveMerge(
        module, family.base, models, method=name, stats=statistics_for(method, models), seed=SEED, threads=2
    )
    for parameters in [*SETTINGS.get(name, [])[::2], parameters_of(method)][:2]:
        live.set(parameters)
        assert_same(module, loaded(family, merged(live, parameters, tmp_path / "out")))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.base == "optional"])
def test_a_module_that_one_of_the_models_was_loaded_into(
    name: str, zoo: Callable[[str], Family], tmp_path: Path
) -> None:
    """Where the method can do without a base there is none then."""
    family = zoo("bert")
    models = family.specialists[: count_of(METHODS[name])]
    module = loaded(family, models[0])
    live = LiveMerge(module, models[0], models, method=name, seed=SEED)
    parameters = parameters_of(METHODS[name])
    live.set(parameters)
    assert "base_model" not in live.recipe(parameters)
    assert_same(module, loaded(family, merged(live, parameters, tmp_path / "out")))
    with pytest.raises(CuveeError, match="has no task vectors"):
        live.gradient({})


@pytest.mark.parametrize("name", ["bert-mlm", "gpt2", "qwen3", "mixtral", "t5"])
def test_every_kind_of_model_gives_the_bits_of_its_merge(
    name: str, zoo: Callable[[str], Family], tmp_path: Path
) -> None:
    """Tied heads, stored transposes, experts that are loaded into one tensor, weights in bfloat16."""
    family, module = zoo(name), loaded(zoo(name))
    start, shared = bits(module), {id(p) for p in module.parameters()}
    live = LiveMerge(module, family.base, family.specialists, groups=layers.group, seed=SEED)
    coefficients = {"weight": {g: [0.1 * i, 0.5, -0.3] for i, g in enumerate(live.groups)}, "lambda": 0.8}
    live.set(coefficients)
    assert {id(p) for p in module.parameters()} == shared
    assert_same(module, loaded(family, merged(live, coefficients, tmp_path / "out")))
    live.reset()
    assert all(torch.equal(value, start[name]) for name, value in bits(module).items())


def test_a_tied_head_stays_tied(zoo: Callable[[str], Family]) -> None:
    family = zoo("bert-mlm")
    module = loaded(family)
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight
    LiveMerge(module, family.base, family.specialists).set({"weight": 0.5})
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
@pytest.mark.parametrize("how", ["mapped", "bfloat16", "bfloat16 mapped", "torch", "torch bfloat16", "reference"])
def test_however_it_is_held(how: str, method: str, zoo: Callable[[str], Family], tmp_path: Path) -> None:
    family = zoo("bert")
    module = loaded(family)
    options: dict[str, Any] = {
        "storage": "mapped" if "mapped" in how else "memory",
        "dtype": "bfloat16" if "bfloat16" in how else "float32",
        "backend": next((backend for backend in ("torch", "reference") if backend in how), "auto"),
    }
    live = LiveMerge(module, family.base, family.specialists, method=method, **options)
    coefficients = {"weight": [0.4, -0.3, 0.8]}
    live.set(coefficients)
    other = loaded(family, merged(live, coefficients, tmp_path / "out"))
    if how in ("mapped", "reference"):
        assert_same(module, other)
    elif method != "ties":  # whose thresholds and signs fall otherwise where values are rounded
        assert_close(module, other, 1e-3 if "bfloat16" in how else 1e-6)
    live.reset()
    assert_same(module, loaded(family))


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_module_in_another_dtype_is_rounded_once(method: str, zoo: Callable[[str], Family], tmp_path: Path) -> None:
    family = zoo("bert")
    module = loaded(family, dtype=torch.bfloat16)
    live = LiveMerge(module, family.base, family.specialists, method=method)
    live.set({"weight": [0.4, 0.3, 0.8]})
    out = merged(live, {"weight": [0.4, 0.3, 0.8]}, tmp_path / "out")
    assert_same(module, loaded(family, out, dtype=torch.bfloat16))


@pytest.mark.parametrize(("name", "dtype"), [("bert", "bfloat16"), ("bert", "float16"), ("bert-mlm", None)])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_wider_module_holds_what_a_narrow_file_will(
    method: str, name: str, dtype: str | None, zoo: Callable[[str], Family], tmp_path: Path
) -> None:
    """A score in float32 is that of the model that is written, in the recipe's dtype or in that of the checkpoints."""
    family = zoo(name)
    module = loaded(family, dtype=torch.float32)
    live = LiveMerge(module, family.base, family.specialists, method=method)
    recipe = Recipe.parse(live.recipe({"weight": [0.4, 0.3, 0.8]}) + (f"dtype: {dtype}\n" if dtype else ""))
    live.apply(recipe)
    merging.merge(recipe, tmp_path / "out")
    assert_same(module, loaded(family, tmp_path / "out", dtype=torch.float32))
    live.reset()
    assert_same(module, loaded(family, dtype=torch.float32))


def test_no_file_is_read_again(zoo: Callable[[str], Family], tmp_path: Path) -> None:
    family = zoo("bert")
    folders = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in (family.base, *family.specialists)]
    module = loaded(family, folders[0])
    live = LiveMerge(module, folders[0], folders[1:], method="ties")
    for folder in folders:
        shutil.rmtree(folder)
    live.set({"weight": 1.0, "density": 0.5})
    first = bits(module)
    live.set({"weight": [1.0, 0.0, 0.0]})
    live.set({"weight": 1.0, "density": 0.5})
    assert all(torch.equal(value, first[name]) for name, value in bits(module).items())


# ---- adapters ----


def adapter(family: Family, folder: Path, seed: int, **options: Any) -> str:
    """A LoRA on the family's base, every weight of it random; as a reference."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings(), torch.random.fork_rng(), torch.no_grad():
        warnings.simplefilter("ignore")  # peft's and transformers' own
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(loaded(family), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(folder)
    return f"{family.base}+{folder}"


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_adapters_stay_factored(
    name: str, method: str, backend: str, zoo: Callable[[str], Family], tmp_path: Path
) -> None:
    family = zoo(name)
    layers_of = {"bert": ["query", "dense"], "gpt2": ["c_attn", "c_proj"]}[name]
    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    refs = [adapter(family, tmp_path / f"a{i}", i, target_modules=layers_of[: i + 1], **fan) for i in range(2)]
    module = loaded(family)
    live = LiveMerge(module, family.base, refs, method=method, backend=backend)
    whole = sum(value.numel() for value in module.parameters()) * 4
    assert live.nbytes < 1.5 * whole
    coefficients = {"weight": [0.7, -0.4]}
    live.set(coefficients)
    other = loaded(family, merged(live, coefficients, tmp_path / "out"))
    if method == "ties":
        assert backend == "torch" or assert_same(module, other) is None
    else:
        assert_close(module, other, 2e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft calls it
def test_weighted_adapters_are_one_adapter_of_all_their_ranks(zoo: Callable[[str], Family], tmp_path: Path) -> None:
    """As PIM merges them (arXiv 2505.18548): factors joined to rank M·r, √λ on both; and as peft adds that adapter."""
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file, save_file

    family, weights, layers_of = zoo("bert"), [0.7, 0.2, 1.0], ["query", "value"]
    refs = [adapter(family, tmp_path / f"a{i}", i, target_modules=layers_of) for i in range(3)]
    module = loaded(family)
    LiveMerge(module, family.base, refs, method="task_arithmetic").set({"weight": weights})
    adapter(family, tmp_path / "joined", 0, target_modules=layers_of, r=12, lora_alpha=12)
    parts = [load_file(tmp_path / f"a{i}" / "adapter_model.safetensors") for i in range(3)]
    roots = [(weight * 6 / 4) ** 0.5 for weight in weights]  # alpha / r of each
    joined = {
        name: torch.cat([root * part[name] for root, part in zip(roots, parts, strict=True)], int(".lora_B." in name))
        for name in parts[0]
    }
    save_file(joined, tmp_path / "joined" / "adapter_model.safetensors")
    whole = peft.PeftModel.from_pretrained(loaded(family), tmp_path / "joined").merge_and_unload()
    assert_close(module, whole, 2e-6)


def test_adapters_beside_whole_models(zoo: Callable[[str], Family], tmp_path: Path) -> None:
    family = zoo("bert")
    lora = adapter(family, tmp_path / "lora", 0, target_modules=["query"])
    dora = adapter(family, tmp_path / "dora", 1, target_modules=["key", "query"], use_dora=True)
    for method in ("linear", "task_arithmetic"):
        for models in ([lora, family.specialists[0]], [family.specialists[1], lora, dora]):
            for dtype, tolerance in (("float32", 2e-6), ("bfloat16", 1e-3)):
                module = loaded(family)
                live = LiveMerge(module, family.base, models, method=method, dtype=dtype)  # type: ignore[arg-type]
                coefficients = {"weight": [0.7, -0.4, 0.5][: len(models)], "normalize": False}
                live.set(coefficients)
                assert_close(module, loaded(family, merged(live, coefficients, tmp_path / "out")), tolerance)


def test_a_base_with_an_adapter(zoo: Callable[[str], Family], tmp_path: Path) -> None:
    family = zoo("bert")
    start = adapter(family, tmp_path / "start", 0, target_modules=["query"])
    other = adapter(family, tmp_path / "other", 1, target_modules=["query"])
    merging.merge(Recipe("linear", [{"model": start, "parameters": {"weight": 1.0}}]), tmp_path / "whole")
    module = loaded(family, tmp_path / "whole")
    live = LiveMerge(module, start, [other, family.specialists[0]])
    live.set({"weight": [0.5, 0.25]})
    assert_close(module, loaded(family, merged(live, {"weight": [0.5, 0.25]}, tmp_path / "out")), 2e-6)


# ---- groups ----


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_filters_tell_every_name_its_group(data: st.DataObject) -> None:
    words = st.lists(st.sampled_from(["layer", "1", "10", "11", "mlp", "w", "b", "embed"]), min_size=1, max_size=4)
    names = data.draw(st.lists(words.map(".".join), min_size=1, max_size=12, unique=True))
    groups = {name: data.draw(st.sampled_from(["layer.1", "layer.10", "mlp", "", "rest"])) for name in names}
    filters = filters_of(groups)
    for name, group in groups.items():
        assert next(own for part, own in filters if part in name) == group


def test_layer_1_is_not_layer_10() -> None:
    names = [f"encoder.layer.{i}.{part}.weight" for i in range(12) for part in ("query", "output.dense")]
    filters = filters_of({name: layers.group(name) for name in names})
    assert len(filters) == 12
    for name in names:
        assert next(own for part, own in filters if part in name) == layers.group(name)


def test_a_group_alone_is_merged(zoo: Callable[[str], Family]) -> None:
    family = zoo("bert")
    module, base = loaded(family), dict(loaded(family).named_parameters())
    live = LiveMerge(
        module, family.base, family.specialists, groups=lambda name: "attention" if "attention" in name else "rest"
    )
    assert set(live.groups) == {"attention", "rest"}
    live.set({"weight": {"attention": [1.0, 0.0, 0.0], "rest": 0.0}, "lambda": {"attention": 1.0, "rest": 3.0}})
    specialist = dict(loaded(family, family.specialists[0]).named_parameters())
    for name, value in module.named_parameters():
        torch.testing.assert_close(value, (specialist if "attention" in name else base)[name], rtol=0, atol=1e-6)


# ---- the gradient along task vectors ----


def assert_gradient_of_a_linear_loss(live: LiveMerge, module: Any) -> None:
    """L = <G, theta> for a random G: its slope by a weight is what it gains when that weight goes from 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    gradients = {n: torch.randn(p.shape, generator=generator).to(p.dtype) for n, p in module.named_parameters()}

    def loss() -> float:
        return sum(float((gradients[n].double() * p.detach().double()).sum()) for n, p in module.named_parameters())

    found = live.gradient(gradients)
    start, size = loss(), sum(p.numel() for p in module.parameters()) ** 0.5
    for group in live.groups:
        for model in range(live.models):
            one = [float(model == i) for i in range(live.models)]
            recipe = live.recipe({"weight": {g: one if g == group else 0.0 for g in live.groups}})
            live.apply(Recipe.parse(f"{recipe}out_dtype: float32\n"))
            slope = sum(values[model] for name, values in found.items() if layers.group(name) == group)
            assert slope == pytest.approx(loss() - start, rel=1e-4, abs=2e-7 * size)
    live.reset()
    some = dict(list(gradients.items())[:2])
    for name, values in live.gradient(some).items():
        np.testing.assert_array_equal(values, found[name])


@pytest.mark.parametrize("how", ["auto", "mapped", "bfloat16", "torch", "torch bfloat16"])
@pytest.mark.parametrize("name", ["bert-mlm", "gpt2", "mixtral"])
def test_the_gradient_along_task_vectors(name: str, how: str, zoo: Callable[[str], Family]) -> None:
    """Tied heads, stored transposes, experts that are loaded into one tensor."""
    family = zoo(name)
    module = loaded(family, dtype=torch.float32)
    live = LiveMerge(
        module,
        family.base,
        family.specialists,
        groups=layers.group,
        storage="mapped" if how == "mapped" else "memory",
        dtype="bfloat16" if "bfloat16" in how else "float32",
        backend="torch" if "torch" in how else "auto",
    )
    assert_gradient_of_a_linear_loss(live, module)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_gradient_along_adapters(backend: str, zoo: Callable[[str], Family], tmp_path: Path) -> None:
    family = zoo("bert")
    lora = adapter(family, tmp_path / "lora", 0, target_modules=["query", "dense"])
    dora = adapter(family, tmp_path / "dora", 1, target_modules=["key", "query"], use_dora=True)
    module = loaded(family)
    live = LiveMerge(module, family.base, [lora, family.specialists[0], dora], groups=layers.group, backend=backend)
    assert_gradient_of_a_linear_loss(live, module)


def test_the_gradient_is_the_same_for_any_number_of_threads(minilm_family: MiniLMFamily) -> None:
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(minilm_family.base)
    generator = torch.Generator().manual_seed(0)
    gradients = {n: torch.randn(p.shape, generator=generator) for n, p in encoder.named_parameters()}
    one, three = (
        LiveMerge(encoder, minilm_family.base, minilm_family.specialists, threads=threads).gradient(gradients)
        for threads in (1, 3)
    )
    for name, values in one.items():
        np.testing.assert_array_equal(values, three[name])


def test_no_gradient_without_a_base(zoo: Callable[[str], Family]) -> None:
    family = zoo("bert")
    live = LiveMerge(loaded(family), family.base, family.specialists, method="linear")
    with pytest.raises(CuveeError, match="has no task vectors"):
        live.gradient({})


# ---- mistakes ----


def test_mistakes_are_told_before_a_weight_changes(zoo: Callable[[str], Family]) -> None:
    family = zoo("bert")
    module = loaded(family)
    live = LiveMerge(module, family.base, family.specialists, method="ties", groups=layers.group)
    refused(live, {"wieght": 1.0}, "did you mean 'weight'")
    refused(live, {"weight": [1.0, 2.0]}, "2 values for 3 models")
    refused(live, {"weight": 1.0, "density": 1.5}, r"outside \[0, 1\]")
    refused(live, {"weight": {"attention": 1.0}}, "is no group")
    refused(live, {"weight": dict.fromkeys(live.groups[1:], 1.0)}, "no value for the group")
    refused(live, {}, "needs")
    assert_same(module, loaded(family))


def test_a_merge_that_overflows_is_told(zoo: Callable[[str], Family]) -> None:
    family = zoo("bert")
    for method, how in (("linear", {"weight": 3e38, "normalize": False}), ("ties", {"weight": 1.0, "lambda": 1e300})):
        module = loaded(family)
        live = LiveMerge(module, family.base, family.specialists, method=method)
        refused(live, how, "infinite or NaN")
        live.reset()
        assert_same(module, loaded(family))


def test_other_modules_and_models_are_refused(zoo: Callable[[str], Family], tmp_path: Path) -> None:
    family = zoo("bert")
    with pytest.raises(CuveeError, match="load the module from the base"):
        LiveMerge(loaded(family, family.specialists[0]), family.base, family.specialists)
    with pytest.raises(CuveeError, match="the base is among the models"):
        LiveMerge(loaded(family), family.base, [family.base, *family.specialists])
    with pytest.raises(CuveeError, match="is no choice for 'dtype'"):
        LiveMerge(loaded(family), family.base, family.specialists, dtype="float8")  # type: ignore[arg-type]
    with pytest.raises(CuveeError, match="is no choice for 'storage'"):
        LiveMerge(loaded(family), family.base, family.specialists, storage="disk")  # type: ignore[arg-type]
    with pytest.raises(CuveeError, match="on the CPU"):
        LiveMerge(loaded(family), family.base, family.specialists, storage="mapped", device="cuda")
    with pytest.raises(CuveeError, match="statistics of 1 models"):
        LiveMerge(loaded(family), family.base, family.specialists, method="fisher", stats=["x"])


# ---- kernels ----


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3000), st.integers(1, 4), st.integers(0, 50), st.booleans(), st.integers(0, 999))
def test_kernels_agree(size: int, count: int, start: int, with_base: bool, seed: int) -> None:
    from merging.kernels.device import TorchKernels

    rng = np.random.default_rng(seed)
    models = rng.normal(size=(count, size + start)).astype(np.float32)
    base = rng.normal(size=size + start).astype(np.float32)
    factors = rng.normal(size=count).astype(np.float32)
    deltas = (models.view(np.uint32) >> 16).astype(np.uint16)
    device = TorchKernels("cpu")
    outs = np.empty((6, size), np.float32)
    origin = base if with_base else None
    for kernels, out in ((compiled, outs[0]), (reference, outs[1])):
        assert kernels.blend(factors, models, origin, start, out)
    for kernels, out in ((compiled, outs[3]), (reference, outs[4])):
        assert kernels.blend_deltas(factors, deltas, base, 0.7, start, out)
    on_device = [torch.from_numpy(array) for array in (factors, models, base, outs[2], outs[5])]
    device.blend(on_device[0], on_device[1], on_device[2] if with_base else None, start, on_device[3])
    rows = torch.from_numpy(deltas.view(np.int16)).view(torch.bfloat16)
    device.blend_deltas(on_device[0], rows, on_device[2], 0.7, start, on_device[4])
    np.testing.assert_array_equal(outs[0].view(np.uint32), outs[1].view(np.uint32))
    np.testing.assert_array_equal(outs[3].view(np.uint32), outs[4].view(np.uint32))
    np.testing.assert_allclose(outs[2], outs[1], atol=1e-5)
    np.testing.assert_allclose(outs[5], outs[4], atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_kernels_see_what_is_not_finite(bad: float) -> None:
    models, base, out = np.ones((1, 5000), np.float32), np.ones(5000, np.float32), np.empty(5000, np.float32)
    models[0, 4321] = base[4321] = bad
    deltas = np.zeros((1, 5000), np.uint16)
    factors = np.ones(1, np.float32)
    for kernels in (compiled, reference):
        with np.errstate(invalid="ignore"):
            assert not kernels.blend(factors, models, None, 0, out)
            assert not kernels.blend(factors, models, base, 0, out)
            assert not kernels.blend_deltas(factors, deltas, base, 1.0, 0, out)
        assert kernels.blend(factors, models, None, 0, out[:4000])
