"""The chunk kernels on a torch device: what `reference` defines, for a GPU.

Bytes travel as they are stored and become float32 on the device. Each worker thread has a stream of its own, so one
worker's reading and writing overlap the copies and kernels of the others.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from merging.errors import MergeError
from merging.kernels import reference

MAGNITUDE = 0x7FFFFFFF
INFINITY = 0x7F800000
_TORCH = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class TorchKernels:
    """See `merging.kernels.reference` for what each function does.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps" …

    Raises:
        MergeError: this machine has no such device.
    """

    on_host = False
    xp: Any = torch

    def __init__(self, device: str) -> None:
        try:
            self.device = torch.device(device)
            torch.zeros(1, device=self.device).tolist()  # "meta" holds nothing that could come back
        except (RuntimeError, AssertionError) as error:
            reason = str(error).split("\n")[0][:100]
            raise MergeError(
                f"no such device: {reason}", where=f"--device {device}", mend="use --device cpu"
            ) from error
        self._local = threading.local()

    def enter_thread(self) -> None:
        """Gives the calling worker its own stream."""
        if self.device.type == "cuda" and not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self.device)
            torch.cuda.set_stream(self._local.stream)

    def empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        self.enter_thread()
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def host_buffer(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that the device copies from without a detour."""
        pinned = self.device.type == "cuda"
        return np.asarray(torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned).numpy())

    def vector(self, weights: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(weights, np.float32), device=self.device)

    def to_host(self, values: Any) -> NDArray[Any]:
        return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)

    def load(self, raw: NDArray[np.uint8], dtype: str, values: torch.Tensor) -> bool:
        stored = torch.from_numpy(raw).to(self.device, non_blocking=True)
        values.copy_(stored.view(_TORCH[dtype]))
        return self.finite(values)

    def finite(self, values: torch.Tensor) -> bool:
        return not values.numel() or bool((_bits(values) & MAGNITUDE).max() < INFINITY)

    def store(self, values: torch.Tensor, dtype: str, raw: NDArray[np.uint8]) -> bool:
        stored = values.to(_TORCH[dtype])
        torch.from_numpy(raw).copy_(stored.view(torch.uint8))
        return bool(torch.isfinite(stored).all())

    def narrow(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(torch.float32).contiguous()

    def l1(self, values: torch.Tensor) -> float:
        return float(values.abs().sum(dtype=torch.float64))

    def gram(self, values: torch.Tensor) -> NDArray[np.float64]:
        wide = values.double()
        return self.to_host(wide @ wide.T)

    def row_gram(self, values: torch.Tensor, axis: int) -> NDArray[np.float64]:
        wide = values.double()
        return self.to_host(torch.einsum("irc,jrc->ijr" if axis == 2 else "irc,jrc->ijc", wide, wide))

    def combine(self, weights: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        torch.mul(values[0], weights[0], out=out)
        for weight, row in zip(weights[1:], values[1:], strict=True):
            out += row * weight

    def blend(
        self, factors: torch.Tensor, models: torch.Tensor, base: torch.Tensor | None, start: int, out: torch.Tensor
    ) -> bool:
        """As `reference.blend`, but whoever calls looks for NaN and infinity, once for all: a look waits for the device."""
        rows = models[:, start : start + len(out)]
        if base is None:
            torch.mv(rows.T, factors, out=out)
        else:
            origin = base[start : start + len(out)]
            torch.addmv(origin, (rows - origin).T, factors, out=out)
        return True

    def blend_deltas(
        self,
        factors: torch.Tensor,
        deltas: torch.Tensor,
        base: torch.Tensor,
        scale: float,
        start: int,
        out: torch.Tensor,
    ) -> bool:
        """As `reference.blend_deltas`, deltas float32 or bfloat16; not looked at either."""
        rows = deltas[:, start : start + len(out)].float()
        torch.addmv(base[start : start + len(out)], rows.T, factors, beta=scale, out=out)
        return True

    def histogram(self, values: torch.Tensor, counts: NDArray[np.int64]) -> None:
        counts += self.to_host(torch.bincount((_bits(values) & MAGNITUDE) >> 16, minlength=1 << 15))

    def fine_histogram(self, values: torch.Tensor, high: int, counts: NDArray[np.int64]) -> None:
        bits = _bits(values) & MAGNITUDE
        counts += self.to_host(torch.bincount(bits[bits >> 16 == int(high)] & 0xFFFF, minlength=1 << 16))

    def select(self, values: torch.Tensor, k: int) -> tuple[int, int, int]:
        if k <= 0:
            return 0x7FFFFFFF, 0, 0
        magnitudes = _bits(values) & MAGNITUDE
        threshold = torch.kthvalue(magnitudes, len(values) - k + 1).values
        larger, equal = int((magnitudes > threshold).sum()), int((magnitudes == threshold).sum())
        return int(threshold), k - larger, equal

    def keep_above(self, values: torch.Tensor, threshold: int) -> None:
        values.masked_fill_((_bits(values) & MAGNITUDE) < int(threshold), 0.0)

    def drop_above(self, values: torch.Tensor, threshold: int) -> None:
        values.masked_fill_((_bits(values) & MAGNITUDE) > int(threshold), 0.0)

    def split_ties(self, values: torch.Tensor, threshold: int, remaining: int, keep_first: bool) -> int:
        ties = torch.nonzero((_bits(values) & MAGNITUDE) == int(threshold)).reshape(-1)
        values[ties[remaining:] if keep_first else ties[:remaining]] = 0.0
        return max(0, remaining - len(ties))

    def uniform_bits(self, key: int, start: int, count: int) -> torch.Tensor:
        z = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=self.device)
        z = z * _signed(int(reference.GOLDEN)) + _signed(key)
        z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
        z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
        return _shift(z ^ _shift(z, 31), 32)

    def drop(self, values: torch.Tensor, keep: float, scale: float, key: int, start: int) -> None:
        mask = self.uniform_bits(key, start, len(values)) < round(keep * 2**32)
        values *= mask * scale

    def drop_by_rank(
        self, values: torch.Tensor, columns: int, low: float, high: float, rescale: bool, key: int, start: int
    ) -> None:
        bits = self.uniform_bits(key, start, len(values)).reshape(-1, columns)
        rows = values.view(-1, columns)
        by_rank = torch.as_tensor(reference.rank_probabilities(columns, low, high), device=self.device)
        order = torch.sort(rows.abs(), dim=1, stable=True).indices
        keep = torch.empty(rows.shape, dtype=torch.float64, device=self.device)
        keep.scatter_(1, order, by_rank.expand(rows.shape))
        factors = (1.0 / keep).float() if rescale else torch.ones_like(rows)
        rows *= torch.where(bits < (keep * 2.0**32).long(), factors, 0.0)

    def elect(self, deltas: torch.Tensor, weights: torch.Tensor, normalize: bool, out: torch.Tensor) -> None:
        deltas *= weights[:, None]
        positive = deltas.sum(0) >= 0
        agrees = torch.where(positive, deltas > 0, deltas < 0)
        out.copy_((deltas * agrees).sum(0))
        if normalize:
            divisor = (weights[:, None] * agrees).sum(0)
            out /= torch.where(divisor == 0, 1.0, divisor)

    # ---- by importance ----

    def no_owners(self, count: int) -> torch.Tensor:
        self.enter_thread()
        return torch.zeros(count, dtype=torch.uint8, device=self.device)

    def saliency(self, deltas: torch.Tensor, importance: torch.Tensor) -> None:
        importance.sqrt_()
        importance *= deltas
        importance.masked_fill_((importance == 0) & (deltas != 0), float(reference.SMALLEST))

    def keep_where(self, values: torch.Tensor, kept: torch.Tensor) -> None:
        values.masked_fill_(kept == 0, 0.0)

    def drop_owned(self, values: torch.Tensor, owners: torch.Tensor) -> None:
        values.masked_fill_(owners != 0, 0.0)

    def claim(self, values: torch.Tensor, owners: torch.Tensor, owner: int) -> None:
        owners.masked_fill_(values != 0, owner)

    def keep_largest_in_rows(self, values: torch.Tensor, columns: int, k: int) -> None:
        if k <= 0:
            values.zero_()
        elif k < columns:
            rows = values.view(-1, columns)
            order = torch.sort(rows.abs(), dim=1, descending=True, stable=True).indices
            rows.scatter_(1, order[:, k:], 0.0)

    def take(
        self, base: torch.Tensor, deltas: torch.Tensor, factor: float, owners: torch.Tensor, out: torch.Tensor
    ) -> None:
        out.copy_(base)
        for owner, row in enumerate(deltas, 1):
            torch.where(owners == owner, base + row * factor, out, out=out)

    def weigh(
        self,
        values: torch.Tensor,
        importance: torch.Tensor,
        factors: torch.Tensor,
        shares: torch.Tensor,
        floor: float,
        out: torch.Tensor,
    ) -> None:
        weights = importance.clamp_(min=floor) * factors[:, None]
        divisor = weights.sum(0)
        mean = (shares[:, None] * values).sum(0)
        out.copy_(torch.where(divisor > 0, (weights * values).sum(0) / divisor, mean))

    def weigh_deltas(
        self,
        base: torch.Tensor,
        deltas: torch.Tensor,
        importance: torch.Tensor,
        weights: torch.Tensor,
        floor: float,
        out: torch.Tensor,
    ) -> None:
        shares = importance.add_(floor)
        divisor = shares.sum(0)
        scaled = deltas.mul_(weights[:, None])
        plain = scaled.sum(0)
        out.copy_(torch.where(divisor > 0, (shares * scaled).sum(0) / divisor * len(deltas), plain)).add_(base)

    def cholesky(self, matrix: torch.Tensor) -> tuple[torch.Tensor, float] | None:
        from scipy.linalg import lapack

        norm = float(matrix.abs().sum(0).max())
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed):
            return None
        reciprocal, _ = lapack.dpocon(self.to_host(factor), norm, uplo="L")
        return factor, 1 / reciprocal if reciprocal > 0 else np.inf

    def solve(self, factor: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.cholesky_solve(right.T, factor).T

    def wide(self, values: Any) -> torch.Tensor:
        if isinstance(values, torch.Tensor):
            return values.double()
        return torch.as_tensor(np.array(values), device=self.device).double()  # a copy: torch wants it writable


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32)


def _signed(number: int) -> int:
    """An unsigned 64-bit number as the signed one of the same bits."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >= 1 << 63 else number


def _shift(z: torch.Tensor, by: int) -> torch.Tensor:
    """A logical shift to the right; torch's own keeps the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)
