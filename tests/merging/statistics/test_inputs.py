"""Input statistics against a float64 computation from single texts without padding, on models of many architectures."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merging.statistics.inputs import InputSums, Ragged
from merging.statistics.network import Network, open_network
from tests.merging.statistics.models import HEADS, classifier, model, reference, sentences

torch = pytest.importorskip("torch")


def measured(network: Network, kind: str, texts: list[str], batch: int = 4) -> tuple[dict[str, Any], dict[str, int]]:
    tokens = network.read(texts)
    with InputSums(network, kind) as sums:
        for start in range(0, len(tokens), batch):
            sums.add(network.features(tokens[start : start + batch]))
        return {name: own.numpy() for name, own in sums.means().items()}, sums.axes


def truth(network: Network, folder: Path, texts: list[str]) -> dict[str, Any]:
    module = copy.deepcopy(network.module)
    exact = Network(module, network.reader, network.head, network.names, network.max_length)

    def run(text: str) -> Any:
        features = exact.features(exact.read([text]))
        assert bool(features["attention_mask"].all())
        return lambda: module(features) if network.head == "embedding" else module(**features)

    return reference(folder, module, [run(text) for text in texts])


@pytest.mark.parametrize("name", HEADS)
def test_moments_and_gram_equal_float64_of_single_texts(name: str, tmp_path: Path) -> None:
    folder = model(name, tmp_path)
    network = open_network(str(folder))
    assert network.head == HEADS[name]
    texts = sentences(11)
    exact = truth(network, folder, texts)
    assert len(exact) >= 8
    gram, axes = measured(network, "gram", texts)
    moments, _ = measured(network, "moments", texts)
    assert gram.keys() == moments.keys() == exact.keys() == {name for name in axes if name in gram}
    for name, own in exact.items():
        scale = np.abs(own).max()
        np.testing.assert_allclose(gram[name], own, atol=2e-6 * scale, rtol=1e-5)
        np.testing.assert_array_equal(gram[name], gram[name].T)
        assert moments[name].shape == ((1, len(own)) if axes[name] == 1 else (len(own), 1))
        np.testing.assert_allclose(moments[name].reshape(-1), np.diag(own), atol=2e-6 * scale, rtol=1e-5)


@pytest.mark.parametrize("labels", [1, 3])
def test_a_classifiers_head_and_pooler_read_one_row_a_text(labels: int, tmp_path: Path) -> None:
    folder = classifier(tmp_path / "c", labels)
    network = open_network(str(folder))
    assert network.head == ("regression" if labels == 1 else "classification")
    texts = sentences(7)
    exact = truth(network, folder, texts)
    moments, _ = measured(network, "moments", texts)
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= exact.keys() == moments.keys()
    for name, own in exact.items():
        np.testing.assert_allclose(moments[name][0], np.diag(own), rtol=1e-4, atol=1e-6 * np.abs(own).max())


def test_the_order_and_size_of_batches_change_nothing_but_rounding(tmp_path: Path) -> None:
    network = open_network(str(model("gpt2", tmp_path)))
    texts = sentences(12)
    one, _ = measured(network, "gram", texts, batch=1)
    all_, _ = measured(network, "gram", texts[::-1], batch=12)
    for name, own in one.items():
        np.testing.assert_allclose(all_[name], own, atol=1e-6 * np.abs(own).max())


def test_the_axis_of_conv1d_is_the_first(tmp_path: Path) -> None:
    network = open_network(str(model("gpt2", tmp_path)))
    _, axes = measured(network, "gram", sentences(2))
    assert set(axes.values()) == {0} and "lm_head.weight" not in axes


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: torch.nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
        (lambda: torch.nn.Conv1d(4, 6, 3, padding="same", dilation=2, groups=2), (2, 4, 7)),
        (lambda: torch.nn.Conv2d(3, 5, 4, stride=4), (2, 3, 8, 12)),
        (lambda: torch.nn.Conv3d(3, 5, (2, 4, 4), stride=(2, 4, 4), bias=False), (6, 3, 2, 4, 4)),
    ],
    ids=["padded", "groups", "patches", "qwen2-vl"],
)
def test_moments_under_a_convolution_equal_a_loop(layer: Any, shape: tuple[int, ...]) -> None:
    from merging.statistics.inputs import _convolved

    torch.manual_seed(0)
    module, values = layer(), torch.randn(shape)
    sums, positions = _convolved(module, values)
    weight = module.weight.detach().double()
    inputs = values.double()
    exact = torch.zeros_like(weight)
    for place in range(weight.numel()):  # what each weight alone multiplies, squared
        alone = torch.zeros_like(weight).reshape(-1)
        alone[place] = 1
        seen = module.double()._conv_forward(inputs, alone.reshape(weight.shape), None)
        exact.reshape(-1)[place] = seen.square().sum()
    outputs = module._conv_forward(inputs, weight, None)
    assert positions == outputs.numel() // outputs.shape[1]
    np.testing.assert_allclose(sums.expand(weight.shape).numpy(), exact.numpy(), rtol=1e-5)


class Flat(torch.nn.Module):
    """Reads its rows without the texts' axis."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, values: Any) -> Any:
        return self.inner(values.reshape(-1, values.shape[-1])).reshape(*values.shape[:-1], -1)


