"""Multi-crop augmentation: distributions, pixels and reproducibility."""

from __future__ import annotations

import collections
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import stats
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from dino_xcit.augment import MultiCropAugmentation, ViewKind, ViewParameters, group_by_size
from dino_xcit.errors import InputError

SAMPLES = 1500
GLOBAL_1, GLOBAL_2, LOCAL = 0, 1, 2  # indices of the views in a sample


@pytest.fixture(scope="module")
def drawn() -> list[list[ViewParameters]]:
    """Parameters of DINO's augmentation for many images of 500 x 375 pixels: two global and two local views each."""
    augmentation = MultiCropAugmentation(local_crops_number=2)
    return [augmentation.draw(500, 375, seed=0, epoch=0, index=index) for index in range(SAMPLES)]


def share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


def binomial(probability: float, count: int = SAMPLES) -> Any:
    """Expect a binomial share within five std; 0 and 1 exactly."""
    return pytest.approx(probability, abs=5 * math.sqrt(probability * (1 - probability) / count))


def test_default_views_match_dino() -> None:
    views = MultiCropAugmentation().views
    assert views[0] == ViewKind(224, (0.4, 1.0), 1.0, 0.0)
    assert views[1] == ViewKind(224, (0.4, 1.0), 0.1, 0.2)
    assert views[2:] == [ViewKind(96, (0.05, 0.4), 0.5, 0.0)] * 8


@pytest.mark.parametrize(
    ("view", "blur", "solarize"), [(GLOBAL_1, 1.0, 0.0), (GLOBAL_2, 0.1, 0.2), (LOCAL, 0.5, 0.0), (LOCAL + 1, 0.5, 0.0)]
)
def test_operations_occur_with_their_probabilities(
    drawn: list[list[ViewParameters]], view: int, blur: float, solarize: float
) -> None:
    views = [sample[view] for sample in drawn]
    assert share([v.flip for v in views]) == binomial(0.5)
    assert share([bool(v.jitter) for v in views]) == binomial(0.8)
    assert share([v.gray for v in views]) == binomial(0.2)
    assert share([v.blur_radius is not None for v in views]) == binomial(blur)
    assert share([v.solarize for v in views]) == binomial(solarize)


def test_operations_and_views_are_drawn_independently(drawn: list[list[ViewParameters]]) -> None:
    flags = np.array(
        [[f for v in sample for f in (v.flip, bool(v.jitter), v.gray, v.blur_radius is None)] for sample in drawn],
        dtype=float,
    ).T
    flags = flags[flags.std(axis=1) > 0]  # the first global view is always blurred
    assert len(flags) == 15
    correlation = np.corrcoef(flags) - np.eye(len(flags))
    assert np.abs(correlation).max() < 5 / math.sqrt(SAMPLES)


def test_operation_probabilities_are_configurable() -> None:
    augmentation = MultiCropAugmentation(
        local_crops_number=1, flip=0.0, jitter=1.0, gray=1.0, global_blur=(0.0, 1.0), local_blur=0.0, solarize=1.0
    )
    for index in range(50):
        views = augmentation.draw(50, 40, 0, 0, index)
        assert not any(v.flip for v in views)
        assert all(v.gray and len(v.jitter) == 4 for v in views)
        assert [v.blur_radius is not None for v in views] == [False, True, False]
        assert [v.solarize for v in views] == [False, True, False]


