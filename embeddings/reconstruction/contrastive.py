"""The contrastive stage after a pre-training: checked before anything is trained, and then a run of `cuvee train`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from embeddings.images.reader import ImageReader
from embeddings.images.rows import read_images
from embeddings.images.settings import ImageSettings
from embeddings.reconstruction.config import PretrainingConfig
from embeddings.training.batch import objectives
from embeddings.training.config import TrainingConfig
from embeddings.training.data import TrainingSet
from embeddings.training.data_settings import DataSettings
from embeddings.training.member_merge import refuse_recipe
from embeddings.training.options import Options
from embeddings.training.rows import examples
from embeddings.training.run_folder import check_claim
from merging.errors import CuveeError
from merging.output import write_whole
from merging.progress import Work

CARD = "README.md"


def check_contrastive(
    config: PretrainingConfig,
    sets: Sequence[TrainingSet],
    images: ImageReader | None,
    model: Path,
    run: Path,
    *,
    force: bool,
) -> None:
    """Finds now what would else be found when the pre-training is done.

    Args:
        sets: of the pre-training.
        images: reads those of the model.
        model: that will be trained.
        run: the stage's folder.

    Raises:
        CuveeError: a setting that cannot be, a row that is wrong, or a folder that holds another training.
    """
    after = config.contrastive_of(model)
    if after is None:
        return
    if after.model.lora is not None and find_spec("peft") is None:
        raise CuveeError("LoRA needs peft", where=after.where, mend="pip install 'cuvee[lora]'")
    refuse_recipe(after, run)
    if not force:
        check_claim(run, "train", after, force=False)
    with TemporaryDirectory(prefix="cuvee-images-") as scratch:
        others = [own for own in after.images if not _is_among(own, config.images)]
        read_images(others, images, Path(scratch), after.seed, lambda what, done, total: None)
    for own in after.data:
        found = next((each for each in sets if _source(each.settings) == _source(own)), None)
        if found is not None:
            objectives(after, [replace(found, settings=own)])
            continue
        for _ in examples(own):
            pass


def train_contrastive(
    config: PretrainingConfig, model: Path, run: Path, *, options: Options, progress: Work, note: Callable[[str], None]
) -> dict[str, Any] | None:
    """Trains the pre-trained model; None where the configuration says nothing of it.

    Returns:
        What `cuvee train --json` prints.
    """
    after: TrainingConfig | None = config.contrastive_of(model)
    if after is None:
        return None
    from embeddings.training.bag import train_run

    done = train_run(after, run, options=options, progress=progress, note=note)
    card = model / CARD
    if "model" in done and card.is_file():  # it attends as the model does that it was trained from
        write_whole(Path(done["model"]) / CARD, card.read_text(encoding="utf-8"))
    return done


def _is_among(own: ImageSettings, others: Sequence[ImageSettings]) -> bool:
    return any(replace(own, data=_source(own.data)) == replace(each, data=_source(each.data)) for each in others)


def _source(data: DataSettings) -> DataSettings:
    """What its rows follow from, whatever they are trained with; of a hub data set whichever revision it was."""
    return replace(data, loss=None, mine=None, revision=None if data.hub is not None else data.revision)
