"""LoRA adapters: `model+adapter` as a view over the model's tensors, corrected while they are read.

The merged model never exists on disk or in memory. For every weight that the adapter changes there is a `Correction`
(`merging.lowrank`) that turns any range of its rows into the rows of the merged weight, W + s·B·A, in float32; tensors
that were trained whole (`modules_to_save`, biases) replace the model's own. Here the adapter's files are read, and its
tensors fitted to those of the base.

s = alpha / r, or alpha / sqrt(r) with rsLoRA. Source: arXiv 2106.09685 (LoRA); 2312.03732 (rsLoRA). Equal to peft's
`merge_and_unload` on a float32 model up to float32 rounding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from merging.checkpoint import Checkpoint, TensorInfo, read_header, read_json
from merging.errors import CheckpointError, MergeError
from merging.lowrank import BiasShift, Correction, Factors, LowRank

#: Keys of adapter_config.json for variants whose result is no product of two factors, or whose base was changed.
UNSUPPORTED = {
    "layer_replication": "repeats layers of its base",
    "target_parameters": "adapts bare parameters (of fused experts)",
    "trainable_token_indices": "trains single rows of the embedding",
    "use_qalora": "is a QA-LoRA",
    "use_bdlora": "is a block-diagonal LoRA",
    "arrow_config": "routes between adapters for each token (Arrow)",
    "alora_invocation_tokens": "acts only after its invocation tokens (aLoRA)",
    "monteclora_config": "is a MonteCLoRA",
    "kasa_config": "is a KaSA adapter",
    "megatron_config": "was made for Megatron's layers",
}
#: Initialisations that subtract the start of B·A from the base: B·A alone is then not what was trained.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
MERGE_FIRST = "merge it first by peft's merge_and_unload().save_pretrained(DIR), and name DIR instead"

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.(?P<leaf>weight|bias))?"
)
# Architectures whose layers are transformers' Conv1D, which stores its weight as (inputs, outputs).
_CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, fitted to its base.

    Attributes:
        file: adapter_model.safetensors.
        corrections: by name of the base's tensor. Where the name is in `replacements` too, the correction applies to
            the replacement.
        replacements: tensors that take the place of the base's, of the same shape; `Checkpoint.read_into` reads them.
        additions: tensors that the base lacks and the adapter brings (a task head that was trained with it).
        notes: one line each, for the log.
    """

    folder: Path
    file: Path
    corrections: Mapping[str, Correction]
    replacements: Mapping[str, TensorInfo]
    additions: Mapping[str, TensorInfo]
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: Path | str, base: Checkpoint) -> Adapter:
        """Reads adapter_config.json and the header of adapter_model.safetensors, and fits every tensor to the base.

        Raises:
            CheckpointError: no adapter there, pickled, damaged, or contradicting its own config.
            MergeError: an adapter that cannot be merged exactly, or whose tensors do not fit the base.
        """
        folder = Path(folder)
        config_file = folder / "adapter_config.json"
        if not config_file.is_file():
            raise CheckpointError("holds no adapter_config.json, so it is no adapter", where=str(folder))
        config = read_json(config_file)
        _refuse_unsupported(config, str(config_file))
        file = _weights_file(folder)
        tensors = {info.name: info for info in read_header(file)}
        if not tensors:
            raise CheckpointError("holds no tensors", where=str(file))
        return _fit(folder, file, config, Checkpoint(folder, tensors, str(folder)), base)

    def read(self, base: Checkpoint, name: str) -> np.ndarray:
        """One whole tensor of the merged model as float32, in its shape; meant for small ones and for checks.

        Raises:
            CheckpointError: it cannot be read.
        """
        info = self.replacements.get(name) or self.additions.get(name) or base.tensors[name]
        weight = base.read(info)
        if name in self.corrections:
            self.corrections[name].apply(weight.reshape(weight.shape[0], -1), 0)
        return weight


# Fitting the adapter's tensors to the base's.


