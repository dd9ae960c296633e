"""The fast JPEG path of decode_pixels returns the same pixels, or raises the same error, as decode with Pillow."""

from __future__ import annotations

import json
from unittest.mock import Mock

import numpy as np
import pytest
import simplejpeg
from bad_images import HEIGHT, ODDITIES, WIDTH, encoded, files_of_all_formats, mutate, photograph, sideways, undecodable
from ranks import Server

from dino_xcit.data.decode import UndecodableImage, decode, decode_pixels
from dino_xcit.data.source import Item


def outcome(item: Item, *, short: bool) -> bytes | str:
    try:
        if short:
            return np.ascontiguousarray(decode_pixels(item, "it")[..., :3]).tobytes()
        return np.asarray(decode(item, "it")).tobytes()
    except UndecodableImage as error:
        return str(error)


@pytest.mark.parametrize("kind", sorted(ODDITIES))
def test_decode_pixels_equals_decode_for_unusual_images(kind: str) -> None:
    data = ODDITIES[kind](photograph(4))
    assert outcome(data, short=True) == outcome(data, short=False)
    assert decode_pixels(data, kind).shape == (*np.asarray(decode(data, kind)).shape[:2], 4)


@pytest.mark.parametrize("kind", sorted(undecodable(photograph(4), 4)))
def test_decode_pixels_and_decode_refuse_bad_images_alike(kind: str) -> None:
    data = undecodable(photograph(4), 4)[kind]
    found = outcome(data, short=True)
    assert found == outcome(data, short=False)
    assert isinstance(found, str)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [5, 75, 100])
def test_decode_pixels_equals_decode_for_every_kind_of_jpeg(subsampling: str, progressive: bool, quality: int) -> None:
    for width, height in ((97, 61), (16, 16), (1, 1), (7, 300)):
        image = photograph(6).resize((width, height))
        data = encoded(image, "JPEG", subsampling=subsampling, progressive=progressive, quality=quality)
        assert outcome(data, short=True) == outcome(data, short=False)
    kept_as_rgb = encoded(photograph(6), "JPEG", keep_rgb=True)
    assert outcome(kept_as_rgb, short=True) == outcome(kept_as_rgb, short=False)


@pytest.mark.parametrize("sampling", range(256))
def test_decode_pixels_equals_decode_for_every_sampling_factor(sampling: int) -> None:
    data = bytearray(encoded(photograph(6).resize((32, 32)), "JPEG"))
    data[data.index(b"\xff\xc0") + 11] = sampling  # sampling factors of the first component
    assert outcome(bytes(data), short=True) == outcome(bytes(data), short=False)


def test_plain_jpeg_takes_fast_path_and_rotated_jpeg_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    short_way = Mock(side_effect=simplejpeg.decode_jpeg)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", short_way)
    decode_pixels(encoded(photograph(1), "JPEG"), "plain")
    assert short_way.call_count == 1
    assert decode_pixels(sideways(photograph(1)), "turned").shape[:2] == (HEIGHT, WIDTH)
    assert short_way.call_count == 1


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_decode_pixels_equals_decode_for_arrays(shape: tuple[int, ...]) -> None:
    item = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert outcome(item, short=True) == outcome(item, short=False)


def compare_mutants(count: int) -> None:
    """Compare both decoders on mutated JPEGs. Call it in a separate process, because a library may crash."""
    rng = np.random.default_rng(12)
    jpegs = [data for data in files_of_all_formats(12) if data[:2] == b"\xff\xd8"]
    jpegs += [encoded(photograph(seed), "JPEG", progressive=bool(seed % 2)) for seed in range(6)]
    pictures = 0
    for number in range(count):
        data = mutate(jpegs[number % len(jpegs)], jpegs[int(rng.integers(len(jpegs)))], rng)
        found = outcome(data, short=True)
        assert found == outcome(data, short=False), number
        pictures += isinstance(found, bytes)
    print(json.dumps({"pictures": pictures}))


@pytest.mark.parametrize("count", [600, pytest.param(12_000, marks=pytest.mark.slow)])
def test_decode_pixels_equals_decode_for_mutated_jpegs(server: Server, count: int) -> None:
    code = f"import test_decode_pixels; test_decode_pixels.compare_mutants({count})"
    done = server.python("-c", code, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert count / 12 < json.loads(done.stdout.splitlines()[-1])["pictures"] < count * 11 / 12
