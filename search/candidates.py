"""Candidates: the merged model of each trial, in memory where the objective works on a module, else in a folder of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging import engine
from search.config import SearchConfig
from search.objective import Candidate, Scores
from search.recipes import MODEL, look_of, recipe_of, retaken, tensor_names, with_statistics

if TYPE_CHECKING:
    import torch

    from merging.live import LiveMerge


class Candidates:
    """From coefficients to scores, again and again.

    Args:
        run: the search's folder. scratch: for merged models; made when one is.
        note: takes lines for the user; what a merge has to say is said once.

    Attributes:
        objective: prepared.
        module: that it opened; None where it wants folders.
        live: what rewrites the module's weights.

    Raises:
        CuveeError: what the objective needs, or models that cannot be merged in memory.
    """

    def __init__(
        self,
        config: SearchConfig,
        run: Path,
        scratch: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._config, self._note = with_statistics(config, run / MODEL, device, note), note
        self._scratch, self._device, self._threads = scratch, device, threads
        self._names = tensor_names(config)
        self.objective = config.make_objective()
        self.module = self.objective.prepare(look_of(config), device)
        self.live = None if self.module is None else self._held(self.module)

    def __call__(self, coefficients: Mapping[str, Any]) -> Scores:
        """Raises whatever merging or the objective does."""
        recipe = recipe_of(self._config, coefficients, self._names, where="trial.yml")
        if self.live is not None:
            self.live.apply(recipe)
            self._say(self.live.notes)
            return self.objective(Candidate(coefficients))
        folder, lines = self._scratch / "model", list[str]()
        options: dict[str, Any] = {"device": self._device, "threads": self._threads, "note": lines.append}
        try:
            engine.merge(recipe, folder, seed=self._config.seed, force=True, **options)
            self._say(lines)
            return self.objective(Candidate(coefficients, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def apply(self, coefficients: Mapping[str, Any]) -> None:
        """Gives the module the weights of these coefficients, and leaves the score to others."""
        assert self.live is not None
        self.live.apply(recipe_of(self._config, coefficients, self._names, where="trial.yml"))

    def _held(self, module: torch.nn.Module) -> LiveMerge:
        from merging.live import LiveMerge
        from merging.live_df import LiveDF

        config = self._config
        base, models = look_of(config), [source.model for source in config.models]
        options: dict[str, Any] = {"device": self._device, "seed": config.seed, "threads": self._threads}
        stats = [source.stats for source in config.models if source.stats is not None]
        if retaken(config) and all(each.path is None for each in stats):
            return LiveDF(module, base, models, stats=[each.options for each in stats], note=self._note, **options)
        folders = [each.path for each in stats if each.path is not None]
        return LiveMerge(module, base, models, method=config.method.name, stats=folders or None, **options)

    def _say(self, lines: list[str]) -> None:
        for line in lines:
            self._note(line)
        self._note = lambda line: None
