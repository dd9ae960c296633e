"""Which features a linear head sees: the class token, and what stands beside it (``--features``).

All that the wanted choices need is computed in one forward pass and kept as one row an image; a head sees some columns
of it, side by side. Which choices there are depends on whether a backbone's blocks have class tokens.

A ViT's have, and the choices are those of DINO's eval_linear.py (facebookresearch/dino) and of DINOv2's linear
evaluation (arXiv 2304.07193); class tokens and patch tokens are taken through the final norm:

- ``cls``: the last block's class token [D].
- ``cls+mean``: beside it the mean of its patch tokens [2 D]; DINO's for ViT-B.
- ``lastN``, such as ``last4``: the class tokens of the last N blocks [N D]; DINO's for ViT-S is ``last4``.
- ``lastN+mean``: beside them the mean of the last block's patch tokens [(N + 1) D].

An XCiT's class token exists only after class attention, and another network's may not exist at all:

- ``cls``: the feature vector that the backbone gives [D].
- ``cls+mean``: beside it the mean of the patch tokens of the last block that mixes patches; for XCiT of the last XCA
  block, before class attention and without the final norm.
- ``lastN``: ``cls+mean`` and the mean patch tokens after each of the N - 1 blocks before, without norm. ``last1`` is
  ``cls+mean``.

B batch, D features of the backbone, W features of a row, n images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.models import BackboneOutput

_CHOICE = re.compile(r"cls(\+mean)?|last([1-9]\d?)(\+mean)?")


def blocks_of(choice: str) -> int:
    """How many of the last blocks a choice looks into: 0 for ``cls``, 1 for ``cls+mean``.

    Raises:
        InputError: no such choice.
    """
    found = _CHOICE.fullmatch(choice)
    if found is None:
        raise InputError(
            f"features has {choice!r}, expected cls, cls+mean, or lastN such as last4 (of a ViT also last4+mean)"
        )
    return int(found[2] or bool(found[1]))


class Rows:
    """Some rows and columns of a matrix that may be memory-mapped: read when asked for, never copied whole."""

    def __init__(
        self, matrix: NDArray[np.float32], columns: slice | None = None, chosen: NDArray[np.int64] | None = None
    ) -> None:
        """``chosen``: which rows, in what order; None: all, as of ``columns``."""
        self.matrix, self.chosen = matrix, chosen
        self.columns = columns or slice(0, matrix.shape[1])
        self.width = self.columns.stop - self.columns.start

    def some(self, rows: NDArray[np.int64]) -> Rows:
        """Some of these rows."""
        return Rows(self.matrix, self.columns, rows if self.chosen is None else self.chosen[rows])

    def __len__(self) -> int:
        return len(self.matrix if self.chosen is None else self.chosen)

    def __getitem__(self, part: slice) -> NDArray[np.float32]:
        """[those of the rows, width], a copy."""
        return np.array(self.matrix[part if self.chosen is None else self.chosen[part], self.columns])


class PooledBackbone(nn.Module):
    """A frozen backbone whose ``cls_token`` is a row of all that some choices need: [B, W]."""

    def __init__(self, backbone: nn.Module, choices: Sequence[str], crop: int, device: torch.device) -> None:
        """Wrap ``backbone``, which is on ``device`` and in eval mode.

        Args:
            choices: see above; ``cls`` is always there.
            crop: pixels a side of the images, for finding out how wide each part is.

        Raises:
            InputError: no such choice, or one that the backbone does not have.
        """
        super().__init__()
        self.backbone = backbone
        wanted = {"cls": 0} | {name: blocks_of(name) for name in choices}
        self._blocks, depth = max(wanted.values()), _depth(backbone)
        if self._blocks > max(1, depth):
            name = max(wanted, key=lambda each: wanted[each])
            has = f"has {depth}" if depth else "does not tell its blocks' tokens"
            raise InputError(f"features has {name}, which needs {self._blocks} blocks, but the backbone {has}")
        image = torch.zeros(1, 3, crop, crop, device=device)
        with torch.inference_mode():
            self._has_class_tokens = bool(self._blocks and depth and backbone(image, layers=(-1,)).layer_cls)
            for name in wanted:
                if name.startswith("last") and name.endswith("+mean") and not self._has_class_tokens:
                    raise InputError(
                        f"features has {name}, but the blocks of this backbone have no class tokens: {name[:-5]} has "
                        "the means of their patch tokens"
                    )
            self._mean = self._blocks > 0 and (not self._has_class_tokens or any("+mean" in name for name in wanted))
            widths = [part.shape[1] for part in self._parts(image)] if self._blocks else [int(backbone.embed_dim)]  # type: ignore[arg-type]
        ends: list[int] = np.cumsum(widths).tolist()
        self.embed_dim = ends[-1]
        self.columns = {name: self._columns(name, count, ends) for name, count in wanted.items()}
        """Of a row, those that each choice sees. ``cls`` is always among them."""

    @property
    def identity(self) -> str:
        """Added to the weights' hash, it tells rows apart; empty where a row is the class token."""
        if not self._has_class_tokens:
            return f" cls and {self._blocks} blocks" if self._blocks else ""
        return f"{' mean and' if self._mean else ''} {self._blocks} class tokens"

    def forward(self, images: Tensor) -> BackboneOutput:
        """As the backbone's, but for the class token."""
        if not self._blocks:
            out: BackboneOutput = self.backbone(images)
            return out
        row = torch.cat([part.float() for part in self._parts(images)], dim=1)
        return BackboneOutput(row, row[:, None], (1, 1))

    def _parts(self, images: Tensor) -> list[Tensor]:
        """A row's parts: the mean first for class tokens, so that every choice is one run of columns."""
        out: BackboneOutput = self.backbone(images, layers=tuple(range(-2, -self._blocks - 1, -1)))
        mean = [out.patch_tokens.float().mean(dim=1)] if self._mean else []
        if self._has_class_tokens:
            return [*mean, out.cls_token, *out.layer_cls]
        return [out.cls_token, *mean, *(tokens.float().mean(dim=1) for tokens in out.layers)]

    def _columns(self, choice: str, blocks: int, ends: Sequence[int]) -> slice:
        """``ends``: where each part of a row ends."""
        if not self._has_class_tokens:
            return slice(0, ends[blocks])
        start = ends[0] if self._mean and not choice.endswith("+mean") else 0
        return slice(start, ends[max(1, blocks) - 1 + self._mean])  # cls looks into no block before


def _depth(backbone: nn.Module) -> int:
    """How many blocks ``layers=`` counts from the end; 0 where the backbone does not say."""
    blocks = getattr(backbone, "blocks", None)  # an XCiT's XCA blocks
    if isinstance(blocks, nn.ModuleList):
        return len(blocks)
    return len(getattr(getattr(backbone, "model", None), "feature_info", ()))  # a timm model's
