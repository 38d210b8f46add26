"""TrainingConfig: what `cuvee train CONFIG.yml RUN` is told; typed, every mistake with its line and its mend.

    model: ../models/minilm            # or {path, revision, pooling, lora: {r: 32, alpha: 32}, dtype: bfloat16, …}
    data:                              # see embeddings/training/data_settings.py
      - suite: shipped
      - file: pairs.jsonl.gz
    images: [{file: emoji.jsonl}]      # see embeddings/images/settings.py; besides `data`, or alone
    schedule: batch_level              # which batch comes next
    loss: {temperature: 0.02, matryoshka: [384, 128]}   # defaults for all data sets
    batch_size: 128
    epochs: 1                          # or steps: N
    learning_rate: 5.0e-5
    max_length: {query: 64, document: 256}   # tokens; or one number for both
    bags: [40, 60, 80, 100]            # % of each data set, a member each; "complement": what the one before left out
    merge: multislerp
    weights: size                      # or equal, or search: on the tasks of `evaluate`
    evaluate: {suite: shipped, every: 200, split: validation}

Relative paths are looked for near the configuration, then in the working directory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from embeddings.evaluation import suite
from embeddings.evaluation.suite_settings import suite_folder, suite_tasks
from embeddings.images.settings import ImageSettings, image_settings, of_both
from embeddings.training.config_check import check_data_loss, refuse_unknown_names
from embeddings.training.data_settings import (
    SIDES,
    DataSettings,
    LossSettings,
    data_file,
    data_list,
    loss_settings,
    refuse_twins,
)
from embeddings.training.mining_settings import MiningSettings
from embeddings.training.model_settings import LoraSettings, ModelSettings, model_settings
from embeddings.training.search_settings import SearchSettings, weights
from embeddings.training.settings import EvaluationSettings, MergeSettings, TrainingConfig
from merging import node
from merging.errors import CuveeError, did_you_mean
from merging.fields import (
    choice,
    given,
    mapping,
    number,
    number_of,
    parameters,
    text,
    text_of,
    told_as,
)
from merging.node import Node
from merging.recipe import read_file
from merging.setting import refuse_unknown_keys

__all__ = [
    "COMPLEMENT",
    "DataSettings",
    "EvaluationSettings",
    "ImageSettings",
    "LoraSettings",
    "LossSettings",
    "MergeSettings",
    "MiningSettings",
    "ModelSettings",
    "SearchSettings",
    "TrainingConfig",
    "data_settings",
    "load",
    "model_settings",
    "parse",
]

COMPLEMENT = "complement"
_NOUN = "configuration"


def load(file: str | os.PathLike[str]) -> TrainingConfig:
    """Reads a configuration's file.

    Raises:
        CuveeError: not readable, or it says something impossible.
    """
    with told_as(_NOUN):
        return parse(read_file(file), os.fspath(file))


def parse(yaml: str, where: str = "configuration") -> TrainingConfig:
    """Reads a configuration's text; mistakes are told at `where:line`; relative paths are looked for in where's folder first.

    Raises:
        CuveeError: not YAML, or it says something impossible.
    """
    with told_as(_NOUN):
        root = node.read(yaml, where)
        if not isinstance(root.value, dict):
            raise CuveeError("is no mapping", where=root.where, mend="write at least 'model:' and 'data:'")
        return of_node(root, yaml, where)


def of_node(root: Node, yaml: str, where: str) -> TrainingConfig:
    """As `parse`, of a mapping that is read already.

    Args:
        yaml: text that says the same.
        where: the file's name; relative paths are looked for in its folder first.

    Raises:
        CuveeError: it says something impossible.
    """
    with told_as(_NOUN):
        known = [each.name for each in fields(TrainingConfig) if each.name not in ("search", "where", "text", "lines")]
        refuse_unknown_keys(root, ["weights", *known], "a configuration")
        near = Path(where).parent
        model, evaluate = model_settings(root, near), _evaluation(root, near)
        data, images = data_and_images(root, near)
        merge_weights, search = weights(root, near, lambda: _validation(evaluate, data))
        config = TrainingConfig(
            model=model,
            data=data,
            images=images,
            schedule=text(root, "schedule", TrainingConfig.schedule),
            loss=loss_settings(given(root, "loss")) or LossSettings(),
            batch_size=number(root, "batch_size", TrainingConfig.batch_size, low=1, whole=True),
            **duration(root),
            learning_rate=number(root, "learning_rate", TrainingConfig.learning_rate, above=0),
            warmup=number(root, "warmup", TrainingConfig.warmup, low=0, high=1),
            weight_decay=number(root, "weight_decay", TrainingConfig.weight_decay, low=0),
            max_length=lengths_by_side(root),
            gradient_clip=number(root, "gradient_clip", TrainingConfig.gradient_clip, low=0),
            gradient_cache=number(root, "gradient_cache", TrainingConfig.gradient_cache, low=0, whole=True),
            seed=number(root, "seed", TrainingConfig.seed, low=0, high=2**32 - 1, whole=True),
            bags=_bags(root),
            merge=_merge(root),
            merge_weights=merge_weights,
            search=search,
            core=number(root, "core", TrainingConfig.core, low=0, high=100),
            evaluate=evaluate,
            save_every=number(root, "save_every", TrainingConfig.save_every, low=0, whole=True),
            where=where,
            text=yaml,
            lines={key: item.where for key, item in root.value.items()},
        )
    refuse_unknown_names(config)
    return config


def data_settings(path: str | os.PathLike[str]) -> tuple[tuple[DataSettings, ...], tuple[ImageSettings, ...]]:
    """What `--data` names: a YAML with `data:` and `images:` (or the list of `data:` alone), or a bare table of pairs.

    Raises:
        CuveeError: not readable, or it says something impossible.
    """
    file = Path(path)
    if file.suffix.lower() not in (".yml", ".yaml"):
        if not file.is_file():
            raise CuveeError("no such file", where=str(file), mend="give a table, or a YAML with a 'data:' list")
        return (data_file(file),), ()
    with told_as(_NOUN):
        root = node.read(read_file(file), str(file))
        if isinstance(root.value, list):
            root = Node({"data": root}, root.where)
        if not isinstance(root.value, dict):
            raise CuveeError("is no mapping", where=root.where, mend="write 'data:' and a list of data sets")
        data, images = data_and_images(root, file.parent)
    for each in of_both(data, images):
        check_data_loss(each, {})
    return data, images


def data_and_images(root: Node, near: Path) -> tuple[tuple[DataSettings, ...], tuple[ImageSettings, ...]]:
    """What `data:` and `images:` list; CuveeError where both are absent, or two data sets have one name."""
    images = image_settings(root, near)
    if given(root, "data") is None and images:
        return (), images
    data = data_sets(root, near)
    refuse_twins(of_both(data, images))
    return data, images


def data_sets(root: Node, near: Path) -> tuple[DataSettings, ...]:
    """What `data:` lists; CuveeError where it is absent."""
    data = given(root, "data")
    if data is None:
        raise CuveeError("has no 'data'", where=root.where, mend="write 'data: [{suite: shipped}]', say")
    return data_list(data, near)


def duration(root: Node) -> dict[str, Any]:
    """`epochs` and `steps`, one of them None; one epoch where neither is said."""
    epochs = number(root, "epochs", None, above=0)
    steps = number(root, "steps", None, low=1, whole=True)
    if epochs is not None and steps is not None:
        raise CuveeError("'epochs' and 'steps' exclude each other", where=root.value["steps"].where, mend="keep one")
    return {"epochs": 1.0 if steps is None and epochs is None else epochs, "steps": steps}


def lengths_by_side(root: Node) -> dict[str, int]:
    """`max_length`: tokens of a query and of a document at most."""
    length, default = given(root, "max_length"), 512
    if length is None or not isinstance(length.value, dict):
        return dict.fromkeys(SIDES, number(root, "max_length", default, low=2, whole=True))
    refuse_unknown_keys(length, SIDES, "'max_length'")
    return {side: number(length, side, default, low=2, whole=True) for side in SIDES}


def _bags(root: Node) -> tuple[float | str, ...]:
    bags = given(root, "bags")
    if bags is None:
        return ()
    if not isinstance(bags.value, list) or not bags.value:
        mend = "write 'bags: [40, 60, 80, 100]'"
        raise CuveeError(f"'bags' must be a list of percentages, not {bags}", where=bags.where, mend=mend)
    found: list[float | str] = []
    for item in bags.value:
        if isinstance(item.value, str) and not item.value[:1].isdigit():
            if item.value != COMPLEMENT:
                mend = did_you_mean(item.value, [COMPLEMENT], f"write a percentage, or '{COMPLEMENT}'")
                raise CuveeError(f"'{item.value}' is no bag", where=item.where, mend=mend)
            if not found or found[-1] == COMPLEMENT or found[-1] == 100:
                what = "a complement has no part before it" if not found or found[-1] == COMPLEMENT else ""
                what = what or "the complement of 100 % is empty"
                raise CuveeError(what, where=item.where, mend=f"write 'bags: [50, {COMPLEMENT}]'")
            found.append(COMPLEMENT)
        else:
            found.append(number_of(item, "bags", above=0, high=100))
    return tuple(found)


def _merge(root: Node) -> MergeSettings:
    merge = given(root, "merge")
    if merge is None:
        return MergeSettings()
    if not isinstance(merge.value, dict):
        return MergeSettings(text_of(merge, "merge"), where=merge.where)
    refuse_unknown_keys(merge, ("method", "parameters"), "'merge'")
    values = mapping(merge, "parameters", "{density: 0.5}")
    found = parameters(values.value, "the merge") if values else {}
    return MergeSettings(text(merge, "method", MergeSettings.method), found, merge.where)


def _evaluation(root: Node, near: Path) -> EvaluationSettings | None:
    evaluate = mapping(root, "evaluate", "{suite: shipped, every: 200}")
    if evaluate is None:
        return None
    refuse_unknown_keys(evaluate, [each.name for each in fields(EvaluationSettings)], "'evaluate'")
    folder = suite_folder(evaluate, near)
    split = choice(evaluate, "split", suite.SPLITS, EvaluationSettings.split)
    chosen = suite_tasks(evaluate, folder, split)
    every = number(evaluate, "every", EvaluationSettings.every, low=1, whole=True)
    return EvaluationSettings(folder, chosen, every, split)


def _validation(evaluate: EvaluationSettings | None, data: Sequence[DataSettings]) -> dict[str, Any] | None:
    """The tasks to score on where nothing else is said: those of `evaluate`, else those trained on that can be."""
    if evaluate is not None:
        return {"suite": evaluate.suite or "shipped", "tasks": list(evaluate.tasks), "split": evaluate.split}
    folders = {each.suite for each in data if each.task is not None}
    if len(folders) != 1:
        return None
    (folder,) = folders
    able = {task.name for task in suite.load(folder) if EvaluationSettings.split in task.splits}
    tasks = [each.task for each in data if each.task in able]
    return {"suite": folder or "shipped", "tasks": tasks, "split": EvaluationSettings.split} if tasks else None