@pytest.mark.parametrize(
    ("size", "view"), [((500, 375), GLOBAL_1), ((500, 375), LOCAL), ((60, 400), GLOBAL_2), ((33, 30), LOCAL)]
)
def test_crop_distribution_matches_torchvision(size: tuple[int, int], view: int) -> None:
    scale = [0.05, 0.4] if view == LOCAL else [0.4, 1.0]
    augmentation = MultiCropAugmentation(local_crops_number=1)
    views = [augmentation.draw(*size, 3, 0, index)[view] for index in range(SAMPLES)]
    ours = np.array([(v.top, v.left, v.height, v.width) for v in views]).T
    picture = Image.new("L", size)
    theirs = np.array([RandomResizedCrop.get_params(picture, scale, [3 / 4, 4 / 3]) for _ in range(SAMPLES)]).T  # type: ignore[arg-type]
    for name, a, b in zip(("top", "left", "height", "width"), ours, theirs, strict=True):
        assert stats.ks_2samp(a, b).pvalue > 1e-3, f"{name} differs"
    assert stats.ks_2samp(ours[2] * ours[3], theirs[2] * theirs[3]).pvalue > 1e-3, "area differs"
    assert stats.ks_2samp(ours[3] / ours[2], theirs[3] / theirs[2]).pvalue > 1e-3, "aspect ratio differs"


def test_crops_reach_every_image_border() -> None:
    augmentation = MultiCropAugmentation(local_crops_number=1)
    crops = [augmentation.draw(6, 6, 0, 0, index)[LOCAL] for index in range(200)]
    assert (min(v.top for v in crops), max(v.top + v.height for v in crops)) == (0, 6)
    assert (min(v.left for v in crops), max(v.left + v.width for v in crops)) == (0, 6)


def test_jitter_orders_are_equally_likely(drawn: list[list[ViewParameters]]) -> None:
    orders = collections.Counter(
        tuple(name for name, _ in view.jitter) for sample in drawn for view in sample if view.jitter
    )
    assert set(orders) == set(itertools.permutations(("brightness", "contrast", "saturation", "hue")))
    assert stats.chisquare(list(orders.values())).pvalue > 1e-3


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1)],
)
def test_jitter_factors_are_uniform(drawn: list[list[ViewParameters]], name: str, least: float, most: float) -> None:
    factors = np.array([dict(view.jitter)[name] for sample in drawn for view in sample if view.jitter])
    assert stats.kstest((factors - least) / (most - least), "uniform").pvalue > 1e-3
    assert least <= factors.min() < least + 0.01 * (most - least)
    assert most - 0.01 * (most - least) < factors.max() <= most


def test_blur_radius_is_uniform_over_its_range(drawn: list[list[ViewParameters]]) -> None:
    radii = np.array([view.blur_radius for sample in drawn for view in sample if view.blur_radius is not None])
    assert stats.kstest((radii - 0.1) / 1.9, "uniform").pvalue > 1e-3


def by_torchvision(image: Image.Image, size: int, v: ViewParameters) -> Image.Image:
    """Apply DINO's pipeline with given parameters, with torchvision's functions on Pillow images."""
    view = TF.resized_crop(image, v.top, v.left, v.height, v.width, [size, size], InterpolationMode.BICUBIC)
    if v.flip:
        view = TF.hflip(view)
    for name, factor in v.jitter:
        view = getattr(TF, f"adjust_{name}")(view, factor)
    if v.gray:
        view = TF.rgb_to_grayscale(view, num_output_channels=3)
    if v.blur_radius is not None:
        view = view.filter(ImageFilter.GaussianBlur(radius=v.blur_radius))
    if v.solarize:
        view = TF.solarize(view, 128)
    return view


def test_view_pixels_match_torchvision_for_equal_parameters(photo: Image.Image) -> None:
    """This covers the order of operations: with several operations, another order gives other pixels."""
    augmentation = MultiCropAugmentation(
        local_crops_number=2, global_crops_size=40, local_crops_size=17, solarize=0.5, global_blur=(0.5, 0.5)
    )
    seen: collections.Counter[str] = collections.Counter()
    for index in range(60):
        parameters = augmentation.draw(photo.width, photo.height, 0, 4, index)
        views = augmentation(photo, seed=0, epoch=4, index=index)
        for kind, drawn_view, view in zip(augmentation.views, parameters, views, strict=True):
            expected = by_torchvision(photo, kind.size, drawn_view)
            assert view.dtype is torch.uint8
            np.testing.assert_array_equal(view.permute(1, 2, 0).numpy(), np.asarray(expected))
            names = ("flip", "jitter", "gray", "blur_radius", "solarize")
            drawn_names = [name for name in names if getattr(drawn_view, name)]
            seen.update([*drawn_names, *map("+".join, itertools.combinations(drawn_names, 2))])
    assert len(seen) == 5 + 10  # each operation and each pair of operations


