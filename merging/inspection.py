"""What differs between checkpoints: norms, angles, sign conflicts, density, damage, dtypes, shapes, missing tensors.

With a base the task vectors θᵢ − θ₀ are measured, without one the weights themselves. One pass over the data, in chunks that
fit the cache; the sums are float64, and the same whatever the number of threads.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from merging import kernels, layers, lineage
from merging.checkpoint import FLOATING, TensorInfo
from merging.errors import CuveeError
from merging.inputs import Inputs, Values, Workspace
from merging.ownership import read_ownership
from merging.processes import default_threads
from merging.progress import Progress
from merging.sources import ModelRef
from merging.views import FileTensor, View, same_bytes

_PIECE = 1 << 23  # elements of a tensor that one worker takes at a time, so that none finishes late with a large one


def inspect(
    models: Sequence[str], base: str | None = None, *, threads: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Compares checkpoints, tensor by tensor under the names of the base (of the first model where there is none).

    Args:
        models: folders or hub ids, `+ADAPTER` where there is one.
        base: what task vectors are measured from.
        threads: workers; by default one for each core this process may use.
        progress: called with bytes done and in all, from any worker.

    Returns:
        What `cuvee inspect --json` prints. By model, over all and for each layer group:

        - `norm` of its vector v (θᵢ − θ₀, or θᵢ without a base), and `relative_norm` ‖θᵢ − θ₀‖ / ‖θ₀‖;
        - `cosine` and `distance` ‖vᵢ − vⱼ‖ to each other model, over the tensors that both have;
        - `density`: share of its coordinates where v is not 0;
        - `sign_conflict`: share of its coordinates where the sign of v is not that of the sum over all models, a sum of
          0 counting as positive: what TIES at density 1 leaves out;
        - `opposite_signs`: share of the coordinates shared with another model where one is positive, the other negative;
        - `nan`, `inf`: how many values of the model are; they count as v = 0 in all other numbers.

        `ownership`, by model, for those that a merge made of one model's coordinates each: see `merging.ownership`.

        null stands for what is not defined, say the cosine to a vector of zeros.

    Raises:
        CuveeError: a model that cannot be opened or read.
    """
    began = time.perf_counter()
    if not models:
        raise CuveeError("no model is named", where="cuvee inspect", mend="cuvee inspect A B … --base C")
    refs = [ModelRef.parse(text, where="cuvee inspect") for text in [*models, *([base] if base is not None else [])]]
    views: list[View] = []
    try:
        for ref in refs:
            views.append(View.open(ref))  # noqa: PERF401 — those opened so far are closed when the next fails
        family = Family(views, base is not None, short_names(refs))
        owned = {name: read_ownership(view.checkpoint.path) for name, view in zip(family.names, views, strict=True)}
        work = survey(family)
        tallies = _measure_all(work.pieces, family, threads or default_threads(), progress)
    finally:
        for view in views:
            view.checkpoint.close()
    return {
        "command": "inspect",
        "out": None,
        **_result(family, work, tallies),
        "ownership": {name: found for name, found in owned.items() if found is not None},
        "paths": {name: str(ref) for name, ref in zip(family.names, refs, strict=True)},
        "seed": None,
        "device": "cpu",
        "seconds": round(time.perf_counter() - began, 3),
        "cuvee_version": lineage.cuvee_version(),
    }


def show(result: Mapping[str, Any], groups: bool = True) -> None:
    """Prints tables of what `inspect` found on standard output."""
    from merging.inspection_table import show_tables

    show_tables(result, groups)


# ---- which tensors ----


@dataclass(frozen=True)
class Family:
    """The models, then the base if there is one; `names` in the same order."""

    views: Sequence[View]
    has_base: bool
    names: Sequence[str]

    @property
    def count(self) -> int:
        """k: how many models, the base not counted."""
        return len(self.views) - self.has_base


@dataclass(frozen=True)
class Piece:
    """Elements start … stop of one tensor, in all models that hold it in one shape.

    Attributes:
        members: places in the family, and the tensors there; the base, if it is one of them, last.
        unseen: the places whose damage this piece counts (an embedding that also stands in for a head is read twice).
        columns: elements of a row, where an adapter needs whole rows.
    """

    name: str
    members: Sequence[tuple[int, FileTensor]]
    start: int
    stop: int
    unseen: frozenset[int]
    columns: int = 1

    @property
    def nbytes(self) -> int:
        return sum((self.stop - self.start) * tensor.info.nbytes // tensor.info.numel for _, tensor in self.members)


@dataclass
class Work:
    """What the headers tell: what to read, and how the models differ already."""

    pieces: list[Piece] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)
    tensors: int = 0
    parameters: int = 0


