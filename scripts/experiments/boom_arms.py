"""What the experiment on BOOM compares: arms of members, strategies of updates, and what each of them costs. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

CORE = 40.0  # % of old data that updates and replay see again
SCHEDULES = ("dataset_sequential", "task_sequential", "two_stage", "mixed", "mgs")

MERGES: dict[str, tuple[str, bool]] = {  # name here: (method, whether it is given the base)
    "multislerp": ("multislerp", False),
    "multislerp-task-vectors": ("multislerp", True),
    "linear": ("linear", False),
    "karcher": ("karcher", False),
    "ties": ("ties", True),
    "model_stock": ("model_stock", True),
}


@dataclass(frozen=True)
class Member:
    """One model to train from the base. Equal members are trained once for all the arms that have them.

    Attributes:
        percent: of each data set, without replacement.
        draw: tells draws of the same percent apart, and seeds of the same data.
        complement: the rows that the draw of 100 − percent left out.
        epochs: over its rows.
        tasks: the data sets; (): all.
        core: data sets of which it sees the core set only, besides `tasks`.
    """

    percent: float = 100
    draw: int = 0
    complement: bool = False
    schedule: str = "batch_level"
    epochs: float = 1
    tasks: tuple[str, ...] = ()
    core: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A folder's."""
        parts = [f"{self.percent:g}{'c' if self.complement else ''}-{self.draw}", self.schedule]
        parts += [f"{self.epochs:g}-epochs"] if self.epochs != 1 else []
        parts += ["+".join(self.tasks)] if self.tasks else []
        return "-".join([*parts, *([f"core-{'+'.join(self.core)}"] if self.core else [])])

    def rows(self, sizes: Mapping[str, int]) -> float:
        """Pair-passes, but for the tails of data sets that fill no batch."""
        seen = sum(sizes[task] for task in self.tasks or sizes) * self.percent / 100
        return self.epochs * (seen + sum(sizes[task] for task in self.core) * CORE / 100)


@dataclass(frozen=True)
class Arm:
    """Something to compare: no member is the base itself, several are merged, weighted by their rows."""

    name: str
    title: str
    members: tuple[Member, ...]
    merge: str = "multislerp"

    def rows(self, sizes: Mapping[str, int]) -> float:
        return sum(member.rows(sizes) for member in self.members)


@dataclass(frozen=True)
class Strategy:
    """A way to take in new data."""

    name: str
    title: str


FIRST = Strategy("first", "after round 1, for comparison")
STRATEGIES = {
    each.name: each
    for each in (
        Strategy("update", "`cuvee update`: new + core from the base, merged in"),
        Strategy("retrain", "full retraining from the base"),
        Strategy("new-only", "fine-tuning on new data only"),
        Strategy("replay", "fine-tuning on new data + core"),
    )
}


def static_arms(tasks: Sequence[str], merges: Sequence[str] = ("multislerp",)) -> dict[str, Arm]:
    """By name. Arms that merge come once for each way to merge; but for multislerp they are named arm@merge."""
    full = Member()

    def bag(*percents: int) -> tuple[Member, ...]:
        return tuple(Member(each, draw=percents[:number].count(each)) for number, each in enumerate(percents))

    def soup(size: int) -> tuple[Member, ...]:
        return tuple(Member(draw=draw) for draw in range(size))

    half = (Member(50), Member(50, complement=True))
    single = [
        Arm("zero-shot", "the base", ()),
        Arm("full", "batch-level shuffling, 1 epoch", (full,)),
        Arm("full-1.8", "batch-level shuffling, 1.8 epochs", (replace(full, epochs=1.8),)),
        Arm("full-3", "batch-level shuffling, 3 epochs", (replace(full, epochs=3),)),
    ]
    merged = [
        Arm("boom-20-40-60-80-100", "BOOM {20, 40, 60, 80, 100}", bag(20, 40, 60, 80, 100)),
        Arm("boom-40-60-80-100", "BOOM {40, 60, 80, 100}", bag(40, 60, 80, 100)),
        Arm("boom-80-100", "BOOM {80, 100}", bag(80, 100)),
        Arm("boom-60-60-60", "BOOM {60, 60, 60}", bag(60, 60, 60)),
        Arm("boom-50-complement", "BOOM {50, complement}", half),
        Arm("soup-2", "soup of 2, same data", soup(2)),
        Arm("soup-3", "soup of 3, same data", soup(3)),
        Arm("per-task", "a member for each data set, merged", tuple(Member(tasks=(task,)) for task in tasks)),
    ]
    rivals = [Arm(name, f"schedule {name}", (replace(full, schedule=name),)) for name in SCHEDULES]
    others = [
        replace(arm, name=f"{arm.name}@{merge}", title=f"{arm.title}, {merge}", merge=merge)
        for merge in merges
        for arm in merged
        if merge != arm.merge
    ]
    merged = merged if "multislerp" in merges else []
    return {arm.name: arm for arm in (*single, *merged, *rivals, *others)}


