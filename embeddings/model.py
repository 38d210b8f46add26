"""EmbeddingModel: a sentence-transformers model with all that says which it is.

A folder, a hub id, or `model+adapter`. Only safetensors are read; code that comes with a model runs with the user's
flag only. What cannot embed texts (a reranker, a text generator, a bare adapter) is refused with the reason.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from embeddings.images.folder import as_texts
from embeddings.packed import pack_linears
from merging.checkpoint import Checkpoint, locate, read_json
from merging.errors import CuveeError
from merging.lineage import file_digest, weights_digest
from merging.loading import adapter_merged, check_device, load_transformer, max_length, refuse_other_kinds
from merging.sidefiles import side_files
from merging.sources import ModelRef

DTYPES = ("float32", "bfloat16", "float16")
#: Entries of a JSON file that say by which versions it was written, and from where.
_NO_SETTINGS = ("_name_or_path", "transformers_version", "__version__", "dtype", "torch_dtype")
_ALL_PARTS = 1 << 20
_NO_NAMES = re.compile(r"model|models|final|best|last|out|output|merged|latest|adapter|lora|checkpoint[-_]?\d*|\d*")


@dataclass(frozen=True)
class EmbeddingModel:
    """A model that turns texts into vectors.

    Attributes:
        name: short, for tables; a hub id, or the end of the folder's path.
        ref: as the user wrote it.
        digest: 32 hexadecimal digits over the weights and all else that changes its vectors: modules, pooling,
            tokenizer, config, prompts, adapter, dtype, truncation. Equal digests, equal vectors.
        transformer: the SentenceTransformer, for inference only; whatever its dtype, pooling is in float32.
        max_length: tokens of a text that it reads; None where it has no limit.
        dimension: of its vectors, after truncation.
        prompts: texts by name that are put before an input, as the model's own configuration has them.
        truncate_dim: only so many leading dimensions are kept; None for all.
        notes: one line each, for the log.
    """

    name: str
    ref: str
    digest: str
    transformer: Any
    max_length: int | None
    dimension: int
    prompts: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    device: str = "cpu"
    truncate_dim: int | None = None
    notes: tuple[str, ...] = ()


def open_model(
    ref: str | os.PathLike[str] | ModelRef,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    truncate_dim: int | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
    packed: bool = True,
) -> EmbeddingModel:
    """Opens a folder, a hub id (`owner/name[@revision]`), or either with a LoRA adapter (`model+adapter`).

    Args:
        revision: of a hub id.
        dtype: one of `DTYPES`, of the transformer's weights and arithmetic.
        device: "cpu" or a torch device.
        truncate_dim: keep only so many leading dimensions, of a model that was trained for it.
        trust_remote_code: run Python code that comes with the model.
        name: for tables; by default `labels([ref])`.
        packed: linear layers are laid out for speed, see `embeddings.packed`; else they stay as transformers made them.

    Raises:
        CuveeError: nothing there, no safetensors, no embedding model, or a setting that does not fit it.
    """
    model = _at_revision(ModelRef.parse(ref) if not isinstance(ref, ModelRef) else ref, revision)
    if dtype not in DTYPES:
        raise CuveeError(f"'{dtype}' is no dtype to encode in", where="dtype", mend=f"choose {', '.join(DTYPES)}")
    if truncate_dim is not None and truncate_dim < 1:
        raise CuveeError(f"{truncate_dim} dimensions are none", where="truncate_dim", mend="give a number from 1")
    check_device(device)
    with Checkpoint.open(model) as checkpoint:
        notes = refuse_other_kinds(checkpoint, trust_remote_code=trust_remote_code)
        digest = _digest(checkpoint, model, dtype, truncate_dim)
        with adapter_merged(model, checkpoint.path) as folder, as_texts(folder) as view:
            transformer = load_transformer(
                view, str(model), dtype=dtype, device=device, truncate_dim=truncate_dim, trusted=trust_remote_code
            )
    if packed:
        pack_linears(transformer)
    dimension = _dimension(transformer, str(model))
    if truncate_dim is not None and dimension < truncate_dim:
        raise CuveeError(
            f"its vectors have {dimension} dimensions, not {truncate_dim}", where=str(model), mend="truncate to fewer"
        )
    return EmbeddingModel(
        name=name or labels([model])[0],
        ref=str(model),
        digest=digest,
        transformer=transformer,
        max_length=max_length(transformer),
        dimension=dimension,
        prompts={key: text or "" for key, text in (getattr(transformer, "prompts", None) or {}).items()},
        dtype=dtype,
        device=device,
        truncate_dim=truncate_dim,
        notes=notes,
    )


def prompt_name(prompts: Mapping[str, str], default: str | None, side: str | None) -> str | None:
    """Which of a model's prompts stands before a text, as sentence-transformers' `encode_query`, `encode_document` and `encode`.

    Args:
        default: its `default_prompt_name`.
        side: "query" or "document"; None for texts of which neither is.
    """
    usual = {"query": ("query",), "document": ("document", "passage", "corpus")}
    candidates = (*usual.get(side or "", ()), default)
    return next((name for name in candidates if name in prompts), None)


def labels(refs: Sequence[str | os.PathLike[str] | ModelRef]) -> list[str]:
    """A short name for each model, all different: hub ids as they are, of folders as much of the path's end as it takes.

    Names that say nothing ("model", "checkpoint-500") bring their parent's; a model that is listed twice gets "#2".
    """
    models = [ref if isinstance(ref, ModelRef) else ModelRef.parse(ref) for ref in refs]
    depth, whole = [1] * len(models), [_label(model, _ALL_PARTS) for model in models]
    while True:
        names = [_label(model, parts) for model, parts in zip(models, depth, strict=True)]
        owners: dict[str, set[str]] = {}
        for name, path in zip(names, whole, strict=True):
            owners.setdefault(name, set()).add(path)
        clash = [i for i, name in enumerate(names) if len(owners[name]) > 1 and name != whole[i]]
        if not clash:
            break
        for i in clash:
            depth[i] += 1
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        names[i] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    return names


def _at_revision(model: ModelRef, revision: str | None) -> ModelRef:
    if revision is None or model.revision == revision:
        return model
    if model.revision is not None:
        raise CuveeError(f"names the revision {model.revision}, not {revision}", where=str(model), mend="give one")
    if os.path.isdir(os.path.expanduser(model.path)):
        raise CuveeError("is a folder, which has no revisions", where=str(model), mend="leave the revision out")
    return replace(model, revision=revision)


def _label(model: ModelRef, parts: int) -> str:
    """The last `parts` names of the path, and of the adapter's; more where these say nothing."""

    def end(path: str) -> str:
        if not os.path.isdir(os.path.expanduser(path)):
            return path
        names = [name for name in Path(os.path.abspath(os.path.expanduser(path))).parts if name != os.sep]
        count = 1
        while count < len(names) and _NO_NAMES.fullmatch(names[-count].lower()):
            count += 1
        count = min(len(names), count + parts - 1)
        return "/".join(names[-count:])

    text = end(model.path) + (f"@{model.revision}" if model.revision else "")
    return text if model.adapter is None else f"{text}+{end(model.adapter)}"


