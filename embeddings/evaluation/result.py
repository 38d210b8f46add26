"""Result: one model's score on one task, what it was computed from, and all that is needed to get it again; a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embeddings.evaluation.bootstrap import Examples
from merging.checkpoint import read_json
from merging.errors import CuveeError
from merging.output import write_whole

_DIGITS = 8  # of what is kept an example; more than float32 knows


@dataclass(frozen=True)
class Part:
    """The score of one split and language of a task.

    Attributes:
        subset: mteb's name of the language or configuration, "default" where there is but one.
        score: the task's main score, as mteb gives it, mostly in [0, 1].
    """

    split: str
    subset: str
    score: float


@dataclass(frozen=True)
class Result:
    """One model's score on one task.

    Attributes:
        model: its label, unique in a run.
        type: mteb's: "Retrieval", "STS" …
        group: "in-domain", "out-of-domain", or the benchmark the task came with.
        metric: mteb's name of the main score.
        dataset: {"path", "revision"}.
        parts: whose mean is the score.
        examples: what the bootstrap draws from; empty where the score cannot be told apart into examples.
        made_by: digests, prompts, seed, versions and settings that the score follows from.
    """

    model: str
    task: str
    type: str
    group: str
    metric: str
    dataset: Mapping[str, str]
    parts: tuple[Part, ...]
    examples: tuple[Examples, ...] = ()
    made_by: Mapping[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> float:
        return sum(part.score for part in self.parts) / len(self.parts)

    def save(self, file: Path) -> None:
        """Writes the file whole or not at all."""
        content = {
            **{name: getattr(self, name) for name in ("model", "task", "type", "group", "metric", "dataset")},
            "score": self.score,
            "parts": [vars(part) for part in self.parts],
            "made_by": self.made_by,
            "examples": [_plain(examples) for examples in self.examples],
        }
        write_whole(file, json.dumps(content) + "\n")

    @classmethod
    def load(cls, file: Path) -> Result:
        """Reads what `save` wrote.

        Raises:
            CuveeError: it is no such file.
        """
        content = read_json(file)
        try:
            return cls(
                **{name: str(content[name]) for name in ("model", "task", "type", "group", "metric")},
                dataset=dict(content["dataset"]),
                parts=tuple(Part(**part) for part in content["parts"]),
                examples=tuple(_examples(part) for part in content["examples"]),
                made_by=dict(content["made_by"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CuveeError("is no result of `cuvee evaluate`", where=str(file), mend="remove it") from error


def _plain(examples: Examples) -> dict[str, Any]:
    columns = {
        name: (column.round(_DIGITS) if column.dtype.kind == "f" else column).tolist()
        for name, column in examples.columns.items()
    }
    return {"part": examples.part, "statistic": examples.statistic, "ids": examples.ids, "columns": columns}


def _examples(content: Mapping[str, Any]) -> Examples:
    columns = {name: np.asarray(column) for name, column in content["columns"].items()}
    if any(len(column) != len(content["ids"]) for column in columns.values()):
        raise ValueError("columns of different length")
    return Examples(str(content["statistic"]), tuple(map(str, content["ids"])), columns, str(content["part"]))
