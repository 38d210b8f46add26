"""SearchConfig: what `cuvee search SEARCH.yml RUN` is told; typed, every mistake with its line and its mend.

    base_model: ../base
    models: [../a, ../b]               # as in recipes; {model: …, stats: …} too
    method: task_arithmetic            # any of `cuvee methods`
    vary:                              # by default what the method's registry entry says
      weight: {low: 0, high: 1, per: model}   # per: all, model, layers or module; log: true for a logarithmic scale
      normalize: [true, false]         # a list: one of these
      lambda: 1.0                      # a value: fixed
    objective: {function: "score:ndcg", aggregate: mean, floors: {sts: 0.8}}
    engine: gp                         # or with settings of its own: {adamerging: {rate: 0.001}}
    trials: 30
    start: [uniform, {weight: [0.5, 0.2]}, {study: ../earlier}, sobol]
    until: {seconds: 3600, no_gain: 15}
    recommend: observed                # or posterior

Relative paths are looked for near the configuration, then in the working directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from merging import node
from merging.errors import CuveeError, MergeError, did_you_mean, quoted
from merging.fields import choice, given, located, mapping, number, number_of, text, text_of, texts, told_as
from merging.methods import registry
from merging.methods.registry import Method, Parameter
from merging.node import Node
from merging.recipe import DTYPES, read_file
from merging.setting import Setting, refuse_unknown_keys
from merging.sources import ModelRef, Source
from search import engines, objective
from search.choose import OBSERVED, POSTERIOR
from search.cocktail import TEMPERATURE
from search.design import COCKTAIL, DEFAULT, RANDOM, SOBOL, UNIFORM, Start
from search.objective import MAX_OBJECTIVES, Goal, Objective
from search.space import PER, Vary

_NOUN = "configuration"
_AGGREGATES = ("mean", "worst", "weighted")
_BOUNDS = ("low", "high", "log")
_TRIALS, _MANY_TRIALS, _MANY_DIMENSIONS = 30, 50, 8


@dataclass(frozen=True)
class Until:
    """When a search ends before its trials are done.

    Attributes:
        seconds: of work on trials, all runs of the same search together; side by side they count once.
        no_gain: trials in a row that do not improve the best score.
    """

    seconds: float | None = None
    no_gain: int | None = None


@dataclass(frozen=True)
class SearchConfig:
    """A search.

    Attributes:
        models: those merged, without the base; paths are absolute.
        trials: None: 30, or 50 from 8 dimensions.
        tuning: the engine's settings, all of them.
        objective: its name; `settings` are its own.
        storage: "journal" or "sqlite", a file in RUN, or a database's URL.
        where: the file's name; `at` has the lines.
        text: the YAML.
    """

    base_model: ModelRef | None
    models: tuple[Source, ...]
    method: Method
    vary: Mapping[str, Vary]
    objective: str
    settings: Node
    goal: Goal
    engine: str = "gp"
    tuning: Mapping[str, float] = field(default_factory=dict)
    trials: int | None = None
    start: tuple[Start, ...] = DEFAULT
    until: Until = field(default_factory=Until)
    recommend: str = OBSERVED
    seed: int = 0
    storage: str = "journal"
    dtype: str | None = None
    where: str = field(default=_NOUN, compare=False)
    text: str = field(default="", compare=False, repr=False)
    lines: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def at(self, key: str) -> str:
        """Where the configuration says it: "search.yml:3"; the file where it says nothing."""
        return self.lines.get(key, self.where)

    def make_objective(self) -> Objective:
        """The objective, not yet prepared.

        Raises:
            CuveeError: its settings are impossible.
        """
        return objective.get(self.objective, self.at("objective")).make(self.settings, Path(self.where).parent)

    def told(self) -> str:
        """The YAML for others to read: without a database's user and password."""
        address = re.sub(r"://[^@]*@", "://", self.storage).partition("?")[0]
        return self.text.replace(self.storage, address)

    def trials_for(self, dimensions: int) -> int:
        if self.trials is not None:
            return self.trials
        return _TRIALS if dimensions < _MANY_DIMENSIONS else _MANY_TRIALS


def load(file: str | os.PathLike[str]) -> SearchConfig:
    """Reads a configuration's file.

    Raises:
        CuveeError: not readable, or it says something impossible.
    """
    with told_as(_NOUN):
        return parse(read_file(file), os.fspath(file))


