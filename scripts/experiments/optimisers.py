"""How near do the optimisers come to the best coefficients of a real merge, and what do they cost by themselves?

    python scripts/experiments/importance.py --suite SUITE --out RUN …                  # first: the specialists
    python scripts/experiments/optimisers.py --suite SUITE --out RUN … [--engines gp tpe] [--pairs 16] [--repeats 1]

Six specialists of importance.py are merged by task arithmetic with a weight each, in memory; a point's score is minus the
mean cross-entropy over the six tasks, each of some validation pairs whose queries choose among all their positives. The
specialists of each seed make a landscape; each engine searches it, with every one of its own seeds. All begin at the same
points, and what has been scored is not scored again.

Regret is what the best observed point lacks of the best that anybody found, engines and a simplex from there on alike, in
thousandths of a nat. The line to beat is the best weight that all models share, of 25.

Killed and run again, it goes on. Prints a table of mean ± standard deviation, and writes it to RUN/optimisers.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import importance
import numpy as np
import yaml
from boom_lab import commit, read
from boom_table import markdown

from embeddings.evaluation import suite
from merging.errors import CuveeError
from merging.loading import only_our_words, wait_passively
from merging.output import write_whole
from merging.progress import work_bars
from search import config as search_config
from search.candidates import Candidates
from search.design import DEFAULT, design
from search.objective import Scores
from search.recipes import space_of
from search.space import Space
from search.study import Settings, open_study, work

COUNTS = (20, 30, 50)
ENGINES = ("gp", "skopt", "tpe", "cma", "qmc", "random")
_SHARED = 25  # weights from 0 to 1
_POLISH = 60  # evaluations of the simplex


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    wait_passively()
    with work_bars() as progress, only_our_words():
        lab = importance.Lab(options, progress)
        landscapes = [Landscape(lab, seed) for seed in options.seeds]
        for number, landscape in enumerate(landscapes):
            for repeat in range(options.repeats):
                for name in options.engines:
                    progress(f"{name} on landscape {number}, {repeat + 1} of {options.repeats}", 0, max(COUNTS))
                    landscape.searched(name, repeat)
            landscape.shared()
            landscape.polished()
    text = report(landscapes, options)
    write_whole(options.out / "optimisers.md", text)
    print(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = importance.parser(__doc__)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--pairs", type=int, default=16, help="validation pairs of each task")
    parser.add_argument("--repeats", type=int, default=1, help="seeds of each engine, a landscape")
    return parser.parse_args(arguments)


class Landscape:
    """The scores of one seed's specialists by their weights; each point is scored once and kept."""

    def __init__(self, lab: importance.Lab, seed: int) -> None:
        self.lab, self.seed = lab, seed
        self.folder = lab.out / "optimisers" / f"{lab.options.pairs} pairs" / f"seed{seed}"
        self._file = self.folder / "scores.json"
        self.known: dict[str, float] = read(self._file) if self._file.is_file() else {}
        self._candidates: Candidates | None = None
        self._config = self._searched_config()

    @property
    def space(self) -> Space:
        return space_of(self._config)

    def score(self, weights: Sequence[float]) -> float:
        """Minus the mean cross-entropy, in nats."""
        key = json.dumps([float(w) for w in weights])
        if key not in self.known:
            if self._candidates is None:
                self._candidates = Candidates(self._config, self.folder, self.folder / "scratch")
            total = self._candidates({"weight": list(weights)}).total
            assert total is not None  # it has one objective
            self.known[key] = total
            write_whole(self._file, json.dumps(self.known, indent=1) + "\n")
        return self.known[key]

    def searched(self, engine: str, repeat: int) -> dict[str, Any]:
        """The scores of an engine's trials in order, and the seconds that it took for itself."""
        file = self.folder / f"{engine}-{repeat}.json"
        if file.is_file():
            known: dict[str, Any] = read(file)
            return known
        scores: list[float] = []
        spent = 0.0

        def evaluate(coefficients: Mapping[str, Any]) -> Scores:
            nonlocal spent
            began = time.perf_counter()
            scores.append(self.score(coefficients["weight"]))
            spent += time.perf_counter() - began
            return Scores(scores[-1])

        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(self.space, engine, repeat, design(self.space, DEFAULT, repeat), max(COUNTS))
            work(open_study(settings, Path(folder)), evaluate)
        found = {"scores": scores, "seconds": time.perf_counter() - began - spent}
        write_whole(file, json.dumps(found) + "\n")
        return found

    def shared(self) -> float:
        """The best score of weights that are all the same."""
        return max(self.score([share] * len(self.lab.tasks)) for share in np.linspace(0, 1, _SHARED).tolist())

    def polished(self) -> float:
        """The best score that is known, after a simplex has begun at the best of all others."""
        from scipy.optimize import minimize

        best = json.loads(max(self.known, key=self.known.__getitem__))
        bounds = [(0.0, 1.0)] * len(best)
        limit = {"maxfev": _POLISH, "xatol": 1e-3, "fatol": 1e-6}
        file = self.folder / "polished.json"
        if not file.is_file():
            minimize(lambda w: -self.score(w.tolist()), best, method="Nelder-Mead", bounds=bounds, options=limit)
            write_whole(file, json.dumps({"from": best}) + "\n")
        return max(self.known.values())

    def _searched_config(self) -> search_config.SearchConfig:
        lab = self.lab
        settings = {
            "base_model": str(lab.base),
            "models": [{"model": str(lab.model(task, self.seed))} for task in lab.tasks],
            "method": "task_arithmetic",
            "vary": {"weight": {"low": 0.0, "high": 1.0, "per": "model"}},
            "objective": {
                "loss": {
                    "data": {task: str(self._pairs(task)) for task in lab.tasks},
                    "candidates": lab.options.pairs,
                    "max_length": lab.options.max_length,
                }
            },
        }
        return search_config.parse(yaml.safe_dump(settings), str(self.folder / "search.yml"))

    def _pairs(self, task: str) -> Path:
        """Some validation rows as `query`, `positive`."""
        file = self.folder / f"{task}.jsonl"
        if not file.exists():
            found = next(each for each in suite.load(self.lab.out / "suite") if each.name == task)
            rows = [row for _, row in found.read_table("validation", "rows")]
            pairs = list(importance.pairs(rows, random.Random(0)))
            chosen = random.Random(self.seed).sample(pairs, self.lab.options.pairs)
            write_whole(file, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in chosen))
        return file


