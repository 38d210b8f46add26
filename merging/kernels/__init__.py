"""The chunk kernels: the same small functions on numpy (`reference`), compiled by numba, and on torch devices.

`load` picks one. All kernels give the same float32 results bit for bit on the CPU; a torch device differs by rounding.
Sums in float64 are taken in another order by each, so the choice depends on nothing but the work: same merge, same bytes.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from merging.errors import MergeError
from merging.kernels import reference

_LITTLE = 1 << 30  # bytes: numpy has added them up by the time that numba is loaded


def load(backend: str = "auto", device: str = "cpu", nbytes: int | None = None) -> Any:
    """The kernels for a device.

    Args:
        backend: "compiled", "reference", "torch", or "auto": torch off the CPU, else compiled where numba is installed.
        device: "cpu", or a torch device such as "cuda" or "cuda:1".
        nbytes: what there is to read, where that is known.

    Raises:
        MergeError: no such device on this machine.
    """
    if backend == "auto" and device == "cpu":
        if importlib.util.find_spec("numba") is None:
            return reference
        if nbytes is not None and nbytes < _LITTLE:
            return _ForLittleWork()
        return importlib.import_module("merging.kernels.compiled")
    if backend in ("auto", "torch"):
        from merging.kernels.device import TorchKernels

        return TorchKernels(device)
    if device != "cpu":
        raise MergeError(f"the {backend} kernels run on the CPU only", where=f"--device {device}")
    return importlib.import_module(f"merging.kernels.{backend}")


class _ForLittleWork:
    """numpy for the kernels in which it is nearly as fast; the others compiled, and numba loaded, when first asked for."""

    _NUMPY = frozenset({
        "cholesky", "combine", "drop", "empty", "finite", "gram", "host_buffer", "l1", "load", "narrow", "no_owners",
        "on_host", "row_gram", "solve", "store", "to_host", "uniform_bits", "vector", "weigh",
        "weigh_deltas", "wide", "xp",
    })  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        kernels = reference if name in self._NUMPY else importlib.import_module("merging.kernels.compiled")
        kernel = getattr(kernels, name)
        setattr(self, name, kernel)
        return kernel
