"""Handover: the merges that are mergekit's, run whole by mergekit from the same recipe, and finished as ours are.

Slices, passthrough, modules, mixtures of experts and tokenizer surgery build other models than those that went in; they
are not tensor by tensor, and mergekit does them well. What it accepts in silence is refused here first (keys and
parameters that it does not know), and what it drops is brought after it (`finish`).

mergekit, and torch with it, are imported only where they run: that takes seconds.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import random
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from merging.checkpoint import Checkpoint, module_folders
from merging.errors import CuveeError, MergeError, RecipeError, did_you_mean, quoted
from merging.mergekit_recipe import as_mapping, check_keys, check_parameters, is_mixture, place, with_references
from merging.node import Node, read
from merging.recipe import Recipe
from merging.sidefiles import copy_sidefiles, same_vocabulary
from merging.sources import ModelRef

#: Methods of mergekit 0.1.5; of other versions its registry is asked.
KNOWN_VERSION = "0.1.5"
KNOWN_METHODS = frozenset(
    (
        *("arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear"),
        *("karcher", "linear", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl"),
        *("sce", "slerp", "task_arithmetic", "ties"),
    )
)
#: What mergekit says, in part, and what to do about it.
MENDS = (
    ("can only concatenate list", "mergekit 0.1.5 cannot take this architecture apart; merge whole 'models' instead"),
    ("different architectures", "name models of one architecture"),
    ("required but not present in model", "check 'layer_range', and that mergekit knows this architecture"),
    ("CUDA out of memory", "run it with --device cpu"),
    ("trust_remote_code", "add --trust-remote-code if you trust the code in the model's folder"),
    ("No space left", "free some disk space, or choose another disk"),
)


# Which merges.


def needs_mergekit(recipe: Recipe, method_is_ours: bool, relative_to: Path | None = None) -> str | None:
    """Why mergekit must run a recipe, as in "handed over to mergekit: it has slices"; None where Cuvee runs it.

    A tokenizer asked of one of the models, or of their union, is no reason where all vocabularies are the same.

    Raises:
        CuveeError: a model that cannot be opened, where vocabularies have to be compared.
    """
    if recipe.slices is not None:
        return "it has slices"
    if recipe.modules is not None:
        return "it has modules"
    if not method_is_ours:
        return f"the method '{recipe.merge_method}' is its own"
    wish = recipe.tokenizer or {}
    if wish.get("tokens"):
        return "it gives tokens their embeddings"
    if wish.get("pad_to_multiple_of"):
        return "it pads the vocabulary"
    if recipe.tokenizer is None and recipe.tokenizer_source is None:
        return None
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(Checkpoint.open(ref, relative_to=relative_to)) for ref in _references(recipe)]
        differing = next((other for other in models[1:] if not same_vocabulary(models[0], other)), None)
    return f"the vocabularies of {models[0].ref} and {differing.ref} differ" if differing else None


def tokenizer_donor(recipe: Recipe, relative_to: Path | None = None) -> Path | None:
    """The folder of the model whose tokenizer the recipe asks for by name; None for the donor's own.

    Raises:
        CuveeError: it cannot be opened.
    """
    ref = _tokenizer_reference(recipe)
    return None if ref is None else Checkpoint.open(ref, relative_to=relative_to).path


def has_method(name: str) -> bool:
    """Whether mergekit has a method of that name."""
    if name in KNOWN_METHODS:
        return True
    try:
        if importlib.metadata.version("mergekit") == KNOWN_VERSION:
            return False
        with _quietly():
            from mergekit.merge_methods import registry
    except ImportError:
        return False
    return name in {method.spec.name for method in registry.registered_methods()}


# Running them.


def run(
    text: str,
    staging: Path,
    *,
    where: str = "recipe",
    relative_to: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    shard_size: int = 5 * 10**9,
    trust_remote_code: bool = False,
) -> list[str]:
    """Lets mergekit run a recipe into `staging`, an existing folder.

    In this process: a run that is killed leaves no child behind. Global random states, torch's threads and mergekit's
    cache of open files are put back as they were.

    Args:
        text: the recipe's YAML, of mergekit-yaml or of mergekit-moe.
        where: its file, for errors.
        relative_to: a second place to look for relative model folders.
        shard_size: bytes in a file at most.

    Returns:
        One line for each thing the user should know.

    Raises:
        RecipeError: a key, a parameter or a value that mergekit would not understand.
        MergeError: mergekit failed; what it said, in one line.
    """
    root = read(text, where)
    mixture = is_mixture(text, where)
    check_keys(root, mixture)
    data = with_references(root, lambda ref: as_mapping(ref, relative_to), relative_to)
    loras = staging / ".lora"  # inside, so that a killed run's cache goes with the rest
    log = _Log()
    with _quietly(log), _restored(threads):
        try:
            from mergekit.options import MergeOptions

            options = MergeOptions(
                device=device,
                random_seed=seed,
                out_shard_size=shard_size,
                trust_remote_code=trust_remote_code,
                lora_merge_cache=str(loras),
                lora_merge_dtype="float32" if data.get("dtype") else None,
                write_model_card=False,
                quiet=not sys.stderr.isatty(),
                clone_tensors=True,
            )
            (_run_mixture if mixture else _run_recipe)(data, root, staging, options)
        except CuveeError:
            raise
        except (Exception, SystemExit) as error:  # whatever goes wrong in there, the user gets one line
            raise _as_one_line(error, root, where, log) from error
        finally:
            shutil.rmtree(loras, ignore_errors=True)
    if not any(staging.glob("*.safetensors")):
        raise MergeError("mergekit wrote no weights", where=where)
    return _notes(data, mixture)


def finish(staging: Path, donor: Checkpoint) -> list[str]:
    """Brings what mergekit leaves behind: processors, custom code, everything of sentence-transformers.

    Args:
        staging: what `run` made.
        donor: the first of `references`.

    Returns:
        One line for each thing the user should know.

    Raises:
        CuveeError: as `copy_sidefiles`.
    """
    for name in ("README.md", "mergekit_config.yml", "mergekit_moe_config.yml"):
        (staging / name).unlink(missing_ok=True)
    copy_sidefiles(donor, staging, out_dtype=None, only_missing=True)
    notes = []
    for folder in module_folders(donor.path)[1:]:
        files = {info.file for name, info in donor.tensors.items() if name.startswith(f"{folder}/")}
        for file in sorted(files):
            shutil.copyfile(file, staging / folder / file.name)
        if files:
            notes.append(f"mergekit does not merge '{folder}': it is the donor's")
    return notes


def _run_recipe(data: dict[str, Any], root: Node, staging: Path, options: Any) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.merge_methods import registry

    class Ordered(MergeConfiguration):  # type: ignore[misc]
        """mergekit lends config and tokenizer from any model of a set; here from the base, or the first one named."""

        def referenced_models(self) -> list[Any]:
            first = [self.base_model] if self.base_model else []
            return list(dict.fromkeys([*first, *sorted(super().referenced_models(), key=order.index)]))

    config = Ordered.model_validate(data)
    order: list[Any] = []
    with_references(Node.of(data), lambda ref: order.append(_reference(ref)))
    method = next((m for m in registry.registered_methods() if m.spec.name == config.merge_method), None)
    if method is None:
        known = sorted(m.spec.name for m in registry.registered_methods())
        mend = did_you_mean(config.merge_method, known, f"known: {quoted(known)}")
        raise RecipeError(f"no method '{config.merge_method}'", where=place(root, ["merge_method"]), mend=mend)
    check_parameters(root, config.merge_method, [parameter.name for parameter in method.spec.parameters])
    # Shared by all runs of a process, and keyed by path alone: a folder that has changed since would be read as it was.
    LoaderCache.loaders.clear()
    try:
        run_merge(config, str(staging), options)
    finally:
        LoaderCache.loaders.clear()


def _run_mixture(data: dict[str, Any], root: Node, staging: Path, options: Any) -> None:
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.scripts.moe import build
    from transformers.trainer_utils import set_seed

    config = MoEMergeConfig.model_validate(data)
    set_seed(options.random_seed)
    build(config, str(staging), options, device=options.device)


def _notes(data: Mapping[str, Any], mixture: bool) -> list[str]:
    notes = []
    if not data.get("dtype"):
        notes.append("mergekit computes in the models' own dtype where the recipe has no 'dtype'")
    if mixture and data.get("gate_mode", "hidden") in ("random", "uniform_random"):
        notes.append("the gates are random: the mixture is of no use before it is trained")
    return notes


# Models that a recipe names.


def _references(recipe: Recipe) -> list[ModelRef]:
    tokenizer = _tokenizer_reference(recipe)
    refs = [*([recipe.base_model] if recipe.base_model else []), *(source.model for source in recipe.models)]
    return list(dict.fromkeys([*refs, *([tokenizer] if tokenizer else [])]))


def _tokenizer_reference(recipe: Recipe) -> ModelRef | None:
    key = "tokenizer" if recipe.tokenizer is not None else "tokenizer_source"
    source = recipe.tokenizer.get("source", "union") if recipe.tokenizer is not None else recipe.tokenizer_source
    if source is None or source == "union":
        return None
    if source == "base":
        if recipe.base_model is None:
            raise RecipeError("the tokenizer of the base, but no base", where=recipe.at(key), mend="add 'base_model:'")
        return recipe.base_model
    return ModelRef.parse(source, where=recipe.at(key))


def _reference(ref: ModelRef) -> Any:
    from mergekit.common import ModelReference

    return ModelReference.model_validate(as_mapping(ref, None))


# Surroundings of a run.


class _Log(logging.Handler):
    """Remembers the last error that mergekit logged: it exits without a word after some."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()


