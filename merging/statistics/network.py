"""Network: a model opened to be looked into: it reads texts, and every parameter knows its name in the checkpoint.

What a model is for says its folder: a sentence-transformers folder or a plain encoder gives vectors (`embedding`), a
sequence classifier logits of classes (`classification`) or a number (`regression`), a causal model logits of the next
token (`lm`). A LoRA adapter is merged in first. Only safetensors are read.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merging.checkpoint import Checkpoint, read_json
from merging.errors import CuveeError
from merging.loading import (
    adapter_merged,
    check_device,
    load_transformer,
    max_length,
    only_our_words,
    refuse_other_kinds,
)
from merging.sources import ModelRef
from merging.statistics import images
from merging.statistics.matching import Matches, Piece, match, unread
from merging.statistics.tokens import Tokens

if TYPE_CHECKING:
    import torch

HEADS = ("embedding", "classification", "regression", "lm")
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_LENGTH = 512
#: sentence-transformers' names of the prompts of a side, first come first taken.
_PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}


@dataclass(frozen=True)
class Network:
    """A model in evaluation mode. Its parameters need no gradient unless the caller says so.

    Attributes:
        module: a SentenceTransformer (head `embedding`), or a model of transformers.
        reader: its tokenizer or processor.
        head: one of `HEADS`.
        names: stored name by parameter name, of `named_parameters` (tied ones once); what the file lacks is not in it.
        pieces: by parameter name, what is stored in parts, or under a second name too.
        max_length: tokens of a text at most.
        device: "cpu" or a torch device.
        dtype: of the weights and of the arithmetic.
        notes: one line each, for the log.
    """

    module: torch.nn.Module
    reader: Any
    head: str
    names: Mapping[str, str]
    max_length: int
    pieces: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str = "float32"
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> Any:
        """The transformer's configuration: number of labels, kind of problem."""
        model = self.module[0].model if self.head == "embedding" else self.module
        return model.config

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """By name, tied ones once; those only that the checkpoint has."""
        known = self.names.keys() | self.pieces.keys()
        return {name: own for name, own in self.module.named_parameters() if name in known}

    def stored(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """By stored name what is given by parameter name, in the shape of each stored tensor."""
        found: dict[str, torch.Tensor] = {}
        for name, own in values.items():
            if name in self.names:
                found[self.names[name]] = own
            for piece in self.pieces.get(name, ()):
                piece.put(own, found)
        return found

    def read(
        self,
        texts: Sequence[str | tuple[str, ...]],
        side: str | None = None,
        pictures: Sequence[Path | None] | None = None,
    ) -> list[Tokens]:
        """Each text (or pair of texts) as tokens, cut to `max_length`, special tokens among them.

        Args:
            side: "query" or "document" puts the prompt before it that the model has for them; None its default one.
            pictures: the image's file of each text, or None.

        Raises:
            CuveeError: an image cannot be read, or by this model not at all.
        """
        if pictures is not None and any(picture is not None for picture in pictures):
            one = [self._read_image(text, picture, side) for text, picture in zip(texts, pictures, strict=True)]
            return [tokens or self._read_texts([text], side)[0] for text, tokens in zip(texts, one, strict=True)]
        return self._read_texts(texts, side) if texts else []

    def read_answers(self, pairs: Sequence[tuple[str, str]]) -> list[Tokens]:
        """Of head `lm`: questions, each with an answer on a line of its own; `Tokens.prompt` ends before the answer.

        What is too long is cut from the question's end.
        """
        asked = self._tokenizer([f"{question}\n" for question, _ in pairs], verbose=False)["input_ids"]
        whole = self._tokenizer(["\n".join(pair) for pair in pairs], verbose=False)["input_ids"]
        found = []
        for before, ids in zip(asked, whole, strict=True):
            shared = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
            shared = max(1, min(shared, len(ids) - 1))
            answer = ids[shared:][: self.max_length - 1]
            question = ids[:shared][: self.max_length - len(answer)]
            found.append(Tokens({"input_ids": np.array(question + answer, np.int64)}, {}, len(question)))
        return found

    def features(self, tokens: Sequence[Tokens]) -> dict[str, torch.Tensor]:
        """What the model's forward takes, on its device: sequences padded on the right to (texts, longest)."""
        import torch

        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        width = max(1, int(lengths.max(initial=0)))
        mask = np.arange(width) < lengths[:, None]  # (texts, longest)
        features: dict[str, torch.Tensor] = {}
        for key in dict.fromkeys(key for each in tokens for key in each.sequence):
            padded = np.full(mask.shape, self._padding(key), np.int64)
            for row, each in zip(padded, tokens, strict=True):
                if key in each.sequence:
                    row[: len(each)] = each.sequence[key]
            features[key] = torch.from_numpy(padded)
        features["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        if any(each.prompt for each in tokens):
            prompts = np.array([[each.prompt] for each in tokens])
            features["pooling_mask"] = torch.from_numpy((mask & (np.arange(width) >= prompts)).astype(np.int64))
        for key in dict.fromkeys(key for each in tokens for key in each.more):
            together = torch.cat([each.more[key] for each in tokens if key in each.more])
            features[key] = together.to(getattr(torch, self.dtype)) if together.is_floating_point() else together
        return {key: value.to(self.device, non_blocking=True) for key, value in features.items()}

    def vectors(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of head `embedding`: (texts, dimension) float32."""
        assert self.head == "embedding"
        state: Any = {key: value for key, value in features.items() if key != "pooling_mask"}
        for place, module in enumerate(self.module.children()):
            state = module(state)
            if place == 0 and "pooling_mask" in features:
                state["attention_mask"] = features["pooling_mask"]
            for key in ("token_embeddings", "sentence_embedding"):
                if key in state:
                    state[key] = state[key].float()
        vectors: torch.Tensor = state["sentence_embedding"]
        return vectors

    def logits(self, features: Mapping[str, torch.Tensor], positions: torch.Tensor | None = None) -> torch.Tensor:
        """Float32: (texts, classes); of head `regression` (texts, values); of head `lm` (texts, longest, vocabulary).

        Args:
            positions: (some,): of head `lm`, those places only: (texts, some, vocabulary).
        """
        assert self.head != "embedding"
        arguments = self._arguments(features)
        spares = positions is not None and "logits_to_keep" in inspect.signature(self.module.forward).parameters
        if spares:  # the vocabulary is what costs
            arguments["logits_to_keep"] = positions
        logits: torch.Tensor = self.module(**arguments).logits
        return (logits if positions is None or spares else logits[:, positions]).float()

    def forward(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`vectors` or `logits`."""
        return self.vectors(features) if self.head == "embedding" else self.logits(features)

    def _arguments(self, features: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        arguments: dict[str, Any] = dict(features)
        if self.head == "lm":
            arguments["use_cache"] = False
        return arguments

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.reader, "tokenizer", self.reader)

    def _padding(self, key: str) -> int:
        tokenizer = self._tokenizer
        pad = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}.get(key)
        return int(pad or 0)

    def _prompt(self, side: str | None) -> str | None:
        prompts = getattr(self.module, "prompts", None) or {}
        names = (*_PROMPTS.get(side or "", ()), getattr(self.module, "default_prompt_name", None))
        return next((prompts[name] for name in names if prompts.get(name)), None)

    def _read_texts(self, texts: Sequence[str | tuple[str, ...]], side: str | None) -> list[Tokens]:
        if self.head == "embedding":
            return self._read_by_sentence_transformers(texts, side)
        if self.head == "lm":  # it reads on and knows no pairs
            texts = [text if isinstance(text, str) else "\n".join(text) for text in texts]
        first = [text if isinstance(text, str) else text[0] for text in texts]
        second = [None if isinstance(text, str) else text[1] for text in texts]
        pairs = second if any(text is not None for text in second) else None
        limits: dict[str, Any] = {"truncation": True, "max_length": self.max_length}
        found = self._tokenizer(first, pairs, return_attention_mask=False, **limits)
        return _rows(found, len(texts))

    def _read_by_sentence_transformers(self, texts: Sequence[str | tuple[str, ...]], side: str | None) -> list[Tokens]:
        prompt = self._prompt(side)
        lengths = {"common": {"return_tensors": None}, "text": {"padding": False, "max_length": self.max_length}}
        found = self.module.preprocess(list(texts), prompt=prompt, task=side, processing_kwargs=lengths)
        length = 0
        if any(getattr(module, "include_prompt", True) is False for module in self.module.children()):
            length = int(found.get("prompt_length") or 0)
        keys = ("input_ids", "token_type_ids")
        return _rows({key: found[key] for key in keys if key in found}, len(texts), length)

    def _read_image(self, text: str | tuple[str, ...], image: Path | None, side: str | None) -> Tokens | None:
        """A text after its image, as the processor joins them; never cut, since an image is whole or none."""
        if image is None:
            return None
        pixels, text = images.opened(image), text if isinstance(text, str) else "\n".join(text)
        try:
            if self.head == "embedding":
                both = {"image": pixels, "text": text} if text else {"image": pixels}
                found = self.module.preprocess([both], prompt=self._prompt(side), task=side)
            else:
                found = images.processed(self.reader, pixels, text)
        except CuveeError:
            raise
        except Exception as error:  # every processor has its own ways to fail
            reason = next(iter(str(error).strip().splitlines()), "")[:160]
            what = f"cannot be read by the model's processor ({type(error).__name__}: {reason})"
            raise CuveeError(what, where=str(image), mend="leave images out, if it is a model of texts") from error
        return images.tokens(found)


def open_network(
    ref: str | ModelRef,
    *,
    head: str = "auto",
    device: str = "cpu",
    dtype: str = "float32",
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> Network:
    """Opens a folder, a hub id, or either with a LoRA adapter (`model+adapter`).

    Args:
        head: one of `HEADS`, or "auto": as the folder says.
        max_length: tokens of a text at most; the model's own limit holds too. None: that limit, 512 at most.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        CuveeError: nothing there, no safetensors, a head that it has not, weights that are missing.
    """
    if head not in ("auto", *HEADS):
        raise CuveeError(f"'{head}' is no head", where="head", mend=f"choose auto, {', '.join(HEADS)}")
    if dtype not in DTYPES:
        raise CuveeError(f"'{dtype}' is no dtype to compute in", where="dtype", mend=f"choose {', '.join(DTYPES)}")
    check_device(device)
    model = ref if isinstance(ref, ModelRef) else ModelRef.parse(ref)
    with Checkpoint.open(model) as checkpoint, adapter_merged(model, checkpoint.path) as folder:
        chosen = head_of(checkpoint) if head == "auto" else head
        if chosen == "embedding":
            if (folder / "modules.json").is_file():
                refuse_other_kinds(checkpoint, trust_remote_code=trust_remote_code)
            module = load_transformer(
                folder, str(model), dtype=dtype, device="cpu", truncate_dim=None, trusted=trust_remote_code
            )
            reader = module[0].processor
        else:
            module, reader = _load(folder, str(model), chosen, dtype, trust_remote_code)
        with Checkpoint.open(folder) as merged:
            matches = match(dict(module.named_parameters()), merged, _tied(module), rows=True)
    _refuse_random(module, matches, str(model))
    module.requires_grad_(False)
    limit = _limit(module, reader, chosen)
    return Network(
        module=module.to(device).eval(),
        reader=reader,
        head=chosen,
        names=matches.names,
        pieces=matches.pieces,
        max_length=min(max_length or DEFAULT_LENGTH, limit or max_length or DEFAULT_LENGTH),
        device=device,
        dtype=dtype,
    )


def head_of(checkpoint: Checkpoint) -> str:
    """What a folder's model is for, from its JSON files alone."""
    folder, config = checkpoint.path, checkpoint.config
    settings = folder / "config_sentence_transformers.json"
    kind = read_json(settings).get("model_type", "SentenceTransformer") if settings.is_file() else "SentenceTransformer"
    if (folder / "modules.json").is_file() and kind != "CrossEncoder":
        return "embedding"
    if not config:
        raise CuveeError("is no model: it has no config.json", where=str(folder))
    architecture = next(map(str, config.get("architectures") or ()), "")
    if architecture.endswith("ForSequenceClassification"):
        labels = config.get("id2label") or range(int(config.get("num_labels", 2)))
        regression = config.get("problem_type") == "regression" or (
            config.get("problem_type") is None and len(labels) == 1
        )
        return "regression" if regression else "classification"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "lm" if _has_output_head(checkpoint) else "embedding"
    if architecture.endswith("ForConditionalGeneration") and not config.get("is_encoder_decoder"):
        return "lm"
    return "embedding"


def _has_output_head(checkpoint: Checkpoint) -> bool:
    """Whether its file holds one, or it is tied to the embeddings; embedding models are saved without."""
    if any("lm_head" in name or "embed_out" in name for name in checkpoint.tensors):
        return True
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(checkpoint.path), local_files_only=True)
        return bool(config.get_text_config().tie_word_embeddings)
    except Exception:  # of code that comes with it, say: the loader tells better what is wrong
        return True


def _load(folder: Path, ref: str, head: str, dtype: str, trusted: bool) -> tuple[Any, Any]:
    """A model of transformers and what reads texts for it.

    Raises:
        CuveeError: it cannot be loaded.
    """
    import torch
    import transformers

    if head == "lm":
        vision = "vision_config" in read_json(folder / "config.json")
        loader = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    else:
        loader = transformers.AutoModelForSequenceClassification
    with only_our_words():
        try:
            module = loader.from_pretrained(
                str(folder),
                dtype=getattr(torch, dtype),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trusted,
            )
            reader = images.reader(folder, trusted=trusted)
        except Exception as error:  # every architecture has its own ways to fail
            reason = next(iter(str(error).strip().splitlines()), "")[:160]
            mend = "add --trust-remote-code if you trust its code" if "trust_remote_code" in str(error) else ""
            what = f"cannot be loaded for its {head} head ({type(error).__name__}: {reason})"
            raise CuveeError(what, where=ref, mend=mend) from error
    return module, reader


def _tied(module: Any) -> dict[str, str]:
    """Second names of parameters that have several, and their first."""
    first = {id(own): name for name, own in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {name: first[id(own)] for name, own in every if first[id(own)] != name}


def _refuse_random(module: Any, matches: Matches, ref: str) -> None:
    """What the files lack was filled with random numbers."""
    known = matches.names.keys() | matches.pieces.keys()
    missing = [name for name, _ in module.named_parameters() if name not in known]
    missing = [name for name in missing if not unread(name)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CuveeError(
            f"has no weights for '{missing[0]}'{more}, which would be random",
            where=ref,
            mend="fetch or save it again, or choose another head",
        )


def _limit(module: Any, reader: Any, head: str) -> int | None:
    """Tokens of a text that the model reads; None where nobody says."""
    if head == "embedding":
        return max_length(module)
    tokenizer = getattr(reader, "tokenizer", reader)
    length = tokenizer.model_max_length
    if length < 1 << 30:
        return int(length)
    config = getattr(module.config, "text_config", module.config)
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _rows(found: Mapping[str, Any], count: int, prompt: int = 0) -> list[Tokens]:
    keys = [key for key in ("input_ids", "token_type_ids") if key in found]
    return [Tokens({key: np.asarray(found[key][i], np.int64) for key in keys}, {}, prompt) for i in range(count)]