def parse(yaml: str, where: str = _NOUN) -> SearchConfig:
    """Reads a configuration's text; mistakes are told at `where:line`.

    Raises:
        CuveeError: not YAML, or it says something impossible.
    """
    with told_as(_NOUN):
        root = node.read(yaml, where)
        if not isinstance(root.value, dict):
            raise CuveeError("is no mapping", where=root.where, mend="write at least 'models:' and 'objective:'")
        known = [
            each.name
            for each in fields(SearchConfig)
            if each.name not in ("settings", "goal", "tuning", "where", "text", "lines")
        ]
        refuse_unknown_keys(root, known, "a search")
        near = Path(where).parent
        method = _method(root)
        base = given(root, "base_model")
        base_model = None if base is None else _near(ModelRef.of(base, str(near)), near)
        name, settings, goal = _objective(root)
        engine, tuning = _engine(root)
        config = SearchConfig(
            base_model=base_model,
            models=_models(root, near, method, base_model),
            method=method,
            vary=_vary(root, method, engines.get(engine).per),
            objective=name,
            settings=settings,
            goal=goal,
            engine=engine,
            tuning=tuning,
            trials=number(root, "trials", None, low=1, whole=True),
            start=_start(root, near),
            until=_until(root),
            recommend=choice(root, "recommend", (OBSERVED, POSTERIOR), OBSERVED),
            seed=number(root, "seed", 0, low=0, high=2**32 - 1, whole=True),
            storage=_storage(root),
            dtype=choice(root, "dtype", DTYPES, None),
            where=where,
            text=yaml,
            lines={key: item.where for key, item in root.value.items()},
        )
        config.make_objective()
        if config.recommend == POSTERIOR and goal.front:
            what = "'recommend: posterior' is of one score, and a front has several"
            raise CuveeError(what, where=config.at("recommend"), mend="leave it out")
    return config


def until(said: list[str], config: SearchConfig) -> SearchConfig:
    """The configuration with what `--until` says: "trials=50", "seconds=3600", "no_gain=15".

    Raises:
        CuveeError: something else.
    """
    for item in said:
        key, _, value = item.partition("=")
        limits = {"trials": True, "seconds": False, "no_gain": True}
        if key not in limits:
            raise CuveeError(f"'{item}' is no limit", where="--until", mend="trials=50, seconds=3600 or no_gain=15")
        root = Node({key: Node(value, "--until", value)}, "--until")
        limit = number(root, key, None, above=0, whole=limits[key])
        if key == "trials":
            config = replace(config, trials=limit)
        else:
            config = replace(config, until=replace(config.until, **{key: limit}))
    return config


def _method(root: Node) -> Method:
    name = text(root, "method", "task_arithmetic")
    try:
        return registry.get(name)
    except MergeError as error:
        where = root.value["method"].where
        raise CuveeError(error.what, where=where, mend=error.mend) from None


def _models(root: Node, near: Path, method: Method, base: ModelRef | None) -> tuple[Source, ...]:
    item = given(root, "models")
    if item is None or not isinstance(item.value, list) or not item.value:
        where = root.where if item is None else item.where
        raise CuveeError("a search needs 'models', a list", where=where, mend="add 'models:' with one entry a model")
    found = []
    for entry in item.value:
        source = Source.of(entry, str(near))
        if source.parameters:
            raise CuveeError(
                "'parameters' of a model are what a search finds",
                where=source.where,
                mend="say under 'vary' what is fixed",
            )
        stats = source.stats
        if stats is not None and stats.path is not None:
            stats = replace(stats, path=_absolute(stats.path, near))
        elif stats is not None:
            stats = replace(stats, options={**stats.options, "data": _absolute(stats.options["data"], near)})
        found.append(replace(source, model=_near(source.model, near), stats=stats))
    if method.base == "none" or base is None:
        return tuple(found)
    others = tuple(source for source in found if source.model.identity != base.identity)
    if not others:
        raise CuveeError("the base is the only model", where=item.where, mend="add the models to merge into it")
    return others


def _near(ref: ModelRef, near: Path) -> ModelRef:
    adapter = None if ref.adapter is None else _absolute(ref.adapter, near)
    return replace(ref, path=_absolute(ref.path, near), adapter=adapter)


def _absolute(path: str, near: Path) -> str:
    """Of what exists near the configuration or in the working directory; a hub id as it is."""
    return located(path, near, Path.exists) or path


