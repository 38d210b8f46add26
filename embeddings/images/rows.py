"""Images and their texts, read once: each image is opened, each mistake told at its row, and what is left is kept.

What was read lies in a cache; it is read anew where an image that was read has changed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from embeddings.images.reader import ImageReader, no_images
from embeddings.images.settings import ImageSettings
from embeddings.training import hub_data
from embeddings.training.data_settings import DataSettings
from embeddings.training.hub_data import HubRevisions
from embeddings.training.rows import limited
from embeddings.training.source_digests import FileDigests, source_digest
from merging.errors import CuveeError
from merging.output import staged
from merging.progress import Work
from merging.statistics.images import opened
from merging.tables import raw_rows

_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "image_path", "img", "file_name"),
    "text": ("text", "caption", "positive", "label"),
    "query": ("query", "question", "anchor"),
}
_MARKER = "images.json"
_FORM = 4  # of what is kept: raise it when the same source would give other rows


@dataclass(frozen=True)
class ImageSet:
    """A data set of images that was read.

    Attributes:
        digest: of images and texts in their order.
        rows: of each the image, its text and its query, which may be empty.
        sizes: width and height by image, in pixels.
        notes: on what was left out, one line each.
    """

    settings: DataSettings
    digest: str
    rows: Sequence[tuple[Path, str, str]]
    sizes: Mapping[Path, tuple[int, int]]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.settings.name

    def kept(self, keep: Sequence[bool], what: str) -> ImageSet:
        """Without the rows that are not to be kept; a note says how many.

        Args:
            what: the others have, for the note.

        Raises:
            CuveeError: there are none to keep.
        """
        if all(keep):
            return self
        if not any(keep):
            raise CuveeError(f"all texts of the data set '{self.name}' have {what}", where=self.settings.where)
        first = self.rows[keep.index(False)][0].name
        note = f"{self.name}: {keep.count(False)} of {len(keep)} texts have {what}, and are left out, first that of {first}"
        return replace(
            self, rows=[row for row, kept in zip(self.rows, keep, strict=True) if kept], notes=(*self.notes, note)
        )


def read_images(
    settings: Sequence[ImageSettings],
    reader: ImageReader | None,
    cache: Path,
    seed: int,
    progress: Work,
    *,
    fresh: bool = False,
) -> list[ImageSet]:
    """The data sets of images, each image opened once, from the cache or from their sources.

    Images that are the same byte for byte are one file, whatever their names: what is told of one is told of all.

    Args:
        reader: of the model's images.
        cache: a folder; read anew where an image that was read has changed.
        fresh: read what the hub has now.

    Raises:
        CuveeError: at file and row, for one that is wrong; Pillow is not installed; the model reads no images.
    """
    if not settings:
        return []
    if reader is None:
        raise no_images(settings[0].data.where)
    files, revisions = FileDigests(cache / "files.json"), HubRevisions(cache / "hub.json", fresh=fresh)
    found = []
    for entry in settings:
        data, notes = revisions.pinned(entry.data)
        entry = replace(entry, data=data)
        folder = cache / _key(entry, files, seed)
        files.save()
        told = _known(folder)
        if told is None:
            with staged(folder, force=True, marker=_MARKER) as staging:
                _write(entry, reader, staging, seed, progress)
            told = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        rows = [(folder / image, caption, query) for image, caption, query in told["rows"]]
        sizes = {folder / image: (width, height) for image, (width, height) in told["sizes"].items()}
        found.append(ImageSet(data, told["digest"], rows, sizes, (*told["notes"], *notes)))
    return found


def _known(folder: Path) -> dict[str, Any] | None:
    """What was read before; None where there is nothing, or an image of it is not what it was."""
    if not (folder / _MARKER).is_file():
        return None
    told: dict[str, Any] = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    return told if all(_stamp(Path(file)) == stamp for file, stamp in told["stamps"].items()) else None


def _stamp(file: Path) -> list[int]:
    """By which a change of the file is seen; of one that is not there too."""
    try:
        stat = file.stat()
    except (OSError, ValueError):
        return []
    return [stat.st_size, stat.st_mtime_ns]


def _key(entry: ImageSettings, files: FileDigests, seed: int) -> str:
    data = entry.data
    source = [source_digest(data, files), list(data.files)]  # an image's path begins at its table
    drawn = None if data.limit is None else [data.limit, seed]
    content = ["images", _FORM, source, dict(entry.columns), entry.skip_broken, drawn]
    return str(xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode()))


def _write(entry: ImageSettings, reader: ImageReader, staging: Path, seed: int, progress: Work) -> None:
    """Reads a source to the end, a row at a time; what comes from a hub is kept as files."""
    name = entry.data.name
    digest, rows, sizes, broken, stamps = xxhash.xxh3_128(), [], {}, [], {}
    first: dict[bytes, str] = {}  # the file of each image by its digest
    count = 0
    for number, (where, near, raw) in enumerate(limited(partial(_raw, entry.data), entry.data.limit, seed)):
        count += 1
        progress(f"read {name}", number, 0)
        caption, query = _text(entry, raw, "text", where), _text(entry, raw, "query", where)
        image = _value(entry, raw, "image", where)
        if near and isinstance(image, str):
            stamps[str(near / image)] = _stamp(near / image)
        try:
            file, content = _image(image, near, where) if near else (Path(), _bytes_of_hub(image, entry.data, where))
            if content is not None:  # of a hub: under a name of our own
                file = staging / f"{number}.image"
                file.write_bytes(content)
            width, height = opened(file).size
            reader.tokens_of_size(width, height, str(file))  # the model may refuse it
        except CuveeError as error:
            if not entry.skip_broken or "Pillow" in error.what:
                mend = error.mend or "mend or remove the row, or say 'skip_broken: true'"
                raise CuveeError(error.what, where=where, mend=mend) from None
            broken.append(f"{where}: {error.what}")
            continue
        own = xxhash.xxh3_128_digest(file.read_bytes() if content is None else content)
        digest.update(own + json.dumps([caption, query]).encode())
        path = str(file) if content is None else file.name
        sizes[first.setdefault(own, path)] = [width, height]
        rows.append([first[own], caption, query])
        if content is not None and first[own] != path:
            file.unlink()
    progress(f"read {name}", count, count)
    if not rows:
        raise CuveeError(f"the data set '{name}' holds no image that can be read", where=entry.data.where)
    left_out = f"{name}: {len(broken)} of {count} images cannot be read and are left out, first "
    notes = [left_out + broken[0]] if broken else []
    told = {"digest": f"xxh3:{digest.hexdigest()}", "rows": rows, "sizes": sizes, "notes": notes, "stamps": stamps}
    (staging / _MARKER).write_text(json.dumps(told), encoding="utf-8")


def _raw(data: DataSettings) -> Iterator[tuple[str, Path | None, Mapping[str, Any]]]:
    """Each row with its place and the folder that its image is in."""
    if data.hub is not None:
        for where, raw in hub_data.rows(data, decoded=False):
            yield where, None, raw
        return
    for name in data.files:
        for line, raw in raw_rows(Path(name)):
            yield f"{name}:{line}", Path(name).parent, raw


def _image(value: Any, near: Path, where: str) -> tuple[Path, bytes | None]:
    """The file of a table's image, or the bytes that the table holds.

    Raises:
        CuveeError: it is neither, missing, or outside its folder.
    """
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return Path(), value["bytes"]
    if not isinstance(value, str) or not value or "\0" in value:
        raise CuveeError(f"'image' must be a path, not {value!r:.60}", where=where)
    try:
        file, root = (near / value).resolve(), near.resolve()
        there = file.is_file()
    except (OSError, RuntimeError):  # a name that is too long, links in a circle
        raise CuveeError(f"there is no image '{value:.80}'", where=where) from None
    if not file.is_relative_to(root):
        raise CuveeError(f"the image '{value:.80}' is not in the folder of its table", where=where)
    if not there:
        raise CuveeError(f"there is no image '{value:.80}'", where=where)
    return file, None


def _bytes_of_hub(value: Any, data: DataSettings, where: str) -> bytes:
    """An image of a data set of `datasets`, which holds it or names a file of its own.

    Raises:
        CuveeError: it is no image, or a file that is neither the data set's nor in the cache of `datasets`.
    """
    if hasattr(value, "save"):  # Pillow's own
        content = io.BytesIO()
        value.save(content, format="PNG")
        return content.getvalue()
    known = value if isinstance(value, Mapping) else {}
    if isinstance(known.get("bytes"), bytes):
        return bytes(known["bytes"])
    path = known.get("path")
    if not isinstance(path, str) or not Path(path).is_file():
        raise CuveeError(f"'image' must be an image, not {value!r:.60}", where=where)
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    roots = (str(data.hub), config.HF_DATASETS_CACHE, HF_HUB_CACHE)
    if not any(Path(path).resolve().is_relative_to(Path(root).resolve()) for root in roots):
        raise CuveeError(f"the image '{path}' is not in the folder of its data set", where=where)
    return Path(path).read_bytes()


def _value(entry: ImageSettings, raw: Mapping[str, Any], name: str, where: str) -> Any:
    """A column by its own name or a usual spelling of it; None for a query that is not there."""
    spellings = (entry.columns[name],) if name in entry.columns else _SPELLINGS[name]
    key = next((each for each in spellings if raw.get(each) is not None), None)
    if key is not None:
        return raw[key]
    if name == "query":
        return None
    has = ", ".join(f"'{each}'" for each in raw)
    mend = f"it has {has}: name one by 'columns: {{{name}: …}}'"
    raise CuveeError(f"has no '{spellings[0]}'", where=where, mend=mend)


def _text(entry: ImageSettings, raw: Mapping[str, Any], name: str, where: str) -> str:
    value = _value(entry, raw, name, where)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CuveeError(f"'{name}' must be text, not {value!r:.60}", where=where)
    if not value.strip():
        raise CuveeError(f"'{name}' is empty", where=where, mend="remove the row")
    return value
