"""From a source's item to an RGB picture: the one place where image files are decoded."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from dino_xcit.data.source import Item, Source
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.transform import WHITE

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

MAX_PIXELS = 160_000_000
"""Larger pictures are refused before a pixel of them is decoded: medium-format cameras end at 151 million.

So it bounds what decoding needs besides the file: 8 bytes a pixel for most files (Pillow keeps RGB in four, and it is
there twice), 12 for a turned CMYK, 16 for a WebP and four more where that is transparent; four more for the pixels that
are handed to augmentation, and there another four.
"""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation to what undoes it."""
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF

# Pillow logs some of its refusals as errors, which Python prints where nobody has set up logging. The error says it.
logging.getLogger("PIL").addHandler(logging.NullHandler())


Picture = TypeVar("Picture")


class UndecodableImage(InputError):
    """A file is no image that can be read: its name and the cause are in the message."""

    cause: str
    """The clause that says why, on one line, without the file's name and without advice."""

    def __init__(self, message: str, cause: str | None = None) -> None:
        super().__init__(message)
        self.cause = message if cause is None else cause


def decode(item: Item, name: str, white_level: int = WHITE) -> Image.Image:
    """The item as an upright RGB picture: the first frame of several, without its transparency. By Pillow alone.

    Args:
        item: an encoded file, or uint8 pixels [height, width] or [height, width, 3].
        name: what to call it in an error.
        white_level: the value of 16-bit images that becomes white, as larger ones do.

    Raises:
        UndecodableImage: not one of :data:`FORMATS`, damaged, cut short, or larger than :data:`MAX_PIXELS`.
    """
    if isinstance(item, np.ndarray):
        return Image.fromarray(item).convert("RGB")
    return _guarded(partial(_decode_file, white_level=white_level), item, name)


def decode_pixels(item: Item, name: str, white_level: int = WHITE) -> NDArray[np.uint8]:
    """The same pixels as :func:`decode`, for augmentation: [height, width, 4], red, green, blue and a byte unused.

    Bit for bit: a JPEG without flaws goes straight through libjpeg-turbo, which Pillow has too; what that frowns upon
    is left to Pillow's judgement.

    Raises:
        UndecodableImage: as :func:`decode`.
    """
    if isinstance(item, np.ndarray):
        pixels = np.empty((*item.shape[:2], 4), dtype=np.uint8)
        pixels[..., :3] = item if item.ndim == 3 else item[..., None]
        return pixels
    return _guarded(partial(_decode_to_pixels, white_level=white_level), item, name)


def choose_white_level(source: Source, asked: int) -> int:
    """``asked``, or where that is 0 what 64 images tell; a warning where their 16-bit files become almost black.

    It is the least 2^n - 1 that none of their values exceeds: cameras and scanners of 12 bits write files of 16. Every
    process calls this, the main one reads the images.
    """
    found = distributed.on_main(partial(_white_level_of, source))
    if not asked:
        log.info(f"white level of {source.url}: {found:,}, measured")
    elif 4 * found < asked:
        log.warning(
            f"16-bit images of {source.url} are almost black, with no value above {found:,} where {asked:,} is white: "
            f"--white-level {found} makes that white"
        )
    return asked or found


def _white_level_of(source: Source) -> int:
    highest = 0
    for index in np.unique(np.linspace(0, len(source) - 1, 64).astype(np.int64)).tolist():
        if source.name(index).lower().endswith((".jpg", ".jpeg")):  # never of 16 bits
            continue
        with contextlib.suppress(InputError):  # reported where it is used
            item, _ = source.read(index)
            if isinstance(item, bytes):
                highest = max(highest, _guarded(_highest_of_16_bits, item, ""))
    return (1 << highest.bit_length()) - 1 if highest else WHITE


def _highest_of_16_bits(data: bytes) -> int:
    image = _open(data)
    if not _has_16_bits(image):
        return 0
    _check_size(image)
    return int(np.asarray(image).max())


