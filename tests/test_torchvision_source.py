"""What torchvision's data sets may hand over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.datasets
from PIL import Image

from dino_xcit.data import UndecodableImage
from dino_xcit.data.check import check
from dino_xcit.data.torchvision_source import TorchvisionSource


class OneBroken(torch.utils.data.Dataset[Any]):
    """What torchvision's sets do where a file is damaged: an error of whatever class."""

    targets: object = (2, 0, 1)
    classes = ("a", "b", "c")

    def __init__(self, root: str, train: bool = True) -> None:
        pass

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 1:
            raise OSError("image file is truncated\n(3 bytes not processed)")
        return Image.new("L", (4, 3), 50 * index), index


def test_a_broken_image_can_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "OneBroken", OneBroken, raising=False)
    source = TorchvisionSource("OneBroken", "train", tmp_path)
    assert source.read(2)[1] == 1
    with pytest.raises(UndecodableImage, match=r"^torchvision:OneBroken/train/000001 cannot be read: image") as caught:
        source.read(1)
    assert caught.value.cause == "image file is truncated (3 bytes not processed)"
    report = check(source, workers=0)
    assert [name for name, _ in report.broken] == ["torchvision:OneBroken/train/000001"]


@pytest.mark.parametrize(
    "targets", [["a", "b", "c"], [[1, 2], [3], []], [0, 1], [0, -1, 1], [0, 10**6, 1], [{}, {}, {}]]
)
def test_targets_that_are_no_classes_are_no_labels(
    targets: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(OneBroken):
        def __init__(self, root: str) -> None:
            super().__init__(root)
            self.targets = targets

    monkeypatch.setattr(torchvision.datasets, "Odd", Odd, raising=False)
    source = TorchvisionSource("Odd", "train", tmp_path)
    assert (source.labels, source.classes, source.read(0)[1]) == (None, None, None)
