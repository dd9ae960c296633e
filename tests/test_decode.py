"""Decoding of unusual images, and refusal of bad ones with their cause."""

from __future__ import annotations

import math
import pickle
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from bad_images import HEIGHT, ODDITIES, WIDTH, encoded, photograph, png_chunk, refusal, undecodable
from numpy.typing import NDArray
from PIL import Image, ImageFile

from dino_xcit.data import open_source
from dino_xcit.data.decode import WHITE, UndecodableImage, decode, decode_pixels
from dino_xcit.data.measure import choose_white_level
from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform, PixelFormat
from eval.features import TransformedImages


def pixels(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image).astype(np.int64)


# ---- decoding

GREY = ("grey.jpg", "grey with alpha.png", "sixteen bits.png")
EXACT = ("grey with alpha.png", "sixteen bits.png", "animated.webp", "plain.tif", "packed.tif", "plain.bmp")


@pytest.mark.parametrize("kind", sorted(ODDITIES))
def test_decode_restores_photograph_from_unusual_files(kind: str) -> None:
    """In colour, upright, and the first frame of animations, whose second frame is black."""
    photo = photograph(4)
    wanted = photo.convert("L").convert("RGB") if kind in GREY else photo
    picture = decode(ODDITIES[kind](photo), kind)
    assert (picture.mode, picture.size) == ("RGB", (WIDTH, HEIGHT))
    if kind == "one bit.png":
        assert set(np.unique(pixels(picture))) == {0, 255}
        assert abs(pixels(picture).mean() - pixels(photo.convert("L")).mean()) < 8
        return
    error = np.abs(pixels(picture) - pixels(wanted)).mean()
    # A different image, orientation or frame would have a much larger error.
    farther = np.abs(pixels(picture) - pixels(wanted.rotate(180))).mean() / 2
    assert error < (1e-9 if kind in EXACT else min(16, farther))


def test_decode_keeps_stored_colours_of_transparent_pixels() -> None:
    photo = photograph(5)
    clear = photo.convert("RGBA")
    clear.putalpha(0)
    for data in (encoded(clear, "PNG"), encoded(clear, "WEBP", lossless=True, exact=True)):
        assert (pixels(decode(data, "x")) == pixels(photo)).all()
    palette = photo.quantize(16)
    wanted = pixels(palette.convert("RGB"))
    for transparency in (3, bytes([0, 7] * 8)):
        assert (pixels(decode(encoded(palette, "PNG", transparency=transparency), "x")) == wanted).all()


def test_decode_scales_16_bit_grey_in_every_format() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    files = [encoded(Image.fromarray(ramp), format_name) for format_name in ("PNG", "TIFF")]
    files.append(b"P5 8 8 65535\n" + ramp.astype(">u2").tobytes())
    for data in files:
        assert (pixels(decode(data, "x"))[..., 1] == ramp >> 8).all()


def test_decode_refuses_channels_of_32_bits() -> None:
    # Their white level is unknown.
    for mode in ("F", "I"):
        assert "32 bits per channel" in refusal(encoded(Image.new(mode, (4, 4), 1), "TIFF")).cause


TURNED_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,  # stored rotated left, because tag 6 requests a rotation to the right
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_applies_exif_orientation(photo: Image.Image, orientation: int) -> None:
    stored = photo if orientation == 1 else photo.transpose(TURNED_BY[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(decode(encoded(stored, "PNG", exif=exif), "x")), np.asarray(photo))
    assert decode(encoded(stored, "JPEG", exif=exif), "x").size == photo.size


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 3)])
def test_decode_accepts_pixel_arrays(shape: tuple[int, ...]) -> None:
    item = np.arange(math.prod(shape), dtype=np.uint8).reshape(shape)
    expected = item if item.ndim == 3 else np.stack([item] * 3, axis=-1)
    np.testing.assert_array_equal(np.asarray(decode(item, "x")), expected)


# ---- refusals

CAUSES = {
    "cut short.jpg": "the file is truncated",
    "cut short.png": "Truncated",
    "empty.jpg": "^empty file$",
    "web page.jpg": "^a web page, not an image$",
    "noise.jpg": r"^not an image in a known format \(JPEG, PNG, ",
    "claims to be large.png": "^too many pixels: .*2500000000 pixels",
    "large.png": "^too many pixels: 13000 x 13000, more than 160,000,000$",
    "wrong checksum.png": "checksum",
}


@pytest.mark.parametrize("kind", sorted(CAUSES))
def test_decode_refuses_bad_files_with_cause(kind: str) -> None:
    error = refusal(undecodable(photograph(4), 4)[kind])
    assert isinstance(error, InputError)
    assert re.search(CAUSES[kind], error.cause)


def test_decode_refuses_unsupported_formats_and_damaged_headers() -> None:
    whole = encoded(photograph(1), "PNG")
    foreign = (encoded(photograph(1), name) for name in ("PDF", "ICO"))
    for data in (b"hello", bytes(1000), whole[:60], whole[:16] + b"\x7f" + whole[17:], *foreign):
        assert isinstance(refusal(data), InputError)


