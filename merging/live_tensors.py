"""What a live merge holds in memory: of every tensor the base's values, all models', and the module's own weights.

A model is held whole (its values in float32, or its task vector in bfloat16), or as the two factors of its adapter. Each
is a `merging.inputs.Tensor`, so that every method of the registry reads it as it reads files.
"""

from __future__ import annotations

import math
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from merging.checkpoint import Checkpoint, TensorInfo, preallocate
from merging.errors import MergeError
from merging.inputs import Statistic, Tensor, Values, Workspace
from merging.kernels import reference
from merging.lowrank import Factors, Loaded, LowRank
from merging.views import FileTensor, View
from merging.weight_statistics import of_array

#: safetensors' names of torch's floating dtypes.
STORED = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64"}
BLOCK = 1 << 17  # elements written at a time: of a few models, they stay in the cache
_ALIGNED = 64


class Storage:
    """Where the held values lie: in memory, or in a temporary file that is mapped into it. Thread-safe to read.

    Raises:
        MergeError: the disk is full.
    """

    def __init__(self, kind: str) -> None:
        # Open as long as the arrays; nameless, so gone with the process.
        self._file: IO[bytes] | None = tempfile.TemporaryFile() if kind == "mapped" else None  # noqa: SIM115
        if self._file is not None:
            weakref.finalize(self, self._file.close)
        self._end = 0
        self.nbytes = 0

    def array(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """A new array of that shape, its values undefined."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.nbytes += nbytes
        if self._file is None or not nbytes:
            return np.empty(shape, dtype)
        start, self._end = self._end, self._end + -(-nbytes // _ALIGNED) * _ALIGNED
        try:
            preallocate(self._file.fileno(), self._end)
        except OSError as error:
            mend = "free some, or name another disk in TMPDIR"
            raise MergeError(
                f"cannot map the models: {error.strerror}", where=tempfile.gettempdir(), mend=mend
            ) from error
        return np.asarray(np.memmap(self._file, dtype, "r+", start, shape))


class HeldTensor:
    """Values in memory: float32, or a task vector (bfloat16 as uint16 on the host) that lies on `base`."""

    def __init__(self, row: Values, base: Values | None = None) -> None:
        self._row, self._base = row, base

    def load(self, start: int, stop: int, values: Values, workspace: Workspace) -> bool:
        row = self._row[start:stop]
        if isinstance(row, np.ndarray) and row.dtype == np.uint16:
            workspace.kernels.load(row.view(np.uint8), "BF16", values)
        else:
            values[:] = row
        if self._base is not None:
            values += self._base[start:stop]
        return True  # it was looked at when it was read


class FactoredTensor:
    """The base with an adapter's correction, whose factors are in memory."""

    def __init__(self, base: Values, correction: LowRank) -> None:
        self._base, self._correction = base, correction

    def load(self, start: int, stop: int, values: Values, workspace: Workspace) -> bool:
        kernels, columns = workspace.kernels, max(1, self._correction.columns)
        values[:] = self._base[start:stop]
        rows = np.ascontiguousarray(kernels.to_host(values)).reshape(-1, columns)
        self._correction.apply(rows, start // columns)
        if not kernels.on_host:
            kernels.load(rows.reshape(-1).view(np.uint8), "F32", values)
        return True


class HeldFactors(Factors):
    """Factors that stay in memory."""

    def __init__(self, source: Checkpoint) -> None:
        super().__init__(source)
        self.held: dict[str, Loaded] = {}

    def get(self, low_rank: LowRank) -> Loaded:
        return self.held[low_rank.info.name]


@dataclass(frozen=True)
class Product:
    """s·left·right of one model: left (rows, r), right (r, columns)."""

    model: int
    scale: float
    left: Values
    right: Values


@dataclass(frozen=True)
class Held:
    """One tensor of the base and of all models.

    Attributes:
        base: (n,) float32.
        models: each as methods read it.
        rows: (whole, n) those held whole, side by side: values, or task vectors if `deltas`; None where there is none.
        whole: which models these are.
        products: the models held as factors; who is neither here nor in `whole` is the base itself.
        statistics: of each model; empty where there are none.
        whole_rows: chunks must hold whole rows.
        plain: a weighted sum may be taken of `rows` and `products` in one pass.
    """

    shape: tuple[int, ...]
    base: Values
    models: tuple[Tensor, ...] = ()
    rows: Values = None
    whole: tuple[int, ...] = ()
    deltas: bool = False
    products: tuple[Product, ...] = ()
    statistics: tuple[Statistic | None, ...] = ()
    whole_rows: bool = False
    plain: bool = True

    @property
    def numel(self) -> int:
        return len(self.base)

    @property
    def columns(self) -> int:
        """Elements that are read together: a row, where models are held as factors, else one."""
        return math.prod(self.shape[1:]) if self.products else 1


class Holder:
    """Reads tensors into memory.

    Args:
        kernels: that will work on them; off the host, what is held lies on their device.
        deltas: hold task vectors instead of values …
        bfloat16: … rounded to bfloat16.
    """

    def __init__(self, kernels: Any, storage: Storage, *, deltas: bool, bfloat16: bool) -> None:
        self._kernels, self._storage = kernels, storage
        self._deltas, self._bfloat16 = deltas, bfloat16
        self._factors: dict[int, HeldFactors] = {}  # by the view's identity

    def base(self, view: View, info: TensorInfo) -> NDArray[np.float32] | None:
        """All values of the base's tensor; None where one is NaN or infinite."""
        values = self._storage.array((info.numel,), np.float32)
        return values if read_whole(view.tensor(info), values) else None

    def hold(
        self,
        values: NDArray[np.float32],
        origin: tuple[View, TensorInfo],
        models: Sequence[tuple[View, TensorInfo]],
        statistics: bool,
    ) -> Held | int:
        """A tensor of all models, `values` the base's; or the index of a model that holds NaN or infinity in it."""
        base = self.placed(values)
        bare = not (origin[0].adapter and origin[1].name in origin[0].adapter.corrections)
        whole, tensors, products = [], dict[int, Tensor](), []
        plain, by_rows = True, False
        for index, (view, info) in enumerate(models):
            correction = view.adapter.corrections.get(info.name) if view.adapter else None
            same = bare and view.adapter and (info.file, info.offset) == (origin[1].file, origin[1].offset)
            if not same or (correction is not None and not isinstance(correction, LowRank)):
                whole.append(index)
            elif correction is None:
                tensors[index] = HeldTensor(base)
            else:
                held = self._held(view, correction)
                loaded = held.factors.get(held)
                if not all(np.isfinite(part).all() for part in loaded if part is not None):
                    return index
                tensors[index] = FactoredTensor(base, held)
                products.append(Product(index, held.scale, loaded.left, loaded.right))
                plain, by_rows = plain and loaded.magnitude is None, True
        rows = self._storage.array((len(whole), len(values)), np.uint16 if self._bfloat16 else np.float32)
        scratch = np.empty(len(values) if self._deltas else 0, np.float32)
        for place, index in enumerate(whole):
            view, info = models[index]
            row = rows[place]
            if not read_whole(view.tensor(info), scratch if self._deltas else row):
                return index
            if self._deltas:
                np.subtract(scratch, values, out=scratch)
                stored = "BF16" if self._bfloat16 else "F32"
                if not reference.store(scratch, stored, row.view(np.uint8)):
                    return index
        known = [_in_memory(view, info) if statistics else None for view, info in models]
        placed = self.placed(rows)
        for place, index in enumerate(whole):
            tensors[index] = HeldTensor(placed[place], base if self._deltas else None)
        return Held(
            origin[1].shape,
            base,
            tuple(tensors[index] for index in range(len(models))),
            placed if whole else None,
            tuple(whole),
            self._deltas,
            tuple(replace(p, left=self.placed(p.left), right=self.placed(p.right)) for p in products),
            tuple(known) if statistics else (),
            by_rows,
            plain,
        )

    def placed(self, values: NDArray[Any]) -> Values:
        """On the device of the kernels."""
        if self._kernels.on_host:
            return values
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return (tensor.view(torch.bfloat16) if values.dtype == np.uint16 else tensor).to(self._kernels.device)

    def _held(self, view: View, correction: LowRank) -> LowRank:
        """The correction with its factors in memory."""
        assert view.adapter is not None
        held = self._factors.setdefault(id(view), HeldFactors(view.checkpoint))
        loaded = correction.factors.get(correction)
        held.held[correction.info.name] = Loaded(*(None if a is None else np.array(a) for a in loaded))  # type: ignore[arg-type]
        self._storage.nbytes += loaded.nbytes
        return replace(correction, factors=held)


class Target:
    """A weight of the module, or the part of one that a stored tensor is; written by ranges of its flat elements.

    Args:
        weight: a torch tensor without a gradient of its own, in any shape and layout, on any device.
    """

    def __init__(self, weight: Any, kernels: Any) -> None:
        import torch

        device = torch.device("cpu") if kernels.on_host else kernels.device
        self._weight, self._kernels = weight, kernels
        self._staging = weight.device.type != device.type or not weight.is_contiguous()
        self._flat = (
            torch.empty(weight.numel(), dtype=weight.dtype, device=device) if self._staging else weight.view(-1)
        )
        self._dtype = STORED[str(weight.dtype)]
        self._raw = self._flat.view(torch.uint8).numpy() if kernels.on_host else None
        self._size = self._flat.element_size()

    def direct(self, start: int, stop: int) -> Values | None:
        """The elements themselves, to be filled with float32; None where they are of another dtype."""
        if self._dtype != "F32":
            return None
        return self._flat[start:stop] if self._raw is None else self._raw[4 * start : 4 * stop].view(np.float32)

    def write(self, start: int, stop: int, values: Values) -> bool:
        """Rounds float32 values to the weight's dtype. False where they come out NaN or infinite (on the host)."""
        if self._raw is None:
            self._flat[start:stop] = values
            return True
        raw = self._raw[self._size * start : self._size * stop]
        return bool(self._kernels.store(np.ascontiguousarray(values), self._dtype, raw))

    def finish(self) -> None:
        """Once all is written."""
        if self._staging:
            self._weight.copy_(self._flat.view(self._weight.shape))

    def round_to(self, dtype: str) -> bool:
        """Rounds a weight in float32 to what a file in a narrower dtype would hold. False where that is infinite."""
        if self._dtype != "F32" or dtype not in ("F16", "BF16"):
            return True
        import torch

        rounded = self._weight.to(torch.float16 if dtype == "F16" else torch.bfloat16)
        self._weight.copy_(rounded)
        return dtype == "BF16" or bool(torch.isfinite(rounded).all())

    def finite(self) -> Any:
        """Whether all are; on a device a tensor of one element, for later."""
        import torch

        return torch.isfinite(self._flat).all()


def read_whole(tensor: FileTensor, values: NDArray[np.float32]) -> bool:
    """Fills `values` (n,) from a file, an adapter's correction included. False if any is NaN or infinite."""
    workspace = Workspace(reference)
    shape = tensor.info.shape
    columns = max(1, tensor.info.numel // max(1, shape[0] if shape else 1)) if tensor.whole_rows else 1
    size = max(1, (1 << 20) // columns) * columns
    tensor.hash_next_pass()
    finite = True
    for start in range(0, len(values), size):
        stop = min(start + size, len(values))
        finite = tensor.load(start, stop, values[start:stop], workspace) and finite
    return finite


def _in_memory(view: View, info: TensorInfo) -> Statistic | None:
    known = view.statistics
    if known is None or info.name not in known:
        return None
    where = f"{known.path}: '{info.name}'"
    return of_array(np.array(known.array(info.name)), info.shape, known.kind, known.axes.get(info.name, 1), where)
