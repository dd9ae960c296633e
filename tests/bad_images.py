"""A realistic flat folder: photographs, unusual kinds of images, and files that are not images."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from dino_xcit.data.decode import UndecodableImage, decode

WIDTH, HEIGHT = 96, 72
"""Size of every decodable image, upright."""


def photograph(seed: int) -> Image.Image:
    """Generate a colour image with smooth parts, an edge and noise, different for each seed."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    slope, turn = rng.uniform(0.03, 0.12, 3), rng.uniform(0, 6, 3)
    waves = np.sin((rows + columns * rng.uniform(-1, 1))[..., None] * slope + turn)
    pixels = 127 + 90 * waves + rng.normal(0, 6, (HEIGHT, WIDTH, 3))
    top, left = rng.integers(5, HEIGHT // 2), rng.integers(5, WIDTH // 2)
    pixels[top : top + 20, left : left + 30] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    """Encode the image as a file of this format, with options of ``Image.save``."""
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Build one chunk of a PNG, with a valid checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, scanlines: bytes, *chunks: bytes, bits: int = 8, colour: int = 0) -> bytes:
    """Build a PNG with any claimed size and any data; colour 0 is grey, 2 is RGB."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(scanlines, 9))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + png_chunk(b"IEND", b"")


def sideways(image: Image.Image) -> bytes:
    """Encode a JPEG that is rotated by 90 degrees, with the EXIF orientation that restores it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


def _sixteen_bits(image: Image.Image) -> bytes:
    return encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")


def _animated(image: Image.Image, format_name: str, **options: object) -> bytes:
    return encoded(image, format_name, save_all=True, append_images=[Image.new("RGB", image.size)], **options)


def _palette_with_alpha(image: Image.Image) -> bytes:
    return encoded(image.quantize(32), "PNG", transparency=bytes([0, 128] + [255] * 30))


def _grey_with_alpha(image: Image.Image) -> bytes:
    grey = image.convert("LA")
    grey.putalpha(100)
    return encoded(grey, "PNG")


ODDITIES: dict[str, Callable[[Image.Image], bytes]] = {
    "cmyk.jpg": lambda image: encoded(image.convert("CMYK"), "JPEG", quality=95),
    "grey.jpg": lambda image: encoded(image.convert("L"), "JPEG", quality=95),
    "progressive.jpg": lambda image: encoded(image, "JPEG", progressive=True, quality=95),
    "sideways.jpg": sideways,
    "palette with alpha.png": _palette_with_alpha,
    "grey with alpha.png": _grey_with_alpha,
    "sixteen bits.png": _sixteen_bits,
    "one bit.png": lambda image: encoded(image.convert("1"), "PNG"),
    "animated.gif": lambda image: _animated(image, "GIF"),
    "animated.webp": lambda image: _animated(image, "WEBP", lossless=True),
    "plain.tif": lambda image: encoded(image, "TIFF"),
    "packed.tif": lambda image: encoded(image, "TIFF", compression="tiff_lzw"),
    "plain.bmp": lambda image: encoded(image, "BMP"),
}
"""Encoders of unusual kinds of images, by file name."""


