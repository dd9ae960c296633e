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

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of classic TIFF and of BigTIFF, in both byte orders."""


MAX_VALUES = 160_000_000
"""Maximum number of values of an image, checked before decoding."""


def array_of(item: Item, format: PixelFormat) -> Channels:
    """Decode a PNG, TIFF or NPY file, or scale pixels [height, width], [height, width, C] or [C, height, width].

    Raises:
        ValueError: The file is of another kind, or has another number of channels. Damaged files raise any exception.
    """
    pixels = _read(item) if isinstance(item, bytes) else item
    return _scaled(_channels_last(pixels, format.channels), format)


def highest_uint16(data: bytes) -> int:
    """Return the highest value of a file of 16-bit values; 0 for others."""
    pixels = _read(data)
    return int(pixels.max()) if pixels.dtype == np.uint16 else 0


def _read(data: bytes) -> NDArray[Any]:
    if data.startswith(b"\x89PNG"):
        return _read_png(data)
    if data.startswith(b"\x93NUMPY"):
        return _read_npy(data)
    if data.startswith(TIFF):
        return _read_tiff(data)
    raise ValueError("images of other than three channels must be PNG, TIFF or NPY files")


def _read_png(data: bytes) -> NDArray[Any]:
    import torch
    from torchvision.io import ImageReadMode, decode_png  # Pillow reduces colours of 16 bits to 8

    _check_count(int.from_bytes(data[16:20]) * int.from_bytes(data[20:24]))
    return decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED).numpy()


def _read_npy(data: bytes) -> NDArray[Any]:
    file = io.BytesIO(data)
    version, _ = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == 1 else np.lib.format.read_array_header_2_0
    _check_count(math.prod(header(file)[0]))
    file.seek(0)
    return np.load(file, allow_pickle=False)


def _read_tiff(data: bytes) -> NDArray[Any]:
    try:
        import tifffile
    except ImportError as error:
        raise ValueError("TIFF files need the package tifffile: pip install 'dino-xcit[tiff]'") from error
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        _check_count(file.series[0].size)
        return file.series[0].asarray()


def _check_count(values: int) -> None:
    """Raise ValueError, before memory is allocated, if an image is too large."""
    if values > MAX_VALUES:
        raise ValueError(f"too many values: {values:,}, more than {MAX_VALUES:,}")


def _channels_last(pixels: NDArray[Any], channels: int) -> NDArray[Any]:
    """Return [height, width, channels] of [height, width], [height, width, channels] or [channels, height, width]."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim == 3 and pixels.shape[2] == channels:
        return pixels
    if pixels.ndim == 3 and pixels.shape[0] == channels:
        return pixels.transpose(1, 2, 0)
    raise ValueError(f"its pixels have the shape {pixels.shape}, expected {channels} channels (--channels)")


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
    scaled = (pixels.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    return np.nan_to_num(scaled, copy=False, nan=0.0).clip(0, 1)
