"""What loads a model of the Hugging Face world, with our care: safetensors only, no foreign code unasked, nothing random.

Only what embeds texts is loaded here; `merging.statistics.network` loads the other kinds.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merging.build import build_plain
from merging.checkpoint import Checkpoint, read_json
from merging.errors import CuveeError
from merging.output import scratch
from merging.recipe import Recipe
from merging.sources import ModelRef

#: Endings of `architectures` in config.json, and what such a model is.
_NO_EMBEDDERS = {
    "ForSequenceClassification": "is a classifier or reranker",
    "ForTokenClassification": "labels single tokens",
    "ForQuestionAnswering": "marks answers in a text",
    "ForMultipleChoice": "chooses between answers",
    "ForCausalLM": "generates text, and no modules.json says which of its tokens stands for the text",
    "LMHeadModel": "generates text, and no modules.json says which of its tokens stands for the text",
    "ForConditionalGeneration": "generates text, and no modules.json says which of its tokens stands for the text",
}


def refuse_other_kinds(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> tuple[str, ...]:
    """Notes on a model's folder, one line each; from its JSON files alone.

    Raises:
        CuveeError: it is no embedding model, or brings code that may not run.
    """
    folder = checkpoint.path
    if not (folder / "modules.json").is_file():
        if not checkpoint.config:
            raise CuveeError("is no embedding model: it has no config.json", where=str(folder))
        for architecture in map(str, checkpoint.config.get("architectures") or ()):
            for ending, what in _NO_EMBEDDERS.items():
                if architecture.endswith(ending):
                    raise CuveeError(
                        f"is no embedding model: {architecture} {what}",
                        where=str(folder),
                        mend="to use its backbone, save it by sentence-transformers with a Pooling module",
                    )
        return (f"{folder}: no modules.json says how it pools its tokens; their mean is taken",)
    settings = folder / "config_sentence_transformers.json"
    kind = read_json(settings).get("model_type", "SentenceTransformer") if settings.is_file() else "SentenceTransformer"
    if kind != "SentenceTransformer":
        what = {"CrossEncoder": "a reranker", "SparseEncoder": "a sparse encoder"}.get(str(kind), "of another kind")
        raise CuveeError(f"is no embedding model: it is {what} ({kind})", where=str(folder))
    types = [str(module.get("type", "")) for module in json.loads((folder / "modules.json").read_text("utf-8"))]
    foreign = [name for name in types if not name.startswith("sentence_transformers.")]
    if foreign and not trust_remote_code:
        raise CuveeError(
            f"brings code of its own ('{foreign[0]}'), which is not run unasked",
            where=str(folder / "modules.json"),
            mend="add --trust-remote-code if you trust it",
        )
    return ()


def load_transformer(
    folder: Path, ref: str, *, dtype: str, device: str, truncate_dim: int | None, trusted: bool
) -> Any:
    """The SentenceTransformer of a folder, in evaluation mode; whatever the dtype, pooling is in float32.

    Raises:
        CuveeError: it cannot be loaded, or lacks weights.
    """
    import torch
    from sentence_transformers import SentenceTransformer

    with only_our_words() as warnings:
        try:
            transformer = SentenceTransformer(
                str(folder),
                device=device,
                trust_remote_code=trusted,
                local_files_only=True,
                truncate_dim=truncate_dim,
                model_kwargs={"dtype": getattr(torch, dtype), "use_safetensors": True},
            )
        except Exception as error:  # every architecture has its own ways to fail
            reason = next(iter(str(error).strip().splitlines()), "")[:160]
            mend = "add --trust-remote-code if you trust its code" if "trust_remote_code" in str(error) else ""
            what = f"cannot be loaded as an embedding model ({type(error).__name__}: {reason})"
            raise CuveeError(what, where=ref, mend=mend) from error
    _refuse_missing_weights(warnings, ref)
    if dtype != "float32":
        for module in list(transformer)[1:]:
            module.float()
        transformer[0].register_forward_hook(_in_float32)
    return transformer.eval()


def check_device(device: str) -> None:
    """Tries the device out.

    Raises:
        CuveeError: it cannot be used here.
    """
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:120]
        raise CuveeError(f"cannot be used: {reason}", where=f"device {device}", mend="choose cpu") from error


@contextmanager
def adapter_merged(model: ModelRef, folder: Path) -> Iterator[Path]:
    """The model's folder, or for a while one in which its adapter is merged into it, exactly, in float32.

    That one is in TMPDIR, where the next finds what a killed process left.

    Raises:
        CuveeError: it cannot be merged, or there is no room.
    """
    if model.adapter is None:
        yield folder
        return

    with scratch(Path(tempfile.gettempdir()) / "cuvee-adapter") as place:
        recipe = Recipe(
            merge_method="linear", models=[{"model": model, "parameters": {"weight": 1.0}}], dtype="float32"
        )
        build_plain(recipe, place / "model")
        yield place / "model"


def max_length(transformer: Any) -> int | None:
    """Tokens of a text that a SentenceTransformer reads; None where it has no limit."""
    length = getattr(transformer, "max_seq_length", None)
    return length if isinstance(length, int) and length < 1 << 30 else None


def wait_passively() -> None:
    """To call before torch loads: threads that spin for a core that is busy elsewhere make a step seven times dearer."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def only_our_words() -> Iterator[list[str]]:
    """Keeps transformers' bars and sentence-transformers' remarks off the terminal; gives transformers' warnings."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    remarks = logging.getLogger("sentence_transformers")
    loading = logging.getLogger("transformers.modeling_utils")
    before = (remarks.level, loading.level, loading.propagate)
    kept = _Kept()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    remarks.setLevel(logging.ERROR)
    loading.setLevel(logging.WARNING)
    loading.propagate = False
    loading.addHandler(kept)
    try:
        yield kept.messages
    finally:
        loading.removeHandler(kept)
        transformers_logging.set_verbosity(level)
        remarks.level, loading.level, loading.propagate = before
        if bars:
            transformers_logging.enable_progress_bar()


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _refuse_missing_weights(warnings: Sequence[str], ref: str) -> None:
    """What the files lack transformers fills with random numbers, and says so in a warning only."""
    for warning in warnings:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", warning)
        missing = re.findall(r"^\s*(\S+)\s*\|\s*MISSING", plain, re.MULTILINE)
        missing = [name for name in missing if "pooler" not in name and not name.startswith(("lm_head", "cls."))]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CuveeError(
                f"lacks the weights '{missing[0]}'{more}, which would be random",
                where=ref,
                mend="fetch or save it again",
            )


def _in_float32(module: Any, inputs: Any, output: Any) -> Any:
    import torch

    if isinstance(output, dict):
        for key, value in output.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                output[key] = value.float()
    return output
