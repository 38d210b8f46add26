"""What do searched coefficients gain, after how many evaluations, and on how little validation data?

    python scripts/experiments/importance.py --suite SUITE --out RUN …                 # first: the specialists, and the rivals
    python scripts/experiments/coefficients.py --suite SUITE --out RUN … [--trials 60] [--shares 1 0.25 0.05]

The six specialists of importance.py are merged by weights that `cuvee search` finds on the validation splits of their tasks:
DF-Merge (Fisher anew for every vector of weights), the same with the Fisher of the specialists themselves, and task
arithmetic, all by the same engine; the best of the first 5, 10, 30, … trials is scored on the test splits. Beside them one
model that is trained on all six tasks at once, as many steps as the specialists together, learning rate by validation. With
`--shares` the searches are done again on so small a part of the validation rows.

Killed and run again, it goes on. Prints a table of mean ± standard deviation over seeds in points of 100, with the rows of
importance.py's own records above, and writes it to RUN/coefficients.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import importance
import yaml
from boom_lab import commit, read
from boom_table import markdown, points

from embeddings.training import bag
from embeddings.training import config as training_config
from embeddings.training.options import Options
from embeddings.training.run_folder import MODEL
from merging import engine
from merging.errors import CuveeError
from merging.loading import only_our_words, wait_passively
from merging.output import write_whole
from merging.progress import work_bars
from search import config as search_config
from search.recipes import recipe_of, space_of
from search.run import search_run

COUNTS = (5, 10, 30, 60)
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "df_merge": ("DF-Merge", {"method": "df_merge"}),
    "df_merge-frozen": ("DF-Merge, frozen Fisher", {"method": "df_merge", "vary": {"fisher": "frozen"}}),
    "task_arithmetic": ("task arithmetic, a weight a model", {"method": "task_arithmetic"}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    wait_passively()
    with work_bars() as progress, only_our_words():
        lab = Coefficients(options, progress)
        for seed in options.seeds:
            lab.lab.prepare(seed)
            for share in options.shares:
                for arm in options.arms:
                    lab.record(arm, share, seed)
            if options.multi_task:
                lab.multi_task(seed)
    text = report(lab, options)
    write_whole(options.out / "coefficients.md", text)
    print(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = importance.parser(__doc__)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--trials", type=int, default=max(COUNTS))
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0], help="of the validation rows")
    parser.add_argument("--fisher-examples", type=int, default=30, help="calibration rows a specialist")
    parser.add_argument("--fisher-candidates", type=int, default=8, help="among which a query chooses")
    parser.add_argument("--engine", default="gp")
    parser.add_argument("--no-multi-task", dest="multi_task", action="store_false")
    options = parser.parse_args(arguments)
    if min(options.shares) < 1 and not options.test_rows:
        parser.error("--shares are of --test-rows, which must be a number then")
    return options


class Coefficients:
    """Searches and scores, each once."""

    def __init__(self, options: argparse.Namespace, progress: Any) -> None:
        self.options, self.progress = options, progress
        self.lab = importance.Lab(options, progress)
        self.out: Path = options.out.absolute() / "coefficients"

    def record(self, arm: str, share: float, seed: int) -> dict[str, Any]:
        """Test scores by task of the best after each count of trials."""
        name = f"{arm}-{share:g}-{self.options.engine}-seed{seed}"
        file = self.out / "records" / f"{name}.json"
        if file.is_file():
            known: dict[str, Any] = read(file)
            return known
        config = self._config(arm, share, seed)
        result = search_run(config, self.out / name, device=self.options.device, progress=self.progress)
        rows = [json.loads(line) for line in (self.out / name / "trials.jsonl").read_text().splitlines()]
        found: dict[str, Any] = {"seconds": result["seconds"], "test": {}, "best": {}}
        scored: dict[str, dict[str, float]] = {}
        for count in (*(c for c in COUNTS if c < self.options.trials), self.options.trials):
            best = max((row for row in rows[:count] if row["values"]), key=lambda row: row["values"][0])
            last = count == self.options.trials
            key = f"{best['number']} {last}"
            if key not in scored:
                scored[key] = self._test(
                    config, best["point"], seed, [*self.lab.tasks, *(self.lab.others if last else ())]
                )
            found["test"][str(count)] = scored[key]
            found["best"][str(count)] = {"validation": best["values"][0], "point": best["point"]}
        shutil.rmtree(self.out / name / "model")
        write_whole(file, json.dumps(found, indent=1) + "\n")
        return found

    def multi_task(self, seed: int) -> dict[str, Any]:
        """Test scores of one model that is trained on all tasks."""
        file = self.out / "records" / f"multi-task-seed{seed}.json"
        if file.is_file():
            known: dict[str, Any] = read(file)
            return known
        model = self._trained_together(seed, self._rate())
        found = {"test": self.lab.score(model, [*self.lab.tasks, *self.lab.others])}
        write_whole(file, json.dumps(found, indent=1) + "\n")
        return found

    def _config(self, arm: str, share: float, seed: int) -> search_config.SearchConfig:
        options, lab = self.options, self.lab
        models: list[dict[str, Any]] = [{"model": str(lab.model(task, seed))} for task in lab.tasks]
        if arm.startswith("df_merge"):
            asked = {"examples": options.fisher_examples, "candidates": options.fisher_candidates, "seed": seed}
            asked["max_length"] = options.max_length
            for task, model in zip(lab.tasks, models, strict=True):
                model["stats"] = {"data": str(lab.calibration(task)), **asked}
        objective: dict[str, Any] = {"suite": str(lab.out / "suite"), "tasks": list(lab.tasks), "split": "validation"}
        if share < 1:
            objective["limit"] = max(2, round(share * options.test_rows))
        settings = {
            **{"base_model": str(lab.base), "models": models, "objective": objective, **ARMS[arm][1]},
            **{"engine": options.engine, "trials": options.trials, "seed": seed},
        }
        return search_config.parse(yaml.safe_dump(settings), str(self.out / "search.yml"))

    def _test(
        self, config: search_config.SearchConfig, point: Mapping[str, Any], seed: int, tasks: Sequence[str]
    ) -> dict[str, float]:
        out = self.out / "merged"
        shutil.rmtree(out, ignore_errors=True)
        recipe = recipe_of(config, space_of(config).coefficients(point), where="best.yml")
        engine.merge(recipe, out, seed=seed, device=self.options.device, force=True)
        return self.lab.score(out, tasks)

    def _rate(self) -> float:
        """The learning rate that is best for the first seed by the mean validation score."""
        rates: list[float] = self.options.learning_rates
        file = self.out / "multi-task-rates.json"
        known: dict[str, float] = read(file) if file.is_file() else {}
        for rate in rates:
            if f"{rate:g}" not in known:
                model = self._trained_together(self.options.tune_seed, rate)
                known[f"{rate:g}"] = statistics.fmean(self.lab.score(model, self.lab.tasks, "validation").values())
                write_whole(file, json.dumps(known, indent=1) + "\n")
        return max(rates, key=lambda rate: known[f"{rate:g}"])

    def _trained_together(self, seed: int, rate: float) -> Path:
        options, run = self.options, self.out / f"multi-task-{rate:g}-seed{seed}"
        settings = {
            "model": str(self.lab.base),
            "data": [{"suite": str(self.lab.out / "suite"), "task": list(self.lab.tasks), "negatives": 3}],
            **{"batch_size": options.batch, "max_length": options.max_length, "epochs": options.epochs},
            **{"learning_rate": rate, "loss": {"temperature": 0.05}, "seed": seed},
        }
        config = training_config.parse(yaml.safe_dump(settings), str(self.out / "config.yml"))
        bag.train_run(config, run, options=Options(device=options.device), progress=self.progress)
        return run / MODEL


def report(lab: Coefficients, options: argparse.Namespace) -> str:
    """The table in Markdown; writes coefficients.json on the way."""
    seeds, tasks, others = options.seeds, lab.lab.tasks, lab.lab.others
    lines = [["", "evaluations", "validation rows", "in-domain", "out-of-domain", *tasks]]
    lines.append(["---", *("---:" for _ in lines[0][1:])])

    def row(title: str, count: str, share: str, tests: Sequence[Mapping[str, float]]) -> None:
        there = [names for names in (tasks, others) if all(set(names) <= test.keys() for test in tests)]
        groups = [points([statistics.fmean(test[t] for t in names) for test in tests]) for names in there]
        each = [f"{100 * statistics.fmean(test[task] for test in tests):.1f}" for task in tasks]
        lines.append([title, count, share, groups[0], groups[1] if groups[1:] else "", *each])

    def known(name: str) -> list[Mapping[str, float]]:
        return [lab.lab.record(name, seed)["test"] for seed in seeds]

    row("the base, not trained", "", "", known("base"))
    for name in options.methods:
        settings = len(importance.METHODS[name].settings)
        row(importance.METHODS[name].title, str(settings), "100%", known(name))
    if options.multi_task:
        row("multi-task training", str(len(options.learning_rates)), "100%", [lab.multi_task(s)["test"] for s in seeds])
    records: dict[str, list[Any]] = {}
    for share in options.shares:
        for arm in options.arms:
            own = records[f"{arm} {share:g}"] = [lab.record(arm, share, seed) for seed in seeds]
            for count in own[0]["test"]:
                row(ARMS[arm][0], count, f"{share:.0%}", [each["test"][count] for each in own])
    content = {"options": {k: str(v) for k, v in vars(options).items()}, "commit": commit(), "records": records}
    write_whole(options.out / "coefficients.json", json.dumps(content, indent=1) + "\n")
    return "\n".join(
        [
            f"Seeds {', '.join(map(str, seeds))}; engine {options.engine}; {options.fisher_examples} calibration rows a"
            f" specialist, {options.fisher_candidates} candidates each, for the Fisher of DF-Merge; commit {content['commit']}.",
            "",
            markdown(lines),
        ]
    )


if __name__ == "__main__":
    try:
        main()
    except CuveeError as error:
        raise SystemExit(f"coefficients.py: {error}") from None
