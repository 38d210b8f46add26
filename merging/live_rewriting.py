"""Rewriting a module's weights: the execution of a plan whose tensors lie in memory, inputs and results alike.

A method that ends in a weighted sum (`Final.factors`) is done in one pass over the held rows, block by block into the
weights themselves; adapters add one product of all their factors. Any other method streams through `Inputs` as ever.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from merging import kernels
from merging.checkpoint import FLOATING
from merging.errors import MergeError
from merging.execution import Execution
from merging.inputs import Final, Inputs, Values
from merging.kernels import reference
from merging.live_gradient import along
from merging.live_tensors import BLOCK, Held, HeldTensor, Holder, Storage, Target
from merging.plan import Plan, Step
from merging.random_streams import stream_key
from merging.views import FileTensor, View, same_bytes

_SLICE = 1 << 20  # elements that one worker takes at a time
_DEVICE_BLOCK = 1 << 24


class _Slice(NamedTuple):
    """Elements start … stop of a tensor that is a weighted sum of the models'."""

    step: Step
    final: Final
    left: Values  # (rows, ranks) of all adapters side by side, their factors multiplied in; None without any
    right: Values  # (ranks, columns)
    start: int
    stop: int


class Rewriting(Execution):
    """See `LiveMerge` for the arguments."""

    def __init__(self, plan: Plan, seed: int, backend: str, device: str, threads: int) -> None:
        super().__init__(plan, seed, backend, device, threads, None)
        # Sums must be those of `cuvee merge`, which for little work are numpy's; to store, compiled kernels always pay.
        self._storing = kernels.load(backend, device)
        if any("gram" in step.method.statistics for step in plan.steps):
            importlib.import_module("scipy.linalg")  # now, so that the limit holds for its BLAS too
        self._blas = ThreadpoolController()
        self._rounds = True
        self.held: dict[str, Held] = {}
        self.targets: dict[str, Target] = {}

    def hold(self, base: View, weights: Mapping[str, Any], storage: Storage, dtype: str) -> Plan:
        """Reads all models into memory.

        Args:
            weights: of the module, by the base's stored name.

        Returns:
            The plan of what is to be rewritten, and of what a survey must see besides.

        Raises:
            MergeError: a model holds NaN or infinity.
        """
        on_host = self.kernels.on_host
        holder = Holder(self.kernels, storage, deltas=dtype == "bfloat16" or not on_host, bfloat16=dtype == "bfloat16")
        own = set(base.names())
        kept: dict[str, Step] = {}

        def read(step: Step) -> None:
            info = base.find(step.name) if step.name in own else None
            weight = weights.get(info.name) if info else None
            wanted = weight is not None or (step.method.survey is not None and step.action == "merge")
            if info is None or not wanted or info.dtype not in FLOATING or not math.prod(step.shape):
                return
            with self.lock:  # one at a time: storage grows, and so does the file that it may lie in
                held, action = self._held(step, holder, base, weight is not None)
                self.held[step.name] = held
                if weight is not None:
                    self.targets[step.name] = Target(weight, self._storing)
                kept[step.name] = replace(step, action=action)

        for step in self.plan.steps:
            read(step)
        self._wait()
        self.plan = replace(self.plan, steps=tuple(kept[s.name] for s in self.plan.steps if s.name in kept))
        return self.plan

    def onto(self, weights: Mapping[str, Any]) -> Rewriting:
        """The same with another module's weights, which hold the same tensors and no file's; what is held is shared.

        Args:
            weights: by the plan's name.
        """
        other = copy.copy(self)
        other._rounds = False
        other.targets = {name: Target(weight, self._storing) for name, weight in weights.items() if name in self.held}
        return other

    def rewrite(self, plan: Plan) -> None:
        """Gives the weights the values of a plan: that of `hold`, with other parameters.

        They are what a file with the plan's dtypes has, in a module that is wider, too.

        Raises:
            MergeError: a method refuses, or a result is not finite.
        """
        self.plan = plan
        self.failed.clear()
        self._notes.clear()
        self._wait()
        slices: dict[str, list[_Slice]] = {}
        with self._blas.limit(limits=1, user_api="blas"):
            surveys = self._survey([s for s in plan.steps if s.method.survey and s.action == "merge"])
            steps = [step for step in plan.steps if step.name in self.targets]

            def work(step: Step) -> None:
                slices[step.name] = self._merge_or_slice(step, surveys)

            self._each(sorted(steps, key=lambda step: -self.held[step.name].numel), work)
            self._each([part for step in steps for part in slices[step.name]], self._blend)
        self._finish()
        for step in steps if self._rounds else ():
            if not self.targets[step.name].round_to(step.dtype):
                raise not_finite(step.name)

    def reset(self) -> None:
        """Gives the weights the base's values."""
        self.failed.clear()
        self._wait()
        self._each([step for step in self.plan.steps if step.name in self.targets], self._restore)
        self._finish(check=False)

    def along(self, gradients: Mapping[str, Values]) -> dict[str, NDArray[np.float64]]:
        """By tensor the inner products of a gradient with every model's task vector, (models,); the same for any threads.

        Args:
            gradients: by stored name, (n,) float32, on the device of the kernels.
        """
        self.failed.clear()
        self._wait()
        parts: dict[tuple[str, int], Values] = {}
        block = BLOCK if self.kernels.on_host else _DEVICE_BLOCK

        def work(part: tuple[str, int, int]) -> None:
            name, start, stop = part
            if not self.kernels.on_host:
                self.kernels.enter_thread()
            parts[name, start] = along(self.held[name], gradients[name], start, stop, block, self._workspace())

        with self._blas.limit(limits=1, user_api="blas"):
            held = {name: self.held[name] for name in gradients}
            self._each([(name, *span) for name in held for span in self._spans(held[name], held[name].columns)], work)
        self._wait()
        found = {name: np.zeros(len(self.held[name].models)) for name in gradients}
        for (name, _), values in sorted(parts.items()):
            found[name] += self.kernels.to_host(values)
        return found

    def flat(self, values: Any) -> Values:
        """A torch tensor as (n,) float32 on the device of the kernels."""
        if not self.kernels.on_host:
            return values.to(self.kernels.device, self.kernels.xp.float32).reshape(-1)
        return np.ascontiguousarray(values.cpu().float().numpy()).reshape(-1)

    # ---- reading ----

    def _held(self, step: Step, holder: Holder, base: View, rewritten: bool) -> tuple[Held, Any]:
        info = base.find(step.name)
        assert info is not None
        values = holder.base(base, info)
        if values is not None and step.action == "merge":
            held = holder.hold(values, (base, info), step.models, step.statistics)
            if isinstance(held, Held):
                return held, "merge"
            damaged = str(step.models[held][0].ref)
        else:
            damaged = str(base.ref)
        tensors = [view.tensor(found) for view, found in (*step.models, (base, info))]
        if not same_bytes(tensors):
            raise MergeError(
                f"'{step.name}' holds NaN or infinite values",
                where=damaged,
                mend="that model is damaged; 'cuvee inspect' counts them",
            )
        raw = np.frombuffer(base.checkpoint.read_bytes(info), np.uint8)
        values = np.empty(info.numel, np.float32)
        reference.load(raw, info.dtype, values)
        return Held(info.shape, holder.placed(values)), "copy"

    # ---- writing ----

    def _inputs(self, step: Step, surveys: list[np.ndarray]) -> tuple[Inputs, list[FileTensor]]:
        held = self.held[step.name]
        inputs = Inputs(
            self._workspace(),
            held.models,
            HeldTensor(held.base) if step.base else None,
            step.shape,
            lambda index: stream_key(self.seed, step.name, index),
            surveys,
            whole_rows=held.whole_rows,
            statistics=held.statistics if step.statistics else (),
            note=lambda text, of_all: self._note(step.name, text, of_all),
        )
        return inputs, []

    def _merge_or_slice(self, step: Step, surveys: list[np.ndarray]) -> list[_Slice]:
        """Merges a tensor, or says in which parts it may be merged."""
        held, target = self.held[step.name], self.targets[step.name]
        if step.action == "copy":
            self._restore(step)
            return []
        inputs, _ = self._inputs(step, surveys)
        final = step.method.function(inputs, **step.parameters)
        if final.factors is None or not held.plain:
            for chunk, values in inputs.apply(final):
                if self.failed.is_set():
                    break
                if not target.write(chunk.start, chunk.stop, values):
                    raise not_finite(step.name)
            return []
        return self._slices(step, held, final)

    def _slices(self, step: Step, held: Held, final: Final) -> list[_Slice]:
        xp, left, right, columns = self.kernels.xp, None, None, 1
        if held.products:
            factors = self.kernels.to_host(final.factors)
            left = xp.concatenate([p.left * float(factors[p.model] * np.float32(p.scale)) for p in held.products], 1)
            right = xp.concatenate([p.right for p in held.products], 0)
            columns = right.shape[1]
        return [_Slice(step, final, left, right, *span) for span in self._spans(held, columns)]

    def _spans(self, held: Held, columns: int) -> list[tuple[int, int]]:
        """What one worker takes at a time, in whole rows of `columns` elements: from where to where."""
        size = max(1, _SLICE // columns) * columns if self.kernels.on_host else held.numel
        return [(start, min(start + size, held.numel)) for start in range(0, held.numel, size)]

    def _blend(self, part: _Slice) -> None:
        held, target = self.held[part.step.name], self.targets[part.step.name]
        if not self.kernels.on_host:
            self.kernels.enter_thread()
        columns = 1 if part.right is None else part.right.shape[1]
        size = max(1, self._block(held, target, part) // columns) * columns
        finite = True
        for start in range(part.start, part.stop, size):
            stop = min(start + size, part.stop)
            direct = target.direct(start, stop)
            out = self._workspace().floats(size)[: stop - start] if direct is None else direct
            finite = self._weighted_sum(held, part.final, start, out) and finite
            if part.left is not None:
                out += (part.left[start // columns : stop // columns] @ part.right).reshape(-1)
                finite = finite and (not self.kernels.on_host or self.kernels.finite(out))
            if direct is None:
                finite = target.write(start, stop, out) and finite
        if not finite:
            raise not_finite(part.step.name)

    def _block(self, held: Held, target: Target, part: _Slice) -> int:
        """Elements to go over at a time: what goes over them more than once must find them in the cache."""
        if not self.kernels.on_host:
            return _DEVICE_BLOCK
        once = part.left is None and len(held.whole) == len(held.models) and target.direct(0, 0) is not None
        return part.stop - part.start if once else BLOCK

    def _weighted_sum(self, held: Held, final: Final, start: int, out: Values) -> bool:
        """The models held whole, and the bases of the others."""
        stop = start + len(out)
        if len(held.whole) == len(held.models):
            factors, others = final.factors, 0.0
        else:
            factors = final.factors[list(held.whole)]
            others = float(final.factors.sum() - factors.sum())
        if not held.whole:
            out[:] = held.base[start:stop] if final.of_deltas else held.base[start:stop] * others
            return True
        if held.deltas:
            scale = 1.0 if final.of_deltas else float(final.factors.sum())
            return bool(self.kernels.blend_deltas(factors, held.rows, held.base, scale, start, out))
        finite = self.kernels.blend(factors, held.rows, held.base if final.of_deltas else None, start, out)
        if others and not final.of_deltas:
            out += held.base[start:stop] * others
            finite = not self.kernels.on_host or self.kernels.finite(out)
        return bool(finite)

    def _restore(self, step: Step) -> None:
        held, target = self.held[step.name], self.targets[step.name]
        size = BLOCK if self.kernels.on_host else held.numel
        for start in range(0, held.numel, size):
            target.write(start, min(start + size, held.numel), held.base[start : start + size])

    def _finish(self, check: bool = True) -> None:
        self._wait()
        if check and not self.kernels.on_host:
            names = [step.name for step in self.plan.steps if step.name in self.targets and step.action == "merge"]
            finite = [self.targets[name].finite() for name in names]
            for name, found in zip(names, self.kernels.xp.stack(finite).tolist() if finite else [], strict=True):
                if not found:
                    raise not_finite(name)
        for target in self.targets.values():
            target.finish()

    def _wait(self) -> None:
        """Until the device has done what was asked of it: each worker asks in a stream of its own."""
        if not self.kernels.on_host and self.kernels.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.kernels.device)


def not_finite(name: str) -> MergeError:
    return MergeError(f"'{name}' comes out infinite or NaN", mend="smaller weights; 'reset' gives the base back")
