"""Times the objectives of `cuvee pretrain` against the same model's plain causal training, in one run, on the same rows.

    python scripts/bench_pretrain.py [--works text images] [--model FOLDER] [--rows 16] [--repeats 5] [--device cuda] …

    causal             the floor: transformers' own forward with `labels`, [source][EOS][target] padded on the right, all
                       tokens predicted
    warm-up, bridge, strict, embedding, LLM-QL, RetroMAE
                       the objectives, from collated batches to gradients

Work `text` reads pairs of the suite that ships, with --model or a Llama-shaped model of random weights (SmolLM2-135M's
width, fewer layers) and the demo model's tokenizer; work `images` reads noise of 112 × 112 pixels with captions, with a
Qwen2-VL-shaped model of random weights. All peers include the step of AdamW. They take turns within a repeat; printed are
medians: tokens a second, without padding, of each peer's own sequences (RetroMAE and the embedding bridge read some twice),
its time a token over the floor's, by the clock and by the CPU, and the peak of memory above what the weights and AdamW's
state take, over the floor's. The target is 1.3 x the time. Prints one table, writes one JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from embeddings.reconstruction.batch import Batch
    from embeddings.reconstruction.example import Example
    from embeddings.reconstruction.model import Reconstructor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin for a busy core slow all of them down
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WORKS = ("text", "images")
_SIDE = 112  # pixels of an image
_NO_LABEL = -100  # transformers'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=WORKS)
    parser.add_argument("--model", help="a causal language model, for `text`")
    parser.add_argument("--layers", type=int, default=6, help="of the model of random weights")
    parser.add_argument("--task", default="code", help="of the suite that ships")
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of either side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="bfloat16 is autocast")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("bench_pretrain.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    from merging.loading import only_our_words

    if options.threads:
        torch.set_num_threads(options.threads)
    results: dict[str, Any] = {}
    print("| work | peer | tokens a step | tokens/s | time ÷ floor | CPU time ÷ floor | memory ÷ floor |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as scratch, only_our_words():
        for work in options.works:
            results[work] = measured(work, options, Path(scratch))
            for line in table(work, results[work]):
                print(line, flush=True)
    told = {key: value for key, value in vars(options).items() if key != "out"}
    options.out.write_text(json.dumps({"options": told, "results": results}, indent=2) + "\n")


def measured(work: str, options: argparse.Namespace, scratch: Path) -> dict[str, list[dict[str, float]]]:
    """By peer, what each repeat took; the first round, which warms up, is left out."""
    from embeddings.reconstruction.cocoa import Bridge, WarmUp
    from embeddings.reconstruction.llm_ql import QueryLikelihood
    from embeddings.reconstruction.model import open_reconstructor
    from embeddings.reconstruction.objective import Objective
    from embeddings.reconstruction.retromae import RetroMAE
    from embeddings.training.config import ModelSettings
    from embeddings.training.optimizer import adamw

    path = options.model if work == "text" and options.model else str(random_model(work, options, scratch / work))
    model = open_reconstructor(ModelSettings(path, dtype=options.dtype), device=options.device)
    rows = examples(work, model, options, scratch)
    reader = model.reader({"source": options.max_length, "target": options.max_length})
    objectives: dict[str, Objective] = {
        "warm-up": WarmUp(),
        "bridge": Bridge(),
        "strict": Bridge(eos_sees_b=False),
        "embedding": Bridge(bridge="embedding"),
    }
    if work == "text":
        objectives |= {"LLM-QL": QueryLikelihood(), "RetroMAE": RetroMAE()}
    batches = {name: each.collate(rows, reader, np.random.default_rng(0)) for name, each in objectives.items()}
    batches["causal"] = plain(replace(Bridge(), mask=1.0).collate(rows, reader, np.random.default_rng(0)))
    steps: dict[str, Callable[[], Any]] = {"causal": lambda: causal_loss(model, batches["causal"])}
    steps |= {
        name: lambda name=name, each=each: each.loss(model, batches[name].to(model.device)).loss  # type: ignore[misc]
        for name, each in objectives.items()
    }
    optimizer = adamw(model, 1e-5, 0.01)
    model.module.train()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for repeat in range(options.repeats + 1):
        for name in sorted(steps, reverse=repeat % 2 == 1):
            took = one_step(steps[name], optimizer, options.device)
            if repeat:
                found[name].append({**took, "tokens": batches[name].counts.tokens})
    return found


def one_step(loss: Callable[[], Any], optimizer: Any, device: str) -> dict[str, float]:
    import torch

    before = reset_peak(device)
    cpu, wall = time.process_time(), time.perf_counter()
    loss().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device != "cpu":
        torch.cuda.synchronize()
    took = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return {**took, "bytes": peak(device) - before}


def reset_peak(device: str) -> int:
    """What is in use; the peak begins anew."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: str) -> int:
    import torch

    return int(torch.cuda.max_memory_allocated()) if device != "cpu" else _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


