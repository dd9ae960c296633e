"""Baselines for a trained backbone: the untrained network and raw pixels. B is the batch size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dino_xcit.models import BackboneOutput, build_backbone
from dino_xcit.runtime import logging as log
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import LoadedBackbone, hash_state

MAX_PIXEL_BYTES = 4 << 30
"""Maximum size of the raw-pixel features of all images."""


class Pixels(nn.Module):
    """Return the transformed pixels as features [B, channels * crop * crop], with values between 0 and 1.

    With ``normalised``, keep the normalised values, often a stronger baseline under cosine similarity.
    """

    def __init__(self, transform: EvalTransform, normalised: bool) -> None:
        super().__init__()
        self.embed_dim = transform.channels * transform.crop**2
        self.transform, self.normalised = transform, normalised

    def forward(self, images: Tensor) -> BackboneOutput:
        """Flatten normalised ``images`` [B, channels, crop, crop]."""
        if not self.normalised:
            per_channel = torch.tensor((self.transform.mean, self.transform.std), device=images.device)
            mean, std = per_channel.view(2, -1, 1, 1)
            images = images * std + mean
        return BackboneOutput(images.flatten(1), images.flatten(2).transpose(1, 2), (images.shape[2], images.shape[3]))


def untrained(arch: str, channels: int = 3) -> nn.Module:
    """Build the architecture with initial weights of seed 0, in eval mode."""
    torch.manual_seed(0)
    return build_backbone(arch, channels).eval().requires_grad_(False)


def baselines(loaded: LoadedBackbone, images: int, device: torch.device) -> list[tuple[str, nn.Module, str]]:
    """Return (name, module, hash of the weights) of the untrained architecture and of raw and normalised pixels.

    The hash of pixels is empty, as caching them would not save time. Pixels are omitted with a warning if the features
    of ``images`` images exceed :data:`MAX_PIXEL_BYTES`.
    """
    start = untrained(loaded.arch, loaded.transform.channels).to(device)
    found: list[tuple[str, nn.Module, str]] = [("untrained", start, hash_state(start.state_dict()))]
    size = 4 * images * Pixels(loaded.transform, False).embed_dim
    if size > MAX_PIXEL_BYTES:
        log.warning(f"no raw-pixel baselines: their features would take {size / 2**30:.0f} GiB of memory")
        return found
    pixels = (("pixels", False), ("pixels_normalised", True))
    return [*found, *((name, Pixels(loaded.transform, normalised).to(device), "") for name, normalised in pixels)]
