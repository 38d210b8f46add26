"""One model's score on one task, computed by mteb, and what it was computed from."""

from __future__ import annotations

import copy
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embeddings.evaluation.bootstrap import Examples
from embeddings.evaluation.examples import noted, of_aggregate
from embeddings.evaluation.result import Part
from embeddings.evaluation.tasks import Target
from merging.errors import CuveeError

if TYPE_CHECKING:
    from embeddings.evaluation.encoder import Encoder

MTEB_SEED = 42
"""The seed of mteb's own scores."""


def score(
    encoder: Encoder, target: Target, *, seed: int = MTEB_SEED, mteb_folder: Path | None = None
) -> tuple[tuple[Part, ...], tuple[Examples, ...], list[str]]:
    """One model's score on one task, by mteb: its parts, the examples behind it, and the warnings on the way.

    Args:
        mteb_folder: of mteb's own result files; None for none.

    Raises:
        CuveeError: data that are not there, or whatever else keeps mteb from a score, in one line.
    """
    import mteb
    from threadpoolctl import threadpool_limits

    cache = mteb.ResultCache(mteb_folder) if mteb_folder else None
    with _their_words() as heard, tempfile.TemporaryDirectory() as scratch:
        try:
            task = target.fresh(seed)
            of = task.tasks if task.is_aggregate else [task]
            if not task.is_aggregate:
                task.load_data()
            # Their probes are fitted to a few hundred rows: BLAS on two threads takes eight times as long as on one.
            with ExitStack() as stack, threadpool_limits(1, user_api="blas"):
                by_task = {each.metadata.name: stack.enter_context(noted(each)) for each in of}
                done = mteb.evaluate(
                    encoder,
                    task,
                    cache=cache,
                    overwrite_strategy="always",
                    co2_tracker=False,
                    prediction_folder=scratch,
                    show_progress_bar=False,
                    # The batches of mteb's data loader; the encoder makes its own.
                    encode_kwargs={"batch_size": 1024, "show_progress_bar": False},
                )
            if not done.task_results:
                raise CuveeError(str(done.exceptions[0].exception) if done.exceptions else "mteb gives no score")
        except CuveeError as error:
            raise error if error.where else CuveeError(error.what, where=target.name, mend=error.mend) from error
        except Exception as error:  # every task of mteb has its own ways to fail
            raise _failure(error, target) from error
        by_split = done.task_results[0].scores
    parts = tuple(
        Part(split, str(entry["hf_subset"]), float(entry["main_score"]))
        for split, entries in by_split.items()
        for entry in entries
    )
    if not parts or not all(math.isfinite(part.score) for part in parts):
        raise CuveeError("mteb's score is not a number", where=target.name, mend="look at the task's labels")
    return parts, tuple(_examples(by_task, parts, aggregate=task.is_aggregate)), heard


def kept(target: Target, *, seed: int = MTEB_SEED) -> Target:
    """The same task with its data read once, for the scores of one model after another; one of several tasks as it is.

    Raises:
        CuveeError: data that are not there.
    """
    with _their_words():
        try:
            task = target.fresh(seed)
            if task.is_aggregate:
                return target
            task.load_data()
        except CuveeError as error:
            raise error if error.where else CuveeError(error.what, where=target.name, mend=error.mend) from error
        except Exception as error:  # every task of mteb has its own ways to fail
            raise _failure(error, target) from error

    def fresh(again: int) -> Any:
        if again != seed:
            return target.fresh(again)
        new = type(task)(seed=seed)  # which sets the generators that are global
        vars(new).update(copy.deepcopy(vars(task)))  # 2 ms of a shipped task's 3 s: what is large, Arrow shares
        return new

    return replace(target, fresh=fresh)


def _examples(by_task: Mapping[str, Sequence[Examples]], parts: Sequence[Part], *, aggregate: bool) -> list[Examples]:
    """Of a task in parts each must be told apart into examples, and as often, for their mean to be the task's."""
    if aggregate:
        return of_aggregate(by_task, sum(part.score for part in parts) / len(parts))
    (examples,) = by_task.values()
    by_part = {"/".join(each.part.split("/")[:2]) for each in examples}
    return list(examples) if len(by_part) == len(parts) and len(examples) % len(parts) == 0 else []


def _failure(error: Exception, target: Target) -> CuveeError:
    reason = next(iter(str(error).strip().splitlines()), "")[:200]
    kinds = {kind.__name__ for kind in type(error).__mro__}
    missing = {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "DatasetNotFoundError"}
    if kinds & missing or "Couldn't reach" in reason or "offline" in reason.lower():
        data = f"{target.dataset['path']} at revision {target.dataset['revision'][:12]}"
        return CuveeError(
            f"its data, {data}, are neither in the cache nor can they be fetched",
            where=target.name,
            mend="run it once with a connection, or copy the cache of datasets (HF_HOME) from where it ran",
        )
    return CuveeError(f"mteb fails on it ({type(error).__name__}: {reason})", where=target.name)


@contextmanager
def _their_words() -> Iterator[list[str]]:
    """Keeps mteb's, datasets' and scikit-learn's remarks and bars off the terminal; gives the warnings, each once."""
    import datasets
    import tqdm  # type: ignore[import-untyped]

    def quiet(bar: Any, *args: Any, **kwargs: Any) -> None:
        begin(bar, *args, **{**kwargs, "disable": True})

    loggers = [logging.getLogger(name) for name in ("mteb", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = datasets.is_progress_bar_enabled()
    heard: list[str] = []
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    begin, tqdm.tqdm.__init__ = tqdm.tqdm.__init__, quiet  # some of mteb's bars have no switch
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield heard
        heard += dict.fromkeys(str(warning.message).splitlines()[0][:300] for warning in caught if str(warning.message))
    finally:
        tqdm.tqdm.__init__ = begin
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