@functools.cache
def large_pngs() -> dict[str, bytes]:
    """Return files with too many pixels; cached, as they take long to compress."""
    return {
        "claims to be large.png": png(50_000, 50_000, bytes(1000), colour=2),
        "large.png": png(13_000, 13_000, bytes(13_000 * (13_000 // 8 + 1)), bits=1),
    }


def undecodable(image: Image.Image, seed: int) -> dict[str, bytes]:
    """Return undecodable files by name, some of them made from ``image``."""
    jpeg, whole = encoded(image, "JPEG", quality=90), encoded(image, "PNG")
    return {
        "cut short.jpg": jpeg[: len(jpeg) * 2 // 3],
        "cut short.png": whole[: len(whole) // 2],
        "empty.jpg": b"",
        "web page.jpg": b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body></body></html>\n",
        "noise.jpg": np.random.default_rng(seed).bytes(2000),
        "wrong checksum.png": whole[:-14] + bytes([whole[-14] ^ 1]) + whole[-13:],
        **large_pngs(),
    }


def write_corpus(folder: Path, good: int, seed: int) -> tuple[list[Path], list[Path]]:
    """Write ``good`` decodable images, the first of :data:`ODDITIES` among them, and one bad file of each kind.

    File names start with numbers that ``seed`` shuffles, so that bad files are between good ones.

    Returns:
        Decodable and undecodable files, each in the order of their names.
    """
    files: list[tuple[str, bytes, bool]] = []
    makers = list(ODDITIES.items())[:good]
    for number in range(good):
        picture = photograph(seed * 1_000_003 + number)
        if number < len(makers):
            name, make = makers[number]
            files.append((name, make(picture), True))
        elif number % 4:
            files.append(("photo.jpg", encoded(picture, "JPEG", quality=85), True))
        else:
            files.append(("photo.png", encoded(picture, "PNG"), True))
    files += [(name, data, False) for name, data in undecodable(photograph(seed), seed).items()]
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[bool, list[Path]] = {True: [], False: []}
    for position, number in enumerate(np.random.default_rng(seed).permutation(len(files))):
        name, data, decodable = files[number]
        path = folder / f"{position:05d} {name}"
        path.write_bytes(data)
        places[decodable].append(path)
    return places[True], places[False]


def files_of_all_formats(seed: int) -> list[bytes]:
    """Return intact small files of every supported format, with metadata where the format has any."""
    picture = photograph(seed)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    profile = bytes(range(256)) * 4
    return [
        *(make(picture) for make in ODDITIES.values()),
        encoded(picture, "JPEG", exif=exif, icc_profile=profile, comment=b"c" * 40),
        encoded(picture, "MPO", save_all=True, append_images=[picture]),
        encoded(picture, "PNG", exif=exif, icc_profile=profile),
        encoded(picture, "PNG", save_all=True, append_images=[picture.rotate(90)]),
        encoded(picture, "WEBP", exif=exif, quality=80),
        encoded(picture, "TIFF", compression="tiff_adobe_deflate", exif=exif),
        encoded(picture, "TIFF", compression="jpeg", tiffinfo={322: 32, 323: 32}),
        encoded(picture.convert("1"), "TIFF", compression="group4"),
        encoded(picture.convert("P"), "BMP"),
        encoded(picture, "PPM"),
        b"P3 4 4 255 " + b"12 " * 48,
        b"P2 4 4 1000 " + b"900 " * 16,
    ]


def mutate(whole: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Change a file one to eight times: bits, bytes, integers, cuts, and pieces of itself or of ``other``."""
    data = bytearray(whole)
    for _ in range(rng.integers(1, 9)):
        length = len(data)
        if length < 8:
            break
        # Half of the changes affect the header.
        place = int(rng.integers(min(length, 200) if rng.random() < 0.5 else length))
        match int(rng.integers(8)):
            case 0 | 1:
                data[place] ^= 1 << int(rng.integers(8))
            case 2:
                data[place] = int(rng.integers(256))
            case 3:  # an integer of two or four bytes, mostly at the limits of its range
                width = int(rng.choice([2, 4]))
                value = int(rng.choice([0, 1, 0x7F, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
                order: Literal["little", "big"] = "little" if rng.random() < 0.5 else "big"
                data[place : place + width] = (value & (256**width - 1)).to_bytes(width, order)
            case 4:
                del data[place:]
            case 5:
                del data[place : place + int(rng.integers(1, 64))]
            case 6:
                source = other if rng.random() < 0.5 else whole
                start = int(rng.integers(len(source)))
                data[place:place] = source[start : start + int(rng.integers(1, 400))]
            case _:
                start = int(rng.integers(length))
                part = data[start : start + int(rng.integers(1, 64))]
                data[place : place + len(part)] = part
    return bytes(data)


def refusal(data: bytes) -> UndecodableImage:
    """Return the error of decoding the data, which must fail with one line."""
    with pytest.raises(UndecodableImage) as caught:
        decode(data, "holiday/1.jpg")
    assert str(caught.value).startswith(f"holiday/1.jpg cannot be read: {caught.value.cause}; remove it")
    assert "\n" not in caught.value.cause
    return caught.value
