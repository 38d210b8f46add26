"""Settings: what a training run is told, as data; `config` reads it, `config_check` looks its names up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from embeddings.images.settings import ImageSettings
from embeddings.training.data_settings import SIDES, DataSettings, LossSettings
from embeddings.training.model_settings import ModelSettings
from embeddings.training.search_settings import SIZE, SearchSettings


@dataclass(frozen=True)
class MergeSettings:
    """How the members become one: a method of `merging.methods`, and its parameters."""

    method: str = "multislerp"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation during training.

    Attributes:
        suite: its folder; None for the one that ships.
        tasks: their names, at least one; each has the split.
        every: steps.
    """

    suite: str | None
    tasks: tuple[str, ...]
    every: int = 200
    split: str = "validation"


@dataclass(frozen=True)
class TrainingConfig:
    """A training run.

    Attributes:
        data, images: at least one of both; names differ.
        schedule: a name of `embeddings.training.schedule`.
        loss: defaults for all data sets.
        batch_size: rows.
        epochs, steps: one of them is None.
        warmup: share of the steps in [0, 1].
        max_length: tokens by "query" and "document".
        gradient_clip: the norm's bound; 0 for none.
        gradient_cache: tokens a chunk; 0: the whole batch at once.
        bags: a member each: % of each data set in (0, 100], or "complement"; (): one model on everything.
        merge_weights: "size", "equal" or "search".
        search: of the weights; None where they are not searched.
        core: % of the data that is kept for later updates, in [0, 100].
        save_every: steps between checkpoints; 0 for none.
        where: the file's name; `at` has the lines.
        text: the YAML.
    """

    model: ModelSettings
    data: tuple[DataSettings, ...]
    images: tuple[ImageSettings, ...] = ()
    schedule: str = "batch_level"
    loss: LossSettings = field(default_factory=LossSettings)
    batch_size: int = 128
    epochs: float | None = 1.0
    steps: int | None = None
    learning_rate: float = 5e-5
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_length: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 512))
    gradient_clip: float = 1.0
    gradient_cache: int = 0
    seed: int = 0
    bags: tuple[float | str, ...] = ()
    merge: MergeSettings = field(default_factory=MergeSettings)
    merge_weights: str = SIZE
    search: SearchSettings | None = None
    core: float = 40.0
    evaluate: EvaluationSettings | None = None
    save_every: int = 200
    where: str = field(default="configuration", compare=False)
    text: str = field(default="", compare=False, repr=False)
    lines: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def at(self, key: str) -> str:
        """Where the configuration says it: "config.yml:3"; the file where it says nothing."""
        return self.lines.get(key, self.where)

    def plain(self) -> dict[str, Any]:
        """All settings that a result follows from, the defaults too, as JSON knows them; equal for equal runs.

        What came after the first runs were written is absent where nothing is said, so that they are still the same runs.
        """
        found = without_places(asdict(self))
        if found["search"] is None:
            del found["search"]
        else:
            del found["search"]["lines"]
        for data in (*found["data"], *(each["data"] for each in found["images"])):
            del data["column_lines"]
            if data["scale"] is None:
                del data["scale"]
        if not found["images"]:
            del found["images"]
        return {key: value for key, value in found.items() if key not in ("text", "lines")}


def without_places(value: Any) -> Any:
    """Plain settings without the `where` of each."""
    if isinstance(value, Mapping):
        return {key: without_places(item) for key, item in value.items() if key != "where"}
    return [without_places(item) for item in value] if isinstance(value, list | tuple) else value