def test_rows_that_nobody_can_tell_from_padding_want_batches_without(tmp_path: Path) -> None:
    network = open_network(str(model("bert", tmp_path)))
    texts = ["w1 w2", "w3 w4", "w5", "w6 w7 w8"]
    exact, _ = measured(network, "moments", texts, batch=1)
    layer: Any = network.module[0].model.encoder.layer[0].intermediate  # type: ignore[index]
    layer.dense = Flat(layer.dense)
    part = "layer.0.intermediate.dense"
    names = {name.replace(part, f"{part}.inner"): stored for name, stored in network.names.items()}
    network = Network(network.module, network.reader, network.head, names, network.max_length)
    with pytest.raises(Ragged):
        measured(network, "moments", texts)
    found, _ = measured(network, "moments", texts[:2])
    assert found.keys() == exact.keys()


def test_what_follows_the_last_layer_is_not_computed(tmp_path: Path) -> None:
    network = open_network(str(model("qwen3", tmp_path)))  # its head is tied
    module: Any = network.module
    called = []
    module.lm_head.register_forward_hook(lambda *_: called.append(1))
    measured(network, "moments", sentences(2))
    assert not called
    module(**network.features(network.read(["w1"])))
    assert called


@pytest.mark.parametrize("way", ["stored as one", "loaded as one"])
def test_fused_projections_have_their_inputs_under_the_stored_names(way: str, tmp_path: Path) -> None:
    from merging.statistics.matching import Piece

    network = open_network(str(model("bert", tmp_path)))
    exact, _ = measured(network, "gram", sentences(5))
    stem = "encoder.layer.0.attention.self."
    names, pieces = dict(network.names), {}
    if way == "stored as one":
        for place, part in enumerate(("query", "key", "value")):
            del names[f"0.model.{stem}{part}.weight"]
            pieces[f"0.model.{stem}{part}.weight"] = (Piece("qkv", start=32 * place, shape=(96, 32)),)
        expected = {"qkv"}
    else:
        del names[f"0.model.{stem}query.weight"]
        parts = tuple(Piece(f"half{i}", (slice(16 * i, 16 * i + 16),)) for i in range(2))
        pieces[f"0.model.{stem}query.weight"] = parts
        expected = {"half0", "half1"}
    fused = Network(network.module, network.reader, network.head, names, network.max_length, pieces)
    found, axes = measured(fused, "gram", sentences(5))
    assert expected <= found.keys() and axes.keys() == found.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], exact[f"{stem}query.weight"], rtol=1e-6)


@pytest.mark.parametrize("width", [5, 512, 1300])
def test_gram_matrices_by_blocks(width: int) -> None:
    from merging.statistics.inputs import _upper_gram

    rows = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    exact = (rows.double().T @ rows.double()).triu()
    np.testing.assert_allclose(_upper_gram(rows).triu().numpy(), exact.numpy(), atol=2e-4)
