"""A run of `cuvee search`: from a configuration to RUN/ with the study, its table, the best recipe and the merged model.

    study.log | study.db     the trials, in Optuna's storage; optuna-dashboard opens it
    trials.jsonl, trials.csv the same as a table
    best.yml, model/         the best recipe, ready for `cuvee merge`, and what it makes
    front.json               with several objectives: the Pareto front
    search.svg               what the trials scored, and at which coefficients; drawn anew while it goes on
    cuvee.json               what was searched, by what, and what came of it

Whatever kills it, the same command goes on.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from merging import engine, kernels, lineage
from merging.build import since
from merging.errors import CuveeError
from merging.inspection import short_names
from merging.output import alone, just_begun, write_whole
from search import choose, engines, rivals
from search.candidates import Candidates
from search.choose import Trial
from search.config import SearchConfig
from search.design import TRIALS, design
from search.objective import NamesTasks
from search.picture import PICTURE, picture
from search.recipes import MODEL, check, content_of, look_of, recipe_of, space_of, tensor_names, with_statistics
from search.space import Space
from search.study import JOURNAL, SQLITE, Settings, Study, forget, open_study, storage_failures_told, work
from search.workers import search_side_by_side

TABLE, BEST, FRONT = "trials.csv", "best.yml", "front.json"
_SCRATCH = ".scratch"
_EVERY = 60.0  # seconds between two pictures of a search that is under way, and
_SHARE = 0.02  # of the time may go to them
_MADE = (JOURNAL, SQLITE, f".{JOURNAL}.lock", ".ask", TRIALS, TABLE, BEST, FRONT, PICTURE, *rivals.MADE, lineage.FILE)


def search_run(
    config: SearchConfig,
    run: str | Path,
    *,
    workers: int = 1,
    device: str = "cpu",
    force: bool = False,
    dry_run: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Searches, or goes on with a search, and writes what it found.

    Args:
        workers: processes that share the study; with one, a search that is killed and gone on with proposes the same.
        force: begin anew in a folder that holds another search.
        dry_run: check the configuration and say what varies; write nothing.

    Returns:
        What `cuvee search --json` prints.

    Raises:
        CuveeError: models, settings, a device or a folder that cannot be; nothing but failures.
    """
    began = time.perf_counter()
    run = Path(run).absolute()
    space = space_of(config)
    optimiser = engines.refuse_unfit(config.engine, len(config.goal.front), config.at("engine"))
    check_claim(run)
    settings = _settings(config, space, workers, {} if force else _past(run))
    if device != "cpu":
        kernels.load("auto", device)  # else each trial would fail at it
    check(config, space, run / MODEL, note)
    objective = config.make_objective()
    if isinstance(objective, NamesTasks):
        config.goal.refuse_unknown(objective.task_names(), config.at("objective"))
    for line in objective.check(look_of(config)):
        note(line)
    if config.goal.floors and not optimiser.floors:
        note(
            f"'{config.engine}' does not look at floors: they only rule out answers; gp, botorch and tpe search above them"
        )
    settings = replace(settings, identity={**settings.identity, **content_of(config)})
    summary = {
        **{"command": "search", "out": str(run), "method": config.method.name, "engine": config.engine},
        **{"seed": config.seed, "device": device, "cuvee_version": lineage.cuvee_version()},
        "dimensions": [d.name for d in space.dimensions],
    }
    if dry_run:
        starts = len(settings.design)
        return {**summary, "dry_run": True, "trials": settings.trials, "start": starts, "seconds": since(began)}
    with alone(run):
        if force:
            forget(run, config.storage)
            _clear(run)
        storage = config.storage if "://" not in config.storage else "database"
        begun = {**summary, "state": "begun", **_kept(config, settings, storage)}
        if past := _past(run):
            if past.get("storage", storage) != storage:
                mend = "choose another folder, or add --force to begin anew"
                raise CuveeError("holds a study in another storage", where=str(run), mend=mend)
        else:
            write_whole(run / lineage.FILE, lineage.text(begun))  # first: what holds it is ours, wherever we are killed
        study = open_study(settings, run, config.storage, config.where)
        _refuse_lost(study, config.storage)
        with storage_failures_told(run):
            _search(study, config, run, device, progress, note)
        trials = study.trials()
        _write_tables(run, study, trials)
        found = choose.best(space, trials, config.recommend)
        if found is None:
            mend = "mend it, and add --force to begin anew, or '--until trials=' with more of them"
            raise CuveeError(f"no trial succeeded, the last one: {trials[-1].error}", where=config.where, mend=mend)
        if not found.feasible:
            note("no trial keeps the floors; the nearest to keeping them is taken")
        _write_model(config, space, found, run, device)
        _draw(config, study, run, found)
        summary["seconds"] = since(began)
        result = {**summary, **_result(space, trials, found, study), "model": str(run / MODEL), "workers": workers}
        content = {**result, "state": "done", "config": config.told(), **_kept(config, settings, storage)}
        content["versions"] = lineage.versions("optuna", "scikit-optimize", "cmaes", "greenlet", "torch", "numpy")
        write_whole(run / lineage.FILE, lineage.text(content))
        return result