def survey(family: Family) -> Work:
    """Compares names, shapes and dtypes, and integers byte for byte; cuts the rest into pieces."""
    work = Work()
    lead = family.views[-1] if family.has_base else family.views[0]
    for view in family.views:
        if view is not lead:
            view.align(lead.names())
    seen: set[tuple[int, str]] = set()
    for name in dict.fromkeys(name for view in [lead, *family.views] for name in view.names()):
        holders = [(place, info) for place, view in enumerate(family.views) if (info := view.find(name)) is not None]
        work.tensors += 1
        work.parameters += holders[0][1].numel
        work.differences += _differences(name, holders, family)
        unseen = frozenset(place for place, info in holders if (place, info.name) not in seen)
        seen.update((place, info.name) for place, info in holders)
        for shape in dict.fromkeys(info.shape for _, info in holders):
            alike = [(place, info) for place, info in holders if info.shape == shape and info.dtype in FLOATING]
            work.pieces += _pieces(name, [(place, family.views[place].tensor(info)) for place, info in alike], unseen)
    return work


def _pieces(name: str, members: list[tuple[int, FileTensor]], unseen: frozenset[int]) -> list[Piece]:
    if not members or not members[0][1].info.numel:
        return []
    info = members[0][1].info
    columns = info.numel // info.shape[0] if any(tensor.whole_rows for _, tensor in members) else 1
    size = max(1, _PIECE // columns) * columns
    stops = [min(start + size, info.numel) for start in range(0, info.numel, size)]
    return [Piece(name, members, i * size, stop, unseen, columns) for i, stop in enumerate(stops)]


def _differences(name: str, holders: list[tuple[int, TensorInfo]], family: Family) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if len(holders) < len(family.views):
        has = {place for place, _ in holders}
        missing = [other for place, other in enumerate(family.names) if place not in has]
        found.append({"tensor": name, "kind": "missing", "models": missing})
    for kind, values in (
        ("shape", {family.names[place]: list(info.shape) for place, info in holders}),
        ("dtype", {family.names[place]: info.dtype for place, info in holders}),
    ):
        if any(value != next(iter(values.values())) for value in values.values()):
            found.append({"tensor": name, "kind": kind, "values": values})
    alike = not any(difference["kind"] in ("shape", "dtype") for difference in found)
    whole = alike and holders[0][1].dtype not in FLOATING
    if whole and not same_bytes([family.views[place].tensor(info) for place, info in holders]):
        found.append({"tensor": name, "kind": "values", "models": [family.names[place] for place, _ in holders]})
    return found


# ---- the pass over the data ----


@dataclass
class Tally:
    """Sums over coordinates; entry i of k is model i, an entry (i, j) covers the tensors that both models have."""

    inner: NDArray[np.float64]  # (k, k) Σ vᵢvⱼ
    square: NDArray[np.float64]  # (k, k) Σ vᵢ²
    shared: NDArray[np.int64]  # (k, k) coordinates
    opposite: NDArray[np.int64]  # (k, k) vᵢ > 0 > vⱼ or the reverse
    against: NDArray[np.int64]  # (k,) sign of vᵢ is not that of the sum
    moved: NDArray[np.int64]  # (k,) vᵢ ≠ 0
    base: NDArray[np.float64]  # (k + 1,) Σ θ₀² where model i has the tensor; last: everywhere
    damage: NDArray[np.int64]  # (2, k + 1) NaN and infinite values, the base's last

    @classmethod
    def zeros(cls, k: int) -> Tally:
        pairs = (np.zeros((k, k)), np.zeros((k, k)), np.zeros((k, k), np.int64), np.zeros((k, k), np.int64))
        return cls(
            *pairs, np.zeros(k, np.int64), np.zeros(k, np.int64), np.zeros(k + 1), np.zeros((2, k + 1), np.int64)
        )

    def add(self, other: Tally) -> None:
        for each in fields(self):
            total = getattr(self, each.name)
            total += getattr(other, each.name)


class Counted:
    """A stretch of a tensor that counts its NaN and infinite values, and gives zeros in their place.

    Attributes:
        damaged: their positions in the chunk loaded last, or None.
    """

    def __init__(self, tensor: FileTensor, offset: int) -> None:
        self._tensor, self._offset = tensor, offset
        self.damaged: NDArray[np.intp] | None = None
        self.nan = self.inf = 0

    def load(self, start: int, stop: int, values: Values, workspace: Workspace) -> bool:
        finite = self._tensor.load(self._offset + start, self._offset + stop, values, workspace)
        if self._tensor.whole_rows:  # what the adapter makes of finite weights may not be
            finite = finite and workspace.kernels.finite(values)
        self.damaged = None
        if not finite:
            self.damaged = np.flatnonzero(~np.isfinite(values))
            nan = int(np.isnan(values).sum())
            self.nan += nan
            self.inf += len(self.damaged) - nan
            values[self.damaged] = 0.0
        return True


def measure(piece: Piece, family: Family, workspace: Workspace) -> Tally:
    """One pass over a piece."""
    k = family.count
    tally = Tally.zeros(k)
    counted = [(place, Counted(tensor, piece.start)) for place, tensor in piece.members]
    models = [tensor for place, tensor in counted if place < k]
    base = next((tensor for place, tensor in counted if place == k), None)
    measured = bool(models) and (base is not None or not family.has_base)  # else there is no vector, only damage
    streams = models if models else [tensor for _, tensor in counted]
    inputs = Inputs(workspace, streams, base if models else None, (piece.stop - piece.start,), lambda index: 0)
    inner, square = np.zeros((len(streams),) * 2), 0.0
    signs = np.zeros((len(streams), len(streams) + 1), np.int64)
    with np.errstate(over="ignore", invalid="ignore"):
        for chunk in inputs.chunks(piece.columns):
            if base is not None:
                square += float(inputs.kernels.gram(chunk.stack[:1])[0, 0])
            if measured:
                vectors = chunk.deltas() if base is not None else chunk.models
                _forget_damage(vectors, models, base)
                inner += inputs.kernels.gram(vectors)
                inputs.kernels.sign_counts(vectors, signs)
    for place, tensor in counted:
        if place in piece.unseen:
            tally.damage[:, place] = tensor.nan, tensor.inf
    if base is not None:
        tally.base[k] = square
    if measured:
        places = [place for place, _ in counted if place < k]
        among = np.ix_(places, places)
        tally.inner[among] = inner
        tally.square[among] = np.diag(inner)[:, None]
        tally.shared[among] = piece.stop - piece.start
        tally.opposite[among] = np.triu(signs[:, :-1], 1) + np.triu(signs[:, :-1], 1).T
        tally.against[places] = signs[:, -1]
        tally.moved[places] = np.diag(signs)
        tally.base[places] = square
    return tally


def _forget_damage(vectors: Values, models: Sequence[Counted], base: Counted | None) -> None:
    for row, model in zip(vectors, models, strict=True):
        if model.damaged is not None:
            row[model.damaged] = 0.0
    if base is not None and base.damaged is not None:
        vectors[:, base.damaged] = 0.0


def _measure_all(pieces: Sequence[Piece], family: Family, threads: int, progress: Progress | None) -> list[Tally]:
    """Workers that each take the next piece; the first error stops all."""
    backend = kernels.load()
    total, done = sum(piece.nbytes for piece in pieces), 0
    tallies: list[Tally | None] = [None] * len(pieces)
    remaining = iter(enumerate(pieces))
    lock, failed = threading.Lock(), threading.Event()

    def worker() -> None:
        nonlocal done
        workspace = Workspace(backend)
        while not failed.is_set():
            with lock:
                index, piece = next(remaining, (-1, None))
            if piece is None:
                return
            try:
                tallies[index] = measure(piece, family, workspace)
            except BaseException:
                failed.set()
                raise
            with lock:
                done += piece.nbytes
                if progress:
                    progress(done, total)

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(worker) for _ in range(threads)]:
            future.result()
    return [tally for tally in tallies if tally is not None]


