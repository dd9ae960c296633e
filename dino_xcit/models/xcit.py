"""XCiT (arXiv 2106.09681) with the state-dict keys of the published checkpoints.

B batch, N tokens, D features, H heads, d = D / H features per head. Images are [B, channels, height, width] of any
size; the grid of tokens is ceil(height / patch) x ceil(width / patch).

Tokens are [B, N, D], which is the channels-last layout of [B, D, h, w], so the convolutions of the local patch
interaction need no copy. fused.py and xca.py have memory-saving implementations of the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dino_xcit.models import fused
from dino_xcit.models.droppath import DropPathMask, add_residual, drop_path_masks, residual_scales
from dino_xcit.models.fused import layer_scaled
from dino_xcit.models.output import BackboneOutput
from dino_xcit.models.sizes import Sizes, join_sizes, split_sizes
from dino_xcit.models.xca import XCA

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
Kernels = Literal["eager", "compile", "fused"]

# ---- Sizes


@dataclass(frozen=True)
class XCiTSize:
    """Sizes of an XCiT (paper, table 1, and the official model definitions)."""

    dim: int
    depth: int
    heads: int
    layer_scale: float
    """Initial LayerScale (eta in the paper)."""
    tokens_norm: bool = True
    """Whether the second norm of class attention covers all tokens (all published models but nano) or CLS only."""
    class_blocks: int = 2
    mlp_ratio: int = 4


XCIT_SIZES = {
    "xcit_nano_12": XCiTSize(128, 12, 4, 1.0, tokens_norm=False),
    "xcit_tiny_12": XCiTSize(192, 12, 4, 1.0),
    "xcit_tiny_24": XCiTSize(192, 24, 4, 1e-5),
    "xcit_small_12": XCiTSize(384, 12, 8, 1.0),
    "xcit_small_24": XCiTSize(384, 24, 8, 1e-5),
    "xcit_medium_24": XCiTSize(512, 24, 8, 1e-5),
    "xcit_large_24": XCiTSize(768, 24, 16, 1e-5),
    "xcit_pico_4": XCiTSize(64, 4, 4, 1.0),
    "xcit_micro_4": XCiTSize(128, 4, 4, 1.0),
}
"""The published sizes by their official names, and two of this project's own for small images and CPUs."""

PATCH_SIZES = (4, 8, 16)
"""Published models have 8 and 16."""

# ---- From pixels to tokens (section 3.4)


class ConvPatchEmbed(nn.Module):
    """Patch embedding by log2(patch) convolutions of stride 2 with BatchNorm and GELU; widths double up to D."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        stages = int(math.log2(patch_size))
        widths = [3] + [dim >> (stages - 1 - stage) for stage in range(stages)]
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            convolution = nn.Conv2d(narrow, wide, kernel_size=3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(convolution, nn.BatchNorm2d(wide)), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, channels, height, width] -> [B, N, D] and (h, w)."""
        x = images.contiguous(memory_format=torch.channels_last)
        *stages, last = (layer for layer in self.proj if isinstance(layer, nn.Sequential))
        for convolution, norm in stages:
            x = fused.norm_gelu(convolution(x), norm)
        x = last(x)
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


class PositionalEncodingFourier(nn.Module):
    """Sines and cosines of the relative position in the grid, projected to D features; for any grid."""

    hidden_dim = 32
    temperature = 10000.0

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(2 * self.hidden_dim, dim, kernel_size=1)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Return the encoding [1, N, D] of a grid of (h, w) tokens."""
        weight = self.token_projection.weight
        waves = _waves.__wrapped__ if torch.compiler.is_compiling() else _waves  # Dynamo warns about lru_cache
        code = waves(*grid, self.hidden_dim, self.temperature, weight.dtype, weight.device)
        return self.token_projection(code).flatten(2).transpose(1, 2)


@lru_cache(maxsize=16)
def _waves(
    height: int, width: int, features: int, temperature: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return [1, 2 * features, height, width]: sines and cosines of the row, then of the column.

    Each has interleaved sin, cos of features / 2 frequencies of the 1-based position scaled to (0, 2 pi].
    """

    def of(length: int) -> Tensor:
        position = torch.arange(1, length + 1, dtype=torch.float32, device=device)
        position = position / (length + 1e-6) * (2 * math.pi)
        pair = torch.arange(0, features, 2, dtype=torch.float32, device=device)
        angle = position[:, None] / temperature ** (pair / features)
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)

    with torch.inference_mode(False):  # a tensor of inference mode could not be used in training
        rows, columns = of(height)[:, None].expand(-1, width, -1), of(width)[None].expand(height, -1, -1)
        return torch.cat((rows, columns), dim=-1).to(dtype).permute(2, 0, 1)[None]


