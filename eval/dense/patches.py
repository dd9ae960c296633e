"""Patch features of frozen backbones. B: batch size, (h, w): grid of patches, D: features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform, normalise
from eval.pooling import autocast


@torch.inference_mode()
def patch_features(backbone: nn.Module, images: Tensor, transform: EvalTransform, precision: str) -> Tensor:
    """Return the patch tokens of the last block as unit vectors [B, h, w, D] in float32.

    Args:
        backbone: module that returns :class:`dino_xcit.models.BackboneOutput`.
        images: [B, 3, height, width] uint8, on the device of the backbone.
        precision: of the backbone's products.

    Raises:
        InputError: a feature is not finite.
    """
    with autocast(precision, images.device):
        out = backbone(normalise(images, transform.mean, transform.std))
    features = F.normalize(out.patch_tokens.float(), dim=2).unflatten(1, out.grid)
    if not features.isfinite().all():
        raise InputError("the patch features are not finite: the weights are damaged or their training diverged")
    return features
