"""PretrainingConfig: what `cuvee pretrain OBJECTIVE CONFIG.yml RUN` is told; typed, every mistake with its line and its mend.

    model: SmolLM2                     # a decoder; as in `cuvee train`, but for its pooling
    data:                              # as in `cuvee train`
      - {file: pairs.jsonl.gz}
    images: [{file: emoji.jsonl}]      # likewise, of `cocoa`; besides `data`, or alone
    max_length: {query: 64, document: 256}   # tokens; or one number for both
    batch_size: 64                     # of a step; micro_batch: of them at once
    epochs: 1                          # or steps: N
    learning_rate: 2.0e-5
    warm_up: {mask: 0.2, steps: 3000}  # CoCoA's first stage: anything said here replaces what is said above
    bridge: {mask: 0.7, eos_sees_b: true, bridge: attention}    # its second; `false` leaves one out
    contrastive: {batch_size: 1024, steps: 2000}   # afterwards: the body of a `cuvee train` YAML

The objectives `llm-ql` and `retromae` have one stage, and what they are told stands above: `corruption`, `loss_on`;
`encoder_mask`, `decoder_mask`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from embeddings.images.settings import ImageSettings
from embeddings.training import config as training
from embeddings.training.config import ModelSettings, TrainingConfig
from embeddings.training.data_settings import SIDES, DataSettings
from embeddings.training.settings import without_places
from merging import node
from merging.errors import CuveeError
from merging.fields import choice, flag, given, mapping, number, told_as
from merging.node import Node
from merging.recipe import read_file
from merging.setting import refuse_unknown_keys

#: The stages of an objective, in their order.
STAGES: Mapping[str, tuple[str, ...]] = {
    "cocoa": ("warm_up", "bridge"),
    "llm-ql": ("query_likelihood",),
    "retromae": ("retromae",),
}
#: As published [code]; RetroMAE's are CoCoA's, its own being those of a BERT from nothing.
LEARNING_RATES = {"cocoa": 2e-5, "llm-ql": 1e-5, "retromae": 2e-5}
ATTENTIONS = ("sdpa", "eager", "flex_attention")
FROM = ("query", "document", "both")
#: What may change in a RUN: nothing that is learned depends on it, or it comes afterwards.
NOT_LEARNED_FROM = ("save_every", "contrastive")

_NOUN = "configuration"
_OF_A_STAGE = (
    *("batch_size", "micro_batch", "pack", "epochs", "steps"),
    *("learning_rate", "warmup", "weight_decay", "gradient_clip"),
)
_OF_ALL = (
    "model",
    "data",
    "images",
    "max_length",
    "attention",
    "seed",
    "held_out",
    "measure_every",
    "save_every",
    "contrastive",
)
_PRETRAINED = "the-pre-trained-model"
#: What a contrastive stage may say of the model, and takes over where it does not; the rest follows from how it was
#: pre-trained.
_OF_CONTRASTIVE_MODEL = ("lora", "dtype", "gradient_checkpointing", "trust_remote_code")
_DATA = ("data", "images")
#: What their entries may say for `cuvee train` alone.
_CONTRASTIVE_ONLY = ("loss", "mine", "negatives")
#: Objectives whose models look to both sides.
_BIDIRECTIONAL = ("cocoa", "retromae")


@dataclass(frozen=True)
class StageSettings:
    """One stage.

    Attributes:
        name: of `STAGES`.
        parameters: of the objective.
        reads: of pairs, what is the source: "query", "document", or "both", which makes two of each pair.
        batch_size: rows of a step.
        micro_batch: rows that go through the model at once; 0: all.
        pack: tokens of a row that holds several sequences; 0: each has a row of its own.
        epochs, steps: one of them is None.
        warmup: share of the steps in [0, 1].
        gradient_clip: the norm's bound; 0 for none.
        where, rate_where: the lines of the stage and of its learning rate.
    """

    name: str
    parameters: Mapping[str, Any]
    reads: str = "query"
    batch_size: int = 64
    micro_batch: int = 0
    pack: int = 0
    epochs: float | None = 1.0
    steps: int | None = None
    learning_rate: float = 2e-5
    warmup: float = 0.1
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    where: str = field(default="", compare=False)
    rate_where: str = field(default="", compare=False)


@dataclass(frozen=True)
class PretrainingConfig:
    """A pre-training.

    Attributes:
        objective: of `STAGES`.
        data, images: at least one of both.
        stages: at least one, in their order.
        max_length: tokens by "query" and "document", a source's EOS among them.
        attention: transformers' implementation.
        held_out: rows that are not trained on but measured; None: 64, at most a tenth of them.
        measure_every: steps; 0: only before and after a stage.
        save_every: steps between checkpoints; 0 for none.
        contrastive: a training of the result, whose model is filled in when there is one; None: none.
        where: the file's name; `at` has the lines.
        text: the YAML.
    """

    objective: str
    model: ModelSettings
    data: tuple[DataSettings, ...]
    stages: tuple[StageSettings, ...]
    images: tuple[ImageSettings, ...] = ()
    max_length: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 512))
    attention: str = "sdpa"
    seed: int = 0
    held_out: int | None = None
    measure_every: int = 200
    save_every: int = 200
    contrastive: TrainingConfig | None = None
    where: str = field(default="configuration", compare=False)
    text: str = field(default="", compare=False, repr=False)
    lines: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def at(self, key: str) -> str:
        """Where the configuration says it: "config.yml:3"; the file where it says nothing."""
        return self.lines.get(key, self.where)

    @property
    def bidirectional(self) -> bool:
        """Whether the model looks to both sides."""
        return self.objective in _BIDIRECTIONAL

    @property
    def reading(self) -> TrainingConfig:
        """What `embeddings.training` reads data by."""
        return TrainingConfig(
            self.model, self.data, max_length=self.max_length, seed=self.seed, where=self.where, lines=self.lines
        )

    def seeded(self, seed: int | None) -> PretrainingConfig:
        """With another seed, of the contrastive stage too; the same for None."""
        if seed is None:
            return self
        after = None if self.contrastive is None else replace(self.contrastive, seed=seed)
        return replace(self, seed=seed, contrastive=after)

    def contrastive_of(self, model: Path) -> TrainingConfig | None:
        """The training that follows, of the model that there is by now; its text is that of a whole configuration."""
        after = self.contrastive
        if after is None:
            return None
        told = yaml.safe_load(after.text)
        told["model"]["path"], told["seed"] = str(model), after.seed
        text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
        return replace(after, model=replace(after.model, path=str(model)), text=text)

    def plain(self) -> dict[str, Any]:
        """All settings that the pre-trained weights follow from, the defaults too, as JSON knows them."""
        found = without_places(asdict(replace(self, contrastive=None)))
        for data in (*found["data"], *(each["data"] for each in found["images"])):
            del data["column_lines"]
        for stage in found["stages"]:
            del stage["rate_where"]
        return {key: value for key, value in found.items() if key not in ("text", "lines", *NOT_LEARNED_FROM)}


def load(file: str | os.PathLike[str], objective: str) -> PretrainingConfig:
    """Reads a configuration's file.

    Args:
        objective: of `STAGES`.

    Raises:
        CuveeError: not readable, or it says something impossible.
    """
    with told_as(_NOUN):
        return parse(read_file(file), objective, os.fspath(file))


def parse(text: str, objective: str, where: str = "configuration") -> PretrainingConfig:
    """Reads a configuration's text; mistakes are told at `where:line`; relative paths are looked for in where's folder first.

    Raises:
        CuveeError: not YAML, or it says something impossible.
    """
    with told_as(_NOUN):
        root = node.read(text, where)
        if not isinstance(root.value, dict):
            raise CuveeError("is no mapping", where=root.where, mend="write at least 'model:' and 'data:'")
        _refuse_keys(root, objective)
        near = Path(where).parent
        contrastive = _contrastive(root, where)
        data, images = _data(root, near, objective, contrastive)
        return PretrainingConfig(
            objective=objective,
            model=_model(root, near),
            data=data,
            images=images,
            stages=_stages(root, objective),
            max_length=training.lengths_by_side(root),
            attention=choice(root, "attention", ATTENTIONS, PretrainingConfig.attention),
            seed=number(root, "seed", PretrainingConfig.seed, low=0, high=2**32 - 1, whole=True),
            held_out=number(root, "held_out", None, low=0, whole=True),
            measure_every=number(root, "measure_every", PretrainingConfig.measure_every, low=0, whole=True),
            save_every=number(root, "save_every", PretrainingConfig.save_every, low=0, whole=True),
            contrastive=contrastive,
            where=where,
            text=text,
            lines={key: item.where for key, item in root.value.items()},
        )


def _parameters(root: Node, stage: str) -> dict[str, Any]:
    """What a stage's objective is told, with the published values as defaults."""
    if stage == "warm_up":
        return {
            "mask": number(root, "mask", 0.2, above=0, high=1),
            "patches": number(root, "patches", 0.3, low=0, high=1),
            "patch_weight": number(root, "patch_weight", 0.5, low=0),
        }
    if stage == "bridge":
        return {
            "mask": number(root, "mask", 0.7, above=0, high=1),
            "eos_sees_b": flag(root, "eos_sees_b", True),
            "bridge": choice(root, "bridge", ("attention", "embedding"), "attention"),
        }
    if stage == "query_likelihood":
        return {
            "corruption": number(root, "corruption", 0.6, low=0, high=1),
            "loss_on": choice(root, "loss_on", ("query", "all"), "query"),
        }
    return {
        "encoder_mask": number(root, "encoder_mask", 0.3, low=0, high=1),
        "decoder_mask": number(root, "decoder_mask", 0.7, above=0, high=1),
        "encoder_weight": number(root, "encoder_weight", 1.0, low=0),
    }