@contextlib.contextmanager
def _quietly(log: logging.Handler | None = None) -> Iterator[None]:
    """Keeps standard output for the result, and other libraries' warnings from the user; errors they log are kept."""
    root = logging.getLogger()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        if log:
            root.addHandler(log)
        try:
            yield
        finally:
            if log:
                root.removeHandler(log)


@contextlib.contextmanager
def _restored(threads: int | None) -> Iterator[None]:
    """Puts the global random states and torch's threads back in the end."""
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        if threads:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_num_threads(states[2])


def _as_one_line(error: BaseException, root: Node, where: str, log: _Log) -> CuveeError:
    if isinstance(error, ModuleNotFoundError) and error.name == "mergekit":
        return MergeError("needs mergekit, which is not installed", where=where, mend="pip install mergekit")
    problems: Any = getattr(error, "errors", None)
    if type(error).__name__ == "ValidationError" and callable(problems):
        first = problems()[0]
        way = [step for step in first["loc"] if isinstance(step, int) or not step[:1].isupper()]
        return RecipeError(f"{'.'.join(map(str, way))}: {first['msg']}", where=place(root, way))
    said = log.last if isinstance(error, SystemExit) else str(error).strip() or type(error).__name__
    line = next((line for line in said.splitlines() if line.strip()), "it failed without a word")
    mend = next((mend for part, mend in MENDS if part in said), "")
    return MergeError(f"mergekit says: {line[:300]}", where=where, mend=mend)
