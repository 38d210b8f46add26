"""Does reconstruction before contrastive training make a decoder a better embedding model? And which?

    python scripts/build_suite.py DATA --full SUITE                                    # the tasks, see that script
    python scripts/experiments/reconstruction.py --suite SUITE --model SMOLLM2 --out RUN [--layers 8] [--seeds 0 1 2] …

Each arm pre-trains the same decoder by `cuvee pretrain`, all with the same number of steps on the same rows, or not at all;
the same contrastive training on the same rows follows, with the learning rate that is best for the first seed by validation,
of as many for each arm. Scored on the test splits of the tasks that were trained on and of others, before the contrastive
training too; beside it what the held-out rows say of the reconstruction through EOS alone.

With `--layers` the decoder is its own first layers, real weights, with its last norm and its head: small enough for a CPU.

Killed and run again, it goes on. Prints a table of mean ± standard deviation over seeds in points of 100, writes it to
RUN/reconstruction.md, and all scores to RUN/reconstruction.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from boom_lab import commit, make_suite, read, score
from boom_table import markdown, points

from embeddings.reconstruction import config as pretraining_config
from embeddings.reconstruction.run import pretrain_run
from embeddings.training import config as training_config
from embeddings.training.bag import train_run
from embeddings.training.options import Options
from embeddings.training.run_folder import MODEL
from merging.errors import CuveeError
from merging.loading import only_our_words, wait_passively
from merging.output import staged, write_whole
from merging.progress import work_bars

TRAINED = ("hpo-synonym", "wordnet-definition-word")
OTHERS = ("wordnet-example-sense", "stsb-en", "debian-synopsis-description")


@dataclass(frozen=True)
class Arm:
    """A way to begin.

    Attributes:
        objective: of `cuvee pretrain`; "": none.
        settings: of its YAML; `steps` is the share of all steps that a stage has.
        bidirectional: whether the model looks to both sides afterwards; of those that are not pre-trained.
    """

    title: str
    objective: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    bidirectional: bool = True


ARMS = {
    "causal": Arm("nothing, causal", bidirectional=False),
    "nothing": Arm("nothing, bidirectional"),
    "warm-up": Arm("warm-up only", "cocoa", {"warm_up": {"steps": 1.0}, "bridge": False}),
    "cocoa": Arm("CoCoA", "cocoa", {"warm_up": {"steps": 0.5}, "bridge": {"steps": 0.5}}),
    "cocoa-strict": Arm(
        "CoCoA, EOS blind to the target",
        "cocoa",
        {"warm_up": {"steps": 0.5}, "bridge": {"steps": 0.5, "eos_sees_b": False}},
    ),
    "cocoa-embedding": Arm(
        "CoCoA, through the embedding",
        "cocoa",
        {"warm_up": {"steps": 0.5}, "bridge": {"steps": 0.5, "bridge": "embedding"}},
    ),
    "llm-ql": Arm("LLM-QL", "llm-ql", {"steps": 1.0}, bidirectional=False),
    "retromae": Arm("RetroMAE-style", "retromae", {"steps": 1.0}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    wait_passively()
    with work_bars() as progress, only_our_words():
        lab = Lab(options, progress)
        for seed in options.seeds:
            for name in options.arms:
                lab.record(name, seed)
    text = report(lab, options)
    write_whole(options.out / "reconstruction.md", text)
    print(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, required=True, help="the folder that build_suite.py --full wrote")
    parser.add_argument("--model", type=Path, required=True, help="a decoder's folder")
    parser.add_argument("--out", type=Path, required=True, help="the experiment's folder")
    parser.add_argument("--layers", type=int, default=0, help="the decoder's first layers; 0: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--tasks", nargs="+", default=list(TRAINED), help="trained on")
    parser.add_argument("--others", nargs="+", default=list(OTHERS), help="only tested on")
    parser.add_argument("--rows", type=int, default=2000, help="of each task, to train on")
    parser.add_argument("--test-rows", type=int, default=200, help="of each test and validation split; 0: all")
    parser.add_argument("--steps", type=int, default=200, help="of the pre-training")
    parser.add_argument("--contrastive-steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--pretraining-rate", type=float, default=1e-4, help="learning rate of every pre-training")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-4, 4e-4], help="contrastive")
    parser.add_argument("--tune-seed", type=int, default=0, help="for which learning rates are compared")
    parser.add_argument("--dtype", default="float32", help="or bfloat16, on a GPU")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


class Lab:
    """Makes models and scores, each once; what lies in the experiment's folder is not made again."""

    def __init__(self, options: argparse.Namespace, progress: Any) -> None:
        self.options, self.progress = options, progress
        self.out: Path = options.out.absolute()
        self.tasks, self.others = tuple(options.tasks), tuple(options.others)
        make_suite(options.suite, self.out / "suite", [*self.tasks, *self.others], options.rows, options.test_rows)
        self.base = self.out / "base"
        if not self.base.exists():
            _cut(options.model, self.base, options.layers)

    def record(self, name: str, seed: int) -> dict[str, Any]:
        """Test scores by task before (`pretrained`) and after (`test`) the contrastive training, and the held-out numbers."""
        file = self.out / "records" / f"{name}-seed{seed}.json"
        if file.is_file():
            known: dict[str, Any] = read(file)
            return known
        arm, run = ARMS[name], self.out / f"seed{seed}" / name
        found: dict[str, Any] = {"held_out": {}, "pretrained": {}, "seconds": 0.0}
        if arm.objective:
            result = self._pretrained(arm, run / "pretrained", seed)
            found |= {"held_out": result["held_out"], "seconds": result["seconds"]}
            found["pretrained"] = self._score(run / "pretrained" / MODEL, [*self.tasks, *self.others])
        rate = self._rate(name)
        found["learning_rate"] = rate
        found["test"] = self._score(self._trained(name, seed, rate), [*self.tasks, *self.others])
        write_whole(file, json.dumps(found, indent=1) + "\n")
        return found

    def _pretrained(self, arm: Arm, run: Path, seed: int) -> dict[str, Any]:
        options = self.options
        settings: dict[str, Any] = {}
        for key, value in arm.settings.items():
            if key == "steps":
                settings[key] = round(value * options.steps)
            elif isinstance(value, Mapping):
                settings[key] = {**value, "steps": round(value["steps"] * options.steps)}
            else:
                settings[key] = value
        content = {
            "model": {"path": str(self.base), "dtype": options.dtype},
            "data": self._data(),
            **{"batch_size": options.batch, "max_length": options.max_length, "seed": seed},
            **{"learning_rate": options.pretraining_rate, **settings},
        }
        config = pretraining_config.parse(yaml.safe_dump(content), arm.objective, str(self.out / "pretrain.yml"))
        return pretrain_run(config, run, options=Options(device=options.device), progress=self.progress)

    def _data(self) -> list[dict[str, Any]]:
        return [{"suite": str(self.out / "suite"), "task": list(self.tasks)}]

    def _rate(self, name: str) -> float:
        """The contrastive learning rate that is best for `--tune-seed` by the mean validation score."""
        rates: list[float] = self.options.learning_rates
        file = self.out / "rates" / f"{name}.json"
        known: dict[str, float] = read(file) if file.is_file() else {}
        for rate in rates if len(rates) > 1 else ():
            if f"{rate:g}" not in known:
                scores = self._score(self._trained(name, self.options.tune_seed, rate), self.tasks, "validation")
                known[f"{rate:g}"] = statistics.fmean(scores.values())
                write_whole(file, json.dumps(known, indent=1) + "\n")
        return max(rates, key=lambda rate: known.get(f"{rate:g}", 0.0))

    def _trained(self, name: str, seed: int, rate: float) -> Path:
        """The model after contrastive training."""
        options, arm, run = self.options, ARMS[name], self.out / f"seed{seed}" / name
        if arm.objective:
            self._pretrained(arm, run / "pretrained", seed)  # of the first seed, for its learning rates
            model: Any = {"path": str(run / "pretrained" / MODEL), "dtype": options.dtype}
        else:
            model = {"path": str(self.base), "pooling": "lasttoken", "dtype": options.dtype}
            model["bidirectional"] = arm.bidirectional
        content = {
            "model": model,
            "data": self._data(),
            **{"batch_size": options.batch, "max_length": options.max_length, "steps": options.contrastive_steps},
            **{"learning_rate": rate, "loss": {"temperature": 0.05}, "seed": seed},
        }
        config = training_config.parse(yaml.safe_dump(content), str(self.out / "train.yml"))
        out = run / f"contrastive-{rate:g}"
        train_run(config, out, options=Options(device=options.device), progress=self.progress)
        return out / MODEL

    def _score(self, model: Path, tasks: Sequence[str], split: str = "test") -> dict[str, float]:
        """Main scores in [0, 1] by task."""
        device, progress = self.options.device, self.progress
        return score(model, tasks, split, self.out / "suite", self.out, device=device, progress=progress)


