"""Photometric operations on host and device: bitwise equal to Pillow, and to torchvision on Pillow images."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as TF

from dino_xcit.augment import MultiCropAugmentation, ViewMaker
from dino_xcit.augment import parameters as column
from dino_xcit.augment.photometric import HUE, finish_view, scratch_size

HAS_TRITON = importlib.util.find_spec("triton") is not None  # missing beside CPU builds of PyTorch
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
NONE = [-1.0, 1.0] * 4


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreting a program takes the same time for all sizes of its block."""
    if HAS_TRITON:
        monkeypatch.setattr("dino_xcit.kernels.photometric.BLOCK", 1 << 16)


def finish_on_device(views: NDArray[np.uint8], rows: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the finished views [n, 3, height, width]."""
    from dino_xcit.kernels.photometric import finish_views

    finished = torch.from_numpy(views.copy())
    finish_views(finished, torch.from_numpy(column.device_plan(rows)))
    return finished.numpy()


def planes(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image).transpose(2, 0, 1).copy()


def pictures(photo: Image.Image) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    dark = (noise // 100).astype(np.uint8)
    return [photo, Image.fromarray(noise), Image.fromarray(dark), Image.fromarray(255 - dark)]


def finish(
    image: Image.Image, jitter: list[float], gray: bool = False, sigma: float = -1.0, solarize: bool = False
) -> NDArray[np.uint8]:
    """Finish one view with both implementations and assert that they agree."""
    view = planes(image)
    row = np.zeros(column.COLUMNS)
    row[column.JITTER], row[column.GRAY], row[column.SIGMA], row[column.SOLARIZE] = jitter, gray, sigma, solarize
    given = view.copy()
    scratch = np.empty(scratch_size(max(view.shape), sigma), dtype=np.uint8)
    finish_view(view, scratch, np.array(jitter), gray, sigma, solarize)
    if HAS_TRITON:
        np.testing.assert_array_equal(finish_on_device(given[None], row[None])[0], view)
    return view


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.999, 1.0, 1.37, 2.5, 40.0])
@pytest.mark.parametrize(
    ("code", "by_torchvision"),
    [(0, TF.adjust_brightness), (1, TF.adjust_contrast), (2, TF.adjust_saturation)],
    ids=["brightness", "contrast", "saturation"],
)
def test_jitter_blends_match_torchvision_bitwise(
    photo: Image.Image, code: int, by_torchvision: Callable[[Image.Image, float], Image.Image], factor: float
) -> None:
    for image in pictures(photo):
        expected = planes(by_torchvision(image, factor))
        np.testing.assert_array_equal(finish(image, [code, factor, *NONE[2:]]), expected)


@pytest.fixture(scope="module", params=["a million", pytest.param("all", marks=pytest.mark.slow)])
def colours(request: pytest.FixtureRequest) -> NDArray[np.uint8]:
    """Colours [3, rows, 4096]: a million random ones, or all 2**24."""
    number = np.arange(1 << 24, dtype=np.uint32)
    if request.param == "a million":
        number = np.random.default_rng(1).choice(number, 1 << 20, replace=False)
    channels = np.stack([number & 255, (number >> 8) & 255, number >> 16]).astype(np.uint8)
    return channels.reshape(3, -1, 4096)


@pytest.mark.parametrize("factor", [-0.1, 0.0, 0.037, 0.5])
def test_hue_matches_torchvision_bitwise_for_all_colours(colours: NDArray[np.uint8], factor: float) -> None:
    image = Image.fromarray(np.ascontiguousarray(colours.transpose(1, 2, 0)))
    view = colours.copy()
    finish_view(view, np.empty(0, dtype=np.uint8), np.array([HUE, factor, *NONE[2:]]), False, -1.0, False)
    assert np.array_equal(view, np.asarray(TF.adjust_hue(image, factor)).transpose(2, 0, 1))


@needs_triton
def test_finish_views_hue_matches_host_bitwise_for_all_colours(colours: NDArray[np.uint8]) -> None:
    views = colours.reshape(3, -1, 256, 256).transpose(1, 0, 2, 3).copy()
    row = np.zeros((len(views), column.COLUMNS))
    row[:, column.JITTER], row[:, column.SIGMA] = [HUE, -0.07, *NONE[2:]], -1
    for view, expected in zip(views, finish_on_device(views, row), strict=True):
        finish_view(view, np.empty(0, dtype=np.uint8), np.array([HUE, -0.07, *NONE[2:]]), False, -1.0, False)
        assert np.array_equal(view, expected)


def test_hue_matches_torchvision_bitwise_for_all_shifts() -> None:
    noise = np.random.default_rng(2).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    for factor in np.linspace(-0.5, 0.5, 301):
        expected = planes(TF.adjust_hue(image, float(factor)))
        np.testing.assert_array_equal(finish(image, [HUE, float(factor), *NONE[2:]]), expected)


def test_gray_and_solarize_match_pillow_bitwise(photo: Image.Image) -> None:
    for image in pictures(photo):
        gray = image.convert("L").convert("RGB")
        np.testing.assert_array_equal(finish(image, NONE, gray=True), planes(gray))
        np.testing.assert_array_equal(finish(image, NONE, solarize=True), planes(ImageOps.solarize(image, 128)))
        both = ImageOps.solarize(gray, 128)
        np.testing.assert_array_equal(finish(image, NONE, gray=True, solarize=True), planes(both))


@pytest.mark.parametrize("sigma", [*np.linspace(0.0, 2.0, 21), 2.3, 2.6, 3.0, 4.7, 9.0])
def test_blur_matches_pillow_bitwise(sigma: float) -> None:
    """Includes image borders, and images narrower than the blur."""
    rng = np.random.default_rng(3)
    for width, height in ((83, 61), (30, 40), (5, 3), (1, 1)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = planes(image.filter(ImageFilter.GaussianBlur(float(sigma))))
        np.testing.assert_array_equal(finish(image, NONE, sigma=float(sigma)), expected)


@needs_triton
def test_finish_views_of_whole_batch_matches_host_bitwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino_xcit.kernels.photometric.BLOCK", 1024)  # several programs for each view
    settings: dict[str, Any] = {"global_crops_size": 48, "local_crops_size": 20, "solarize": 0.5, "hue": 0.5}
    augmentation = MultiCropAugmentation(local_crops_number=20, blur_radius=(0.1, 5.0), **settings)
    maker, rng = ViewMaker(), np.random.default_rng(4)
    for index in range(5):
        picture = rng.integers(0, 256, (80, 100, 4), dtype=np.uint8)
        maker.load(picture)
        rows = augmentation.draw_rows(100, 80, 0, 0, index)
        for part in (slice(0, 2), slice(2, None)):
            size = augmentation.views[part][0].size
            whole = np.empty((len(rows[part]), 3, size, size), dtype=np.uint8)
            cut = whole.copy()
            for row, view, unfinished in zip(rows[part], whole, cut, strict=True):
                maker.make(row, view)
                maker.make(row, unfinished, photometric=False)
            np.testing.assert_array_equal(finish_on_device(cut, rows[part]), whole)
