"""Which merge makes the best of six specialists? Averages, task vectors, and merges by importance, each tuned alike.

    python scripts/build_suite.py DATA --full SUITE                        # the tasks, see that script
    python scripts/experiments/importance.py --suite SUITE --out RUN [--seeds 0 1 2] [--rows 1000] …

For each seed six specialists are trained from the base by `cuvee train`, one a task, with the learning rate that is best
for one of the seeds by the task's validation score; `cuvee stats` looks at each with calibration rows of its own task; every
method then merges them with each setting of its grid (at most six), the best by the mean validation
score over the six tasks is scored on the test splits of these and of tasks that nobody was trained on.
OBIM is also run in other orders of the models, with the setting that was chosen.

    python scripts/experiments/importance.py --suite SUITE --out RUN --model BASE --foreign MODEL …

merges checkpoints of others instead: nothing is trained, statistics come from rows of all tasks, and methods without a
base merge the base too.

Killed and run again, it goes on. Prints a table of mean ± standard deviation over seeds in points of 100, writes it to
RUN/importance.md, and all scores to RUN/importance.json.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from boom_lab import commit, make_suite, read, score
from boom_table import markdown, points

from embeddings.evaluation import suite
from embeddings.quickstart import demo_model
from embeddings.training import config as training_config
from embeddings.training.bag import train_run
from embeddings.training.options import Options
from embeddings.training.run_folder import MODEL
from merging import methods
from merging.engine import merge_text
from merging.errors import CuveeError
from merging.loading import only_our_words, wait_passively
from merging.output import staged, write_whole
from merging.progress import work_bars

IN_DOMAIN = (
    *("hpo-synonym", "wordnet-definition-word", "debian-synopsis-description"),
    *("code-docstring-function", "banking77", "stsb-en"),
)
OUT_OF_DOMAIN = (
    "wordnet-example-sense",
    "wordnet-senses",
    "home-intents-en",
    "hpo-organ-system-clusters",
    "emoji-german",
)
KINDS = ("fisher", "moments", "gram")

Setting = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A merge method with its grid.

    Attributes:
        method: as recipes spell it.
        settings: parameters of the recipe, at most six.
        statistics: the kind that it reads, "" for none.
    """

    title: str
    method: str
    settings: tuple[Setting, ...]
    statistics: str = ""


def _grid(**values: Sequence[Any]) -> tuple[Setting, ...]:
    settings: list[Setting] = [{}]
    for name, choices in values.items():
        settings = [{**setting, name: choice} for setting in settings for choice in choices]
    return tuple(settings)


