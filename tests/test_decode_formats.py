"""Every format becomes the same RGB picture, and what is damaged is refused by name."""

from __future__ import annotations

import io

import numpy as np
import pytest
from bad_images import encoded
from PIL import Image

from dino_xcit.data import UndecodableImage, decode
from dino_xcit.errors import InputError


@pytest.mark.parametrize(
    ("format_name", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("PPM", {}),
        ("WEBP", {"lossless": True}),
        ("JPEG", {"quality": 100, "subsampling": 0}),
    ],
)
def test_every_format_gives_the_same_rgb_picture(
    photo: Image.Image, format_name: str, options: dict[str, object]
) -> None:
    picture = decode(encoded(photo, format_name, **options), "x")
    assert picture.mode == "RGB"
    assert picture.size == photo.size
    error = np.abs(np.asarray(picture, dtype=int) - np.asarray(photo, dtype=int))
    assert error.mean() < (3 if format_name == "JPEG" else 1e-9)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_a_palette_with_transparency_keeps_its_colours(photo: Image.Image) -> None:
    palette = photo.quantize(32)
    data = encoded(palette, "PNG", transparency=bytes([0, 128] + [255] * 30))
    assert Image.open(io.BytesIO(data)).mode == "P"
    np.testing.assert_array_equal(np.asarray(decode(data, "x")), np.asarray(palette.convert("RGB")))


def test_alpha_grey_and_single_bit_pictures_become_rgb(photo: Image.Image) -> None:
    for mode in ("RGBA", "LA", "L", "1"):
        picture = decode(encoded(photo.convert(mode), "PNG"), mode)
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(photo.convert(mode).convert("RGB")))
    rgba = photo.convert("RGBA")
    rgba.putalpha(0)  # even where all is transparent, the colours are there
    np.testing.assert_array_equal(np.asarray(decode(encoded(rgba, "PNG"), "x")), np.asarray(photo))


def test_a_cmyk_jpeg_becomes_rgb(photo: Image.Image) -> None:
    data = encoded(photo.convert("CMYK"), "JPEG", quality=98)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    picture = decode(data, "x")
    assert picture.mode == "RGB"
    assert np.abs(np.asarray(picture, dtype=int) - np.asarray(photo, dtype=int)).mean() < 6


def test_sixteen_bit_grey_is_scaled_and_not_cut_off() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for format_name in ("PNG", "TIFF"):
        picture = np.asarray(decode(encoded(Image.fromarray(ramp), format_name), "x"))
        assert np.abs(picture[..., 0].astype(float) - ramp / 257).max() <= 1
        assert (picture[..., 0] == picture[..., 2]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(photo: Image.Image, orientation: int) -> None:
    turned_by = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored turned to the left: tag 6 says "turn to the right"
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = photo.transpose(turned_by[orientation]) if orientation in turned_by else photo
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(decode(encoded(stored, "PNG", exif=exif), "x")), np.asarray(photo))
    assert decode(encoded(stored, "JPEG", exif=exif), "x").size == photo.size


def test_the_first_frame_of_an_animation_is_taken(photo: Image.Image) -> None:
    frames = [photo.convert("P"), Image.new("P", photo.size)]
    picture = decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "x")
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(frames[0].convert("RGB")))


def test_arrays_are_pictures_already() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.asarray(decode(grey, "x")).tolist() == np.stack([grey] * 3, axis=-1).tolist()
    colour = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    np.testing.assert_array_equal(np.asarray(decode(colour, "x")), colour)


def damaged(photo: Image.Image) -> dict[str, bytes]:
    jpeg, png = encoded(photo, "JPEG"), encoded(photo, "PNG")
    return {
        "empty": b"",
        "html": b"<!DOCTYPE html><html><body>404 not found</body></html>",
        "text": b"hello",
        "zeros": bytes(1000),
        "jpeg cut in half": jpeg[: len(jpeg) // 2],
        "jpeg header only": jpeg[:20],
        "png cut in half": png[: len(png) // 2],
        "png without its end": png[:60],
        "png with a broken checksum": png[:16] + b"\x7f" + png[17:],
        "pdf": encoded(photo, "PDF"),
        "ico, a format not on the list": encoded(photo, "ICO"),
    }


@pytest.mark.parametrize("kind", list(damaged(Image.new("RGB", (20, 20)))))
def test_what_is_no_image_is_named_with_its_cause(photo: Image.Image, kind: str) -> None:
    with pytest.raises(UndecodableImage, match=r"^photos/bad\.jpg cannot be read: ") as caught:
        decode(damaged(photo)[kind], "photos/bad.jpg")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, InputError)


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # the real limit would need a picture of 180 megapixels
    with pytest.raises(UndecodableImage, match="bomb"):
        decode(encoded(Image.new("RGB", (100, 100)), "PNG"), "x")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM"])
def test_random_damage_never_escapes_as_another_error(photo: Image.Image, format_name: str) -> None:
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if format_name in ("JPEG", "PNG", "WEBP") else {}
    whole = encoded(photo, format_name, **options)
    refused = 0
    for _ in range(120):
        data = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.3 else whole)
        for place in rng.integers(0, max(1, min(len(data), 400)), size=rng.integers(1, 8)):
            if data:
                data[place] = rng.integers(256)
        try:
            assert decode(bytes(data), "x").mode == "RGB"
        except UndecodableImage:
            refused += 1
    assert refused > 10
