"""One network over all views of a batch. B batch, V views, D features, K prototypes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.models.xcit import XCiT


class MultiCropOutput(NamedTuple):
    """Output of :class:`MultiCropWrapper`; rows are view-major: all samples of view 0, then of view 1, ..."""

    logits: Tensor
    """[V * B, K], output of the head."""
    features: Tensor
    """[V * B, D], class tokens of the backbone."""


class MultiCropWrapper(nn.Module):
    """Backbone and head of the student or the teacher.

    BatchNorm statistics of the backbone are per crop size; the head runs once over all views.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.pack_crops: bool | None = None
        """Whether an XCiT runs once for all crop sizes; None: on a GPU, where that takes fewer launches."""
        self._takes_keys = "drop_path_keys" in inspect.signature(backbone.forward).parameters
        self.backbone = backbone
        self.head = head

    def forward(
        self, crops: Sequence[Tensor], drop_path_keys: Sequence[Tensor | None] | None = None
    ) -> MultiCropOutput:
        """Run the network over all views.

        Args:
            crops: one tensor per crop size, [views of that size * B, 3, size, size].
            drop_path_keys: one tensor [views of that size * B] or None per crop size.
        """
        if drop_path_keys is None:
            drop_path_keys = [None] * len(crops)
        pack = crops[0].is_cuda if self.pack_crops is None else self.pack_crops
        with _explaining_single_values(crops):
            if pack and len(crops) > 1 and isinstance(self.backbone, XCiT):
                features = self.backbone.forward_crops(crops, drop_path_keys)
            else:
                pairs = zip(crops, drop_path_keys, strict=True)
                features = torch.cat([self._features(crop, keys) for crop, keys in pairs])
        return MultiCropOutput(self.head(features), features)

    def _features(self, crops: Tensor, keys: Tensor | None) -> Tensor:
        output = self.backbone(crops, drop_path_keys=keys) if self._takes_keys else self.backbone(crops)
        features: Tensor = output.cls_token
        return features


@contextmanager
def _explaining_single_values(crops: Sequence[Tensor]) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        smallest = min(crop.shape[-1] for crop in crops)
        raise InputError(
            f"BatchNorm needs more than one value: a single crop of {smallest} px makes one token; raise "
            "--batch-size-per-gpu, or the size or number of the crops"
        ) from error
