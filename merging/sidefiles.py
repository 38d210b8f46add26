"""Side files: whatever else makes a model's folder usable comes along with its weights.

Config, tokenizer, processors, generation settings, sentence-transformers' modules, pooling and prompts, custom code
that the configs name, licences. Never weights in any form, training state, caches, or the donor's own card. Files are
copied by content; a link that leads out of the donor's folder is refused, but for those of the hub's cache.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from merging.chat_template import find_template, set_template
from merging.checkpoint import Checkpoint, inside, module_folders, read_json
from merging.errors import CheckpointError, MergeError
from merging.layout import has_tokenizer, transformer_part, write_json

#: Weights, in whatever form.
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf", ".ggml", ".npz"),
    *(".npy", ".ot", ".tflite", ".mlmodel", ".pb", ".index.json"),
)
#: The donor's own card, lineage and training state; names or their beginnings.
NOT_COPIED = (
    *("README", "cuvee.json", "adapter_", "mergekit_", "trainer_state", "training_args", "optimizer", "scheduler"),
    *("rng_state", "all_results", "train_results", "eval_results", "data_config", "events.out", "."),
)
_NO_MODULES = (".", "onnx", "openvino", "checkpoint-", "runs", "eval")  # folders, or their beginnings
_TOKENIZER_STARTS = (
    *("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "additional_chat_templates"),
    *("tekken", "spiece", "sentencepiece", "bpe.codes", "normalizer.json", "source.spm", "target.spm"),
)
_TOKENIZER_SUFFIXES = (".model", ".spm", ".tiktoken")
_KEPT_SUFFIXES = (".json", ".jinja", ".model", ".spm", ".tiktoken", ".vocab", ".codes", ".bpe")
_KEPT_STARTS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "tokenizer.model", "vocab", "merges", "dict", "bpe")
_TORCH_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def copy_sidefiles(
    donor: Checkpoint,
    target: Path,
    *,
    out_dtype: str | None,
    tokenizer_from: Path | None = None,
    chat_template: str | None = None,
    inputs: Sequence[Path] = (),
    weights: Iterable[str] = (),
    only_missing: bool = False,
) -> None:
    """Copies everything but the weights from the donor's folder.

    Args:
        target: the new model's folder; it exists.
        out_dtype: written to config.json ("bfloat16" or "BF16"); None leaves what it says.
        tokenizer_from: the folder of another model whose tokenizer to take instead of the donor's.
        chat_template: "auto" (the commonest among `inputs`, the first of them on a tie), a name, or a Jinja text (see
            `merging.chat_template.find_template`); None leaves the tokenizer's own.
        weights: the files of merged weights, relative to the donor's folder.
        only_missing: leave alone what `target` has already: its files, and its tokenizer as a whole.

    Raises:
        CheckpointError: a link or a path that leads out of a folder; an unreadable JSON file.
        MergeError: a chat template that is none, or without a tokenizer; the disk is full.
    """
    part = transformer_part(donor.path)
    had_tokenizer = only_missing and has_tokenizer(target / part)
    own_tokenizer = tokenizer_from is None or tokenizer_from.resolve() == donor.path.resolve()
    try:
        for relative in side_files(donor.path, weights):
            of_tokenizer = relative.parent == PurePosixPath(part) and _is_tokenizer_file(relative.name)
            of_tokenizer = of_tokenizer or "additional_chat_templates" in relative.parts
            if of_tokenizer and (had_tokenizer or not own_tokenizer):
                continue
            if not (only_missing and (target / relative).exists()):
                _copy(donor.path, relative, target / relative)
        if tokenizer_from is not None and not own_tokenizer and not had_tokenizer:
            _copy_tokenizer(tokenizer_from, target / part)
        for folder in module_folders(donor.path):
            (target / folder).mkdir(parents=True, exist_ok=True)  # modules without settings have empty folders
            if out_dtype is not None and (target / folder / "config.json").is_file():
                set_dtype(target / folder / "config.json", out_dtype)
        if chat_template is not None:
            text = find_template(chat_template, inputs)
            if text is not None:
                set_template(target / part, text)
    except OSError as error:
        raise MergeError(f"cannot copy: {error.strerror or error}", where=str(error.filename or target)) from error


def side_files(folder: Path, weights: Iterable[str] = ()) -> Iterator[PurePosixPath]:
    """The files of a model's folder that come along, relative to it.

    Raises:
        CheckpointError: modules.json names a folder that leads out.
        MergeError: a module keeps weights where they are not merged.
    """
    skipped = {PurePosixPath(file) for file in weights}
    modules = module_folders(folder)[1:]
    code = _custom_code(folder, modules)
    for file in sorted(folder.iterdir()):
        relative = PurePosixPath(file.name)
        if file.is_file() and relative not in skipped and (relative in code or _is_kept(file.name)):
            yield relative
    for top in [*modules, "additional_chat_templates"]:
        for place, folders, names in os.walk(folder / top):  # links to folders are not followed
            folders[:] = sorted(name for name in folders if not name.startswith(_NO_MODULES))
            for name in sorted(names):
                relative = PurePosixPath(Path(place, name).relative_to(folder).as_posix())
                if relative in skipped or not (folder / relative).is_file():
                    continue
                if name.endswith(".safetensors") and relative.parent != PurePosixPath(top):
                    raise MergeError(
                        "holds weights of a nested module, which are not merged", where=str(folder / relative)
                    )
                if relative in code or _is_harmless(name):
                    yield relative
    yield from sorted(file for file in code if len(file.parts) > 1 and file.parts[0] not in modules)


def set_dtype(config: Path, dtype: str) -> None:
    """Writes the dtype into a config.json of transformers, those of its parts (text_config, …) too; all else stays.

    Raises:
        CheckpointError: no JSON object.
    """
    value = read_json(config)
    if not ("model_type" in value or "architectures" in value):
        return  # a module of sentence-transformers
    name = _TORCH_DTYPES.get(dtype, dtype)
    if not _replace_dtype(value, name):
        value["torch_dtype"] = name
    write_json(config, value)


def same_vocabulary(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two models give the same number to every token. True where one of them brings no tokenizer to compare.

    Raises:
        CheckpointError: a tokenizer that cannot be read.
    """
    try:
        return _same_vocabulary(*(c.path / transformer_part(c.path) for c in (a, b)))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(error.filename)) from error


