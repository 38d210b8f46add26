"""Study: trials in a storage that outlives the process: opened, gone on with, asked for points and told of scores.

Optuna's storage holds everything: what the study is (engine, seed, space and the rest, refused where they differ), the points
to start with, each trial with its scores by task. A trial that a killed process left is evaluated again under its own number,
so that a search in one process proposes the same points whether or not it was killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from merging.errors import CuveeError
from search import engines
from search.choose import Trial, best, front
from search.cocktail import alone
from search.design import COCKTAIL
from search.objective import Goal, Scores
from search.space import Space

#: From a method's parameters to scores; may raise anything.
Evaluate: TypeAlias = Callable[[Mapping[str, Any]], Scores]
NAME = "cuvee"
JOURNAL, SQLITE = "study.log", "study.db"
_IDENTITY, _START, _TASKS, _SECONDS, _ERROR, _FLOOR = "cuvee", "start", "tasks", "seconds", "error", "floor"
_HOPELESS = 8  # failures in a row, where nothing ever succeeded
_ASK = ".ask"
_PATIENCE = 0.2  # seconds between looks at what others have at work


@dataclass(frozen=True)
class Settings:
    """What a study is, and when it ends.

    Attributes:
        design: the points to start with.
        identity: what else makes it the same study, by name; JSON.
        trials: in all, failed ones too.
        seconds: of work on trials, divided by the workers; None: no limit.
        no_gain: trials in a row without a better one, after which it ends; None: no limit.
    """

    space: Space
    engine: str
    seed: int
    design: Sequence[Mapping[str, Any]]
    trials: int
    goal: Goal = field(default_factory=Goal)
    identity: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    no_gain: int | None = None
    workers: int = 1

    def plain(self) -> dict[str, Any]:
        """What must be equal for a study to go on."""
        goal = {"aggregate": self.goal.aggregate, "weights": dict(self.goal.weights), "floors": dict(self.goal.floors)}
        mine = {
            "engine": self.engine,
            "seed": self.seed,
            "space": self.space.plain(),
            "start": list(map(dict, self.design)),
        }
        found: dict[str, Any] = json.loads(
            json.dumps({**mine, "goal": {**goal, "front": list(self.goal.front)}, **self.identity})
        )
        return found


class Study:
    """A study that is open in this process."""

    def __init__(self, settings: Settings, study: optuna.Study, folder: Path, where: str) -> None:
        self.settings, self.optuna, self.folder, self.where = settings, study, folder, where
        self._distributions = settings.space.distributions()

    def trials(self) -> list[Trial]:
        """Those that ended, by number."""
        frozen = self.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
        return sorted(map(_trial, frozen), key=lambda trial: trial.number)

    def orphans(self) -> list[int]:
        """Numbers of the trials that began and did not end; only for whoever knows that nobody works on them."""
        return [t.number for t in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]

    def take(self, number: int) -> optuna.Trial:
        """A trial that was left, with its point; the point is drawn as it would have been where there was none yet."""
        with _locked(self.folder / _ASK):
            frozen = next(t for t in self.optuna.get_trials(deepcopy=False) if t.number == number)
            trial = optuna.Trial(self.optuna, frozen._trial_id)
            for name, distribution in self._distributions.items():
                _suggest(trial, name, distribution)
            return trial

    def ask(self) -> optuna.Trial | None:
        """The next trial with its point; None: the search ends. One process asks at a time and knows what others do."""
        while True:
            with _locked(self.folder / _ASK):
                if self.ended() is not None:
                    return None
                if not self._mixes_too_early():
                    return self.optuna.ask(self._distributions)
            time.sleep(_PATIENCE)

    def put(self, point: Mapping[str, Any]) -> optuna.Trial | None:
        """The next trial, at this point unless another waits; None: the search ends."""
        if not self.optuna.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self.optuna.enqueue_trial(dict(point))
        return self.ask()

    def _mixes_too_early(self) -> bool:
        """Whether the next trial is the mixture of models of which another process has one at work, so without a score."""
        waiting = self.optuna.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting or COCKTAIL not in waiting[0].user_attrs:
            return False
        at_work = self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        models = alone(self.settings.space)
        return any(trial.params in models for trial in at_work)

    def tell(self, trial: optuna.Trial, scores: Scores | None, seconds: float, error: str = "") -> None:
        """How a trial ended; without scores, or with some that are none, it failed."""
        if scores is not None:
            try:
                values, below = self.settings.goal.values(scores), self.settings.goal.violations(scores)
            except CuveeError as problem:
                scores, error = None, str(problem)
        trial.set_user_attr(_SECONDS, round(seconds, 6))
        if scores is None:
            trial.set_user_attr(_ERROR, error[:2000])
            self.optuna.tell(trial, state=TrialState.FAIL)
            return
        trial.set_user_attr(_TASKS, dict(scores.tasks))
        for task, violation in below.items():
            if f"{_FLOOR}:{task}" not in trial.constraints:
                trial.set_constraint(f"{_FLOOR}:{task}", violation)
        self.optuna.tell(trial, values)

    def ended(self) -> str | None:
        """Why the search has ended; None: it goes on."""
        settings = self.settings
        frozen = self.optuna.get_trials(deepcopy=False)
        begun = [trial for trial in frozen if trial.state != TrialState.WAITING]
        if len(begun) >= settings.trials:
            return "trials"
        done = self.trials()
        if settings.seconds is not None and sum(t.seconds for t in done) / settings.workers >= settings.seconds:
            return "seconds"
        if engines.untried(settings.space, begun) == []:
            return "space"
        if settings.no_gain is not None and _since_gain(settings.space, done) >= settings.no_gain:
            return "no_gain"
        return None


def open_study(settings: Settings, folder: Path, storage: str = "journal", where: str = "") -> Study:
    """Opens the study in a folder, or begins it.

    Args:
        storage: "journal" or "sqlite", a file in the folder; or a database's URL, in which the study is named after it.
        where: the configuration's file, for errors.

    Raises:
        CuveeError: what is there is another study, or the storage cannot be opened; the engine takes fewer objectives.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    objectives = max(1, len(settings.goal.front))
    engine = engines.refuse_unfit(settings.engine, objectives, where)
    try:
        study = optuna.create_study(
            study_name=_name(storage, folder),
            storage=_storage(storage, folder),
            sampler=engines.SeededSampler(engine, settings.space, settings.seed),
            directions=["maximize"] * objectives,
            load_if_exists=True,
        )
        identity = study.user_attrs.get(_IDENTITY)
        if identity is None:
            identity = settings.plain()
            study.set_user_attr(_IDENTITY, identity)
        _refuse_another(identity, settings.plain(), folder)
        begun = sum(_START in t.user_attrs for t in study.get_trials(deepcopy=False))
        for place, point in enumerate(settings.design):
            if place < begun:
                continue
            if COCKTAIL in point:  # the sampler knows it once the models have scores
                study.enqueue_trial({}, user_attrs={_START: place, **point})
            else:
                study.enqueue_trial(dict(point), user_attrs={_START: place})
    except CuveeError:
        raise
    except Exception as error:
        what = f"the study cannot be opened: {type(error).__name__}: {error}"
        raise CuveeError(what, where=str(folder), mend="see 'storage', or choose another folder") from error
    return Study(settings, study, folder, where)


