"""Reconstructor: a causal language model that learns by reconstruction, under any mask.

The weights are float32 whatever the dtype: with bfloat16 only the arithmetic is lower (autocast). The vocabulary's head is
applied where something is predicted and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embeddings.images.reader import ImageReader, image_reader
from embeddings.reconstruction import masks
from embeddings.reconstruction.batch import EOS, SOURCE, Batch
from embeddings.reconstruction.patches import head_of
from embeddings.reconstruction.reader import Reader
from embeddings.training import lora
from embeddings.training.backbone import recompute_activations
from embeddings.training.checkpointing import Learner
from merging.checkpoint import Checkpoint, read_json
from merging.errors import CuveeError
from merging.loading import adapter_merged, check_device, only_our_words
from merging.sources import ModelRef

if TYPE_CHECKING:
    import torch

    from embeddings.training.config import ModelSettings

ATTENTIONS = ("sdpa", "eager", "flex_attention")
_WINDOWED = {"full_attention": False, "sliding_attention": True}


def open_reconstructor(
    settings: ModelSettings, *, attention: str = "sdpa", device: str = "cpu", where: str = "model", seed: int = 0
) -> Reconstructor:
    """Opens a causal language model, or a vision–language one with a causal head, in evaluation mode.

    Args:
        attention: of `ATTENTIONS`; an architecture that cannot do it (Gemma 2's soft-capping under sdpa) gets `eager`.
        device: "cpu" or a torch device.
        where: the settings' file and line, for errors.
        seed: of LoRA's first factors.

    Raises:
        CuveeError: no safetensors, no causal language model, no EOS, lacking weights, or an architecture whose layers do not
            all heed a mask of ours.
    """
    if attention not in ATTENTIONS:
        raise CuveeError(f"'{attention}' is no attention", where=where, mend=f"choose {', '.join(ATTENTIONS)}")
    check_device(device)
    if attention == "flex_attention" and device.partition(":")[0] == "cpu":
        raise CuveeError("flex_attention does not learn on a CPU", where=where, mend="choose sdpa")
    ref = ModelRef.parse(settings.path)
    if settings.revision is not None:
        ref = ModelRef(ref.path, settings.revision, ref.adapter, ref.adapter_revision)
    with Checkpoint.open(ref) as checkpoint:
        if not checkpoint.config:
            raise CuveeError("is no model: it has no config.json", where=str(ref))
        with adapter_merged(ref, checkpoint.path) as folder:
            module, tokenizer, processor = _load(folder, str(ref), attention, settings.trust_remote_code)
    module.to(device).eval()
    _choose_trainable(module, settings, where, seed)
    return Reconstructor(module, tokenizer, processor, dtype=settings.dtype, base=str(ref))


class Reconstructor(Learner):
    """A language model with what reconstruction needs of it.

    Attributes:
        module: the transformers model; its mode (training or evaluation) decides about dropout.
        tokenizer: of its texts.
        processor: reads its images; None for a model of texts.
        patch_head: paints masked patches in, see `patches`; trained with the model and saved in checkpoints alone.
        dtype: "float32", or "bfloat16" for the transformer's arithmetic.
        attention: of `ATTENTIONS`.
        eos_id: the token that everything goes through.
        mask_id: the token that stands for what is masked.
        embedding_length: mean Euclidean length of what the model reads for a token, when it was opened.
        base: what it was made from, as the user wrote it.

    Raises:
        CuveeError: its tokenizer lacks EOS or anything to mask with, or its layers do not heed a mask.
    """

    def __init__(
        self, module: Any, tokenizer: Any, processor: Any = None, *, dtype: str = "float32", base: str
    ) -> None:
        self.module, self.tokenizer, self.processor = module, tokenizer, processor
        self.dtype, self.base = dtype, base
        self.attention: str = module.config.get_text_config()._attn_implementation
        self.eos_id, self.mask_id = _eos_id(tokenizer, base), _mask_id(tokenizer, base)
        config = module.config.get_text_config()
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._windows = _windows(config, base)
        self.embedding_length = _embedding_length(module)
        self.patch_head = None if processor is None else head_of(module.config).to(self.device)
        self._refuse_silent_errors()

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.module.parameters()).device
        return device

    @property
    def width(self) -> int:
        """Of a state."""
        return int(self.module.config.get_text_config().hidden_size)

    @property
    def places(self) -> int | None:
        """Tokens of a sequence at most, of a model that has learned a vector for each place; None for all others."""
        config = self.module.config.get_text_config()
        if getattr(config, "rope_parameters", None) is not None:
            return None
        found = getattr(config, "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    def reader(self, max_length: Mapping[str, int] | None = None, *, pack: int = 0) -> Reader:
        """What turns texts into this model's ids.

        Args:
            max_length: tokens of a "source" and of a "target"; as `Reader` has it where it is left out.
            pack: tokens of a packed row; 0 for none.
        """
        pad = self.tokenizer.pad_token_id
        own = Reader(
            self.tokenizer,
            eos_id=self.eos_id,
            mask_id=self.mask_id,
            pad_id=self.eos_id if pad is None else int(pad),
            pad_left=self.tokenizer.padding_side == "left",
            pack=pack,
            processor=self.processor,
        )
        return own if max_length is None else replace(own, max_length=dict(max_length))

    def hidden(self, batch: Batch, *, eos_sees_b: bool = True, embeddings: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, tokens, width): the states of the last layer, after the final norm.

        Args:
            batch: on the model's device.
            eos_sees_b: see `masks.allowed`.
            embeddings: (sequences, width): what is read at the places of `batch.eos_places()` instead of EOS's own input
                embedding.
        """
        arguments: dict[str, Any] = {"position_ids": masks.positions(batch.segments, batch.documents), **batch.inputs}
        if batch.images is not None:
            arguments.update(batch.images.arguments())
        with self._autocast():
            if embeddings is None:
                arguments["input_ids"] = batch.ids
            else:
                arguments["inputs_embeds"] = self._with_embeddings(batch, embeddings)
            mask = self._mask(batch, eos_sees_b)
            states = self.module.base_model(attention_mask=mask, use_cache=False, return_dict=True, **arguments)
        hidden: torch.Tensor = states.last_hidden_state
        return hidden

    def logits(self, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """(places, vocabulary) float32: of the next token, for those places only.

        Args:
            hidden: (rows, tokens, width)
            places: (places, 2) int64: row and token.
        """
        import torch

        flat = places[:, 0] * hidden.shape[1] + places[:, 1]
        states = hidden.flatten(0, 1).index_select(0, flat)
        with self._autocast():
            logits: torch.Tensor = self.module.get_output_embeddings()(states)
        logits = logits.float()
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def eos_states(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(sequences, width) float32: the states at `batch.eos_places()`."""
        row, token = batch.eos_places().unbind(1)
        return hidden[row, token].float()

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Those that are trained, by the name that `state` gives them."""
        yield from ((name, value) for name, value in self.module.named_parameters() if value.requires_grad)
        if self.patch_head is not None:
            yield from ((f"patch_head.{name}", value) for name, value in self.patch_head.named_parameters())

    def save_language_model(self, folder: Path) -> None:
        """Writes the language model with its head, in float32 safetensors, LoRA merged in, and its tokenizer or processor.

        Training can go on afterwards as if nothing had been saved.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with lora.merged_in(self.module), only_our_words():
            self.module.save_pretrained(folder)
            (self.processor or self.tokenizer).save_pretrained(folder)

    def _autocast(self) -> Any:
        import torch

        return torch.autocast(self.device.type, torch.bfloat16) if self.dtype == "bfloat16" else nullcontext()

    def _with_embeddings(self, batch: Batch, embeddings: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, width): input embeddings, the given ones at the EOS places."""
        read: torch.Tensor = self.module.get_input_embeddings()(batch.ids)
        row, token = batch.eos_places().unbind(1)
        return read.index_put((row, token), embeddings.to(read.dtype))

    def _mask(self, batch: Batch, eos_sees_b: bool) -> Any:
        """The mask as the architecture takes it: one, or one for each kind of layer."""
        made = {kind: self._one_mask(batch, eos_sees_b, window) for kind, window in self._windows.items()}
        return made.get("", made)

    def _one_mask(self, batch: Batch, eos_sees_b: bool, window: int | None) -> Any:
        import torch

        if window is not None and window >= batch.ids.shape[1]:
            window = None
        options: dict[str, Any] = {"documents": batch.documents, "eos_sees_b": eos_sees_b, "window": window}
        if self.attention == "flex_attention":
            from torch.nn.attention.flex_attention import create_block_mask

            mod = masks.mask_mod(batch.segments, batch.pattern, **options)
            rows, tokens = batch.ids.shape
            return create_block_mask(mod, rows, None, tokens, tokens, device=batch.ids.device)
        dtype = torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
        return masks.for_model(masks.allowed(batch.segments, batch.pattern, **options), self.attention, dtype)

    def _refuse_silent_errors(self) -> None:
        """Tries the model out: transformers takes a mask that it does not heed without a word.

        Raises:
            CuveeError: a token reaches one of another sequence, does not reach one before it, or the head does more than
                is known here.
        """
        import torch

        kind = type(self.module).__name__
        mend = "update transformers, or choose 'attention: eager'"
        before, self.dtype = (self.module.training, self.dtype), "float32"  # in which nothing is near by chance
        self.module.eval()
        ids = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 6, 3, 4, 5]], device=self.device)  # all but one equal
        ids += self.module.config.get_text_config().vocab_size // 2  # words: special tokens may be as good as untrained
        segments = torch.tensor([[SOURCE, SOURCE, EOS] * 2] * 2, device=self.device)
        documents = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2, device=self.device)
        places = torch.tensor([[0, 1], [0, 4]], device=self.device)
        batch = Batch(ids, segments, places, ids[places[:, 0], places[:, 1] + 1], "bidirectional", documents)
        causal = replace(batch, pattern="causal", documents=None)
        try:
            with torch.inference_mode():
                states = self.hidden(batch)  # (2, tokens, width)
                own = self.logits(self.hidden(causal), places)
                theirs = self.module(input_ids=ids, use_cache=False, return_dict=True).logits
        except Exception as error:  # every architecture has its own ways to fail
            reason = next(iter(str(error).strip().splitlines()), "")[:120]
            what = f"{kind} takes no mask of ours ({type(error).__name__}: {reason})"
            raise CuveeError(what, where=self.base, mend="take another model") from error
        change = (states[0] - states[1]).abs().amax(1)  # (tokens,)
        self.module.train(before[0])
        self.dtype = before[1]
        if float(change[:2].min()) <= 1e-6 * float(states.abs().max()):
            raise CuveeError(f"{kind} does not heed a mask: it stays causal", where=self.base, mend=mend)
        if float(change[3:].max()) > 0.01 * float(change[:2].min()):
            raise CuveeError(f"{kind} does not heed a mask: sequences of a packed row mix", where=self.base, mend=mend)
        off = (own - theirs[places[:, 0], places[:, 1]]).abs().max()
        if float(off) > 0.01 * float(own.abs().max()):
            raise CuveeError(f"{kind} makes its logits in a way that is not known here", where=self.base)


