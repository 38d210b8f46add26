"""What processes of a team compute together, for tests: called by name, in processes of their own."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from embeddings.training import step
from embeddings.training.backbone import Backbone
from embeddings.training.batch import build_batch, objectives
from embeddings.training.config import TrainingConfig
from embeddings.training.schedule import Part
from embeddings.training.team import Team, join
from tests.embeddings.runs import opened, sets_of

#: By name: rows of each data set, tokens of a gradient cache, whether tasks are reconciled, dtype, whether it packs.
CASES = {
    "plain": ((6, 7, 8, 9), 0, False, "float32", True),
    "padded": ((6, 7, 8, 9), 0, False, "float32", False),
    "cached": ((6, 7, 8, 9), 48, False, "float32", True),
    "surgery": ((6, 7, 8, 9), 0, True, "float32", True),
    "lone": ((0, 0, 0, 1), 0, False, "float32", True),
    "bfloat16": ((6, 7, 8, 9), 0, False, "bfloat16", True),
}


def compute(config: TrainingConfig, cache: Path, team: Team) -> dict[str, torch.Tensor]:
    """By case, the losses and the gradient of all parameters, with dropout: (parts + 1 + parameters,)."""
    sets = sets_of(config, cache)
    goals = objectives(config, sets)
    backbone = opened(config)
    backbone.transformer.train()
    packing, found = backbone._packing, {}
    for name, (sizes, tokens, surgical, dtype, packs) in CASES.items():
        backbone.dtype, backbone._packing = dtype, packing if packs else None
        batch = build_batch([Part(i, np.arange(size)) for i, size in enumerate(sizes) if size], sets, goals)
        settings = {"seed": 5, "cache_tokens": tokens, "team": team}
        if surgical:
            loss, parts = step.surgical_loss_and_gradient(backbone, batch, goals, tasks=(0, 1, 2, 0), **settings)
        else:
            loss, parts = step.loss_and_gradient(backbone, batch, goals, **settings)
        found[name] = torch.cat([torch.tensor([float(loss), *parts]), gradient(backbone)])
    return found


def gradient(backbone: Backbone) -> torch.Tensor:
    """Of all parameters, one after another; and none is left."""
    found = []
    for parameter in backbone.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad.flatten())
        parameter.grad = None
    return torch.cat(found)


def work(rank: int, size: int, config: TrainingConfig, folder: Path) -> None:
    """One process: its results go to a file."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    team = join(rank, size, "cpu", f"file://{folder}/meeting")
    if rank == 0:
        lone = torch.nn.Parameter(torch.zeros(3))  # only one process reaches it, and another nobody
        lone.grad = torch.ones(3)
    else:
        lone = torch.nn.Parameter(torch.zeros(3))
    parameters = [lone, torch.nn.Parameter(torch.zeros(2))]
    team.add_up_gradients(parameters)
    assert lone.grad is not None and lone.grad.tolist() == [1, 1, 1] and parameters[1].grad is None
    assert team.told(rank + 7) == 7
    save_file(compute(config, folder / "cache", team), folder / f"{rank}.safetensors")
    team.leave()


def leave_without_a_word(rank: int, size: int, folder: Path) -> None:
    """The second process ends; the first finds out."""
    from embeddings.training.team import LostError

    team = join(rank, size, "cpu", f"file://{folder}/lost")
    values = torch.ones(4)
    team.add_up(values)
    if rank:
        os._exit(0)
    try:
        team.add_up(values)
    except LostError as error:
        (folder / "said").write_text(str(error), "utf-8")