def _engine(root: Node) -> tuple[str, dict[str, float]]:
    """Its name and its settings."""
    item = given(root, "engine") or Node(None, root.where, SearchConfig.engine)
    said = Node(dict[str, Node](), item.where)
    name = item
    if isinstance(item.value, dict) and len(item.value) == 1:
        ((key, said),) = item.value.items()
        name = Node(key, item.where, key)
    found = engines.get(text_of(name, "engine"), item.where)
    if not isinstance(said.value, dict):
        raise CuveeError(f"settings of '{found.name}' must be a mapping, not {said}", where=said.where)
    if said.value and not found.settings:
        raise CuveeError(f"the engine '{found.name}' takes no settings", where=said.where)
    refuse_unknown_keys(said, found.settings, f"the engine '{found.name}'")
    return found.name, {
        key: number(said, key, knob.default, low=knob.low, above=knob.above, whole=knob.whole)
        for key, knob in found.settings.items()
    }


def _vary(root: Node, method: Method, per: str) -> dict[str, Vary]:
    item = mapping(root, "vary", "{weight: {low: 0, high: 1}}") or Node({}, root.where)
    found = {"weight": Vary(low=0.0, high=1.0, per=per)} if per and "weight" in method.parameters else {}
    for name, said in item.value.items():
        if name not in method.parameters:
            mend = did_you_mean(name, method.parameters, f"known: {quoted(method.parameters) or 'none'}")
            raise CuveeError(f"'{name}' is no parameter of '{method.name}'", where=said.where, mend=mend)
        if said.value is not None:
            found[name] = _vary_one(method.parameters[name], said)
    return found


def _vary_one(parameter: Parameter, item: Node) -> Vary:
    name = parameter.name
    if isinstance(item.value, list):
        item = Node({"choices": item}, item.where)
    elif not isinstance(item.value, dict):
        return Vary(value=_value(parameter, item), where=item.where)
    refuse_unknown_keys(item, (*_BOUNDS, "choices", "value", "per"), f"what varies in '{name}'")
    for key, beside in (("value", ("choices", "per", *_BOUNDS)), ("choices", _BOUNDS)):
        idle = next((other for other in beside if given(item, key) and given(item, other)), None)
        if idle is not None:
            what = f"'{idle}' of '{name}' has no meaning beside '{key}'"
            raise CuveeError(what, where=item.value[idle].where, mend="leave one of them out")
    default = "model" if parameter.per_model and name == "weight" else "all"
    per = choice(item, "per", PER, default)
    if given(item, "value") is not None:
        return Vary(value=_value(parameter, item.value["value"]), where=item.where)
    if per == "model" and not parameter.per_model:
        raise CuveeError(f"'{name}' is one for all models", where=item.value["per"].where, mend="write 'per: all'")
    choices = given(item, "choices")
    if choices is not None:
        if not isinstance(choices.value, list) or not choices.value:
            raise CuveeError(f"the choices of '{name}' must be a list", where=choices.where)
        values = tuple(dict.fromkeys(_value(parameter, each) for each in choices.value))
        return Vary(choices=values, per=per, where=item.where)
    if parameter.type not in (int, float):
        kind = "true or false" if parameter.type is bool else quoted(parameter.choices) or "a text"
        raise CuveeError(f"'{name}' has no bounds: it is {kind}", where=item.where, mend="give a list of what to try")
    log = given(item, "log")
    if log is not None and not isinstance(log.value, bool):
        raise CuveeError(f"'log' must be true or false, not {log}", where=log.where)
    low, high = (_bound(parameter, item, end) for end in ("low", "high"))
    if low > high:
        raise CuveeError(f"'low' of '{name}' is greater than 'high'", where=item.where)
    if log is not None and log.value and low <= 0:
        raise CuveeError(f"'{name}' on a logarithmic scale needs a 'low' above 0", where=item.where)
    return Vary(low=low, high=high, log=bool(log is not None and log.value), per=per, where=item.where)


def _bound(parameter: Parameter, item: Node, end: str) -> float:
    natural = {"low": parameter.low, "high": parameter.high}[end]
    if given(item, end) is None:
        if natural is None:
            raise CuveeError(
                f"what varies in '{parameter.name}' has no '{end}'", where=item.where, mend=f"add '{end}:'"
            )
        return float(natural)
    return float(_value(parameter, item.value[end]))


def _value(parameter: Parameter, item: Node) -> Any:
    """A value in the parameter's type and range, by what reads recipes."""
    if isinstance(item.value, list | dict):
        raise CuveeError(f"'{parameter.name}' must be a value, not {item}", where=item.where)
    return Setting.of(parameter.name, item).read_as(parameter).conditions[0].value