def _same_vocabulary(first: Path, second: Path) -> bool:
    if not (_vocabulary_files(first) and _vocabulary_files(second)):
        return True
    shared = [name for name in _vocabulary_files(first) if name in _vocabulary_files(second)]
    if not shared:
        return False
    one, other = first / shared[0], second / shared[0]
    if one.read_bytes() == other.read_bytes():
        return True
    return shared[0] == "tokenizer.json" and _token_numbers(one) == _token_numbers(other)


# What is copied.


def _is_harmless(name: str) -> bool:
    return not name.lower().endswith(WEIGHT_SUFFIXES) and not name.startswith(NOT_COPIED) and not name.endswith(".py")


def _is_kept(name: str) -> bool:
    return _is_harmless(name) and (name.endswith(_KEPT_SUFFIXES) or name.startswith(_KEPT_STARTS))


def _is_tokenizer_file(name: str) -> bool:
    return name.startswith(_TOKENIZER_STARTS) or name.endswith(_TOKENIZER_SUFFIXES)


def _copy_tokenizer(source: Path, target: Path) -> None:
    part = transformer_part(source)
    if not has_tokenizer(source / part):
        raise MergeError("has no tokenizer to take", where=str(source), mend="name another model in tokenizer_source")
    for relative in side_files(source):
        if relative.parent == PurePosixPath(part) and _is_tokenizer_file(relative.name):
            _copy(source, relative, target / relative.name)
        elif "additional_chat_templates" in relative.parts:
            _copy(source, relative, target / "additional_chat_templates" / relative.name)


def _copy(folder: Path, relative: PurePosixPath, target: Path) -> None:
    root, file = folder.resolve(), (folder / relative).resolve()
    # The hub's cache keeps a snapshot's files as links to its blobs.
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (file.is_relative_to(root) or file.is_relative_to(blobs)):
        raise CheckpointError(
            f"is a link that leads out of the folder, to {file}",
            where=str(folder / relative),
            mend="put the file itself there",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)  # neither its permissions nor its times


def _custom_code(folder: Path, modules: Sequence[str]) -> set[PurePosixPath]:
    """Python files that the configs' auto_map or modules.json name, and what these import beside them."""
    found: set[PurePosixPath] = set()
    for part in dict.fromkeys(["", *modules]):
        for config in sorted((folder / part).glob("*.json")):
            if _is_kept(config.name):
                names = _code_names(config)
                found.update(PurePosixPath(part, *name.split(".")[:-1]).with_suffix(".py") for name in names)
    waiting, done = list(found), set[PurePosixPath]()
    while waiting:
        file = waiting.pop()
        if file in done or not inside(folder, str(file)).is_file():
            continue
        done.add(file)
        text = (folder / file).read_text(encoding="utf-8", errors="replace")
        beside = re.findall(r"^\s*from\s+\.(\w[\w.]*)\s+import", text, re.MULTILINE)
        waiting.extend(PurePosixPath(file.parent, *name.split(".")).with_suffix(".py") for name in beside)
        for names in re.findall(r"^\s*from\s+\.\s+import\s+([\w, ]+)", text, re.MULTILINE):
            waiting.extend(file.parent / f"{name.split()[0]}.py" for name in names.split(",") if name.strip())
    return done


def _code_names(file: Path) -> Iterator[str]:
    """`module.Class` of every class that a JSON file says is to be loaded from the folder."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # copied as it is; whoever needs it will tell
    if file.name == "modules.json":
        names = [module.get("type") for module in value if isinstance(module, dict)]
    elif isinstance(value, dict) and isinstance(value.get("auto_map"), dict):
        entries = value["auto_map"].values()
        names = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
    else:
        return
    for name in names:  # "owner/model--module.Class" lies in another model
        if isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)+", name):
            yield name


# JSON.


def _replace_dtype(config: dict[str, Any], name: str) -> bool:
    found = False
    for key, value in config.items():
        if key in ("torch_dtype", "dtype") and isinstance(value, str):
            config[key] = name
            found = True
        elif isinstance(value, dict) and key.endswith("_config") and key != "quantization_config":
            _replace_dtype(value, name)
    return found


def _vocabulary_files(folder: Path) -> list[str]:
    names = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
    return [name for name in names if (folder / name).is_file()]


def _token_numbers(file: Path) -> dict[str, int]:
    value = read_json(file)
    try:
        vocabulary = value["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram: pairs of token and score
            vocabulary = {pair[0]: number for number, pair in enumerate(vocabulary)}
        return {**vocabulary, **{token["content"]: token["id"] for token in value.get("added_tokens") or ()}}
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError("is no tokenizer of the 'tokenizers' library", where=str(file)) from error