def check_claim(run: Path) -> None:
    """Raises CuveeError where the folder is no search's, whatever its study is, and not empty."""
    try:
        if not run.exists() or just_begun(run):
            return
        if not run.is_dir():
            raise CuveeError("is no folder", where=str(run), mend="choose another name")
        if not any(run.iterdir()):
            return
    except OSError as error:
        raise CuveeError(f"cannot be looked into: {error.strerror}", where=str(run)) from None
    if not (run / lineage.FILE).is_file():
        raise CuveeError("is not empty and none of our outputs", where=str(run), mend="choose another folder")
    past = lineage.read(run)
    if past.get("command") != "search":
        raise CuveeError(f"is an output of `cuvee {past.get('command')}`", where=str(run), mend="choose another folder")


def _refuse_lost(study: Study, storage: str) -> None:
    """Raises CuveeError where the folder has trials that its study has not: it is in another place, and this one is new."""
    if (study.folder / TRIALS).is_file() and not study.trials():
        forget(study.folder, storage)
        mend = "name the database, and keep the folder, in which it began, or add --force to begin anew"
        raise CuveeError("holds trials of a study that is not in its storage", where=str(study.folder), mend=mend)


def _past(run: Path) -> dict[str, Any]:
    """The lineage of a run that has begun; empty where none has."""
    return lineage.read(run) if (run / lineage.FILE).is_file() else {}


def _kept(config: SearchConfig, settings: Settings, storage: str) -> dict[str, Any]:
    """What the next run of the same command looks up."""
    return {"storage": storage, "start": _said(config), "study": settings.plain()}


def _said(config: SearchConfig) -> Any:
    return json.loads(json.dumps([{**asdict(start), "where": ""} for start in config.start]))


