"""A model for a domain without labels, from models of other domains: does PIM find better weights than averaging?

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2      # MIT; unpack it, and the archive within
    python scripts/experiments/adapt.py --ratings hutto_ICWSM_2014 --out RUN [--seeds 0 1 2] [--rows 600] …

Snippets of films, products, newspapers and tweets with the mean of twenty persons' ratings from -4 to 4, here the seven
classes -3 to 3. Each domain in turn is the target, the other three are sources: MiniLM with one head of seven classes,
fine-tuned on each, learning rate by the sources' own validation rows for the first seed. The target gives 64 texts. Compared
on its test rows by quadratic weighted kappa: the average, each source, joint training on all sources with the same number of
steps, and what `cuvee search` finds by entropy, by PIM with the sources' priors or a uniform one, and with the labels of the
64 texts (the oracle), each with the same trials.

Killed and run again, it goes on. Prints tables of mean ± standard deviation over seeds and writes them to RUN/adapt.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from boom_lab import commit, read
from boom_table import markdown, points

from embeddings.quickstart import demo_model
from merging.engine import merge_text
from merging.errors import CuveeError
from merging.loading import only_our_words, wait_passively
from merging.output import staged, write_whole
from merging.progress import work_bars
from search import config as search_config
from search.objectives.agreement import quadratic_kappa
from search.run import search_run

FILES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "newspaper": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
LABELS = tuple(str(score) for score in range(-3, 4))
_TEST, _VALIDATION, _UNLABELLED = 600, 200, 64

Row = dict[str, str]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    wait_passively()
    with work_bars() as progress, only_our_words():
        lab = Lab(options, progress)
        records = [lab.record(target, seed) for seed in options.seeds for target in options.domains]
    text = report(records, options, lab)
    write_whole(options.out / "adapt.md", text)
    print(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", type=Path, required=True, help="the folder with *_GroundTruth.txt")
    parser.add_argument("--out", type=Path, required=True, help="the experiment's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--domains", nargs="+", default=list(FILES), choices=list(FILES))
    parser.add_argument("--rows", type=int, default=600, help="to train on, of a domain")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[5e-5, 2e-4])
    parser.add_argument("--max-length", type=int, default=48, help="tokens")
    parser.add_argument("--trials", type=int, default=30, help="of each search")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


class Lab:
    """Makes models and scores, each once; what lies in the experiment's folder is not made again."""

    def __init__(self, options: argparse.Namespace, progress: Any) -> None:
        self.options, self.progress = options, progress
        self.out: Path = options.out.absolute()
        self.data = {domain: _split(options.ratings / file, options.rows) for domain, file in FILES.items()}
        for domain, splits in self.data.items():
            for split, rows in splits.items():
                file = self.out / "data" / f"{domain}.{split}.jsonl"
                if not file.exists():
                    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def record(self, target: str, seed: int) -> dict[str, Any]:
        """Test scores of every arm, and the weights that each search chose."""
        file = self.out / "records" / f"{target}-seed{seed}.json"
        if file.is_file():
            known: dict[str, Any] = read(file)
            return known
        sources = [domain for domain in FILES if domain != target]
        models = [self.model(domain, seed) for domain in sources]
        found: dict[str, Any] = {"target": target, "seed": seed, "weights": {}, "test": {}}
        for domain, model in zip(sources, models, strict=True):
            found["test"][f"source {domain}"] = self.kappa(model, target)
        found["test"]["average"] = self._merged(seed, models, target)
        found["test"]["joint training"] = self.kappa(self.joint(sources, seed), target)
        for name, objective in self._objectives(target, sources, seed).items():
            run = self.out / f"seed{seed}" / f"{target}-{name.replace(' ', '-')}"
            result = self._search(run, objective, seed, models)
            found["test"][name] = self.kappa(run / "model", target)
            found["weights"][name] = result["best"]["coefficients"]["weight"]
            shutil.rmtree(run / "model")
        write_whole(file, json.dumps(found, indent=1) + "\n")
        return found

    def base(self, seed: int) -> Path:
        """MiniLM with a head of seven classes, the same for all domains."""
        out = self.out / f"seed{seed}" / "base"
        if not out.exists():
            import torch
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            torch.manual_seed(seed)
            labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
            model = AutoModelForSequenceClassification.from_pretrained(demo_model(), num_labels=len(LABELS), **labels)
            _save(model, AutoTokenizer.from_pretrained(demo_model()), out)
        return out

    def model(self, domain: str, seed: int) -> Path:
        return self._trained(domain, self.data[domain]["train"], seed, self.rate(domain))

    def joint(self, sources: Sequence[str], seed: int) -> Path:
        """One model on the rows of all sources: as many steps as theirs together."""
        rows = [row for domain in sources for row in self.data[domain]["train"]]
        rate = statistics.geometric_mean(self.rate(domain) for domain in sources)
        return self._trained("+".join(sources), rows, seed, rate)

    def rate(self, domain: str) -> float:
        """The learning rate that is best for the domain's own validation rows with the first seed."""
        rates: list[float] = self.options.learning_rates
        file = self.out / "rates" / f"{domain}.json"
        known: dict[str, float] = read(file) if file.is_file() else {}
        for rate in rates:
            if f"{rate:g}" not in known:
                model = self._trained(domain, self.data[domain]["train"], self.options.seeds[0], rate)
                known[f"{rate:g}"] = self.kappa(model, domain, "validation")
                write_whole(file, json.dumps(known, indent=1) + "\n")
        return max(rates, key=lambda rate: known[f"{rate:g}"])

    def prior(self, domain: str, seed: int) -> Path:
        from merging.statistics.score_prior import collect_score_prior

        out = self.out / f"seed{seed}" / f"{domain}.prior"
        if not out.exists():
            file = self.out / "data" / f"{domain}.train.jsonl"
            collect_score_prior(self.model(domain, seed), [file], out, scores=(-3, 3))
        return out

    def kappa(self, model: Path, domain: str, split: str = "test") -> float:
        """Quadratic weighted kappa on all rows of a split."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        rows = sorted(self.data[domain][split], key=lambda row: len(row["text"]))
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModelForSequenceClassification.from_pretrained(model).to(self.options.device).eval()
        batches = (rows[start : start + 64] for start in range(0, len(rows), 64))
        with torch.inference_mode():
            found = [network(**self._read(tokenizer, batch)).logits.argmax(1).cpu() for batch in batches]
        given = np.array([LABELS.index(row["label"]) for row in rows])
        return quadratic_kappa(given, torch.cat(found).numpy(), len(LABELS))

    def _objectives(self, target: str, sources: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
        texts = str(self.out / "data" / f"{target}.unlabelled.jsonl")
        labelled = str(self.out / "data" / f"{target}.oracle.jsonl")
        asked = {"data": texts, "examples": _UNLABELLED, "max_length": self.options.max_length}
        priors = [str(self.prior(domain, seed)) for domain in sources]
        return {
            "entropy": {"entropy": asked},
            "PIM, uniform prior": {"pim": {**asked, "prior": "uniform"}},
            "PIM": {"pim": {**asked, "prior": priors}},
            "oracle": {"score": {**asked, "data": labelled, "metric": "qwk"}},
        }

    def _search(self, run: Path, objective: dict[str, Any], seed: int, models: Sequence[Path]) -> dict[str, Any]:
        settings = {
            **{"base_model": str(self.base(seed)), "models": [str(model) for model in models]},
            **{"method": "task_arithmetic", "vary": {"weight": {"low": 0, "high": 1}}, "objective": objective},
            **{"trials": self.options.trials, "seed": seed},
        }
        config = search_config.parse(yaml.safe_dump(settings), str(self.out / "search.yml"))
        return search_run(config, run, device=self.options.device, progress=self.progress)

    def _merged(self, seed: int, models: Sequence[Path], target: str) -> float:
        recipe = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in models]}
        out = self.out / "average"
        shutil.rmtree(out, ignore_errors=True)
        merge_text(yaml.safe_dump(recipe), out, seed=seed)
        return self.kappa(out, target)

    def _trained(self, name: str, rows: Sequence[Row], seed: int, rate: float) -> Path:
        out: Path = self.out / f"seed{seed}" / f"{name}-{rate:.3g}"
        if not out.exists():
            self._train(out, rows, seed, rate, f"{name}, seed {seed}, {rate:.3g}")
        return out

    def _train(self, out: Path, rows: Sequence[Row], seed: int, rate: float, title: str) -> None:
        """AdamW with a linear decay after a tenth of the steps; cross-entropy."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

        options = self.options
        torch.manual_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(self.base(seed))
        network = AutoModelForSequenceClassification.from_pretrained(self.base(seed)).to(options.device).train()
        optimiser = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.01)
        steps = options.epochs * -(-len(rows) // options.batch)
        decay = get_linear_schedule_with_warmup(optimiser, steps // 10, steps)
        draw, done = random.Random(seed), 0
        for _ in range(options.epochs):
            for batch in _batches(draw.sample(rows, len(rows)), options.batch, draw):
                labels = torch.tensor([LABELS.index(row["label"]) for row in batch], device=options.device)
                network(**self._read(tokenizer, batch), labels=labels).loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimiser.step()
                decay.step()
                optimiser.zero_grad()
                done += 1
                self.progress(title, done, steps)
        _save(network, tokenizer, out)

    def _read(self, tokenizer: Callable[..., Any], rows: Sequence[Row]) -> Any:
        texts = [row["text"] for row in rows]
        length = self.options.max_length
        read = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return read.to(self.options.device)


def _split(file: Path, rows: int) -> dict[str, list[Row]]:
    """Rows of a domain, snippets of one document on one side: test, validation, 64 texts (with labels: oracle), train."""
    documents: dict[str, list[Row]] = {}
    try:
        with open(file, encoding="utf-8", errors="replace", newline="") as stream:
            for key, rating, text in csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
                label = str(max(-3, min(3, round(float(rating)))))
                documents.setdefault(key.partition("_")[0], []).append({"text": text, "label": label})
    except FileNotFoundError:
        raise CuveeError("no such file", where=str(file), mend="see --help for where the ratings come from") from None
    order = random.Random(0).sample(sorted(documents), len(documents))
    found: dict[str, list[Row]] = {"test": [], "validation": [], "oracle": [], "train": []}
    sizes = {"test": _TEST, "validation": _VALIDATION, "oracle": _UNLABELLED, "train": rows}
    for key in order:
        split = next((name for name, size in sizes.items() if len(found[name]) < size), None)
        if split is not None:
            found[split] += documents[key]
    found = {name: own[: sizes[name]] for name, own in found.items()}
    return {**found, "unlabelled": [{"text": row["text"]} for row in found["oracle"]]}


def _batches(rows: Sequence[Row], size: int, draw: random.Random) -> list[Sequence[Row]]:
    """Batches of texts of like length, out of eight batches each, in random order."""
    near: list[Row] = []
    for start in range(0, len(rows), 8 * size):
        near += sorted(rows[start : start + 8 * size], key=lambda row: len(row["text"]))
    batches = [near[start : start + size] for start in range(0, len(near), size)]
    return draw.sample(batches, len(batches))


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    with staged(out) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def report(records: Sequence[Mapping[str, Any]], options: argparse.Namespace, lab: Lab) -> str:
    """The tables in Markdown; writes adapt.json on the way."""
    content = {"options": {k: str(v) for k, v in vars(options).items()}, "commit": commit(), "records": records}
    write_whole(lab.out / "adapt.json", json.dumps(content, indent=1) + "\n")

    def singles(record: Mapping[str, Any]) -> list[float]:
        return [score for arm, score in record["test"].items() if arm.startswith("source ")]

    arms: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "a source, mean of three": lambda record: statistics.fmean(singles(record)),
        "the best source, known by the test": lambda record: max(singles(record)),
    }
    for arm in records[0]["test"]:
        if not arm.startswith("source "):
            arms[arm] = lambda record, arm=arm: record["test"][arm]  # type: ignore[misc]
    lines = [["", *options.domains, "mean"], ["---", *("---:" for _ in range(len(options.domains) + 1))]]
    for arm, score in arms.items():
        by_domain = [[score(r) for r in records if r["target"] == domain] for domain in options.domains]
        means = [statistics.fmean(values) for values in zip(*by_domain, strict=True)]
        lines.append([arm, *map(points, by_domain), points(means)])
    weights = [["", *options.domains], ["---", *("---" for _ in options.domains)]]
    for arm in records[0]["weights"]:
        row = [arm]
        for domain in options.domains:
            own = [record["weights"][arm] for record in records if record["target"] == domain]
            row.append(", ".join(f"{statistics.fmean(each):.2f}" for each in zip(*own, strict=True)))
        weights.append(row)
    rates = ", ".join(f"{lab.rate(domain):g} ({domain})" for domain in FILES)
    return "\n".join(
        [
            f"Seeds {', '.join(map(str, options.seeds))}; {options.rows} rows a source, learning rates {rates};"
            f" {options.trials} trials a search; commit {content['commit']}. Quadratic weighted kappa in points of 100.",
            "",
            markdown(lines),
            "Weights of the sources that were chosen, mean over seeds, sources in the order of the columns without the target:",
            "",
            markdown(weights),
        ]
    )


if __name__ == "__main__":
    try:
        main()
    except CuveeError as error:
        raise SystemExit(f"adapt.py: {error}") from None
