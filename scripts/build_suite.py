"""Builds the suite that ships with the package, embeddings/data/suite, or the full-size one of the same form.

    python scripts/build_suite.py SOURCE                  # the shipped suite: samples of what may be given away
    python scripts/build_suite.py SOURCE --full OUT       # every task in full; for experiments, not for redistribution

SOURCE holds a folder for each task with train, validation and test.jsonl.gz. Samples are drawn with a fixed seed and the
archives carry no time stamp: the same source gives the same bytes. Rows of train that ask what validation or test asks are
left out, and rows that occur twice; but the test splits of the full-size suite are as they are, for the sake of comparison.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from embeddings.evaluation.suite_check import plain, question

Row = dict[str, Any]
Build = Callable[[Path, random.Random], Mapping[str, Sequence[Row]]]

SEED = 20
SPLITS = ("train", "test", "validation")  # the order in which samples are drawn
APACHE = ("transformers", "datasets", "accelerate", "huggingface_hub", "mteb", "peft", "sentence_transformers")
CANDIDATES = 10  # senses to put in order, at most
WORDNET = ("WordNet-3.0", "https://wordnet.princeton.edu")
HPO = ("HPO licence, version 2025-01, terms unaltered", "https://human-phenotype-ontology.github.io")


@dataclass(frozen=True)
class Task:
    """One task of a suite: what its YAML says, where its rows come from, and how many of them are taken."""

    name: str
    type: str
    group: str
    description: str
    origin: tuple[str, str]  # licence, source
    build: Build
    sizes: Mapping[str, int] | None = None  # rows by split at most; None: all of every split
    metric: str | None = None
    languages: tuple[str, ...] = ()
    whole_test: bool = False  # the test split keeps the rows that occur twice
    tables: Callable[[Path], Mapping[str, Sequence[Row]]] | None = None  # of the test split, where it is no rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder of the full tasks")
    parser.add_argument("--full", type=Path, metavar="OUT", help="write every task in full to this folder")
    arguments = parser.parse_args()
    shipped = Path(__file__).parents[1] / "embeddings" / "data" / "suite"
    size = build(arguments.source, arguments.full or shipped, full_suite() if arguments.full else shipped_suite())
    print(f"{arguments.full or shipped}: {size / 1e6:.2f} MB")


def build(source: Path, out: Path, tasks: Sequence[Task]) -> int:
    """Writes the tasks' YAMLs and tables to a folder; returns the tables' bytes."""
    total = 0
    for task in tasks:
        rng = random.Random(SEED)
        drawn = task.build(source, rng)
        splits = {split: drawn[split] for split in SPLITS if split in drawn}
        if task.sizes is not None:
            splits = {split: sample(splits[split], size, rng) for split, size in task.sizes.items()}
        as_it_is = "test" if task.whole_test else None
        splits = {split: rows if split == as_it_is else distinct(rows) for split, rows in splits.items()}
        files: dict[str, Any] = {}
        for split, rows in without_leaks(splits).items():
            files[split] = f"{task.name}/{split}.jsonl.gz"
            total += write(out / files[split], rows)
        if task.tables is not None:
            tables = task.tables(source)
            files["test"] = {table: f"{task.name}/{table}.jsonl.gz" for table in tables}
            total += sum(write(out / files["test"][table], rows) for table, rows in tables.items())
        write_yaml(out / f"{task.name}.yml", task, files)
    return total


def write_yaml(file: Path, task: Task, files: Mapping[str, Any]) -> None:
    licence, source = task.origin
    content = {
        "type": task.type,
        "group": task.group,
        "description": task.description,
        "licence": licence,
        "source": source,
        "files": dict(files),
        **({"metric": task.metric} if task.metric else {}),
        **({"languages": list(task.languages)} if task.languages else {}),
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")


def write(file: Path, rows: Sequence[Row]) -> int:
    """JSONL in an archive that carries no time stamp; returns its bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    size = file.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    print(f"{file.parent.name}/{file.name}: {len(lines)} rows, {size / 1000:.0f} kB")
    return size


# What is drawn


