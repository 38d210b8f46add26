"""BOOM: members trained on bags of the corpus, merged into one model (arXiv 2602.05787).

A run's folder holds all that it made, and the same command on it makes only what is missing:

    members/<number>-<percent>/   a model each, its metrics, rows.npz: by data set, the numbers of its rows
    model/                        the merge; of a run without bags, the one model there is
    base/                         what the members started from, where a merge needs it and its folder has no modules
    core/                         rows kept for later updates: tables, data.yml that names them, rows.npz
    data/                         token ids of all texts
    work/                         of members that are not done
    cuvee.json                    settings, members, costs
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embeddings.training.batch import objectives
from embeddings.training.config import COMPLEMENT, TrainingConfig
from embeddings.training.data import TrainingSet, load_sets, write_rows
from embeddings.training.disk import disk_errors
from embeddings.training.metrics import Sink, sinks
from embeddings.training.options import Options as Options  # a part of this module's functions
from embeddings.training.options import refuse_device
from embeddings.training.team import ALONE
from embeddings.training.train import AFTER_TRAINING, ROWS, Job, Trained, schedule_of, train, write_row_numbers
from merging import lineage
from merging.errors import CuveeError
from merging.loading import only_our_words
from merging.output import alone, just_begun, staged, write_whole
from merging.progress import Work

if TYPE_CHECKING:
    from embeddings.training.backbone import Backbone
    from merging.recipe import Recipe

Rows = Mapping[str, NDArray[np.int64]]
Note = Callable[[str], None]

MODEL, BASE, CORE, MEMBERS, WORK, DATA = "model", "base", "core", "members", "work", "data"
_MADE = (MEMBERS, MODEL, BASE, CORE, WORK)  # of a configuration; `data` serves others too
_CORE_DRAW, _MEMBER_DRAW = 1, 2  # keep draws apart that share a seed
_FORM = 1
_CONFIG = "config.yml"


@dataclass(frozen=True)
class Member:
    """One model of a bag.

    Attributes:
        percent: of each data set.
        rows: by data set, (rows,) sorted numbers.
    """

    name: str
    percent: float
    seed: int
    rows: Rows


def train_run(
    config: TrainingConfig,
    run: str | Path,
    *,
    options: Options | None = None,
    progress: Work | None = None,
    note: Note | None = None,
) -> dict[str, Any]:
    """Trains the members of a configuration and merges them; what is done already is not done again.

    Returns:
        What `cuvee train --json` prints; nothing in a process that is not the first of its team.

    Raises:
        CuveeError: data or settings that cannot be, or a folder that holds another run.
    """
    began = time.perf_counter()
    run, options = Path(run).absolute(), options or Options()
    progress, note = progress or (lambda what, done, total: None), note or (lambda line: None)
    refuse_device(options)
    if options.team.rank:
        return help_train(config, run, options)
    check_claim(run, "train", config, force=options.force)
    _refuse_recipe(config, run)
    with at_work(run), only_our_words():
        claim(run, "train", config, force=options.force)
        sets = read_sets(config, run, options, progress, note)
        members = draw_members(config, sets)
        trained = train_jobs(config, sets, jobs_by_name(config, sets, run), run, options, progress)
        keep_core(config, sets, run / CORE, force=options.force)
        content = {
            **training_lineage(config, run, sets, trained),
            "members": {member.name: _told(member, trained[member.name]) for member in members},
        }
        if config.bags:
            merge_members(config, members, run, content, progress)
        else:
            add_lineage(run / MODEL, content)
        return finish(run, "train", config, options, began, trained, content)


@contextmanager
def at_work(run: Path) -> Iterator[None]:
    """Keeps other processes out of the run's folder, and tells what the disk refuses in one line.

    Raises:
        CuveeError: another process is at work in it, or it cannot be written.
    """
    with disk_errors(run), alone(run):
        yield


def plan(
    config: TrainingConfig,
    run: str | Path,
    *,
    options: Options | None = None,
    progress: Work | None = None,
    jobs: Callable[[Sequence[TrainingSet]], Mapping[str, Job]] | None = None,
) -> dict[str, Any]:
    """What `train_run` would do, after all of the data was read and checked; nothing is written.

    Args:
        jobs: of the data sets, if they are not the configuration's members.

    Raises:
        CuveeError: as `train_run`.
    """
    options, progress = options or Options(), progress or (lambda what, done, total: None)
    refuse_device(options)
    if jobs is None:
        check_claim(Path(run).absolute(), "train", config, force=options.force)
        _refuse_recipe(config, Path(run).absolute())
    with tempfile.TemporaryDirectory() as scratch, only_our_words():
        sets = read_sets(config, Path(scratch), options, progress, lambda line: None)
        objectives(config, sets)
        named = jobs(sets) if jobs else jobs_by_name(config, sets, Path(run).absolute())
        schedules = {name: schedule_of(config, sets, job) for name, job in named.items()}
        return {
            "command": "train",
            "dry_run": True,
            "out": str(Path(run).absolute()),
            "seed": config.seed,
            "device": options.device,
            "cuvee_version": lineage.cuvee_version(),
            "members": {name: {"steps": len(steps)} for name, steps in schedules.items()},
            "steps": sum(map(len, schedules.values())),
            "cost": sum(len(part.rows) for steps in schedules.values() for step in steps for part in step),
            "rows": {each.name: len(each) for each in sets},
        }


def read_sets(config: TrainingConfig, run: Path, options: Options, progress: Work, note: Note) -> list[TrainingSet]:
    """The data as arrays, from the run's cache or their sources."""
    tokenizer = Tokenizer(config)
    sets = load_sets(
        config,
        tokenizer,
        run / DATA,
        progress,
        transformer=lambda: tokenizer.backbone.transformer,
        fresh=options.force,
    )
    for line in (line for each in sets for line in each.notes):
        note(line)
    return sets


