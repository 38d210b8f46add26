"""Models of images and texts: both are read by the model's processor; what cannot be is told in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merging import CuveeError
from merging.statistics import collect, open_statistics
from merging.statistics.calibration import draw
from merging.statistics.network import Network, open_network
from tests.merging.statistics.models import llava, model, reference, sentences

torch = pytest.importorskip("torch")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Texts, of which every second has an image."""
    picture = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for i in range(0, 6, 2):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        picture.fromarray(pixels).save(tmp_path / f"{i}.png")
    rows = [{"text": text} | ({} if i % 2 else {"image": f"{i}.png"}) for i, text in enumerate(sentences(6))]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "d.jsonl"


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    return llava(tmp_path / "llava")


def runs(network: Network, data: Path) -> list[Any]:
    def run(example: Any) -> Any:
        features = network.features(network.read([example.query], None, [example.image]))
        features = {key: own.double() if own.is_floating_point() else own for key, own in features.items()}
        return lambda: network.module(**features)

    return [run(example) for example in draw([data], 6).examples]


def test_the_inputs_of_both_towers_equal_float64_of_single_examples(folder: Path, data: Path, tmp_path: Path) -> None:
    collect(str(folder), data, "gram", tmp_path / "s")
    found = open_statistics(tmp_path / "s")
    network = open_network(str(folder))
    exact = reference(folder, network.module, runs(network, data))
    assert set(found.names) == exact.keys() and any("vision_tower" in name for name in found.names)
    for name, own in exact.items():
        np.testing.assert_allclose(found.array(name), own, atol=1e-5 * np.abs(own).max())


def test_the_patches_of_images_have_moments(folder: Path, data: Path, tmp_path: Path) -> None:
    collect(str(folder), data, "moments", tmp_path / "s")
    found = open_statistics(tmp_path / "s")
    (patches,) = (name for name in found.names if "patch" in name)
    assert found.shape(patches) == (1, 3, 8, 8) and found.rows[patches] == 3 * 4


def test_fisher_of_both_towers_equals_plain_gradients(folder: Path, data: Path, tmp_path: Path) -> None:
    from merging.statistics.fisher_job import FisherBatches
    from tests.oracles import fisher as oracle

    collect(str(folder), data, "fisher", tmp_path / "s")
    found = open_statistics(tmp_path / "s")
    network = open_network(str(folder))
    network.module.requires_grad_(True)
    batches = FisherBatches(network, draw([data], 6), {}, 0)
    exact: dict[str, Any] = {}
    for place in range(6):
        own = network.stored(oracle.fisher(network.module, batches.forward, batches.batch([place])))
        exact = {name: exact.get(name, 0) + values.numpy() / 6 for name, values in own.items()}
    assert exact.keys() == set(found.names)
    for name, values in exact.items():
        np.testing.assert_allclose(found.array(name), values, rtol=1e-3, atol=1e-5 * np.abs(values).max() + 1e-12)


def test_no_image_and_no_processor_are_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text('{"text": "w1", "image": "e.jsonl"}\n')
    with pytest.raises(CuveeError, match=r"e\.jsonl: is no image that can be read"):
        collect(str(folder), tmp_path / "e.jsonl", "moments", tmp_path / "s")
    plain = model("llama", tmp_path / "plain")
    with pytest.raises(CuveeError, match="has no processor of images"):
        collect(str(plain), tmp_path / "d.jsonl", "moments", tmp_path / "s")


def test_without_pillow_the_mend_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "i.png").write_bytes(b"x")
    (tmp_path / "d.jsonl").write_text('{"text": "w1", "image": "i.png"}\n')
    with pytest.raises(CuveeError, match=r"Pillow, which is not installed; pip install 'cuvee\[images\]'"):
        collect(str(model("llama", tmp_path / "m")), tmp_path / "d.jsonl", "moments", tmp_path / "s")
