"""Backbones of timm (``timm:NAME``): the same output structure as our XCiT."""

from __future__ import annotations

import pytest
import torch

from dino_xcit.errors import InputError
from dino_xcit.models import DINOHead, MultiCropWrapper, build_backbone

# In order: class token, class and distillation token, pooled map, map [B, h, w, D], map widened after pooling.
NAMES = [
    "test_vit", "deit_tiny_distilled_patch16_224", "resnet18", "swin_tiny_patch4_window7_224", "mobilenetv3_small_050",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_timm_output_has_documented_shapes_at_both_crop_sizes(name: str) -> None:
    model = build_backbone(f"timm:{name}", drop_path_rate=0.1)
    for side in (160, 96):
        output = model(torch.randn(2, 3, side, side))
        assert output.cls_token.shape == (2, model.embed_dim)
        assert output.patch_tokens.shape[:2] == (2, output.grid[0] * output.grid[1])
        assert output.grid in {((side + 31) // 32,) * 2, (side // 16,) * 2}
    features = MultiCropWrapper(model, DINOHead(int(model.embed_dim), 8, hidden_dim=4, bottleneck_dim=4))  # type: ignore[arg-type]
    assert features([torch.randn(2, 3, 96, 96)]).logits.shape == (2, 8)


@pytest.mark.parametrize("name", ["test_vit", "xcit_nano_12_p16_224", "resnet18"])
def test_timm_layers_are_returned_in_requested_order(name: str) -> None:
    model = build_backbone(f"timm:{name}").eval()
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        plain, first, last = model(images), model(images, layers=[0]).layers[0], model(images, layers=[-1]).layers[0]
        both = model(images, layers=[-1, 0, -1])
    for found, expected in zip(both.layers, (last, first, last), strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(first.flatten()[:50], last.flatten()[:50])
    torch.testing.assert_close(both.cls_token, plain.cls_token)


@pytest.mark.parametrize("name", ["vit_tiny_1_p16_32", "timm:test_vit"])
def test_vit_drops_partial_patches_like_a_strided_convolution(name: str) -> None:
    model = build_backbone(name).eval()
    images = torch.randn(1, 3, 79, 50)
    with torch.no_grad():
        found, cut, narrow = model(images), model(images[:, :, :64, :48]), model(images[:, :, :64, :5])
        stem = torch.nn.functional.conv2d(images, model.model.patch_embed.proj.weight, stride=16)  # type: ignore[union-attr,arg-type]
    assert found.grid == tuple(stem.shape[2:]) == (4, 3)
    assert torch.equal(found.cls_token, cut.cls_token)
    assert torch.equal(found.patch_tokens, cut.patch_tokens)
    assert narrow.grid == (4, 1)
    assert bool(narrow.cls_token.isfinite().all())


def test_fixed_size_model_refuses_other_image_sizes() -> None:
    model = build_backbone("timm:resmlp_12_224")
    with pytest.raises(InputError, match=r"cannot take images of 65 x 64 pixels .*--eval-crop .*--fit centre"):
        model(torch.rand(1, 3, 65, 64))


def test_timm_patch_tokens_keep_timm_order_without_class_token() -> None:
    model = build_backbone("timm:vit_tiny_patch16_224").eval()
    images = torch.randn(1, 3, 64, 112)
    with torch.no_grad():
        whole, output = model.model.forward_features(images), model(images)  # type: ignore[union-attr,operator]
    assert output.grid == (4, 7)
    assert torch.equal(output.patch_tokens, whole[:, 1:])
    assert torch.equal(output.cls_token, whole[:, 0])


def test_drop_path_rate_reaches_the_timm_model() -> None:
    model = build_backbone("timm:vit_tiny_patch16_224", drop_path_rate=0.3)
    rates = [float(module.drop_prob) for module in model.modules() if type(module).__name__ == "DropPath"]  # type: ignore[arg-type]
    assert max(rates) == pytest.approx(0.3)


def test_unknown_timm_name_is_refused_with_near_matches() -> None:
    with pytest.raises(ValueError, match=r"resnet18"):
        build_backbone("timm:resnet81")


def test_drop_path_rate_is_refused_for_timm_model_without_stochastic_depth() -> None:
    with pytest.raises(InputError, match=r"timm:vgg11 has no stochastic depth: give --drop-path-rate 0"):
        build_backbone("timm:vgg11", drop_path_rate=0.1)
