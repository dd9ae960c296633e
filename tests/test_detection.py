"""The detector's parts against oracles, its training images, and a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_fixtures import TINY, make_coco
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import masks_to_boxes, roi_align

from dino_xcit.cli import parse
from dino_xcit.data.decode import decode_pixels
from dino_xcit.models import build_backbone
from dino_xcit.optim import Rates
from dino_xcit.transform import WHITE, EvalTransform
from downstream.coco import CocoSource, find_part, open_coco
from downstream.detect_config import DetectConfig
from downstream.detection import AlignedPool, Anchors, Batching, Detection, DetectionImages, Detector, build_detector
from downstream.supervised import autocast

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco(tmp_path_factory.mktemp("detection"))


@pytest.fixture(scope="module")
def source(root: Path) -> CocoSource:
    return open_coco(*find_part(str(root), "train", "", ""), masks=True)


def settings(*flags: str) -> DetectConfig:
    return parse(DetectConfig, [*TINY, *flags], "run_detect.py")


def tiny(config: DetectConfig, source: CocoSource) -> Detection:
    torch.manual_seed(0)
    network = build_detector(config, build_backbone("xcit_pico_4_p8"), len(source.categories), EvalTransform())
    return Detection(config, CPU, network, source)


# ---- parts of the network


def test_pool_is_an_aligned_roi_align_on_the_level_of_each_box() -> None:
    maps = {str(level): torch.randn(2, 5, 256 >> level, 256 >> level) for level in range(4)}  # 1024 pixels
    boxes = torch.tensor(
        [[30.3, 40.1, 90.7, 77.9], [10, 300, 140, 420.5], [5.5, 6.5, 300.5, 310], [0, 100, 700.2, 920]]
    )
    pooled = AlignedPool(7)(maps, [boxes, boxes[:2] + 3], [(1000, 1010)] * 2)  # torchvision would infer from sizes
    for row, (image, level, box) in enumerate(
        [(0, 0, boxes[0]), (0, 1, boxes[1]), (0, 2, boxes[2]), (0, 3, boxes[3]), (1, 0, boxes[0] + 3)]
    ):
        expected = roi_align(maps[str(level)][[image]], [box[None]], 7, 1 / 2 ** (2 + level), 0, aligned=True)
        torch.testing.assert_close(pooled[row], expected[0], atol=1e-4, rtol=1e-4)


def test_anchors_are_of_eight_cells_at_the_strides_of_the_levels() -> None:
    images = ImageList(torch.zeros(1, 3, 96, 160), [(96, 160)])  # 3 x 5 cells of 32 pixels, 2 x 3 of 64
    sizes = [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3)]
    (anchors,) = Anchors()(images, [torch.zeros(1, 1, *size) for size in sizes])
    start = 0
    for (height, width), stride in zip(sizes, (4, 8, 16, 32, 64), strict=True):
        level = anchors[start : start + 3 * height * width].view(height, width, 3, 4)
        start += level.numel() // 4
        centres, sides = (level[..., :2] + level[..., 2:]) / 2, level[..., 2:] - level[..., :2]
        assert centres[-1, -1].tolist() == [[(width - 1) * stride, (height - 1) * stride]] * 3
        torch.testing.assert_close(sides.prod(-1).sqrt(), torch.full((height, width, 3), 8.0 * stride), atol=1, rtol=0)
        torch.testing.assert_close(
            sides[0, 0, :, 1] / sides[0, 0, :, 0], torch.tensor([0.5, 1.0, 2.0]), atol=0, rtol=0.1
        )
    assert start == len(anchors)


def test_batching_normalises_then_pads_with_zeros() -> None:
    images = [torch.randint(0, 256, (3, 40, 70), dtype=torch.uint8), torch.full((3, 64, 20), 255, dtype=torch.uint8)]
    batch, targets = Batching(EvalTransform(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))(images, "targets")
    assert batch.tensors.shape == (2, 3, 64, 96)
    assert batch.image_sizes == [(40, 70), (64, 20)]
    assert targets == "targets"
    torch.testing.assert_close(batch.tensors[0, :, :40, :70], (images[0] / 255 - 0.5) / 0.25)
    assert (batch.tensors[1, :, :, :20] == 2).all()
    assert (batch.tensors[0, :, 40:] == 0).all()
    assert (batch.tensors[1, :, :, 20:] == 0).all()


# ---- training images


def augmented(source: CocoSource, *flags: str, key: tuple[int, int] = (0, 0)) -> tuple[Tensor, dict[str, Tensor]]:
    batch = DetectionImages(source, settings(*flags), WHITE).__getitems__([key])
    assert not hasattr(batch, "cause")
    return batch.images[0], batch.targets[0]  # type: ignore[union-attr]


def pixels_of(source: CocoSource, index: int) -> NDArray[np.uint8]:
    return decode_pixels(source.read(index)[0], source.name(index))[..., :3]


STILL = ("--crop-probability", "0", "--flip", "0")


def test_without_augmentation_images_and_objects_are_those_of_the_source(source: CocoSource) -> None:
    image, target = augmented(source, *STILL)
    objects = source.objects(0, crowds=False)
    assert (image.permute(1, 2, 0).numpy() == pixels_of(source, 0)).all()
    assert type(image) is Tensor
    left_top, size = objects.boxes[:, :2], objects.boxes[:, 2:]
    assert target["boxes"].tolist() == np.concatenate([left_top, left_top + size], axis=1).tolist()
    assert target["labels"].tolist() == objects.labels.tolist()
    assert target["masks"].flatten(1).sum(1).tolist() == objects.areas.tolist()
    assert len(augmented(source, *STILL, "--model", "faster-rcnn")[1]) == 2


def test_a_flip_flips_the_image_its_boxes_and_masks(source: CocoSource) -> None:
    image, target = augmented(source, *STILL)
    flipped, target_flipped = augmented(source, "--crop-probability", "0", "--flip", "1")
    assert (flipped == image.flip(-1)).all()
    assert (target_flipped["masks"] == target["masks"].flip(-1)).all()
    width = image.shape[-1]
    assert (target_flipped["boxes"][:, [0, 2]] == width - target["boxes"][:, [2, 0]]).all()


def test_boxes_follow_masks_through_random_crops_and_sizes(source: CocoSource) -> None:
    flags = ("--crop-probability", "1", "--crop-sides", "32", "56", "--short-sides", "48", "96", "--long-side", "128")
    lost, sizes = 0, set()
    for epoch in range(30):
        image, target = augmented(source, *flags, key=(epoch, 0))
        sizes.add(min(image.shape[1:]))
        assert max(image.shape[1:]) <= 128
        lost += len(source.objects(0, crowds=False).labels) - len(target["labels"])
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        assert ((target["boxes"][:, 2:] - target["boxes"][:, :2]) >= 1).all()
        visible = target["masks"].bool().flatten(1).any(1) & (target["labels"] == 1)  # rectangles fill their boxes
        around = masks_to_boxes(target["masks"][visible])
        around[:, 2:] += 1
        assert ((around - target["boxes"][visible]).abs() < 4).all()  # a pixel is enlarged by up to 3
    assert lost > 0
    assert len(sizes) >= 2


def test_images_depend_on_seed_epoch_and_index_only(source: CocoSource) -> None:
    first, again = (augmented(source, key=(3, 1)) for _ in range(2))
    assert torch.equal(first[0], again[0])
    torch.rand(7)
    together = DetectionImages(source, settings(), WHITE).__getitems__([(3, 0), (3, 1)])
    assert torch.equal(together.images[1], first[0])  # type: ignore[union-attr]
    others = [augmented(source, key=(epoch, 1))[0] for epoch in range(4, 9)]
    assert not all(other.shape == first[0].shape and torch.equal(other, first[0]) for other in others)


def test_images_without_objects_are_left_out_or_are_background(source: CocoSource) -> None:
    assert len(DetectionImages(source, settings(), WHITE)) == len(source) - 1
    config = settings("--empty-images")
    images = DetectionImages(source, config, WHITE)
    assert len(images) == len(source)
    batch: Any = images.__getitems__([(0, len(source) - 1)])
    assert batch.targets[0]["boxes"].shape == (0, 4)
    assert batch.targets[0]["masks"].shape[0] == 0
    rates: Any = None
    loss, _ = tiny(config, source).loss(batch, rates)
    loss.backward()
    assert loss.isfinite()


def test_an_image_of_another_size_is_replaced(root: Path, tmp_path: Path) -> None:
    copied = make_coco(tmp_path / "turned")
    Image.new("RGB", (64, 80)).save(copied / "train2017" / "000.png")
    source = open_coco(*find_part(str(copied), "train", "", ""), masks=True)
    batch: Any = DetectionImages(source, settings(), WHITE).__getitems__([(0, 0)])
    assert [one.index for one in batch.unreadable] == [0]
    assert batch.indices.tolist() != [0]


# ---- training and test


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["mask-rcnn", "faster-rcnn"])
def test_losses_and_gradients_are_finite(source: CocoSource, precision: str, model: str) -> None:
    config = settings("--precision", precision, "--model", model)
    method = tiny(config, source)
    batch = DetectionImages(source, config, WHITE).__getitems__([(0, 0), (0, 1)])
    rates: Any = Rates(step=0, epoch=0, lr=0.0, weight_decay=0.0)
    loss, stats = method.forward_backward(batch, rates)
    parts = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    parts |= {"loss_mask"} if model == "mask-rcnn" else set()
    assert set(stats) == parts | {"images"}
    assert float(sum(method.metrics(stats).values())) == pytest.approx(float(loss), rel=1e-4)
    for name, parameter in method.trained.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name  # DistributedDataParallel waits for each of them
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_detections_are_in_the_pixels_of_the_image(source: CocoSource, precision: str) -> None:
    config = settings("--test-side", "48", "--precision", precision)
    network = tiny(config, source).trained
    detector = Detector(network, source.category_ids, config, WHITE, CPU, autocast(config, CPU))
    found: Any = [one for _, one in detector(source)]
    assert len(found) == len(source)
    assert network.training
    boxes = np.array([one["bbox"] for rows in found for one in rows])
    assert len(boxes) > 20
    assert (boxes[:, :2] >= 0).all()
    ends = (boxes[:, :2] + boxes[:, 2:]).max(axis=0)
    assert 79 < ends[0] < 80.01  # images of 80 x 64 pixels, resized to 60 x 48
    assert 63 < ends[1] < 64.01
    assert {one["segmentation"]["size"][0] for one in found[0]} == {64}
    scores = [one["score"] for one in found[0]]
    assert scores == sorted(scores, reverse=True)
    alone = [one for _, one in detector(source)]
    assert alone == found


def test_a_checkpoint_of_other_classes_is_refused(source: CocoSource) -> None:
    method = tiny(settings(), source)
    state = method.state_dict()
    method.load_state_dict(state)
    with pytest.raises(ValueError, match="classes"):
        method.load_state_dict(state | {"categories": {3: "rectangle", 8: "ellipse"}})
