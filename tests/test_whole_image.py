"""Whole pictures for retrieval: Pillow's and torchvision's own pixels, as the published scripts have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from dino_xcit.transform import EvalTransform
from eval.retrieval.benchmarks import LongerSide, Square


@pytest.mark.parametrize(("size", "expected"), [(64, (44, 64)), (90, (62, 90)), (130, (90, 130)), (500, (90, 130))])
def test_the_longer_side_is_reduced_as_pillows_thumbnail_does_and_never_enlarged(
    photo: Image.Image, size: int, expected: tuple[int, int]
) -> None:
    before = photo.tobytes()
    pixels = LongerSide(size, size)(photo)
    peer = photo.copy()
    peer.thumbnail((size, size), Image.Resampling.LANCZOS)
    assert tuple(pixels.shape) == (3, *expected)
    assert (pixels.permute(1, 2, 0).numpy() == np.asarray(peer)).all()
    assert photo.tobytes() == before, "the picture that was handed in stays as it is"


def test_the_square_is_torchvisions_bicubic_resize_of_both_sides(photo: Image.Image) -> None:
    peer = transforms.Resize((48, 48), interpolation=transforms.InterpolationMode.BICUBIC)(photo)
    assert torch.equal(Square(48, 48)(photo), torch.from_numpy(np.array(peer)).permute(2, 0, 1))


def test_kept_features_of_other_fits_are_other_features() -> None:
    cards = [kind(48, 48, "bicubic").to_dict() for kind in (EvalTransform, LongerSide, Square)]
    assert len({repr(sorted(card.items())) for card in cards}) == 3