WHOLE: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")},
    "progressive JPEG": {"progressive": True},
    "packed TIFF": {"compression": "tiff_lzw"},
}


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("kind", list(WHOLE))
def test_decode_of_truncated_file_raises_or_returns_all_pixels(
    kind: str, lenient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if other code sets LOAD_TRUNCATED_IMAGES. Only bytes after the last pixel may be missing."""
    data = encoded(photograph(6), kind.split()[-1], **WHOLE[kind])
    whole = pixels(decode(data, "whole"))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    for length in [*range(0, len(data), len(data) // 20), *range(len(data) - 12, len(data))]:
        try:
            picture = decode(data[:length], "cut")
        except UndecodableImage:
            continue
        assert length >= len(data) - 4, f"decoded without the last {len(data) - length} bytes"
        assert (pixels(picture) == whole).all(), f"wrong pixels from the first {length} bytes"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


def test_decode_ignores_png_texts_and_profiles_of_any_size() -> None:
    """Such as XMP of image editors, and chunks that decompress to 30 MB."""
    photo, large = photograph(1), zlib.compress(bytes(30_000_000), 9)
    plain = encoded(photo, "PNG")
    for chunk in (
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"<x/>" * 100_000),
        png_chunk(b"zTXt", b"note\0\0" + large),
        png_chunk(b"iCCP", b"icc\0\0" + large),
    ):
        with_chunk = plain[:33] + chunk + plain[33:]  # after IHDR
        assert decode(with_chunk, "x").tobytes() == photo.tobytes()


def test_decode_ignores_damaged_exif_silently(capfd: pytest.CaptureFixture[str]) -> None:
    photo = photograph(2)
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(20)):
        for format_name in ("PNG", "WEBP", "JPEG"):
            assert decode(encoded(photo, format_name, exif=exif), "x").size == (WIDTH, HEIGHT)
    assert capfd.readouterr() == ("", "")


def tiff(tags: Mapping[int, tuple[int, ...]], data: bytes) -> bytes:
    """Return a grey TIFF of 64 x 64 pixels with additional ``tags``, and ``data`` at byte 8."""
    entries, arrays = b"", b""
    base: dict[int, tuple[int, ...]] = {256: (64,), 257: (64,), 258: (8,), 259: (1,), 262: (1,), 277: (1,)}
    for tag, values in sorted((base | dict(tags)).items()):
        value = struct.pack(f"<{len(values)}L", *values)
        if len(values) > 1:
            value, arrays = struct.pack("<L", 8 + len(data) + len(arrays)), arrays + value
        entries += struct.pack("<HHL", tag, 4, len(values)) + value
    directory = struct.pack("<H", len(entries) // 12) + entries + bytes(4)
    return b"II*\0" + struct.pack("<L", 8 + len(data) + len(arrays)) + data + arrays + directory


def test_decode_refuses_tiff_with_oversized_or_overlapping_tiles() -> None:
    packed = zlib.compress(bytes(range(64)) * 64)
    tile = {259: (8,), 324: (8,), 325: (len(packed),)}
    ramp = decode(tiff(tile | {322: (64,), 323: (64,)}, packed), "x")
    assert pixels(ramp)[5, :, 0].tolist() == list(range(64))
    assert "tiles of more than" in refusal(tiff(tile | {322: (65520,), 323: (65520,)}, packed)).cause

    plain = bytes(range(64)) * 64
    half = {278: (32,), 279: (64 * 32,) * 2}
    assert pixels(decode(tiff(half | {273: (8, 8 + 64 * 32)}, plain), "x"))[50, :, 0].tolist() == list(range(64))
    assert "tiles that overlap" in refusal(tiff(half | {273: (8, 8 + 64 * 32) * 5000}, plain)).cause


RAISED = (KeyError(259), RuntimeError("two\nlines " + "x" * 1000), RecursionError(), MemoryError(), AssertionError())


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_decode_reports_any_library_error_in_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photograph(1), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", Mock(side_effect=error))
    refused = refusal(data)
    assert type(error).__name__ in refused.cause or refused.cause == "not enough memory to decode it"
    assert len(refused.cause) < 300
    assert refused.__cause__ is None  # a traceback would keep the half-decoded image in memory
    assert refused.__context__ is None


def test_decode_does_not_catch_keyboard_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photograph(1), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        decode(data, "x")


def test_undecodable_image_keeps_cause_when_pickled() -> None:
    error = refusal(b"<html>")
    again = pickle.loads(pickle.dumps(error))
    assert again.cause == error.cause == "a web page, not an image"
    assert str(again) == str(error)


@pytest.mark.parametrize(
    ("bits", "ending"), [(8, "png"), (12, "png"), (12, "tif"), (12, "pgm"), (14, "png"), (16, "png")]
)
def test_white_level_of_16_bit_files_is_measured_and_applied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int, ending: str
) -> None:
    white = 2**bits - 1
    values = np.linspace(0, white - 2, 4096).astype(np.uint16).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / f"scan.{ending}")
    photograph(1).save(tmp_path / "photograph.png")
    (tmp_path / "broken.png").write_bytes(b"broken")
    source = open_source(str(tmp_path))
    assert choose_white_level(source, white) == white
    assert "almost black" not in capsys.readouterr().out
    assert [choose_white_level(source, asked) for asked in (0, WHITE)] == [white, WHITE]
    assert (f"--white-level {white}" in capsys.readouterr().out) == (bits < 16)
    data, _ = source.read(2)
    crops = TransformedImages(source, EvalTransform(64, 64, white_level=white))[2]
    assert isinstance(crops, torch.Tensor)
    fast = decode_pixels(data, "x", PixelFormat(white_level=white))
    for grey in (pixels(decode(data, "x", white))[..., 0], fast[..., 0], crops[0].numpy()):
        assert np.array_equal(grey, values.astype(np.int64) * 256 >> bits)
