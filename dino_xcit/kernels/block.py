"""XCiT's blocks with the kernels of this package, for training.

The twin is :meth:`dino_xcit.models.xcit.XCABlock.forward`. The last addition of each branch is left to the kernel of
the next norm, so blocks pass on the residual stream and the branch that is to be added.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from dino_xcit.kernels.add_norm import add_norm
from dino_xcit.kernels.layer_scale import fold
from dino_xcit.kernels.lpi import lpi
from dino_xcit.kernels.xca import attention
from dino_xcit.models.droppath import add_scaled
from dino_xcit.models.fused import layer_scaled, product_dtype
from dino_xcit.models.sizes import Sizes
from dino_xcit.models.xca import XCA
from dino_xcit.models.xcit import LPI, XCABlock


class Stream(NamedTuple):
    """The residual stream ``x + scale * branch``, not yet added."""

    x: Tensor
    """[T, D] float32."""
    branch: Tensor | None = None
    """[T, D]; None before the first block."""
    scale: Tensor | None = None
    """[T], stochastic depth's factor of the branch."""

    def total(self) -> Tensor:
        """Return x + scale * branch."""
        if self.branch is None or self.scale is None:
            return self.x
        return add_scaled(self.x, self.branch, self.scale[:, None])


def run_block(block: XCABlock, stream: Stream, sizes: Sizes, scales: Tensor) -> Stream:
    """Run a block in training mode.

    Args:
        block: a block of an XCiT in training mode.
        stream: tokens of crops of ``sizes``.
        sizes: crop sizes.
        scales: [3, T] float32, stochastic depth's factors of the three branches.
    """
    low = product_dtype(stream.x)
    if stream.branch is None or stream.scale is None:
        x, normed = stream.x, block.norm1(stream.x).to(low)
    else:
        x, normed = add_norm(stream.x, stream.branch, stream.scale, block.norm1, low)
    branch = layer_scaled(block.gamma1, partial(_attention, block.attn, sizes=sizes), normed)
    x, normed = add_norm(x, branch, scales[0], block.norm3, low)
    branch = layer_scaled(block.gamma3, partial(_local_patches, block.local_mp, sizes=sizes), normed)
    x, normed = add_norm(x, branch, scales[1], block.norm2, low)
    return Stream(x, layer_scaled(block.gamma2, partial(block.mlp, triton=True), normed), scales[2])


def _attention(module: XCA, x: Tensor, sizes: Sizes, layer_scale: Tensor | None = None) -> Tensor:
    low, images, tokens = product_dtype(x), [images for images, _ in sizes], [h * w for _, (h, w) in sizes]
    qkv = F.linear(x, *fold(None, module.qkv.weight, module.qkv.bias, low))
    proj = fold(layer_scale, module.proj.weight, module.proj.bias, low)
    return F.linear(attention(qkv, module.temperature, images, tokens), *proj)


def _local_patches(module: LPI, x: Tensor, sizes: Sizes, layer_scale: Tensor | None = None) -> Tensor:
    bias = module.conv2.bias
    assert bias is not None
    return lpi(x, sizes, module.conv1, module.bn, *fold(layer_scale, module.conv2.weight, bias, bias.dtype))
