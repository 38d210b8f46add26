"""A model as a recipe means it: a checkpoint, its adapter, its tensors under the names that the other models use."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from merging.adapter import Adapter
from merging.checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo, locate
from merging.inputs import Statistic, Values, Workspace
from merging.lineage import file_digest, weights_digest
from merging.lowrank import Correction
from merging.sources import ModelRef
from merging.weight_statistics import of_folder

if TYPE_CHECKING:
    from merging.statistics.folder import Statistics

_HEAD = 4096  # bytes of each tensor that tell models apart before anything is read whole

#: Output heads that a model with tied embeddings leaves out of its file, and where the embeddings then lie.
_TIED = {
    "lm_head.weight": ("embed_tokens.weight", "wte.weight", "shared.weight", "word_embeddings.weight"),
    "cls.predictions.decoder.weight": ("word_embeddings.weight",),
    "lm_head.decoder.weight": ("word_embeddings.weight",),
    "vocab_projector.weight": ("word_embeddings.weight",),
}


class View:
    """One model of a merge. Thread-safe.

    Attributes:
        digests: of the tensors read so far, by stored name; filled by `FileTensor`.
        statistics: what the recipe names for this model, if the method works by them.
    """

    def __init__(self, ref: ModelRef, checkpoint: Checkpoint, adapter: Adapter | None = None) -> None:
        self.ref, self.checkpoint, self.adapter = ref, checkpoint, adapter
        self.tensors: dict[str, TensorInfo] = dict(checkpoint.tensors)
        if adapter:
            self.tensors.update(adapter.replacements)
            self.tensors.update(adapter.additions)
        self.digests: dict[str, str] = {}
        self.statistics: Statistics | None = None
        self._lock = threading.Lock()
        self._stored: dict[str, str] = {name: name for name in self.tensors}  # by the plan's name

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of its adapter."""
        return self.adapter.notes if self.adapter else ()

    @classmethod
    def open(cls, ref: ModelRef, relative_to: Path | None = None) -> View:
        """Opens the checkpoint, and the adapter if the reference names one.

        Raises:
            CheckpointError, MergeError: as `Checkpoint.open` and `Adapter.open`.
        """
        checkpoint = Checkpoint.open(ref, relative_to=relative_to)
        if ref.adapter is None:
            return cls(ref, checkpoint)
        return cls(ref, checkpoint, Adapter.open(locate(ref.adapter, ref.adapter_revision, relative_to), checkpoint))

    def align(self, names: Iterable[str]) -> None:
        """Learns how its names differ from `names` by a prefix (`model.`, `bert.` …), if at all.

        A name that both have keeps its meaning: a head beside a prefixed backbone bears none.
        """
        others = set(names)
        best, prefix = len(others & self.tensors.keys()), ("", "")
        if best * 2 >= min(len(others), len(self.tensors)):
            return
        candidates = [(f"{n.split('.')[0]}.", "") for n in self.tensors] + [("", f"{n.split('.')[0]}.") for n in others]
        for ours, theirs in dict.fromkeys(candidates):
            shared = sum(theirs + name.removeprefix(ours) in others for name in self.tensors if name.startswith(ours))
            if shared > best:
                best, prefix = shared, (ours, theirs)
        ours, theirs = prefix
        self._stored.clear()
        for name in self.tensors:
            new = theirs + name.removeprefix(ours) if name.startswith(ours) else name
            clear = new not in self.tensors and (new in others or name not in others)
            self._stored[new if clear else name] = name

    def names(self) -> list[str]:
        """Its tensors under the plan's names, in file order."""
        return list(self._stored)

    def find(self, name: str) -> TensorInfo | None:
        """The tensor of that name in the plan; a tied output head is the embedding."""
        stored = self._stored.get(name) or self._tied(name)
        return self.tensors[stored] if stored else None

    def tensor(self, info: TensorInfo) -> FileTensor:
        correction = self.adapter.corrections.get(info.name) if self.adapter else None
        return FileTensor(self, info, correction)

    def statistic(self, info: TensorInfo) -> Statistic | None:
        """What its statistics say of a tensor; None where they say nothing.

        Raises:
            MergeError: they do not fit the tensor, or cannot be statistics.
        """
        return of_folder(self.statistics, info.name, info.shape) if self.statistics else None

    def close(self) -> None:
        """Closes its files."""
        self.checkpoint.close()
        if self.statistics:
            self.statistics.close()

    def digest(self) -> str:
        """Digest of the weights as stored, an adapter's file included; tensors read already are not read again."""
        known = {name: d for name, d in self.digests.items() if name in self.checkpoint.tensors}
        if self.adapter:
            replaced = self.adapter.replacements.keys() | self.adapter.additions.keys()
            known = {name: d for name, d in known.items() if name not in replaced}
        weights = weights_digest(self.checkpoint, known)
        return f"{weights}+{file_digest(self.adapter.file)}" if self.adapter else weights

    def _tied(self, name: str) -> str | None:
        """The embedding that stands in for an output head which this model's file leaves out."""
        endings = next((e for head, e in _TIED.items() if name == head or name.endswith(f".{head}")), None)
        if endings is None or not self._ties_embeddings():
            return None
        found = [n for n in self.tensors if n.endswith(endings) and "position" not in n]
        return found[0] if len(found) == 1 or (found and found[0].endswith("shared.weight")) else None

    def _ties_embeddings(self) -> bool:
        config = self.checkpoint.config
        text = config.get("text_config")
        nested = text.get("tie_word_embeddings") if isinstance(text, dict) else None
        return bool(config.get("tie_word_embeddings", True if nested is None else nested))


