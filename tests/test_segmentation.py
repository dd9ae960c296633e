"""Heads, the network, training crops and evaluation of segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mask_fixtures import shapes
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dino_xcit.data.masks import open_masks
from dino_xcit.models import build_backbone
from dino_xcit.transform import EvalTransform
from supervised.method import seed_everything
from supervised.segment_config import SegmentConfig
from supervised.segmentation import Predictor, SegmentationDataset, Segmenter, SemanticFPN, UperNet, scaled_size

CPU = torch.device("cpu")
SMALL = {
    "head": "semantic-fpn",
    "classes": 5,
    "head_width": 8,
    "fpn_width": 8,
    "num_workers": 0,
    "short_side": 64,
    "crop_size": 48,
}
FROZEN = {"head": "linear", "frozen": True, "head_width": 0, "fpn_width": 0}


def config_of(**changes: Any) -> SegmentConfig:
    return SegmentConfig(**(SMALL | changes))


def pyramid_of(widths: tuple[int, ...]) -> dict[str, Tensor]:
    return {str(level): torch.randn(2, width, 24 >> level, 40 >> level) for level, width in enumerate(widths)}


def test_upernet_equals_the_one_of_transformers() -> None:
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

    widths = (6, 7, 8, 9)
    own = UperNet(widths, config_of(head="upernet", head_width=16))
    for norm in (module for module in own.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.running_mean)
    theirs = UperNetConfig(hidden_size=16, num_labels=5, auxiliary_channels=8, auxiliary_num_convs=1,
                           auxiliary_concat_input=False)  # fmt: skip
    head, auxiliary = UperNetHead(theirs, list(widths)).eval(), UperNetFCNHead(theirs, list(widths)).eval()
    # transformers defines the same layers in another order and with other names.
    order = ("classifier", "pools", "bottleneck", "lateral", "output", "fusion")
    names = {"lateral": "lateral_convs", "output": "fpn_convs"}
    parts = {names.get(name, name): list(getattr(own, name).state_dict().values()) for name in order}
    stored: dict[str, Tensor] = {}
    groups = {"pools": "psp_modules", "fusion": "fpn_bottleneck"}
    for name, values in parts.items():
        keys = [key for key in head.state_dict() if key.startswith(f"{groups.get(name, name)}.")]
        stored |= dict(zip(keys, values, strict=True))
    head.load_state_dict(stored)
    auxiliary.load_state_dict(dict(zip(auxiliary.state_dict(), [*own.auxiliary.state_dict().values()], strict=True)))
    maps = pyramid_of(widths)
    with torch.no_grad():
        torch.testing.assert_close(own.eval()(maps)[0], head([*maps.values()]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own.auxiliary(maps["2"]), auxiliary([*maps.values()]), rtol=1e-5, atol=1e-5)


def test_semantic_fpn_sums_levels_enlarged_by_twos() -> None:
    head = SemanticFPN((6, 7, 8, 9), config_of()).eval()
    maps = pyramid_of((6, 7, 8, 9))
    levels = list(head.fpn(maps).values())
    total = torch.zeros(2, 8, 24, 40)
    for stride, (one, layers) in enumerate(zip(levels, head.levels, strict=True)):
        blocks = [layer for layer in layers if isinstance(layer, nn.Sequential)]
        assert len(blocks) == max(1, stride)
        for block in blocks:
            one = block(one)
            one = F.interpolate(one, scale_factor=2, mode="bilinear", align_corners=False) if stride else one
        total += one
    torch.testing.assert_close(head(maps)[0], F.conv2d(total, head.classifier[1].weight, head.classifier[1].bias))
    assert [one.shape for one in head(maps)] == [(2, 5, 24, 40)]


@pytest.mark.parametrize("arch", ["xcit_pico_4_p8", "vit_tiny_3_p16", "timm:resnet18"])
@pytest.mark.parametrize("head", ["semantic-fpn", "upernet", "linear"])
def test_scores_have_the_size_of_the_images(arch: str, head: str) -> None:
    network = Segmenter(build_backbone(arch), config_of(**{"head": head} | (FROZEN if head == "linear" else {})))
    images = torch.randn(2, 3, 50, 71)
    outputs = network(images)
    assert [one.shape for one in outputs] == [(2, 5, 50, 71)] * (2 if head == "upernet" else 1)
    assert len(network.eval()(images)) == 1
    sum(one.sum() for one in outputs).backward()
    without = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []  # DistributedDataParallel waits for all of them


def test_a_frozen_backbone_stays_in_eval_mode_without_gradient() -> None:
    backbone = build_backbone("xcit_pico_4_p8")
    network = Segmenter(backbone, config_of(**FROZEN)).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    network(torch.randn(2, 3, 32, 32))[0].square().mean().backward()
    assert not backbone.training
    assert network.head.training
    assert {name.partition(".")[0] for name, p in network.named_parameters() if p.grad is not None} == {"head"}
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_linear_scores_are_those_of_the_patches() -> None:
    backbone = build_backbone("xcit_pico_4_p8")
    network = Segmenter(backbone, config_of(**FROZEN)).eval()
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        tokens = backbone(images).patch_tokens[0]
        layer = network.head.classifier[1]
        expected = tokens / (1 + 1e-5) ** 0.5 @ layer.weight[:, :, 0, 0].T + layer.bias
        maps = expected.T.reshape(1, 5, 4, 6)
        wanted = F.interpolate(maps, size=(32, 48), mode="bilinear", align_corners=False)
        torch.testing.assert_close(network(images)[0], wanted, rtol=1e-4, atol=1e-5)


def test_scaled_size_keeps_the_aspect_and_bounds_the_long_side() -> None:
    config = SegmentConfig()
    assert scaled_size((400, 600), config) == (512, 768)
    assert scaled_size((600, 400), config, 0.5) == (384, 256)
    assert scaled_size((100, 1000), config) == (205, 2048)


# ---- training crops


def crops_of(tmp_path: Path, count: int = 1, **changes: Any) -> list[tuple[Tensor, Tensor]]:
    train, _ = open_masks(config_of(data_path=str(shapes(tmp_path, train=1, val=1)), **changes | {"classes": 0}))
    dataset, out = SegmentationDataset(train, config_of(**changes), EvalTransform()), []
    pixels = np.asarray(Image.open(train.images[0]))
    for seed in range(count):
        seed_everything(seed)
        out.append(dataset.augmented(0, pixels, None))
    return out


def test_masks_are_scaled_cropped_flipped_and_padded_with_their_images(tmp_path: Path) -> None:
    """The shapes of the fixture have one channel that is higher by 120: it shows the class of each pixel."""
    for image, target in crops_of(tmp_path, 12, photometric=0.0, crop_size=64):
        assert image.shape == (3, 64, 64)
        assert (image.dtype, target.dtype, target.shape) == (torch.uint8, torch.uint8, (64, 64))
        labelled = (target > 0) & (target < 4)
        brightest = image.float().argmax(0) + 1
        assert labelled.sum() > 50
        assert (brightest[labelled] == target[labelled]).float().mean() > 0.9


def test_small_images_are_padded_with_the_ignored_label(tmp_path: Path) -> None:
    ((image, target),) = crops_of(tmp_path, scale=(0.5, 0.5), crop_size=64, photometric=0.0, flip=0.0)
    assert (target[36:] == 255).all()
    assert (target[:, 36:] == 255).all()
    assert (image[:, 36:] == 114).all()  # the mean colour
    assert (target[:32, :32] != 255).any()


def test_crops_are_functions_of_the_seed_and_change_colours(tmp_path: Path) -> None:
    first, second = crops_of(tmp_path / "a", 3), crops_of(tmp_path / "b", 3)
    assert all(torch.equal(one, two) for a, b in zip(first, second, strict=True) for one, two in zip(a, b, strict=True))
    plain = crops_of(tmp_path / "c", 3, photometric=0.0)
    assert all(torch.equal(one[1], two[1]) for one, two in zip(first, plain, strict=True))
    assert any(not torch.equal(one[0], two[0]) for one, two in zip(first, plain, strict=True))


# ---- evaluation


class Painter(nn.Module):
    """Scores that are fixed functions of the pixels: translation-invariant, so windows must not change them."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [torch.cat([images, -images, images.mean(1, keepdim=True)], dim=1)]


@pytest.mark.parametrize("size", [(48, 48), (64, 90), (130, 70)])
def test_windows_cover_the_image_and_average_their_scores(size: tuple[int, int]) -> None:
    images = torch.randn(1, 3, *size)
    for stride in (0, 20, 48):
        predictor = Predictor(config_of(classes=7, test="slide", test_stride=stride), EvalTransform(), CPU)
        torch.testing.assert_close(predictor._windows(Painter(), images), Painter()(images)[0])  # type: ignore[arg-type]


def test_labels_are_the_largest_score_at_the_original_size() -> None:
    predictor = Predictor(config_of(classes=7), EvalTransform(), CPU)
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    found = predictor.labels(Painter(), image, (41, 59))  # type: ignore[arg-type]
    mean, std = (torch.tensor(values)[:, None, None] for values in (predictor.transform.mean, predictor.transform.std))
    scores = Painter()(((image / 255 - mean) / std)[None])[0]
    wanted = F.interpolate(scores, size=(41, 59), mode="bilinear", align_corners=False)[0].argmax(0)
    np.testing.assert_array_equal(found, wanted.numpy())


def test_many_classes_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervised.segmentation._CLASSES_AT_ONCE", 3)
    test_labels_are_the_largest_score_at_the_original_size()