@contextmanager
def storage_failures_told(folder: Path) -> Iterator[None]:
    """For work on an open study.

    Raises:
        CuveeError: a database fails on the way; what was told to it is in it.
    """
    try:
        yield
    except StorageInternalError as error:
        cause = error.__cause__ or error
        what = f"the study's storage failed: {type(cause).__name__}: {str(cause).splitlines()[0]}"
        mend = "mend it and start the same command again: it goes on"
        raise CuveeError(what, where=str(folder), mend=mend) from error


def forget(folder: Path, storage: str) -> None:
    """Deletes the study of a folder from a database; a file in the folder is the caller's.

    Raises:
        CuveeError: the database cannot be reached.
    """
    if "://" not in storage:
        return
    try:
        with suppress(KeyError):
            optuna.delete_study(study_name=_name(storage, folder), storage=storage)
    except Exception as error:
        raise CuveeError(f"the study cannot be deleted: {type(error).__name__}: {error}", where=str(folder)) from error


def work(
    study: Study, evaluate: Evaluate, *, orphans: Sequence[int] = (), told: Callable[[Trial], None] = lambda trial: None
) -> None:
    """Evaluates trials until the study ends: first those that were left, then what is proposed.

    Args:
        told: called with each trial that ended.

    Raises:
        CuveeError: nothing but failures.
    """
    failures = 0
    waiting = list(orphans)
    while True:
        trial = study.take(waiting.pop(0)) if waiting else study.ask()
        if trial is None:
            return
        ended = attempt(study, trial, evaluate)
        told(ended)
        done = study.trials()
        failures = failures + 1 if ended.error else 0
        if failures >= _HOPELESS and not any(t.values for t in done):
            mend = "mend it and start the same command again"
            raise CuveeError(
                f"{failures} trials in a row failed, the last one: {ended.error}", where=study.where, mend=mend
            )


