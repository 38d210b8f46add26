"""Images beside texts, for models that read both: opened by Pillow, joined with the text by the model's own processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from merging.errors import CuveeError
from merging.statistics.tokens import Tokens

_NEEDS = "pip install pillow torchvision"
_ORIENTATION = 0x0112
#: What makes an image upright by its EXIF orientation: a number of Pillow's Image.Transpose.
_UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def reader(folder: Path, *, trusted: bool) -> Any:
    """The processor of a model that reads images too, else its tokenizer.

    A processor that cannot be loaded here is no reason not to read texts.
    """
    import transformers

    options = {"local_files_only": True, "trust_remote_code": trusted}
    if any((folder / name).is_file() for name in _PROCESSOR_FILES):
        try:
            return transformers.AutoProcessor.from_pretrained(str(folder), **options)
        except (ImportError, OSError, ValueError, AttributeError):  # torchvision or Pillow are not here
            pass
    return transformers.AutoTokenizer.from_pretrained(str(folder), **options)


def opened(file: Path) -> Any:
    """The image in RGB, on white where it is transparent, and upright: a camera's picture lies on its side, and says so.

    Raises:
        CuveeError: Pillow is not installed, or it can make nothing of the file.
    """
    try:
        from PIL import Image
    except ImportError:
        mend = "pip install 'cuvee[images]'"
        raise CuveeError("images are read by Pillow, which is not installed", where=str(file), mend=mend) from None
    try:
        with Image.open(file) as image:
            found = image
            if "A" in image.getbands() or "transparency" in image.info:  # on white, as transformers' processors have it
                above = image.convert("RGBA")
                found = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
            found = found.convert("RGB")
            how = image.getexif().get(_ORIENTATION)  # of what was read: Pillow itself turns some formats
            # Not by ImageOps.exif_transpose, which writes the EXIF anew and stumbles over what is wrong elsewhere in it.
            return found.transpose(_UPRIGHT[how]) if how in _UPRIGHT else found
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CuveeError(f"is no image that can be read: {str(error)[:120]}", where=str(file)) from None


def processed(processor: Any, pixels: Any, text: str) -> Mapping[str, Any]:
    """What a processor makes of an image and its text: by its chat template, or with its own mark of an image.

    Raises:
        CuveeError: it is a tokenizer only.
    """
    if not hasattr(processor, "image_processor"):
        raise CuveeError(
            "has no processor of images, or none that can be loaded here", where=type(processor).__name__, mend=_NEEDS
        )
    content = [{"type": "image"}, {"type": "text", "text": text}]
    if getattr(processor, "chat_template", None):
        text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    else:
        text = f"{processor.image_token}{text}"
    found: Mapping[str, Any] = processor(text=[text], images=[pixels], return_tensors="pt")
    return found


def tokens(found: Mapping[str, Any]) -> Tokens:
    """Of one text: what has an entry for each token apart from what has not."""
    import torch

    tensors = {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
    shape = tensors["input_ids"].shape  # (1, length)
    sequence = {
        key: np.asarray(value[0].numpy(), np.int64)
        for key, value in tensors.items()
        if value.shape == shape and not value.is_floating_point() and key != "attention_mask"
    }
    return Tokens(sequence, {key: value for key, value in tensors.items() if value.shape != shape})