def _names_of_parameters(stage: str) -> tuple[str, ...]:
    reads = ("source",) if stage == "bridge" else ()
    return (*_parameters(Node({}, ""), stage), *reads)


def _refuse_keys(root: Node, objective: str) -> None:
    """Of another objective too: what is silently left aside is not what was meant."""
    stages = STAGES[objective]
    own = stages if len(stages) > 1 else _names_of_parameters(stages[0])
    for other, theirs in STAGES.items():
        foreign = theirs if len(theirs) > 1 else _names_of_parameters(theirs[0])
        for key in root.value:
            if key in foreign and key not in own and other != objective:
                mend = f"remove it, or run `cuvee pretrain {other}`"
                raise CuveeError(f"'{key}' is a setting of {other}", where=root.value[key].where, mend=mend)
    refuse_unknown_keys(root, (*_OF_ALL, *_OF_A_STAGE, *own), "a configuration")


def _stages(root: Node, objective: str) -> tuple[StageSettings, ...]:
    names = STAGES[objective]
    if len(names) == 1:
        return (_stage(root, root, names[0], objective),)
    found = []
    for name in names:
        own = given(root, name)
        if own is not None and own.value is False:
            continue
        if own is not None and (own.value is True or not isinstance(own.value, dict)):
            mend = f"write '{name}: {{mask: 0.5}}', or '{name}: false' to leave the stage out"
            raise CuveeError(f"'{name}' must be a mapping, not {own}", where=own.where, mend=mend)
        if own is not None:
            refuse_unknown_keys(own, (*_names_of_parameters(name), *_OF_A_STAGE), f"'{name}'")
        found.append(_stage(root, own or Node({}, root.where), name, objective))
    if not found:
        raise CuveeError("leaves out all of its stages", where=root.value[names[-1]].where, mend="keep one")
    return tuple(found)


