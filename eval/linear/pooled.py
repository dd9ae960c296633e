"""Which features a linear head sees: the class token, and what stands beside it (``--features``).

All that the wanted choices need is computed in one forward pass and kept as one row an image; a head sees some columns
of it. The choices are DINOv2's (arXiv 2304.07193, linear evaluation), as far as a backbone has them:

- ``cls``: the class token after the final norm.
- ``cls+mean``: beside it the mean of the patch tokens, of the last block that mixes patches. For XCiT that is the last
  XCA block, before class attention and without the final norm.
- ``lastN``, such as ``last4``: what the last N blocks know. A ViT's blocks have a class token each: it is ``cls+mean``
  and the class tokens of the N - 1 blocks before, through the final norm. An XCiT has a class token only after class
  attention: it is ``cls+mean`` and the mean patch tokens after each of the N - 1 XCA blocks before, without norm.
  ``last1`` is ``cls+mean``.

B batch, D features of the backbone, W features of a row, n images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.models import BackboneOutput

FORMS = "cls, cls+mean, or lastN such as last4"
_LAST = re.compile(r"last([1-9]\d?)")


def blocks_of(choice: str) -> int:
    """How many blocks have a part beside the final class token: 0 for ``cls``, 1 for ``cls+mean``.

    Raises:
        InputError: no such choice.
    """
    if choice in ("cls", "cls+mean"):
        return int(choice == "cls+mean")
    found = _LAST.fullmatch(choice)
    if found is None:
        raise InputError(f"features has {choice!r}, expected {FORMS}")
    return int(found[1])


class PooledBackbone(nn.Module):
    """A frozen backbone whose ``cls_token`` is a row of all that some choices need: [B, W]."""

    def __init__(self, backbone: nn.Module, choices: Sequence[str], crop: int, device: torch.device) -> None:
        """Wrap ``backbone``, which is on ``device`` and in eval mode.

        Args:
            choices: see above; ``cls`` is always there.
            crop: pixels a side of the images, for finding out how wide each part is.

        Raises:
            InputError: no such choice, or more blocks than the backbone has.
        """
        super().__init__()
        self.backbone = backbone
        wanted = {name: blocks_of(name) for name in choices}
        deepest = max(wanted.values(), default=0)
        depth = _depth(backbone)
        if deepest > max(1, depth):
            name = max(wanted, key=lambda each: wanted[each])
            has = f"has {depth}" if depth else "does not tell its blocks' tokens"
            raise InputError(f"features has {name}, which needs {deepest} blocks, but the backbone {has}: lower it")
        self._blocks = deepest
        ends = [int(backbone.embed_dim)]  # type: ignore[arg-type]
        if deepest:
            with torch.inference_mode():
                parts = self._parts(torch.zeros(1, 3, crop, crop, device=device))
            ends = np.cumsum([part.shape[1] for part in parts]).tolist()
        self.embed_dim = ends[-1]
        self.widths = {name: ends[count] for name, count in ({"cls": 0} | wanted).items()}
        """Of each choice: it is the first so many features of a row. ``cls`` is always among them."""

    @property
    def identity(self) -> str:
        """Added to the weights' hash, it tells rows apart; empty where a row is the class token."""
        return f" cls and {self._blocks} blocks" if self._blocks else ""

    def forward(self, images: Tensor) -> BackboneOutput:
        """As the backbone's, but for the class token."""
        if not self._blocks:
            out: BackboneOutput = self.backbone(images)
            return out
        row = torch.cat([part.float() for part in self._parts(images)], dim=1)
        return BackboneOutput(row, row[:, None], (1, 1))

    def _parts(self, images: Tensor) -> list[Tensor]:
        out: BackboneOutput = self.backbone(images, layers=tuple(range(-2, -self._blocks - 1, -1)))
        before = out.layer_cls or tuple(tokens.float().mean(dim=1) for tokens in out.layers)
        return [out.cls_token, out.patch_tokens.float().mean(dim=1), *before]


def _depth(backbone: nn.Module) -> int:
    """How many blocks ``layers=`` counts from the end; 0 where the backbone does not say."""
    blocks = getattr(backbone, "blocks", None)  # an XCiT's XCA blocks
    if isinstance(blocks, nn.ModuleList):
        return len(blocks)
    return len(getattr(getattr(backbone, "model", None), "feature_info", ()))  # a timm model's


class Rows:
    """Some rows and the first columns of a matrix that may be memory-mapped: read when asked for, never copied whole.

    It is what a head sees of the kept features.
    """

    def __init__(self, matrix: NDArray[np.float32], width: int, rows: NDArray[np.int64] | None = None) -> None:
        """``rows``: which, in what order; None: all."""
        self._matrix, self._rows, self.width = matrix, rows, width

    def some(self, rows: NDArray[np.int64]) -> Rows:
        """Some of these rows."""
        return Rows(self._matrix, self.width, rows if self._rows is None else self._rows[rows])

    def __len__(self) -> int:
        return len(self._matrix if self._rows is None else self._rows)

    def __getitem__(self, part: slice) -> NDArray[np.float32]:
        """[those of the rows, width], a copy."""
        return self.columns(0, self.width, part)

    def columns(self, first: int, stop: int, part: slice = slice(None)) -> NDArray[np.float32]:
        """[those of the rows, stop - first], a copy."""
        chosen = part if self._rows is None else self._rows[part]
        return np.array(self._matrix[chosen, first : min(stop, self.width)])


@dataclass(frozen=True)
class Labelled:
    """Images as heads see them."""

    rows: Mapping[str, Rows]
    """Of each choice of features."""
    labels: NDArray[np.int64]
    """[n]."""

    @classmethod
    def of(
        cls,
        matrix: NDArray[np.float32],
        labels: NDArray[np.int64],
        widths: Mapping[str, int],
        rows: NDArray[np.int64] | None = None,
    ) -> Labelled:
        """Every choice's view of ``matrix`` [images, W], or of some ``rows`` of it, and the labels [images] of all."""
        labels = np.asarray(labels) if rows is None else np.asarray(labels)[rows]
        return cls({name: Rows(matrix, width, rows) for name, width in widths.items()}, labels)
