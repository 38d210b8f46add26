"""Builds the data that `cuvee quickstart` ships, embeddings/data/*/*.jsonl.gz, from folders of the full tasks.

    python scripts/build_demo_data.py ../shared/data

Each full task is a folder with train.jsonl.gz and test.jsonl.gz, rows {query, positive} or {text, label}. The samples are
drawn with a fixed seed and the archives carry no time stamp, so the same source gives the same bytes.
Sources and licences: embeddings/data/README.md and NOTICE.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import defaultdict
from pathlib import Path

Row = dict[str, str]

SEED = 20
TRAIN, TEST = 4000, 400  # rows at most: 60 steps of 64 pairs, and a test that takes a second or two on one core
TASKS = {"word": "wordnet-definition-word", "phenotype": "hpo-synonym", "intent": "home-intents-en"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder that holds " + ", ".join(TASKS.values()))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "embeddings" / "data")
    arguments = parser.parse_args()
    for name, folder in TASKS.items():
        rng = random.Random(SEED)
        train, test = (read(arguments.source / folder / f"{split}.jsonl.gz") for split in ("train", "test"))
        if "label" in train[0]:
            train = with_positives(train, rng)
            test = [{"query": row["text"], "label": row["label"]} for row in test]
        for split, rows, size in (("train", train, TRAIN), ("test", test, TEST)):
            file = arguments.out / name / f"{split}.jsonl.gz"
            count = write(file, sample(rows, size, rng))
            print(f"{file}: {count} rows, {file.stat().st_size / 1000:.0f} kB")


def with_positives(rows: list[Row], rng: random.Random) -> list[Row]:
    """{text, label} -> {query, positive, label}: the positive is another text with the same label."""
    texts = defaultdict(list)
    for row in rows:
        texts[row["label"]].append(row["text"])
    pairs = []
    for row in rows:
        others = [text for text in texts[row["label"]] if text != row["text"]]
        if others:
            pairs.append({"query": row["text"], "positive": rng.choice(others), "label": row["label"]})
    return pairs


def sample(rows: list[Row], size: int, rng: random.Random) -> list[Row]:
    """At most `size` rows in random order; of rows with the same query or positive only one, where that is what to find."""
    chosen, seen = [], set()
    for row in rng.sample(rows, len(rows)):
        texts = {row["query"]} if "label" in row else {row["query"], row["positive"]}
        if not texts & seen:
            chosen.append({key: row[key] for key in ("query", "positive", "label") if key in row})
            seen |= texts
    return chosen[:size]


def read(file: Path) -> list[Row]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(file: Path, rows: list[Row]) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_bytes(gzip.compress(lines.encode(), mtime=0))
    return len(rows)


if __name__ == "__main__":
    main()