def report(lab: Lab, options: argparse.Namespace) -> str:
    """The table in Markdown; writes reconstruction.json on the way."""
    records = {name: [lab.record(name, seed) for seed in options.seeds] for name in options.arms}
    content = {"options": {k: str(v) for k, v in vars(options).items()}, "commit": commit(), "records": records}
    write_whole(lab.out / "reconstruction.json", json.dumps(content, indent=1) + "\n")
    measures = sorted({key for own in records.values() for each in own for key in each["held_out"]})
    head = ["before the contrastive training", "trained on", "others", *lab.tasks, *lab.others, "trained on, before"]
    lines = [[*head, "learning rate", *measures], ["---", *("---:" for _ in [*head, *measures])]]

    def means(tests: Sequence[Mapping[str, float]], tasks: Sequence[str]) -> str:
        return points([statistics.fmean(test[task] for task in tasks) for test in tests]) if all(tests) else ""

    for name, own in records.items():
        tests, before = [each["test"] for each in own], [each["pretrained"] for each in own]
        each_task = [
            f"{100 * statistics.fmean(test[task] for test in tests):.1f}" for task in (*lab.tasks, *lab.others)
        ]
        rate = f"{own[0]['learning_rate']:g}"
        numbers = [
            f"{statistics.fmean(each['held_out'][key] for each in own):.3g}" if key in own[0]["held_out"] else ""
            for key in measures
        ]
        groups = [means(tests, lab.tasks), means(tests, lab.others)]
        lines.append([ARMS[name].title, *groups, *each_task, means(before, lab.tasks), rate, *numbers])
    about = (
        f"Seeds {', '.join(map(str, options.seeds))}; {options.layers or 'all'} layers, {options.steps} steps of"
        f" pre-training and {options.contrastive_steps} of contrastive training, {options.batch} rows each; commit"
        f" {content['commit']}."
    )
    return f"{about}\n\n{markdown(lines)}\n"


def _cut(model: Path, out: Path, layers: int) -> None:
    """A decoder's own first layers as a decoder; all of them for 0."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module: Any = AutoModelForCausalLM.from_pretrained(model, dtype="float32", local_files_only=True)
    if layers:
        module.model.layers = module.model.layers[:layers]
        module.config.num_hidden_layers = layers
        if getattr(module.config, "layer_types", None):
            module.config.layer_types = module.config.layer_types[:layers]
    with staged(out) as scratch:
        module.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(model, local_files_only=True).save_pretrained(scratch)


if __name__ == "__main__":
    try:
        main()
    except CuveeError as error:
        raise SystemExit(f"reconstruction.py: {error}") from None