def sample(rows: Sequence[Row], size: int, rng: random.Random) -> list[Row]:
    """At most `size` rows in random order; of pairs that share a query or a positive only one, for it is what to find."""
    chosen: list[Row] = []
    seen: set[str] = set()
    for row in rng.sample(rows, len(rows)):
        texts = {row[key] for key in ("query", "positive") if isinstance(row.get(key), str)}
        if not texts & seen:
            chosen.append(row)
            seen |= texts
    return chosen[:size]


def distinct(rows: Iterable[Row]) -> list[Row]:
    """Without rows that occur twice, but for case and space; a query may have several positives."""
    first: dict[Any, Row] = {}
    for row in rows:
        positive = row.get("positive")
        first.setdefault((*question(row), plain(positive) if isinstance(positive, str) else ""), row)
    return list(first.values())


def without_leaks(splits: Mapping[str, Sequence[Row]]) -> dict[str, Sequence[Row]]:
    """Without what a model could learn by heart: rows of train that are asked in validation or test, and so on."""
    kept: dict[str, Sequence[Row]] = {}
    asked: set[tuple[str, ...]] = set()
    for split in ("test", "validation", "train"):
        if split in splits:
            kept[split] = [row for row in splits[split] if question(row) not in asked]
            asked |= {question(row) for row in splits[split]}
    return {split: kept[split] for split in splits}


# Where it comes from


def read(file: Path) -> list[Row]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def rows_of(folder: str, *columns: str, splits: Sequence[str] = SPLITS) -> Build:
    """The rows of a source folder with some of their columns, and the package's name where a row names one."""

    def rows(source: Path, rng: random.Random) -> dict[str, list[Row]]:
        return {
            split: [{key: row[key] for key in columns} for row in read(source / folder / f"{split}.jsonl.gz")]
            for split in splits
        }

    return rows


def functions(source: Path, rng: random.Random) -> dict[str, list[Row]]:
    """Docstring and function, of Apache packages only; the test packages are not those of training."""
    rows = rows_of("code-docstring-function", "query", "positive", "pkg")(source, rng)
    return {split: [row for row in own if row["pkg"] in APACHE] for split, own in rows.items()}


def intents(source: Path, rng: random.Random) -> Mapping[str, Sequence[Row]]:
    return rows_of("home-intents-en", "text", "label")(source, rng)


def organ_systems(source: Path, rng: random.Random) -> dict[str, list[Row]]:
    """Without the systems of which a sample would hold one or two signs: they make no cluster."""
    rows = rows_of("hpo-organ-system", "text", "label", splits=["test"])(source, rng)["test"]
    count = Counter(row["label"] for row in rows)
    return {"test": [row for row in rows if count[row["label"]] >= 20]}


def cranfield(source: Path) -> dict[str, list[Row]]:
    """Without the two documents that are empty. The text begins with the title, so the title is left out."""
    tables = {table: read(source / "cranfield" / f"{table}.jsonl.gz") for table in ("corpus", "queries", "qrels")}
    corpus = [{"id": row["id"], "text": row["text"]} for row in tables["corpus"] if row["text"].strip()]
    known = {row["id"] for row in corpus}
    return {**tables, "corpus": corpus, "qrels": [row for row in tables["qrels"] if row["doc"] in known]}


