"""Decode items of a source to images. All image files are decoded here, those of other than three channels by
:mod:`dino_xcit.data.channels`."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from dino_xcit.data.channels import array_of
from dino_xcit.data.source import Item, Source
from dino_xcit.errors import InputError
from dino_xcit.transform import RGB, WHITE, Channels, PixelFormat, pixels_of, size_of

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

ADVICE = "remove it, or save it again as JPEG or PNG; python -m dino_xcit.data pack skips unreadable images"
MAX_PIXELS = 160_000_000
"""Maximum number of pixels, checked before decoding. Medium-format cameras reach 151 million.

The limit bounds the memory of decoding. Besides the file, decoding takes 8 bytes per pixel for most formats (two copies
at Pillow's four bytes), 12 for a rotated CMYK image, 16 for WebP and 20 for WebP with transparency. Augmentation takes
8 bytes per pixel more.
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
"""EXIF orientation to the transposition that undoes it."""
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF tags

# Pillow logs errors that it also raises; without a handler Python would print them to stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


Decoded = TypeVar("Decoded")


class UndecodableImage(InputError):
    """An unreadable image. The message has its name, the cause and a remedy."""

    cause: str
    """The cause alone, on one line."""

    def __init__(self, message: str, cause: str | None = None) -> None:
        super().__init__(message)
        self.cause = message if cause is None else cause


def decode(item: Item, name: str, white_level: int = WHITE) -> Image.Image:
    """Decode an item with Pillow to an upright RGB image: the first frame, without transparency.

    Args:
        item: Encoded file, or uint8 pixels [height, width] or [height, width, 3].
        name: Name of the image in errors.
        white_level: Value of 16-bit images that maps to white. Larger values are clipped.

    Raises:
        UndecodableImage: The file is not one of :data:`FORMATS`, is damaged or truncated, or has more than
            :data:`MAX_PIXELS`.
    """
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.shape[2:] not in ((), (3,)):
            cause = f"its pixels are {item.dtype} of the shape {item.shape}, expected uint8 [height, width, 3]"
            raise UndecodableImage(f"{name} cannot be read: {cause}", cause)
        return Image.fromarray(item).convert("RGB")
    return guarded(partial(_decode_file, white_level=white_level), item, name)


def read_image(source: Source, index: int, format: PixelFormat = RGB) -> Image.Image | Channels:
    """Read and decode an image of a source: as :func:`decode`, or for other than three channels to an array.

    Raises:
        InputError: The image cannot be read.
        UndecodableImage: It cannot be decoded, or has another number of channels.
    """
    return decode_image(source.read(index)[0], source.name(index), format)


def decode_image(item: Item, name: str, format: PixelFormat) -> Image.Image | Channels:
    """Decode an item as :func:`decode`, or for other than three channels to an array.

    Raises:
        UndecodableImage: It cannot be decoded, or has another number of channels.
    """
    return decode(item, name, format.white_level) if format.channels == 3 else _decode_channels(item, name, format)


def picture_of(image: Image.Image | Channels, format: PixelFormat) -> Image.Image:
    """Return an RGB image for drawing: of an array, the channels that ``format`` shows, its highest value as white."""
    if isinstance(image, Image.Image):
        return image
    shown = image[..., format.shown_channels]
    return Image.fromarray((255 * shown / max(float(shown.max()), 1e-6)).astype(np.uint8))


def read_picture(source: Source, index: int, format: PixelFormat = RGB) -> Image.Image:
    """Read an image of a source for drawing: :func:`read_image`, then :func:`picture_of`."""
    return picture_of(read_image(source, index, format), format)


def _decode_channels(item: Item, name: str, format: PixelFormat) -> Channels:
    advice = "remove it, or save it again as PNG, TIFF or NPY"
    return guarded(lambda _: array_of(item, format), item if isinstance(item, bytes) else b"pixels", name, advice)


def decode_pixels(item: Item, name: str, format: PixelFormat = RGB) -> NDArray[np.uint8] | Channels:
    """Decode an item for augmentation: to the same pixels as :func:`read_image`.

    RGB images are [height, width, 4]: red, green, blue, one unused byte.

    Intact RGB JPEGs are decoded by libjpeg-turbo directly, with the same bits as in Pillow, which uses it too. All
    other files are decoded by Pillow.

    Raises:
        UndecodableImage: As :func:`decode`.
    """
    if format.channels != 3:
        return _decode_channels(item, name, format)
    if isinstance(item, np.ndarray):
        pixels = np.empty((*item.shape[:2], 4), dtype=np.uint8)
        pixels[..., :3] = item if item.ndim == 3 else item[..., None]
        return pixels
    return guarded(partial(_decode_to_pixels, white_level=format.white_level), item, name)


def decode_mask(data: bytes, name: str) -> NDArray[np.uint8]:
    """Decode a PNG that has a label per pixel to [height, width]; a palette is ignored.

    Raises:
        UndecodableImage: The file is damaged, of another format, or has other pixels.
    """
    return guarded(_decode_labels, data, name)


def highest_of_16_bits(data: bytes) -> int:
    """Return the highest value of a file of 16-bit values with one channel; 0 for others."""
    image = _open(data)
    if not _has_16_bits(image):
        return 0
    _check_size(image)
    return int(np.asarray(image).max())


def _has_16_bits(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


@dataclass(frozen=True)
class Header:
    """Header of a file that :func:`decode` has accepted."""

    format: str
    """One of :data:`FORMATS`."""
    is_turned: bool
    """Whether the EXIF orientation requires a rotation or a flip."""
    size: tuple[int, int]
    """Width and height of the upright image."""


def read_header(data: bytes, name: str = "") -> Header:
    """Read the header of an encoded image, without decoding pixels.

    Raises:
        UndecodableImage: The header is damaged, or not of one of :data:`FORMATS`.
    """
    return guarded(_header_of, data, name)


def image_size(source: Source, index: int, format: PixelFormat = RGB) -> tuple[int, int]:
    """Return height and width of an image. RGB files are not decoded.

    Raises:
        InputError: The image cannot be read.
        UndecodableImage: The header of an RGB file is damaged, or another image cannot be decoded.
    """
    item, _ = source.read(index)
    if format.channels == 3 and isinstance(item, bytes):
        width, height = read_header(item, source.name(index)).size
        return height, width
    return size_of(decode_image(item, source.name(index), format))


def _header_of(data: bytes) -> Header:
    image = _open(data)
    # Pillow reports a JPEG with several images as MPO.
    kind, orientation = "JPEG" if image.format == "MPO" else image.format or "", _orientation(image)
    return Header(kind, orientation in _UPRIGHT, image.size[::-1] if orientation in (5, 6, 7, 8) else image.size)


def guarded(read: Callable[[bytes], Decoded], data: bytes, name: str, advice: str = ADVICE) -> Decoded:
    """Return ``read(data)``.

    Raises:
        UndecodableImage: ``read`` raised an error.
    """
    try:
        # Pillow warns of doubtful EXIF data, and of sizes that are checked here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(data)
    except Exception as error:  # damaged files make parsers raise any exception
        cause = _cause(data, error)
    # Raised outside the handler, so that no traceback keeps a half-decoded image in memory.
    raise UndecodableImage(f"{name} cannot be read: {cause}; {advice}", cause)


def _decode_labels(data: bytes) -> NDArray[np.uint8]:
    image = _open(data)
    _check_size(image)
    # The raw mode of a PNG. Greyscale of 2 or 4 bits is left out: Pillow scales its values.
    kind = image.tile[0].args if image.format == "PNG" else image.format
    if kind not in ("1", "L", "P", "P;1", "P;2", "P;4"):
        raise ValueError(f"its format is {kind}, expected a PNG with a label of 8 bits per pixel: P or L")
    image.verify()
    return np.array(_open(data), dtype=np.uint8)


def _decode_to_pixels(data: bytes, white_level: int) -> NDArray[np.uint8]:
    if data[:2] == b"\xff\xd8":
        import simplejpeg  # here: everything but decoding works without it

        image = _open(data)
        _check_size(image)
        # Before memory is allocated, both libraries must agree on the size.
        plain = image.format == "JPEG" and image.mode == "RGB" and _orientation(image) == 1
        if plain and simplejpeg.is_jpeg(data):
            try:
                height, width, *_ = simplejpeg.decode_jpeg_header(data)
                if (width, height) == image.size:
                    return simplejpeg.decode_jpeg(data, "RGBA", strict=True)
            except (ValueError, KeyError):  # KeyError: a chroma subsampling unknown to simplejpeg
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
    """Remove text and profile chunks from a PNG: Pillow refuses large ones, such as XMP, and decoding ignores them."""
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
    if image.format == "PNG":  # Pillow checks the checksums of PNGs only, and not while decoding
        image.verify()
        image = _open(data)  # required after verify()
    _read_strictly(image)
    image.load()
    method = _UPRIGHT.get(_orientation(image))
    upright = image if method is None else image.transpose(method)
    if _has_16_bits(image):
        return _from_16_bits(upright, white_level)
    if upright.mode in ("I", "F"):  # Pillow's conversion would clip at 255
        raise ValueError("32 bits per channel, with an unknown white level")
    if upright.mode == "RGB" and upright is not image:
        return upright
    return upright.convert("RGB")  # if already RGB, a copy without a reference to the file


def _open(data: bytes) -> ImageFile.ImageFile:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _check_size(image: ImageFile.ImageFile) -> None:
    """Raise ValueError if the header declares an image that takes too much memory or time."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"too many pixels: {width} x {height}, more than {MAX_PIXELS:,}")
    tags = getattr(image, "tag_v2", {})
    # A tile is decoded into a buffer of its own size, however small the image.
    if tags.get(_TILE_WIDTH, 1) * tags.get(_TILE_LENGTH, 1) > MAX_PIXELS:
        raise ValueError(f"tiles of more than {MAX_PIXELS:,} pixels")
    # A small file can list the same tile a million times.
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for _, box, *_ in image.tile if box is not None)
    if sum(areas) > len(image.getbands()) * width * height:
        raise ValueError("tiles that overlap")


def _read_strictly(image: ImageFile.ImageFile) -> None:
    """Make a truncated file an error even if other code has set ``ImageFile.LOAD_TRUNCATED_IMAGES``."""
    if image.format in ("PNG", "WEBP"):  # PNGs are verified, WebPs are decoded as a whole
        return
    stream = image.fp
    assert stream is not None

    def read(count: int) -> bytes:
        block = stream.read(count)
        if not block:
            raise OSError("the file is truncated")
        return block

    image.load_read = read  # type: ignore[attr-defined]


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if it is absent or damaged."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) else 1


def _from_16_bits(image: Image.Image, white_level: int) -> Image.Image:
    """Scale 16-bit values to 8 bits, with ``white_level`` as white. Pillow's conversion would clip at 255."""
    values = np.minimum(np.asarray(image), white_level).astype(np.uint32)
    values *= 256
    values //= white_level + 1
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _cause(data: bytes, error: Exception) -> str:
    """Return why a file is unreadable, on one line of about 200 characters at most."""
    if not data:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):
        claimed = next((name for name in FORMATS if Image.OPEN[name][1](data[:16])), None)  # type: ignore[misc]
        if claimed:
            other = "; if it has not three channels, give --channels N" if claimed == "TIFF" else ""
            return f"it begins like a {claimed}, but its header is damaged or unsupported{other}"
        if data[:1000].lstrip().lower().startswith((b"<!doctype html", b"<html")):
            return "a web page, not an image"
        if data.startswith(b"\x93NUMPY"):
            return "an array, which only networks trained with --channels N read"
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
