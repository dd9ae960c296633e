"""What becomes of one image when it is packed: its bytes as they are, or a smaller JPEG; and the name it gets."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np
from PIL import Image

from dino_xcit.data.decode import UndecodableImage, decode
from dino_xcit.data.header import read_header
from dino_xcit.data.source import Source
from dino_xcit.errors import InputError

_SUFFIXES = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
    "PPM": "ppm",
}
"""Of a member, by what its bytes are: what the file was called may be wrong (ImageNet has a PNG called JPEG)."""


_LONGEST = 3000
"""Bytes of a name in a key: a path in letters of a URL may be three times as long, and readers refuse 4096."""


@dataclass(frozen=True)
class Packed:
    """One image on its way into a shard."""

    index: int
    label: int | None = None
    suffix: str = ""
    """Of the member, without a dot."""
    data: bytes = b""
    cause: str = ""
    """Why it cannot be read; empty where it can."""


def pack_image(source: Source, index: int, max_side: int | None, quality: int) -> Packed:
    """Read and decode an image, and make it smaller if need be.

    Args:
        source: where from.
        index: which.
        max_side: pixels that the longer side has at most; None: every file's bytes are kept.
        quality: of the JPEGs that are written, 1 to 100.
    """
    try:
        item, label = source.read(index)
        picture = decode(item, source.name(index))
    except UndecodableImage as error:
        return Packed(index, cause=error.cause)
    except InputError as error:
        return Packed(index, cause=str(error))
    too_large = max_side is not None and max(picture.size) > max_side
    if isinstance(item, np.ndarray):
        if not too_large:
            return Packed(index, label, "png", _saved(Image.fromarray(item), "PNG"))
    else:
        header = read_header(item)
        lies_on_its_side = header.format == "JPEG" and header.turned
        if not too_large and (max_side is None or not lies_on_its_side):
            return Packed(index, label, _SUFFIXES[header.format], item)
    if too_large:
        assert max_side is not None
        picture = shrunk(picture, max_side)
    return Packed(index, label, "jpg", _saved(picture, "JPEG", quality=quality, subsampling="4:4:4", comment=b""))


def shrunk(picture: Image.Image, max_side: int) -> Image.Image:
    """The picture with its longer side ``max_side`` pixels long, each pixel a mean of what it covers (Lanczos)."""
    scale = max_side / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def key_of(index: int, name: str) -> str:
    """The part of a member's name before the dot: the image's number, an underscore, and its name in readable form.

    WebDataset ends a key at the first dot, and readers take folders for classes: so dots, slashes, percent signs and
    what cannot be printed are written as in a URL. ``urllib.parse.unquote(key.partition("_")[2],
    errors="surrogateescape")`` is the name again, or its beginning where it is very long.
    """
    room, kept = _LONGEST, []
    for letter in name:
        readable = letter if letter.isprintable() and letter not in "./\\%" else _encoded(letter)
        room -= len(readable.encode())
        if room < 0:
            break
        kept.append(readable)
    return f"{index:08d}_{''.join(kept)}"


def _encoded(letter: str) -> str:
    return "%2E" if letter == "." else quote(letter, safe="", errors="surrogateescape")


def relative_name(url: str, name: str) -> str:
    """An image's name without the folder or list that its source was opened from."""
    for base in (url, re.sub(r"[^/\\]*$", "", url)):
        folder = base.rstrip("/\\")
        if folder and name.startswith((f"{folder}/", f"{folder}\\")):
            return name[len(folder) + 1 :]
    return name
