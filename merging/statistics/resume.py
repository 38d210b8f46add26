"""What is kept of statistics on their way, so that a run that was stopped goes on from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from merging.checkpoint import read_json
from merging.errors import CheckpointError
from merging.output import alone, put_back, staged

if TYPE_CHECKING:
    from torch import Tensor

_STATE, _SUMS = "state.json", "sums.safetensors"
EVERY = 60.0  # seconds


class Partial:
    """`OUT.partial/`, from `with Partial(out, run) as partial:` to the end of the block; no one else's meanwhile.

    Args:
        run: all that decides about the sums; what another run has left is not gone on with.
    """

    def __init__(self, out: Path, run: Mapping[str, Any]) -> None:
        out = Path(os.path.abspath(out))
        self.folder = out.with_name(f"{out.name}.partial")
        self.key = xxhash.xxh3_128_hexdigest(
            json.dumps(run, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
        )
        self._saved = time.monotonic()
        self._lock: Any = None

    def __enter__(self) -> Partial:
        self._lock = alone(self.folder)
        self._lock.__enter__()
        put_back(self.folder / "sums")
        return self

    def __exit__(self, *error: Any) -> None:
        if not (self.folder / "sums").exists():  # nothing that a later run could go on from
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.__exit__(*error)

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What the same run has saved; None where there is nothing, or another run's."""
        from safetensors.torch import load_file

        folder = self.folder / "sums"
        try:
            state = read_json(folder / _STATE)
            return (state, load_file(folder / _SUMS)) if state.get("key") == self.key else None
        except CheckpointError:
            return None
        except Exception:  # safetensors' own kinds: damaged, so begun anew
            return None

    def save(self, state: Mapping[str, Any], sums: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        with staged(self.folder / "sums", force=True, marker=_STATE) as staging:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in sums.items()}, staging / _SUMS)
            (staging / _STATE).write_text(json.dumps({**state, "key": self.key}), encoding="utf-8")
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved >= EVERY

    def remove(self) -> None:
        """The run is done."""
        shutil.rmtree(self.folder / "sums", ignore_errors=True)


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that a step is finished and saved before the end; the second Ctrl-C ends at once."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.getsignal(signal.SIGINT)

    def press(number: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    if before is not signal.default_int_handler:  # someone else's ways with it
        yield pressed
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