def report(landscapes: Sequence[Landscape], options: argparse.Namespace) -> str:
    """The table in Markdown."""
    lines = [["engine", *(f"regret after {count}" for count in COUNTS), "worst of all after 50", "seconds a trial"]]
    lines.append(["---", *("---:" for _ in lines[0][1:])])

    def milli(values: Sequence[float]) -> str:
        spread = f" ± {1000 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{1000 * statistics.fmean(values):.1f}{spread}"

    for engine in options.engines:
        runs = [(land, land.searched(engine, repeat)) for land in landscapes for repeat in range(options.repeats)]
        regrets = [[land.polished() - max(run["scores"][:count]) for land, run in runs] for count in COUNTS]
        cost = statistics.fmean(run["seconds"] / len(run["scores"]) for _, run in runs)
        lines.append([engine, *map(milli, regrets), f"{1000 * max(regrets[-1]):.1f}", f"{cost:.3f}"])
    shared = [land.polished() - land.shared() for land in landscapes]
    lines.append(
        [f"the best of {_SHARED} weights that all share", *([milli(shared)] * 3), f"{1000 * max(shared):.1f}", ""]
    )
    levels = ", ".join(f"{-land.polished():.4f}" for land in landscapes)
    base = ", ".join(f"{-land.score([0.0] * len(land.lab.tasks)):.4f}" for land in landscapes)
    about = (
        f"{len(landscapes)} landscapes of {len(landscapes[0].lab.tasks)} coefficients, {options.repeats} seeds of each"
        f" engine; cross-entropy in nats at the base {base}, at the best point {levels}; commit {commit()}."
    )
    return f"{about}\n\n{markdown(lines)}\n"


if __name__ == "__main__":
    try:
        main()
    except CuveeError as error:
        raise SystemExit(f"optimisers.py: {error}") from None
