"""From a source's item to an RGB picture: the one place where image files are decoded."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dino_xcit.data.source import Item
from dino_xcit.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class UndecodableImage(InputError):
    """A file is no image that can be read: its name and the cause are in the message."""


def decode(item: Item, name: str) -> Image.Image:
    """The item as an upright RGB picture.

    Args:
        item: an encoded file, or uint8 pixels [height, width] or [height, width, 3].
        name: what to call it in an error.

    Raises:
        UndecodableImage: not one of :data:`FORMATS`, damaged, cut short, or larger than Pillow's pixel limit.
    """
    if isinstance(item, np.ndarray):
        return Image.fromarray(item).convert("RGB")
    try:
        with Image.open(io.BytesIO(item), formats=FORMATS) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # 16 bits of grey, which Pillow's own conversion would cut off at 255
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return upright.convert("RGB")
    except UnidentifiedImageError as error:
        cause = "empty file" if not item else f"not an image in a known format ({', '.join(FORMATS)})"
        raise UndecodableImage(f"{name} cannot be read: {cause}; remove it, or convert it to JPEG or PNG") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UndecodableImage(f"{name} cannot be read: {error}; remove it, or write it anew") from error
