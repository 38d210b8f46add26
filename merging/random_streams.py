"""Keys of the counter-based random streams: one for each seed, tensor and model."""

from __future__ import annotations

import xxhash


def stream_key(seed: int, tensor: str, model: int) -> int:
    """A 64-bit key that depends on nothing else, so draws do not change with order, chunks, threads or device."""
    return int(xxhash.xxh3_64_intdigest(f"{seed}\0{model}\0{tensor}".encode()))
