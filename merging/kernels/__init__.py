"""The chunk kernels: the same small functions on numpy (`reference`), compiled by numba, and on torch devices.

`load` picks one. All kernels give the same float32 results bit for bit on the CPU; a torch device differs by rounding.
"""

from __future__ import annotations

import importlib
from typing import Any

from merging.errors import MergeError


def load(backend: str = "auto", device: str = "cpu") -> Any:
    """The kernels for a device.

    Args:
        backend: "compiled", "reference", "torch", or "auto": torch off the CPU, else compiled where numba is installed.
        device: "cpu", or a torch device such as "cuda" or "cuda:1".

    Raises:
        MergeError: no such device on this machine.
    """
    if backend == "auto" and device == "cpu":
        try:
            return importlib.import_module("merging.kernels.compiled")
        except ImportError:
            return importlib.import_module("merging.kernels.reference")
    if backend in ("auto", "torch"):
        from merging.kernels.device import TorchKernels

        return TorchKernels(device)
    if device != "cpu":
        raise MergeError(f"the {backend} kernels run on the CPU only", where=f"--device {device}")
    return importlib.import_module(f"merging.kernels.{backend}")
