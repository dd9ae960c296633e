"""Feature pyramid of a backbone for detection and segmentation. B batch, D features of a level.

As in XCiT's detection backbone (arXiv 2106.09681; facebookresearch/xcit, detection/backbone): the outputs of four XCA
blocks, without a norm, are resampled to strides 4, 8, 16 and 32. Parameters have the official names, ``fpn1`` to
``fpn4``.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.models.timm_backbone import TimmBackbone
from dino_xcit.models.xcit import XCiT

STRIDES = (4, 8, 16, 32)


class FeaturePyramid(nn.Module):
    """Map images [B, channels, height, width] of any size to maps of strides 4, 8, 16 and 32.

    A backbone with one stride (XCiT, vision transformers) gives the outputs of the blocks at 1/3, 1/2, 2/3 and the end
    of its depth; a hierarchical timm model gives its own maps. Layers that the maps do not use are frozen.

    Raises:
        InputError: the backbone is of another kind, or has no maps of these strides.
    """

    widths: tuple[int, ...]
    """D of each level."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        if isinstance(backbone, XCiT):
            depth, stride, width = len(backbone.blocks), backbone.patch_size, backbone.embed_dim
            for unused in (backbone.cls_attn_blocks, backbone.norm):
                unused.requires_grad_(False)
            backbone.cls_token.requires_grad_(False)
        elif isinstance(backbone, TimmBackbone):
            levels = [(info["reduction"], info["num_chs"]) for info in backbone.model.feature_info]
            depth, (stride, width) = len(levels), levels[-1]
            if len(set(levels)) > 1:
                self._choose_levels(levels)
                self._freeze_unused()
                return
        else:
            raise InputError(f"the backbone is a {type(backbone).__name__}, expected an XCiT, a ViT or a timm model")
        if stride not in (4, 8, 16):
            raise InputError(f"the patches have {stride} pixels, expected 4, 8 or 16, such as xcit_small_12_p16")
        self.layers = tuple(-(-depth * part // of) - 1 for part, of in ((1, 3), (1, 2), (2, 3), (1, 1)))
        self.widths = (width,) * len(STRIDES)
        self.fpn1, self.fpn2, self.fpn3, self.fpn4 = (_resampling(stride / wanted, width) for wanted in STRIDES)
        if isinstance(backbone, TimmBackbone):
            self._freeze_unused()

    def _freeze_unused(self) -> None:
        """Freeze a timm model's parameters behind its maps: with several ranks, trained ones must have gradients."""
        copied = copy.deepcopy(self).to("meta")  # computes shapes only
        side = getattr(self.backbone.model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-1]
        maps = copied(torch.zeros(2, 3, side, side, device="meta")).values()
        gradients = torch.autograd.grad([one.sum() for one in maps], [*copied.parameters()], allow_unused=True)
        for parameter, gradient in zip(self.parameters(), gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def _choose_levels(self, levels: list[tuple[int, int]]) -> None:
        """Take the last map of each stride of a hierarchical model."""
        last = {reduction: place for place, (reduction, _) in enumerate(levels)}
        if missing := [stride for stride in STRIDES if stride not in last]:
            raise InputError(
                f"this timm model has no map of stride {missing[0]}, only of {', '.join(map(str, last))}: choose one "
                "with strides 4, 8, 16 and 32, such as timm:resnet50"
            )
        self.layers = tuple(last[stride] for stride in STRIDES)
        self.widths = tuple(levels[place][1] for place in self.layers)
        self.fpn1, self.fpn2, self.fpn3, self.fpn4 = (nn.Identity() for _ in STRIDES)

    def forward(self, images: Tensor, drop_path_keys: Tensor | None = None) -> dict[str, Tensor]:
        """Return ``{"0": stride 4, "1": stride 8, "2": stride 16, "3": stride 32}``, [B, D, h, w] each.

        Args:
            images: [B, channels, height, width], normalised.
            drop_path_keys: see :meth:`dino_xcit.models.xcit.XCiT.forward`.
        """
        resamplings = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        maps = self._maps(images, drop_path_keys)
        return {str(level): resample(one) for level, (resample, one) in enumerate(zip(resamplings, maps, strict=True))}

    def _maps(self, images: Tensor, drop_path_keys: Tensor | None) -> list[Tensor]:
        if isinstance(self.backbone, XCiT):
            return self.backbone.maps(images, self.layers, drop_path_keys)
        assert isinstance(self.backbone, TimmBackbone)
        return self.backbone.maps(images, self.layers)


def _resampling(factor: float, width: int) -> nn.Module:
    """Return layers that enlarge a map by ``factor``, a power of two, or shrink it by maximum pooling."""
    if factor == 1:
        return nn.Identity()
    if factor < 1:
        return nn.MaxPool2d(round(1 / factor))
    layers: list[Any] = []
    for _ in range(round(math.log2(factor))):
        layers += [nn.BatchNorm2d(width), nn.GELU()] if layers else []
        layers.append(nn.ConvTranspose2d(width, width, kernel_size=2, stride=2))
    return nn.Sequential(*layers)
