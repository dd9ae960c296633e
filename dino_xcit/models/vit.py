"""Vision transformers by names that say all of their sizes (``vit_small_12_p16``): timm's code.

The names are made as XCiT's are: family, depth, patch size, and what is not as in DINO's: the image side in pixels
where it is not 224 (it decides how many learnt positions there are), ``_hN`` heads where the family has another number,
``_ls`` for LayerScale and ``_regN`` for N registers. So DINOv2's are ``vit_small_12_p14_518_ls`` and
``vit_small_12_p14_518_ls_reg4``, MoCo v3's small one ``vit_small_12_p16_h12``. Width and heads are those of DeiT
(arXiv 2012.12877, table 1) and ViT (arXiv 2010.11929, table 1); facebookresearch/dino has tiny, small and base.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

from torch import nn

from dino_xcit.errors import InputError

VIT_FAMILIES: dict[str, tuple[int, int]] = {
    "tiny": (192, 3), "small": (384, 6), "base": (768, 12), "large": (1024, 16), "huge": (1280, 16),
}  # fmt: skip
"""Width and heads. A state dict shows the width alone: heads have no shape of their own."""

_LAYER_SCALE = 1e-5
"""LayerScale before training, as in DINOv2 (its ssl_default_config.yaml) and in timm's networks of that name."""
_NAME = re.compile(
    r"vit_(tiny|small|base|large|huge)_([1-9]\d?)_p([1-9]\d?)(?:_([1-9]\d{1,3}))?(?:_h([1-9]\d?))?(_ls)?(?:_reg(\d\d?))?"
)


@dataclass(frozen=True)
class VitShape:
    """All that a transformer's name says."""

    family: str
    depth: int
    patch: int
    """Pixels a side."""
    side: int
    """Pixels a side of the images that the positions are for."""
    heads: int
    layer_scale: bool = False
    registers: int = 0
    """Tokens beside the class token that stand for nothing in the image (arXiv 2309.16588)."""

    @property
    def width(self) -> int:
        """Features of a token."""
        return VIT_FAMILIES[self.family][0]

    @property
    def name(self) -> str:
        """The name that :func:`vit_shape` reads as these sizes."""
        return (
            f"vit_{self.family}_{self.depth}_p{self.patch}"
            + (f"_{self.side}" if self.side != 224 else "")
            + (f"_h{self.heads}" if self.heads != VIT_FAMILIES[self.family][1] else "")
            + ("_ls" if self.layer_scale else "")
            + (f"_reg{self.registers}" if self.registers else "")
        )

    def can_be(self) -> bool:
        """Whether there is such a network, of sizes that a name can say."""
        is_name = _NAME.fullmatch(self.name) is not None
        return is_name and self.side % self.patch == 0 and self.width % self.heads == 0


def family_of(width: int) -> str | None:
    """The family of transformers with so many features a token, or None."""
    return next((family for family, (dim, _) in VIT_FAMILIES.items() if dim == width), None)


def vit_shape(name: str) -> VitShape | None:
    """The sizes that a name says; None for another kind of name, and where there is no such network."""
    found = _NAME.fullmatch(name)
    if not found:
        return None
    family, depth, patch, side, heads, scaled, registers = found.groups()
    heads = int(heads or VIT_FAMILIES[family][1])
    shape = VitShape(family, int(depth), int(patch), int(side or 224), heads, bool(scaled), int(registers or 0))
    return shape if shape.can_be() else None


def build_vit(name: str, drop_path_rate: float = 0.0) -> nn.Module:
    """A fresh transformer without a classifier; other image sizes than its own interpolate its positions.

    Args:
        name: such as ``vit_small_12_p16``, ``vit_base_12_p8_384`` or ``vit_base_12_p14_518_ls_reg4``.

    Raises:
        InputError: no such name.
    """
    shape = vit_shape(name)
    if shape is None:
        raise InputError(
            f"unknown arch {name!r}: expected vit_FAMILY_DEPTH_pPATCH[_SIDE][_hHEADS][_ls][_regN], such as "
            f"vit_small_12_p14_518_ls_reg4; families: {', '.join(VIT_FAMILIES)}; the side (224 if not given) is a "
            "multiple of the patch"
        )
    from timm.models.vision_transformer import VisionTransformer  # timm takes a second to import

    from dino_xcit.models.timm_backbone import TimmBackbone

    return TimmBackbone(
        VisionTransformer(
            img_size=shape.side,
            patch_size=shape.patch,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            num_classes=0,
            init_values=_LAYER_SCALE if shape.layer_scale else None,
            reg_tokens=shape.registers,
            no_embed_class=bool(shape.registers),  # as timm has DINOv2's: positions are of patches alone
            dynamic_img_size=True,
            drop_path_rate=drop_path_rate,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
    )
