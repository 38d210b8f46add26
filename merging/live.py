"""A merge that stays in memory: a new coefficient vector rewrites the model's weights in place, without touching the disk.

What searches for coefficients asks for hundreds of merges of the same models; here each costs one pass over the weights
instead of a checkpoint written and loaded. `recipe` says the same merge for `cuvee merge`: a float32 model then holds that
merge's bits (on a GPU, with bfloat16 task vectors or with adapters its values but for rounding).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from merging import layers, methods, provenance, recipe_statistics
from merging.checkpoint import FLOATING, Checkpoint
from merging.errors import CuveeError, MergeError
from merging.live_recipe import Coefficients
from merging.live_rewriting import Rewriting
from merging.live_tensors import STORED, Storage
from merging.loading import adapter_merged
from merging.plan import DTYPES, Step, make_plan
from merging.processes import default_threads
from merging.recipe import Recipe
from merging.sources import ModelRef
from merging.views import View

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from merging.statistics.matching import Piece

Ref = ModelRef | str | os.PathLike[str]


class LiveMerge:
    """Models held in memory, and a module whose weights become any merge of them.

    Args:
        module: loaded from `base`, and holding its weights; which parameter is which stored tensor is told by their values.
            Parameters that share memory stay shared.
        base: what the module was loaded from; the base of methods that have one.
        models: those to merge; folders, hub ids, or either with a LoRA adapter. One on the same base, with an adapter, is
            held as the adapter's factors. The base is not among them, unless the method can do without: then it is none.
        method: of the registry.
        parameters: of the method, that stay the same; as `set` takes them.
        groups: from a stored tensor's name to its group (`merging.layers.group`, say); None: all in one.
        dtype: in which models are held: "float32", or "bfloat16" for task vectors of half the size.
        storage: "memory", or "mapped": a temporary file, for models larger than memory (CPU only).
        device: that computes and, but for `mapped`, holds the models; the module may lie elsewhere.
        stats: of each model, a folder of `cuvee stats`, for methods that take statistics.
        seed: of random draws, as in `cuvee merge --seed`.
        threads: workers; by default one a core.
        backend: see `merging.kernels.load`.

    Attributes:
        models: how many.
        groups: their names, in the order of the file; ("",) for one.
        nbytes: held in memory, or in the file mapped to it.
        notes: what the method had to say of the latest merge, a line each.

    Raises:
        CuveeError: models that do not fit, a module that does not hold the base's weights, statistics of others.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        base: Ref,
        models: Sequence[Ref],
        *,
        method: str = "task_arithmetic",
        parameters: Mapping[str, Any] | None = None,
        groups: Callable[[str], str] | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        storage: Literal["memory", "mapped"] = "memory",
        device: str = "cpu",
        stats: Sequence[str | os.PathLike[str] | Mapping[str, Any]] | None = None,
        seed: int = 0,
        threads: int | None = None,
        backend: str = "auto",
    ) -> None:
        _refuse_choices(dtype, storage, device)
        self._method = methods.get(method)
        self._base, sources = _reference(base), [_reference(model) for model in models]
        if stats is not None and len(stats) != len(sources):
            raise MergeError(f"statistics of {len(stats)} models are given for {len(sources)}")
        folders = None if stats is None else [s if isinstance(s, Mapping) else os.path.abspath(s) for s in stats]
        self.models = len(sources)
        one_of_them = self._method.base == "optional" and any(s.identity == self._base.identity for s in sources)
        self._has_base = self._method.base != "none" and not one_of_them
        its_base = None if one_of_them else self._base
        self._coefficients = Coefficients(self._method, its_base, sources, folders, parameters or {})
        trial = self._coefficients.trial()
        trial.check(self._method)
        if len(trial.merged(self._method)) != self.models:
            raise MergeError("the base is among the models", where=str(self._base), mend="list the others only")
        self._views = views = [View.open(source) for source in sources]
        base_view = View.open(self._base)
        try:
            self._attach(trial, base_view, seed)
            plan = make_plan(trial, self._method, views, base_view if self._has_base else None)
            if not self._has_base:
                base_view.align(views[0].names())
            merged = [step.name for step in plan.steps if self._complete(step)]
            self.groups = self._coefficients.divide(merged, groups)
            self._fractions = layers.fractions([step.name for step in plan.steps])
            own = _own(module)
            self._places = _places(own, dict(module.named_parameters()), self._base, base_view.checkpoint)
            weights = {name: piece.of(own[parameter]) for name, (parameter, piece) in self._places.items()}
            self._storage = Storage(storage)
            self._rewriting = Rewriting(plan, seed, backend, device, threads or default_threads())
            self._plan = self._rewriting.hold(base_view, weights, self._storage, dtype)
            if any(view.statistics for view in views):
                digests = {str(view.ref): view.digest() for view in [*views, base_view]}
                provenance.refuse_other_models(views, digests, base_view)
        finally:
            for view in [*views, base_view]:
                view.checkpoint.close()

    @property
    def nbytes(self) -> int:
        return self._storage.nbytes

    @property
    def notes(self) -> list[str]:
        return self._rewriting.notes

    def set(self, coefficients: Mapping[str, Any]) -> None:
        """Rewrites the module's weights as the merge with these parameters.

        Args:
            coefficients: parameters of the method by name: one value; for those that each model has its own of, one or a
                list of one a model; or a mapping with such a value for every group.

        Raises:
            CuveeError: no such parameter, a value out of range, too few values; the weights are then as they were. A merge
                that comes out infinite or NaN; they are then undefined until the next `set` or `reset`.
        """
        self.apply(self._coefficients.recipe(coefficients))

    def apply(self, recipe: Recipe) -> None:
        """Rewrites the module's weights as a recipe says; its method and models must be those held, in their order.

        Raises:
            CuveeError: as `set`.
        """
        recipe.check(self._method)
        self._prepare(recipe)
        steps = [self._with_parameters(step, recipe) for step in self._plan.steps]
        self._rewriting.rewrite(replace(self._plan, steps=tuple(steps)))

    def reset(self) -> None:
        """Gives the module the base's weights back."""
        self._rewriting.reset()

    def gradient(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, NDArray[np.float64]]:
        """How a loss changes along the task vectors: ⟨∂loss/∂θ, τᵢ⟩ of every tensor that is merged.

        Their sum over a group's tensors is the loss's derivative by the group's weights of `task_arithmetic` (with
        `lambda` 1, without `normalize`).

        Args:
            gradients: of the loss by the module's parameters, by name; what is missing counts as 0.

        Returns:
            By stored name (models,).

        Raises:
            MergeError: a method without a base, and so without task vectors.
        """
        if not self._has_base:
            raise MergeError(f"'{self._method.name}' has no task vectors to look along", mend="use task_arithmetic")
        found = {}
        for name in (step.name for step in self._merged()):
            parameter, piece = self._places.get(name, ("", None))
            if piece is not None and parameter in gradients:
                found[name] = self._rewriting.flat(piece.of(gradients[parameter].detach()))
        return self._rewriting.along(found)

    def recipe(self, coefficients: Mapping[str, Any]) -> str:
        """The YAML with which `cuvee merge` makes the same merge; local folders with their whole path.

        Raises:
            CuveeError: as `set`.
        """
        recipe = self._coefficients.recipe(coefficients)
        recipe.check(self._method)
        return recipe.to_yaml()

    def _attach(self, trial: Recipe, base: View, seed: int) -> None:
        """Gives the models the statistics that a recipe names."""
        recipe_statistics.attach(
            trial, self._method, self._views, Path(), base=base, relative_to=None, seed=seed, device="cpu"
        )

    def _prepare(self, recipe: Recipe) -> None:
        """What must be so before the weights change."""
        recipe_statistics.refuse_other_scales(recipe, self._method, self._views)

    def _with_parameters(self, step: Step, recipe: Recipe) -> Step:
        wanted = DTYPES.get(recipe.out_dtype or recipe.dtype or "")
        step = step if wanted is None or step.dtype not in FLOATING else replace(step, dtype=wanted)
        if step.action == "copy" or not self._complete(step):
            return step
        shared, per_model = recipe.values(self._method, step.name, self._fractions[step.name])
        statistics = recipe.wants_statistics(self._method)
        return replace(step, parameters=methods.keywords({**shared, **per_model}), statistics=statistics)

    def _merged(self) -> list[Step]:
        return [step for step in self._plan.steps if step.action == "merge" and self._complete(step)]

    def _complete(self, step: Step) -> bool:
        """Whether the method makes it: every model has that tensor."""
        return len(step.models) == self.models and (not self._has_base or step.base is not None)