#: λ multiplies the sum of six task vectors (1/6: the average) or, where entries are kept apart, what each coordinate moves.
METHODS = {
    "average": Method("average", "linear", ({},)),
    "task_arithmetic": Method(
        "task arithmetic", "task_arithmetic", _grid(**{"lambda": (0.17, 0.25, 0.35, 0.5, 0.7, 1.0)})
    ),
    "ties": Method("TIES", "ties", _grid(**{"density": (0.2, 0.5), "lambda": (0.7, 1.0, 1.5)})),
    "ties-moments": Method(
        "TIES, saliency by moments",
        "ties",
        _grid(**{"saliency": ("stats",), "density": (0.2, 0.5), "lambda": (0.7, 1.0, 1.5)}),
        "moments",
    ),
    "dare": Method("DARE", "dare_linear", _grid(**{"density": (0.5, 0.8), "lambda": (0.17, 0.25, 0.4)})),
    "fisher": Method("Fisher", "fisher", _grid(normalize=(True, False), floor=(1e-6, 1e-3, 1e-1)), "fisher"),
    "regmean": Method("RegMean", "regmean", _grid(alpha=(0.1, 0.3, 0.5, 0.7, 0.9, 1.0)), "gram"),
    "obim": Method(
        "OBIM (reconstructed), moments",
        "obim",
        _grid(**{"density": (1 / 6, 0.1), "lambda": (0.7, 1.0, 1.5)}),
        "moments",
    ),
    "obim-fisher": Method(
        "OBIM (reconstructed), Fisher",
        "obim",
        _grid(**{"density": (1 / 6, 0.1), "lambda": (0.7, 1.0, 1.5)}),
        "fisher",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    wait_passively()
    with work_bars() as progress, only_our_words():
        lab = Lab(options, progress)
        for seed in options.seeds:
            lab.prepare(seed)
            for name in ("base", *lab.names, *options.methods):
                lab.record(name, seed)
            if "obim" in options.methods:
                lab.orders(seed)
        text = report(lab, options)
        write_whole(options.out / "importance.md", text)
    print(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    return parser(__doc__).parse_args(arguments)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Also for experiments that go on from these specialists."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, required=True, help="the folder that build_suite.py --full wrote")
    parser.add_argument("--out", type=Path, required=True, help="the experiment's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=list(IN_DOMAIN), help="a specialist each")
    parser.add_argument("--others", nargs="+", default=list(OUT_OF_DOMAIN), help="only tested on")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rows", type=int, default=1000, help="to train a specialist on")
    parser.add_argument("--test-rows", type=int, default=200, help="of each test and validation split at most; 0: all")
    parser.add_argument("--examples", type=int, default=64, help="calibration rows a specialist")
    parser.add_argument("--orders", type=int, default=4, help="more orders of OBIM, at random")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[2e-5, 1e-4], help="the specialists' grid")
    parser.add_argument("--tune-seed", type=int, default=0, help="for which learning rates are compared")
    parser.add_argument("--tune-once", action="store_true", help="methods too are tuned for that seed alone")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text, in training and in tests")
    parser.add_argument("--model", default="", help="a folder; by default the demo's MiniLM")
    parser.add_argument("--foreign", type=Path, nargs="+", default=[], help="models to merge, instead of training some")
    parser.add_argument("--device", default="cpu")
    return parser


class Lab:
    """Makes models and scores, each once; what lies in the experiment's folder is not made again."""

    def __init__(self, options: argparse.Namespace, progress: Any) -> None:
        self.options, self.progress = options, progress
        self.out: Path = options.out.absolute()
        self.tasks: tuple[str, ...] = tuple(options.tasks)
        self.others: tuple[str, ...] = tuple(options.others)
        self.base = self.out / "base"
        wanted = [*self.tasks, *self.others]
        make_suite(options.suite, self.out / "suite", wanted, options.rows, options.test_rows)
        if not self.base.exists():
            _shortened(Path(options.model) if options.model else demo_model(), self.base, options.max_length)

    # ---- models ----

    @property
    def names(self) -> tuple[str, ...]:
        """Of the models to merge: a specialist has its task's."""
        return tuple(each.name for each in self.options.foreign) or self.tasks

    def model(self, name: str, seed: int) -> Path:
        foreign: dict[str, Path] = {each.name: each.absolute() for each in (*self.options.foreign, self.base)}
        if name in foreign:
            return foreign[name]
        tuned = len(self.options.learning_rates) > 1 and seed == self.options.tune_seed
        return (self._trial(name, self.rate(name)) if tuned else self.out / f"seed{seed}" / name) / MODEL

    def prepare(self, seed: int) -> None:
        """Trains the specialists that are missing, and gathers the statistics of every model."""
        if not self.options.foreign:
            for task in self.tasks:
                self._train(task, seed, self.rate(task), self.model(task, seed).parent)
        for kind in dict.fromkeys(METHODS[name].statistics for name in self.options.methods):
            for name in (*self.names, *([self.base.name] if self.options.foreign else [])):
                if kind and not self.statistics(name, kind, seed).exists():
                    self._collect(name, kind, seed)

    def statistics(self, name: str, kind: str, seed: int) -> Path:
        return self.out / f"seed{seed}" / f"{name}.{kind}"

    def rate(self, task: str) -> float:
        """The learning rate of a task's specialists: the best for `--tune-seed`, by the task's validation score."""
        rates: list[float] = sorted(self.options.learning_rates)
        if len(rates) == 1:
            return rates[0]
        file = self.out / "rates" / f"{task}.json"
        known: dict[str, float] = read(file) if file.is_file() else {}
        for rate in rates:
            if f"{rate:g}" not in known:
                self._train(task, self.options.tune_seed, rate, self._trial(task, rate))
                known[f"{rate:g}"] = self.score(self._trial(task, rate) / MODEL, [task], "validation")[task]
                write_whole(file, json.dumps(known, indent=1) + "\n")
        return max(rates, key=lambda rate: known[f"{rate:g}"])

    def _trial(self, task: str, rate: float) -> Path:
        return self.out / "rates" / f"{task}-{rate:g}"

    def _train(self, task: str, seed: int, rate: float, run: Path) -> None:
        options = self.options
        settings = {
            "model": str(self.base),
            "data": [{"suite": str(self.out / "suite"), "task": task, "negatives": 3}],
            **{"batch_size": options.batch, "max_length": options.max_length, "epochs": options.epochs},
            **{"learning_rate": rate, "loss": {"temperature": 0.05}, "seed": seed},
        }
        config = training_config.parse(yaml.safe_dump(settings), str(self.out / "config.yml"))
        train_run(config, run, options=Options(device=options.device), progress=self.progress)

    def _collect(self, name: str, kind: str, seed: int) -> None:
        from merging.statistics import collect

        collect(
            str(self.model(name, seed)),
            [self.calibration(task) for task in ((name,) if name in self.tasks else self.tasks)],
            kind,
            self.statistics(name, kind, seed),
            examples=self.options.examples,
            seed=seed,
            device=self.options.device,
            max_length=self.options.max_length,
            progress=self.progress,
        )

    def calibration(self, task: str) -> Path:
        """Training rows of a task as `query`, `positive`: what every kind of statistics can read."""
        file = self.out / "calibration" / f"{task}.jsonl"
        if not file.exists():
            found = next(each for each in suite.load(self.out / "suite") if each.name == task)
            rows = [row for _, row in found.read_table("train", "rows")]
            text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs(rows, random.Random(0)))
            write_whole(file, text)
        return file

    def merged(self, method: Method, setting: Setting, order: Sequence[str], seed: int, out: Path) -> None:
        """Writes the merge of the models in that order."""
        models = []
        known = methods.get(method.method)
        for name in (*([self.base.name] if self.options.foreign and known.base == "none" else []), *order):
            entry: dict[str, Any] = {"model": str(self.model(name, seed))}
            if "weight" in known.parameters:
                entry["parameters"] = {"weight": 1.0}
            if method.statistics:
                entry["stats"] = str(self.statistics(name, method.statistics, seed))
            models.append(entry)
        recipe = {"merge_method": method.method, "base_model": str(self.base), "models": models, "parameters": setting}
        if self.options.foreign:
            recipe["missing"] = "keep"  # a pooler that nobody uses, which only some of them have
        shutil.rmtree(out, ignore_errors=True)
        merge_text(yaml.safe_dump(recipe), out, seed=seed, device=self.options.device)

    # ---- scores ----

    def record(self, name: str, seed: int) -> dict[str, Any]:
        """What became of a method, a specialist or the base with one seed."""
        file = self.out / "records" / f"{name}-seed{seed}.json"
        if file.is_file():
            known: dict[str, Any] = read(file)
            return known
        if name == "base":
            found = {"test": self.score(self.base, [*self.tasks, *self.others])}
        elif name in self.names:
            found = {"test": self.score(self.model(name, seed), [*self.tasks, *self.others])}
        else:
            found = self._tuned(name, seed)
        write_whole(file, json.dumps(found, indent=1) + "\n")
        return found

    def orders(self, seed: int) -> list[float]:
        """Mean test score in-domain of OBIM in other orders of the models, as tuned in the listed one."""
        file = self.out / "records" / f"orders-seed{seed}.json"
        known: dict[str, float] = read(file) if file.is_file() else {}
        setting = self.record("obim", seed)["setting"]
        draw = random.Random(seed)
        for _ in range(self.options.orders):
            order = draw.sample(self.names, len(self.names))
            if (key := " ".join(order)) not in known:
                scores = self._score_merge(METHODS["obim"], setting, order, seed, self.tasks, "test")
                known[key] = statistics.fmean(scores.values())
                write_whole(file, json.dumps(known, indent=1) + "\n")
        return list(known.values())

    def _tuned(self, name: str, seed: int) -> dict[str, Any]:
        method = METHODS[name]
        if self.options.tune_once and seed != self.options.tune_seed:
            setting = self.record(name, self.options.tune_seed)["setting"]
            test = self._score_merge(method, setting, self.names, seed, [*self.tasks, *self.others], "test")
            return {"setting": setting, "validation": [], "test": test}
        validation = []
        for setting in method.settings:
            scores = self._score_merge(method, setting, self.names, seed, self.tasks, "validation")
            validation.append(statistics.fmean(scores.values()))
        best = max(range(len(validation)), key=validation.__getitem__)
        test = self._score_merge(method, method.settings[best], self.names, seed, [*self.tasks, *self.others], "test")
        return {"setting": method.settings[best], "validation": validation, "test": test}

    def _score_merge(
        self, method: Method, setting: Setting, order: Sequence[str], seed: int, tasks: Sequence[str], split: str
    ) -> dict[str, float]:
        out = self.out / "merged"
        self.merged(method, setting, order, seed, out)
        return self.score(out, tasks, split)

    def score(self, model: Path, tasks: Sequence[str], split: str = "test") -> dict[str, float]:
        """Main scores in [0, 1] by task."""
        device, progress = self.options.device, self.progress
        return score(model, tasks, split, self.out / "suite", self.out, device=device, progress=progress)


def report(lab: Lab, options: argparse.Namespace) -> str:
    """The tables in Markdown; writes importance.json on the way."""
    seeds = options.seeds
    records = {name: [lab.record(name, seed) for seed in seeds] for name in ("base", *lab.names, *options.methods)}
    orders = [lab.orders(seed) for seed in seeds] if "obim" in options.methods else []
    content = {"options": {k: str(v) for k, v in vars(options).items()}, "commit": commit(), "records": records}
    write_whole(lab.out / "importance.json", json.dumps({**content, "orders": orders}, indent=1) + "\n")

    def row(title: str, tests: Sequence[Mapping[str, float]], settings: str) -> list[str]:
        groups = [[statistics.fmean(test[t] for t in tasks) for test in tests] for tasks in (lab.tasks, lab.others)]
        each = [f"{100 * statistics.fmean(test[task] for test in tests):.1f}" for task in lab.tasks]
        return [title, *map(points, groups), *each, settings]

    lines = [["", "in-domain", "out-of-domain", *lab.tasks, "settings chosen"]]
    lines.append(["---", *("---:" for _ in lines[0][1:-1]), "---"])
    lines.append(row("the base, not trained", [r["test"] for r in records["base"]], ""))
    if not options.foreign:
        own = [_by_specialists(lab, records, number) for number in range(len(seeds))]
        lines.append(row("each specialist on its own task, their mean on others", own, ""))
    title = "{}" if options.foreign else "the specialist of {}"
    lines += [row(title.format(name), [r["test"] for r in records[name]], "") for name in lab.names]
    for name in options.methods:
        chosen = "; ".join(dict.fromkeys(_told(r["setting"]) for r in records[name]))
        lines.append(row(METHODS[name].title, [r["test"] for r in records[name]], chosen))
    trained = ""
    if not options.foreign:
        rates = ", ".join(f"{lab.rate(task):g} ({task})" for task in lab.tasks)
        trained = f" {options.rows} rows a specialist, learning rates {rates},"
    text = [
        f"Seeds {', '.join(map(str, seeds))};{trained} {options.examples} calibration rows; commit {content['commit']}.",
        "",
        markdown(lines),
    ]
    if any(orders):
        spread = [statistics.stdev(scores) for scores in orders if len(scores) > 1]
        text.append(
            f"OBIM in {len(orders[0])} other orders, in-domain: {points([s for scores in orders for s in scores])};"
            f" standard deviation over the orders of one seed: {', '.join(f'{100 * s:.2f}' for s in spread)}."
        )
    return "\n".join(text) + "\n"


def _shortened(model: Path, out: Path, max_length: int) -> None:
    """A copy of a sentence-transformers folder that reads so many tokens of a text at most, as those made from it will."""
    with staged(out) as scratch:
        shutil.copytree(model, scratch, dirs_exist_ok=True)
        file = scratch / "sentence_bert_config.json"
        write_whole(file, json.dumps({**read(file), "max_seq_length": max_length}, indent=1) + "\n")


def _by_specialists(lab: Lab, records: Mapping[str, Sequence[Any]], number: int) -> dict[str, float]:
    best = {task: records[task][number]["test"][task] for task in lab.tasks}
    others = {task: statistics.fmean(records[each][number]["test"][task] for each in lab.tasks) for task in lab.others}
    return {**best, **others}


def pairs(rows: Sequence[Mapping[str, Any]], draw: random.Random) -> Iterator[dict[str, str]]:
    """Texts and what belongs to them: another text of the same label, or a sentence that means much the same."""
    if "positive" in rows[0]:
        yield from ({"query": row["query"], "positive": row["positive"]} for row in rows)
    elif "sentence1" in rows[0]:
        best = sorted(rows, key=lambda row: -float(row["score"]))[: len(rows) // 2]
        yield from ({"query": row["sentence1"], "positive": row["sentence2"]} for row in best)
    else:
        by_label: dict[Any, list[str]] = {}
        for row in rows:
            by_label.setdefault(row["label"], []).append(row["text"])
        for row in rows:
            others = [text for text in by_label[row["label"]] if text != row["text"]]
            if others:
                yield {"query": row["text"], "positive": draw.choice(others)}


def _told(setting: Setting) -> str:
    return ", ".join(f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in setting.items())


if __name__ == "__main__":
    try:
        main()
    except CuveeError as error:
        raise SystemExit(f"importance.py: {error}") from None
