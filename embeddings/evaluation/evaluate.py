"""`cuvee evaluate`: scores of models on tasks of mteb and of suites, computed by mteb, in one table.

A run's folder holds all that it found, and the same command on it again does only what is missing:

    results/<model>/<digest>/<task>.json   the score, what it was computed from, and all that it follows from
    mteb/                                  the same scores in mteb's own files
    embeddings/                            vectors by what they were made of
    scores.md, scores.csv, scores.json     the comparison
    cuvee.json                             the command

A score is known again only by the digest of its model's weights, prompts and settings, of its data, and by seed and mteb's
version. mteb's own cache is written, never read: it knows less, and takes one local model for another.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embeddings.evaluation import card, tasks
from embeddings.evaluation.comparison import Comparison, compare, csv_table, plain
from embeddings.evaluation.result import Result
from embeddings.evaluation.score_table import markdown
from embeddings.evaluation.scoring import MTEB_SEED, score
from embeddings.evaluation.tasks import Target
from merging import lineage
from merging.errors import CuveeError, did_you_mean
from merging.loading import wait_passively
from merging.output import alone, just_begun, refuse_existing, write_whole
from merging.progress import Work
from merging.sources import ModelRef

if TYPE_CHECKING:
    from embeddings.evaluation.embedding_cache import EmbeddingCache
    from embeddings.evaluation.encoder import Encoder

_PACKAGES = ("mteb", "torch", "transformers", "sentence-transformers", "scikit-learn", "numpy", "datasets")
_SAME = ("revision", "dataset", "splits", "subsets", "seed", "mteb")  # of `made_by`: where equal, so is the score


@dataclass(frozen=True)
class Settings:
    """How models are evaluated.

    Attributes:
        revision: of the models that are hub ids.
        dtype: of their weights and arithmetic.
        prompts: instead of the models' own, by task, task type, "query" or "document".
        seed: of what the tasks draw, and of the bootstrap.
        cache: the folder of the vectors; by default in the run's own.
    """

    revision: str | None = None
    dtype: str = "float32"
    batch_size: str | int = "auto"
    device: str = "cpu"
    truncate_dim: int | None = None
    prompts: Mapping[str, str] | None = None
    seed: int = MTEB_SEED
    cache: Path | None = None
    trust_remote_code: bool = False


def evaluate(
    models: Sequence[str],
    out: str | Path,
    *,
    names: Sequence[str] = (),
    suites: Sequence[Path | None] = (),
    languages: Sequence[str] = (),
    types: Sequence[str] = (),
    split: str = "test",
    settings: Settings | None = None,
    force: bool = False,
    dry_run: bool = False,
    write_cards: bool = False,
    progress: Work | None = None,
    note: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], Comparison | None]:
    """Scores every model on every task and compares them; what fails is noted, and the rest goes on.

    Args:
        models: folders, hub ids, either with `+adapter`; the first is what the others are compared with.
        out: the run's folder.
        names, suites, languages, types, split: which tasks; see `tasks.resolve`. By default the suite that comes along.
        force: score again what is known.
        dry_run: check and plan; write nothing.
        write_cards: put the scores into the models' README.md.
        note: called with a line for the user.

    Returns:
        What `cuvee evaluate --json` prints, with scores as mteb gives them, mostly in [0, 1], and the comparison.

    Raises:
        CuveeError: an unknown task, a suite or model that cannot be used, or a folder that is none of ours.
    """
    began = time.perf_counter()
    if importlib.util.find_spec("mteb") is None:
        raise CuveeError("mteb is not installed", where="cuvee evaluate", mend="pip install mteb; it needs Python 3.11")
    wait_passively()
    settings, out = settings or Settings(), Path(out).absolute()
    if not (names or suites or languages or types):
        suites = (None,)
    targets = tasks.resolve(names, suites=suites, languages=languages, types=types, split=split, note=note)
    refs = _check_models(models, settings)
    _check_prompts(settings.prompts or {}, targets)
    cards = {label: card.card_file(models[i]) for i, label in enumerate(refs)} if write_cards else {}
    _check_out(out)
    content: dict[str, Any] = {
        "command": "evaluate",
        "out": str(out),
        "seconds": 0.0,
        "seed": settings.seed,
        "device": settings.device,
        "cuvee_version": lineage.cuvee_version(),
        "models": {label: {"ref": str(ref)} for label, ref in refs.items()},
        "tasks": [target.name for target in targets],
        "settings": {key: _plain(value) for key, value in vars(settings).items()},
        "versions": lineage.versions(*_PACKAGES),
    }
    if dry_run:
        return {**content, "dry_run": True}, None
    with alone(out):
        _check_out(out)  # as it is now that nobody else is at work in it
        write_whole(out / lineage.FILE, lineage.text({**content, "state": "begun"}))
        run = _Run(out, settings, force, progress or (lambda what, done, total: None), note or (lambda line: None))
        for label, ref in refs.items():
            content["models"][label] |= run.score(label, ref, targets)
        comparison = compare(run.results, seed=settings.seed) if run.results else None
        content |= {
            "seconds": round(time.perf_counter() - began, 1),
            "scores": comparison.scores() if comparison else {},
            "means": comparison.means() if comparison else {},
            "reused": run.reused,
            "failed": run.failed,
            "comparison": plain(comparison)["rows"] if comparison else [],
        }
        if comparison:
            write_whole(out / "scores.md", markdown(comparison))
            write_whole(out / "scores.csv", csv_table(comparison))
            write_whole(out / "scores.json", json.dumps({**plain(comparison), "failed": run.failed}, indent=2) + "\n")
        for label, file in cards.items():
            if of_model := [result for result in run.results if result.model == label]:
                card.write_card(file, of_model)
        write_whole(out / lineage.FILE, lineage.text({**content, "state": "incomplete" if run.failed else "done"}))
    return content, comparison


def refuse_failures(content: Mapping[str, Any], note: Callable[[str], None] | None = None) -> None:
    """Raises CuveeError for the first reason why a score is missing; the others are noted before, each in one line."""
    models: dict[str, dict[str, None]] = {}  # by reason, which is often the same for all of them
    for model, lines in content.get("failed", {}).items():
        for line in lines.values():
            models.setdefault(line, {})[model] = None
    if not models:
        return
    (first, its_models), *others = models.items()
    if note is not None:
        for line, own in others:
            note(f"{_named(own)}: {line}")
    count = sum(map(len, content["failed"].values()))
    missing = f"{count} scores are missing{', some because' if others else ''}: " if count > 1 else ""
    raise CuveeError(f"{missing}{first}", where=_named(its_models), mend=f"what is done is kept in {content['out']}")


def _named(models: Iterable[str]) -> str:
    names = list(models)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class _Run:
    """What a run has found so far."""

    def __init__(self, out: Path, settings: Settings, force: bool, progress: Work, note: Callable[[str], None]) -> None:
        self.out, self.settings, self.force = out, settings, force
        self.progress, self.note = progress, note
        self.results: list[Result] = []
        self.failed: dict[str, dict[str, str]] = {}  # by model and task, one line each
        self.reused = 0

    def score(self, label: str, ref: ModelRef, targets: Sequence[Target]) -> dict[str, Any]:
        """Scores one model on all tasks; what is to be said of the model."""
        from embeddings.evaluation.embedding_cache import EmbeddingCache
        from embeddings.model import open_model

        of_model = {key: getattr(self.settings, key) for key in ("dtype", "device", "truncate_dim")}
        try:
            model = open_model(ref, trust_remote_code=self.settings.trust_remote_code, name=label, **of_model)
        except CuveeError as error:
            self.failed[label] = {target.name: str(error) for target in targets}
            return {"error": str(error)}
        for line in model.notes:
            self.note(line)
        with EmbeddingCache(self.settings.cache or self.out / "embeddings") as cache:
            for target in targets:
                try:
                    self.results.append(self._score_task(model, target, cache))
                except CuveeError as error:
                    self.failed.setdefault(label, {})[target.name] = str(error)
        return {"digest": model.digest, "dimension": model.dimension, "max_length": model.max_length}

    def _score_task(self, model: Any, target: Target, cache: EmbeddingCache) -> Result:
        from embeddings.evaluation.encoder import Encoder

        encoder = Encoder(
            model,
            cache,
            batch_size=self.settings.batch_size,
            prompts=self.settings.prompts or (None if any(model.prompts.values()) else target.prompts),
            progress=lambda what, done, total: self.progress(f"{model.name} on {what}", done, total),
        )
        made_by = self._made_by(encoder, target)
        folder = self.out / "results" / model.name.replace("/", "__") / encoder.revision
        suffix = "" if target.splits == ("test",) or len(target.splits) > 1 else f".{target.splits[0]}"
        file = folder / f"{target.name}{suffix}.json"
        known = None if self.force else _known(file, made_by)
        if known:
            self.reused += 1
            return replace(known, model=model.name, group=target.group)
        began = time.perf_counter()
        parts, examples, remarks = score(encoder, target, seed=self.settings.seed, mteb_folder=self.out / "mteb")
        made_by |= {
            "seconds": round(time.perf_counter() - began, 2),
            "encoded": encoder.encoded,
            "remarks": remarks,
        }
        result = Result(
            *(model.name, target.name, target.type, target.group, target.metric, target.dataset),
            parts=parts,
            examples=examples,
            made_by=made_by,
        )
        result.save(file)
        return Result.load(file)  # as the next run will, so that it tells the same

    def _made_by(self, encoder: Encoder, target: Target) -> dict[str, Any]:
        versions = lineage.versions(*_PACKAGES)
        model = encoder.embedding_model
        return {
            "ref": model.ref,
            "digest": model.digest,
            "revision": encoder.revision,
            "dataset": dict(target.dataset),
            "splits": list(target.splits),
            "subsets": list(target.subsets),
            "seed": self.settings.seed,
            "mteb": versions.get("mteb"),
            "prompts": encoder.prompts,
            "dtype": model.dtype,
            "device": model.device,
            "truncate_dim": model.truncate_dim,
            "max_length": model.max_length,
            "batch_size": self.settings.batch_size,
            "cuvee_version": lineage.cuvee_version(),
            "versions": versions,
        }


def _known(file: Path, made_by: Mapping[str, Any]) -> Result | None:
    """An earlier result, if it is of the same model, data and settings; one that is damaged is none."""
    if not file.is_file():
        return None
    try:
        known = Result.load(file)
    except CuveeError:
        return None
    return known if all(known.made_by.get(key) == made_by[key] for key in _SAME) else None


def _check_models(models: Sequence[str], settings: Settings) -> dict[str, ModelRef]:
    """The models by label, after a look at their files that takes no time.

    Raises:
        CuveeError: one is missing, or no embedding model.
    """
    from embeddings.model import labels
    from merging.checkpoint import Checkpoint
    from merging.loading import refuse_other_kinds

    if not models:
        raise CuveeError("wants a model", where="cuvee evaluate", mend="cuvee evaluate MODEL --out RUN")
    refs = [ModelRef.parse(model) for model in models]
    if settings.revision is not None:
        hub = [ref.revision is None and not os.path.isdir(os.path.expanduser(ref.path)) for ref in refs]
        if not any(hub):
            raise CuveeError("no model is a hub id without one", where="--revision", mend="leave it out")
        refs = [
            replace(ref, revision=settings.revision) if is_hub else ref for ref, is_hub in zip(refs, hub, strict=True)
        ]
    for ref in refs:
        with Checkpoint.open(ref) as checkpoint:
            refuse_other_kinds(checkpoint, trust_remote_code=settings.trust_remote_code)
    return dict(zip(labels(refs), refs, strict=True))


def _check_prompts(prompts: Mapping[str, str], targets: Sequence[Target]) -> None:
    """Refuses a prompt that no task would ever get: mteb drops it without a word."""
    kinds = ("query", "document")
    names = [name for target in targets for name in (target.name, target.type)]
    known = dict.fromkeys([*kinds, *names, *(f"{name}-{kind}" for name in names for kind in kinds)])
    for name in prompts:
        if name not in known:
            mend = did_you_mean(name, known, "name query, document, a task or a type of task")
            raise CuveeError(f"no task of this run has prompts called '{name}'", where="--prompt", mend=mend)


def _check_out(out: Path) -> None:
    if just_begun(out):
        return
    refuse_existing(out, force=True)  # what is in it is kept; but it must be ours
    if (out / lineage.FILE).is_file() and (command := lineage.read(out).get("command")) != "evaluate":
        raise CuveeError(f"is an output of `cuvee {command}`", where=str(out), mend="choose another folder")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else dict(value) if isinstance(value, Mapping) else value
