"""Backbone: an embedding model that learns. Texts become token ids once, ids become batches, batches become vectors.

What it is made from may be a sentence-transformers folder, a plain encoder or a decoder, of images too if it is of
Qwen2-VL's shape; what it saves is always a folder that plain `SentenceTransformer(path)` loads and that gives the same
vectors there. The weights are float32 whatever the
dtype: with bfloat16 only the transformer's arithmetic is lower (autocast), pooling and what follows it stay in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from embeddings.images.folder import add_images, as_texts, reader_of, refuse_other_template
from embeddings.images.reader import ImageReader, positions
from embeddings.images.text import ImageText
from embeddings.model import prompt_name
from embeddings.training import decoder, lora, packing
from embeddings.training.checkpointing import Learner
from embeddings.training.data_settings import SIDES
from merging.checkpoint import Checkpoint
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

if TYPE_CHECKING:
    import torch

    from embeddings.training.config import ModelSettings

#: Token ids of a text, with an image before it or without.
Text = NDArray[np.int32] | ImageText


def open_backbone(
    settings: ModelSettings, *, max_length: Mapping[str, int], device: str, where: str = "model", seed: int = 0
) -> Backbone:
    """Opens what the settings name, in evaluation mode; `backbone.transformer.train()` turns dropout on.

    A folder with a modules.json keeps its modules, pooling and tokenizer; `pooling` and `normalize` replace these where
    they are given. A plain encoder gets mean pooling. A plain decoder gets last-token pooling with EOS appended, or mean
    pooling when it is made bidirectional, and reads texts as they are, whatever chat template its tokenizer has.

    Args:
        max_length: tokens of a text at most, of a "query" and of a "document"; the model's own limit holds too.
        device: "cpu" or a torch device.
        where: the settings' file and line, for errors.
        seed: of LoRA's first factors.

    Raises:
        CuveeError: no safetensors, no model of texts, foreign code without leave, or a setting that does not fit it.
    """
    _refuse_settings(settings, max_length, where)
    check_device(device)
    ref = ModelRef.parse(settings.path)
    if settings.revision is not None:
        ref = ModelRef(ref.path, settings.revision, ref.adapter, ref.adapter_revision)
    with Checkpoint.open(ref) as checkpoint:
        plain = not (checkpoint.path / "modules.json").is_file()
        if not plain:
            refuse_other_kinds(checkpoint, trust_remote_code=settings.trust_remote_code)
            refuse_other_template(checkpoint.path, str(ref))
        elif not checkpoint.config:
            raise CuveeError("is no model: it has no config.json", where=str(ref))
        with adapter_merged(ref, checkpoint.path) as folder, as_texts(folder) as view:
            transformer = load_transformer(
                view, str(ref), dtype="float32", device=device, truncate_dim=None, trusted=settings.trust_remote_code
            )
            images = reader_of(folder, transformer.tokenizer, str(ref))
    _refuse_no_texts(transformer, str(ref))
    _arrange(transformer, settings, plain, where)
    _choose_trainable(transformer, settings, where, seed)
    return Backbone(transformer, images, max_length=max_length, dtype=settings.dtype, base=str(ref))


class Backbone(Learner):
    """A SentenceTransformer with what training needs of it.

    Attributes:
        transformer: the SentenceTransformer, which reads texts alone; its mode (training or evaluation) decides about dropout.
        images: reads the images that may stand before a text; None for a model of texts.
        dimension: of the vectors.
        max_length: tokens of a text at most, by side.
        dtype: "float32", or "bfloat16" for the transformer's arithmetic.
        base: what it was made from, as the user wrote it.
    """

    def __init__(
        self,
        transformer: Any,
        images: ImageReader | None = None,
        *,
        max_length: Mapping[str, int],
        dtype: str,
        base: str,
    ) -> None:
        self.transformer, self.images, self.dtype, self.base = transformer, images, dtype, base
        self.max_length = {side: _limit(transformer, max_length[side]) for side in SIDES}
        tokenizer = transformer.tokenizer
        self._pad_left = tokenizer.padding_side == "left"
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._types = "token_type_ids" in tokenizer(["a"])
        self._masks_prompt = any(getattr(module, "include_prompt", True) is False for module in transformer)
        self._packing = self._find_packing()
        self.dimension = int(self._dimension())

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.transformer.parameters()).device
        return device

    @property
    def packs(self) -> bool:
        """Whether `vectors` spends nothing on padding."""
        return self._packing is not None

    @property
    def tokenizer_digest(self) -> str:
        """Of all that a text's token ids depend on: tokenizer, chat template, lengths, prompts. Equal digests, equal ids."""
        first, tokenizer = self.transformer[0], self.transformer.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)  # what is not fast has none
        state = json.loads(backend.to_str()) if backend else {**tokenizer.get_vocab(), "": tokenizer.init_kwargs}
        state = {key: value for key, value in state.items() if key not in ("padding", "truncation")}  # of the last call
        prompts = dict(self.transformer.prompts or {})
        settings = [
            type(tokenizer).__name__,
            tokenizer.truncation_side,
            self.max_length,
            sorted(map(str, first.modality_config)),
            str(tokenizer.chat_template) if "message" in first.modality_config else None,
            first.processing_kwargs,
            self._masks_prompt,
            *([self.transformer.default_prompt_name, prompts] if any(prompts.values()) else []),
        ]
        content = json.dumps([state, settings], sort_keys=True, default=str)
        return str(xxhash.xxh3_128_hexdigest(content.encode("utf-8", "surrogatepass")))

    def prompt_of(self, side: str | None) -> str | None:
        """What the model itself puts before a text: a "query", a "document", or, None, one of which it is neither."""
        prompts = self.transformer.prompts or {}
        name = prompt_name(prompts, self.transformer.default_prompt_name, side)
        return None if name is None else prompts[name]

    def tokenize(self, texts: Sequence[str], side: str, prompt: str | None = None) -> list[list[int]]:
        """Token ids of each text with the prompt before it, cut to the side's length, special tokens among them.

        The ids are those that sentence-transformers' `encode` reads. Of a model whose pooling leaves the prompt out, the
        prompt's ids are negative (-1 - id), so that `pad` can tell them.

        Args:
            side: "query" or "document".
        """
        if not texts:
            return []
        features = self.transformer.preprocess(
            list(texts),
            prompt=prompt or None,
            task=side,
            processing_kwargs={
                "common": {"return_tensors": None},
                "text": {"padding": False, "max_length": self.max_length[side]},
            },
        )
        rows: list[list[int]] = [list(row) for row in features["input_ids"]]
        if self._masks_prompt and (length := int(features.get("prompt_length") or 0)):
            rows = [[-1 - token for token in row[:length]] + row[length:] for row in rows]
        return rows

    def pad(self, tokens: Sequence[Text]) -> dict[str, torch.Tensor]:
        """Features of a batch on the model's device, each (texts, longest text); padded on the side the model wants.

        Of a model that reads images, with positions of three axes, and the images of those texts that have one.

        Args:
            tokens: ids of each text, as `tokenize` gave them.

        Raises:
            CuveeError: an image cannot be read.
        """
        import torch

        rows = [own.ids if isinstance(own, ImageText) else own for own in tokens]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))  # (texts,)
        width = max(1, int(lengths.max(initial=0)))
        places = np.arange(width)
        mask = (places >= width - lengths[:, None]) if self._pad_left else (places < lengths[:, None])
        ids = np.full(mask.shape, self._pad_id, np.int64)
        if lengths.any():
            ids[mask] = np.concatenate(rows)
        features: dict[str, NDArray[Any]] = {"attention_mask": mask.astype(np.int64)}
        if self._masks_prompt:
            features["pooling_mask"] = (mask & (ids >= 0)).astype(np.int64)
            ids = np.where(ids < 0, -1 - ids, ids)
        features["input_ids"] = ids
        if self._types:
            features["token_type_ids"] = np.zeros_like(ids)
        if self.images is not None:
            pictures = [self.images.read(own.image) for own in tokens if isinstance(own, ImageText)]
            grids = np.asarray([picture.grid for picture in pictures], np.int64).reshape(-1, 3)
            where = {"image_id": self.images.image_id, "merge": self.images.merge}
            features["position_ids"] = positions(ids, mask, grids, **where)
            if pictures:
                pixels = np.concatenate([picture.pixels for picture in pictures])
                features |= {"pixel_values": pixels, "image_grid_thw": grids}
        device = self.device
        return {key: torch.from_numpy(value).to(device, non_blocking=True) for key, value in features.items()}

    def embed(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(texts, dimension) float32, with gradient unless the caller forbids it; the features stay as they are."""
        read = {key: value for key, value in features.items() if key != "pooling_mask"}
        with self._autocast():
            state = self.transformer[0](read)
        return self._pooled({**features, **state})

    def vectors(self, tokens: Sequence[Text]) -> torch.Tensor:
        """(texts, dimension) float32, as `embed` gives them of `pad`, without the cost of padding where the model can.

        Raises:
            CuveeError: an image cannot be read.
        """
        features = self.pad(tokens)
        if self._packing is None or len(tokens) == 1:
            return self.embed(features)
        import torch

        texts = [own for own in tokens if not isinstance(own, ImageText)]  # all: who reads images does not pack
        ids = [np.where(own < 0, -1 - own, own) for own in texts] if self._masks_prompt else texts
        with self._autocast():
            hidden, places = packing.forward(self.transformer[0].model, self._packing, ids, types=self._types)
        mask = features["attention_mask"].bool()  # (texts, longest)
        index = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)  # of what is masked, any
        index[mask] = torch.from_numpy(np.concatenate(places)).to(mask.device)
        own = hidden.index_select(0, index.flatten()).unflatten(0, index.shape)
        return self._pooled({**features, "token_embeddings": own})

    def _pooled(self, state: dict[str, Any]) -> torch.Tensor:
        """What the modules after the transformer make of its vectors, in float32."""
        for key in ("token_embeddings", "sentence_embedding"):
            if key in state:
                state[key] = state[key].float()
        if "pooling_mask" in state:
            state["attention_mask"] = state.pop("pooling_mask")
        for module in list(self.transformer)[1:]:
            state = module(state)
        vectors: torch.Tensor = state["sentence_embedding"]
        return vectors

    def _autocast(self) -> Any:
        import torch

        return torch.autocast(self.device.type, torch.bfloat16) if self.dtype == "bfloat16" else nullcontext()

    def _find_packing(self) -> packing.Packing | None:
        first = self.transformer[0]
        if first.module_output_name != "token_embeddings" or self.images is not None:
            return None
        return packing.find(first.model, causal=not decoder.looks_ahead(first), types=self._types)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Those that are trained, by the name that `state` gives them."""
        return ((name, value) for name, value in self.transformer.named_parameters() if value.requires_grad)

    def save(self, folder: Path) -> None:
        """Writes a sentence-transformers folder, safetensors, in float32; LoRA merged in, and its factors in adapter/.

        Training can go on afterwards as if nothing had been saved.
        """
        folder.mkdir(parents=True, exist_ok=True)
        model = self.transformer[0].model
        if lora.is_adapted(model):
            with only_our_words():
                lora.save_adapter(model, folder / "adapter", base=self.base)
        with lora.merged_in(model), only_our_words():
            self.transformer.save(str(folder), create_model_card=False)
        if self.images is not None:
            add_images(folder, self.images, max(self.max_length.values()))

    def _dimension(self) -> int:
        import torch

        with torch.inference_mode():
            return int(self.embed(self.pad([np.array([1, 2], np.int32)])).shape[1])


def recompute_activations(model: Any, where: str) -> None:
    """Lets a transformers model keep fewer activations, and compute them again for the gradient.

    Raises:
        CuveeError: its architecture cannot.
    """
    if not model.supports_gradient_checkpointing:
        what = f"{type(model).__name__} cannot recompute its activations"
        raise CuveeError(what, where=where, mend="leave 'gradient_checkpointing' out")
    # transformers 5.23 has renamed it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _refuse_settings(settings: ModelSettings, lengths: Mapping[str, int], where: str) -> None:
    if settings.dtype not in ("float32", "bfloat16"):
        raise CuveeError(f"'{settings.dtype}' is no dtype to train in", where=where, mend="choose float32 or bfloat16")
    for side in SIDES:
        if lengths.get(side, 0) < 1:
            raise CuveeError(f"no number of tokens for a {side}", where=where, mend="give 'max_length' from 1")


def _refuse_no_texts(transformer: Any, ref: str) -> None:
    """What is trained here is transformers' models of texts; all else sentence-transformers trains by itself."""
    from sentence_transformers.sentence_transformer.modules import Transformer
    from transformers import PreTrainedTokenizerBase

    first = transformer[0]
    reader = getattr(first, "processor", None)
    if not isinstance(first, Transformer) or not isinstance(reader, PreTrainedTokenizerBase):
        raise CuveeError(
            f"is no transformer of texts alone: it begins with {type(first).__name__} and {type(reader).__name__}",
            where=ref,
            mend="train it by sentence-transformers",
        )
    if any(any(row) for row in reader(["a text"]).get("token_type_ids", [])):
        raise CuveeError("marks its tokens with types other than 0, which is not supported", where=ref)
    for module in transformer:
        # Its weights count from the text's beginning, and the features do not tell where that was.
        if getattr(module, "include_prompt", True) is False and "weightedmean" in module.pooling_mode:
            raise CuveeError("has a weighted mean that leaves out the prompt, which is not supported", where=ref)


def _arrange(transformer: Any, settings: ModelSettings, plain: bool, where: str) -> None:
    """Attention, tokenizer and modules as the settings want them."""
    first = transformer[0]
    if settings.bidirectional:
        decoder.make_bidirectional(first, where)
    causal = not decoder.looks_ahead(first)
    if first.processor.pad_token_id is None:
        decoder.add_padding(first, where)
    pooling = settings.pooling
    if plain:
        decoder.read_plain_texts(first)
        pooling = pooling or ("lasttoken" if causal else "mean")
        if pooling == "lasttoken" and settings.append_eos:
            decoder.append_eos(first.processor, where)
    if pooling is not None:
        _set_pooling(transformer, pooling, where)
    normalize = settings.normalize if settings.normalize is not None else (True if plain else None)
    if normalize is not None:
        _set_normalize(transformer, normalize)


def _set_pooling(transformer: Any, mode: str, where: str) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    if mode not in Pooling.POOLING_MODES:
        raise CuveeError(f"'{mode}' is no pooling", where=where, mend=f"choose {', '.join(Pooling.POOLING_MODES)}")
    places = [place for place, module in enumerate(transformer) if isinstance(module, Pooling)]
    if len(places) != 1:
        raise CuveeError(f"has {len(places)} Pooling modules", where=where, mend="leave 'pooling' out")
    old = transformer[places[0]]
    if old.pooling_output_dimension != old.embedding_dimension:
        raise CuveeError("pools in several ways at once", where=where, mend="leave 'pooling' out")
    if old.pooling_mode != mode:
        transformer[places[0]] = Pooling(old.embedding_dimension, mode, include_prompt=old.include_prompt)


def _set_normalize(transformer: Any, wanted: bool) -> None:
    from sentence_transformers.sentence_transformer.modules import Normalize

    last = len(transformer) - 1
    if isinstance(transformer[last], Normalize) and not wanted:
        del transformer[last]
    elif wanted and not isinstance(transformer[last], Normalize):
        transformer.append(Normalize())


def _choose_trainable(transformer: Any, settings: ModelSettings, where: str, seed: int) -> None:
    model = transformer[0].model
    pooler = getattr(model, "pooler", None)
    if pooler is not None and transformer[0].module_output_name == "token_embeddings":
        pooler.requires_grad_(False)  # BERT computes it, no one reads it: it never gets a gradient
    if settings.lora is not None:
        transformer.requires_grad_(False)
        lora.add_lora(model, settings.lora, where, seed)
    if settings.gradient_checkpointing:
        recompute_activations(model, where)


def _limit(transformer: Any, wanted: int) -> int:
    own = max_length(transformer)
    return wanted if own is None else min(wanted, own)