def _refuse_choices(dtype: str, storage: str, device: str) -> None:
    for name, value, choices in (
        ("dtype", dtype, ("float32", "bfloat16")),
        ("storage", storage, ("memory", "mapped")),
    ):
        if value not in choices:
            raise MergeError(f"'{value}' is no choice for '{name}'", mend=f"choose {' or '.join(choices)}")
    if storage == "mapped" and device != "cpu":
        raise MergeError("mapped models are merged on the CPU", where=f"device {device}", mend="set device='cpu'")


def _reference(ref: Ref) -> ModelRef:
    """With whole paths, so that it means the same model from any folder."""
    found = ref if isinstance(ref, ModelRef) else ModelRef.parse(ref)

    def whole(path: str) -> str:
        local = os.path.expanduser(path)
        return os.path.abspath(local) if os.path.exists(local) else path

    return replace(found, path=whole(found.path), adapter=whole(found.adapter) if found.adapter else None)


def weights_of(module: torch.nn.Module, base: ModelRef, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """By the base's stored name a module's own memory of it, in the stored shape.

    Raises:
        CuveeError: a parameter is none of the base's tensors, or in a dtype that is not stored.
    """
    own = _own(module)
    places = _places(own, dict(module.named_parameters()), base, checkpoint)
    return {name: piece.of(own[parameter]) for name, (parameter, piece) in places.items()}


def _own(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By name the module's own memory of what a checkpoint holds: parameters, tied ones once, and buffers.

    Raises:
        MergeError: one is in a dtype that is not stored.
    """
    kept = module.state_dict(keep_vars=True).keys()
    buffers = {n: b for n, b in module.named_buffers() if n in kept and b.dtype.is_floating_point}
    own = {name: tensor.detach() for name, tensor in {**dict(module.named_parameters()), **buffers}.items()}
    odd = next((name for name, tensor in own.items() if str(tensor.dtype) not in STORED), None)
    if odd is not None:
        raise MergeError(f"'{odd}' is {own[odd].dtype}", mend="load the module in float32, bfloat16 or float16")
    return own


def _places(
    own: Mapping[str, torch.Tensor], parameters: Collection[str], base: ModelRef, checkpoint: Checkpoint
) -> dict[str, tuple[str, Piece]]:
    """By the base's stored name, whose values it has in the module, and which part of it.

    Raises:
        CuveeError: a parameter is none of the base's tensors.
    """
    from merging.statistics.matching import Piece, match, unread

    with adapter_merged(base, checkpoint.path) as folder, Checkpoint.open(folder) as stored:
        matches = match({name: tensor.cpu() for name, tensor in own.items()}, stored)
    found = {stored_name: (name, Piece(stored_name)) for name, stored_name in matches.names.items()}
    found |= {piece.name: (name, piece) for name, pieces in matches.pieces.items() for piece in pieces}
    known = matches.names.keys() | matches.pieces.keys()
    missing = [n for n in parameters if n not in known and not unread(n)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CuveeError(
            f"the module's '{missing[0]}'{more} is none of its tensors",
            where=str(base),
            mend="load the module from the base, and change nothing before",
        )
    return found