def _fit(folder: Path, file: Path, config: Mapping[str, Any], source: Checkpoint, base: Checkpoint) -> Adapter:
    modules: dict[str, dict[str, TensorInfo]] = {}
    whole: list[tuple[str, TensorInfo]] = []
    for info in source.tensors.values():
        path = info.name.removeprefix(_PREFIX)
        match = _FACTOR.fullmatch(path)
        if match:
            kind = match["kind"] + (".bias" if match["leaf"] == "bias" else "")
            modules.setdefault(match["module"], {})[kind] = info
        elif "lora_" in path or ".token_adapter." in path or "trainable_tokens" in path:
            raise MergeError(f"'{info.name}' belongs to no kind of LoRA known here", where=str(file), mend=MERGE_FIRST)
        else:
            whole.append((path.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."), info))

    names = _Names(base, file)
    replacements, additions, notes = _fit_whole(whole, names, config, base, file)
    scaling = _Scaling(config, file)
    factors = Factors(source)
    corrections: dict[str, Correction] = {}
    square: list[tuple[str, LowRank]] = []
    votes: set[bool] = set()
    for module, parts in modules.items():
        name = names.fit(f"{module}.weight", next(iter(parts.values())).name)
        info = replacements.get(name, base.tensors[name])
        scale = scaling.of(module)
        a, b, embedding = _pair(module, parts, file)
        scaling.check_rank(module, a, b)
        transposed = _orientation(info, a, b, embedding, file)
        low_rank = LowRank(
            info, a, b, embedding or bool(transposed), scale, parts.get("lora_magnitude_vector"), factors
        )
        _check_magnitude(low_rank, config, file)
        _add(corrections, name, low_rank, file)
        if transposed is None:
            square.append((module, low_rank))
        elif not embedding:
            votes.add(transposed)
        if "lora_B.bias" in parts:
            bias = names.fit(f"{module}.bias", parts["lora_B.bias"].name)
            if base.tensors[bias].shape != parts["lora_B.bias"].shape:
                _mismatch(parts["lora_B.bias"], base.tensors[bias], file)
            _add(corrections, bias, BiasShift(parts["lora_B.bias"], scale, source), file)
    for module, low_rank in square:
        if _stores_inputs_first(module.rpartition(".")[2], votes, config, base):
            corrections[low_rank.info.name] = replace(low_rank, transposed=True)
    if not corrections and not replacements and not additions:
        raise CheckpointError("changes nothing", where=str(file))
    return Adapter(folder, file, corrections, replacements, additions, (*notes, *_tie_notes(corrections, base)))


def _fit_whole(
    whole: Sequence[tuple[str, TensorInfo]], names: _Names, config: Mapping[str, Any], base: Checkpoint, file: Path
) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo], list[str]]:
    """Tensors that were saved whole: they replace the base's, or come in addition."""
    replacements: dict[str, TensorInfo] = {}
    additions: dict[str, TensorInfo] = {}
    notes: list[str] = []
    heads = set(config.get("modules_to_save") or ())
    for path, info in whole:
        name = names.find(path, info.name)
        if name is None:
            parts = path.split(".")[:-1]
            if heads & ({*parts, ".".join(parts)}):
                name = f"{names.part}{path}"
                additions[name] = replace(info, name=name)
            elif parts[-1:] == ["lm_head"] and base.config.get("tie_word_embeddings", True):
                notes.append(f"'{info.name}' is left out: the base ties its head to the embedding")
            else:
                names.nothing(info.name)
        elif base.tensors[name].shape != info.shape:
            mend = ""
            if base.tensors[name].shape[1:] == info.shape[1:]:
                mend = f"the vocabulary was resized in training; {MERGE_FIRST}"
            _mismatch(info, base.tensors[name], file, mend)
        else:
            replacements[name] = replace(info, name=name)
    return replacements, additions, notes