def attempt(study: Study, trial: optuna.Trial, evaluate: Evaluate, began: float | None = None) -> Trial:
    """Evaluates a trial and tells the study how it ended.

    Args:
        began: when the work on it did, by `time.perf_counter`; None: now.
    """
    began, scores, error = time.perf_counter() if began is None else began, None, ""
    try:
        scores = evaluate(study.settings.space.coefficients(trial.params))
    except (Exception, SystemExit) as problem:  # the user's function may be a script that ends Python
        error = str(problem) if isinstance(problem, CuveeError) else f"{type(problem).__name__}: {problem}"
    study.tell(trial, scores, time.perf_counter() - began, error)
    return next(ended for ended in study.trials() if ended.number == trial.number)


def _refuse_another(old: Any, new: Mapping[str, Any], folder: Path) -> None:
    old = old if isinstance(old, dict) else {}
    differ = [key for key in new if old.get(key) != new[key]]
    if differ:
        told = [f"{key}{_parts(old.get(key), new[key])}" for key in differ]
        mend = "choose another folder, or add --force to begin anew"
        raise CuveeError(f"holds a study of another {' and '.join(told)}", where=str(folder), mend=mend)


def _parts(old: Any, new: Any) -> str:
    """Which parts of a mapping differ."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return ""
    names = [str(name) for name in {**old, **new} if old.get(name) != new.get(name)]
    return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _name(storage: str, folder: Path) -> str:
    return f"{NAME}:{folder.absolute()}" if "://" in storage else NAME


def _storage(storage: str, folder: Path) -> BaseStorage:
    if storage == "journal":
        return JournalStorage(_Journal(str(folder / JOURNAL)))
    if storage == "sqlite":
        from sqlalchemy.engine import URL

        # What a folder's name may hold, '?' and '%' too, means something else in a URL.
        storage = URL.create("sqlite", database=str((folder / SQLITE).absolute())).render_as_string()
    return RDBStorage(storage)


class _Journal(JournalFileBackend):
    """Optuna's journal, waiting for the disk once a trial, when it ends, instead of at each of its coordinates.

    A kill of the process loses nothing either way; a failure of the power at most the trial that was at work. The lock goes
    with the process that holds it; Optuna's own outlives a kill and is waited for.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        file = Path(self._file_path)
        try:
            with _locked(file.with_name(f".{file.name}.lock")), open(file, "a+b") as stream:
                _mend(stream)
                stream.write(lines.encode("utf-8"))  # at the end, wherever `_mend` has read
                stream.flush()
                if any("values" in log for log in logs):
                    os.fsync(stream.fileno())
        except OSError as error:
            raise CuveeError(f"cannot write: {error.strerror}", where=str(file)) from error


def _mend(stream: BinaryIO) -> None:
    """Takes off half a last line, which a process left that was killed while it wrote: the next would be joined to it."""
    end = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, end - 1))
    if stream.read() not in (b"", b"\n"):
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> None:
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
    elif isinstance(distribution, IntDistribution):
        trial.suggest_int(name, distribution.low, distribution.high, log=distribution.log)
    else:
        assert isinstance(distribution, FloatDistribution)
        trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


def _trial(frozen: FrozenTrial) -> Trial:
    failed = frozen.state == TrialState.FAIL
    violation = sum(max(0.0, value) for value in frozen.constraints.values())
    return Trial(
        number=frozen.number,
        point=dict(frozen.params),
        values=() if failed else tuple(frozen.values),
        tasks=frozen.user_attrs.get(_TASKS, {}),
        feasible=violation == 0,
        violation=violation,
        error=frozen.user_attrs.get(_ERROR, "failed") if failed else "",
        seconds=float(frozen.user_attrs.get(_SECONDS, 0.0)),
    )


def _since_gain(space: Space, trials: Sequence[Trial]) -> int:
    """How many trials ended after the last that was better than all before it, or that is on the front."""
    answer = best(space, trials)
    if answer is None:
        return 0
    last = max(trial.number for trial in [answer, *(front(trials) if len(answer.values) > 1 else [])])
    return sum(trial.number > last for trial in trials)
