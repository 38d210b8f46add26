"""ImageSettings: a data set of images and their texts, as an entry of `images:` names it.

    images:
      - file: emoji.jsonl          # JSONL, CSV, TSV or Parquet; `image` is a path from the file's folder, and stays in it
        columns: {image: file_name, text: caption, query: question}
        skip_broken: true          # leave out what is no image, and say how many; else it is a mistake
        limit: 10000               # weight, batch_size, loss, name: as of a data set of texts
      - {hub: owner/name, subset: default, split: train}    # its images are kept as files in the run's data/

A row is an image, a `text` that belongs to it, and, where there is one, a `query` that stands behind the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from embeddings.training.data_settings import DataSettings, data_list, refuse_twins
from merging.errors import CuveeError
from merging.fields import flag, given, mapping, text
from merging.node import Node
from merging.setting import refuse_unknown_keys

COLUMNS = ("image", "text", "query")
_KEYS = ("file", "hub", "subset", "split", "revision", "name", "weight", "limit", "batch_size", "loss")
_OWN = ("columns", "skip_broken")


@dataclass(frozen=True)
class ImageSettings:
    """One data set of images and texts.

    Attributes:
        data: where it comes from, and its name, weight, limit, batch size and loss.
        columns: what the source calls a column, by our name.
    """

    data: DataSettings
    columns: Mapping[str, str] = field(default_factory=dict)
    skip_broken: bool = False


def of_both(data: Sequence[DataSettings], images: Sequence[ImageSettings]) -> tuple[DataSettings, ...]:
    """The data sets of texts and those of images, as such."""
    return (*data, *(each.data for each in images))


def image_settings(root: Node, near: Path) -> tuple[ImageSettings, ...]:
    """What `images:` lists; () where it is absent.

    Raises:
        CuveeError: at the line of the first mistake.
    """
    images = given(root, "images")
    if images is None:
        return ()
    entries = images.value if isinstance(images.value, list) else [images]
    found = tuple(_entry(entry, near) for entry in entries)
    refuse_twins([each.data for each in found])
    return found


def _entry(node: Node, near: Path) -> ImageSettings:
    if not isinstance(node.value, dict):
        mend = "write '- file: images.jsonl', or '- hub: NAME'"
        raise CuveeError(f"a data set of images must be a mapping, not {node}", where=node.where, mend=mend)
    refuse_unknown_keys(node, (*_KEYS, *_OWN), "a data set of images")
    plain = Node({key: item for key, item in node.value.items() if key in _KEYS}, node.where)
    (data,) = data_list(Node([plain], node.where), near)
    columns = mapping(node, "columns", "{text: caption}")
    if columns is not None:
        refuse_unknown_keys(columns, COLUMNS, "the columns of images")
    renamed = {} if columns is None else {name: text(columns, name, None) for name in columns.value}
    named = {name: column for name, column in renamed.items() if column is not None}
    return ImageSettings(data, named, flag(node, "skip_broken", False))
