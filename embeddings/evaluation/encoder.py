"""Encoder: an embedding model as mteb calls it, fast: each distinct text once, in batches of like length.

Padding is most of the work when batches are made as they come. Here texts are sorted by their number of tokens and cut
into batches of a token budget; what an `EmbeddingCache` knows is not encoded at all. Prompts are chosen as mteb's own
wrapper of sentence-transformers chooses them, and the vectors are the same up to float32 rounding.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from embeddings.evaluation.embedding_cache import EmbeddingCache, text_keys
from embeddings.model import EmbeddingModel, prompt_name
from merging.errors import CuveeError
from merging.loading import max_length
from merging.progress import Work

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.model_meta import ModelMeta
    from mteb.types import PromptType

Vectors = NDArray[np.float32]
#: Rows of texts, and what the model's forward takes for them.
Batch: TypeAlias = tuple[list[int], Mapping[str, Any]]
#: Tokens of a batch, padding included: what keeps its activations in the cache of a CPU, or fills a GPU.
CPU_BUDGET, CPU_LOW_PRECISION_BUDGET, ACCELERATOR_BUDGET = 1024, 2048, 32768
_ROWS = 1024  # of a batch at most
_LOOKUP = 8192  # texts whose vectors are looked up at once
_SAVE_EVERY = 5.0  # seconds of encoding that a kill may cost


class Encoder:
    """An embedding model with mteb's `EncoderProtocol`.

    Attributes:
        encoded: texts that went through the model so far.
        reused: texts that did not have to, because the cache knew them or they occurred before in the same call.

    Args:
        cache: vectors of earlier calls and runs; None to remember nothing.
        batch_size: texts in a batch, or "auto" for a token budget that fits the device.
        prompts: instead of the model's own, by task name, task type, either with "-query" or "-document", or
            "query" and "document"; they replace all of the model's own, as in mteb.
        progress: called with the task's name, texts encoded and texts to encode.

    Raises:
        CuveeError: an impossible batch size.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        cache: EmbeddingCache | None = None,
        *,
        batch_size: str | int = "auto",
        prompts: Mapping[str, str] | None = None,
        progress: Work | None = None,
    ) -> None:
        if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size > 0):
            raise CuveeError(f"'{batch_size}' is no batch size", where="batch_size", mend="give a number or 'auto'")
        self.embedding_model, self.cache = model, cache
        self.model = model.transformer  # where mteb looks for it
        self.prompts = dict(prompts) if prompts else dict(model.prompts)
        self.encoded = self.reused = 0
        self._own_prompts = not prompts
        self._batch_size = None if batch_size == "auto" else int(batch_size)
        self._budget = _budget(model)
        self._progress = progress or (lambda what, done, total: None)
        self._task_matters = _depends_on_task(model.transformer)

    @property
    def revision(self) -> str:
        """The model's digest; with prompts of the user's, one of both: other prompts give other scores."""
        if self._own_prompts:
            return self.embedding_model.digest
        prompts = "".join(f"{name}\0{text}\n" for name, text in sorted(self.prompts.items()))
        return xxhash.xxh3_128_hexdigest(f"{self.embedding_model.digest}\n{prompts}".encode())

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """What mteb files results under: our name (mteb wants one with a slash) and `revision`."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        model = self.embedding_model
        similarity = {"cosine": ScoringFunction.COSINE, "dot": ScoringFunction.DOT_PRODUCT}
        return ModelMeta.create_empty(
            overwrites={
                "name": model.name if "/" in model.name else f"local/{model.name}",
                "revision": self.revision,
                "max_tokens": model.max_length,
                "embed_dim": model.dimension,
                "framework": ["Sentence Transformers", "PyTorch"],
                "similarity_fn_name": similarity.get(str(getattr(self.model, "similarity_fn_name", ""))),
            }
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Vectors:
        """mteb's entry: (texts, dimensions) float32, in the order of the data loader `inputs`.

        Raises:
            CuveeError: inputs that are no texts, a vector that is not finite, or a precision that is not float32.
        """
        if kwargs.get("precision") not in (None, "float32"):
            raise CuveeError(f"precision '{kwargs['precision']}' is not supported", mend="leave it out")
        texts: list[str] = []
        for batch in inputs:
            if "text" not in batch or not batch.keys().isdisjoint(("image", "audio", "video")):
                raise CuveeError("has inputs that are no texts", where=task_metadata.name)
            texts.extend(batch["text"])
        prompt, task = self.prompt_for(task_metadata, prompt_type)
        return self.encode_texts(texts, prompt=prompt, task=task, what=task_metadata.name)

    def prompt_for(self, task_metadata: TaskMetadata, prompt_type: PromptType | None) -> tuple[str | None, str | None]:
        """The prompt's text and sentence-transformers' task ("query", "document") for inputs of an mteb task.

        As mteb's wrapper, which looks for the task's name, its type, then "query" or "document", and where it finds
        nothing calls sentence-transformers' `encode_query` or `encode_document`, which have defaults of their own.
        """
        from mteb.models.abs_encoder import get_prompt_name

        side = prompt_type.value if prompt_type else None
        name = get_prompt_name(self.prompts, task_metadata, prompt_type)
        if name is None:
            name = prompt_name(self.prompts, getattr(self.model, "default_prompt_name", None), side)
        return (None if name is None else self.prompts[name]), side

    def encode_texts(
        self, texts: Sequence[str], *, prompt: str | None = None, task: str | None = None, what: str = "encode"
    ) -> Vectors:
        """(texts, dimensions) float32, in the order given.

        Args:
            prompt: put before each text.
            task: "query" or "document", for models that treat them differently.
            what: for the progress.

        Raises:
            CuveeError: a vector that is not finite.
        """
        prompt, task = prompt or None, task if self._task_matters else None
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        distinct = list(rows)
        vectors = np.empty((len(distinct), self.embedding_model.dimension), np.float32)
        keys = text_keys(self._settings(prompt, task), distinct) if self.cache is not None else []
        new = self._look_up(keys, vectors) if self.cache is not None else list(range(len(distinct)))
        self._encode_new(distinct, new, keys, vectors, prompt, task, what)
        self.encoded += len(new)
        self.reused += len(texts) - len(new)
        if len(distinct) == len(texts):
            return vectors
        return vectors[[rows[text] for text in texts]]

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """All pairs, (rows of the first, rows of the second), by the model's own similarity function."""
        return self.model.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Row by row, (rows,)."""
        return self.model.similarity_pairwise(embeddings1, embeddings2)

    def _settings(self, prompt: str | None, task: str | None) -> dict[str, Any]:
        model = self.embedding_model
        return {
            "model": model.digest,
            "prompt": prompt,
            "task": task,
            "dtype": model.dtype,
            "max_length": max_length(self.model),  # as it is now: it can be set on a loaded model
            "truncate_dim": model.truncate_dim,
        }

    def _look_up(self, keys: Sequence[bytes], vectors: Vectors) -> list[int]:
        """Fills the rows that the cache knows; the others."""
        assert self.cache is not None
        new = []
        for start in range(0, len(keys), _LOOKUP):
            found = self.cache.get_many(keys[start : start + _LOOKUP])
            for row, key in enumerate(keys[start : start + _LOOKUP], start):
                vector = found.get(key)
                if vector is None or vector.shape != vectors.shape[1:]:
                    new.append(row)
                else:
                    vectors[row] = vector
        return new

    def _encode_new(
        self,
        texts: Sequence[str],
        new: Sequence[int],
        keys: Sequence[bytes],
        vectors: Vectors,
        prompt: str | None,
        task: str | None,
        what: str,
    ) -> None:
        """Fills the rows `new`, the longest texts first: too big a batch shows at once."""
        kwargs = {} if task is None else {"task": task}
        unsaved: list[int] = []
        done, saved = 0, time.monotonic()
        try:
            for rows, features in self._batches(texts, new, prompt, kwargs):
                vectors[rows] = self._forward(features, kwargs)
                self._refuse_not_finite(vectors[rows], [texts[row] for row in rows], what)
                unsaved += rows
                done += len(rows)
                self._progress(what, done, len(new))
                if time.monotonic() - saved > _SAVE_EVERY:
                    self._save(unsaved, keys, vectors)
                    unsaved, saved = [], time.monotonic()
        finally:
            self._save(unsaved, keys, vectors)

    def _save(self, rows: Sequence[int], keys: Sequence[bytes], vectors: Vectors) -> None:
        if self.cache is not None and rows:
            self.cache.put_many({keys[row]: vectors[row] for row in rows})

    def _batches(
        self, texts: Sequence[str], new: Sequence[int], prompt: str | None, kwargs: Mapping[str, Any]
    ) -> Iterable[Batch]:
        """The rows `new` in batches."""
        if not new:
            return
        lengths = token_lengths(self.model, [texts[row] for row in new], prompt)
        for batch in batches(lengths, budget=self._budget, rows=self._batch_size):
            rows = [new[i] for i in batch]
            yield rows, self.model.preprocess([texts[row] for row in rows], prompt=prompt, **kwargs)

    def _forward(self, features: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Vectors:
        import torch

        dimension, moved = self.embedding_model.dimension, self._moved(features)
        with torch.inference_mode():
            try:
                embeddings = self.model(moved, **kwargs)["sentence_embedding"]
            except torch.cuda.OutOfMemoryError:
                count = len(features["input_ids"]) if "input_ids" in features else 1
                if count == 1:
                    raise
                torch.cuda.empty_cache()
                self._budget = max(1, min(self._budget, features["input_ids"].numel() // 2))  # from the next call on
                return np.concatenate([self._forward(half, kwargs) for half in _halves(features, count)])
            vectors: Vectors = embeddings[:, :dimension].float().cpu().numpy()
        return vectors

    def _moved(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """To the model's device."""
        device = self.model.device
        return {key: value.to(device) if hasattr(value, "to") else value for key, value in features.items()}

    def _refuse_not_finite(self, vectors: Vectors, texts: Sequence[str], what: str) -> None:
        bad = ~np.isfinite(vectors).all(axis=1)  # (texts,)
        if bad.any():
            raise CuveeError(
                f"gives a vector that is not finite (NaN) for {texts[int(bad.argmax())][:60]!r}",
                where=f"{self.embedding_model.name} on {what}",
                mend="encode in float32" if self.embedding_model.dtype != "float32" else "the model is damaged",
            )