class FileTensor:
    """One tensor of a view as a stream of float32; hashes the stored bytes as they pass when told to."""

    def __init__(self, view: View, info: TensorInfo, correction: Correction | None) -> None:
        self.view, self.info, self.correction = view, info, correction
        self._size = DTYPE_BYTES[info.dtype]
        self._hash: xxhash.xxh3_128 | None = None

    @property
    def whole_rows(self) -> bool:
        return self.correction is not None

    def hash_next_pass(self) -> None:
        """The next pass covers the tensor once, in order: take its digest on the way."""
        self._hash = None if self.info.name in self.view.digests else xxhash.xxh3_128()

    def load(self, start: int, stop: int, values: Values, workspace: Workspace) -> bool:
        kernels, dtype = workspace.kernels, self.info.dtype
        if kernels.on_host and dtype == "F32":
            raw = values.view(np.uint8)
            self.read_raw(start, stop, raw)
            finite = kernels.finite(values)
        else:
            raw = workspace.raw((stop - start) * self._size)
            self.read_raw(start, stop, raw)
            finite = kernels.load(raw, dtype, values)
        if self.correction is not None:
            columns = max(1, self.info.numel // max(1, self.info.shape[0] if self.info.shape else 1))
            rows = np.ascontiguousarray(kernels.to_host(values)).reshape(-1, columns)
            self.correction.apply(rows, start // columns)
            if not kernels.on_host:
                kernels.load(rows.reshape(-1).view(np.uint8), "F32", values)
        return bool(finite)

    def read_raw(self, start: int, stop: int, raw: np.ndarray) -> None:
        """The stored bytes of elements start … stop."""
        view = raw.data
        self.view.checkpoint.read_into(self.info, start * self._size, view)
        if self._hash is not None:
            self._hash.update(view)
            if stop == self.info.numel:
                self.view.digests[self.info.name] = self._hash.hexdigest()
                self._hash = None


def same_bytes(tensors: list[FileTensor]) -> bool:
    """Whether all tensors are stored alike, to the bit."""
    first, *others = (t.info for t in tensors)
    if any((info.dtype, info.shape) != (first.dtype, first.shape) for info in others):
        return False
    block = 1 << 20
    for start in range(0, first.nbytes, block):
        size = min(block, first.nbytes - start)
        parts = []
        for tensor in tensors:
            part = bytearray(size)
            tensor.view.checkpoint.read_into(tensor.info, start, memoryview(part))
            parts.append(part)
        if any(part != parts[0] for part in parts[1:]):
            return False
    return True


def fingerprint(model: Checkpoint | View) -> str:
    """Of the first 4 KiB of every tensor, and of an adapter's file: tells models apart in a moment, not with certainty."""
    checkpoint = model if isinstance(model, Checkpoint) else model.checkpoint
    digest = xxhash.xxh3_128()
    for name, info in sorted(checkpoint.tensors.items()):
        head = bytearray(min(_HEAD, info.nbytes))
        checkpoint.read_into(info, 0, memoryview(head))
        digest.update(f"{name}\0{info.dtype}\0{list(info.shape)}\0".encode("utf-8", "surrogatepass"))
        digest.update(head)
    adapter = None if isinstance(model, Checkpoint) else model.adapter
    text = f"xxh3:{digest.hexdigest()}"
    return f"{text}+{file_digest(adapter.file)}" if adapter else text