def _stage(root: Node, own: Node, name: str, objective: str) -> StageSettings:
    said = {key for key in ("epochs", "steps") if given(own, key) is not None}
    kept = {key: item for key, item in root.value.items() if not (said and key in ("epochs", "steps"))}
    both = Node({**kept, **own.value}, own.where)
    return StageSettings(
        name=name,
        parameters=_parameters(own, name),
        reads=choice(own, "source", FROM, "query") if name == "bridge" else "document",
        batch_size=number(both, "batch_size", StageSettings.batch_size, low=1, whole=True),
        micro_batch=number(both, "micro_batch", StageSettings.micro_batch, low=0, whole=True),
        pack=number(both, "pack", StageSettings.pack, low=0, whole=True),
        **training.duration(both),
        learning_rate=number(both, "learning_rate", LEARNING_RATES[objective], above=0),
        warmup=number(both, "warmup", StageSettings.warmup, low=0, high=1),
        weight_decay=number(both, "weight_decay", StageSettings.weight_decay, low=0),
        gradient_clip=number(both, "gradient_clip", StageSettings.gradient_clip, low=0),
        where=own.where,
        rate_where=(given(both, "learning_rate") or own).where,
    )


def _model(root: Node, near: Path) -> ModelSettings:
    """The decoder: what it pools with, and how it attends, follows from the objective."""
    found = training.model_settings(root, near)
    model = root.value["model"]
    for key in ("pooling", "normalize", "bidirectional", "append_eos"):
        if isinstance(model.value, dict) and given(model, key) is not None:
            mend = "remove it: the result pools its last token, EOS, and attends as it was trained to"
            raise CuveeError(f"'{key}' follows from the objective", where=model.value[key].where, mend=mend)
    return found


