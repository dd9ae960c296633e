"""DINO's vision transformers (``vit_small_12_p16``): timm's, with sizes that follow from the name alone.

The names are made as XCiT's are: family, depth, patch size, and the image side in pixels where it is not 224, which
decides how many learnt positions there are. Width and heads are those of DeiT (arXiv 2012.12877, table 1) and ViT
(arXiv 2010.11929, table 1); facebookresearch/dino has tiny, small and base.
"""

from __future__ import annotations

import re
from functools import partial

from torch import nn

from dino_xcit.errors import InputError

VIT_FAMILIES: dict[str, tuple[int, int]] = {
    "tiny": (192, 3), "small": (384, 6), "base": (768, 12), "large": (1024, 16), "huge": (1280, 16),
}  # fmt: skip
"""Width and heads. A state dict shows the width alone: heads have no shape of their own."""

DEPTH_LIMIT, PATCH_LIMIT, SIDE_LIMIT = 99, 64, 4096
_NAME = re.compile(r"vit_(tiny|small|base|large|huge)_(\d{1,2})_p(\d{1,2})(?:_(\d{2,4}))?")


def vit_name(width: int, depth: int, patch: int, side: int) -> str | None:
    """The name of a transformer of these sizes, or None where there is none."""
    for family, (dim, _) in VIT_FAMILIES.items():
        if dim == width and 1 <= depth <= DEPTH_LIMIT and 1 <= patch <= PATCH_LIMIT and patch <= side <= SIDE_LIMIT:
            return f"vit_{family}_{depth}_p{patch}" + (f"_{side}" if side != 224 else "")
    return None


def vit_side(name: str) -> int | None:
    """Pixels a side of the images that the named transformer's positions are for; None for another kind of name."""
    found = _NAME.fullmatch(name)
    return int(found[4] or 224) if found else None


def build_vit(name: str, drop_path_rate: float = 0.0) -> nn.Module:
    """A fresh transformer without a classifier; other image sizes than its own interpolate its positions.

    Args:
        name: such as ``vit_small_12_p16`` or ``vit_base_12_p8_384``.

    Raises:
        InputError: no such name.
    """
    found = _NAME.fullmatch(name)
    depth, patch, side = (int(found[2]), int(found[3]), int(found[4] or 224)) if found else (0, 0, 0)
    if not found or not (depth and 1 <= patch <= PATCH_LIMIT and patch <= side <= SIDE_LIMIT) or side % patch:
        raise InputError(
            f"unknown arch {name!r}: expected vit_{{{'|'.join(VIT_FAMILIES)}}}_DEPTH_pPATCH, and _SIDE where images "
            "are not 224 pixels wide, such as vit_small_12_p16 (the side a multiple of the patch)"
        )
    from timm.models.vision_transformer import VisionTransformer  # timm takes a second to import

    from dino_xcit.models.timm_backbone import TimmBackbone

    width, heads = VIT_FAMILIES[found[1]]
    return TimmBackbone(
        VisionTransformer(
            img_size=side,
            patch_size=patch,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            num_classes=0,
            dynamic_img_size=True,
            drop_path_rate=drop_path_rate,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
    )
