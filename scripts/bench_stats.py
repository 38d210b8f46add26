"""Times `cuvee stats` against the model's own passes, in one run: same model, texts and micro-batches.

    python scripts/bench_stats.py [--works words code …] [--examples 64] [--repeats 3] [--device cuda] [--dtype bfloat16]

Works, on texts of the suite that ships:

    words, code             the demo model, each query with 8 candidates; short texts and long ones
    pairs                   the same with 2 candidates
    classes-2, classes-20   the demo model's encoder under a head of so many classes, short texts
    lm                      a Llama-shaped model with random weights, 30 million parameters, random tokens
    moments, gram           what the demo model's linear layers read

The floor of Fisher is a bare forward of the same texts and as many backwards, to all parameters, as an example has
choices; nothing is kept. That of moments and of Gram matrices is a bare forward. Both take turns micro-batch by
micro-batch; printed are medians over the repeats, in examples or texts a second. The target is 2 x the floor's time for
Fisher and 1.3 x for moments. Prints one table, writes one JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin for a busy core slow all of them down
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TOKENS = 2048  # of a micro-batch, as `cuvee stats` has it
TASKS = {"words": "word", "pairs": "word", "code": "code", "classes-2": "word", "classes-20": "word"}
WORKS = (*TASKS, "lm", "moments", "gram")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=WORKS)
    parser.add_argument("--examples", type=int, default=64, help="of each work; of `code` a quarter")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("bench_stats.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    results = []
    print("| work | examples | choices | tokens an example | floor /s | cuvee /s | time ÷ floor | CPU time ÷ floor |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for work in options.works:
        found = {"work": work, **measured(work, options)}
        results.append(found)
        print(line(found), flush=True)
    content = {
        "examples": options.examples,
        "device": options.device,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "results": results,
    }
    options.out.write_text(json.dumps(content, indent=2) + "\n")


def measured(work: str, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both, each in wall and CPU seconds."""
    if work in ("moments", "gram"):
        return measured_inputs(work, options)
    network, batches = fisher_work(work, options)
    from merging.statistics.fisher import Fisher

    choices = len(batches[0].choices(network.forward).weights[0])
    network.module.requires_grad_(True)
    with Fisher(network.module, network.forward) as fisher:
        fisher.add(batches[0])  # with its check
        alone = len(fisher.alone)

    def floor(batch: Any) -> None:
        bare(network, batch, choices)

    with Fisher(network.module, network.forward, alone=frozenset()) as fisher:
        parameters = list(network.module.parameters())

        def needing(function: Callable[[Any], None], needed: bool) -> Callable[[Any], None]:
            def run(batch: Any) -> None:
                for own in parameters:
                    own.requires_grad_(needed)
                function(batch)

            return run

        rounds = take_turns(needing(floor, True), needing(fisher.add, False), batches, options)
    tokens = sum(int(batch.features["attention_mask"].sum()) for batch in batches)
    count = sum(batch.examples for batch in batches)
    return {"count": count, "choices": choices, "tokens": tokens / count, "alone": alone, "rounds": rounds}


def bare(network: Any, batch: Any, choices: int) -> None:
    """One forward, and as many backwards as there are choices."""
    from merging.statistics import heads

    if batch.head == "embedding":
        queries = {key: value[: batch.examples] for key, value in batch.features.items()}
        candidates = {key: value[batch.examples :] for key, value in batch.features.items()}
        first = network.forward(heads.trimmed(queries)).repeat_interleave(batch.candidates, 0)
        second = network.forward(heads.trimmed(candidates))
        values = heads.over_candidates(first, second, batch.candidates, batch.temperature).log_p()
    else:
        values = batch.choices(network.forward).log_p()
    for choice in range(choices):
        values[:, choice].sum().backward(retain_graph=choice + 1 < choices)
    network.module.zero_grad(set_to_none=True)