# ---- the result ----


def _result(family: Family, work: Work, tallies: Sequence[Tally]) -> dict[str, Any]:
    whole = Tally.zeros(family.count)
    groups: dict[str, Tally] = {}
    damaged = []
    by_tensor: dict[str, NDArray[np.int64]] = {}
    for piece, tally in zip(work.pieces, tallies, strict=True):
        whole.add(tally)
        groups.setdefault(layers.group(piece.name), Tally.zeros(family.count)).add(tally)
        if tally.damage.any():
            by_tensor[piece.name] = by_tensor.get(piece.name, 0) + tally.damage
    for name, counts in by_tensor.items():
        for place, (nan, inf) in enumerate(counts.T[: len(family.views)].tolist()):
            if nan or inf:
                damaged.append({"tensor": name, "model": family.names[place], "nan": nan, "inf": inf})
    base = None
    if family.has_base:
        nan, inf = whole.damage[:, -1].tolist()
        base = {"name": family.names[-1], "norm": math.sqrt(whole.base[-1]), "nan": nan, "inf": inf}
    return {
        "base": base,
        "models": _entries(whole, family),
        "groups": {name: _entries(groups[name], family) for name in _in_order(groups)},
        "differences": work.differences,
        "damaged": damaged,
        "tensors": work.tensors,
        "parameters": work.parameters,
        "bytes_read": sum(piece.nbytes for piece in work.pieces),
    }