def _digest(checkpoint: Checkpoint, model: ModelRef, dtype: str, truncate_dim: int | None) -> str:
    digest = xxhash.xxh3_128()
    digest.update(f"{weights_digest(checkpoint)}\n{dtype}\n{truncate_dim}\n".encode())
    weights = [str(file.relative_to(checkpoint.path)) for file in checkpoint.weight_files]
    files = [str(file) for file in side_files(checkpoint.path, weights) if _changes_vectors(file.name)]
    _update(digest, checkpoint.path, files)
    if model.adapter is not None:
        adapter = locate(model.adapter, model.adapter_revision)
        _update(digest, adapter, ["adapter_config.json", "adapter_model.safetensors"])
    return digest.hexdigest()


def _changes_vectors(name: str) -> bool:
    return not name.startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "generation_config"))


def _update(digest: xxhash.xxh3_128, folder: Path, files: Iterable[str]) -> None:
    for name in sorted(files):
        file = folder / name
        if not file.is_file():
            continue
        content = file_digest(file)
        if name.endswith("config.json") or name == "config_sentence_transformers.json":
            settings = {key: value for key, value in read_json(file).items() if key not in _NO_SETTINGS}
            if name == "config_sentence_transformers.json":
                settings.pop("model_type", None)  # newer versions write what older ones leave unsaid
            content = json.dumps(settings, sort_keys=True)
        digest.update(f"{name}\0{content}\n".encode("utf-8", "surrogatepass"))


def _dimension(transformer: Any, ref: str) -> int:
    """By a trial: some models cannot say, and what fails here is no embedding model."""
    try:
        vectors = transformer.encode(["text"], show_progress_bar=False)
        return int(vectors.shape[1])
    except Exception as error:  # every architecture has its own ways to fail
        reason = next(iter(str(error).strip().splitlines()), "")[:160]
        what = f"is no embedding model: it gives no vector for a text ({type(error).__name__}: {reason})"
        raise CuveeError(what, where=ref) from error