def german_emoji(source: Path, rng: random.Random) -> dict[str, list[Row]]:
    with open(source / "emoji" / "emoji.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    pairs = [(row["label"], row["captions"].get("de")) for row in rows if row["split"] == "test"]
    # A caption that two emoji share has no translation of its own.
    alone = [{text for text in side if list(side).count(text) == 1} for side in map(list, zip(*pairs, strict=True))]
    kept = [(one, other) for one, other in pairs if other and one in alone[0] and other in alone[1] and one != other]
    return {"test": [{"sentence1": one, "sentence2": other} for one, other in kept]}


def senses(source: Path, rng: random.Random, *, apart: bool = True) -> dict[str, list[Row]]:
    """An example sentence, its sense, and the other senses of the word that it uses.

    Args:
        apart: without senses whose definition the shipped suite's training rows hold.
    """
    examples = {s: read(source / "wordnet-example-sense" / f"{s}.jsonl.gz") for s in ("train", "validation", "test")}
    of_word = defaultdict(set)
    for rows in examples.values():
        for row in rows:
            for word in words(row["positive"]):
                of_word[word].add(row["positive"])
    trained = trained_definitions(source) if apart else set()
    found = []
    for row in examples["test"]:
        used = [word for word in words(row["positive"]) if occurs(word, row["query"])]
        others = sorted(set().union(*(of_word[word] for word in used)) - {row["positive"]})
        chosen = rng.sample(others, min(len(others), CANDIDATES - 1))
        if len(chosen) >= 3 and not {definition(sense) for sense in (row["positive"], *chosen)} & trained:
            found.append({"query": row["query"], "positive": [row["positive"]], "negative": chosen})
    return {"test": found}


def same_sense(source: Path, rng: random.Random, *, apart: bool = True) -> dict[str, list[Row]]:
    """Two sentences that use the same word, in the same sense (1) or in two senses (0); as many of either."""
    rows = read(source / "wordnet-example-sense" / "test.jsonl.gz")
    trained = trained_definitions(source) if apart else set()
    users = defaultdict(list)
    for row in rng.sample(rows, len(rows)):
        if definition(row["positive"]) not in trained:
            for word in words(row["positive"]):
                if occurs(word, row["query"]):
                    users[word].append(row)
    pairs: dict[int, list[Row]] = {0: [], 1: []}
    spent: set[str] = set()
    for word in rng.sample(sorted(users), len(users)):
        for i, one in enumerate(users[word]):
            for other in users[word][i + 1 :]:
                label = int(one["positive"] == other["positive"])
                texts = {one["query"], other["query"]}
                if len(texts) == 2 and not texts & spent and len(pairs[label]) <= len(pairs[1 - label]) + 20:
                    pairs[label].append({"sentence1": one["query"], "sentence2": other["query"], "label": label})
                    spent |= texts
    least = min(map(len, pairs.values()))
    return {"test": rng.sample([*pairs[0][:least], *pairs[1][:least]], 2 * least)}


def trained_definitions(source: Path) -> set[str]:
    """The definitions in the training rows of the shipped suite's task `word`."""
    rows = rows_of("wordnet-definition-word", "query", "positive")(source, random.Random(SEED))
    return {plain(row["query"]) for row in sample(rows["train"], TRAIN, random.Random(SEED))}


def words(sense: str) -> list[str]:
    """haste, hurry: the act of moving hurriedly -> [haste, hurry]"""
    return [word.strip().lower() for word in sense.partition(": ")[0].split(",")]


def definition(sense: str) -> str:
    return plain(sense.partition(": ")[2])


def occurs(word: str, sentence: str) -> bool:
    """As it is, or inflected at its end."""
    return any(
        token == word or (len(word) > 3 and token.startswith(word[:-1]))
        for token in re.findall(r"[a-z'-]+", sentence.lower())
    )


# The suites

TRAIN, ASK = 4000, 400  # pairs: 60 steps of 64, and a test that takes a second or two on one core


def shipped_suite() -> list[Task]:
    """Samples of what may be given away; licences in embeddings/data/NOTICE.md."""
    pair = ("query", "positive")
    some = {"train": TRAIN, "test": ASK, "validation": ASK}
    return [
        Task(
            *("word", "Retrieval", "in-domain", "The word for a definition", WORDNET),
            *(rows_of("wordnet-definition-word", *pair), some),
        ),
        Task(
            *("phenotype", "Retrieval", "in-domain", "The other name of a clinical sign", HPO),
            *(rows_of("hpo-synonym", *pair), some),
        ),
        Task(
            *("code", "Retrieval", "in-domain", "The function for a docstring; tested on other packages"),
            *(("Apache-2.0", "https://pypi.org"), functions, {"train": 1500, "test": 250, "validation": 150}),
        ),
        Task(
            *("intent", "Classification", "in-domain", "What a sentence to a smart home wants done"),
            *(("Apache-2.0", "https://pypi.org/project/home-assistant-intents"), intents),
        ),
        Task(
            *("sentiment", "Regression", "in-domain", "How favourable a sentence of a review is, graded by people"),
            ("MIT", "https://github.com/cjhutto/vaderSentiment"),
            rows_of("graded-sentiment-amazon", "text", "score"),
            {"train": 2000, "test": 600, "validation": 295},
        ),
        Task(
            *("organ-system", "Clustering", "out-of-domain", "Definitions of clinical signs, by organ system", HPO),
            *(organ_systems, {"test": 600}),
        ),
        Task(
            *(
                "sense",
                "Reranking",
                "out-of-domain",
                "The sense that a sentence uses a word in, among the word's senses",
            ),
            *(WORDNET, senses, {"test": 300}),
        ),
        Task(
            *("same-sense", "PairClassification", "out-of-domain", "Whether two sentences use a word in one sense"),
            *(WORDNET, same_sense, {"test": 400}),
        ),
        Task(
            *("emoji-german", "BitextMining", "out-of-domain", "The German caption of an emoji for the English one"),
            *(("MIT", "https://github.com/milesj/emojibase"), german_emoji),
            languages=("eng-Latn", "deu-Latn"),
        ),
    ]


def full_suite() -> list[Task]:
    """Every source in full, under its folder's name; those without training rows, or put aside, are out-of-domain."""

    def task(folder: str, kind: str, description: str, *columns: str, group: str = "in-domain", **more: Any) -> Task:
        rows = more.pop("build", rows_of(folder, *columns))
        name = more.pop("name", folder)
        origin = ("see the source; not for redistribution", folder)
        return Task(name, kind, group, description, origin, rows, whole_test=True, **more)

    pair, labelled, outside = ("query", "positive"), ("text", "label"), "out-of-domain"
    return [
        task("wordnet-definition-word", "Retrieval", "The word for a definition", *pair),
        task("hpo-synonym", "Retrieval", "The other name of a clinical sign", *pair),
        task("hpo-term-definition", "Retrieval", "The definition of a clinical sign", *pair),
        task("debian-synopsis-description", "Retrieval", "The description for a package's synopsis", *pair),
        task("code-docstring-function", "Retrieval", "The function for a docstring", *pair),
        task("debian-section", "Classification", "The section that a package is in", *labelled),
        task("trec-question-type", "Classification", "What a question asks for", *labelled),
        task("banking77", "Classification", "What a bank's customer wants", *labelled),
        task("wordnet-supersense", "Classification", "What kind of thing a definition defines", *labelled),
        task("graded-sentiment-amazon", "Regression", "How favourable a sentence is", "text", "score"),
        task("stsb-en", "STS", "How alike two sentences are in meaning", "sentence1", "sentence2", "score"),
        task("home-intents-en", "Classification", "What a sentence to a smart home wants", *labelled, group=outside),
        task("hpo-organ-system", "Classification", "The organ system of a clinical sign", *labelled, group=outside),
        task(
            *("hpo-organ-system", "Clustering", "Definitions of clinical signs, by organ system"),
            *labelled,
            group=outside,
            name="hpo-organ-system-clusters",
            build=rows_of("hpo-organ-system", *labelled, splits=["test"]),
        ),
        task("wordnet-example-sense", "Retrieval", "The sense of a word in a sentence", *pair, group=outside),
        task(
            *("cranfield", "Retrieval", "Abstracts of aerodynamics for a question"),
            group=outside,
            build=lambda source, rng: {},
            tables=cranfield,
        ),
        task(
            *(
                "wordnet-example-sense",
                "Reranking",
                "The sense that a sentence uses a word in, among the word's senses",
            ),
            group=outside,
            name="wordnet-senses",
            build=lambda source, rng: senses(source, rng, apart=False),
        ),
        task(
            *("wordnet-example-sense", "PairClassification", "Whether two sentences use a word in one sense"),
            group=outside,
            name="wordnet-same-sense",
            build=lambda source, rng: same_sense(source, rng, apart=False),
        ),
        task(
            *("emoji", "BitextMining", "The German caption of an emoji for the English one"),
            group=outside,
            name="emoji-german",
            build=german_emoji,
            languages=("eng-Latn", "deu-Latn"),
        ),
    ]


if __name__ == "__main__":
    main()
