"""Vision transformers by name (``vit_small_12_p16``), built from timm's code.

A name consists of family, depth and patch size, followed by deviations from DINO's models: the image side in pixels if
not 224 (it sets the number of position embeddings), ``_hN`` for another number of heads, ``_ls`` for LayerScale and
``_regN`` for N registers. Examples: ``vit_small_12_p14_518_ls`` and ``vit_small_12_p14_518_ls_reg4`` (DINOv2),
``vit_small_12_p16_h12`` (MoCo v3). Widths and heads are those of DeiT (arXiv 2012.12877, table 1) and ViT (arXiv
2010.11929, table 1).
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
"""Width and heads of each family. A state dict determines the width but not the number of heads."""

_LAYER_SCALE = 1e-5
"""Initial LayerScale, as in DINOv2 (ssl_default_config.yaml) and timm."""
_NAME = re.compile(
    r"vit_(tiny|small|base|large|huge)_([1-9]\d?)_p([1-9]\d?)(?:_([1-9]\d{1,3}))?(?:_h([1-9]\d?))?(_ls)?(?:_reg(\d\d?))?"
)


@dataclass(frozen=True)
class VitShape:
    """Sizes of a vision transformer."""

    family: str
    depth: int
    patch: int
    """Side of a patch in pixels."""
    side: int
    """Image side of the position embeddings in pixels."""
    heads: int
    layer_scale: bool = False
    registers: int = 0
    """Number of register tokens (arXiv 2309.16588)."""

    @property
    def width(self) -> int:
        """Features per token."""
        return VIT_FAMILIES[self.family][0]

    @property
    def name(self) -> str:
        """The inverse of :func:`vit_shape`."""
        return (
            f"vit_{self.family}_{self.depth}_p{self.patch}"
            + (f"_{self.side}" if self.side != 224 else "")
            + (f"_h{self.heads}" if self.heads != VIT_FAMILIES[self.family][1] else "")
            + ("_ls" if self.layer_scale else "")
            + (f"_reg{self.registers}" if self.registers else "")
        )

    def can_be(self) -> bool:
        """Whether these sizes are valid and have a name."""
        is_name = _NAME.fullmatch(self.name) is not None
        return is_name and self.side % self.patch == 0 and self.width % self.heads == 0


def family_of(width: int) -> str | None:
    """Return the family with this width, or None."""
    return next((family for family, (dim, _) in VIT_FAMILIES.items() if dim == width), None)


def vit_shape(name: str) -> VitShape | None:
    """Parse a name; None if it is not the name of a valid vision transformer."""
    found = _NAME.fullmatch(name)
    if not found:
        return None
    family, depth, patch, side, heads, scaled, registers = found.groups()
    heads = int(heads or VIT_FAMILIES[family][1])
    shape = VitShape(family, int(depth), int(patch), int(side or 224), heads, bool(scaled), int(registers or 0))
    return shape if shape.can_be() else None


def build_vit(name: str, drop_path_rate: float = 0.0) -> nn.Module:
    """Build a vision transformer with random weights and no classifier. Position embeddings are interpolated.

    Args:
        name: such as ``vit_small_12_p16``, ``vit_base_12_p8_384`` or ``vit_base_12_p14_518_ls_reg4``.

    Raises:
        InputError: the name is invalid.
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
            no_embed_class=bool(shape.registers),  # as timm's DINOv2 models: position embeddings for patches only
            dynamic_img_size=True,
            drop_path_rate=drop_path_rate,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
    )