def _first_points(config: SearchConfig, space: Space, past: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those that the run began with: a study that they were taken from may have gone on since, or be gone."""
    if past.get("start") == _said(config) and any(start.study for start in config.start):
        return list(past["study"]["start"])
    return design(space, config.start, config.seed)


def _settings(config: SearchConfig, space: Space, workers: int, past: Mapping[str, Any]) -> Settings:
    identity = {
        "models": [source.plain() for source in config.models],
        "base_model": None if config.base_model is None else config.base_model.plain(),
        "objective": config.settings.plain(),
        "data": dict(config.make_objective().data()),
        "dtype": config.dtype,
        **({"tuning": dict(config.tuning)} if config.tuning else {}),
    }
    rival = rivals.get(config, workers)
    return Settings(
        space=space,
        engine=config.engine,
        seed=config.seed,
        design=rival.begin(config, space) if rival else _first_points(config, space, past),
        trials=(config.trials or rival.trials) if rival else config.trials_for(len(space.dimensions)),
        goal=config.goal,
        identity=identity,
        seconds=config.until.seconds,
        no_gain=config.until.no_gain,
        workers=workers,
    )


def _search(
    study: Study,
    config: SearchConfig,
    run: Path,
    device: str,
    progress: Callable[[str, int, int], None],
    note: Callable[[str], None],
) -> None:
    """All trials that are missing."""
    settings, scratch = study.settings, run / _SCRATCH
    orphans = study.orphans()
    if not orphans and study.ended() is not None:
        return
    shutil.rmtree(scratch, ignore_errors=True)

    due = time.monotonic() + _EVERY

    def told(trial: Trial) -> None:
        nonlocal due
        trials = study.trials()
        _write_tables(run, study, trials)
        if (drawn := time.monotonic()) >= due:
            _draw(config, study, run)
            now = time.monotonic()
            due = now + max(_EVERY, (now - drawn) / _SHARE)
        if trial.error:
            note(f"trial {trial.number} failed: {trial.error}")
        done, total = len(trials), max(len(trials), settings.trials)
        progress("trials", done, total)

    begun = len(study.trials())
    progress("trials", begun, max(begun + 1, settings.trials))
    try:
        if settings.workers > 1:
            with_statistics(config, run / MODEL, device, note)  # once, for all workers
            search_side_by_side(config, settings, run, scratch, orphans, device=device, told=told)
        else:
            evaluate = Candidates(config, run, scratch, device=device, note=note)
            rival = rivals.get(config)
            if rival:
                rival.work(study, evaluate, config, orphans=orphans, told=told)
            else:
                work(study, evaluate, orphans=orphans, told=told)
        ended = len(study.trials())
        progress("trials", ended, ended)  # also where it ended early
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _result(space: Space, trials: Sequence[Trial], found: Trial, study: Study) -> dict[str, Any]:
    score = found.values[0] if len(found.values) == 1 else list(found.values)
    front = [trial.number for trial in choose.front(trials)] if len(found.values) > 1 else None
    equal = choose.of_equal_weights(space, trials)
    return {
        **({} if front is None else {"front": front, "tasks": list(study.settings.goal.front)}),
        "best": {"score": score, "coefficients": space.coefficients(found.point), "trial": found.number},
        "equal_weights": None if equal is None else equal.values[0] if len(equal.values) == 1 else list(equal.values),
        "trials": len(trials),
        "failed": sum(bool(trial.error) for trial in trials),
        "scores": dict(found.tasks),
        "feasible": found.feasible,
        "ended": study.ended(),
    }


def _write_model(config: SearchConfig, space: Space, found: Trial, run: Path, device: str) -> None:
    """The best recipe, and its model unless it is there already."""
    recipe = recipe_of(config, space.coefficients(found.point), tensor_names(config), where=str(run / BEST))
    text = recipe.to_yaml()
    drawn = f"# cuvee merge {BEST} OUT --seed {config.seed}\n" if config.seed else ""
    write_whole(run / BEST, drawn + text)
    with suppress(CuveeError, OSError):
        past = lineage.read(run / MODEL)
        if past.get("recipe") == text and past.get("seed") == config.seed:
            return
    engine.merge(recipe, run / MODEL, seed=config.seed, device=device, force=True)


def _write_tables(run: Path, study: Study, trials: Sequence[Trial]) -> None:
    space, goal = study.settings.space, study.settings.goal
    rows = [
        {
            "number": trial.number,
            "state": "FAIL" if trial.error else "COMPLETE",
            "values": list(trial.values),
            "feasible": trial.feasible,
            "point": dict(trial.point),
            "tasks": dict(trial.tasks),
            "seconds": trial.seconds,
            "error": trial.error,
        }
        for trial in trials
    ]
    write_whole(run / TRIALS, "".join(json.dumps(row) + "\n" for row in rows))
    tasks = list(dict.fromkeys(task for trial in trials for task in trial.tasks))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    values = [f"score.{task}" for task in goal.front] or ["score"]
    count = len(values)
    points = [d.name for d in space.dimensions]
    own = ["number", "state", *values, "feasible", *points, "seconds", "error"]
    named = [f"task {task}" if task in own else task for task in tasks]
    writer.writerow([*own[:-2], *named, *own[-2:]])
    for trial, row in zip(trials, rows, strict=True):
        writer.writerow(
            [
                *(trial.number, row["state"], *(trial.values or [""] * count), trial.feasible),
                *(trial.point.get(name, "") for name in points),
                *(trial.tasks.get(task, "") for task in tasks),
                *(trial.seconds, trial.error),
            ]
        )
    write_whole(run / TABLE, table.getvalue())
    if count > 1:
        front = [
            {"trial": t.number, "scores": dict(t.tasks), "coefficients": space.coefficients(t.point)}
            for t in choose.front(trials)
        ]
        write_whole(run / FRONT, json.dumps(front, indent=2) + "\n")


def _draw(config: SearchConfig, study: Study, run: Path, chosen: Trial | None = None) -> None:
    settings, models = study.settings, short_names([source.model for source in config.models])
    options: dict[str, Any] = {"starts": len(settings.design), "front": settings.goal.front, "chosen": chosen}
    write_whole(run / PICTURE, picture(settings.space, study.trials(), models, **options))


def _clear(run: Path) -> None:
    """Takes away what an earlier search made, its lineage last."""
    for name in (MODEL, _SCRATCH):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in _MADE:
        (run / name).unlink(missing_ok=True)