def _data(
    root: Node, near: Path, objective: str, contrastive: TrainingConfig | None
) -> tuple[tuple[DataSettings, ...], tuple[ImageSettings, ...]]:
    data, images = training.data_and_images(root, near)
    if images and objective != "cocoa":
        mend = "remove them, or run `cuvee pretrain cocoa`"
        raise CuveeError(f"{objective} reads no images", where=root.value["images"].where, mend=mend)
    shared = contrastive is not None and not _says_data(root.value["contrastive"])
    for kind in _DATA if not shared else ():
        listed = given(root, kind)
        if listed is None:
            continue
        for entry in listed.value if isinstance(listed.value, list) else [listed]:
            for key in _CONTRASTIVE_ONLY:
                if isinstance(entry.value, dict) and given(entry, key) is not None:
                    mend = f"remove it, or write it under 'contrastive: {{{kind}: …}}'"
                    what = f"'{key}' means nothing to a reconstruction"
                    raise CuveeError(what, where=entry.value[key].where, mend=mend)
    return (
        tuple(replace(each, loss=None, mine=None) for each in data),
        tuple(replace(each, data=replace(each.data, loss=None)) for each in images),
    )


def _says_data(node: Node) -> bool:
    return any(given(node, kind) is not None for kind in _DATA)


def _contrastive(root: Node, where: str) -> TrainingConfig | None:
    """The training that follows; what it does not say of data, images, lengths and seed is that of the pre-training."""
    own = mapping(root, "contrastive", "{batch_size: 1024, steps: 2000}")
    if own is None:
        return None
    body = dict(own.value)
    taken_over = [*(() if _says_data(own) else _DATA), "max_length", "seed"]
    body |= {key: root.value[key] for key in taken_over if key in root.value and key not in body}
    said = mapping(own, "model", "{lora: {r: 8, alpha: 64}}")
    if said is not None:
        refuse_unknown_keys(said, _OF_CONTRASTIVE_MODEL, "the pre-trained model")
    above = root.value["model"].value if "model" in root.value else None
    above = above if isinstance(above, dict) else {}
    model = {
        **{key: above[key] for key in _OF_CONTRASTIVE_MODEL if key in above},
        **(said.value if said is not None else {}),
        "path": Node(_PRETRAINED, own.where, _PRETRAINED),
    }
    whole = Node({**body, "model": Node(model, own.where)}, own.where)
    return training.of_node(whole, yaml.safe_dump(whole.plain(), sort_keys=False, allow_unicode=True), where)
