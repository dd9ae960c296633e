"""Odd images become what they should, bad ones are refused with their cause, and neither costs much memory."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_images import (
    HEIGHT,
    ODDITIES,
    WIDTH,
    encoded,
    files_of_all_formats,
    mutate,
    photograph,
    png,
    png_chunk,
    undecodable,
    write_corpus,
)
from numpy.typing import NDArray
from PIL import Image, ImageFile

from dino_xcit.data.decode import FORMATS, MAX_PIXELS, UndecodableImage, decode
from dino_xcit.errors import InputError


def pixels(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image).astype(np.int64)


def refusal(data: bytes) -> UndecodableImage:
    with pytest.raises(UndecodableImage) as caught:
        decode(data, "holiday/1.jpg")
    assert str(caught.value).startswith(f"holiday/1.jpg cannot be read: {caught.value.cause}; remove it")
    assert "\n" not in caught.value.cause
    return caught.value


# ---- what is decoded

GREY = ("grey.jpg", "grey with alpha.png", "sixteen bits.png")
EXACT = ("grey with alpha.png", "sixteen bits.png", "animated.webp", "plain.tif", "packed.tif", "plain.bmp")


@pytest.mark.parametrize("kind", sorted(ODDITIES))
def test_odd_images_become_the_photograph_they_were_made_of(kind: str) -> None:
    """In its colours, upright, and the first frame of animations, whose second one is black."""
    photo = photograph(4)
    wanted = photo.convert("L").convert("RGB") if kind in GREY else photo
    picture = decode(ODDITIES[kind](photo), kind)
    assert (picture.mode, picture.size) == ("RGB", (WIDTH, HEIGHT))
    error = np.abs(pixels(picture) - pixels(wanted))
    if kind == "one bit.png":
        assert set(np.unique(pixels(picture))) == {0, 255}
        assert abs(pixels(picture).mean() - pixels(photo.convert("L")).mean()) < 8
    else:
        assert error.mean() < (1e-9 if kind in EXACT else 16), error.mean()
        # Another picture, a turned one or another frame would be much farther away.
        assert error.mean() < np.abs(pixels(picture) - pixels(wanted.rotate(180))).mean() / 2


def test_transparent_parts_keep_the_colours_that_are_stored() -> None:
    photo = photograph(5)
    clear = photo.convert("RGBA")
    clear.putalpha(0)
    for format_name, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        assert (pixels(decode(encoded(clear, format_name, **options), "x")) == pixels(photo)).all()
    palette = photo.quantize(16)
    wanted = pixels(palette.convert("RGB"))
    for transparency in (3, bytes([0, 7] * 8)):
        assert (pixels(decode(encoded(palette, "PNG", transparency=transparency), "x")) == wanted).all()


def test_sixteen_bits_of_grey_are_scaled_in_every_format() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    files = [encoded(Image.fromarray(ramp), format_name) for format_name in ("PNG", "TIFF")]
    files.append(b"P5 8 8 65535\n" + ramp.astype(">u2").tobytes())
    for data in files:
        assert (pixels(decode(data, "x"))[..., 1] == ramp >> 8).all()


def test_channels_of_which_white_is_not_known_are_refused() -> None:
    for mode in ("F", "I"):
        assert "32 bits a channel" in refusal(encoded(Image.new(mode, (4, 4), 1), "TIFF")).cause


def test_the_picture_does_not_hold_its_file() -> None:
    assert type(decode(encoded(photograph(1), "PNG"), "x")) is Image.Image


# ---- what is refused

CAUSES = {
    "cut short.jpg": "ends before the picture is complete",
    "cut short.png": "Truncated",
    "empty.jpg": "^empty file$",
    "web page.jpg": "^a web page, not an image$",
    "noise.jpg": r"^not an image in a known format \(JPEG, PNG, ",
    "claims to be large.png": "^too many pixels: .*2500000000 pixels",
    "large.png": "^too many pixels: 13000 x 13000, more than 160,000,000$",
    "text bomb.png": "too large",
}


@pytest.mark.parametrize("kind", sorted(CAUSES))
def test_bad_files_are_refused_with_their_cause(kind: str) -> None:
    error = refusal(undecodable(photograph(4), 4)[kind])
    assert isinstance(error, InputError)
    with pytest.raises(UndecodableImage, match=CAUSES[kind]):
        raise UndecodableImage(error.cause)


def test_the_corpus_is_what_it_says_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    good, bad = write_corpus(tmp_path / "a", 30, seed=3)
    assert (len(good), len(bad)) == (30, len(CAUSES))
    assert sorted(good + bad) == sorted((tmp_path / "a").iterdir())
    assert {path.name[6:] for path in good} == {*ODDITIES, "photo.jpg", "photo.png"}
    for path in good:
        assert decode(path.read_bytes(), path.name).size == (WIDTH, HEIGHT)
    for path in bad:
        refusal(path.read_bytes())
    again = write_corpus(tmp_path / "b", 30, seed=3)
    assert [path.name for path in again[0] + again[1]] == [path.name for path in good + bad]
    assert all((tmp_path / "b" / path.name).read_bytes() == path.read_bytes() for path in good + bad)
    other = write_corpus(tmp_path / "c", 30, seed=4)
    assert [path.name for path in other[0]] != [path.name for path in good]


WHOLE: dict[str, dict[str, Any]] = {
    "JPEG": {},
    "PNG": {},
    "WEBP": {},
    "BMP": {},
    "GIF": {},
    "TIFF": {},
    "PPM": {},
    "progressive JPEG": {"progressive": True},
    "packed TIFF": {"compression": "tiff_lzw"},
}


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("kind", list(WHOLE))
def test_a_file_cut_anywhere_is_never_half_a_picture(kind: str, lenient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where other code has told Pillow to fill up what is missing. Only what follows the last pixel may lack."""
    data = encoded(photograph(6), kind.split()[-1], **WHOLE[kind])
    whole = pixels(decode(data, "whole"))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    refused = 0
    for length in [*range(0, len(data), max(1, len(data) // 60)), *range(len(data) - 40, len(data))]:
        try:
            assert (pixels(decode(data[:length], "cut")) == whole).all(), length
        except UndecodableImage:
            refused += 1
        else:
            assert length >= len(data) - 4, f"{len(data) - length} bytes lack"
    assert refused >= 90
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


def test_a_png_whose_pixels_do_not_fit_their_checksum_is_refused() -> None:
    data = bytearray(png(64, 64, bytes(64 * 65)))
    assert decode(bytes(data), "x").size == (64, 64)
    data[-15] ^= 1  # of the checksum of the last piece of the pixels
    assert "checksum" in refusal(bytes(data)).cause


def test_an_absurd_number_of_channels_is_called_a_damaged_header() -> None:
    data = bytearray(encoded(photograph(1), "JPEG"))
    start = data.index(b"\xff\xc0")
    for count in (0, 2, 5, 255):
        data[start + 9] = count
        assert "JPEG" in refusal(bytes(data)).cause


def test_damaged_exif_leaves_the_picture_as_it_is_stored(capfd: pytest.CaptureFixture[str]) -> None:
    photo = photograph(2)
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(20)):
        for format_name in ("PNG", "WEBP", "JPEG"):
            assert decode(encoded(photo, format_name, exif=exif), "x").size == (WIDTH, HEIGHT)
    assert capfd.readouterr() == ("", "")


def tiff(tags: Mapping[int, tuple[int, ...]], data: bytes) -> bytes:
    """A grey TIFF of 64 x 64 pixels with these tags besides, and data at byte 8."""
    entries, arrays = b"", b""
    base: dict[int, tuple[int, ...]] = {256: (64,), 257: (64,), 258: (8,), 259: (1,), 262: (1,), 277: (1,)}
    for tag, values in sorted((base | dict(tags)).items()):
        value = struct.pack(f"<{len(values)}L", *values)
        if len(values) > 1:
            value, arrays = struct.pack("<L", 8 + len(data) + len(arrays)), arrays + value
        entries += struct.pack("<HHL", tag, 4, len(values)) + value
    directory = struct.pack("<H", len(entries) // 12) + entries + bytes(4)
    return b"II*\0" + struct.pack("<L", 8 + len(data) + len(arrays)) + data + arrays + directory


def test_tiles_that_lie_about_their_size_or_number_are_refused() -> None:
    packed = zlib.compress(bytes(range(64)) * 64)
    tile = {259: (8,), 324: (8,), 325: (len(packed),)}
    ramp = decode(tiff(tile | {322: (64,), 323: (64,)}, packed), "x")
    assert pixels(ramp)[5, :, 0].tolist() == list(range(64))
    assert "tiles larger" in refusal(tiff(tile | {322: (65520,), 323: (65520,)}, packed)).cause

    plain = bytes(range(64)) * 64
    half = {278: (32,), 279: (64 * 32,) * 2}
    assert pixels(decode(tiff(half | {273: (8, 8 + 64 * 32)}, plain), "x"))[50, :, 0].tolist() == list(range(64))
    assert "more than once" in refusal(tiff(half | {273: (8, 8 + 64 * 32) * 5000}, plain)).cause


RAISED: list[Exception] = [
    IndexError("index out of range"),
    KeyError(259),
    TypeError("unsupported operand"),
    ZeroDivisionError("division by zero"),
    OverflowError("Python int too large"),
    RuntimeError("two\nlines " + "x" * 1000),
    RecursionError(),
    MemoryError(),
    AssertionError(),
]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_the_library_raises_becomes_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise error

    data = encoded(photograph(1), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    refused = refusal(data)
    assert type(error).__name__ in refused.cause or refused.cause == "not enough memory to decode it"
    assert len(refused.cause) < 300
    assert refused.__cause__ is None  # a traceback would keep what was decoded so far
    assert refused.__context__ is None


def test_an_interruption_is_none_of_the_images_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    data = encoded(photograph(1), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode(data, "x")


def test_the_cause_survives_the_way_between_processes() -> None:
    code = (
        "import pickle, sys; from dino_xcit.data.decode import UndecodableImage, decode\n"
        "try: decode(b'<html>', 'a b.jpg')\n"
        "except UndecodableImage as error: sys.stdout.buffer.write(pickle.dumps(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    error = pickle.loads(done.stdout)
    assert isinstance(error, UndecodableImage)
    assert error.cause == "a web page, not an image"
    assert str(error) == refusal(b"<html>").args[0].replace("holiday/1.jpg", "a b.jpg")
    assert UndecodableImage("a sentence").cause == "a sentence"


def test_nothing_of_the_librarys_doubts_reaches_the_screen(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And other code's warnings come as before."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)  # warned of, and no error up to twice that
    many_samples = encoded(photograph(1), "TIFF")
    at = many_samples.index((277).to_bytes(2, "little") + b"\x03\x00\x01\x00\x00\x00")
    many_samples = many_samples[: at + 8] + b"\xff\x00" + many_samples[at + 10 :]
    logger = logging.getLogger("PIL")
    root, level = logging.getLogger().handlers[:], logger.level
    logging.getLogger().handlers.clear()  # pytest's own would hide what Python prints where there are none
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            filters = warnings.filters[:]
            assert decode(encoded(photograph(1), "JPEG"), "x").size == (WIDTH, HEIGHT)
            refusal(many_samples)
            assert warnings.filters == filters
            with pytest.raises(UserWarning, match="mine"):
                warnings.warn("mine", stacklevel=1)
    finally:
        logging.getLogger().handlers[:] = root
    assert capfd.readouterr() == ("", "")
    assert logger.level == level


# ---- memory and time, in processes of their own


def in_a_process(function: Callable[[int], None], number: int) -> dict[str, float]:
    """What ``function`` of this file prints as JSON in its last line; a crash or an error fails the test."""
    here = Path(__file__)
    code = f"import {here.stem}; {here.stem}.{function.__name__}({number})"
    env = os.environ | {"PYTHONPATH": f"{here.parent.parent}{os.pathsep}{here.parent}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-3000:]}"
    report: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(function.__name__, number, report)
    return report


def peak_mb() -> float:
    """Of this process; getrusage's includes what the process that started it had, which would hide everything."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024


def decode_bombs(_: int) -> None:
    Image.MAX_IMAGE_PIXELS = None  # the limit of our own has to do
    note = png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(300_000_000), 9))
    webp = encoded(photograph(1), "WEBP", lossless=True)
    bombs = [
        *(data for kind, data in undecodable(photograph(1), 1).items() if "large" in kind or "bomb" in kind),
        png(20_000, 20_000, bytes(20_000 * 2501), bits=1),
        png(8, 8, bytes(72), note),
        webp[:21] + struct.pack("<L", 16_382 | 16_382 << 14) + webp[25:],
        b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\x01\0\0;",
        b"P6 60000 60000 255\n" + bytes(1000),
        b"BM" + bytes(8) + b"\x36\0\0\0\x28\0\0\0\x60\xea\0\0\x60\xea\0\0\1\0\x18\0" + bytes(1000),
    ]
    jpeg = bytearray(encoded(photograph(1), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    bombs.append(bytes(jpeg))
    before, slowest = peak_mb(), 0.0
    for data in bombs:
        started = time.perf_counter()
        assert refusal(data).cause.startswith(("too many pixels", "Decompressed data too large"))
        slowest = max(slowest, time.perf_counter() - started)
    print(json.dumps({"bombs": len(bombs), "before_mb": before, "more_mb": peak_mb() - before, "slowest_s": slowest}))


def test_bombs_are_refused_quickly_and_with_little_memory() -> None:
    report = in_a_process(decode_bombs, 0)
    assert report["bombs"] == 10
    assert report["more_mb"] < 100
    assert report["slowest_s"] < 2


def decode_mutants(count: int) -> None:
    rng = np.random.default_rng(11)
    files = files_of_all_formats(11)
    for whole in files:
        decode(whole, "whole")
    warnings.simplefilter("error")  # none may get out of the decoder
    before, begin, slowest = peak_mb(), time.perf_counter(), 0.0
    causes = Counter[str]()
    for number in range(count):
        data = mutate(files[number % len(files)], files[int(rng.integers(len(files)))], rng)
        started = time.perf_counter()
        try:
            picture = decode(data, f"mutant {number}")
        except UndecodableImage as error:
            cause = error.cause
        else:
            cause = "decoded"
            assert picture.mode == "RGB"
            assert picture.width * picture.height <= MAX_PIXELS
            picture.tobytes()
        assert cause, number
        assert cause.isprintable(), number
        causes[cause[:20]] += 1
        slowest = max(slowest, time.perf_counter() - started)
    report: dict[str, float] = {"decoded": causes.pop("decoded", 0), "refused": causes.total(), "causes": len(causes)}
    report |= {"before_mb": before, "peak_mb": peak_mb(), "seconds": time.perf_counter() - begin, "slowest_s": slowest}
    print(json.dumps(report))


# Of a hundred thousand some claim, and have, as many pixels as they may.
@pytest.mark.parametrize(
    ("count", "most_mb"), [(500, 1000), (10_000, 1000), pytest.param(100_000, 2500, marks=pytest.mark.slow)]
)
def test_mutated_images_end_in_a_picture_or_a_typed_error(count: int, most_mb: float) -> None:
    report = in_a_process(decode_mutants, count)
    assert report["decoded"] + report["refused"] == count
    assert report["decoded"] > count / 20
    assert report["refused"] > count / 2
    assert report["causes"] > 10
    assert report["peak_mb"] < most_mb
    assert report["slowest_s"] < 10


def test_every_allowed_format_is_among_the_mutated() -> None:
    formats = {Image.open(io.BytesIO(data)).format for data in files_of_all_formats(11)}
    assert formats == {*FORMATS, "MPO"}
