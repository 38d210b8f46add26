"""From a model and a few examples to a folder of statistics: micro-batches of like length, summed, saved on the way."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging import lineage
from merging.errors import did_you_mean, quoted
from merging.output import refuse_existing, refuse_full_disk
from merging.sources import ModelRef
from merging.statistics.calibration import Calibration, draw
from merging.statistics.fisher_job import fisher_job, has_answers
from merging.statistics.folder import KINDS, StatsError, write_statistics
from merging.statistics.job import Job
from merging.statistics.network import HEADS, Network, head_of, open_network
from merging.statistics.resume import Partial
from merging.statistics.scaled import of_model, refuse_strangers, scaled
from merging.views import View, fingerprint

if TYPE_CHECKING:
    from merging.progress import Note, Work

_BYTES = 6  # of a number's sum at least


def collect(
    model: str | os.PathLike[str] | ModelRef,
    data: str | Path | Sequence[str | Path],
    kind: str,
    out: str | Path,
    *,
    base: str | os.PathLike[str] | ModelRef | None = None,
    scale: float | None = None,
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
        base, scale: of the model θ₀ + scale·(θ − θ₀) instead, θ₀ the base's weights; all but the weights is then the base's.
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
    _refuse_scale(base, scale)
    out, note = Path(out), note or (lambda line: None)
    refuse_existing(out, force=force)
    ref = model if isinstance(model, ModelRef) else ModelRef.parse(model)
    files = [data] if isinstance(data, str | Path) else list(data)
    view = View.open(ref)
    origin = None if base is None else View.open(base if isinstance(base, ModelRef) else ModelRef.parse(base))
    with ExitStack() as opened:
        opened.enter_context(view.checkpoint)
        if origin is not None:
            opened.enter_context(origin.checkpoint)
            refuse_strangers(view, origin)
        head = head_of((origin or view).checkpoint) if head == "auto" else head
        complete = kind == "fisher" and head == "embedding"
        calibration = draw(
            files, examples, seed=seed, part=part, columns=columns, candidates=candidates, complete=complete
        )
        if len(calibration.examples) * part[1] < examples and calibration.rows < examples:
            note(f"the data have {calibration.rows} rows, not {examples}: all are taken")
        if origin is not None and scale is not None:  # in a dry run the base, which is made like it, stands for it
            _refuse_full_disk(out, origin, kind)
            ref = origin.ref if dry_run else opened.enter_context(scaled(ref, origin.ref, scale, out))
        network = open_network(
            ref, head=head, device=device, dtype=dtype, max_length=max_length, trust_remote_code=trust_remote_code
        )
        identity, base_identity = _identity(view), None if origin is None else _identity(origin)
    for line in network.notes:
        note(line)
    settings: dict[str, Any] = {"head": head, "dtype": dtype, "max_length": network.max_length}
    if complete:
        settings |= {"temperature": temperature, "candidates": candidates}
    elif kind == "fisher" and has_answers(head, calibration):
        settings |= {"candidates": candidates}
    if base_identity is not None:
        settings |= {"scale": scale, "base": base_identity["digest"]}
    job = _job(kind, network, calibration, settings, seed, batch_size, note)
    refuse_too_much(job.parameters, device)
    refuse_full_disk(out, 4 * job.parameters, "the statistics take")
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
        found = job.run(partial, progress or (lambda what, done, total: None), note)
        found = found if origin is None else of_model(found, view, origin)
        manifest = {
            "examples": len(calibration.examples),
            "parameters": sum(own.size for own in found.tensors.values()),
            "rows": dict(found.rows),
            "axes": dict(found.axes),
            "seed": seed,
            "settings": settings,
            "data": [dict(each) for each in calibration.data],
            "rows_of_data": calibration.rows,
            "part": f"{part[0]}/{part[1]}",
            "columns": dict(columns or {}),
            "model": identity,
            **({"base": base_identity} if base_identity else {}),
            "device": device,
            "batch_size": batch_size,
            "versions": lineage.versions("torch", "transformers", "sentence-transformers", "numpy"),
            "working_directory": os.getcwd(),
            "drawn": [each.key for each in calibration.examples],
        }
        write_statistics(out, kind, found.tensors, manifest, force=force)
        partial.remove()
    result |= {"parameters": manifest["parameters"], "tensors": len(found.tensors)}
    return {**result, "seconds": round(time.perf_counter() - began, 3)}


def _job(
    kind: str,
    network: Network,
    calibration: Calibration,
    settings: Mapping[str, Any],
    seed: int,
    batch_size: int | None,
    note: Note,
) -> Job:
    if kind == "fisher":
        return fisher_job(network, calibration, settings, seed, batch_size, note)
    from merging.statistics.input_job import input_job

    return input_job(kind, network, calibration, seed, batch_size, note)


def _identity(view: View) -> dict[str, str]:
    """What a manifest says of a model."""
    place = {"ref": str(view.ref), "path": str(view.checkpoint.path)}
    return {**place, "fingerprint": fingerprint(view), "digest": view.digest()}


def _refuse_full_disk(out: Path, base: View, kind: str) -> None:
    """Before the model is scaled: as many float32 numbers as the base has, and Fisher information as many again."""
    numbers = sum(math.prod(info.shape) for info in base.tensors.values())
    times, what = (8, "the scaled model and its statistics take") if kind == "fisher" else (4, "the scaled model takes")
    refuse_full_disk(out, times * numbers, what)


def refuse_too_much(numbers: int, device: str) -> None:
    """Before the first text: what a machine kills for its memory leaves no word.

    Args:
        numbers: to be summed.

    Raises:
        StatsError: their sums do not fit into what is free.
    """
    wanted, free = numbers * _BYTES, _free(device)
    if free is not None and wanted > free:
        what = f"the sums take {wanted / 1e9:,.1f} GB, of which {free / 1e9:,.1f} are free"
        raise StatsError(what, where=f"device {device}", mend="choose --kind moments, or a larger machine")


def _free(device: str) -> int | None:
    """Bytes that are free on a device; None where nobody says."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10
    return None


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


def _refuse_scale(base: object, scale: float | None) -> None:
    if base is None and scale is None:
        return
    if base is None:
        raise StatsError("wants the base that the model is scaled to", where="--scale", mend="add --base BASE")
    if scale is None:
        raise StatsError("wants the share of the task vector that is left", where="--base", mend="add --scale 0.4")
    if not math.isfinite(scale):
        raise StatsError(f"{scale} is no number", where="--scale", mend="give a number, such as 0.4")
