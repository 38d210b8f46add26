"""Checkpoints of a training run: weights, optimiser and step, in safetensors and JSON; whole or not there at all."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embeddings.training.team import Team
from merging.checkpoint import read_json
from merging.errors import CuveeError
from merging.output import put_back, staged

if TYPE_CHECKING:
    import torch

_STATE = "state.json"
_WEIGHTS, _OPTIMIZER = "weights.safetensors", "optimizer.safetensors"


class Learner(ABC):
    """What can be trained and gone on with: a backbone, say."""

    @abstractmethod
    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Those that are trained, by the name that `state` gives them."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Those that are trained."""
        return (parameter for _, parameter in self.named_parameters())

    def state(self) -> dict[str, torch.Tensor]:
        """The trained tensors by name, not copied: for a checkpoint to resume from."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state(self, state: Mapping[str, torch.Tensor], where: str = "checkpoint") -> None:
        """Takes over what `state` gave.

        Raises:
            CuveeError: tensors are missing, too many or of another shape.
        """
        import torch

        own, mend = self.state(), "remove the checkpoint, to begin anew"
        for name in sorted(own.keys() ^ state.keys()):
            what = "lacks the tensor" if name in own else "has a tensor that is not trained here,"
            raise CuveeError(f"{what} '{name}'", where=where, mend=mend)
        with torch.no_grad():
            for name, value in own.items():
                if value.shape != state[name].shape:
                    what = f"'{name}' has the shape {tuple(state[name].shape)}, not {tuple(value.shape)}"
                    raise CuveeError(what, where=where, mend=mend)
                value.copy_(state[name])


def save(folder: Path, learner: Learner, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Replaces the folder's checkpoint.

    Args:
        state: step, what the run is made by, and whatever else is wanted back; plain.
    """
    from safetensors.torch import save_file

    with staged(folder, force=True, marker=_STATE) as staging:
        save_file({name: tensor.contiguous() for name, tensor in learner.state().items()}, staging / _WEIGHTS)
        save_file(_moments(learner, optimizer), staging / _OPTIMIZER)
        (staging / _STATE).write_text(json.dumps(state), encoding="utf-8")


def load(folder: Path, learner: Learner, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """What `save` wrote, weights and optimiser put back in place; None where there is no checkpoint.

    Raises:
        CuveeError: it is of another model, or damaged.
    """
    from safetensors.torch import load_file

    put_back(folder)
    if not (folder / _STATE).is_file():
        return None
    try:
        weights, moments = load_file(folder / _WEIGHTS), load_file(folder / _OPTIMIZER)
    except Exception as error:  # safetensors' own kinds
        raise CuveeError(f"cannot be read: {error}", where=str(folder), mend="remove it, to begin anew") from None
    learner.load_state(weights, where=str(folder))
    for name, parameter in learner.named_parameters():
        own = {key.rpartition("/")[2]: tensor for key, tensor in moments.items() if key.rpartition("/")[0] == name}
        if own:
            optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in own.items()}
    return read_json(folder / _STATE)


def load_together(
    folder: Path, learner: Learner, optimizer: torch.optim.Optimizer, team: Team
) -> dict[str, Any] | None:
    """As `load`, in every process of a team; the first one looks first.

    Raises:
        CuveeError: also where the others find another one.
    """
    state = team.told(load(folder, learner, optimizer) if not team.rank else None)
    if team.rank and state is not None and load(folder, learner, optimizer) != state:
        mend = "put the run's folder on a disk that all of them share"
        raise CuveeError("is another one for the first process", where=str(folder), mend=mend)
    return state


def _moments(learner: Learner, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": tensor.contiguous()
        for name, parameter in learner.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }
