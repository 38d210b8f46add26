"""Does BOOM win? Bags of members merged, against what costs as much; and updates in three rounds, against their rivals.

    python scripts/experiments/boom.py --out RUN --dry-run          # what it takes
    python scripts/experiments/boom.py --out RUN [--seeds 0 1 2] [--rows 640] [--arms static updates] …

Static arms: the base; batch-level shuffling for 1, 1.8 and 3 epochs (what BOOM {80, 100} and {20, 40, 60, 80, 100} cost);
BOOM's sets; soups of one data and several seeds; the rival schedules; a member a data set. Updates: the in-domain data
sets arrive in three rounds; `cuvee update`, full retraining, fine-tuning on the new, and replay.

Every arm's learning rate is the best of the same grid by the mean validation score of the in-domain tasks, for the first
seed. Killed and run again, it goes on; more seeds and more arms can be added later. Prints tables of mean ± standard
deviation over seeds in points of 100 (boom.md in RUN, with boom.json); an arrow beside a learning rate says that it is at
the grid's edge. RUN/records has a file an arm and seed; models are removed when no arm needs them, but with --keep.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from boom_arms import FIRST, MERGES, Arm, Strategy, chosen, rounds_of, static_arms, training_rows
from boom_lab import IN_DOMAIN, Lab, Plan, commit, make_suite
from boom_table import Record, rounds_table, static_table, task_table

from embeddings.evaluation import suite
from embeddings.quickstart import demo_model
from merging.errors import CuveeError
from merging.loading import only_our_words, wait_passively
from merging.output import write_whole
from merging.progress import work_bars

_MAY_CHANGE = ("seeds", "arms", "learning_rates", "out", "keep", "dry_run", "device", "merges")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    wait_passively()
    with work_bars() as progress, only_our_words():
        plan, arms, strategies = prepare(options, progress)
        lab = Lab(plan)
        print(estimate(lab, arms, strategies, options.seeds), flush=True)
        if not options.dry_run:
            run(lab, arms, strategies, options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the experiment's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--suite", default="shipped", help="a suite's folder")
    parser.add_argument("--tasks", nargs="+", default=[], help="of the suite; by default all")
    parser.add_argument("--rows", type=int, default=640, help="of each train split at most; 0: all")
    parser.add_argument("--test-rows", type=int, default=0, help="of each test and validation split at most; 0: all")
    parser.add_argument("--arms", nargs="+", default=["static", "updates"], help="static, updates, or names of arms")
    parser.add_argument(
        "--merges", nargs="+", default=["multislerp"], choices=list(MERGES), help="each merged arm by all"
    )
    parser.add_argument("--rounds", nargs="+", default=[], help="of updates: word,phenotype code intent,sentiment")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[5e-5, 1e-4, 2e-4], help="the grid")
    parser.add_argument("--model", default="", help="a folder or hub id; by default the demo's MiniLM")
    parser.add_argument("--model-settings", default="{}", help="more of the configuration's 'model', as YAML")
    parser.add_argument("--settings", default="{}", help="more of the configuration, as YAML: {warmup: 0.2}")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--negatives", type=int, default=7, help="of a row; of a classification they are drawn")
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--max-length", type=int, default=128, help="tokens in training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    parser.add_argument("--dry-run", action="store_true", help="say what it takes, after a short trial")
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace, progress: Any) -> tuple[Plan, list[Arm], list[Strategy]]:
    """The plan, after a look at all that the user said; writes the suite and the settings.

    Raises:
        CuveeError: something that cannot be, or a folder that holds an experiment with other settings.
    """
    out = options.out.absolute()
    _claim(out, {key: str(value) for key, value in vars(options).items() if key not in _MAY_CHANGE})
    source = None if options.suite == "shipped" else Path(options.suite).absolute()
    make_suite(source, out / "suite", options.tasks, options.rows, options.test_rows)
    groups: dict[str, tuple[str, ...]] = {}
    for task in sorted(suite.load(out / "suite"), key=lambda task: task.group):
        if "test" in task.splits:
            groups[task.group] = (*groups.get(task.group, ()), task.name)
    trained = [task.name for task in suite.load(out / "suite") if task.group == IN_DOMAIN and "train" in task.splits]
    model = Path(options.model).absolute() if options.model and Path(options.model).is_dir() else options.model
    settings = {
        "model": {"path": str(model or demo_model()), **yaml.safe_load(options.model_settings)},
        "batch_size": options.batch,
        "max_length": options.max_length,
        "loss": {"temperature": options.temperature},
        **yaml.safe_load(options.settings),
    }
    try:
        arms, strategies = chosen(options.arms, static_arms(trained, options.merges))
        rounds = rounds_of(trained, options.rounds) if strategies else []
    except ValueError as error:
        raise CuveeError(str(error), where="boom.py") from None
    plan = Plan(
        out=out,
        settings=settings,
        tasks=tuple(trained),
        groups=groups,
        rounds=rounds,
        rates=tuple(sorted(options.learning_rates)),
        tune_seed=options.seeds[0],
        negatives=options.negatives,
        device=options.device,
        keep=options.keep,
        progress=progress,
    )
    return plan, arms, strategies


def _claim(out: Path, settings: dict[str, str]) -> None:
    file = out / "settings.json"
    if file.is_file():
        past = json.loads(file.read_text(encoding="utf-8"))
        if differing := [key for key in settings if past.get(key) != settings[key]]:
            raise CuveeError(
                f"holds an experiment with another --{differing[0].replace('_', '-')}: {past.get(differing[0])}",
                where=str(out),
                mend="choose another --out",
            )
    write_whole(file, json.dumps(settings, indent=1) + "\n")


def estimate(lab: Lab, arms: Sequence[Arm], strategies: Sequence[Strategy], seeds: Sequence[int]) -> str:
    """What it takes in all, from the beginning; arms with one best learning rate share members, others do not."""
    spent, sizes, grid = lab.calibrate(), lab.sizes(), len(lab.plan.rates)
    shared, apart, members = training_rows(arms, strategies, lab.plan.rounds, sizes)
    merges = sum(len(arm.members) > 1 for arm in arms) + 2 * any(each.name == "update" for each in strategies)
    tuned = grid if grid > 1 else 0
    others = len(seeds) - 1 if tuned else len(seeds)  # of the first seed the models are there when its rate is chosen
    least, most = (tuned * shared + others * rows for rows in (shared, apart))
    models = (tuned + others) * (members + merges)
    tests = len(seeds) * (len(arms) + (1 + 1.6 * len(strategies) if strategies else 0))
    validations = tuned * (len(arms) + len(strategies) + bool(strategies))
    rest = models * spent["model"] + tests * spent["test"] + validations * spent["validation"]
    corpus = sum(sizes.values())
    minutes = [(rows * spent["row"] + rest) / 60 for rows in (least, most)]
    return "\n".join(
        [
            f"{len(arms)} arms, {len(strategies)} strategies of updates, {len(seeds)} seeds, {grid} learning rates;"
            f" an epoch: {corpus:,} rows of {len(sizes)} data sets ({', '.join(f'{k} {v:,}' for k, v in sizes.items())})",
            f"training: {least:,.0f} to {most:,.0f} pair-passes at {1 / spent['row']:.0f} a second; {models} models,"
            f" {spent['model']:.1f} s each besides; {tests:.0f} tests of {spent['test']:.1f} s,"
            f" {validations} validations of {spent['validation']:.1f} s",
            f"about {minutes[0]:.0f} to {minutes[1]:.0f} minutes from the beginning",
        ]
    )


def run(lab: Lab, arms: Sequence[Arm], strategies: Sequence[Strategy], options: argparse.Namespace) -> None:
    """Seed by seed; after each the tables of all that is known so far."""
    static: list[Record] = []
    updates: list[Record] = []
    for seed in options.seeds:
        for number, arm in enumerate(arms):
            static.append(lab.static(arm, seed, arms[number + 1 :]))
        for strategy in strategies:
            updates += lab.updates(strategy, seed)
        if strategies:
            updates += lab.updates(FIRST, seed)  # last: the others begin with its model
        text = report(lab.plan, static, updates, sum(lab.sizes().values()), options)
        write_whole(lab.plan.out / "boom.md", text)
    print(text)


def report(plan: Plan, static: Sequence[Record], updates: Sequence[Record], corpus: int, options: Any) -> str:
    """The tables in Markdown; writes boom.json on the way."""
    seeds = sorted({record.seed for record in (*static, *updates)})
    made_by = commit()
    content = {
        "settings": dict(plan.settings),
        "options": {key: str(value) for key, value in vars(options).items()},
        "commit": made_by,
        "seeds": seeds,
        "rounds": list(plan.rounds),
        "groups": dict(plan.groups),
        "rows_of_an_epoch": corpus,
        "validation": {
            file.stem: json.loads(file.read_text(encoding="utf-8"))
            for file in sorted((plan.out / "rates").glob("*.json"))
        },
        "records": [record.plain() for record in (*static, *updates)],
    }
    write_whole(plan.out / "boom.json", json.dumps(content, indent=1) + "\n")
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    lines = [
        f"Seeds {', '.join(map(str, seeds))}; {corpus:,} rows an epoch; batch {options.batch}, temperature"
        f" {options.temperature:g}, learning rates from {rates}; commit {made_by}.",
        "",
    ]
    if static:
        lines += [static_table(static, plan.groups, corpus), task_table(static)]
    if updates:
        told = "; ".join(f"{number}: {', '.join(tasks)}" for number, tasks in enumerate(plan.rounds, 1))
        lines += [f"Rounds: {told}.", "", rounds_table(updates, plan.rounds, plan.groups, corpus), task_table(updates)]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except CuveeError as error:
        raise SystemExit(f"boom.py: {error}") from None
