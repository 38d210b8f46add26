"""ImageReader: images as vision–language models of Qwen2-VL's shape read them: patches, tokens for them, positions.

An image is `[vision start][image token × n][vision end]` before its text; n is its patches over the square of the merge.
Needs Pillow; torchvision is not needed, which transformers' own processor of Qwen2-VL cannot be made without.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merging.errors import CuveeError
from merging.loading import only_our_words
from merging.statistics.images import opened

#: Files that a vision–language model's folder has beside its tokenizer's.
PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)
_NEEDED = PROCESSOR_FILES[:2]
_KEPT = 256 << 20  # bytes of patches in memory: a small data set's are made once
_TOKENS = ("image_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True)
class Picture:
    """One image as the model reads it.

    Attributes:
        pixels: (patches, values) float32, as the processor normalises them; the patches of one token are neighbours.
        grid: its extent in time, height and width, in patches.
    """

    pixels: NDArray[np.float32]
    grid: tuple[int, int, int]


class ImageReader:
    """Reads images as a model wants them.

    Attributes:
        tokenizer: of the same model.
        base: the model, for errors.
        image_id, start_id, end_id: of the image token, and of what stands before and behind an image.
        merge: patches of a token are merge × merge.
    """

    def __init__(self, tokenizer: Any, config: Mapping[str, Any], files: Mapping[str, bytes], base: str) -> None:
        self.tokenizer, self.base = tokenizer, base
        self.image_id, self.start_id, self.end_id = (int(config[name]) for name in _TOKENS)
        self.merge = int(config["vision_config"]["spatial_merge_size"])
        self._files = files
        self._kept: dict[Path, Picture] = {}
        self._free, self._lock = _KEPT, threading.Lock()

    @property
    def marks(self) -> frozenset[int]:
        """The ids that stand for an image: no text may have them."""
        return frozenset((self.start_id, self.image_id, self.end_id))

    @cached_property
    def image_processor(self) -> Any:
        """transformers', loaded when the first image is read: texts need neither it nor Pillow.

        Raises:
            CuveeError: Pillow is missing, or there is no such processor.
        """
        import transformers

        try:
            import PIL  # noqa: F401
        except ImportError:
            mend = "pip install 'cuvee[images]'"
            raise CuveeError("images are read by Pillow, which is not installed", where=self.base, mend=mend) from None
        with tempfile.TemporaryDirectory(prefix="cuvee-images-") as folder, only_our_words():
            for name, content in self._files.items():
                Path(folder, name).write_bytes(content)
            try:
                # by Pillow even where torchvision is: the pixels do not depend on what else is installed
                return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
            except (ImportError, OSError, ValueError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
                what = f"its image processor cannot be loaded ({reason})"
                raise CuveeError(what, where=self.base) from error

    def read(self, file: Path) -> Picture:
        """The image of a file.

        Raises:
            CuveeError: Pillow is not installed, or it can make nothing of the file.
        """
        found = self._kept.get(file)
        if found is None:
            found = self.picture(opened(file), str(file))
            with self._lock:
                if found.pixels.nbytes <= self._free:
                    self._free -= found.pixels.nbytes
                    self._kept[file] = found
        return found

    def picture(self, image: Any, where: str = "image") -> Picture:
        """Of an image that is open already.

        Args:
            image: Pillow's, RGB.

        Raises:
            CuveeError: the processor refuses it: it is 200 times as wide as it is high, say.
        """
        try:
            made = self.image_processor(images=[image], return_tensors="np")
        except ValueError as wrong:
            raise _refused(wrong, where) from None
        pixels = np.ascontiguousarray(made["pixel_values"], np.float32)
        time, height, width = map(int, made["image_grid_thw"][0])
        return Picture(pixels, (time, height, width))

    def tokens(self, picture: Picture) -> int:
        """How many image tokens stand for it."""
        return len(picture.pixels) // self.merge**2

    def tokens_of_size(self, width: int, height: int, where: str) -> int:
        """As `tokens`, of an image of so many pixels, before there is a picture of it.

        Raises:
            CuveeError: as `picture`.
        """
        try:
            return int(self.image_processor.get_number_of_image_patches(height, width)) // self.merge**2
        except ValueError as wrong:
            raise _refused(wrong, where) from None

    def ids(self, tokens: int) -> NDArray[np.int64]:
        """(tokens + 2,): what stands for an image of so many tokens in a text."""
        return np.asarray([self.start_id, *[self.image_id] * tokens, self.end_id], np.int64)

    def save_pretrained(self, folder: Path) -> None:
        """Writes the tokenizer, and the files of the processor that the model came with."""
        self.tokenizer.save_pretrained(folder)
        self.save_processor(folder)

    def save_processor(self, folder: Path) -> None:
        """Writes the files of the processor that the model came with."""
        for name, content in self._files.items():
            if name in PROCESSOR_FILES:
                (folder / name).write_bytes(content)


def image_reader(folder: Path, config: Mapping[str, Any], tokenizer: Any, base: str) -> ImageReader | None:
    """The reader of a model's images; None where it reads texts alone, or its images in a way that is not known here.

    Args:
        config: the model's config.json.
        base: the model, for errors.
    """
    vision = config.get("vision_config")
    if (
        not isinstance(vision, Mapping)
        or "spatial_merge_size" not in vision
        or any(key not in config for key in _TOKENS)
    ):
        return None
    if not any((folder / name).is_file() for name in _NEEDED):
        return None
    names = [name for name in (*PROCESSOR_FILES, "config.json") if (folder / name).is_file()]
    return ImageReader(tokenizer, config, {name: (folder / name).read_bytes() for name in names}, base)


def no_images(where: str) -> CuveeError:
    """What is told where a model that reads texts alone is given images."""
    mend = "take a vision–language model of Qwen2-VL's shape with its preprocessor_config.json"
    return CuveeError("the model reads texts alone", where=where, mend=mend)


def _refused(wrong: ValueError, where: str) -> CuveeError:
    return CuveeError(f"the model cannot read it: {wrong!s:.120}", where=where)


def positions(
    ids: NDArray[np.int64], real: NDArray[np.bool_], grids: NDArray[np.int64], *, image_id: int, merge: int
) -> NDArray[np.int64]:
    """Places in time, height and width, as `get_rope_index` of Qwen2-VL and Qwen2.5-VL gives them for images.

    A text token's three are the same; an image's tokens count from where the text before it ends, and the text behind it
    goes on after the longer of its sides. Padding, on whichever side, has 0.

    Args:
        ids: (rows, tokens)
        real: (rows, tokens): false for padding.
        grids: (images, 3), in the order of the rows.
        image_id: of the image token.
        merge: patches of a token are merge × merge.

    Returns:
        (3, rows, tokens).

    Source: arXiv 2409.12191, section 2.1 (M-RoPE).
    """
    found = np.zeros((3, *ids.shape), np.int64)
    images = iter(grids)
    for row in range(len(ids)):
        own = real[row]
        found[:, row, own] = _positions_of(ids[row, own] == image_id, images, merge)
    assert next(images, None) is None, "more images than rows have places for"
    return found


def _positions_of(is_image: NDArray[np.bool_], images: Iterator[NDArray[np.int64]], merge: int) -> NDArray[np.int64]:
    """(3, tokens) of one sequence without padding."""
    found = np.empty((3, len(is_image)), np.int64)
    token = start = 0
    while token < len(is_image):
        if not is_image[token]:
            end = token + int(np.argmax(is_image[token:])) if is_image[token:].any() else len(is_image)
            found[:, token:end] = start + np.arange(end - token)
            start += end - token
        else:
            time, height, width = (int(side) for side in next(images))
            height, width = height // merge, width // merge
            end = token + time * height * width
            found[:, token:end] = start + np.indices((time, height, width)).reshape(3, -1)
            start += max(height, width)
        token = end
    return found
