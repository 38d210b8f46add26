"""The core set: rows that a run keeps, complete in themselves, for the updates of its model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from embeddings.training.config import TrainingConfig
from embeddings.training.data import TrainingSet, write_rows
from embeddings.training.draws import Rows, draw_core
from embeddings.training.image_sets import ImageTable, write_image_rows
from embeddings.training.train import ROWS, write_row_numbers

DATA_FILE = "data.yml"


def keep_core(config: TrainingConfig, sets: Sequence[TrainingSet], folder: Path, *, force: bool = False) -> None:
    """Writes the core set: `config.core` percent of each data set, complete in themselves."""
    if not config.core or ((folder / DATA_FILE).is_file() and not force):
        return
    write_core(sets, draw_core(config, sets), folder)


def write_core(sets: Sequence[TrainingSet], rows: Rows, folder: Path) -> None:
    """Writes rows as tables, data.yml, which comes last, and rows.npz."""
    (folder / DATA_FILE).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_row_numbers(folder / ROWS, rows)
    texts = [each for each in sets if not isinstance(each.query_tokens, ImageTable)]
    images = [each for each in sets if isinstance(each.query_tokens, ImageTable)]
    write_rows(texts, rows, folder, write_image_rows(images, rows, folder))