# ---- the floor ----


def plain(batch: Batch) -> Batch:
    """The rows as they are, nothing masked."""
    ids = batch.ids.clone()
    ids[batch.places[:, 0], batch.places[:, 1] + 1] = batch.labels
    return replace(batch, ids=ids, pattern="causal")


def causal_loss(model: Reconstructor, batch: Batch) -> Any:
    """As anyone trains it: transformers makes mask and positions, and predicts every token but padding."""
    import torch

    own = batch.to(model.device)
    real = own.segments != 0
    images: dict[str, Any] = {}
    if own.images is not None:
        images = {**own.images.arguments(), "mm_token_type_ids": (own.ids == model.processor.image_id).int()}
    half = model.dtype == "bfloat16"
    with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
        labels = torch.where(real, own.ids, _NO_LABEL)
        return model.module(input_ids=own.ids, attention_mask=real.int(), labels=labels, use_cache=False, **images).loss


# ---- models and rows ----


def random_model(work: str, options: argparse.Namespace, folder: Path) -> Path:
    """A model of random weights with the demo model's words."""
    import torch
    import transformers

    from embeddings.quickstart import demo_model

    words = transformers.AutoTokenizer.from_pretrained(str(demo_model()))
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words.add_special_tokens({"eos_token": "[SEP]", "additional_special_tokens": marks})
    text: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": options.layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
    }
    torch.manual_seed(0)
    if work == "text":
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**text)).save_pretrained(folder)
    else:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        ids = words.convert_tokens_to_ids(marks)
        config = transformers.Qwen2VLConfig(
            text_config={
                **text,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
            },
            vision_config={"depth": 6, "embed_dim": 384, "hidden_size": 576, "num_heads": 6, "mlp_ratio": 4},
            vision_start_token_id=ids[0],
            vision_end_token_id=ids[1],
            image_token_id=ids[2],
            video_token_id=ids[3],
            tie_word_embeddings=True,
        )
        transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
        Qwen2VLImageProcessorPil(size={"shortest_edge": _SIDE**2, "longest_edge": _SIDE**2}).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def examples(work: str, model: Reconstructor, options: argparse.Namespace, scratch: Path) -> list[Example]:
    from embeddings.evaluation.suite import load
    from embeddings.reconstruction.example import Example

    task = next(each for each in load() if each.name == options.task)
    rows = task.read("train")[: options.rows]
    reader = model.reader({"source": options.max_length, "target": options.max_length})
    texts = [row["query"] for row in rows]
    sources, targets = reader.ids(texts), reader.ids([row["positive"] for row in rows], "target")
    if work == "text":
        return [
            Example(source, target, text=text) for source, target, text in zip(sources, targets, texts, strict=True)
        ]
    return [
        Example([], target, image=noise(scratch / f"{number}.png", number)) for number, target in enumerate(targets)
    ]


def noise(file: Path, seed: int) -> Path:
    from PIL import Image

    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)).save(file)
    return file


def table(work: str, results: dict[str, list[dict[str, float]]]) -> list[str]:
    def median(name: str, what: str) -> float:
        return statistics.median(took[what] / (took["tokens"] if what != "bytes" else 1) for took in results[name])

    lines = []
    for name, own in results.items():
        rate = 1 / median(name, "seconds")
        over = [median(name, what) / median("causal", what) for what in ("seconds", "cpu_seconds", "bytes")]
        cells = " | ".join(f"{value:.2f}" for value in over)
        lines.append(f"| {work} | {name} | {own[0]['tokens']:.0f} | {rate:.0f} | {cells} |")
    return lines


if __name__ == "__main__":
    main()
