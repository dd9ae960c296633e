"""The DINO projection head (arXiv 2104.14294, appendix C). B samples, D features, K prototypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Prototypes(nn.Module):
    """A linear layer without bias whose rows are ``weight_g * weight_v / |weight_v|``.

    The two names are those of ``torch.nn.utils.weight_norm``, under which every published head is stored. The
    direction keeps the default initialisation of ``nn.Linear``: only its *length* acts, as an inverse learning rate.
    """

    def __init__(self, in_dim: int, out_dim: int, train_length: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=train_length)
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_g * F.normalize(self.weight_v, dim=1)
        return F.linear(x, weight.to(x.dtype) if torch.is_autocast_enabled(x.device.type) else weight)


class DINOHead(nn.Module):
    """Backbone features [B, D] to logits over prototypes [B, K].

    Args:
        in_dim: D, the backbone's ``embed_dim``.
        out_dim: K.
        use_bn: BatchNorm after the hidden layers (``--use_bn_in_head``).
        norm_last_layer: freeze the prototypes' lengths at 1.
        hidden_dim, bottleneck_dim: 2048 and 256 in every published model.
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
        self.last_layer = Prototypes(bottleneck_dim, out_dim, train_length=not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        # Unit length is a sum over 256 products: float32 at least, also under autocast.
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        return self.last_layer(x)