class Tokenizer:
    """`data.Tokenize` by the configuration's backbone, which is opened when it is needed first."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self._backbone: Backbone | None = None

    @property
    def backbone(self) -> Backbone:
        if self._backbone is None:
            self._backbone = open_backbone(self._config, "cpu", 0)
        return self._backbone

    @property
    def digest(self) -> str:
        return self.backbone.tokenizer_digest

    def __call__(self, texts: list[str], side: str, prompt: str | None) -> list[list[int]]:
        return self.backbone.tokenize(texts, side, prompt)


def open_backbone(config: TrainingConfig, device: str, seed: int) -> Backbone:
    """What every member starts from."""
    from embeddings.training import backbone

    where = config.model.where or config.where
    return backbone.open_backbone(config.model, max_length=config.max_length, device=device, where=where, seed=seed)


def draw_members(config: TrainingConfig, sets: Sequence[TrainingSet]) -> list[Member]:
    """The bags: from each data set so many percent of its rows, without replacement, independent between members.

    A "complement" has the rows that the member before it was not given. Without bags, one member on everything.
    """
    members: list[Member] = []
    for number, size in enumerate(config.bags or (100.0,), 1):
        seed = config.seed * 1000 + number if config.bags else config.seed
        if size == COMPLEMENT:
            before = members[-1]
            rows: Rows = {each.name: _without(len(each), before.rows[each.name]) for each in sets}
            percent = 100.0 - before.percent
        else:
            percent = float(size)
            rows = draw(sets, percent, (config.seed, _MEMBER_DRAW, number))
        members.append(Member(f"{number}-{percent:g}", percent, seed, rows))
    return members


def draw(sets: Sequence[TrainingSet], percent: float, seed: Sequence[int]) -> dict[str, NDArray[np.int64]]:
    """By data set, (rows,) sorted row numbers: so many percent of each, at least one, drawn without replacement."""
    found = {}
    for number, each in enumerate(sets):
        count = min(len(each), max(1, round(len(each) * percent / 100)))
        chosen = np.random.default_rng([*seed, number]).permutation(len(each))[:count]
        found[each.name] = np.sort(chosen).astype(np.int64)
    return found


def _without(size: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.setdiff1d(np.arange(size, dtype=np.int64), rows, assume_unique=True)


def train_jobs(
    config: TrainingConfig,
    sets: Sequence[TrainingSet],
    jobs: Mapping[str, Job],
    run: Path,
    options: Options,
    progress: Work,
) -> dict[str, Trained]:
    """Trains what is not done: here, with those of the team, or in processes of its own."""
    missing = [job for job in jobs.values() if options.force or not job.out.exists()]
    if missing and options.ray:
        from embeddings.training.ray_members import train_by_ray

        train_by_ray(config, run, missing, options, progress)
        options = replace(options, force=False)
    elif options.processes > 1 or (options.workers > 1 and len(missing) > 1):
        from embeddings.training.workers import train_side_by_side

        train_side_by_side(config, run, missing, options, progress)
        options = replace(options, force=False)
    elif options.team.size > 1:
        for job in missing:
            train_member(config, sets, options.team.told(job), options, progress, run)
        options.team.told(None)
        options.team.leave()
        options = replace(options, force=False, team=ALONE)
    return {name: train_member(config, sets, job, options, progress, run) for name, job in jobs.items()}


def help_train(config: TrainingConfig, run: Path, options: Options) -> dict[str, Any]:
    """Trains what the first process of the team does, together with it."""
    sets: Sequence[TrainingSet] | None = None
    with disk_errors(run), only_our_words():
        while (job := options.team.told(None)) is not None:
            sets = sets or read_sets(config, run, replace(options, force=False), lambda *_: None, lambda line: None)
            train_member(config, sets, job, options, lambda *_: None, run)
    options.team.leave()
    return {}


def train_member(
    config: TrainingConfig,
    sets: Sequence[TrainingSet],
    job: Job,
    options: Options,
    progress: Work,
    run: Path,
) -> Trained:
    """Trains one member."""
    from embeddings.training.monitor import scorer

    watches = (options.force or not job.out.exists()) and not options.team.rank

    def listeners() -> list[Sink]:
        return sinks(options.logs, run, job.name)

    return train(
        config,
        sets,
        job,
        lambda: open_backbone(config, options.device, job.seed),
        force=options.force,
        progress=progress,
        evaluate=scorer(config.evaluate, options.device) if watches and config.evaluate else None,
        sinks=listeners,
        content={"base": config.model.path, "config": config.plain(), "device": options.device},
        team=options.team,
    )


def _job(member: Member, run: Path, bagged: bool) -> Job:
    out = run / MEMBERS / member.name if bagged else run / MODEL
    return Job(member.name, member.rows, member.percent / 100, member.seed, run / WORK / member.name, out)


def jobs_by_name(config: TrainingConfig, sets: Sequence[TrainingSet], run: Path) -> dict[str, Job]:
    """The training of each member."""
    return {member.name: _job(member, run, bool(config.bags)) for member in draw_members(config, sets)}


def keep_core(config: TrainingConfig, sets: Sequence[TrainingSet], folder: Path, *, force: bool = False) -> None:
    """Writes the core set: `config.core` percent of each data set, complete in themselves."""
    if not config.core or ((folder / "data.yml").is_file() and not force):
        return
    write_core(sets, draw(sets, config.core, (config.seed, _CORE_DRAW)), folder)


def write_core(sets: Sequence[TrainingSet], rows: Rows, folder: Path) -> None:
    """Writes rows as tables, data.yml, which comes last, and rows.npz."""
    (folder / "data.yml").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_row_numbers(folder / ROWS, rows)
    write_rows(sets, rows, folder)


def training_lineage(
    config: TrainingConfig, run: Path, sets: Sequence[TrainingSet], trained: Mapping[str, Trained]
) -> dict[str, Any]:
    """What an update needs to know of a model: where it came from, how it was trained, and its core set."""
    rows = {each.name: len(each) for each in sets}
    data = {each.name: {"digest": each.digest, "rows": rows[each.name], "type": each.type} for each in sets}
    for each in sets:
        if each.settings.hub is not None:
            data[each.name]["revision"] = each.settings.revision
    return {
        "form": _FORM,
        "base": config.model.path,
        "config": config.plain(),
        "config_text": config.text,
        "config_where": os.path.abspath(config.where),
        "core": {"folder": str(run / CORE), "percent": config.core} if config.core else None,
        "data": data,
        "rows_in_all": sum(rows.values()),
        "row_passes": sum(done.rows for done in trained.values()),
    }


def merge_members(
    config: TrainingConfig, members: Sequence[Member], run: Path, content: Mapping[str, Any], progress: Work
) -> None:
    """Merges the members into `run`/model, weighted by their size or equally."""
    recipe = _members_recipe(config, members, run)
    if recipe.base_model is not None and recipe.base_model.path == str(run / BASE):
        _write_base(config, run / BASE)
    merge_models(
        recipe, [told_by(run / MEMBERS / member.name) for member in members], run, config.seed, content, progress
    )


def told_by(model: Path) -> str:
    """A digest of what we trained: of its cuvee.json, whose numbers no second training has."""
    return lineage.file_digest(model / lineage.FILE)


def _members_recipe(config: TrainingConfig, members: Sequence[Member], run: Path) -> Recipe:
    from merging import methods
    from merging.recipe import Recipe

    entry = methods.known().get(config.merge.method)  # None: mergekit's
    mean = sum(member.percent for member in members) / len(members)
    weights = [member.percent / mean if config.merge_weights == "size" else 1.0 for member in members]
    takes_weight = entry is not None and "weight" in entry.parameters
    return Recipe(
        merge_method=config.merge.method,
        models=[
            {"model": str(run / MEMBERS / member.name)} | ({"parameters": {"weight": weight}} if takes_weight else {})
            for member, weight in zip(members, weights, strict=True)
        ],
        base_model=_base_folder(config, run) if entry is None or entry.base == "required" else None,
        parameters=dict(config.merge.parameters) or None,
        dtype="float32",
        where=config.merge.where or config.where,
    )


def _refuse_recipe(config: TrainingConfig, run: Path) -> None:
    """Raises CuveeError for a merge that cannot be: before the members are trained, and not after."""
    from merging import methods

    entry = methods.known().get(config.merge.method)
    if config.bags and entry is not None:
        try:
            _members_recipe(config, draw_members(config, ()), run).check(entry)
        except CuveeError as error:
            where = config.merge.where or config.at("bags")
            raise CuveeError(error.what, where=where, mend=error.mend) from None


def merge_models(
    recipe: Recipe, inputs: Sequence[str], run: Path, seed: int, content: Mapping[str, Any], progress: Work
) -> None:
    """Merges models into `run`/model with more in its lineage, unless that was done already.

    Args:
        inputs: a digest of each model.
    """
    from merging.engine import merge

    out, scratch, old = run / MODEL, run / WORK / "merged", run / WORK / "replaced"
    made_by = {"recipe": recipe.text, "inputs": list(inputs)}
    if out.exists() and lineage.read(out).get("trained", {}).get("merged_by") == made_by:
        return
    progress("merge", 0, 1)
    merge(recipe, scratch, seed=seed, force=scratch.exists())
    add_lineage(scratch, {**content, "merged_by": made_by})
    if out.exists():  # a folder that is removed file by file would be half a model to whoever comes in between
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    scratch.rename(out)
    progress("merge", 1, 1)


def _base_folder(config: TrainingConfig, run: Path) -> str:
    """The base as a sentence-transformers folder: a merge takes its tokenizer and modules from there."""
    path = config.model.path
    return path if os.path.isfile(os.path.join(path, "modules.json")) else str(run / BASE)


def _write_base(config: TrainingConfig, folder: Path) -> None:
    if not folder.exists():
        with staged(folder) as staging:
            open_backbone(config, "cpu", 0).save(staging)
            lineage.write(staging, {"command": "train", "base": config.model.path})


def add_lineage(folder: Path, content: Mapping[str, Any]) -> None:
    """More of what a model's cuvee.json says."""
    past = lineage.read(folder)
    merged = {**past, "trained": dict(content)}
    write_whole(folder / lineage.FILE, lineage.text(merged))


