"""What a training configuration names, looked up before any work begins: losses, their parameters, schedule, merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embeddings.images.settings import of_both
from embeddings.training import losses, schedule
from embeddings.training.data_settings import GRADED, DataSettings, LossSettings
from embeddings.training.settings import MergeSettings, TrainingConfig
from merging import handover, methods
from merging.errors import CuveeError, MergeError, did_you_mean, quoted


def refuse_unknown_names(config: TrainingConfig) -> None:
    """Raises CuveeError, at its line, for the first name that is in no registry, or that does not fit its data."""
    schedule.get(config.schedule, config.at("schedule"))
    _check_merge(config.merge)
    _check_search(config)
    _check_loss(config.loss, {})
    for data in of_both(config.data, config.images):
        check_data_loss(data, config.loss.parameters)


def check_data_loss(data: DataSettings, defaults: Mapping[str, Any]) -> None:
    """Raises CuveeError if a data set's own loss is unknown, or needs what rows of its type do not have."""
    own = data.loss
    if own is None:
        return
    _check_loss(own, defaults)
    graded = data.type in GRADED
    if own.name is not None and (losses.get(own.name).needs == "scores") != graded:
        needs, has = losses.get(own.name).needs, "scores" if graded else "positives"
        what = f"the loss '{own.name}' needs {needs}; the rows of {data.type} have {has}"
        usual = losses.default_of(data.type, "scores" if graded else "positives")
        raise CuveeError(what, where=own.where, mend=f"the usual one is '{usual}'")


def _check_loss(own: LossSettings, defaults: Mapping[str, Any]) -> None:
    if own.name is None:  # known when the rows are: they may have a teacher
        losses.combined("infonce", {}, own.parameters, own.where)
    else:
        losses.check(own.name, losses.combined(own.name, own.parameters, defaults, own.where), own.where)


def _check_search(config: TrainingConfig) -> None:
    """A search of weights, on models that there will be."""
    if config.search is None:
        return
    entry = methods.known().get(config.merge.method)
    if entry is None:
        mend = f"choose {quoted(name for name in ('multislerp', 'linear', 'task_arithmetic'))}, say"
        what = f"the weights of mergekit's '{config.merge.method}' cannot be searched"
        raise CuveeError(what, where=config.search.where, mend=mend)
    weight = entry.parameters.get("weight")
    if (weight is None or not weight.per_model) and "vary" not in config.search.said:
        mend = "choose another merge, or say under 'vary' what is searched"
        raise CuveeError(f"'{entry.name}' takes no weight of a model", where=config.search.where, mend=mend)
    count = max(2, len(config.bags))
    models, shares = [f"member-{i}" for i in range(count)], [1 / count] * count
    base = "base" if entry.base == "required" else None
    config.search.check(config.merge.method, config.merge.parameters, models, shares, base)


def _check_merge(merge: MergeSettings) -> None:
    if merge.method not in methods.known() and handover.has_method(merge.method):
        return  # mergekit reads its parameters itself
    try:
        entry = methods.get(merge.method)
    except MergeError as error:
        raise CuveeError(error.what, where=merge.where, mend=error.mend) from None
    for key in merge.parameters:
        if key not in entry.parameters:
            has = f"it takes {quoted(entry.parameters)}" if entry.parameters else "it takes none"
            mend = did_you_mean(key, entry.parameters, has)
            raise CuveeError(f"'{key}' is no parameter of '{entry.name}'", where=merge.where, mend=mend)
