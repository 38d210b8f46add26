"""Executing a plan: workers that each take the next tensor, stream it through its method and write it in place.

Workers are threads: the kernels, reads and writes all release the interpreter's lock, and each runs on one core, since
threads inside an operation wait for each other on a busy machine.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from threadpoolctl import threadpool_limits

from merging import kernels, lineage
from merging.checkpoint import DTYPE_BYTES, CheckpointWriter
from merging.errors import MergeError
from merging.inputs import CACHE_BYTES, Inputs, NonFinite, Workspace
from merging.ownership import OwnershipWriter
from merging.plan import Plan, Step, quoted_some
from merging.progress import Progress
from merging.random_streams import stream_key
from merging.views import FileTensor, same_bytes

#: Called with bytes done and bytes in all, from any worker.
_DEVICE_CACHE_BYTES = 256 << 20  # a chunk of all models on a GPU: large enough to hide the launch of its kernels
_BLOCK = 1 << 20
_T = TypeVar("_T")


class Execution:
    """One run of a plan.

    Args:
        seed: of all random draws.
        backend, device: see `merging.kernels.load`.
        threads: how many workers.
    """

    def __init__(
        self, plan: Plan, seed: int, backend: str, device: str, threads: int, progress: Progress | None
    ) -> None:
        self.plan, self.seed, self.threads, self.progress = plan, seed, threads, progress
        self.local = threading.local()
        self.surveys: dict[str, list[np.ndarray]] = {}
        self.total = sum(step.nbytes for step in plan.steps)
        self.kernels = kernels.load(backend, device, self.total)
        self.done = 0
        self.lock = threading.Lock()
        self.failed = threading.Event()
        self.digests: list[tuple[str, str, tuple[int, ...], str]] = []
        self._notes: dict[tuple[str, bool], set[str]] = {}  # the tensors by (text, of all)
        self.owners: OwnershipWriter | None = None

    def run(self, staging: Path, shard_size: int) -> str:
        """Writes all shards; returns the digest of what was written."""
        steps = self.plan.steps
        if any(step.statistics and "gram" in step.method.statistics for step in steps):
            importlib.import_module("scipy.linalg")  # now, so that the limit holds for its BLAS too
        with threadpool_limits(1, "blas"):
            surveys = self._survey([s for s in steps if s.method.survey and s.action == "merge"])
            writer = CheckpointWriter(staging, [(s.name, s.dtype, s.shape) for s in steps], shard_size, self.plan.parts)
            try:
                if owned := self.plan.owned:
                    self.owners = OwnershipWriter(staging, owned, self.plan.models)
                self._each(_large_first(steps, self.threads), lambda step: self._write(step, writer, surveys))
            finally:
                writer.close()
                if self.owners:
                    self.owners.close()
        return lineage.combined_digest(self.digests)

    @property
    def notes(self) -> list[str]:
        """What the methods had to say, a line each."""
        order = {step.name: place for place, step in enumerate(self.plan.steps)}
        return sorted(
            text if of_all else f"{text}: {quoted_some(sorted(names, key=order.__getitem__))}"
            for (text, of_all), names in self._notes.items()
        )

    def _each(self, steps: Sequence[_T], work: Callable[[_T], None]) -> None:
        """Runs `work` on every step, or part of one; the first error stops the others and is raised."""
        remaining = iter(steps)
        begin = threading.Event()  # once all workers are known to the pool, which waits for no other

        def worker() -> None:
            begin.wait()
            while not self.failed.is_set():
                with self.lock:
                    step = next(remaining, None)
                if step is None:
                    return
                try:
                    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found, and told, by us
                        work(step)
                except BaseException:
                    self.failed.set()
                    raise

        with ThreadPoolExecutor(self.threads) as pool:
            try:
                futures = [pool.submit(worker) for _ in range(self.threads)]
                begin.set()
                wait(futures)
            except BaseException:  # Ctrl-C: nobody may be at work any more when the files are closed
                self.failed.set()
                begin.set()
                raise
        for future in futures:
            future.result()

    def _survey(self, steps: Sequence[Step]) -> list[np.ndarray]:
        """What methods must know of the whole model, a stage after the other, until they ask for no more."""
        found: list[np.ndarray] = []
        while steps:
            stage = Stage()

            def work(step: Step, stage: Stage = stage) -> None:
                inputs, tensors = self._inputs(step, found)
                assert step.method.survey is not None
                if (
                    inputs.numel
                    and (part := _finite(step, tensors, step.method.survey, inputs, found, **step.parameters))
                    is not None
                ):
                    with self.lock:
                        stage.add(step.name, part)

            self._each(steps, work)
            if (total := stage.total([step.name for step in steps])) is None:
                break
            found.append(total)
        return found

    def _inputs(self, step: Step, surveys: list[np.ndarray]) -> tuple[Inputs, list[FileTensor]]:
        models = [view.tensor(info) for view, info in step.models]
        base = step.base[0].tensor(step.base[1]) if step.base else None
        tensors = [*models, base] if base else models
        inputs = Inputs(
            self._workspace(),
            models,
            base,
            step.shape,
            lambda index: stream_key(self.seed, step.name, index),
            surveys,
            whole_rows=any(t.whole_rows for t in tensors),
            statistics=[view.statistic(info) for view, info in step.models] if step.statistics else (),
            note=lambda text, of_all: self._note(step.name, text, of_all),
        )
        return inputs, tensors

    def _note(self, name: str, text: str, of_all: bool) -> None:
        with self.lock:
            self._notes.setdefault((text, of_all), set()).add(name)

    def _workspace(self) -> Workspace:
        if not hasattr(self.local, "workspace"):
            capacity = (CACHE_BYTES if self.kernels.on_host else _DEVICE_CACHE_BYTES) // 4
            self.local.workspace = Workspace(self.kernels, capacity)
        return self.local.workspace  # type: ignore[no-any-return]

    def _write(self, step: Step, writer: CheckpointWriter, surveys: list[np.ndarray]) -> None:
        inputs, tensors = self._inputs(step, surveys)
        digest = xxhash.xxh3_128()
        try:
            if step.action == "copy":
                self._copy(step, tensors, writer, digest)
            elif inputs.numel:
                self._merge(step, inputs, tensors, writer, digest)
        except NonFinite as error:
            _refuse_unless_copied(step, tensors, error)
            digest = xxhash.xxh3_128()
            self._copy(step, tensors[:1], writer, digest)
        with self.lock:
            self.digests.append((step.name, step.dtype, step.shape, digest.hexdigest()))
            self.done += step.nbytes
            if self.progress:
                self.progress(self.done, self.total)

    def _merge(
        self, step: Step, inputs: Inputs, tensors: list[FileTensor], writer: CheckpointWriter, digest: Any
    ) -> None:
        size = DTYPE_BYTES[step.dtype]
        final = step.method.function(inputs, **step.parameters)
        for tensor in tensors:
            tensor.hash_next_pass()
        for chunk, values in inputs.apply(final):
            if self.failed.is_set():
                return
            if inputs.kernels.on_host and step.dtype == "F32":
                raw = values.view(np.uint8)
                finite = inputs.kernels.finite(values)
            else:
                raw = inputs.workspace.raw((chunk.stop - chunk.start) * size)
                finite = inputs.kernels.store(values, step.dtype, raw)
            if not finite:
                raise MergeError(
                    f"'{step.name}' comes out infinite or NaN in {step.dtype}",
                    mend="set 'out_dtype: float32' or 'bfloat16', or smaller weights",
                )
            digest.update(raw.data)
            writer.write(step.name, chunk.start * size, raw.data)
            if self.owners and chunk.owners is not None:
                self.owners.write(step.name, chunk.start, inputs.kernels.to_host(chunk.owners))

    def _copy(self, step: Step, tensors: list[FileTensor], writer: CheckpointWriter, digest: Any) -> None:
        first = tensors[-1] if step.base else tensors[0]
        if not step.name.endswith("num_batches_tracked") and not same_bytes(tensors):
            raise MergeError(
                f"'{step.name}' holds whole numbers ({first.info.dtype}) that differ between the models",
                where=str(first.info.file),
                mend="they cannot be averaged; are the models of one lineage?",
            )
        block = 1 << 20
        for start in range(0, first.info.nbytes, block):
            part = memoryview(bytearray(min(block, first.info.nbytes - start)))
            first.view.checkpoint.read_into(first.info, start, part)
            digest.update(part)
            writer.write(step.name, start, part)


class Stage:
    """Sums what a survey returns of each tensor. Whole numbers at once; others in the tensors' order, so that it does not
    matter which thread comes first."""

    def __init__(self) -> None:
        self._whole: np.ndarray | None = None
        self._parts: dict[str, np.ndarray] = {}

    def add(self, name: str, part: np.ndarray) -> None:
        if np.issubdtype(part.dtype, np.integer):
            self._whole = part if self._whole is None else self._whole + part
        else:
            self._parts[name] = part

    def total(self, order: Sequence[str]) -> np.ndarray | None:
        parts = [self._parts[name] for name in order if name in self._parts]
        everything = parts if self._whole is None else [self._whole, *parts]
        return sum(everything[1:], start=everything[0]) if everything else None


def _finite(step: Step, tensors: list[FileTensor], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the function returns; None for a tensor that will be copied, since all models hold the same of it."""
    try:
        return function(*args, **kwargs)
    except NonFinite as error:
        _refuse_unless_copied(step, tensors, error)
        return None


def _refuse_unless_copied(step: Step, tensors: list[FileTensor], error: NonFinite) -> None:
    """A buffer may hold -inf (a mask, say), if it is the same in all models."""
    place = tensors[error.index]
    if len(tensors) < 2 or not same_bytes(tensors) or place.info.dtype != step.dtype:
        raise MergeError(
            f"'{step.name}' holds NaN or infinite values",
            where=str(place.info.file),
            mend="that model is damaged; 'cuvee inspect' counts them",
        ) from None


def _large_first(steps: Sequence[Step], threads: int) -> list[Step]:
    """File order, which the disk likes, but for tensors so large that a worker would finish late with one."""
    limit = sum(step.nbytes for step in steps) / (4 * threads)
    large = sorted((s for s in steps if s.nbytes > limit), key=lambda s: -s.nbytes)
    return large + [s for s in steps if s.nbytes <= limit]
