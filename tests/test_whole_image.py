"""Whole pictures for retrieval: Pillow's and torchvision's own pixels, as the published scripts have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from dino_xcit.transform import EvalTransform
from eval.retrieval.whole_image import longer_side, square

STORED = EvalTransform(mean=(0.1, 0.2, 0.3))


@pytest.mark.parametrize(("size", "expected"), [(64, (44, 64)), (90, (62, 90)), (130, (90, 130)), (500, (90, 130))])
def test_the_longer_side_is_reduced_as_pillows_thumbnail_does_and_never_enlarged(
    photo: Image.Image, size: int, expected: tuple[int, int]
) -> None:
    before = photo.tobytes()
    pixels = longer_side(STORED, size)(photo)
    peer = photo.copy()
    peer.thumbnail((size, size), Image.Resampling.LANCZOS)
    assert tuple(pixels.shape) == (3, *expected)
    assert (pixels.permute(1, 2, 0).numpy() == np.asarray(peer)).all()
    assert photo.tobytes() == before, "the picture that was handed in stays as it is"


def test_the_square_is_torchvisions_bicubic_resize_of_both_sides(photo: Image.Image) -> None:
    peer = transforms.Resize((48, 48), interpolation=transforms.InterpolationMode.BICUBIC)(photo)
    assert torch.equal(square(STORED, 48)(photo), torch.from_numpy(np.array(peer)).permute(2, 0, 1))


def test_kept_features_of_other_fits_are_other_features() -> None:
    cards = [EvalTransform(48, 48, "bicubic"), longer_side(EvalTransform(), 48), square(EvalTransform(), 48)]
    assert len({repr(sorted(card.to_dict().items())) for card in cards}) == 3
    assert square(STORED, 48).mean == longer_side(STORED, 48).mean == (0.1, 0.2, 0.3)
