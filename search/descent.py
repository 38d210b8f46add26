"""Descent: Adam on a vector of coefficients within bounds; its state is plain numbers, so that it lasts.

Source: arXiv 1412.6980, algorithm 1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from merging.errors import CuveeError
from merging.output import write_whole

Vector: TypeAlias = NDArray[np.float64]
_DECAY, _SQUARED_DECAY, _EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Descent:
    """Where it is.

    Attributes:
        steps: done.
        place: (n,) coefficients.
        first, second: (n,) Adam's decayed sums of the gradients and of their squares.
    """

    steps: int
    place: Vector
    first: Vector
    second: Vector

    @classmethod
    def begin(cls, place: Vector) -> Descent:
        return cls(0, place, np.zeros_like(place), np.zeros_like(place))

    def step(self, gradient: Vector, rate: float, low: Vector, high: Vector) -> Descent:
        """One step down, to the nearest place within the bounds."""
        steps = self.steps + 1
        first = _DECAY * self.first + (1 - _DECAY) * gradient
        second = _SQUARED_DECAY * self.second + (1 - _SQUARED_DECAY) * gradient**2
        mean, square = first / (1 - _DECAY**steps), second / (1 - _SQUARED_DECAY**steps)
        place = np.clip(self.place - rate * mean / (np.sqrt(square) + _EPSILON), low, high)
        return Descent(steps, place, first, second)

    def save(self, file: Path) -> None:
        """Whole or not at all, to the last bit."""
        state = {"steps": self.steps, **{name: getattr(self, name).tolist() for name in ("place", "first", "second")}}
        write_whole(file, json.dumps(state) + "\n")

    @classmethod
    def load(cls, file: Path, size: int) -> Descent | None:
        """What was saved; None where nothing was.

        Raises:
            CuveeError: something else is there.
        """
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            found = cls(
                int(state["steps"]), *(np.array(state[name], np.float64) for name in ("place", "first", "second"))
            )
            if any(part.shape != (size,) for part in (found.place, found.first, found.second)):
                raise ValueError
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            mend = "add --force to begin anew"
            raise CuveeError("cannot be read as the state of a descent", where=str(file), mend=mend) from None
        return found
