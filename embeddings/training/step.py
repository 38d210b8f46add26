"""One step of training: a batch's loss and its gradient, at the price of its tokens and not of its padding.

The texts of a batch are sorted by length and cut into chunks of a token budget; each chunk goes through the model by
itself, and the loss sees all embeddings together. It is the loss of the whole batch to the last digit of float32: no
layer of a transformer mixes texts. Half of the work of a batch as it comes is padding, and its activations do not stay in
the processor's cache.

With a gradient cache (arXiv 2101.06983) each chunk goes through the model twice, first without a gradient, then with
the loss's gradient at its embeddings: the memory is that of one chunk, whatever the batch.

Several processes share the chunks. Each has all embeddings and the whole loss; the sum of what they learn is what one
process would. Dropout is drawn for a chunk, and chunks are cut so that there is one for each process at least: it drops
other things with another number of processes, as likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embeddings.evaluation.encoder import batches
from embeddings.training.batch import Batch, Objective
from embeddings.training.surgery import modular_gradient_surgery
from embeddings.training.team import ALONE, Team

if TYPE_CHECKING:
    import torch

    from embeddings.training.backbone import Backbone

#: Tokens of a chunk on a CPU and elsewhere; padding included, where there is any.
CPU_CHUNK, ACCELERATOR_CHUNK = 4096, 16384


def loss_and_gradient(
    backbone: Backbone,
    batch: Batch,
    objectives: Sequence[Objective],
    *,
    seed: int,
    cache_tokens: int = 0,
    team: Team = ALONE,
) -> tuple[torch.Tensor, list[float]]:
    """Adds the gradient of the batch's loss to the parameters' `.grad`.

    Args:
        objectives: of all data sets.
        seed: of dropout; the same one drops the same, with a gradient cache or without.
        cache_tokens: of a chunk, with a gradient cache; 0 for none.
        team: of processes that call this with the same batch; all of them get the whole gradient.

    Returns:
        The loss, the mean over the batch's rows, and that of each part.
    """
    found = _add_own_gradient(backbone, batch, objectives, seed, cache_tokens, team)
    team.add_up_gradients(list(backbone.parameters()))
    return found


def surgical_loss_and_gradient(
    backbone: Backbone,
    batch: Batch,
    objectives: Sequence[Objective],
    *,
    seed: int,
    tasks: Sequence[int],
    cache_tokens: int = 0,
    team: Team = ALONE,
) -> tuple[torch.Tensor, list[float]]:
    """As `loss_and_gradient`, but the tasks' gradients are reconciled by modular gradient surgery before they are added.

    Source: arXiv 2602.02301. The gradients are summed, not averaged.

    Args:
        tasks: by data set, the number of its task; parts of one task have one gradient, the sum of theirs.
    """
    import torch

    parameters = list(backbone.parameters())
    found: dict[int, list[torch.Tensor | None]] = {}
    losses = []
    for number, part in enumerate(batch.parts):
        task = tasks[part.dataset]
        for parameter, gradient in zip(parameters, found.get(task, [None] * len(parameters)), strict=True):
            parameter.grad = gradient  # to which this part's is added
        alone = _alone(batch, number)
        loss, _ = _add_own_gradient(backbone, alone, objectives, seed + (number << 40), cache_tokens, team)
        found[task] = [parameter.grad for parameter in parameters]
        losses.append(float(loss))
    for task, own in found.items():
        for parameter, gradient in zip(parameters, own, strict=True):
            parameter.grad = gradient
        team.add_up_gradients(parameters)
        found[task] = [parameter.grad for parameter in parameters]
    reconciled = modular_gradient_surgery(list(found.values()), torch.Generator().manual_seed(seed))
    for parameter, gradient in zip(parameters, reconciled, strict=True):
        parameter.grad = gradient
    return torch.tensor(losses).mean(), losses


def _add_own_gradient(
    backbone: Backbone, batch: Batch, objectives: Sequence[Objective], seed: int, cache_tokens: int, team: Team
) -> tuple[torch.Tensor, list[float]]:
    """The loss of all texts; to `.grad` is added what it says of this process's."""
    import torch

    chunks = _chunks(backbone, batch, cache_tokens, team.size)
    own = team.share([sum(len(batch.tokens[place]) for place in places) for places in chunks])
    embeddings = torch.zeros(len(batch.tokens), backbone.dimension, device=backbone.device)
    kept = {}
    with torch.random.fork_rng(_cuda_devices(backbone)):
        for number in own:
            with torch.set_grad_enabled(not cache_tokens):
                vectors = _forward(backbone, batch, chunks[number], seed, number)
            embeddings[_index(chunks[number], embeddings)] = vectors.detach()
            if not cache_tokens:
                kept[number] = vectors
        team.add_up(embeddings)
        embeddings.requires_grad_()
        loss, parts = _loss(embeddings, batch, objectives)
        loss.backward()
        assert embeddings.grad is not None
        for number in own:
            vectors = _forward(backbone, batch, chunks[number], seed, number) if cache_tokens else kept.pop(number)
            vectors.backward(embeddings.grad[_index(chunks[number], embeddings)])
    return loss.detach(), parts


