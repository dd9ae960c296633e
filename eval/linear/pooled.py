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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.models import BackboneOutput

FORMS = "cls, cls+mean, or lastN such as last4 (of a ViT also last4+mean)"
_LAST = re.compile(r"last([1-9]\d?)(\+mean)?")


def blocks_of(choice: str) -> int:
    """How many of the last blocks a choice looks into: 0 for ``cls``, 1 for ``cls+mean``.

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
            InputError: no such choice, or one that the backbone does not have.
        """
        super().__init__()
        self.backbone = backbone
        wanted = {"cls": 0} | {name: blocks_of(name) for name in choices}
        deepest = max(wanted.values())
        depth = _depth(backbone)
        if deepest > max(1, depth):
            name = max(wanted, key=lambda each: wanted[each])
            has = f"has {depth}" if depth else "does not tell its blocks' tokens"
            raise InputError(f"features has {name}, which needs {deepest} blocks, but the backbone {has}: lower it")
        self._blocks = deepest
        self._of_class_tokens = bool(deepest and depth) and self._has_class_tokens(crop, device)
        self._mean = deepest > 0 and (not self._of_class_tokens or any(name.endswith("+mean") for name in wanted))
        strange = [name for name in wanted if name.startswith("last") and name.endswith("+mean")]
        if strange and not self._of_class_tokens:
            name = strange[0]
            raise InputError(
                f"features has {name}, but the blocks of this backbone have no class tokens: {name[:-5]} has the means "
                "of their patch tokens"
            )
        ends = [int(backbone.embed_dim)]  # type: ignore[arg-type]
        if deepest:
            with torch.inference_mode():
                parts = self._parts(torch.zeros(1, 3, crop, crop, device=device))
            ends = np.cumsum([part.shape[1] for part in parts]).tolist()
        self.embed_dim = ends[-1]
        self.columns = {name: self._columns(name, count, ends) for name, count in wanted.items()}
        """Of a row, those that each choice sees. ``cls`` is always among them."""
        self.widths = {name: seen.stop - seen.start for name, seen in self.columns.items()}
        """How many columns those are."""

    @property
    def identity(self) -> str:
        """Added to the weights' hash, it tells rows apart; empty where a row is the class token."""
        if not self._of_class_tokens:
            return f" cls and {self._blocks} blocks" if self._blocks else ""
        return f"{' mean and' if self._mean else ''} {self._blocks} class tokens"

    def forward(self, images: Tensor) -> BackboneOutput:
        """As the backbone's, but for the class token."""
        if not self._blocks:
            out: BackboneOutput = self.backbone(images)
            return out
        row = torch.cat([part.float() for part in self._parts(images)], dim=1)
        return BackboneOutput(row, row[:, None], (1, 1))

    def seen_by(self, choice: str, matrix: NDArray[np.float32]) -> Rows:
        """What a head with that choice of features sees of kept rows [n, W]."""
        return Rows(matrix, self.widths[choice], first=self.columns[choice].start)

    def _has_class_tokens(self, crop: int, device: torch.device) -> bool:
        with torch.inference_mode():
            out: BackboneOutput = self.backbone(torch.zeros(1, 3, crop, crop, device=device), layers=(-1,))
        return bool(out.layer_cls)

    def _parts(self, images: Tensor) -> list[Tensor]:
        """A row's parts: the mean first for class tokens, so that every choice is one run of columns."""
        out: BackboneOutput = self.backbone(images, layers=tuple(range(-2, -self._blocks - 1, -1)))
        mean = [out.patch_tokens.float().mean(dim=1)] if self._mean else []
        if self._of_class_tokens:
            return [*mean, out.cls_token, *out.layer_cls]
        return [out.cls_token, *mean, *(tokens.float().mean(dim=1) for tokens in out.layers)]

    def _columns(self, choice: str, blocks: int, ends: Sequence[int]) -> slice:
        """``ends``: where each part of a row ends."""
        if not self._of_class_tokens:
            return slice(0, ends[blocks])
        start = 0 if choice.endswith("+mean") or not self._mean else ends[0]
        tokens = max(1, blocks)  # cls looks into no block before
        return slice(start, ends[tokens - 1 + self._mean])


def _depth(backbone: nn.Module) -> int:
    """How many blocks ``layers=`` counts from the end; 0 where the backbone does not say."""
    blocks = getattr(backbone, "blocks", None)  # an XCiT's XCA blocks
    if isinstance(blocks, nn.ModuleList):
        return len(blocks)
    return len(getattr(getattr(backbone, "model", None), "feature_info", ()))  # a timm model's


class Rows:
    """Some rows and columns of a matrix that may be memory-mapped: read when asked for, never copied whole.

    It is what a head sees of the kept features.
    """

    def __init__(
        self, matrix: NDArray[np.float32], width: int, rows: NDArray[np.int64] | None = None, first: int = 0
    ) -> None:
        """``rows``: which, in what order; None: all. Of the columns ``width``, from ``first`` on."""
        self._matrix, self._rows, self.width, self._first = matrix, rows, width, first

    def some(self, rows: NDArray[np.int64]) -> Rows:
        """Some of these rows."""
        return Rows(self._matrix, self.width, rows if self._rows is None else self._rows[rows], self._first)

    def __len__(self) -> int:
        return len(self._matrix if self._rows is None else self._rows)

    def __getitem__(self, part: slice) -> NDArray[np.float32]:
        """[those of the rows, width], a copy."""
        return self.columns(0, self.width, part)

    def columns(self, first: int, stop: int, part: slice = slice(None)) -> NDArray[np.float32]:
        """[those of the rows, stop - first], a copy."""
        chosen = part if self._rows is None else self._rows[part]
        return np.array(self._matrix[chosen, self._first + first : self._first + min(stop, self.width)])


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
        columns: Mapping[str, slice],
        rows: NDArray[np.int64] | None = None,
    ) -> Labelled:
        """Every choice's ``columns`` of ``matrix`` [images, W], or of some ``rows`` of it; all ``labels`` [images]."""
        labels = np.asarray(labels) if rows is None else np.asarray(labels)[rows]
        return cls(
            {name: Rows(matrix, seen.stop - seen.start, rows, seen.start) for name, seen in columns.items()}, labels
        )
