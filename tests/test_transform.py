"""The evaluation transform and normalisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import tiny_config
from torchvision import transforms

from dino_xcit.errors import InputError
from dino_xcit.transform import IMAGENET_MEAN, IMAGENET_STD, EvalTransform, normalise


def test_default_transform_equals_torchvision_pipeline(photo: Image.Image) -> None:
    pipeline = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    for image in (photo, photo.transpose(Image.Transpose.ROTATE_90), photo.resize((301, 299))):
        ours = EvalTransform()(image)
        assert ours.shape == (3, 224, 224)
        assert ours.dtype is torch.uint8
        torch.testing.assert_close(normalise(ours[None], IMAGENET_MEAN, IMAGENET_STD)[0], pipeline(image))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (40, 64)])
def test_crop_of_very_long_image_matches_resize_of_whole_image(
    interpolation: str, resize: int, crop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Mid-grey: Pillow clips after the first of its two passes, whose order depends on the sizes.
    grain = np.random.default_rng(0).integers(80, 176, (7, 300, 3), dtype=np.uint8)
    transform = EvalTransform(resize, crop, interpolation)
    for pixels in (grain, grain.transpose(1, 0, 2)):
        image = Image.fromarray(np.ascontiguousarray(pixels))
        ours = transform(image)
        with monkeypatch.context() as patch:
            patch.setattr("dino_xcit.transform.MAX_ASPECT", 1000)
            whole = transform(image)
        assert (ours.int() - whole.int()).abs().max() <= 2
    assert EvalTransform()(Image.new("RGB", (10_000_000, 1))).shape == (3, 224, 224)  # resized as a whole: 2 TB


def test_crop_larger_than_image_is_padded_with_black() -> None:
    out = EvalTransform(resize=10, crop=20)(Image.new("RGB", (10, 10), (200, 100, 50)))
    assert out.shape == (3, 20, 20)
    assert out[:, 0, 0].tolist() == [0, 0, 0]
    assert out[:, 10, 10].tolist() == [200, 100, 50]


def test_transform_round_trips_through_plain_values() -> None:
    transform = EvalTransform(72, 64, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    stored = transform.to_dict()
    assert EvalTransform.from_dict(stored) == transform
    as_lists = {name: list(value) if isinstance(value, tuple) else value for name, value in stored.items()}
    assert EvalTransform.from_dict(as_lists) == transform


@pytest.mark.parametrize(
    "broken",
    [
        {"resize": "large"}, {"resize": 0}, {"crop": 10**9}, {"crop": None}, {"crop": 10**5000},
        {"interpolation": "cubist"}, {"mean": [1.0]}, {"mean": [0.5, float("inf"), 0.5]}, {"mean": [10**400] * 3},
        {"std": None}, {"std": [0, 0, 0]}, {"std": [0.2, -1, 0.2]}, {"std": [float("nan")] * 3}, {"std": [1e-320] * 3},
    ],
)  # fmt: skip
def test_invalid_stored_transform_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(InputError, match="evaluation transform"):
        EvalTransform.from_dict(EvalTransform().to_dict() | broken)
    for nothing in ({}, [], 3):
        with pytest.raises(InputError, match="evaluation transform"):
            EvalTransform.from_dict(nothing)  # type: ignore[arg-type]


def test_eval_transform_of_run_keeps_256_to_224_ratio_by_default() -> None:
    assert tiny_config(global_crops_size=224).eval_transform().resize == 256
    assert tiny_config(global_crops_size=224).eval_transform().crop == 224
    own = tiny_config(eval_resize=30, eval_crop=28, mean=(0.1, 0.2, 0.3)).eval_transform()
    assert (own.resize, own.crop, own.mean) == (30, 28, (0.1, 0.2, 0.3))


@pytest.mark.parametrize("stored", [{}, {"white_level": 4095}])
def test_white_level_is_stored_only_if_not_default(stored: dict[str, int]) -> None:
    own = tiny_config(**stored).eval_transform()
    assert own.to_dict().keys() - {"resize", "crop", "interpolation", "mean", "std"} == stored.keys()
    assert EvalTransform.from_dict(own.to_dict()) == own
    for wrong in (0, 65536, "white"):
        with pytest.raises(InputError, match="evaluation transform"):
            EvalTransform.from_dict(own.to_dict() | {"white_level": wrong})
