"""Images and their captions: does pre-training by reconstruction help an image find its caption, and a caption its image?

    python scripts/experiments/emoji.py --data EMOJI --out RUN [--seeds 0 1 2] …

EMOJI holds emoji.jsonl (`image`, `label`, `tags`, `split`) and the images that it names, 64 × 64 pixels. Of its training rows
a Qwen2-VL-shaped model learns that is made from random weights, as small as two cores want it (2 M parameters), with a
tokenizer of its own: no trained vision–language model was at hand. All arms end with the same contrastive training of image
against caption through EOS, both ways, bidirectional attention:

    nothing            … from random weights
    warm-up            … after CoCoA's stage 1: masked words and masked patches
    CoCoA              … after stage 1 and stage 2: [image][EOS][caption] and [label][EOS][tags]
    CoCoA, strict      … with `eos_sees_b: false`
    CoCoA, embedding   … with `bridge: embedding`; not among the default arms
    nothing, longer    … from random weights, with as many contrastive steps more as the stages had: the same cost

nDCG@10 on the held-out rows, whose concepts are not among the training rows: image → caption and caption → image in a pool
of all of them. Killed and run again, it goes on with the next arm. Writes RUN/emoji.md and RUN/emoji.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from boom_lab import commit, read
from boom_table import markdown, points

from embeddings.reconstruction.cocoa import Bridge, WarmUp
from embeddings.reconstruction.example import Example
from embeddings.reconstruction.measure import embed
from embeddings.reconstruction.metrics import alignment, effective_rank, uniformity
from embeddings.reconstruction.model import Reconstructor, open_reconstructor
from embeddings.reconstruction.objective import Objective
from embeddings.reconstruction.reader import Reader
from embeddings.training.config import ModelSettings
from embeddings.training.optimizer import rate
from merging.loading import only_our_words, wait_passively
from merging.output import write_whole

ARMS: Mapping[str, tuple[Objective, ...]] = {
    "nothing": (),
    "nothing, longer": (),
    "warm-up": (WarmUp(),),
    "CoCoA": (WarmUp(), Bridge()),
    "CoCoA, strict": (WarmUp(), Bridge(eos_sees_b=False)),
    "CoCoA, embedding": (WarmUp(), Bridge(bridge="embedding")),
}
WAYS = ("image → caption", "caption → image")
_SPECIAL = ("<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|mask|>")
_TEXT = {
    "hidden_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "intermediate_size": 320,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
}
_VISION = {
    "depth": 3,
    "embed_dim": 128,
    "hidden_size": 160,
    "num_heads": 4,
    "mlp_ratio": 2,
    "patch_size": 16,  # 16 patches an image; without a merge each is a token
    "spatial_merge_size": 1,
}
_SIDE = 64  # pixels
_WORDS = 2000  # of the tokenizer
_LONGEST = 24  # tokens of a caption


@dataclass(frozen=True)
class Emoji:
    """An image, what it is called, and what is said of it."""

    image: Path
    label: str
    tags: tuple[str, ...]

    @property
    def caption(self) -> str:
        return f"{self.label}: {', '.join(self.tags)}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    wait_passively()
    import torch

    torch.set_num_threads(options.threads)
    drawn = options.out / "images"
    train, test = (emoji(options.data, split, options.limit, drawn) for split in ("train", "test"))
    records = []
    with only_our_words():
        for seed in options.seeds:
            for arm in options.arms:
                file = options.out / "records" / f"{arm.replace(', ', '-')}-seed{seed}.json"
                if not file.is_file():
                    write_whole(file, json.dumps(record(arm, seed, train, test, options), indent=1) + "\n")
                records.append(read(file))
    seed = options.seeds[0]
    model = new_model(options.out / f"seed{seed}" / "random", train, seed, options.device)
    text = report(records, options, len(train), len(test), commonest(model, train, test))
    write_whole(options.out / "emoji.json", json.dumps(records, indent=1) + "\n")
    write_whole(options.out / "emoji.md", text)
    print(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with emoji.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the experiment's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS)[:-1], choices=list(ARMS))
    parser.add_argument("--warm-up-steps", type=int, default=80)
    parser.add_argument("--bridge-steps", type=int, default=120)
    parser.add_argument("--contrastive-steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--limit", type=int, help="rows of each split, for a try")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


def emoji(folder: Path, split: str, limit: int | None, out: Path) -> list[Emoji]:
    """The rows of a split; their images on white, where they are transparent, below `out`."""
    from PIL import Image

    with (folder / "emoji.jsonl").open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["split"] == split][:limit]
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for row in rows:
        own = out / Path(row["image"]).name
        if not own.is_file():
            with Image.open(folder / row["image"]) as image:
                drawn = image.convert("RGBA")
                Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB").save(own)
        found.append(Emoji(own, row["label"], tuple(row["tags"])))
    return found


# ---- one arm ----


def record(arm: str, seed: int, train: list[Emoji], test: list[Emoji], options: argparse.Namespace) -> dict[str, Any]:
    """Scores of one arm, and what it cost."""
    began = time.process_time()
    model = new_model(options.out / f"seed{seed}" / "random", train, seed, options.device)
    found: dict[str, Any] = {"arm": arm, "seed": seed, "loss": {}, "parameters": parameters(model)}
    stages, extra = ARMS[arm], 0
    steps = {"warm_up": options.warm_up_steps, "bridge": options.bridge_steps}
    for objective in stages:
        warm = options.out / f"seed{seed}" / objective.name  # the same for all arms that have it
        if (warm / "loss.json").is_file():
            model = open_reconstructor(ModelSettings(str(warm)), device=options.device)
            found["loss"][objective.name] = read(warm / "loss.json")
            continue
        examples = pairs(model, train) if objective.name == "bridge" else images(model, train)
        loss = found["loss"][objective.name] = reconstruct(
            model, objective, examples, steps[objective.name], seed, options
        )
        if objective.name == "warm_up":
            model.save_language_model(warm)
            write_whole(warm / "loss.json", json.dumps(loss))
    if stages and stages[-1].name == "bridge":
        found["told"] = told(model, test)
    found["before"] = scores(model, test)
    if arm == "nothing, longer":
        extra = sum(steps.values())
    found["loss"]["contrastive"] = contrast(model, train, options.contrastive_steps + extra, seed, options)
    found["after"] = scores(model, test)
    found["cpu_seconds"] = round(time.process_time() - began, 1)
    print(json.dumps({key: found[key] for key in ("arm", "seed", "loss", "after", "cpu_seconds")}), flush=True)
    return found


def new_model(folder: Path, train: Sequence[Emoji], seed: int, device: str) -> Reconstructor:
    """A model of random weights, with a tokenizer that the captions made."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    if not (folder / "model.safetensors").is_file():
        own = Tokenizer(models.BPE())
        own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        own.train_from_iterator(
            (row.caption for row in train),
            trainers.BpeTrainer(
                vocab_size=_WORDS,
                special_tokens=list(_SPECIAL),
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        end = _SPECIAL[0]
        words = transformers.PreTrainedTokenizerFast(
            tokenizer_object=own, eos_token=end, pad_token=end, mask_token=_SPECIAL[-1]
        )
        ids = words.convert_tokens_to_ids(list(_SPECIAL))
        config = transformers.Qwen2VLConfig(
            text_config={**_TEXT, "vocab_size": len(words), "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None},
            vision_config=_VISION,
            vision_start_token_id=ids[1],
            vision_end_token_id=ids[2],
            image_token_id=ids[3],
            video_token_id=ids[4],
            tie_word_embeddings=True,
        )
        torch.manual_seed(seed)
        transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
        words.save_pretrained(folder)
        size = {"shortest_edge": _SIDE**2, "longest_edge": _SIDE**2}
        patches = {"patch_size": _VISION["patch_size"], "merge_size": _VISION["spatial_merge_size"]}
        Qwen2VLImageProcessorPil(**patches, size=size).save_pretrained(folder)
    return open_reconstructor(ModelSettings(str(folder)), device=device, seed=seed)


def reader_of(model: Reconstructor) -> Reader:
    return model.reader({"source": _LONGEST, "target": _LONGEST})


def parameters(model: Reconstructor) -> int:
    return sum(parameter.numel() for parameter in model.module.parameters())


# ---- training ----


def images(model: Reconstructor, rows: Sequence[Emoji]) -> list[Example]:
    """Image and caption as one sequence."""
    ids = reader_of(model).ids([row.caption for row in rows], "target")
    return [Example([], caption, image=row.image) for row, caption in zip(rows, ids, strict=True)]


def pairs(model: Reconstructor, rows: Sequence[Emoji]) -> list[Example]:
    """Image and caption, then label and tags."""
    reader = reader_of(model)
    labels = reader.ids([row.label for row in rows])
    tags = reader.ids([", ".join(row.tags) for row in rows], "target")
    texts = [Example(label, own) for label, own in zip(labels, tags, strict=True) if own]
    return [*images(model, rows), *texts]


def batches(count: int, size: int, steps: int, draw: np.random.Generator) -> Iterator[list[int]]:
    """Rows of each step: all of them in a new order, again and again."""
    order: list[int] = []
    for _ in range(steps):
        if len(order) < size:
            order = draw.permutation(count).tolist()
        yield order[:size]
        del order[:size]


def trained(model: Reconstructor, losses: Iterator[Any], steps: int, options: argparse.Namespace) -> float:
    """The mean loss of the last twenty steps."""
    import torch

    model.module.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    last: list[float] = []
    for step, loss in enumerate(losses):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, options.learning_rate, 0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
        optimizer.step()
        last = [*last, float(loss.detach())][-20:]
    model.module.eval()
    return round(statistics.fmean(last), 4)


def reconstruct(
    model: Reconstructor,
    objective: Objective,
    examples: Sequence[Example],
    steps: int,
    seed: int,
    options: argparse.Namespace,
) -> float:
    reader, draw = reader_of(model), np.random.default_rng([seed, 1])

    def losses() -> Iterator[Any]:
        for rows in batches(len(examples), options.batch, steps, draw):
            batch = objective.collate([examples[row] for row in rows], reader, draw).to(model.device)
            yield objective.loss(model, batch).loss

    return trained(model, losses(), steps, options)


def contrast(model: Reconstructor, train: Sequence[Emoji], steps: int, seed: int, options: argparse.Namespace) -> float:
    """Image against caption, both ways, by all others of the batch."""
    import torch

    draw = np.random.default_rng([seed, 2])

    def losses() -> Iterator[Any]:
        for rows in batches(len(train), options.batch, steps, draw):
            own = [train[row] for row in rows]
            first, second = vectors(model, own, of="image"), vectors(model, own, of="caption")
            likeness = first @ second.T / options.temperature  # (rows, rows)
            places = torch.arange(len(own), device=likeness.device)
            loss = torch.nn.functional.cross_entropy
            yield (loss(likeness, places) + loss(likeness.T, places)) / 2

    return trained(model, losses(), steps, options)


# ---- scores ----


def vectors(model: Reconstructor, rows: Sequence[Emoji], of: str) -> Any:
    """(rows, width): EOS behind each image, or behind each caption; of length one."""
    reader = reader_of(model)
    if of == "image":
        examples = [Example([], image=row.image) for row in rows]
    else:
        examples = [Example(ids) for ids in reader.ids([row.caption for row in rows])]
    return embed(model, examples, reader, "bidirectional")


def scores(model: Reconstructor, rows: Sequence[Emoji]) -> dict[str, float]:
    """nDCG@10 both ways, and how the embeddings spread."""
    import torch

    with torch.inference_mode():
        sides = [vectors(model, rows, of).cpu() for of in ("image", "caption")]
    likeness = (sides[0] @ sides[1].T).numpy()
    return {
        "image → caption": ndcg(likeness),
        "caption → image": ndcg(likeness.T),
        "rank": round(effective_rank(torch.cat(sides), centred=True), 1),
        "alignment": round(alignment(*sides), 4),
        "uniformity": round(uniformity(torch.cat(sides)), 4),
    }


def ndcg(likeness: Any) -> float:
    """Mean nDCG@10, the right one of row i being column i; of equals, the right one is the last."""
    right = np.diag(likeness)[:, None]
    place = (likeness >= right).sum(1)  # from 1
    return round(statistics.fmean(1 / math.log2(1 + int(own)) if own <= 10 else 0.0 for own in place), 5)


def told(model: Reconstructor, rows: Sequence[Emoji]) -> dict[str, float]:
    """What is told of a held-out caption by EOS alone, all of it masked: share of its tokens, and loss in nats."""
    import torch

    objective, reader = Bridge(mask=1.0, eos_sees_b=False), reader_of(model)
    right = loss = count = 0.0
    with torch.inference_mode():
        examples = images(model, rows)
        for start in range(0, len(examples), 64):
            batch = objective.collate(examples[start : start + 64], reader, np.random.default_rng(0)).to(model.device)
            outcome = objective.loss(model, batch)
            right += float(outcome.numbers["accuracy"]) * outcome.predictions
            loss += float(outcome.loss) * outcome.predictions
            count += outcome.predictions
    return {"accuracy": round(right / count, 5), "loss": round(loss / count, 4)}


def commonest(model: Reconstructor, train: Sequence[Emoji], test: Sequence[Emoji]) -> float:
    """The share of the held-out captions' tokens that is told by whatever is the most frequent at each place, unseen."""
    reader = reader_of(model)
    seen, asked = (reader.ids([row.caption for row in rows], "target") for rows in (train, test))
    right = 0
    for place in range(max(map(len, asked))):
        tokens = Counter(ids[place] for ids in seen if len(ids) > place)
        first = tokens.most_common(1)[0][0] if tokens else None
        right += sum(ids[place] == first for ids in asked if len(ids) > place)
    return right / sum(map(len, asked))


# ---- report ----


def report(
    records: Sequence[Mapping[str, Any]], options: argparse.Namespace, train: int, test: int, common: float
) -> str:
    head = ["arm", *WAYS, "mean", "mean before contrast", "words told by EOS", "rank"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for arm in options.arms:
        own = [each for each in records if each["arm"] == arm]
        before, after = (
            [statistics.fmean(each[when][way] for way in WAYS) for each in own] for when in ("before", "after")
        )
        cells = [points([each["after"][way] for each in own]) for way in WAYS]
        words = points([each["told"]["accuracy"] for each in own if "told" in each]) or "–"
        rank = statistics.fmean(each["after"]["rank"] for each in own)
        lines.append([arm, *cells, points(after), points(before), words, f"{rank:.0f}"])
    minutes = sum(each["cpu_seconds"] for each in records) / 60
    said = (
        f"{train} training rows, {test} held out. nDCG@10 and words told in points of 100: mean ± standard deviation of "
        f"{len(options.seeds)} seeds. {records[0]['parameters'] / 1e6:.1f} M parameters. Steps of {options.batch} rows: "
        f"warm-up {options.warm_up_steps}, bridge {options.bridge_steps}, contrast {options.contrastive_steps}; learning "
        f"rate {options.learning_rate:g}. Words told by the commonest at each place: {100 * common:.2f}. "
        f"{minutes:.0f} CPU minutes. Commit {commit()}."
    )
    return f"{said}\n\n{markdown(lines)}"


if __name__ == "__main__":
    main()
