"""What processes that work side by side have in common."""

from __future__ import annotations

import multiprocessing
import os
import threading


def die_with_parent() -> None:
    """Ends this process, a child, with its parent: one that goes on after its run was killed would get in the next one's way."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def own_gpu(device: str, number: int) -> str:
    """The device of the number-th process: of "cuda" a GPU of its own, as far as there are any; else what was said."""
    if device != "cuda":
        return device
    import torch

    return f"cuda:{number % max(1, torch.cuda.device_count())}"


def default_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
