"""Which dtype a product is done in."""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would multiply ``x``: autocast's where it is on, which leaves float64 alone."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def folds_layer_scale(x: Tensor) -> bool:
    """Whether a layer's weights may be multiplied with LayerScale before they are cast to :func:`product_dtype`: not in
    float16, where a weight of 0.02 times the 1e-5 that deep networks start with has two bits left."""
    return product_dtype(x) is not torch.float16
