"""What a trained backbone has to beat: the same network untrained, and no network at all. B batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dino_xcit.models import BackboneOutput, build_backbone
from dino_xcit.runtime import logging as log
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import LoadedBackbone, hash_state

MAX_PIXEL_BYTES = 4 << 30
"""Of raw-pixel features that are still worth comparing with."""


class Pixels(nn.Module):
    """The prepared picture itself as a feature: values between 0 and 1, row by row, [B, 3 * crop * crop].

    With ``normalised`` the values as a network gets them, mean subtracted: under cosine similarity that is another,
    often stronger, baseline.
    """

    def __init__(self, transform: EvalTransform, normalised: bool) -> None:
        super().__init__()
        self.embed_dim = 3 * transform.crop**2
        self.transform, self.normalised = transform, normalised

    def forward(self, images: Tensor) -> BackboneOutput:
        """``images`` [B, 3, crop, crop], normalised, as for any backbone."""
        if not self.normalised:
            per_channel = torch.tensor((self.transform.mean, self.transform.std), device=images.device)
            mean, std = per_channel.view(2, 3, 1, 1)
            images = images * std + mean
        return BackboneOutput(images.flatten(1), images.flatten(2).transpose(1, 2), (images.shape[2], images.shape[3]))


def untrained(arch: str) -> nn.Module:
    """The architecture with the weights it starts from, seed 0, in eval mode."""
    torch.manual_seed(0)
    return build_backbone(arch).eval().requires_grad_(False)


def baselines(loaded: LoadedBackbone, images: int, device: torch.device) -> list[tuple[str, nn.Module, str]]:
    """Name, module and hash of its weights: the same architecture untrained, and pixels as they are and normalised.

    Pixels have no hash: they are quicker to make than to read. They are left out, with a warning, where the features of
    so many ``images`` would not fit into memory.
    """
    start = untrained(loaded.arch).to(device)
    found: list[tuple[str, nn.Module, str]] = [("untrained", start, hash_state(start.state_dict()))]
    size = 4 * images * Pixels(loaded.transform, False).embed_dim
    if size > MAX_PIXEL_BYTES:
        log.warning(f"no raw-pixel rows, their features would take {size / 2**30:.0f} GiB of memory")
        return found
    pixels = (("pixels", False), ("pixels_normalised", True))
    return [*found, *((name, Pixels(loaded.transform, normalised).to(device), "") for name, normalised in pixels)]
