from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from merging.errors import CuveeError
from search.descent import Descent, Vector

torch = pytest.importorskip("torch")

FREE = np.full(3, -np.inf), np.full(3, np.inf)
AIM = np.array([0.3, 0.9, 1.4])


def slope(place: Vector) -> Vector:
    return 2 * (place - AIM) * np.array([1.0, 10.0, 0.1])


def test_the_steps_of_torchs_adam() -> None:
    ours = Descent.begin(np.full(3, 0.3))
    theirs = torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([theirs], lr=0.01)
    for _ in range(50):
        theirs.grad = torch.from_numpy(slope(theirs.detach().numpy()))
        adam.step()
        ours = ours.step(slope(ours.place), 0.01, *FREE)
    np.testing.assert_allclose(ours.place, theirs.detach().numpy(), rtol=1e-12)


def test_it_ends_at_the_optimum_within_the_bounds() -> None:
    descent = Descent.begin(np.full(3, 0.3))
    for _ in range(3000):
        descent = descent.step(slope(descent.place), 0.01, np.zeros(3), np.ones(3))
    np.testing.assert_allclose(descent.place, [0.3, 0.9, 1.0], atol=1e-3)


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    descent = Descent.begin(np.full(3, 0.3))
    for _ in range(7):
        descent = descent.step(slope(descent.place), 0.01, *FREE)
    descent.save(tmp_path / "state.json")
    found = Descent.load(tmp_path / "state.json", 3)
    assert found is not None and found.steps == 7
    for name in ("place", "first", "second"):
        np.testing.assert_array_equal(getattr(found, name), getattr(descent, name))


def test_nothing_and_something_else(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    assert Descent.load(file, 3) is None
    Descent.begin(np.zeros(2)).save(file)
    for text in (file.read_text(), "{", "[]", '{"steps": 1}'):
        file.write_text(text)
        with pytest.raises(CuveeError, match="add --force"):
            Descent.load(file, 3)