def _entries(tally: Tally, family: Family) -> dict[str, dict[str, Any]]:
    k, entries = family.count, {}
    for i, name in enumerate(family.names[:k]):
        own, norm = int(tally.shared[i, i]), math.sqrt(tally.square[i, i])
        others = [j for j in range(k) if j != i]
        cosine, distance, opposite = {}, {}, {}
        for j in others:
            inner, mine, theirs = tally.inner[i, j], tally.square[i, j], tally.square[j, i]
            other = family.names[j]
            cosine[other] = _ratio(inner, math.sqrt(mine) * math.sqrt(theirs), bound=1.0)
            distance[other] = math.sqrt(max(0.0, mine + theirs - 2 * inner)) if tally.shared[i, j] else None
            opposite[other] = _ratio(tally.opposite[i, j], tally.shared[i, j])
        entries[name] = {
            "norm": norm,
            "relative_norm": _ratio(norm, math.sqrt(tally.base[i])) if family.has_base else None,
            "density": _ratio(tally.moved[i], own),
            "sign_conflict": _ratio(tally.against[i], own),
            "cosine": cosine,
            "distance": distance,
            "opposite_signs": opposite,
            "nan": int(tally.damage[0, i]),
            "inf": int(tally.damage[1, i]),
            "parameters": own,
        }
    return entries


def _ratio(part: float, whole: float, bound: float = math.inf) -> float | None:
    """None where it is not defined; rounding may carry a cosine over its bound."""
    return float(max(-bound, min(bound, part / whole))) if whole > 0 else None


def _in_order(groups: Iterable[str]) -> list[str]:
    """Embeddings, the stacks layer by layer (files often have layer 10 before layer 2), and whatever comes after."""
    stacks: dict[str, int] = {}

    def place(group: str) -> tuple[int, int, int]:
        match = re.fullmatch(r"(.+)\.(\d+)", group)
        stack = stacks.setdefault(match[1] if match else group, len(stacks))
        return (1, stack, int(match[2])) if match else (0 if group == "embeddings" else 2, stack, 0)

    return sorted(groups, key=place)


def short_names(refs: Sequence[ModelRef]) -> list[str]:
    """The last part of each path, with as many parts before it as tell the models apart."""

    def tail(path: str, depth: int) -> str:
        parts = (Path(path).absolute() if Path(path).exists() else Path(path)).parts[-depth:]
        return "/".join(part for part in parts if part != "/") or path

    def label(ref: ModelRef, depth: int) -> str:
        text = tail(ref.path, depth) + (f"@{ref.revision}" if ref.revision else "")
        return f"{text}+{tail(ref.adapter, depth)}" if ref.adapter else text

    names = [label(ref, 1) for ref in refs]
    deepest = max(len(Path(path).absolute().parts) for ref in refs for path in (ref.path, ref.adapter or ""))
    for depth in range(2, deepest + 1):
        holders: dict[str, set[tuple[str | None, ...]]] = {}
        for name, ref in zip(names, refs, strict=True):
            holders.setdefault(name, set()).add(ref.identity)
        names = [label(r, depth) if len(holders[n]) > 1 else n for n, r in zip(names, refs, strict=True)]
    copies = [names[: index + 1].count(name) for index, name in enumerate(names)]  # one and the same model, given again
    return [f"{name} ({copy})" if copy > 1 else name for name, copy in zip(names, copies, strict=True)]
