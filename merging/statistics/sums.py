"""Sums over examples that lose nothing to rounding: one accumulator for each weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Sum:
    """A running sum of tensors of one shape.

    Two numbers a weight: either one float64, or a float32 with what its roundings lost so far in bfloat16 (Kahan), which
    is six bytes instead of eight and as exact as float32 can show.

    Args:
        shape: of what is summed.
        device: a torch device.
        compensated: the second form; also taken where the device has no float64.
    """

    def __init__(self, shape: tuple[int, ...], *, device: str = "cpu", compensated: bool = False) -> None:
        import torch

        compensated = compensated or torch.device(device).type == "mps"
        self.shape = shape
        self._sum = torch.zeros(shape, dtype=torch.float32 if compensated else torch.float64, device=device)
        self._lost = torch.zeros(shape, dtype=torch.bfloat16, device=device) if compensated else None

    def add(self, values: Tensor, start: int = 0, stop: int | None = None) -> None:
        """Adds to the entries `start` … `stop` of the first axis; `values` has their shape, or as many elements."""
        place = slice(start, stop)
        total = self._sum[place]
        values = values.reshape(total.shape)
        if self._lost is None:
            total += values
            return
        lost = self._lost[place]
        values = values.float() - lost
        grown = total + values
        lost.copy_((grown - total) - values)
        total.copy_(grown)

    def add_rows(self, rows: Tensor, values: Tensor, left: int = 0, right: int | None = None) -> None:
        """Adds `values` (n, right - left) to these columns of a matrix's `rows` (n,); a row may stand there repeatedly."""
        import torch

        total = self._sum[:, left:right]
        if self._lost is None:
            total.index_add_(0, rows, values.to(total.dtype))
            return
        own, place = rows.unique(return_inverse=True)
        new = torch.zeros((len(own), total.shape[1]), dtype=torch.float32, device=values.device)
        new.index_add_(0, place, values.float())
        lost = self._lost[:, left:right]
        before = total[own]
        new -= lost[own]
        grown = before + new
        lost[own] = ((grown - before) - new).to(lost.dtype)
        total[own] = grown

    def value(self) -> Tensor:
        """What has been added up; not to be changed."""
        return self._sum

    def state(self) -> dict[str, Tensor]:
        """All that `load` needs to go on from here; not copied."""
        return {"sum": self._sum} if self._lost is None else {"sum": self._sum, "lost": self._lost}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `state` gave.

        Raises:
            ValueError: a state of another shape or form.
        """
        own = self.state()
        if own.keys() != state.keys() or any(own[key].shape != state[key].shape for key in own):
            raise ValueError("a state of another shape or form")
        for key, value in own.items():
            value.copy_(state[key])