class _Names:
    """Finds the base's tensor that a path inside the adapter means.

    Both may carry a prefix that the other lacks (`model.layers.0…` against `layers.0…`), but one and the same for all.
    """

    def __init__(self, base: Checkpoint, file: Path) -> None:
        self._base, self._file = base, file
        # Of a sentence-transformers folder only the transformer's own part is adapted.
        first = next(iter(base.tensors))
        self.part = "" if any("/" not in name for name in base.tensors) else first[: first.rindex("/") + 1]
        self._whole: dict[str, str] = {}  # name without the folder -> name
        self._ends: dict[str, list[str]] = {}  # every end of such a name, cut at a dot -> names
        for name in base.tensors:
            local = name[name.rfind("/") + 1 :]
            if name == self.part + local:
                self._whole[local] = name
                for end in _ends(local):
                    self._ends.setdefault(end, []).append(name)
        self._prefix: tuple[str, str, str, str] | None = None  # kind, prefix, adapter's tensor, base's tensor

    def fit(self, path: str, tensor: str) -> str:
        """Name of the base's tensor that `path` means.

        Raises:
            MergeError: it fits nothing or more than one.
        """
        name = self.find(path, tensor)
        return self.nothing(tensor) if name is None else name

    def find(self, path: str, tensor: str) -> str | None:
        """As `fit`, but None where nothing fits."""
        if path in self._whole:
            return self._whole[path]
        found = {name: ("base", name[: -len(path)]) for name in self._ends.get(path, [])}
        for end in _ends(path):
            if end in self._whole:
                found[self._whole[end]] = ("adapter", path[: -len(end)])
        if not found:
            return None
        if len(found) > 1:
            first, second = sorted(found)[:2]
            raise MergeError(f"'{tensor}' fits '{first}' and '{second}' of {self._base.path}", where=str(self._file))
        (name, (side, prefix)) = next(iter(found.items()))
        if self._prefix is None:
            self._prefix = (side, prefix, tensor, name)
        elif self._prefix[:2] != (side, prefix):
            _, _, other, other_name = self._prefix
            raise MergeError(
                f"'{other}' fits '{other_name}' but '{tensor}' fits '{name}', by another prefix",
                where=str(self._file),
                mend="check that the adapter was trained on this base",
            )
        return name

    def nothing(self, tensor: str) -> NoReturn:
        raise MergeError(
            f"'{tensor}' fits no tensor of {self._base.path}",
            where=str(self._file),
            mend="check that the adapter was trained on this base (a head tied to the embedding is not stored and "
            "cannot be adapted)"
            if ".lm_head." in tensor
            else "check that the adapter was trained on this base",
        )


class _Scaling:
    """s and r of each module, from adapter_config.json."""

    def __init__(self, config: Mapping[str, Any], file: Path) -> None:
        self._config, self._file = config, file
        self._where = str(file.with_name("adapter_config.json"))

    def of(self, module: str) -> float:
        rank, alpha = self._rank(module), self._number("lora_alpha", self._pattern("alpha_pattern", module), 8)
        return alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank

    def check_rank(self, module: str, a: TensorInfo, b: TensorInfo) -> None:
        rank = self._rank(module)
        for info, got in ((a, a.shape[0]), (b, b.shape[1])):
            if got != rank:
                raise CheckpointError(
                    f"'{info.name}' has rank {got}, adapter_config.json says {rank:g}",
                    where=str(self._file),
                    mend="the two files belong to different trainings: fetch or save the adapter again",
                )

    def _rank(self, module: str) -> float:
        rank = self._number("r", self._pattern("rank_pattern", module), 8)
        if rank <= 0:
            raise CheckpointError(f"rank of '{module}' is {rank:g}", where=self._where)
        return rank

    def _number(self, key: str, special: Any, default: float) -> float:
        value = special if special is not None else self._config.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise CheckpointError(f"{key} is {value!r}, not a number", where=self._where)
        return float(value)

    def _pattern(self, key: str, module: str) -> Any:
        """The value of the first pattern that the module's path ends with, as peft matches them."""
        patterns = self._config.get(key) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{key} is no table of patterns and values", where=self._where)
        try:
            return next((v for pattern, v in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), None)
        except re.error as error:
            what = f"{key}: {error.pattern!r} is no regular expression ({error.msg})"
            raise CheckpointError(what, where=self._where) from error


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise MergeError(
            f"is a {kind or 'nameless'} adapter, only LORA is merged exactly", where=where, mend=MERGE_FIRST
        )
    for key, what in UNSUPPORTED.items():
        if config.get(key):
            raise MergeError(f"'{key}': the adapter {what}, which is not merged here", where=where, mend=MERGE_FIRST)
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(CHANGES_BASE):
        raise MergeError(
            f"init_lora_weights '{init}' changed the base when training began, so B·A alone is not what was trained",
            where=where,
            mend="save it as plain LoRA: save_pretrained(DIR, path_initial_model_for_weight_conversion=START)",
        )