def _alone(batch: Batch, number: int) -> Batch:
    """One part of a batch, with its own texts."""
    part = batch.parts[number]
    places, inverse = np.unique(np.concatenate([part.queries, part.candidates]), return_inverse=True)
    queries, candidates = np.split(inverse.astype(np.int64), [len(part.queries)])
    return Batch([batch.tokens[i] for i in places], (replace(part, queries=queries, candidates=candidates),))


def _chunks(backbone: Backbone, batch: Batch, cache_tokens: int, processes: int) -> list[NDArray[np.int64]]:
    """Places of texts of like length, the longest first; for several processes about as many tokens for each."""
    budget = cache_tokens or (CPU_CHUNK if backbone.device.type == "cpu" else ACCELERATOR_CHUNK)
    lengths = np.array([len(tokens) for tokens in batch.tokens], np.int64)
    if processes > 1:
        total = int(lengths.sum())
        rounds = max(1, -(-total // (processes * budget)))
        budget = max(1, -(-total // (processes * rounds)))
    if not backbone.packs:
        return [places.astype(np.int64) for places in batches(lengths.tolist(), budget=budget)]
    order = np.argsort(-lengths, kind="stable")
    number = (np.cumsum(lengths[order]) - lengths[order]) // budget  # (texts,) the chunk of each
    return np.split(order, np.flatnonzero(np.diff(number)) + 1)


def _forward(backbone: Backbone, batch: Batch, places: NDArray[np.int64], seed: int, number: int) -> torch.Tensor:
    import torch

    # Dropout knows no generator but the global one: seeded anew, a chunk's second pass drops what its first did, and a
    # resumed run what the other would have.
    torch.manual_seed((seed << 12) + number)  # within 64 bits
    return backbone.vectors([batch.tokens[place] for place in places])


def _loss(embeddings: torch.Tensor, batch: Batch, objectives: Sequence[Objective]) -> tuple[torch.Tensor, list[float]]:
    """The mean over the rows of all parts, and each part's own."""
    import torch

    losses = []
    for part in batch.parts:
        queries, candidates = (embeddings[_index(places, embeddings)] for places in (part.queries, part.candidates))
        losses.append(objectives[part.dataset].loss(queries, candidates, part.targets(embeddings.device)))
    shares = [part.rows / batch.rows for part in batch.parts]
    total = torch.stack([share * loss for share, loss in zip(shares, losses, strict=True)]).sum()
    return total, [float(loss.detach()) for loss in losses]


def _index(places: NDArray[np.int64], of: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.from_numpy(places).to(of.device)


def _cuda_devices(backbone: Backbone) -> list[int]:
    device = backbone.device
    return [device.index or 0] if device.type == "cuda" else []