# ---- Layers (XCA is in xca.py). Each takes the LayerScale [D] of its output, see fused.layer_scaled.


class LPI(nn.Module):
    """Local patch interaction (section 3.3), tokens -> tokens: two depthwise 3x3 convolutions with GELU and BatchNorm
    between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, x: Tensor, sizes: Sizes, layer_scale: Tensor | None = None) -> Tensor:
        assert self.conv2.bias is not None
        low = fused.product_dtype(x)
        weight, bias = fused.fold_layer_scale(layer_scale, self.conv2.weight, self.conv2.bias, low)
        outs = []
        for tokens, (_, grid) in zip(split_sizes(x.to(low), sizes), sizes, strict=True):
            image = self.conv1(tokens.transpose(1, 2).unflatten(2, grid))  # a view: the channels-last layout
            outs.append(fused.gelu_norm_conv(image, self.bn, weight, bias).flatten(2).transpose(1, 2))
        return join_sizes(outs)


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, layer_scale: Tensor | None = None, triton: bool = False) -> Tensor:
        """``triton``: see :func:`fused.mlp`."""
        return fused.mlp(x, self.fc1, self.fc2, layer_scale, triton)


class XCABlock(nn.Module):
    """x + XCA, then x + LPI, then x + MLP, each with LayerNorm and LayerScale."""

    def __init__(self, size: XCiTSize) -> None:
        super().__init__()
        dim = size.dim
        self.norm1 = LayerNorm(dim)
        self.attn = XCA(dim, size.heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, dim * size.mlp_ratio)
        self.norm3 = LayerNorm(dim)
        self.local_mp = LPI(dim)
        self.gamma1, self.gamma2, self.gamma3 = (nn.Parameter(torch.full((dim,), size.layer_scale)) for _ in range(3))

    def forward(self, x: Tensor, sizes: Sizes, masks: Sequence[DropPathMask | None] = (None, None, None)) -> Tensor:
        """``masks``: stochastic depth of the three branches; None: keep all samples."""
        xca, lpi, mlp = masks
        x = add_residual(x, lambda rows: layer_scaled(self.gamma1, self.attn, self.norm1(rows), sizes), xca)
        # LPI has BatchNorm, so it runs on all samples, including those that drop the branch.
        x = add_residual(x, lambda rows: layer_scaled(self.gamma3, self.local_mp, self.norm3(rows), sizes), lpi, False)
        return add_residual(x, lambda rows: layer_scaled(self.gamma2, self.mlp, self.norm2(rows)), mlp)


# ---- Class attention (CaiT, arXiv 2103.17239)


class ClassAttention(nn.Module):
    """Attention with the class token as the only query.

    With a single query, keys and values need not be computed: q^T (W_k x) is (W_k^T q)^T x, and a weighted mean of
    W_v x is W_v times the weighted mean of x. A token costs 2 H D multiplications instead of 2 D^2.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, cls_token: Tensor, patches: Tensor, sizes: Sizes = ()) -> Tensor:
        """[B, 1, D] and [B, N, D] or [T, D] -> [B, 1, D]; the class token also attends to itself."""
        weight_q, weight_k, weight_v = self.qkv.weight.chunk(3)
        bias_q, _, bias_v = self.qkv.bias.chunk(3)  # softmax cancels the bias of the keys
        q = self._by_head(F.linear(cls_token, weight_q, bias_q) * self.scale)
        query = (q @ self._rows_by_head(weight_k)).transpose(0, 1)  # [B, H, D]
        parts = split_sizes(patches, sizes)
        images = [part.shape[0] for part in parts]
        mean = torch.cat(
            [self._mean(*of_size) for of_size in zip(query.split(images), cls_token.split(images), parts, strict=True)]
        )  # [B, H, D]
        out = mean.transpose(0, 1) @ self._rows_by_head(weight_v).transpose(1, 2)  # [H, B, d]
        return self.proj(out.transpose(0, 1).flatten(1)[:, None] + bias_v)

    @staticmethod
    def _mean(query: Tensor, cls_token: Tensor, patches: Tensor) -> Tensor:
        """Return the mean of class token and patches of one crop size, weighted by attention: [B, H, D]."""
        scores = torch.cat((query @ cls_token.transpose(1, 2), query @ patches.transpose(1, 2)), dim=2)
        attention = scores.softmax(dim=-1)
        return attention[:, :, :1] @ cls_token + attention[:, :, 1:] @ patches

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, 1, D] -> [H, B, d]."""
        return x.squeeze(1).unflatten(1, (self.num_heads, -1)).transpose(0, 1)

    def _rows_by_head(self, weight: Tensor) -> Tensor:
        """[D, *] -> [H, d, *]."""
        return weight.unflatten(0, (self.num_heads, -1))


class ClassAttentionBlock(nn.Module):
    """Class attention and MLP on the class token; patch tokens only get a norm and a residual.

    Reproduces two quirks of the published models, on which their weights depend: patch tokens receive
    gamma1 * norm1(x) as if they were the output of the attention, and with ``tokens_norm`` the second norm replaces x
    for all tokens, after which the last residual doubles the patch tokens.
    """

    def __init__(self, size: XCiTSize) -> None:
        super().__init__()
        dim = size.dim
        self.tokens_norm = size.tokens_norm
        self.norm1 = LayerNorm(dim)
        self.attn = ClassAttention(dim, size.heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, dim * size.mlp_ratio)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((dim,), size.layer_scale)) for _ in range(2))

    def forward(self, cls_token: Tensor, patches: Tensor, sizes: Sizes, last: bool) -> tuple[Tensor, Tensor]:
        """Update class token [B, 1, D] and patch tokens. The ``last`` block returns the patch tokens unchanged, because
        they are not used."""
        normed_cls, normed = self.norm1(cls_token), self.norm1(patches)
        cls_token = self.norm2(cls_token + self.gamma1 * self.attn(normed_cls, normed, sizes))
        cls_token = cls_token + self.gamma2 * self.mlp(cls_token)
        if not last:
            patches = patches + self.gamma1 * normed
            patches = 2 * (self.norm2(patches) if self.tokens_norm else patches)
        return cls_token, patches


# ---- The network


class XCiT(nn.Module):
    """XCiT backbone: images [B, channels, height, width] -> :class:`BackboneOutput` in train and eval mode.

    Args:
        size: widths and depths.
        patch_size: 4, 8 or 16 (published models: 8 and 16).
        drop_path_rate: probability of dropping a residual branch of an XCA block for a sample in training; constant
            over blocks and none in class attention, as in the official code.
    """

    def __init__(self, size: XCiTSize, patch_size: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        if patch_size not in PATCH_SIZES:
            raise ValueError(f"patch_size is {patch_size}, expected 4, 8 or 16")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate is {drop_path_rate}, expected 0 <= drop_path_rate < 1")
        self.embed_dim = size.dim
        self.patch_size = patch_size
        self.drop_path_rate = drop_path_rate
        self.recomputed_stages = 0
        """Number of stages that the backward pass recomputes (activation checkpointing): the stem, then XCA blocks."""
        self.kernels: Kernels = "eager"
        self.patch_embed = ConvPatchEmbed(patch_size, size.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.dim))
        self.blocks = nn.ModuleList(XCABlock(size) for _ in range(size.depth))
        self.cls_attn_blocks = nn.ModuleList(ClassAttentionBlock(size) for _ in range(size.class_blocks))
        self.norm = LayerNorm(size.dim)
        self.pos_embeder = PositionalEncodingFourier(size.dim)  # the official spelling: it is a state-dict key
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init_linear)

    def forward(
        self, images: Tensor, layers: Sequence[int] = (), drop_path_keys: Tensor | None = None
    ) -> BackboneOutput:
        """Features of ``images``.

        Args:
            images: [B, channels, height, width], normalised.
            layers: indices of XCA blocks (negative: from the end) whose patch tokens to return.
            drop_path_keys: [B] int64; the drop-path masks of sample i are a function of key i. None: drawn from torch's
                default generator.
        """
        cls_token, x, kept, sizes = self._run([images], [drop_path_keys], layers)
        return BackboneOutput(cls_token, x, sizes[0][1], kept)

    def forward_crops(self, crops: Sequence[Tensor], drop_path_keys: Sequence[Tensor | None]) -> Tensor:
        """Class tokens [B of all crop sizes, D] of crops of several sizes, with one call per layer.

        Equal to calling the network on each size and concatenating, up to rounding. BatchNorm statistics are per size.

        Args:
            crops: [B, channels, height, width] for each crop size.
            drop_path_keys: [B] or None for each crop size.
        """
        return self._run(crops, drop_path_keys, ())[0]

    def maps(self, images: Tensor, layers: Sequence[int], drop_path_keys: Tensor | None = None) -> list[Tensor]:
        """Return the outputs of XCA blocks as maps [B, D, h, w]; class attention is not computed.

        Args:
            images, layers, drop_path_keys: see :meth:`forward`.
        """
        _, kept, sizes = self._tokens([images], [drop_path_keys], layers)
        return [tokens.transpose(1, 2).unflatten(2, sizes[0][1]) for tokens in kept]

    def _run(
        self, crops: Sequence[Tensor], keys: Sequence[Tensor | None], layers: Sequence[int]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Sizes]:
        """Return class tokens [B, D] after the last norm, tokens, tokens of ``layers``, and crop sizes."""
        x, kept, sizes = self._tokens(crops, keys, layers)
        images = sum(count for count, _ in sizes)
        cls_token, patches = self.cls_token.expand(images, -1, -1).to(x.dtype), x
        for index, block in enumerate(self.cls_attn_blocks):
            cls_token, patches = block(cls_token, patches, sizes, last=index + 1 == len(self.cls_attn_blocks))
        return self.norm(cls_token[:, 0]), x, kept, sizes

    def _tokens(
        self, crops: Sequence[Tensor], keys: Sequence[Tensor | None], layers: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, ...], Sizes]:
        """Return the tokens after the last XCA block, those of ``layers``, and crop sizes."""
        recompute = self.recomputed_stages if torch.is_grad_enabled() else 0
        parts, grids = [], []
        for crop in crops:
            x, grid = recomputed(self.patch_embed, self.patch_embed, crop) if recompute else self.patch_embed(crop)
            # Keep the residual stream in the dtype of the parameters, also under autocast.
            parts.append(x.to(self.cls_token.dtype) + self.pos_embeder(grid))
            grids.append(grid)
        sizes: Sizes = tuple((part.shape[0], grid) for part, grid in zip(parts, grids, strict=True))
        x = join_sizes(parts)
        scales = self._drop_path_scales(sizes, keys, x.device)
        wanted = [range(len(self.blocks))[layer] for layer in layers]
        run = self._run_fused if self.kernels == "fused" and self.training else self._run_blocks
        x, kept = run(x, sizes, scales, recompute, wanted)
        return x, tuple(kept[index] for index in wanted), sizes

    def _run_blocks(
        self, x: Tensor, sizes: Sizes, scales: Tensor | None, recompute: int, wanted: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the tokens after the last XCA block, and those after the blocks in ``wanted``."""
        compiled, kept = self.kernels == "compile", {}
        masks: Sequence[DropPathMask | None] = [None] * (3 * len(self.blocks))
        if scales is not None:
            if len(sizes) > 1:
                scales = _by_token(scales, sizes)[..., None]  # [branches, T, 1]
            masks = drop_path_masks(scales, subset=not compiled and len(sizes) == 1)
        for index, block in enumerate(self.blocks):
            # Blocks are compiled for the sizes of training only.
            call = block.forward if compiled and not self.training else block
            inputs = (x, sizes, tuple(masks[3 * index : 3 * index + 3]))
            x = recomputed(block, call, *inputs) if index + 1 < recompute else call(*inputs)
            if index in wanted:
                kept[index] = x
        return x, kept

    def _run_fused(
        self, x: Tensor, sizes: Sizes, scales: Tensor | None, recompute: int, wanted: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """:meth:`_run_blocks` with Triton kernels."""
        from dino_xcit.kernels.block import Stream, run_block  # triton is missing on some systems

        stream, kept, branches = Stream(x.flatten(0, -2)), {}, 3 * len(self.blocks)
        factors = x.new_ones(branches, len(stream.x)) if scales is None else _by_token(scales, sizes)
        for index, (block, three) in enumerate(zip(self.blocks, factors.split(3), strict=True)):
            inputs: Any = (block, stream, sizes, three)
            stream = recomputed(block, run_block, *inputs) if index + 1 < recompute else run_block(*inputs)
            if index in wanted:
                kept[index] = stream.total().view_as(x)
        return stream.total().view_as(x), kept

    @property
    def stages(self) -> int:
        """Number of stages that can be recomputed."""
        return 1 + len(self.blocks)

    def use_kernels(self, kernels: Kernels, backend: str = "inductor") -> None:
        """Choose how the XCA blocks run in training; evaluation runs them eagerly.

        Args:
            kernels: ``eager``; ``fused``, the Triton kernels of :mod:`dino_xcit.kernels`; or ``compile``, torch.compile
                for each shape. Stochastic depth then multiplies dropped branches by 0, because shapes must not change
                between steps.
            backend: of torch.compile.
        """
        if kernels not in get_args(Kernels):
            raise ValueError(f"kernels is {kernels!r}, expected eager, compile or fused")
        self.kernels = kernels
        for block in self.blocks:
            block._compiled_call_impl = None
            if kernels == "compile":
                # Each block is one graph; Dynamo must not split it at the buckets of DistributedDataParallel.
                torch._dynamo.config.optimize_ddp = False  # type: ignore[assignment]
                block.compile(backend=backend, dynamic=False)

    def _drop_path_scales(self, sizes: Sizes, keys: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
        """Return the factor of each residual branch and image, [branches, B of all sizes, 1, 1]; None: all are kept."""
        if not self.training or self.drop_path_rate == 0.0:
            return None
        given = [
            torch.randint(1 << 62, (images,), device=device) if key is None else key
            for key, (images, _) in zip(keys, sizes, strict=True)
        ]
        return residual_scales(torch.cat(given), 3 * len(self.blocks), self.drop_path_rate)


def _by_token(scales: Tensor, sizes: Sizes) -> Tensor:
    """Expand [branches, B of all sizes, 1, 1] to the tokens of each image: [branches, T]."""
    parts = zip(scales[..., 0].split([images for images, _ in sizes], dim=1), sizes, strict=True)
    return torch.cat([part.expand(-1, -1, h * w).flatten(1) for part, (_, (h, w)) in parts], dim=1)


def _init_linear(module: nn.Module) -> None:
    """Truncated normal with std 0.02 for linear layers; convolutions keep PyTorch's default (as the official code)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# ---- Activation checkpointing


def recomputed(block: nn.Module, call: Callable[..., Any], *inputs: Any) -> Any:
    """Run ``call(*inputs)``, a forward pass of ``block``, with activation checkpointing.

    BatchNorm's running statistics are updated once although the block runs twice. Blocks do not use PyTorch's random
    generators (the drop-path masks are inputs), so their state is not saved.
    """
    contexts = nullcontext(), _running_statistics_left_alone(block)
    return checkpoint(call, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: contexts)


@contextmanager
def _running_statistics_left_alone(block: nn.Module) -> Iterator[None]:
    """Point the buffers at copies, which the recomputation updates instead. Without any update autograd would save
    other tensors than in the first pass, which ``checkpoint`` refuses."""
    originals = [(module, module._buffers) for module in block.modules()]
    try:
        for module, buffers in originals:
            module._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()}
        yield
    finally:
        for module, buffers in originals:
            module._buffers = buffers
