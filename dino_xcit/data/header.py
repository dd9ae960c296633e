"""What an image file says of itself before a pixel is decoded."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import ExifTags, Image

from dino_xcit.data.decode import FORMATS


@dataclass(frozen=True)
class Header:
    """Of a file that :func:`dino_xcit.data.decode` has accepted."""

    format: str
    """One of :data:`dino_xcit.data.decode.FORMATS`."""
    turned: bool
    """Whether EXIF says that the picture is to be turned or mirrored before it is looked at."""


def read_header(data: bytes) -> Header:
    """The header of an encoded image.

    Raises:
        Exception: of any class, where the file is none that ``decode`` accepts.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # A JPEG with several pictures in it is an MPO to Pillow; its first picture is a JPEG to everybody.
            kind = "JPEG" if image.format == "MPO" else image.format or ""
            try:
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            except Exception:  # as in decode: the picture is there all the same
                orientation = 1
            return Header(kind, orientation in range(2, 9))
