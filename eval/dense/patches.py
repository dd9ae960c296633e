"""Patch features of frozen backbones, and the result file. B: batch size, (h, w): grid of patches, D: features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_xcit.errors import InputError
from dino_xcit.runtime import logging as log
from dino_xcit.transform import EvalTransform, normalise
from dino_xcit.weights import LoadedBackbone
from eval.config import BackboneConfig
from eval.pooling import autocast
from eval.results import JsonObject, Metric, result_content, write_json


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


def write_result(
    config: BackboneConfig, measure: str, protocol: JsonObject, results: object, metrics: Sequence[Metric],
    loaded: LoadedBackbone, data: Mapping[str, JsonObject], device: torch.device, seconds: float,
) -> None:  # fmt: skip
    """Write ``config.json`` (:func:`eval.results.result_content`), if it is given."""
    if config.json:
        plain = [one.to_dict() for one in metrics]
        transform = loaded.transform
        content = result_content(measure, protocol, results, loaded, data, transform, device, seconds, plain)
        write_json(Path(config.json), content)
        log.info(f"written: {config.json}")
