"""The DINO projection head (arXiv 2104.14294, appendix C). B samples, D features, K prototypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dino_xcit.models.fused import product, product_dtype


class _ProductWithUnitRows(torch.autograd.Function):
    """x @ (g * v / |v|)^T without materialising g * v / |v|, which for 65,536 prototypes is as large as the backbone.

    The norms of v's rows scale the logits instead.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
        # On a CPU, casting the prototypes costs more than a float32 product with a few rows.
        dtype = x.dtype if x.device.type == "cpu" and len(x) <= 64 else product_dtype(x)
        length = torch.linalg.vector_norm(v, dim=1).clamp_min(1e-12)  # as in torch.nn.functional.normalize
        with torch.autocast(x.device.type, enabled=False):
            low_x, low_v = x.to(dtype), v.to(dtype)
            products = product(low_x, low_v.T)
        ctx.save_for_backward(low_x, g, v, low_v, products, length)
        return products * (g.squeeze(1) / length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low_x, g, v, low_v, products, length = ctx.saved_tensors
        scale = g.squeeze(1) / length
        scaled = (grad * scale).to(low_x.dtype)
        along = (grad * products).sum(dim=0)  # gradient of each logit's scale
        grad_v = product(scaled.T, low_x).to(v.dtype)
        grad_v.addcmul_(v, (along * scale / length.square())[:, None], value=-1)
        return (scaled @ low_v).to(grad.dtype), (along / length)[:, None], grad_v


class Prototypes(nn.Module):
    """Weight-normalised linear layer without bias: rows are ``weight_g * weight_v / |weight_v|``, at least float32.

    Parameter names are those of ``torch.nn.utils.weight_norm``, as in published heads. ``weight_v`` has the default
    initialisation of ``nn.Linear``; its norm acts as an inverse learning rate.
    """

    def __init__(self, in_dim: int, out_dim: int, train_length: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=train_length)
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return _ProductWithUnitRows.apply(x, self.weight_g, self.weight_v)


class ProjectionHead(nn.Module):
    """Backbone features [B, D] to unit vectors [B, bottleneck_dim].

    Args:
        in_dim: D, the backbone's ``embed_dim``.
        use_bn: BatchNorm after the hidden layers (``--use_bn_in_head``).
        hidden_dim, bottleneck_dim: 2048 and 256 in every published model.
    """

    def __init__(self, in_dim: int, use_bn: bool = False, hidden_dim: int = 2048, bottleneck_dim: int = 256) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (in_dim, hidden_dim):
            layers.append(nn.Linear(width, hidden_dim))
            if use_bn:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
        layers.append(nn.Linear(hidden_dim, bottleneck_dim))
        self.mlp = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        # Normalise in at least float32, also under autocast: the norm sums many products.
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class DINOHead(ProjectionHead):
    """Backbone features [B, D] to logits over prototypes [B, K].

    Args:
        out_dim: K.
        norm_last_layer: freeze the prototypes' lengths at 1.
        in_dim, use_bn, hidden_dim, bottleneck_dim: of :class:`ProjectionHead`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__(in_dim, use_bn, hidden_dim, bottleneck_dim)
        self.last_layer = Prototypes(bottleneck_dim, out_dim, train_length=not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(super().forward(x))
