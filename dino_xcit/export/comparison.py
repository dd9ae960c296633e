"""How far what another library computes is from what we compute. B batch, N tokens, D features."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.export.photographs import Photographs
from dino_xcit.models.xcit import XCiT
from dino_xcit.transform import EvalTransform

Features = Callable[[Tensor], tuple[Tensor, ...]]
"""Images [B, 3, height, width], normalised, to the class token [B, D] and perhaps the patch tokens [B, N, D]."""

ROUNDINGS, MOST_ROUNDING = 30, 1e-3
"""So many times the original's own rounding pass, but never more than that (onnxruntime was seen at 8 times, in an
xcit_small_12_p16 with random weights)."""
XCIT_SIZES_COMPARED = ((224, 224), (256, 192), (97, 131))
"""Height and width: square, not square, and of neither a multiple of any patch."""


@dataclass(frozen=True)
class Difference:
    """Of one batch."""

    size: tuple[int, int]
    batch: int
    relative: float
    """The greatest difference of any value, over the greatest value of its output: 0 for the same bits."""
    rounding: float = 0.0
    """The same between the original in float32 and in float64; 0 where that was not computed."""

    def passes(self, tolerance: float) -> bool:
        """Whether this is rounding: two float32 programs that sum in other orders are as far apart as each of them is
        from the truth, which in a deep network may be more than ``tolerance``."""
        return self.relative <= max(tolerance, min(ROUNDINGS * self.rounding, MOST_ROUNDING))

    def __str__(self) -> str:
        own = f" (float32 itself {self.rounding:.1e})" if self.rounding else ""
        return f"{self.size[0]} x {self.size[1]}, batch {self.batch}: {self.relative:.1e}{own}"


def features_of(backbone: nn.Module, patch_tokens: bool) -> Features:
    """What a backbone of ours computes."""

    def features(images: Tensor) -> tuple[Tensor, ...]:
        out = backbone(images)
        return (out.cls_token, out.patch_tokens) if patch_tokens else (out.cls_token,)

    return features


def precise_features_of(backbone: nn.Module, patch_tokens: bool) -> Features | None:
    """What an XCiT of ours computes in float64; others may have constants in float32."""
    if not isinstance(backbone, XCiT):
        return None
    features = features_of(copy.deepcopy(backbone).double(), patch_tokens)
    return lambda images: features(images.double())


def sizes_compared(backbone: nn.Module, transform: EvalTransform) -> list[tuple[int, int]]:
    """The checkpoint's own size, and where the network takes any, three more."""
    own = (transform.crop, transform.crop)
    others = [size for size in XCIT_SIZES_COMPARED if size != own]
    return [own, *others] if isinstance(backbone, XCiT) else [own]


def differences(
    original: Features,
    exported: Features,
    sizes: list[tuple[int, int]],
    photographs: Photographs,
    transform: EvalTransform,
    precise: Features | None = None,
) -> list[Difference]:
    """One a size, with one image fewer each time.

    Args:
        precise: the original in float64, to know its rounding.

    Raises:
        InputError: the original's own features are not finite, or all zero: nothing can be compared with them.
    """
    found = []
    with torch.no_grad():
        for number, size in enumerate(sizes):
            count = max(1, len(photographs.images) - number)
            images = photographs.batch(count, size, transform)
            expected, given = original(images), exported(images)
            rounding = _greatest(precise(images), expected) if precise else 0.0
            found.append(Difference(size, count, _greatest(expected, given), rounding))
    return found


def _greatest(expected: Sequence[Tensor], given: Sequence[Tensor]) -> float:
    return max(_relative(a, b) for a, b in zip(expected, given, strict=True))


def _relative(expected: Tensor, given: Tensor) -> float:
    largest = float(expected.abs().max())
    if not math.isfinite(largest) or largest == 0:
        raise InputError(
            f"the network's features are {'all zero' if largest == 0 else 'not finite'}, so no export can be compared "
            "with them: export an earlier checkpoint"
        )
    if expected.shape != given.shape:
        return math.inf
    difference = float((expected - given).abs().max()) / largest
    return difference if math.isfinite(difference) else math.inf