def _load(folder: Path, ref: str, attention: str, trusted: bool) -> tuple[Any, Any, ImageReader | None]:
    """Module, tokenizer and reader of images (None for texts alone)."""
    import torch
    import transformers

    written = read_json(folder / "config.json")
    vision = "vision_config" in written
    options = {"local_files_only": True, "trust_remote_code": trusted}
    loader: Any = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    with only_our_words():
        try:
            config = transformers.AutoConfig.from_pretrained(str(folder), **options)
            known = loader._model_mapping
            if attention == "sdpa" and type(config) in known and not known[type(config)]._supports_sdpa:
                attention = "eager"
            module, report = loader.from_pretrained(
                str(folder),
                dtype=torch.float32,
                use_safetensors=True,
                attn_implementation=attention,
                output_loading_info=True,
                **options,
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
        except Exception as error:  # every architecture has its own ways to fail
            reason = next(iter(str(error).strip().splitlines()), "")[:160]
            mend = "add 'trust_remote_code: true' if you trust its code" if "trust_remote_code" in str(error) else ""
            what = f"cannot be loaded as a causal language model ({type(error).__name__}: {reason})"
            raise CuveeError(what, where=ref, mend=mend) from error
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        what = f"lacks the weights '{missing[0]}'{more}, which would be random"
        raise CuveeError(what, where=ref, mend="take a checkpoint with its language model head")
    # How it attends is the objective's to say, in training and in what is written afterwards.
    vars(module.config.get_text_config()).pop("is_causal", None)
    return module, tokenizer, image_reader(folder, written, tokenizer, ref)


def _choose_trainable(module: Any, settings: ModelSettings, where: str, seed: int) -> None:
    if settings.lora is not None:
        module.requires_grad_(False)
        _refuse_tied(module, settings.lora.targets, where)
        lora.add_lora(module, settings.lora, where, seed)
    if settings.gradient_checkpointing:
        recompute_activations(module, where)


def _refuse_tied(module: Any, targets: str | Sequence[str], where: str) -> None:
    """Raises CuveeError where a weight to adapt has another place: it would learn in one and be written to both."""
    if isinstance(targets, str):
        return  # peft leaves the head out of all linear layers
    every = [(name, id(value)) for name, value in module.named_parameters(remove_duplicate=False)]
    for own, number in every:
        layer = own.removesuffix(".weight")
        if not any(f".{layer}".endswith(f".{target}") for target in targets):
            continue
        other = next((name for name, its in every if its == number and name != own), None)
        if other is not None:
            what = f"LoRA on '{layer}' would change '{other.removesuffix('.weight')}' too: their weights are tied"
            raise CuveeError(what, where=where, mend="leave it out of the targets")


def _windows(config: Any, base: str) -> dict[str, int | None]:
    """The sliding window of each kind of layer; under "" where all layers are of one kind and take one mask."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if not kinds:
        return {"": window}
    for kind in kinds:
        if kind not in _WINDOWED:
            raise CuveeError(f"has layers of '{kind}', for which no mask is known here", where=base)
    return {kind: window if _WINDOWED[kind] else None for kind in dict.fromkeys(kinds)}


def _embedding_length(module: Any) -> float:
    """With the factor that Gemma puts on its embeddings."""
    import torch

    layer = module.get_input_embeddings()
    with torch.inference_mode():
        first = torch.arange(1, 3, device=layer.weight.device)
        factor = layer(first).norm() / layer.weight[first].norm()
        return float(layer.weight.norm(dim=1).mean() * factor)


def _eos_id(tokenizer: Any, base: str) -> int:
    if tokenizer.eos_token_id is None:
        raise CuveeError("its tokenizer has no EOS to go through", where=base, mend="give it an eos_token")
    return int(tokenizer.eos_token_id)


def _mask_id(tokenizer: Any, base: str) -> int:
    """The mask token, else the last id of "_"."""
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    ids = tokenizer("_", add_special_tokens=False)["input_ids"]
    if not ids or ids[-1] == tokenizer.unk_token_id:
        raise CuveeError("its tokenizer has nothing to mask with", where=base, mend="give it a mask_token")
    return int(ids[-1])