def _has_16_bits(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """An RGB picture as [height, width, 4], the last byte unused: Pillow's own layout."""
    return np.frombuffer(image.tobytes("raw", "RGBX"), dtype=np.uint8).reshape(image.height, image.width, 4)


@dataclass(frozen=True)
class Header:
    """Of a file that :func:`decode` has accepted."""

    format: str
    """One of :data:`FORMATS`."""
    is_turned: bool
    """Whether EXIF says that the picture is to be turned or mirrored before it is looked at."""


def read_header(data: bytes) -> Header:
    """What an encoded image says of itself before a pixel is decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(data)
        # A JPEG that holds several pictures is an MPO to Pillow.
        return Header("JPEG" if image.format == "MPO" else image.format or "", _orientation(image) in _UPRIGHT)


def _guarded(read: Callable[[bytes], Picture], data: bytes, name: str) -> Picture:
    try:
        # Pillow warns of doubtful metadata, and of sizes that are judged here. Undone at once, for others' warnings.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(data)
    except Exception as error:  # of any class: parsers of damaged files stumble over whatever they meet
        cause = _cause(data, error)
    # Raised outside the handler, so that it does not keep a half-decoded picture alive in a traceback.
    advice = "remove it, or save it anew as a JPEG or PNG; python -m dino_xcit.data pack leaves such images out"
    raise UndecodableImage(f"{name} cannot be read: {cause}; {advice}", cause)


def _decode_to_pixels(data: bytes, white_level: int) -> NDArray[np.uint8]:
    if data[:2] == b"\xff\xd8":
        image = _open(data)
        _check_size(image)
        # Pillow says what to do with it, and both must have read the same size before memory is taken for it.
        plain = image.format == "JPEG" and image.mode == "RGB" and _orientation(image) == 1
        if plain and simplejpeg.is_jpeg(data):
            try:
                height, width, *_ = simplejpeg.decode_jpeg_header(data)
                if (width, height) == image.size:
                    return simplejpeg.decode_jpeg(data, "RGBA", strict=True)
            except (ValueError, KeyError):  # KeyError: a sampling that it has no name for
                pass
    return pixels_of(_decode_file(data, white_level))


def _decode_file(data: bytes, white_level: int) -> Image.Image:
    try:
        return _decode_strictly(data, white_level)
    except ValueError as error:
        if "MAX_TEXT_" not in str(error):
            raise
    return _decode_strictly(_without_texts(data), white_level)


def _without_texts(png: bytes) -> bytes:
    """Of a PNG whose texts or profile are larger than Pillow unpacks, such as XMP: none of them matters here."""
    kept, place = [png[:8]], 8
    while place < len(png):
        end = place + 12 + int.from_bytes(png[place : place + 4])
        if png[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(png[place:end])
        place = end
    return b"".join(kept)


def _decode_strictly(data: bytes, white_level: int) -> Image.Image:
    image = _open(data)
    _check_size(image)
    if image.format == "PNG":  # the only format whose checksums Pillow can check, which it does not when decoding
        image.verify()
        image = _open(data)  # as Pillow demands
    _read_strictly(image)
    image.load()
    method = _UPRIGHT.get(_orientation(image))
    upright = image if method is None else image.transpose(method)
    if _has_16_bits(image):
        return _from_16_bits(upright, white_level)
    if upright.mode in ("I", "F"):  # Pillow's own conversion would cut off at 255 whatever the range is
        raise ValueError("32 bits a channel, of which it is not known what is white")
    if upright.mode == "RGB" and upright is not image:
        return upright
    return upright.convert("RGB")  # where it is RGB already, a copy that does not hold the file


def _open(data: bytes) -> ImageFile.ImageFile:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _check_size(image: ImageFile.ImageFile) -> None:
    """Refuse what would need much memory or time, from the header alone."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"too many pixels: {width} x {height}, more than {MAX_PIXELS:,}")
    tags = getattr(image, "tag_v2", {})
    # A tile is decoded into a buffer of its own size, however small the picture.
    if tags.get(_TILE_WIDTH, 1) * tags.get(_TILE_LENGTH, 1) > MAX_PIXELS:
        raise ValueError("tiles larger than any picture may be")
    # Each plane is covered once. A small file can list one tile a million times.
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for _, box, *_ in image.tile if box is not None)
    if sum(areas) > len(image.getbands()) * width * height:
        raise ValueError("its tiles cover it more than once")


def _read_strictly(image: ImageFile.ImageFile) -> None:
    """Make a file that ends early an error even where other code has told Pillow to put up with it."""
    if image.format in ("PNG", "WEBP"):  # a PNG was verified, and a WebP is decoded as a whole
        return
    stream = image.fp
    assert stream is not None

    def read(count: int) -> bytes:
        block = stream.read(count)
        if not block:
            raise OSError("the file ends before the picture is complete")
        return block

    image.load_read = read  # type: ignore[attr-defined]


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where it is absent or cannot be read, as the picture is there all the same."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) else 1


def _from_16_bits(image: Image.Image, white_level: int) -> Image.Image:
    """The upper eight of the bits that the white level has; Pillow's own conversion would cut off at 255."""
    values = np.minimum(np.asarray(image), white_level).astype(np.uint32)
    values *= 256
    values //= white_level + 1
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _cause(data: bytes, error: Exception) -> str:
    """Why a file cannot be read, on one line of at most some 200 characters."""
    if not data:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):
        claimed = next((name for name in FORMATS if Image.OPEN[name][1](data[:16])), None)  # type: ignore[misc]
        if claimed:
            return f"it begins like a {claimed}, but its header is damaged or of an unknown kind"
        if data[:1000].lstrip().lower().startswith((b"<!doctype html", b"<html")):
            return "a web page, not an image"
        return f"not an image in a known format ({', '.join(FORMATS)})"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    text = "".join(letter if letter.isprintable() else " " for letter in str(error))
    text = " ".join(text.split())[:200].rstrip(".")
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels: {text}"
    if text and isinstance(error, (OSError, ValueError, SyntaxError, EOFError)):
        return f"damaged ({text})" if text.startswith("decoder error") else text
    return f"damaged ({type(error).__name__}{': ' if text else ''}{text})"