def test_views_are_reproducible_despite_global_random_state(photo: Image.Image) -> None:
    first = MultiCropAugmentation(global_crops_size=24, local_crops_size=12)(photo, seed=3, epoch=2, index=77)
    torch.manual_seed(99)
    np.random.seed(99)  # user code may set global seeds
    again = MultiCropAugmentation(global_crops_size=24, local_crops_size=12)(photo, seed=3, epoch=2, index=77)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_seed_epoch_and_index_each_change_the_views() -> None:
    augmentation = MultiCropAugmentation()
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 1, 2), (0, 2, 1)]
    keys += [(2**63, 0, 0), (2**63 + 1, 0, 0), (0, 0, 2**31)]
    views = [tuple(augmentation.draw(400, 300, *key)) for key in keys]
    assert len(set(views)) == len(keys)
    for sample in views:
        assert len(set(sample)) == 10  # the views of a sample differ from one another


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (3, 2000), (2000, 3), (2, 2)])
def test_extreme_image_shapes_give_valid_views(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    augmentation = MultiCropAugmentation(local_crops_number=2, global_crops_size=16, local_crops_size=8)
    for index in range(20):
        for v in augmentation.draw(*size, 0, 0, index):
            assert 0 <= v.top < v.top + v.height <= size[1]
            assert 0 <= v.left < v.left + v.width <= size[0]
        assert [view.shape[-1] for view in augmentation(Image.fromarray(pixels), index=index)] == [16, 16, 8, 8]


@pytest.mark.parametrize(
    ("size", "crop"), [((1000, 10), (0, 493, 10, 13)), ((10, 1000), (493, 0, 13, 10))], ids=["wide", "tall"]
)
def test_largest_centred_crop_is_used_if_no_random_crop_fits(
    size: tuple[int, int], crop: tuple[int, int, int, int]
) -> None:
    """Like torchvision: an image of 1000 x 10 pixels gives a centred 4:3 crop."""
    view = MultiCropAugmentation(global_crops_scale=(1.0, 1.0)).draw(*size, 0, 0, 0)[GLOBAL_1]
    assert (view.top, view.left, view.height, view.width) == crop


def test_views_are_grouped_by_size_in_order_of_appearance() -> None:
    assert group_by_size([224, 224, 96, 96, 96]) == [[0, 1], [2, 3, 4]]
    assert group_by_size([96, 96, 96]) == [[0, 1, 2]]
    assert group_by_size([224, 96, 224]) == [[0, 2], [1]]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("setting", [
    {"global_crops_scale": (0.0, 1.0)}, {"global_crops_scale": (0.8, 0.4)}, {"local_crops_scale": (0.05, 1.5)},
    {"local_crops_scale": (NAN, 0.4)}, {"crop_ratio": (0.0, 1.0)}, {"crop_ratio": (1.0, INF)},
    {"global_crops_size": 0}, {"local_crops_size": -1}, {"local_crops_number": -1},
    {"flip": 1.1}, {"jitter": -0.1}, {"gray": NAN}, {"global_blur": (0.5, 1.5)}, {"global_blur": (-0.5, 0.5)},
    {"local_blur": 2.0}, {"solarize": -1.0}, {"hue": 0.6}, {"hue": -0.1}, {"brightness": -1.0}, {"brightness": 1e39},
    {"contrast": NAN}, {"saturation": -0.2}, {"blur_radius": (-1.0, 2.0)}, {"blur_radius": (2.0, 1.0)},
    {"blur_radius": (0.1, 1e8)}, {"blur_radius": (NAN, NAN)},
])  # fmt: skip
def test_invalid_setting_is_refused_by_name(setting: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(setting))} is "):
        MultiCropAugmentation(**setting)