def measured_inputs(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from embeddings.quickstart import demo_model
    from merging.statistics.inputs import InputSums
    from merging.statistics.job import micro_batches
    from merging.statistics.network import open_network

    network = open_network(str(demo_model()), device=options.device, dtype=options.dtype)
    tokens = network.read([row["positive"] for row in rows("code", options.examples)], "document")
    plan = micro_batches([len(own) for own in tokens], [1] * len(tokens), 2 * TOKENS)
    batches = [network.features([tokens[place] for place in places]) for places in plan]

    def forward(features: Any) -> None:
        with torch.no_grad():
            network.forward(features)

    def once(features: Any) -> None:
        with sums:  # hooks only while it is its turn
            sums.add(features)

    sums = InputSums(network, kind)
    rounds = take_turns(forward, once, batches, options)
    count = sum(map(len, plan))
    return {"count": count, "choices": 0, "tokens": sum(map(len, tokens)) / count, "rounds": rounds}


def take_turns(
    floor: Callable[[Any], None], ours: Callable[[Any], None], batches: Sequence[Any], options: argparse.Namespace
) -> list[dict[str, list[float]]]:
    """By round and peer: wall and CPU seconds over all micro-batches. Who begins alternates."""
    import torch

    def seconds(peer: Callable[[Any], None], batch: Any) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        peer(batch)
        if options.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu

    peers = {"floor": floor, "cuvee": ours}
    for peer in peers.values():
        peer(batches[-1])
    rounds = []
    for repeat in range(options.repeats):
        spent = {name: [0.0, 0.0] for name in peers}
        for number, batch in enumerate(batches):
            for name in sorted(peers, reverse=bool((repeat + number) % 2)):
                for place, own in enumerate(seconds(peers[name], batch)):
                    spent[name][place] += own
        rounds.append(spent)
    return rounds


def fisher_work(work: str, options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The opened model and its micro-batches."""
    import torch

    from embeddings.quickstart import demo_model
    from merging.statistics.heads import Batch
    from merging.statistics.job import micro_batches
    from merging.statistics.network import open_network

    how = {"device": options.device, "dtype": options.dtype}
    count = max(1, options.examples // (4 if work == "code" else 1))  # long texts
    if work == "lm":
        with tempfile.TemporaryDirectory() as folder:
            return language_model(Path(folder), how, options)
    found = rows(TASKS[work], 8 * count)
    if work.startswith("classes"):
        with tempfile.TemporaryDirectory() as folder:
            network = classifier(demo_model(), Path(folder), int(work.partition("-")[2]), how)
        tokens = network.read([row["query"] for row in found[:count]])
        plan = micro_batches([len(own) for own in tokens], [1] * count, TOKENS)
        return network, [
            Batch("classification", network.features([tokens[place] for place in places])) for places in plan
        ]
    candidates = 2 if work == "pairs" else 8
    network = open_network(str(demo_model()), **how)
    queries = network.read([row["query"] for row in found[:count]], "query")
    documents = network.read([row["positive"] for row in found], "document")
    own = [[documents[(i + 31 * j) % len(documents)] for j in range(candidates)] for i in range(count)]
    lengths = [max(map(len, [query, *mine])) for query, mine in zip(queries, own, strict=True)]
    plan = micro_batches(lengths, [2 * candidates] * count, TOKENS)
    torch.manual_seed(0)
    return network, [
        Batch(
            "embedding",
            network.features(
                [*(queries[place] for place in places), *(text for place in places for text in own[place])]
            ),
            candidates=candidates,
        )
        for places in plan
    ]


def rows(task: str, count: int) -> list[dict[str, str]]:
    """Of a retrieval task's train split, again from the start where it is too small."""
    import embeddings

    file = Path(embeddings.__file__).parent / "data" / "suite" / task / "train.jsonl.gz"
    with gzip.open(file, "rt") as stream:
        found = [json.loads(text) for text in stream]
    return [found[i % len(found)] for i in range(count)]


def classifier(model: Path, folder: Path, labels: int, how: dict[str, Any]) -> Any:
    import torch
    import transformers

    from merging.loading import only_our_words
    from merging.statistics.network import open_network

    torch.manual_seed(0)
    with only_our_words():
        made = transformers.AutoModelForSequenceClassification.from_pretrained(str(model), num_labels=labels)
        made.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(str(model)).save_pretrained(folder)
    return open_network(str(folder), **how)


def language_model(folder: Path, how: dict[str, Any], options: argparse.Namespace) -> tuple[Any, list[Any]]:
    import torch
    import transformers

    from merging.statistics.heads import Batch
    from merging.statistics.network import Network

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    module = transformers.LlamaForCausalLM(config).to(how["device"], getattr(torch, how["dtype"])).eval()
    names = {name: name for name, _ in module.named_parameters()}
    network = Network(module, None, "lm", names, 512, **how)
    size, width = TOKENS // 128, 128
    batches = []
    for first in range(0, options.examples, size):
        ids = torch.randint(0, 16384, (min(size, options.examples - first), width), device=how["device"])
        features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batches.append(Batch("lm", features, seeds=tuple(range(first, first + len(ids)))))
    return network, batches


def line(found: dict[str, Any]) -> str:
    count, rounds = found["count"], found["rounds"]
    rate = {name: statistics.median(count / each[name][0] for each in rounds) for name in ("floor", "cuvee")}
    ratio = [statistics.median(each["cuvee"][own] / each["floor"][own] for each in rounds) for own in (0, 1)]
    return (
        f"| {found['work']} | {count} | {found['choices'] or '–'} | {found['tokens']:.0f} "
        f"| {rate['floor']:.1f} | {rate['cuvee']:.1f} | {ratio[0]:.2f} | {ratio[1]:.2f} |"
    )


if __name__ == "__main__":
    main()