def _halves(features: Mapping[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """A batch cut in two: what has a row for each text, and all else as it is."""
    for part in (slice(None, count // 2), slice(count // 2, None)):
        yield {
            key: value[part] if hasattr(value, "shape") and value.ndim and len(value) == count else value
            for key, value in features.items()
        }


def batches(lengths: Sequence[int], *, budget: int, rows: int | None = None) -> Iterator[NDArray[np.intp]]:
    """Indices of texts in batches, the longest first, so that texts of like length go together.

    Args:
        lengths: tokens of each text.
        budget: tokens of a batch, padding included; a text that is longer goes alone.
        rows: texts of a batch instead of a budget.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        count = rows or min(_ROWS, max(1, budget // longest))
        yield order[start : start + count]
        start += count


def token_lengths(transformer: Any, texts: Sequence[str], prompt: str | None = None) -> list[int]:
    """Tokens of each text as the model reads it; of a model without a tokenizer of transformers', an estimate."""
    limit = max_length(transformer)
    from transformers import PreTrainedTokenizerBase

    tokenizer: Any = getattr(transformer, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        lengths = [len(text) // 4 + 1 for text in texts]
        return lengths if limit is None else [min(length, limit) for length in lengths]
    full = [prompt + text for text in texts] if prompt else list(texts)
    limits = {"truncation": True, "max_length": limit} if limit else {}
    encoded = tokenizer(full, return_attention_mask=False, return_token_type_ids=False, **limits)
    return [len(ids) for ids in encoded["input_ids"]]


def _budget(model: EmbeddingModel) -> int:
    if not model.device.startswith("cpu"):
        return ACCELERATOR_BUDGET
    return CPU_BUDGET if model.dtype == "float32" else CPU_LOW_PRECISION_BUDGET


def _depends_on_task(transformer: Any) -> bool:
    """Whether a text's vector differs between queries and documents, prompts aside; when in doubt, yes."""
    first = transformer[0]
    if any(type(module).__name__ == "Router" for module in transformer):
        return True
    if any(getattr(first, name, None) is not None for name in ("query_length", "document_length", "query_expansion")):
        return True
    template = getattr(getattr(transformer, "tokenizer", None), "chat_template", None)
    if "task" in str(template or ""):
        return True
    custom = [module for module in transformer if not type(module).__module__.startswith("sentence_transformers.")]
    return bool(custom) or "task" in (getattr(first, "model_forward_params", None) or ())
