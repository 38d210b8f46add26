"""Optimal Brain Iterative Merging: every coordinate comes from one model, the one that claims it first, or from the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from merging.inputs import SMALL, Chunk, Final, Inputs, Trim, Values, coarse_bin, fine_cut
from merging.methods.registry import PerModel, Range, method

_ROUNDS = 8  # of an interleaved draft

#: Zeroes, in place, all scores of a stretch that are not picked: (scores, start of the stretch).
Pick = Callable[[Values, int], None]


@dataclass(frozen=True)
class Turn:
    """A model's turn: of its quota it takes the shares `before` … `upto`."""

    model: int
    before: float
    upto: float


def _obim_survey(x: Inputs, totals: Sequence[NDArray[np.int64]], *, scope: str, **parameters: Any) -> Any:
    """For `scope: global`: for each set of cuts that do not wait for each other a coarse histogram, then the fine ones."""
    draft = _Draft(x, **parameters)
    if scope != "global" or not (draft.known or draft.magnitude):
        return None
    together = [[turn] for turn in draft.turns] if draft.refill else [draft.turns]
    if len(totals) == 2 * len(together):
        return None
    picks = _global_picks(draft, totals)
    now = together[len(totals) // 2]
    fine = len(totals) % 2 == 1
    counts = np.zeros((len(now), 1 << (16 if fine else 15)), np.int64)
    highs = (
        [coarse_bin(row, draft.due(turn, int(row.sum())))[0] for row, turn in zip(totals[-1], now, strict=True)]
        if fine
        else []
    )
    for chunk in x.chunks(statistics=draft.known):
        scores = draft.scores(chunk)
        owners = draft.owners(scores, chunk, picks)
        for i, turn in enumerate(now):
            chunk.out[:] = scores[turn.model]
            if draft.refill:
                x.kernels.drop_owned(chunk.out, owners)
            if fine:
                x.kernels.fine_histogram(chunk.out, highs[i], counts[i])
            else:
                x.kernels.histogram(chunk.out, counts[i])
    return counts


@method(
    "obim",
    title="OBIM (reconstructed)",
    base="required",
    source="arXiv 2502.12217",
    survey=_obim_survey,
    statistics=("moments", "fisher"),
    statistics_if=("saliency", "stats"),
    ownership=True,
)
def obim(
    x: Inputs,
    *,
    density: Annotated[
        PerModel[Annotated[float, Range(0, 1)]], "share of the entries that the model may claim; by default 1/M"
    ] = None,  # type: ignore[assignment]
    lambda_: Annotated[float, "factor of what is added to the base"] = 1.0,
    saliency: Annotated[Literal["stats", "magnitude"], "½hτ² by statistics h, or |τ|"] = "stats",
    scope: Annotated[Literal["tensor", "row", "global"], "what entries compete for a model's quota"] = "tensor",
    quota: Annotated[
        Literal["refill", "drop_collisions"], "what a model finds taken: it takes its next best, or goes without"
    ] = "refill",
    order: Annotated[
        Literal["listed", "interleaved"], "who claims when: one after another, or an eighth each in turn"
    ] = "listed",
) -> Final:
    """One model after another claims the `density` share of the entries, among those still free, whose loss hurts it most.

    Optimal Brain Iterative Merging as we reconstruct it: no code is public. The saliency of an entry is sᵢ = ½hτᵢ², the loss
    change of undoing it, h the second moment of the layer's input (`cuvee stats --kind moments`) or the Fisher diagonal; of
    weights without statistics (embeddings, norms, biases) |τᵢ|. Each entry of the result is θ₀ + λτᵢ of the one model that
    claimed it, or θ₀: nothing is averaged. Entries that a model did not move are never claimed.

    From the abstract: saliency, masks that exclude each other, one model after another. Ours: its form above, the defaults, and
    the alternatives. A quota is max(1, ⌊density·n⌋) entries of the tensor, of each row of its first dimension, or of all tensors
    with statistics together (then whatever reaches the threshold; tensors without rank by themselves). `quota:
    drop_collisions` takes each model's own best and leaves to the first what several want. Equals go by position. The folder
    `ownership` beside the result says whose each coordinate is; `cuvee inspect` shows it.
    """
    draft = _Draft(x, density=density, saliency=saliency, quota=quota, order=order)
    statistics = draft.known
    held: Values | None = None
    picks: list[Pick | None] = []
    if scope == "row":
        columns = x.filter_size
        picks = [_row_pick(x, columns, draft.due(turn, columns)) for turn in draft.turns]
    elif scope == "global" and (draft.known or draft.magnitude):
        picks = _global_picks(draft, x.surveys)
    elif draft.refill:
        held, statistics = draft.hold(), False
    else:
        picks = draft.own_picks()

    def run(chunk: Chunk) -> Values:
        if held is None:
            scores = draft.scores(chunk)
            chunk.owners = draft.owners(scores, chunk, picks)
        else:
            chunk.deltas()
            chunk.owners = held[chunk.start : chunk.stop]
        x.kernels.take(chunk.base, chunk.models, lambda_, chunk.owners, chunk.out)
        return chunk.out

    return Final(run, x.filter_size if scope == "row" else 1, statistics)


class _Draft:
    """Who claims what of one tensor.

    Attributes:
        turns: in which order who takes how much.
        refill: whether a model that finds an entry taken goes on to its next best.
        known: whether scores are made of statistics; else they are task vectors.
        magnitude: whether they are so everywhere, because the recipe says it.
    """

    def __init__(
        self, x: Inputs, *, density: Sequence[float | None] | None, saliency: str, quota: str, order: str, **_: Any
    ) -> None:
        count = len(x.models)
        self.x = x
        self.densities = [1 / count if share is None else share for share in density or [None] * count]
        rounds = _ROUNDS if order == "interleaved" else 1
        self.turns = [Turn(i, r / rounds, (r + 1) / rounds) for r in range(rounds) for i in range(count)]
        self.refill = quota == "refill"
        self.magnitude = saliency == "magnitude"
        self.known = not self.magnitude and any(x.known)

    def due(self, turn: Turn, numel: int) -> int:
        """How many of `numel` entries a turn picks: the next ones of the model's quota, or without refill all up to there."""
        share = self.densities[turn.model]
        quota = max(1, int(share * numel)) if share > 0 and numel else 0
        return int(quota * turn.upto) - (int(quota * turn.before) if self.refill else 0)

    def scores(self, chunk: Chunk) -> Values:
        """What entries are ranked by, 0 where a model did not move: (k, n). Makes the chunk's models its task vectors."""
        deltas = chunk.deltas()
        return self.x.saliency(chunk) if self.known else deltas

    def owners(self, scores: Values, chunk: Chunk, picks: Sequence[Pick | None]) -> Values:
        """Plays the turns whose picks are known, on a chunk; its `out` is overwritten."""
        owners = self.x.kernels.no_owners(chunk.stop - chunk.start)
        for turn, pick in zip(self.turns, picks, strict=False):
            if pick is not None:
                chunk.out[:] = scores[turn.model]
                self.play(turn, pick, chunk.out, chunk.start, owners)
        return owners

    def play(self, turn: Turn, pick: Pick, scores: Values, start: int, owners: Values) -> None:
        """One turn on a stretch: scores (n,), which are overwritten, and owners (n,)."""
        if self.refill:
            self.x.kernels.drop_owned(scores, owners)
        pick(scores, start)
        if not self.refill:
            self.x.kernels.drop_owned(scores, owners)
        self.x.kernels.claim(scores, owners, turn.model + 1)

    def own_picks(self) -> list[Pick | None]:
        """The turns' picks where each model ranks the whole tensor for itself."""
        x = self.x
        largest = [[self.due(t, x.numel) for t in self.turns if t.model == i] for i in range(len(x.models))]
        cuts = x.cuts(self.scores, largest, statistics=self.known)
        return [Trim(x.kernels, cuts[turn.model].pop(0)) for turn in self.turns]

    def hold(self) -> Values:
        """The owners of the whole tensor (numel,): each turn's cut depends on what the turns before it have taken."""
        x = self.x
        owners = x.kernels.no_owners(x.numel)
        if x.numel <= SMALL:
            whole = x.kernels.empty((len(x.models), x.numel))
            for chunk in x.chunks(statistics=self.known):
                whole[:, chunk.start : chunk.stop] = self.scores(chunk)
            for turn in self.turns:
                scores = whole[turn.model] + 0.0 if len(self.turns) > len(x.models) else whole[turn.model]
                x.kernels.drop_owned(scores, owners)
                x.kernels.keep_largest_in_rows(scores, x.numel, self.due(turn, x.numel))
                x.kernels.claim(scores, owners, turn.model + 1)
            return owners
        for turn in self.turns:
            if due := self.due(turn, x.numel):
                self._claim_streamed(turn, due, owners)
        return owners

    def _claim_streamed(self, turn: Turn, due: int, owners: Values) -> None:
        x, models = self.x, [turn.model]

        def free(chunk: Chunk) -> Values:
            scores = self.scores(chunk)
            x.kernels.drop_owned(scores[0], owners[chunk.start : chunk.stop])
            return scores

        ((cut,),) = x.cuts(free, [[due]], models=models, statistics=self.known)
        trim = Trim(x.kernels, cut)
        for chunk in x.chunks(models=models, statistics=self.known):
            scores = free(chunk)[0]
            trim(scores, chunk.start)
            x.kernels.claim(scores, owners[chunk.start : chunk.stop], turn.model + 1)


def _row_pick(x: Inputs, columns: int, k: int) -> Pick:
    return lambda scores, start: x.kernels.keep_largest_in_rows(scores, columns, k)


def _threshold_pick(x: Inputs, threshold: int) -> Pick:
    return lambda scores, start: x.kernels.keep_above(scores, threshold)


def _global_picks(draft: _Draft, totals: Sequence[NDArray[np.int64]]) -> list[Pick | None]:
    """The picks of the turns whose histograms, coarse and fine, are in `totals`, in the order of the turns."""
    picks: list[Pick | None] = []
    for coarse, fine in zip(totals[::2], totals[1::2], strict=False):
        for row, bins in zip(coarse, fine, strict=True):
            due = draft.due(draft.turns[len(picks)], int(row.sum()))
            high, rest = coarse_bin(row, due)
            picks.append(_threshold_pick(draft.x, fine_cut(bins, high << 16, rest).threshold) if due > 0 else None)
    return picks