def check_claim(
    run: Path, command: str, config: TrainingConfig, *, force: bool, more: Mapping[str, Any] | None = None
) -> bool:
    """Whether the folder is a run of the same configuration; False: it is empty, missing, or `force` says it may go.

    Args:
        more: what else makes a run the same.

    Raises:
        CuveeError: it is something else.
    """
    try:
        if not run.is_dir() or just_begun(run) or not any(run.iterdir()):
            return False
    except OSError as error:
        raise CuveeError(f"cannot be looked into: {error.strerror}", where=str(run)) from None
    if not (run / lineage.FILE).is_file():
        raise CuveeError("is not empty and none of our outputs", where=str(run), mend="choose another folder")
    past = lineage.read(run)
    if past.get("state") == "begun" and not any((run / part).exists() for part in _MADE):
        return False  # its data or settings were refused: mended, they are another configuration
    if past.get("command") != command:
        raise CuveeError(f"is an output of `cuvee {past.get('command')}`", where=str(run), mend="choose another folder")
    if "state" not in past:  # a run in it would take the place of its lineage
        raise CuveeError("is a model, no run's folder", where=str(run), mend="choose another folder")
    same = _members_of(past) == _members_of(_identity(config, more))
    if not same and not force:
        mend = "choose another folder, or add --force to train anew"
        raise CuveeError("holds a run of another configuration", where=str(run), mend=mend)
    return same


