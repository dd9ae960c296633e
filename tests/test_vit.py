"""Vision transformers by name: names and sizes map one to one."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch

from dino_xcit.errors import InputError
from dino_xcit.models import build_backbone
from dino_xcit.models.vit import VIT_FAMILIES, VitShape, vit_shape


def test_vit_shape_name_is_unique_and_round_trips() -> None:
    sizes = itertools.product(VIT_FAMILIES, (12,), (14,), (224, 448), (2, 16), (False, True), (0, 4))
    shapes = [VitShape(*size) for size in sizes]
    shapes.append(VitShape("small", 12, 14, 224, VIT_FAMILIES["small"][1], False, 0))
    assert [vit_shape(shape.name) for shape in shapes] == shapes
    names = {shape.name for shape in shapes}
    assert len(names) == len(shapes)
    assert {"vit_small_12_p14", "vit_small_12_p14_448_h2_ls_reg4"} <= names


def test_vit_has_heads_and_parameter_shapes_of_timm_dinov2() -> None:
    for ours, theirs in (
        ("vit_small_12_p14_518_ls", "vit_small_patch14_dinov2"),
        ("vit_base_12_p14_518_ls_reg4", "vit_base_patch14_reg4_dinov2"),
    ):
        with torch.device("meta"):
            own = build_backbone(ours)
            model = timm.create_model(theirs, num_classes=0)
        shapes = {key.removeprefix("model."): value.shape for key, value in own.state_dict().items()}
        assert shapes == {key: value.shape for key, value in model.state_dict().items()}
        assert own.model.blocks[0].attn.num_heads == model.blocks[0].attn.num_heads


def test_vit_name_sets_heads_registers_and_layer_scale() -> None:
    backbone = build_backbone("vit_tiny_1_p16_32_h6_ls_reg3").eval()
    assert backbone.model.blocks[0].attn.num_heads == 6
    assert float(backbone.model.blocks[0].ls1.gamma.detach().mean()) == pytest.approx(1e-5)
    assert backbone.model.reg_token.shape == (1, 3, 192)
    out = backbone(torch.rand(2, 3, 32, 48))
    assert out.grid == (2, 3)
    assert out.patch_tokens.shape == (2, 6, 192)


@pytest.mark.parametrize(
    "name",
    ["vit_small_12_p16_h7", "vit_small_12_p16_h0", "vit_small_0_p16", "vit_small_12_p15", "vit_small_12_p16_8",
     "vit_giant_12_p16", "vit_small_12_p16_reg4_ls", "vit_"],
)  # fmt: skip
def test_invalid_vit_name_is_refused(name: str) -> None:
    assert vit_shape(name) is None
    with pytest.raises(InputError, match="unknown arch"):
        build_backbone(name)
