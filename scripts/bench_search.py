"""What each engine costs by itself, and how well it does: seconds a trial of everything but the objective, and regret.

    python scripts/bench_search.py [--engines gp,tpe] [--dimensions 4,10] [--trials 60] [--seeds 3] [--json FILE]

The landscape is one of merges: a smooth optimum at uneven coefficients, coefficients that trade off, scores with noise. Regret
is the noiseless score that is missing at the point that `recommend: observed` chooses, in points of 100; the first line is the
best uniform coefficient, which is what a search has to beat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from merging.methods import registry
from search import choose
from search.design import DEFAULT, design
from search.objective import Scores
from search.space import Space, make_space
from search.study import Settings, open_study, work

NOISE = 0.6
_DEPTH = 12.0


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--engines", default="gp,tpe,cma,skopt,qmc,random")
    options.add_argument("--dimensions", default="4,10")
    options.add_argument("--trials", type=int, default=60)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--json", type=Path)
    said = options.parse_args()
    rows = []
    warm_up(said.engines.split(","))
    for dimensions in map(int, said.dimensions.split(",")):
        space = make_space(registry.get("task_arithmetic"), dimensions, {})
        level = statistics.median(uniform_regret(dimensions, seed) for seed in range(said.seeds))
        print(f"{dimensions} coefficients: best uniform coefficient {level:.2f}")
        print(f"{'engine':10} {'s / trial':>10} {'CPU':>6} {'slowest':>8} {'regret':>7} {'posterior':>9}")
        for engine in said.engines.split(","):
            row = measure(space, engine, said.trials, said.seeds)
            rows.append({"dimensions": dimensions, "engine": engine, "trials": said.trials, **row})
            cells = f"{row['seconds']:10.3f} {row['processor']:6.3f} {row['slowest']:8.3f}"
            cells += f" {row['observed']:7.2f} {row['posterior']:9.2f}"
            print(f"{engine:10} {cells}", flush=True)
    if said.json:
        said.json.write_text(json.dumps(rows, indent=2) + "\n")


def warm_up(engines: list[str]) -> None:
    """Lets each engine import what it imports late."""
    for engine in engines:
        measure(make_space(registry.get("task_arithmetic"), 2, {}), engine, 10, 1)


def measure(space: Space, engine: str, trials: int, seeds: int) -> dict[str, float]:
    """Medians over seeds."""
    columns: dict[str, list[float]] = {
        name: [] for name in ("seconds", "processor", "slowest", choose.OBSERVED, choose.POSTERIOR)
    }
    for seed in range(seeds):
        truth, noise = landscape(len(space.dimensions), seed), np.random.default_rng([seed, 1])
        starts = [time.perf_counter()]
        worked = time.process_time()

        def evaluate(
            coefficients: Mapping[str, Any],
            truth: Callable[[Any], float] = truth,
            noise: np.random.Generator = noise,
            starts: list[float] = starts,
        ) -> Scores:
            starts.append(time.perf_counter())
            return Scores(truth(coefficients["weight"]) + NOISE * float(noise.standard_normal()))

        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(space, engine, seed, design(space, DEFAULT, seed), trials)
            study = open_study(settings, Path(folder))
            work(study, evaluate)
            done = study.trials()
        starts.append(time.perf_counter())
        columns["processor"].append((time.process_time() - worked) / trials)
        spent = np.diff(starts).tolist()
        columns["seconds"].append(sum(spent) / trials)
        columns["slowest"].append(max(spent))
        for rule in (choose.OBSERVED, choose.POSTERIOR):
            best = choose.best(space, done, rule)
            assert best is not None
            columns[rule].append(100 - truth([best.point[d.name] for d in space.dimensions]))
    return {name: statistics.median(values) for name, values in columns.items()}


def landscape(dimensions: int, seed: int) -> Callable[[Any], float]:
    """A score of at most 100: a quadratic bowl in a few tilted directions, flat far away."""
    random = np.random.default_rng([seed, dimensions])
    best = random.uniform(0.1, 0.7, dimensions)
    directions = random.standard_normal((dimensions, dimensions)) / dimensions**0.5
    bowl = np.eye(dimensions) + directions @ directions.T

    def score(weights: Any) -> float:
        off = np.asarray(weights, float) - best
        return float(100 - 3 * _DEPTH * (1 - np.exp(-(off @ bowl @ off) / 2)))

    return score


def uniform_regret(dimensions: int, seed: int) -> float:
    truth = landscape(dimensions, seed)
    return min(100 - truth(np.full(dimensions, share)) for share in np.linspace(0, 1, 101))


if __name__ == "__main__":
    main()