def chosen(names: Sequence[str], arms: Mapping[str, Arm]) -> tuple[list[Arm], list[Strategy]]:
    """What `--arms` names: arms, strategies, "static" or "updates" for all of either; each once, in our order.

    Raises:
        ValueError: one is unknown.
    """
    known = [*arms, *STRATEGIES]
    wanted: set[str] = set()
    for name in names:
        if name not in ("static", "updates", *known):
            raise ValueError(f"no arm '{name}'; known: static, updates, {', '.join(known)}")
        wanted |= set(arms) if name == "static" else set(STRATEGIES) if name == "updates" else {name}
    static = [arm for arm in arms.values() if arm.name in wanted]
    return static, [strategy for strategy in STRATEGIES.values() if strategy.name in wanted]


def rounds_of(tasks: Sequence[str], given: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Three rounds of tasks: what `--rounds` says ("word,phenotype" "code" …), else thirds in the order of the tasks.

    Raises:
        ValueError: not three, or they are not the tasks, each once.
    """
    if given:
        rounds = [tuple(filter(None, text.split(","))) for text in given]
    elif set(tasks) == {"word", "phenotype", "code", "intent", "sentiment"}:
        rounds = [("word", "phenotype"), ("code",), ("intent", "sentiment")]
    else:
        cuts = [round(len(tasks) * third / 3) for third in range(4)]
        rounds = [tuple(tasks[begin:end]) for begin, end in pairwise(cuts)]
    if len(rounds) != 3 or not all(rounds) or sorted(task for each in rounds for task in each) != sorted(tasks):
        raise ValueError(f"--rounds must be three groups of {', '.join(tasks)}, each of them once")
    return rounds


def member_of_round(strategy: str, number: int, rounds: Sequence[tuple[str, ...]]) -> Member:
    """What a strategy trains in a round, counted from 0; from the base or from the model before is its own affair."""
    before = tuple(task for each in rounds[:number] for task in each)
    new = rounds[number]
    if strategy == "retrain" or not number:
        return Member(tasks=(*before, *new))
    return Member(tasks=new, core=before if strategy in ("update", "replay") else ())


def training_rows(
    arms: Iterable[Arm], strategies: Sequence[Strategy], rounds: Sequence[tuple[str, ...]], sizes: Mapping[str, int]
) -> tuple[float, float, int]:
    """Pair-passes of one seed and one learning rate: if arms share members, if none does; and the models to train."""
    arms = list(arms)
    apart = sum(arm.rows(sizes) for arm in arms)
    members = {member for arm in arms for member in arm.members}
    shared = sum(member.rows(sizes) for member in members)
    if not strategies:
        return shared, apart, len(members)
    later = [member_of_round(strategy.name, number, rounds) for strategy in strategies for number in (1, 2)]
    updates = sum(member.rows(sizes) for member in (member_of_round("first", 0, rounds), *later))
    return shared + updates, apart + updates, len(members) + 1 + len(later)
