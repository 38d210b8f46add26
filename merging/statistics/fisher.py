"""The diagonal of the Fisher information of a model in memory, from micro-batches of examples.

For each parameter the mean over the examples of E_{choice ~ model} (d log p(choice) / d theta)^2. Where `per_example`
knows every use of a parameter one backward serves the whole micro-batch; the first of them is checked against a plain
backward, and what does not agree is done one example at a time.
Source: arXiv 2111.09832, eq. 3; arXiv 2504.18992, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from merging.statistics.heads import Batch, Choices
from merging.statistics.per_example import PerExample
from merging.statistics.squares import BUDGET
from merging.statistics.sums import Sum

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merging.statistics.heads import Forward


class Fisher:
    """The sum over examples so far; to be used as `with Fisher(module) as fisher:`, within which it has the module.

    The module is put into evaluation mode and its parameters need no gradient until the end of the block.

    Args:
        module: the model.
        forward: runs the module on a batch's features and gives vectors or logits.
        compensated: sums as float32 with compensation, for very large models; float64 by default.
        budget: bytes of the largest temporary beside what the model itself needs.
        alone: names of parameters to do one example at a time, as an earlier `Fisher.alone` of the same model had them.
            Nothing is checked then. None: checked on the first micro-batches.
        note: takes a line for the log.

    Attributes:
        examples: added so far.
        alone: as above.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Forward,
        *,
        compensated: bool = False,
        budget: int = BUDGET,
        alone: frozenset[str] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.examples = 0
        self._module, self._forward, self._note = module, forward, note
        self._per_example = PerExample(module, budget=budget)
        self._checked_units = 0 if alone is None else 1 << 62
        self.alone: frozenset[str] = alone if alone is not None else frozenset()
        self._sums = {
            name: Sum(tuple(own.shape), device=str(own.device), compensated=compensated)
            for name, own in self._per_example.parameters.items()
        }

    def __enter__(self) -> Fisher:
        self._training = self._module.training
        self._module.eval()
        self._per_example.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._per_example.__exit__(*error)
        self._module.train(self._training)

    def add(self, batch: Batch) -> None:
        """Adds the examples of a micro-batch."""
        import torch

        own = self._per_example
        with own.recording(batch.units, self.alone) as rows:
            choices = batch.choices(self._forward, rows)
        with torch.no_grad():
            roots = choices.weights.sqrt()
        if self._checked_units < min(2, batch.units):
            self._check(batch, choices)
        if choices.apart:
            own.add_squares(choices.values, roots, self._sums, roots if choices.scores else None, again=False)
        else:
            for choice in range(roots.shape[1]):
                cotangent = torch.zeros_like(roots)
                cotangent[:, choice] = roots[:, choice]
                own.add_squares(choices.values, cotangent, self._sums, again=choice + 1 < roots.shape[1])
        del choices  # its graph, before another is built
        if names := self.alone | own.failed:
            self._add_alone(batch, sorted(names))
        self.examples += batch.examples

    def mean(self) -> dict[str, Tensor]:
        """By parameter, float32 and of its shape: the diagonal of the Fisher information."""
        if not self.examples:
            raise ValueError("no example has been added")
        return {name: (own.value() / self.examples).float() for name, own in self._sums.items()}

    def state(self) -> dict[str, Tensor]:
        """All that `load` needs to go on from here; not copied."""
        import torch

        sums = {f"{name}:{key}": value for name, own in self._sums.items() for key, value in own.state().items()}
        return {"examples": torch.tensor(self.examples), **sums}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `state` gave.

        Raises:
            ValueError: it is of another model.
        """
        if state.keys() != self.state().keys():
            raise ValueError("a state of another model")
        for name, own in self._sums.items():
            own.load({key: state[f"{name}:{key}"] for key in own.state()})
        self.examples = int(state["examples"])

    def _check(self, batch: Batch, choices: Choices) -> None:
        """Compares with a plain backward of the same batch, in which every unit has a weight of its own."""
        import torch

        generator = torch.Generator().manual_seed(0)
        values = choices.values
        scale = torch.randn(values.shape, generator=generator).to(values)
        if choices.weights.min() == 0:  # rows that fill up
            scale = scale * (choices.weights > 0)
        weights = 0.5 + torch.rand(batch.units, generator=generator).to(values)
        spread = weights.view(values.shape) if choices.apart else weights[:, None]
        plain = self._plain(batch, scale * spread)
        own = self._per_example
        wrong = own.disagreeing(values, scale, weights, plain, again=True)
        used = {name for name in own.unknown if plain[name] is not None}
        found = frozenset(wrong | used | own.failed) - self.alone
        if found and self._note is not None:
            some = ", ".join(sorted(found)[:3]) + (", …" if len(found) > 3 else "")
            self._note(f"the gradients of {len(found)} parameters take one pass an example: {some}")
        self.alone |= found
        own.forget(self.alone)
        self._checked_units = batch.units

    def _plain(self, batch: Batch, cotangent: Tensor) -> dict[str, Tensor | None]:
        import torch

        with self._needing(self._per_example.parameters) as parameters, torch.enable_grad():
            values = batch.choices(self._forward).values
            gradients = torch.autograd.grad(values, list(parameters.values()), cotangent, allow_unused=True)
        return dict(zip(parameters, gradients, strict=True))

    def _add_alone(self, batch: Batch, names: Iterable[str]) -> None:
        """One example, then one choice at a time, by a plain backward to these parameters."""
        import torch

        with self._needing(names) as parameters, torch.enable_grad():
            for example in range(batch.examples):
                choices = batch.one(example).choices(self._forward)
                log_p, weights = choices.log_p()[0], choices.weights[0].tolist()
                if not log_p.requires_grad:  # the parameters have no part in it
                    return
                for choice, weight in enumerate(weights):
                    if not weight:
                        continue
                    gradients = torch.autograd.grad(
                        log_p[choice], list(parameters.values()), retain_graph=True, allow_unused=True
                    )
                    for name, gradient in zip(parameters, gradients, strict=True):
                        if gradient is not None:
                            exact = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                            self._sums[name].add(exact.square().mul_(weight))

    @contextmanager
    def _needing(self, names: Iterable[str]) -> Iterator[dict[str, nn.Parameter]]:
        """These parameters need their gradient for a while."""
        parameters = {name: self._per_example.parameters[name] for name in names}
        for own in parameters.values():
            own.requires_grad_(True)
        try:
            yield parameters
        finally:
            for own in parameters.values():
                own.requires_grad_(False)
