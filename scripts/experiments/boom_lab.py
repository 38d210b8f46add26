"""Makes and scores the models of the experiment on BOOM with cuvee's own functions; what is there is not made again.

The experiment's folder:

    suite/                                  the tasks, with as many rows as were asked for
    data/                                   token ids
    base/                                   the model that all start from
    models/seed0-lr5e-05/members/<member>   by seed and learning rate; removed when no arm needs it any more
    models/seed0-lr5e-05/merged/<arm>
    models/seed0-lr5e-05/first              the run of round 1; beside it update/2, update/3, replay/2 …
    rates/<arm>-seed0.json                  validation scores by learning rate
    records/<arm>-seed0-lr5e-05.json        what the tables are made of
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from boom_arms import CORE, MERGES, Arm, Member, Strategy, member_of_round
from boom_table import Record, chosen_rate, mean

from embeddings.evaluation import evaluate as evaluation
from embeddings.evaluation import suite
from embeddings.training import config as training_config
from embeddings.training.bag import train_run
from embeddings.training.config import TrainingConfig
from embeddings.training.data import TrainingSet
from embeddings.training.draws import draw
from embeddings.training.members import open_backbone, read_sets, train_member
from embeddings.training.options import Options
from embeddings.training.run_folder import MODEL
from embeddings.training.train import Job, Trained
from embeddings.training.update import update_model
from merging.output import write_whole
from merging.progress import Work

IN_DOMAIN = "in-domain"
_DRAW, _CORE_DRAW = 4, 5  # keep draws apart that share a seed


@dataclass(frozen=True)
class Plan:
    """What the whole experiment shares.

    Attributes:
        settings: the configuration of every training, as YAML says it, but for data, seed and learning rate.
        tasks: in-domain data sets that are trained on.
        groups: tasks by group, as they are averaged.
        rounds: tasks by the round in which they arrive.
        rates: the grid of learning rates.
        tune_seed: the seed for which they are compared.
        negatives: of a row, at most; of a classification they are drawn.
    """

    out: Path
    settings: Mapping[str, Any]
    tasks: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    rounds: Sequence[tuple[str, ...]]
    rates: tuple[float, ...]
    tune_seed: int
    negatives: int
    device: str
    keep: bool
    progress: Work

    @property
    def suite(self) -> Path:
        return self.out / "suite"

    @property
    def all_tasks(self) -> tuple[str, ...]:
        return tuple(task for tasks in self.groups.values() for task in tasks)


class Lab:
    """Everything that takes time."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.options = Options(device=plan.device)
        self.sets = cache(self._sets)

    # ---- records ----

    def static(self, arm: Arm, seed: int, later: Sequence[Arm] = ()) -> Record:
        """The record of an arm; makes what it lacks, and removes what no later arm needs."""
        tune = self.plan.tune_seed
        rate, edge = self._rate(arm.name, self.plan.tasks, lambda rate: self._make(arm, tune, rate)[0])
        file = self._record(arm.name, seed, rate)
        if not file.is_file():
            model, rows, lie = self._make(arm, seed, rate)
            test = self.score(model, self.plan.all_tasks)
            known = rate if arm.members else None
            _write(file, [Record(arm.name, arm.title, seed, 0, rows, known, edge, test, lie).plain()])
        needed = {member for each in later for member in each.members}
        for each in self.plan.rates:
            folder = self._folder(seed, each)
            self._drop(folder / "merged" / arm.name)
            for member in set(arm.members) - needed:
                self._drop(folder / "members" / member.name)
        return self._records(file, edge)[0]

    def updates(self, strategy: Strategy, seed: int) -> list[Record]:
        """The records of a strategy, one a round; of `first` there is one, scored on all tasks."""
        name, first = strategy.name, strategy.name == "first"
        rate, edge = self._first_rate()
        if not first:
            tune = self.plan.tune_seed
            rate, edge = self._rate(name, self.plan.tasks, lambda rate: self._chain(name, tune, rate)[-1][0])
        file = self._record(name, seed, rate)
        if not file.is_file():
            chain = [self._first(seed)] if first else self._chain(name, seed, rate)
            records = []
            for number, (model, rows) in enumerate(chain, 1):
                seen = [task for each in self.plan.rounds[:number] for task in each]
                test = self.score(model, self.plan.all_tasks if first or number == len(chain) else seen)
                records.append(Record(name, strategy.title, seed, number, rows, rate, edge, test).plain())
            _write(file, records)
        for each in self.plan.rates:
            self._drop(self._folder(seed, each) / name)
        return self._records(file, edge)

    def _records(self, file: Path, edge: str) -> list[Record]:
        return [Record(**{**record, "edge": edge}) for record in read(file)]

    def _rate(self, name: str, tasks: Sequence[str], make: Callable[[float], Path]) -> tuple[float, str]:
        """The best learning rate by the mean validation score on tasks; nothing to compare where there is but one."""
        if len(self.plan.rates) == 1 or name == "zero-shot":
            return self.plan.rates[0], ""
        file = self.plan.out / "rates" / f"{name}-seed{self.plan.tune_seed}.json"
        known: dict[str, dict[str, float]] = read(file) if file.is_file() else {}
        for rate in self.plan.rates:
            if f"{rate:g}" not in known:
                known[f"{rate:g}"] = self.score(make(rate), tasks, "validation")
                _write(file, known)
        scores = {rate: mean(known[f"{rate:g}"], tasks) for rate in self.plan.rates}
        return chosen_rate({rate: score for rate, score in scores.items() if score is not None})

    # ---- models ----

    def _make(self, arm: Arm, seed: int, rate: float) -> tuple[Path, float, dict[str, float]]:
        """An arm's model, the pair-passes that it took, and how its members lie to each other."""
        if not arm.members:
            return self.base(), 0, {}
        made = [self.member(member, seed, rate) for member in arm.members]
        rows = sum(done.rows for _, done in made)
        if len(made) == 1:
            return made[0][0], rows, {}
        folders, out = [folder for folder, _ in made], self._folder(seed, rate) / "merged" / arm.name
        if not out.exists():
            self.merge(folders, [float(done.rows) for _, done in made], arm.merge, out)
        return out, rows, spread(self.base(), folders, out)

    def member(self, member: Member, seed: int, rate: float) -> tuple[Path, Trained]:
        """A model trained from the base."""
        out = self._folder(seed, rate) / "members" / member.name
        config = self.config(seed, rate, schedule=member.schedule, epochs=member.epochs)
        return out, self._train(config, member, seed, out)

    def _train(self, config: TrainingConfig, member: Member, seed: int, out: Path) -> Trained:
        sets, rows = self._rows(member, seed)
        number = seed * 100_000 + member.draw * 1000 + round(member.percent) + 500 * member.complement
        job = Job(out.name, rows, 1.0, number, out.with_name(f"{out.name}.work"), out)
        return train_member(config, sets, job, self.options, self.plan.progress, self.plan.out)

    def merge(self, folders: Sequence[Path], weights: Sequence[float], how: str, out: Path) -> None:
        from merging.engine import merge
        from merging.methods import registry
        from merging.recipe import Recipe

        method, on_base = MERGES[how]
        weighted = "weight" in registry.get(method).parameters
        models = [
            {"model": str(folder), **({"parameters": {"weight": weight}} if weighted else {})}
            for folder, weight in zip(folders, weights, strict=True)
        ]
        base = str(self.base()) if on_base else None
        out.parent.mkdir(parents=True, exist_ok=True)
        merge(Recipe(method, models, base, dtype="float32"), out)

    def _first_rate(self) -> tuple[float, str]:
        return self._rate("first", self.plan.rounds[0], lambda rate: self._first_at(self.plan.tune_seed, rate)[0])

    def _first(self, seed: int) -> tuple[Path, float]:
        """What all strategies have after round 1, by `cuvee train`."""
        return self._first_at(seed, self._first_rate()[0])

    def _first_at(self, seed: int, rate: float) -> tuple[Path, float]:
        run = self._folder(seed, rate) / "first"
        done = train_run(
            self.config(seed, rate, self.plan.rounds[0]), run, options=self.options, progress=self.plan.progress
        )
        return run / MODEL, float(done["cost"])

    def _chain(self, name: str, seed: int, rate: float) -> list[tuple[Path, float]]:
        """The models after each round, and the pair-passes up to then."""
        chain = [self._first(seed)]
        for number in (1, 2):
            model, rows = chain[-1]
            out = self._folder(seed, rate) / name / str(number + 1)
            if name == "update":
                done = self._update(model, number, seed, rate, out)
                chain.append((out / MODEL, rows + done["cost"]))
                continue
            config = self.config(seed, rate)
            if name != "retrain":
                config = replace(
                    config, model=replace(config.model, path=str(model), revision=None, pooling=None, normalize=None)
                )
            trained = self._train(config, member_of_round(name, number, self.plan.rounds), seed, out)
            chain.append((out, rows + trained.rows))
        return chain

    def _update(self, model: Path, number: int, seed: int, rate: float, out: Path) -> dict[str, Any]:
        tasks = self.plan.rounds[number]
        folder = self.plan.out / "rounds"
        data, config = folder / f"{number + 1}.yml", folder / f"seed{seed}-lr{rate:g}.yml"
        write_whole(data, yaml.safe_dump({"data": [self._data(tasks)]}))
        write_whole(config, self.config(seed, rate).text)
        return update_model(
            model, data, out, config=config, seed=seed, options=self.options, progress=self.plan.progress
        )

    def base(self) -> Path:
        """What every member starts from, as a folder that can be scored and merged."""
        folder = self.plan.out / "base"
        if not folder.exists():
            scratch = folder.with_name(".base")
            shutil.rmtree(scratch, ignore_errors=True)
            open_backbone(self.config(0, 1e-5), "cpu", 0).save(scratch)
            scratch.rename(folder)
        return folder

    # ---- data ----

    def config(
        self, seed: int, rate: float, tasks: Sequence[str] = (), *, schedule: str = "batch_level", epochs: float = 1
    ) -> TrainingConfig:
        data = [self._data(tasks or self.plan.tasks)]
        more = {"data": data, "seed": seed, "learning_rate": rate, "schedule": schedule, "epochs": epochs, "core": CORE}
        text = yaml.safe_dump({**self.plan.settings, **more}, sort_keys=False)
        return training_config.parse(text, str(self.plan.out / "config.yml"))

    def _data(self, tasks: Sequence[str]) -> dict[str, Any]:
        return {"suite": str(self.plan.suite), "task": list(tasks), "negatives": self.plan.negatives}

    def _sets(self, seed: int) -> list[TrainingSet]:
        return read_sets(self.config(seed, 1e-5), self.plan.out, self.options, self.plan.progress, lambda line: None)

    def sizes(self) -> dict[str, int]:
        return {each.name: len(each) for each in self.sets(self.plan.tune_seed)}

    def _rows(self, member: Member, seed: int) -> tuple[list[TrainingSet], dict[str, Any]]:
        """The data sets of a member, and by name the rows that it sees."""
        sets = self.sets(seed)
        percent = 100 - member.percent if member.complement else member.percent
        drawn = draw(sets, percent, (seed, _DRAW, member.draw, round(percent * 100)))
        core = draw(sets, CORE, (seed, _CORE_DRAW))
        own = member.tasks or tuple(each.name for each in sets)
        rows = {}
        for each in sets:
            if each.name in own:
                rows[each.name] = drawn[each.name]
                if member.complement:
                    rows[each.name] = np.setdiff1d(np.arange(len(each)), drawn[each.name])
            elif each.name in member.core:
                rows[each.name] = core[each.name]
        return [each for each in sets if each.name in rows], rows

    def score(self, model: Path, tasks: Sequence[str], split: str = "test") -> dict[str, float]:
        """Main scores in [0, 1] by task."""
        plan = self.plan
        return score(model, tasks, split, plan.suite, plan.out, device=plan.device, progress=plan.progress)

    def calibrate(self) -> dict[str, float]:
        """Seconds of a pair-pass, of a test, of a validation, and of a model besides its steps; measured once."""
        file = self.plan.out / "calibration.json"
        if not file.is_file():
            base, trial = self.base(), self.plan.out / "trial"
            seed, steps = self.plan.tune_seed, 3 * len(self.plan.tasks)
            config = replace(self.config(seed, 1e-6), epochs=None, steps=1)
            self.sets(seed)
            shutil.rmtree(trial, ignore_errors=True)
            seconds = {
                "test": _timed(lambda: self.score(base, self.plan.all_tasks)),
                "validation": _timed(lambda: self.score(base, self.plan.tasks, "validation")),
                "model": _timed(lambda: self._train(config, Member(), seed, trial)),  # opening, saving, hardly a step
            }
            shutil.rmtree(trial)
            longer = replace(config, steps=steps)
            whole = _timed(lambda: self._train(longer, Member(), seed, trial))
            rows = self._train(longer, Member(), seed, trial).rows
            seconds["row"] = max(1e-6, whole - seconds["model"]) / (rows * (steps - 1) / steps)
            shutil.rmtree(trial)
            _write(file, seconds)
        known: dict[str, float] = read(file)
        return known

    def _folder(self, seed: int, rate: float) -> Path:
        return self.plan.out / "models" / f"seed{seed}-lr{rate:g}"

    def _record(self, name: str, seed: int, rate: float) -> Path:
        return self.plan.out / "records" / f"{name}-seed{seed}-lr{rate:g}.json"

    def _drop(self, folder: Path) -> None:
        if not self.plan.keep:
            shutil.rmtree(folder, ignore_errors=True)


