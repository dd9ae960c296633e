"""Parts of the detectors against oracles, their training images, losses and detections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_fixtures import TINY, make_coco
from PIL import Image
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import masks_to_boxes, roi_align

from dino_xcit.cli import parse
from dino_xcit.data.decode import decode_pixels
from dino_xcit.models import build_backbone
from dino_xcit.optim import Rates
from dino_xcit.transform import RGB, EvalTransform
from supervised.coco import CocoSource, corners, decode_masks, find_split, open_coco
from supervised.detect_config import DetectConfig
from supervised.detection import (
    AlignedRoIAlign,
    Anchors,
    Detection,
    DetectionDataset,
    Detector,
    NormalizeAndPad,
    build_detector,
)

CPU = torch.device("cpu")
STILL = ("--crop-probability", "0", "--flip", "0")


def opened(root: Path) -> CocoSource:
    return open_coco(*find_split(str(root), "train", "", ""), masks=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CocoSource:
    return opened(make_coco(tmp_path_factory.mktemp("detection") / "coco"))


def settings(*flags: str) -> DetectConfig:
    return parse(DetectConfig, [*TINY, *flags], "run_detect.py")


def tiny(config: DetectConfig, source: CocoSource) -> Detection:
    torch.manual_seed(0)
    network = build_detector(config, build_backbone("xcit_pico_4_p8"), len(source.categories), EvalTransform())
    return Detection(config, CPU, network, source)


def batch_of(source: CocoSource, *flags: str, keys: tuple[tuple[int, int], ...] = ((0, 0),)) -> Any:
    return DetectionDataset(source, settings(*flags), RGB).__getitems__(list(keys))


# ---- parts of the network


def test_pool_is_an_aligned_roi_align_on_the_level_of_each_box() -> None:
    maps = {str(level): torch.randn(2, 5, 256 >> level, 256 >> level) for level in range(4)}  # of 1024 pixels
    boxes = torch.tensor([[30.3, 40, 90, 77.9], [10, 300, 140, 420], [5.5, 6, 300, 310], [0, 100, 700, 920]])
    pooled = AlignedRoIAlign(7)(maps, [boxes, boxes[:1] + 3], [(600, 700)] * 2)  # not the size of the maps
    for row, box in enumerate([*boxes, boxes[0] + 3]):
        image, level = divmod(row, 4)
        expected = roi_align(maps[str(level)][[image]], [box[None]], 7, 1 / 2 ** (2 + level), 0, aligned=True)
        torch.testing.assert_close(pooled[row], expected[0], atol=1e-4, rtol=1e-4)


def test_anchors_are_of_eight_cells_at_the_strides_of_the_levels() -> None:
    sizes = [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3)]  # of 96 x 160 pixels: 1.5 x 2.5 cells of 64
    images = ImageList(torch.zeros(1, 3, 96, 160), [(96, 160)])
    (anchors,) = Anchors()(images, [torch.zeros(1, 1, *size) for size in sizes])
    levels = anchors.split([3 * height * width for height, width in sizes])
    for level, (height, width), stride in zip(levels, sizes, (4, 8, 16, 32, 64), strict=True):
        last = level[-3:]
        assert ((last[:, :2] + last[:, 2:]) / 2).tolist() == [[(width - 1) * stride, (height - 1) * stride]] * 3
        sides = last[:, 2:] - last[:, :2]
        torch.testing.assert_close(sides.prod(1).sqrt(), torch.full((3,), 8.0 * stride), atol=1, rtol=0)
        torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.tensor([0.5, 1.0, 2.0]), atol=0, rtol=0.1)


def test_batching_normalises_then_pads_with_zeros() -> None:
    images = [torch.randint(0, 256, (3, 40, 70), dtype=torch.uint8), torch.full((3, 64, 20), 255, dtype=torch.uint8)]
    batch, _ = NormalizeAndPad(EvalTransform(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))(images, None)
    assert batch.tensors.shape == (2, 3, 64, 96)
    assert batch.image_sizes == [(40, 70), (64, 20)]
    torch.testing.assert_close(batch.tensors[0, :, :40, :70], (images[0] / 255 - 0.5) / 0.25)
    assert batch.tensors[0].count_nonzero() == (images[0] / 255 != 0.5).sum()
    assert batch.tensors[1].sum() == 2 * images[1].numel()


# ---- training images


def test_without_augmentation_images_and_objects_are_those_of_the_source(source: CocoSource) -> None:
    batch, flipped = batch_of(source, *STILL), batch_of(source, "--crop-probability", "0", "--flip", "1")
    image, target, found = batch.images[0], batch.targets[0], source.annotations(0, crowds=False)
    assert (image.permute(1, 2, 0).numpy() == decode_pixels(source.read(0)[0], "")[..., :3]).all()
    assert target["boxes"].tolist() == corners(found).tolist()
    assert [list(source.categories)[label - 1] for label in target["labels"]] == [one["category_id"] for one in found]
    assert target["masks"].flatten(1).sum(1).tolist() == [one["area"] for one in found]
    assert {type(one) for one in (image, *target.values())} == {Tensor}
    assert set(batch_of(source, *STILL, "--model", "faster-rcnn").targets[0]) == {"boxes", "labels"}
    assert (flipped.images[0] == image.flip(-1)).all()
    assert (flipped.targets[0]["masks"] == target["masks"].flip(-1)).all()
    assert (flipped.targets[0]["boxes"][:, [0, 2]] == 80 - target["boxes"][:, [2, 0]]).all()


def test_boxes_follow_masks_through_random_crops_and_sizes(source: CocoSource) -> None:
    flags = ("--crop-probability", "1", "--crop-sides", "32", "56", "--short-sides", "48", "96", "--long-side", "128")
    lost, sizes = 0, set()
    for epoch in range(30):
        batch = batch_of(source, *flags, keys=((epoch, 0),))
        image, target = batch.images[0], batch.targets[0]
        sizes.add(min(image.shape[1:]))
        assert max(image.shape[1:]) <= 128
        lost += len(source.annotations(0, crowds=False)) - len(target["labels"])
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        assert ((target["boxes"][:, 2:] - target["boxes"][:, :2]) >= 1).all()
        visible = target["masks"].bool().flatten(1).any(1) & (target["labels"] == 1)  # rectangles fill their boxes
        around = masks_to_boxes(target["masks"][visible])
        around[:, 2:] += 1
        assert ((around - target["boxes"][visible]).abs() < 4).all()  # a pixel is enlarged by up to 3
    assert lost > 0
    assert len(sizes) >= 2


def test_images_depend_on_seed_epoch_and_index_only(source: CocoSource) -> None:
    (first,), others = batch_of(source, keys=((3, 1),)).images, batch_of(source, keys=((4, 1), (5, 1), (6, 1))).images
    torch.rand(7)
    assert torch.equal(batch_of(source, keys=((3, 0), (3, 1))).images[1], first)
    assert not all(torch.equal(other, first) for other in others)


def test_an_image_of_another_size_is_replaced(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "coco")
    Image.new("RGB", (64, 80)).save(root / "train2017" / "000.png")
    batch = batch_of(opened(root))
    assert [one.index for one in batch.unreadable] == [0]
    assert batch.indices.tolist() != [0]


# ---- training and test


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["mask-rcnn", "faster-rcnn"])
@pytest.mark.parametrize("indices", [(0, 1), (5,)])  # the last image has no object
def test_losses_and_gradients_are_finite(
    source: CocoSource, precision: str, model: str, indices: tuple[int, ...]
) -> None:
    flags = ("--precision", precision, "--model", model, "--empty-images")
    method = tiny(settings(*flags), source)
    batch = batch_of(source, *flags, keys=tuple((0, index) for index in indices))
    loss, stats = method.forward_backward(batch, Rates(step=0, epoch=0, lr=0.0, weight_decay=0.0))
    parts = ("classifier", "box_reg", "objectness", "rpn_box_reg", *(["mask"] if model == "mask-rcnn" else []))
    assert set(stats) == {"images", *(f"loss_{part}" for part in parts)}
    assert float(sum(method.metrics(stats).values())) == pytest.approx(float(loss), rel=1e-4)
    for name, parameter in method.trained.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name  # DistributedDataParallel waits for each of them
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_detections_are_in_the_pixels_of_the_image(source: CocoSource, precision: str) -> None:
    config = settings("--test-side", "48", "--precision", precision)
    network = tiny(config, source).trained
    found: Any = dict(Detector(network, source.categories, config, RGB, CPU)(source))
    assert len(found) == len(source)
    assert network.training
    boxes = corners([one for rows in found.values() for one in rows])
    assert boxes.min() >= 0
    np.testing.assert_allclose(boxes.max(axis=0)[2:], [80, 64], atol=0.01)  # resized to 60 x 48
    assert network.rpn.anchor_generator.cell_anchors[0].dtype is torch.float32
    assert (boxes[:, 2] * 48 / 64 % 0.25 > 0.01).mean() > 0.5  # bfloat16 has steps of 0.25 from 32
    inside = 0
    for box, mask in zip(corners(found[0]), decode_masks(found[0], 80, 64), strict=True):
        rows, columns = np.nonzero(mask)
        inside += ((columns > box[0] - 2) & (columns < box[2] + 2) & (rows > box[1] - 2) & (rows < box[3] + 2)).all()
    assert inside == len(found[0])
    scores = [one["score"] for one in found[0]]
    assert scores == sorted(scores, reverse=True)


def test_a_checkpoint_of_other_classes_is_refused(source: CocoSource) -> None:
    method = tiny(settings(), source)
    method.load_state_dict(method.state_dict())
    with pytest.raises(ValueError, match="classes"):
        method.load_state_dict(method.state_dict() | {"categories": {3: "rectangle", 8: "ellipse"}})
