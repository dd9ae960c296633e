"""Images of other than three channels, such as 16-bit greyscale, multispectral or fluorescence images.

They are arrays [height, width, C] float32 from 0 (black) to 1 (white), which keep all bits of 8- and 16-bit files.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data.source import Item
from dino_xcit.transform import Channels, PixelFormat

_FORMATS = {
    b"\x89PNG": "PNG", b"\x93NUM": "NPY", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF",
}  # fmt: skip
"""Format by the first four bytes; TIFF and BigTIFF in both byte orders."""
MAX_VALUES = 160_000_000
"""Maximum number of values of an image, checked before decoding."""


def array_of(item: Item, format: PixelFormat) -> Channels:
    """Decode a PNG, TIFF or NPY file, or scale pixels [height, width], [height, width, C] or [C, height, width].

    Raises:
        ValueError: The file is of another kind, or has another number of channels. Damaged files raise any exception.
    """
    pixels = _channels_last(_read(item) if isinstance(item, bytes) else item, format.channels)
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if 0 in pixels.shape:
        raise ValueError(f"its pixels have the shape {pixels.shape}")
    return _scaled(pixels, format)


def highest_uint16(data: bytes) -> int:
    """Return the highest value of a file of 16-bit values; 0 for others."""
    pixels = _read(data)
    return int(pixels.max()) if pixels.dtype.newbyteorder("=") == np.uint16 else 0


def format_of(data: bytes) -> str:
    """Return PNG, NPY or TIFF by the first bytes of a file.

    Raises:
        ValueError: The file has another format.
    """
    if data[:4] not in _FORMATS:
        raise ValueError(f"it begins with {data[:4]!r}, expected PNG, TIFF or NPY, as --channels is not 3")
    return _FORMATS[data[:4]]


def _read(data: bytes) -> NDArray[Any]:
    return {"PNG": _read_png, "NPY": _read_npy, "TIFF": _read_tiff}[format_of(data)](data)


def _read_png(data: bytes) -> NDArray[Any]:
    import torch
    from torchvision.io import ImageReadMode, decode_png  # Pillow reduces colours of 16 bits to 8

    if data[25:26] == b"\x03":
        raise ValueError("its values are numbers of a palette")
    _check_count(4 * int.from_bytes(data[16:20]) * int.from_bytes(data[20:24]))
    pixels = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    return pixels.permute(1, 2, 0).numpy()


def _read_npy(data: bytes) -> NDArray[Any]:
    file = io.BytesIO(data)
    version, _ = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == 1 else np.lib.format.read_array_header_2_0
    _check_count(math.prod(header(file)[0]))
    file.seek(0)
    return np.load(file, allow_pickle=False)


def _read_tiff(data: bytes) -> NDArray[Any]:
    """Return the first series [height, width, C]: the other axes, such as samples or pages, are the channels."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError("TIFF files need the package tifffile: pip install 'dino-xcit[tiff]'") from error
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series, kind = file.series[0], tifffile.PHOTOMETRIC(file.pages.first.photometric)
        if kind in (tifffile.PHOTOMETRIC.PALETTE, tifffile.PHOTOMETRIC.MINISWHITE):
            raise ValueError(f"its values are of the kind {kind.name}, expected MINISBLACK or RGB")
        # A decoder allocates whole tiles, even for a small image.
        _check_count(max(series.size, file.pages.first.tilewidth * file.pages.first.tilelength))
        pixels = np.moveaxis(series.asarray(), [series.axes.index("Y"), series.axes.index("X")], [0, 1])
    return pixels.reshape(*pixels.shape[:2], -1)


def _check_count(values: int) -> None:
    """Raise ValueError, before memory is allocated, if an image is too large."""
    if values > MAX_VALUES:
        raise ValueError(f"too many values: {values:,}, more than {MAX_VALUES:,}")


def _channels_last(pixels: NDArray[Any], channels: int) -> NDArray[Any]:
    """Return [height, width, channels]; the channels may be first, and a single one may be missing."""
    if pixels.ndim == 2 and channels == 1:
        return pixels[..., None]
    first, last = (pixels.ndim == 3 and pixels.shape[place] == channels for place in (0, 2))
    if first and last and channels > 1:
        raise ValueError(f"its pixels have the shape {pixels.shape}, so that it is unknown which are the channels")
    if not first and not last:
        raise ValueError(f"its pixels have the shape {pixels.shape}, expected {channels} channels, as --channels")
    return pixels if last else pixels.transpose(1, 2, 0)


def _scaled(pixels: NDArray[Any], format: PixelFormat) -> Channels:
    """Map values to 0 .. 1; NaN becomes 0."""
    if pixels.dtype == np.uint8:
        low, high = 0.0, 255.0
    elif pixels.dtype == np.uint16:
        low, high = 0.0, float(format.white_level)
    elif pixels.dtype.kind not in "uif":
        raise ValueError(f"its pixels are {pixels.dtype}, expected numbers")
    elif not format.value_range:
        raise ValueError(f"its pixels are {pixels.dtype}, with an unknown range: set --value-range, such as 0 1")
    else:
        low, high = format.value_range
    scaled = pixels.astype(np.float32)
    scaled -= np.float32(low)
    scaled /= np.float32(high - low)
    np.nan_to_num(scaled, copy=False, nan=0.0)
    return scaled.clip(0, 1, out=scaled)