def score(
    model: Path, tasks: Sequence[str], split: str, suite: Path, folder: Path, *, device: str, progress: Work
) -> dict[str, float]:
    """A model's main scores in [0, 1] by task, made in an experiment's folder."""
    out = folder / "evaluation"
    shutil.rmtree(out, ignore_errors=True)  # of a run that was killed
    found, _ = evaluation.evaluate(
        [str(model)],
        out,
        names=list(tasks),
        suites=[suite],
        split=split,
        settings=evaluation.Settings(device=device),
        progress=progress,
    )
    evaluation.refuse_failures(found)
    shutil.rmtree(out)  # vectors of models that nobody asks for again
    return {task: float(score) for task, score in next(iter(found["scores"].values())).items()}


def make_suite(source: Path | None, out: Path, wanted: Sequence[str], rows: int, test_rows: int) -> None:
    """A copy of a suite with so many rows at most of each train split, and of each other split; 0: all."""
    if out.exists():
        return
    scratch = out.with_name(f".{out.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    for task in suite.load(source):
        if wanted and task.name not in wanted:
            continue
        files: dict[str, Any] = {}
        for split, tables in task.splits.items():
            limit = rows if split == "train" else test_rows
            names = {}
            for table in tables:
                content = [row for _, row in task.read_table(split, table)]
                if table == "rows" and limit and len(content) > limit:
                    content = random.Random(0).sample(content, limit)
                names[table] = f"{task.name}/{split}.{table}.jsonl.gz"
                (scratch / task.name).mkdir(parents=True, exist_ok=True)
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
                (scratch / names[table]).write_bytes(gzip.compress(lines.encode(), mtime=0))
            files[split] = names.get("rows", names)
        said = {
            **{"type": task.type, "group": task.group, "metric": task.metric, "languages": list(task.languages)},
            **{"files": files, **({"prompt": task.prompt} if task.prompt else {})},
        }
        (scratch / f"{task.name}.yml").write_text(yaml.safe_dump(said, sort_keys=False), encoding="utf-8")
    scratch.rename(out)


def spread(base: Path, members: Sequence[Path], merged: Path) -> dict[str, float]:
    """Mean cosine between the members' task vectors, and the length of the merge's over the mean of theirs."""
    from safetensors import safe_open

    folders = [*members, merged]
    gram = np.zeros((len(folders), len(folders)))
    for name in sorted(file.name for file in base.glob("*.safetensors")):
        files: list[Any] = [safe_open(folder / name, "numpy") for folder in (base, *folders)]
        for key in files[0].keys():  # noqa: SIM118, it is no mapping
            start, *ends = (file.get_tensor(key) for file in files)
            if start.dtype.kind == "f":
                vectors = np.stack([end.ravel() - start.ravel() for end in ends])  # (models, numbers)
                gram += (vectors @ vectors.T).astype(np.float64)
    lengths = np.sqrt(np.diag(gram))
    count = len(members)
    pairs = [(i, j) for i in range(count) for j in range(i) if lengths[i] and lengths[j]]
    cosines = [gram[i, j] / (lengths[i] * lengths[j]) for i, j in pairs]
    of_members = float(lengths[:count].mean())
    return {
        "cosine": float(statistics.fmean(cosines)) if cosines else 0.0,
        "length": float(lengths[count]) / of_members if of_members else 0.0,
    }


def _timed(work: Callable[[], Any]) -> float:
    """Seconds, without those in which the process was stopped."""
    began, used = time.perf_counter(), time.process_time()
    work()
    return min(time.perf_counter() - began, time.process_time() - used)


def read(file: Path) -> Any:
    """A file of JSON."""
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, content: Any) -> None:
    write_whole(file, json.dumps(content, indent=1) + "\n")


def commit() -> str:
    """Of the checkout that these scripts lie in; "-dirty" where it was changed since."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"