def _weights_file(folder: Path) -> Path:
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        return file
    if (folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            "is pickled, which can run code when it is loaded",
            where=str(folder / "adapter_model.bin"),
            mend="convert it where you trust it: safetensors.torch.save_file(torch.load('adapter_model.bin', "
            "weights_only=True), 'adapter_model.safetensors')",
        )
    raise CheckpointError("holds no adapter_model.safetensors", where=str(folder))


def _pair(module: str, parts: Mapping[str, TensorInfo], file: Path) -> tuple[TensorInfo, TensorInfo, bool]:
    """(A, B, whether they adapt an embedding) of a module."""
    for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if a in parts and b in parts:
            for info in (parts[a], parts[b]):
                if len(info.shape) < 2 or 0 in info.shape:
                    raise CheckpointError(
                        f"'{info.name}' has the shape {list(info.shape)}",
                        where=str(file),
                        mend="it was saved from a sharded training: gather the parameters and save it again",
                    )
            return parts[a], parts[b], a == "lora_embedding_A"
    raise CheckpointError(f"'{module}' has only {', '.join(sorted(parts))}", where=str(file), mend="save it again")


def _orientation(info: TensorInfo, a: TensorInfo, b: TensorInfo, embedding: bool, file: Path) -> bool | None:
    """Whether the base stores the weight as (inputs, outputs); None where its shape cannot tell."""
    if embedding:
        if info.shape != (a.shape[1], b.shape[0]):
            _mismatch(a, info, file)
        return True
    if len(info.shape) > 2:  # a convolution: kernels of A as the base's, kernels of B all of size 1
        if info.shape != (b.shape[0], *a.shape[1:]) or math.prod(b.shape[2:]) != 1:
            _mismatch(a, info, file)
        return False
    if len(a.shape) != 2 or len(b.shape) != 2:
        _mismatch(a, info, file)
    plain, swapped = info.shape == (b.shape[0], a.shape[1]), info.shape == (a.shape[1], b.shape[0])
    if not plain and not swapped:
        _mismatch(b if info.shape[1:] == a.shape[1:] else a, info, file)
    return None if plain and swapped else swapped


def _stores_inputs_first(layer: str, votes: Iterable[bool], config: Mapping[str, Any], base: Checkpoint) -> bool:
    """For a square weight: by the architecture, else as all other weights of the adapter, else as its config says."""
    if base.config.get("model_type") in _CONV1D_TYPES:
        return layer in _CONV1D_LAYERS
    votes = set(votes)
    return votes.pop() if len(votes) == 1 else bool(config.get("fan_in_fan_out"))


def _check_magnitude(low_rank: LowRank, config: Mapping[str, Any], file: Path) -> None:
    magnitude = low_rank.magnitude
    if magnitude is None:
        if config.get("use_dora"):
            raise CheckpointError(f"'{low_rank.b.name}' has no lora_magnitude_vector", where=str(file))
    elif math.prod(magnitude.shape) != low_rank.b.shape[0]:
        raise CheckpointError(
            f"'{magnitude.name}' has the shape {list(magnitude.shape)} for {low_rank.b.shape[0]} outputs",
            where=str(file),
        )


def _add(corrections: dict[str, Correction], name: str, correction: Correction, file: Path) -> None:
    if name in corrections:
        raise MergeError(f"two tensors of the adapter fit '{name}'", where=str(file))
    corrections[name] = correction


def _tie_notes(corrections: Mapping[str, Correction], base: Checkpoint) -> list[str]:
    if not base.config.get("tie_word_embeddings"):
        return []
    return [
        f"the base ties its head to '{name}', so the adapter's change of the embedding reaches the head too"
        for name, correction in corrections.items()
        if isinstance(correction, LowRank) and "lora_embedding" in correction.a.name
    ]


def _ends(name: str) -> list[str]:
    """`a.b.c` -> `b.c`, `c`."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _mismatch(info: TensorInfo, other: TensorInfo, file: Path, mend: str = "") -> NoReturn:
    raise MergeError(
        f"'{info.name}' of shape {list(info.shape)} does not fit '{other.name}' of shape {list(other.shape)}",
        where=str(file),
        mend=mend or "check that the adapter was trained on this base",
    )