def _objective(root: Node) -> tuple[str, Node, Goal]:
    item = given(root, "objective")
    if item is None:
        mend = "add 'objective: {function: module:function}'"
        raise CuveeError("a search needs an 'objective'", where=root.where, mend=mend)
    if not isinstance(item.value, dict):
        name = text_of(item, "objective")
        objective.get(name, item.where)
        return name, Node({name: Node(None, item.where)}, item.where), Goal()
    goal_keys = ("aggregate", "floors", "front")
    names = [key for key in item.value if key not in goal_keys and key in objective.known()]
    if not names:
        first = next((key for key in item.value if key not in goal_keys), "")
        known = objective.known()
        mend = did_you_mean(first, known, f"known: {quoted(known)}")
        raise CuveeError("'objective' names none", where=item.where, mend=mend)
    settings = Node({key: value for key, value in item.value.items() if key not in goal_keys}, item.where)
    return names[0], settings, _goal(item)


def _goal(item: Node) -> Goal:
    aggregate, weights = given(item, "aggregate"), dict[str, float]()
    how = "mean"
    if aggregate is not None and isinstance(aggregate.value, dict):
        refuse_unknown_keys(aggregate, ("weighted",), "'aggregate'")
        how, weights = "weighted", _numbers(aggregate, "weighted", low=0)
        if not sum(weights.values()) > 0:
            raise CuveeError("the weights of the tasks sum to 0", where=aggregate.where)
    elif aggregate is not None:
        how = choice(item, "aggregate", _AGGREGATES, "mean")
        if how == "weighted":
            raise CuveeError("'weighted' needs weights", where=aggregate.where, mend="write 'weighted: {task: 2}'")
    front = given(item, "front")
    tasks = () if front is None or front.value is False else tuple(task for task, _ in texts(item, "front"))
    if front is not None and tasks and not 2 <= len(tasks) <= MAX_OBJECTIVES:
        mend = f"name two or {MAX_OBJECTIVES}, or aggregate them and set floors"
        raise CuveeError(f"a front of {len(tasks)} objectives is not searched", where=front.where, mend=mend)
    if front is not None and len(set(tasks)) < len(tasks):
        raise CuveeError("a task is twice in 'front'", where=front.where)
    return Goal(how, weights, _numbers(item, "floors"), tasks)


def _numbers(root: Node, key: str, low: float | None = None) -> dict[str, float]:
    item = mapping(root, key, "{task: 0.5}")
    return {} if item is None else {name: number_of(value, name, low=low) for name, value in item.value.items()}


def _start(root: Node, near: Path) -> tuple[Start, ...]:
    item = given(root, "start")
    if item is None:
        return DEFAULT
    found = []
    for entry in item.value if isinstance(item.value, list) else [item]:
        if not isinstance(entry.value, dict):
            kind = choice(Node({"start": entry}, entry.where), "start", (UNIFORM, SOBOL, RANDOM, COCKTAIL), UNIFORM)
            found.append(Start(kind, where=entry.where))
        elif kind := next((kind for kind in (SOBOL, RANDOM) if kind in entry.value), None):
            refuse_unknown_keys(entry, (kind,), "a start")
            found.append(Start(kind, number(entry, kind, None, low=1, whole=True), where=entry.where))
        elif COCKTAIL in entry.value:
            refuse_unknown_keys(entry, (COCKTAIL,), "a start")
            said = mapping(entry, COCKTAIL, "{temperature: 5}") or Node({}, entry.where)
            refuse_unknown_keys(said, ("temperature",), "a cocktail")
            found.append(
                Start(COCKTAIL, temperature=number(said, "temperature", TEMPERATURE, above=0), where=entry.where)
            )
        elif "study" in entry.value:
            refuse_unknown_keys(entry, ("study",), "a start")
            found.append(Start("study", study=_absolute(text(entry, "study", ""), near), where=entry.where))
        else:
            found.append(Start("point", values=entry.plain(), where=entry.where))
    return tuple(found)


def _until(root: Node) -> Until:
    item = mapping(root, "until", "{seconds: 3600, no_gain: 15}")
    if item is None:
        return Until()
    refuse_unknown_keys(item, ("seconds", "no_gain"), "'until'")
    return Until(number(item, "seconds", None, above=0), number(item, "no_gain", None, low=1, whole=True))


def _storage(root: Node) -> str:
    name: str = text(root, "storage", "journal")
    if name not in ("journal", "sqlite") and "://" not in name:
        mend = "write journal, sqlite, or a URL such as postgresql://…"
        raise CuveeError(f"'{name}' is no storage", where=root.value["storage"].where, mend=mend)
    return name
