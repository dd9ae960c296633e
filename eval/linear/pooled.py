"""Input features of linear classifiers (``--features``).

One forward pass computes the features of all choices as one row per image; each choice is a contiguous range of
columns. The choices depend on whether the blocks of a backbone have class tokens.

For a ViT, whose blocks have class tokens, they follow DINO's eval_linear.py (facebookresearch/dino) and DINOv2's linear
evaluation (arXiv 2304.07193), with the final norm applied to all tokens:

- ``cls``: class token of the last block [D].
- ``cls+mean``: the same and the mean of its patch tokens [2 D], DINO's choice for ViT-B.
- ``lastN``, such as ``last4``: class tokens of the last N blocks [N D]; ``last4`` is DINO's choice for ViT-S.
- ``lastN+mean``: the same and the mean of the last block's patch tokens [(N + 1) D].

For an XCiT, whose class token exists only after class attention, and for other networks:

- ``cls``: feature vector of the backbone [D].
- ``cls+mean``: the same and the mean patch token of the last block that mixes patches [2 D]; for XCiT of the last XCA
  block, before class attention and without the final norm.
- ``lastN``: ``cls+mean`` and the mean patch tokens of each of the N - 1 blocks before, without norm [(N + 1) D].
  ``last1`` equals ``cls+mean``.

B batch size, D features of the backbone, W features of a row, n images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.models import BackboneOutput
from eval.config import blocks_of
from eval.pooling import autocast


class Rows:
    """Lazy view of some rows and columns of a matrix that may be memory-mapped."""

    def __init__(
        self, matrix: NDArray[np.float32], columns: slice | None = None, chosen: NDArray[np.int64] | None = None
    ) -> None:
        """Select ``columns`` and rows ``chosen``, in their order; None selects all."""
        self.matrix, self.chosen = matrix, chosen
        self.columns = columns or slice(0, matrix.shape[1])
        self.width = self.columns.stop - self.columns.start

    def some(self, rows: NDArray[np.int64]) -> Rows:
        """Select some of these rows."""
        return Rows(self.matrix, self.columns, rows if self.chosen is None else self.chosen[rows])

    def __len__(self) -> int:
        return len(self.matrix if self.chosen is None else self.chosen)

    def __getitem__(self, part: slice) -> NDArray[np.float32]:
        """Return a copy of the rows, [n, width]."""
        return np.array(self.matrix[part if self.chosen is None else self.chosen[part], self.columns])


class PooledBackbone(nn.Module):
    """A frozen backbone whose ``cls_token`` [B, W] is the concatenated features of several choices."""

    def __init__(
        self, backbone: nn.Module, choices: Sequence[str], crop: int, device: torch.device, precision: str = "fp32",
        channels: int = 3,
    ) -> None:  # fmt: skip
        """Wrap ``backbone``, which is on ``device`` and in eval mode.

        Args:
            choices: choices of features; ``cls`` is always included.
            crop: image size in pixels, for the forward pass that determines the width of each part.
            precision: of the backbone's products.
            channels: of the images.

        Raises:
            InputError: a choice is unknown or not supported by the backbone.
        """
        super().__init__()
        self.backbone, self._precision = backbone, precision
        wanted = {"cls": 0} | {name: blocks_of(name) for name in choices}
        self._blocks, depth = max(wanted.values()), _depth(backbone)
        if self._blocks > max(1, depth):
            name = max(wanted, key=lambda each: wanted[each])
            has = f"has {depth}" if depth else "does not return tokens of blocks"
            raise InputError(f"features has {name}, which needs {self._blocks} blocks, but the backbone {has}")
        image = torch.zeros(1, channels, crop, crop, device=device)
        with torch.inference_mode():
            self._has_class_tokens = bool(self._blocks and depth and backbone(image, layers=(-1,)).layer_cls)
            for name in wanted:
                if name.startswith("last") and name.endswith("+mean") and not self._has_class_tokens:
                    raise InputError(
                        f"features has {name}, but the blocks of this backbone have no class tokens: give "
                        f"{name[:-5]}, which includes their mean patch tokens"
                    )
            self._mean = self._blocks > 0 and (not self._has_class_tokens or any("+mean" in name for name in wanted))
            widths = [part.shape[1] for part in self._parts(image)] if self._blocks else [int(backbone.embed_dim)]  # type: ignore[arg-type]
        ends: list[int] = np.cumsum(widths).tolist()
        self.embed_dim = ends[-1]
        self.columns = {name: self._columns(name, count, ends) for name, count in wanted.items()}
        """Columns of each choice, including ``cls``."""

    @property
    def identity(self) -> str:
        """Suffix to the hash of the weights that identifies the features of a row; empty for class tokens in fp32."""
        precision = f" {self._precision}" if self._precision != "fp32" else ""
        if not self._has_class_tokens:
            return (f" cls and {self._blocks} blocks" if self._blocks else "") + precision
        return f"{' mean and' if self._mean else ''} {self._blocks} class tokens{precision}"

    def forward(self, images: Tensor) -> BackboneOutput:
        """Run the backbone and return the row of features as the class token."""
        with autocast(self._precision, images.device):
            parts = self._parts(images) if self._blocks else [self.backbone(images).cls_token]
        row = torch.cat([part.float() for part in parts], dim=1)
        return BackboneOutput(row, row[:, None], (1, 1))

    def _parts(self, images: Tensor) -> list[Tensor]:
        """Compute the parts of a row, ordered so that each choice is a contiguous range of columns."""
        out: BackboneOutput = self.backbone(images, layers=tuple(range(-2, -self._blocks - 1, -1)))
        mean = [out.patch_tokens.float().mean(dim=1)] if self._mean else []
        if self._has_class_tokens:
            return [*mean, out.cls_token, *out.layer_cls]
        return [out.cls_token, *mean, *(tokens.float().mean(dim=1) for tokens in out.layers)]

    def _columns(self, choice: str, blocks: int, ends: Sequence[int]) -> slice:
        """Return the columns of a choice; ``ends`` are the end columns of the parts of a row."""
        if not self._has_class_tokens:
            return slice(0, ends[blocks])
        start = ends[0] if self._mean and not choice.endswith("+mean") else 0
        return slice(start, ends[max(1, blocks) - 1 + self._mean])  # cls needs 0 blocks, but has one part


def _depth(backbone: nn.Module) -> int:
    """Return the number of blocks that ``layers=`` of the backbone's forward supports; 0 if unknown."""
    blocks = getattr(backbone, "blocks", None)  # XCA blocks of an XCiT
    if isinstance(blocks, nn.ModuleList):
        return len(blocks)
    return len(getattr(getattr(backbone, "model", None), "feature_info", ()))  # timm models