def claim(
    run: Path, command: str, config: TrainingConfig, *, force: bool, more: Mapping[str, Any] | None = None
) -> None:
    """As `check_claim`; and the folder is of this configuration from now on, without what was made by another."""
    identity = _identity(config, more)
    stale: Sequence[str] = _MADE
    if check_claim(run, command, config, force=force, more=more):
        past = lineage.read(run)
        if past.get("config") == identity["config"] and (run / _CONFIG).is_file():
            return
        stale = (CORE,) if past["config"].get("core") != config.core else ()
    for part in stale:
        shutil.rmtree(run / part, ignore_errors=True)
    begun = {"command": command, "state": "begun", **identity}
    write_whole(run / lineage.FILE, lineage.text(begun))  # first: what holds it is ours, wherever we are killed
    write_whole(run / _CONFIG, config.text)


def _identity(config: TrainingConfig, more: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"config": config.plain(), **(more or {})}


def _members_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What the members follow from; they stay as they are when they are merged, watched or kept for updates otherwise."""
    config = identity.get("config")
    settings = config if isinstance(config, dict) else {}
    kept = {key: value for key, value in settings.items() if key not in AFTER_TRAINING}
    return {"config": kept, "updates": identity.get("updates")}


def finish(
    run: Path,
    command: str,
    config: TrainingConfig,
    options: Options,
    began: float,
    trained: Mapping[str, Trained],
    content: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the run's cuvee.json; what the command prints, with `more` in it."""
    shutil.rmtree(run / WORK, ignore_errors=True)
    rows, seconds = sum(t.rows for t in trained.values()), sum(t.seconds for t in trained.values())
    summary = {
        "command": command,
        "out": str(run),
        "model": str(run / MODEL),
        "seconds": round(time.perf_counter() - began, 1),
        "seed": config.seed,
        "device": options.device,
        "cuvee_version": lineage.cuvee_version(),
        "members": {name: asdict(done) for name, done in trained.items()},
        "steps": sum(done.steps for done in trained.values()),
        "pairs_per_second": round(rows / seconds, 1) if seconds else 0.0,
        "loss": round(float(np.mean([done.loss for done in trained.values()])), 6),
        "cost": rows,
        **(more or {}),
    }
    same = {key: value for key, value in lineage.read(run).items() if key in ("config", "updates")}
    write_whole(run / lineage.FILE, lineage.text({**summary, **content, **same, "state": "done"}))
    return summary


def _told(member: Member, done: Trained) -> dict[str, Any]:
    sizes = {name: len(rows) for name, rows in member.rows.items()}
    return {"percent": member.percent, "seed": member.seed, "sizes": sizes, **asdict(done)}
