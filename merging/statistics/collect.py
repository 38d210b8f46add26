"""From a model and a few examples to a folder of statistics: micro-batches of like length, summed, saved on the way."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merging import lineage
from merging.output import refuse_existing
from merging.setting import did_you_mean, quoted
from merging.sources import ModelRef
from merging.statistics.calibration import Calibration, Example, draw
from merging.statistics.folder import KINDS, StatsError, Values, fingerprint, write_statistics
from merging.statistics.network import HEADS, Network, Tokens, head_of, open_network
from merging.statistics.resume import Partial, interrupts
from merging.views import View

if TYPE_CHECKING:
    from torch import Tensor

    from merging.progress import Work

_TOKENS = {"moments": 4096, "gram": 4096, "fisher": 2048}  # of a micro-batch at most
_LARGE = 10**9  # parameters, from which on sums are compensated float32 instead of float64
Note = Callable[[str], None]


def collect(
    model: str | os.PathLike[str] | ModelRef,
    data: str | Path | Sequence[str | Path],
    kind: str,
    out: str | Path,
    *,
    examples: int = 128,
    part: tuple[int, int] = (1, 1),
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    batch_size: int | None = None,
    max_length: int | None = None,
    head: str = "auto",
    columns: Mapping[str, str] | None = None,
    temperature: float = 0.05,
    candidates: int = 8,
    force: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    progress: Work | None = None,
    note: Note | None = None,
) -> dict[str, Any]:
    """Writes a folder of statistics. A run that was stopped goes on, by the same call, from what it has saved.

    Args:
        model: a folder, a hub id, or either with a LoRA adapter, `model+adapter`.
        data: JSONL, CSV, TSV, Parquet or .txt; see `merging.statistics.calibration`.
        kind: "fisher", "moments" or "gram".
        examples: rows to draw, without replacement; all where there are fewer.
        part: (i, n): the i-th of n parts of these rows, for `combine`.
        seed: of all draws.
        device: "cpu" or a torch device.
        dtype: of weights and arithmetic; sums are float64, or as exact.
        batch_size: examples (Fisher) or texts of a micro-batch; None: as many as a number of tokens allows.
        max_length: tokens of a text; None: the model's own limit, 512 at most.
        head: see `merging.statistics.network`.
        columns: what the data call a column, by our name.
        temperature, candidates: of the embedding head's Fisher: softmax of cosine / temperature over so many candidates.
        progress: takes what is done, how many examples or texts, and of how many.
        note: takes lines for the log.

    Returns:
        What `cuvee stats --json` prints.

    Raises:
        CuveeError: wrong settings, data or model, or `out` exists.
    """
    began = time.perf_counter()
    _refuse_settings(kind, head, batch_size, max_length, temperature)
    out, note = Path(out), note or (lambda line: None)
    refuse_existing(out, force=force)
    ref = model if isinstance(model, ModelRef) else ModelRef.parse(model)
    files = [data] if isinstance(data, str | Path) else list(data)
    view = View.open(ref)
    with view.checkpoint:
        head = head_of(view.checkpoint) if head == "auto" else head
        complete = kind == "fisher" and head == "embedding"
        calibration = draw(
            files, examples, seed=seed, part=part, columns=columns, candidates=candidates, complete=complete
        )
        if len(calibration.examples) * part[1] < examples and calibration.rows < examples:
            note(f"the data have {calibration.rows} rows, not {examples}: all are taken")
        network = open_network(
            ref, head=head, device=device, dtype=dtype, max_length=max_length, trust_remote_code=trust_remote_code
        )
        identity = {"ref": str(ref), "path": str(view.checkpoint.path), "fingerprint": fingerprint(view)}
        identity["digest"] = view.digest()
    for line in network.notes:
        note(line)
    settings: dict[str, Any] = {"head": head, "dtype": dtype, "max_length": network.max_length}
    if complete:
        settings |= {"temperature": temperature, "candidates": candidates}
    job = _job(kind, network, calibration, settings, seed, batch_size, note)
    result: dict[str, Any] = {
        "command": "stats",
        "out": str(out),
        "kind": kind,
        "head": head,
        "examples": len(calibration.examples),
        "parameters": job.parameters,
        "seed": seed,
        "device": device,
        "cuvee_version": lineage.cuvee_version(),
    }
    if dry_run:
        return {**result, "seconds": round(time.perf_counter() - began, 3), "dry_run": True}
    run = {
        "model": identity["digest"],
        "kind": kind,
        "settings": settings,
        "drawn": [each.key for each in calibration.examples],
        "seed": seed,
        "batch_size": batch_size,
    }
    with Partial(out, run) as partial:
        tensors, shapes, found = job.run(partial, progress or (lambda what, done, total: None), note)
        rows, axes = found
        manifest = {
            "examples": len(calibration.examples),
            "parameters": sum(map(math.prod, shapes.values())),
            "rows": rows,
            "axes": axes,
            "seed": seed,
            "settings": settings,
            "data": [dict(each) for each in calibration.data],
            "rows_of_data": calibration.rows,
            "part": f"{part[0]}/{part[1]}",
            "columns": dict(columns or {}),
            "model": identity,
            "device": device,
            "batch_size": batch_size,
            "versions": lineage.versions("torch", "transformers", "sentence-transformers", "numpy"),
            "working_directory": os.getcwd(),
            "drawn": [each.key for each in calibration.examples],
        }
        write_statistics(out, kind, tensors, manifest, force=force, shapes=shapes)
        partial.remove()
    result |= {"parameters": manifest["parameters"], "tensors": len(tensors)}
    return {**result, "seconds": round(time.perf_counter() - began, 3)}


@dataclass
class _Job:
    """What is done for one kind: the items that micro-batches are made of, and what adds them up.

    Attributes:
        lengths: of each item, in tokens, with all that it takes.
        open: gives what adds up, to be entered; with the state of an earlier run's, where there is one.
        batch: makes a micro-batch of some items.
        finish: gives the tensors, their shapes, and rows and axes by weight.
    """

    what: str
    lengths: Sequence[int]
    rows: Sequence[int]
    tokens: int
    batch_size: int | None
    parameters: int
    open: Callable[[Mapping[str, Any]], Any]
    batch: Callable[[Sequence[int]], Any]
    finish: Callable[[Any], tuple[dict[str, Values], dict[str, tuple[int, ...]], tuple[dict[str, int], dict[str, int]]]]

    def run(
        self, partial: Partial, progress: Work, note: Note
    ) -> tuple[dict[str, Values], dict[str, tuple[int, ...]], tuple[dict[str, int], dict[str, int]]]:
        from merging.statistics.inputs import Ragged

        saved = partial.load()
        state: dict[str, Any] = {"done": 0, "equal": False} if saved is None else dict(saved[0])
        if saved is not None:
            note(f"goes on from {partial.folder}")
        while True:
            with ExitStack() as stack:
                sums = stack.enter_context(self.open(state))
                if saved is not None:
                    sums.load(saved[1])
                try:
                    self._add_all(sums, state, partial, progress)
                except Ragged:  # what was added up is of no use
                    note("a layer reads its rows in another order than the texts have: batches without padding")
                    state, saved = {"done": 0, "equal": True}, None
                    continue
                return self.finish(sums)

    def _add_all(self, sums: Any, state: dict[str, Any], partial: Partial, progress: Work) -> None:
        plan = micro_batches(self.lengths, self.rows, self.tokens, self.batch_size, equal=state["equal"])
        total = len(self.lengths)
        done = sum(map(len, plan[: state["done"]]))
        with interrupts() as interrupted:
            progress(self.what, done, total)
            for number, items in enumerate(plan[state["done"] :], start=state["done"] + 1):
                sums.add(self.batch(items))
                done += len(items)
                progress(self.what, done, total)
                state["done"] = number
                if number < len(plan) and (interrupted.is_set() or partial.due):
                    partial.save({**state, **_alone(sums)}, sums.state())
                if interrupted.is_set():
                    raise KeyboardInterrupt


def micro_batches(
    lengths: Sequence[int], rows: Sequence[int], tokens: int, batch_size: int | None = None, *, equal: bool = False
) -> list[list[int]]:
    """Places of items in micro-batches of like length, the longest first: what does not fit shows at once.

    Args:
        lengths: tokens of each item's longest row. rows: of each item.
        tokens: of a micro-batch at most, padding too; an item that has more is alone.
        batch_size: items at most; instead of `tokens`.
        equal: only items of one length go together.
    """
    found: list[list[int]] = []
    width = size = 0
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        full = len(found[-1]) >= batch_size if found and batch_size else (size + rows[place]) * width > tokens
        if not found or full or (equal and lengths[place] != width):
            found.append([])
            width, size = lengths[place], 0
        found[-1].append(place)
        size += rows[place]
    return found


def _job(
    kind: str,
    network: Network,
    calibration: Calibration,
    settings: Mapping[str, Any],
    seed: int,
    batch_size: int | None,
    note: Note,
) -> _Job:
    if kind == "fisher":
        return _fisher_job(network, calibration, settings, seed, batch_size, note)
    return _inputs_job(kind, network, calibration, seed, batch_size, note)


def _inputs_job(
    kind: str, network: Network, calibration: Calibration, seed: int, batch_size: int | None, note: Note
) -> _Job:
    from merging.statistics.inputs import InputSums

    tokens = _all_tokens(network, calibration.examples, seed)
    layers = InputSums(network, kind).layers
    if not layers:
        raise StatsError(
            "has no linear layer, so it has no input statistics", where=str(network.module.__class__.__name__)
        )

    def finish(sums: InputSums) -> Any:
        means = {name: own.cpu().numpy() for name, own in sums.means().items()}
        if unused := [name for name in sums.rows if name not in means]:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            note(f"no text has reached '{unused[0]}'{more}: no statistics of it")
        shapes = {name: own.shape for name, own in means.items()}
        return means, shapes, ({name: sums.rows[name] for name in means}, {name: sums.axes[name] for name in means})

    return _Job(
        what=kind,
        lengths=[len(each) for each in tokens],
        rows=[1] * len(tokens),
        tokens=_TOKENS[kind],
        batch_size=batch_size,
        parameters=sum({each.weight: _size(each, kind) for each in layers}.values()),
        open=lambda state: InputSums(network, kind),
        batch=lambda items: network.features([tokens[place] for place in items]),
        finish=finish,
    )


def _size(layer: Any, kind: str) -> int:
    weight = layer.module.weight
    if layer.kind == "conv":
        return int(weight[0].numel() * (len(weight) if layer.module.groups > 1 else 1))
    return int(weight.shape[layer.axis] ** (2 if kind == "gram" else 1))


def _all_tokens(network: Network, examples: Sequence[Example], seed: int) -> list[Tokens]:
    """Every text that the model reads: of an embedding model queries and candidates, of others a text an example."""
    if network.head != "embedding":
        return _inputs(network, examples, seed)
    paired = [each for each in examples if each.candidates]
    single = [each for each in examples if not each.candidates]
    found = network.read([each.query for each in single], None, [each.image for each in single])
    found += network.read([each.query for each in paired], "query", [each.image for each in paired])
    found += network.read([text for each in paired for text in each.candidates], "document")
    return found


def _inputs(network: Network, examples: Sequence[Example], seed: int) -> list[Tokens]:
    """A text or pair an example; of several candidates one is drawn."""

    def text(example: Example) -> str | tuple[str, ...]:
        if not example.candidates:
            return example.query
        drawn = int(np.random.default_rng([seed, 2, example.row]).integers(len(example.candidates)))
        return (example.query, example.candidates[drawn])

    return network.read([text(each) for each in examples], None, [each.image for each in examples])


def _fisher_job(
    network: Network,
    calibration: Calibration,
    settings: Mapping[str, Any],
    seed: int,
    batch_size: int | None,
    note: Note,
) -> _Job:
    from merging.statistics.fisher import Fisher
    from merging.statistics.heads import Batch

    examples = calibration.examples
    seeds = [int(np.random.SeedSequence([seed, 3, each.row]).generate_state(1)[0]) for each in examples]
    compensated = sum(own.numel() for own in network.module.parameters()) > _LARGE

    def open_(state: Mapping[str, Any]) -> Any:
        alone = frozenset(state["alone"]) if "alone" in state else None
        return Fisher(network.module, forward, compensated=compensated, alone=alone, note=note)

    if network.head == "embedding":
        if lonely := next((each for each in examples if len(each.candidates) < 2), None):
            raise StatsError(
                f"row {lonely.row + 1} has fewer than two candidates to choose from",
                where=str(calibration.data[0]["file"]),
                mend="give more rows, or negatives",
            )
        queries = network.read([each.query for each in examples], "query", [each.image for each in examples])
        documents = network.read([text for each in examples for text in each.candidates], "document")
        starts = np.cumsum([0, *(len(each.candidates) for each in examples)])
        own = [documents[start:stop] for start, stop in pairwise(starts.tolist())]
        table = [*queries, *documents]
        lengths = [max(map(len, [query, *mine])) for query, mine in zip(queries, own, strict=True)]
        rows = [2 * len(mine) for mine in own]
    else:
        table = _inputs(network, examples, seed)
        lengths, rows = [len(each) for each in table], [1] * len(table)
    images = any(each.more for each in table)
    places = {id(each): place for place, each in enumerate(table)}

    def features(tokens: Sequence[Tokens]) -> dict[str, Any]:
        import torch

        found = network.features(tokens)
        if images:  # an image's pixels have no axis of texts: they are put in when it is known which rows are read
            found = {key: value for key, value in found.items() if not any(key in each.more for each in tokens)}
            found["of"] = torch.tensor([places[id(each)] for each in tokens])
        return found

    def forward(found: Mapping[str, Any]) -> Tensor:
        if "of" not in found:
            return network.forward(found)
        own = {key: value for key, value in found.items() if key != "of"}
        more = network.features([table[place] for place in found["of"].tolist()])
        return network.forward({**more, **own})

    def batch(items: Sequence[int]) -> Any:
        import torch

        mine = tuple(seeds[place] for place in items)
        if network.head != "embedding":
            return Batch(network.head, features([table[place] for place in items]), seeds=mine)
        most = max(len(own[place]) for place in items)
        filled = [text for place in items for text in (*own[place], *[own[place][0]] * (most - len(own[place])))]
        real = torch.tensor([[c < len(own[place]) for c in range(most)] for place in items], device=network.device)
        return Batch(
            "embedding",
            features([*(queries[place] for place in items), *filled]),
            candidates=most,
            real=None if bool(real.all()) else real,
            temperature=settings["temperature"],
            seeds=mine,
        )

    def finish(fisher: Any) -> Any:
        means = network.stored(fisher.mean())
        tensors: dict[str, Values] = {name: own.contiguous().cpu().numpy() for name, own in means.items()}
        return tensors, {name: tuple(own.shape) for name, own in means.items()}, ({}, {})

    return _Job(
        what="fisher",
        lengths=lengths,
        rows=rows,
        tokens=_TOKENS["fisher"],
        batch_size=batch_size,
        parameters=sum(own.numel() for own in network.parameters().values()),
        open=open_,
        batch=batch,
        finish=finish,
    )


def _alone(sums: Any) -> dict[str, Any]:
    return {"alone": sorted(sums.alone)} if hasattr(sums, "alone") else {}


def _refuse_settings(kind: str, head: str, batch_size: int | None, max_length: int | None, temperature: float) -> None:
    if kind not in KINDS:
        mend = did_you_mean(kind, KINDS, f"known: {quoted(KINDS)}")
        raise StatsError(f"no kind of statistics '{kind}'", where="--kind", mend=mend)
    if head not in ("auto", *HEADS):
        mend = did_you_mean(head, HEADS, f"known: {quoted(('auto', *HEADS))}")
        raise StatsError(f"no head '{head}'", where="--head", mend=mend)
    for name, value in (("--batch-size", batch_size), ("--max-length", max_length)):
        if value is not None and value < 1:
            raise StatsError(f"{value} is too little", where=name, mend="give a number from 1")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise StatsError(f"{temperature} is no temperature", where="--temperature", mend="give a number above 0")
