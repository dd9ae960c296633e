"""Feature pyramid; benchmarks/pyramid.py compares it with the official detection backbone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dino_xcit.errors import InputError
from dino_xcit.models import build_backbone, feature_pyramid

PLAIN = ["xcit_pico_4_p4", "xcit_pico_4_p8", "xcit_pico_4_p16", "vit_tiny_3_p16", "timm:xcit_nano_12_p8_224"]


@pytest.mark.parametrize("size", [(64, 96), (100, 75)])
@pytest.mark.parametrize("name", [*PLAIN, "timm:resnet18"])
def test_maps_have_strides_4_to_32_for_any_image_size(name: str, size: tuple[int, int]) -> None:
    pyramid = feature_pyramid(build_backbone(name))
    maps = pyramid(torch.randn(2, 3, *size))
    assert list(maps) == ["0", "1", "2", "3"]
    for stride, width, found in zip((4, 8, 16, 32), pyramid.widths, maps.values(), strict=True):
        assert found.shape[:2] == (2, width)
        for side, of in zip(found.shape[2:], size, strict=True):
            assert abs(side - of / stride) <= max(16 / stride, 1), (stride, found.shape)


def test_maps_are_outputs_of_the_published_blocks_without_norm() -> None:
    backbone = build_backbone("xcit_nano_12_p8").eval()
    pyramid, images = feature_pyramid(backbone).eval(), torch.randn(1, 3, 64, 48)
    assert pyramid.layers == (3, 5, 7, 11)
    assert feature_pyramid(build_backbone("xcit_tiny_24_p16")).layers == (7, 11, 15, 23)
    with torch.no_grad():
        output, maps = backbone(images, layers=pyramid.layers), pyramid(images)
    tokens = [one.transpose(1, 2).unflatten(2, output.grid) for one in output.layers]
    torch.testing.assert_close(maps["1"], tokens[1])
    torch.testing.assert_close(maps["2"], nn.functional.max_pool2d(tokens[2], 2))
    torch.testing.assert_close(maps["3"], nn.functional.max_pool2d(tokens[3], 4))


@pytest.mark.parametrize("name", ["xcit_pico_4_p8", "xcit_pico_4_p16"])
def test_every_trainable_parameter_gets_a_gradient(name: str) -> None:
    """DistributedDataParallel waits for all of them."""
    pyramid = feature_pyramid(build_backbone(name))
    sum(one.square().mean() for one in pyramid(torch.randn(2, 3, 64, 64)).values()).backward()
    assert [key for key, p in pyramid.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = {key.split(".")[1] for key, p in pyramid.named_parameters() if not p.requires_grad}
    assert frozen == {"cls_token", "cls_attn_blocks", "norm"}


@pytest.mark.parametrize("name", ["vit_tiny_3_p16", "timm:xcit_nano_12_p8_224", "timm:convnext_atto"])
def test_parameters_of_timm_models_behind_the_maps_are_frozen(name: str) -> None:
    pyramid = feature_pyramid(build_backbone(name))
    sum(one.square().mean() for one in pyramid(torch.randn(2, 3, 64, 64)).values()).backward()
    frozen = [key for key, p in pyramid.named_parameters() if not p.requires_grad]
    assert frozen == [key for key, p in pyramid.named_parameters() if p.grad is None]
    assert any("norm" in key for key in frozen)
    assert len(frozen) < len(list(pyramid.parameters())) / 2


def test_resampling_has_official_names() -> None:
    names = [name for name in feature_pyramid(build_backbone("xcit_pico_4_p16")).state_dict() if name.startswith("fpn")]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    layers = {"fpn1.0": norm[:2], "fpn1.1": norm, "fpn1.3": norm[:2], "fpn2.0": norm[:2]}
    assert names == [f"{layer}.{part}" for layer, parts in layers.items() for part in parts]


def test_backbones_without_these_strides_are_refused() -> None:
    with pytest.raises(InputError, match="Identity, expected an XCiT"):
        feature_pyramid(nn.Identity())
    with pytest.raises(InputError, match="patches have 14 pixels, expected 4, 8 or 16"):
        feature_pyramid(build_backbone("vit_tiny_2_p14_28"))
    with pytest.raises(InputError, match="no map of stride 4, only of 16, 32, 64"):
        feature_pyramid(build_backbone("timm:levit_128s"))
    with pytest.raises(InputError, match="cannot take images of 64 x 80 pixels"):
        feature_pyramid(build_backbone("timm:resmlp_12_224"))(torch.zeros(1, 3, 64, 80))
