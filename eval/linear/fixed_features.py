"""What the heads of a linear probe are chosen and measured on: features of images as they are prepared for evaluation.

W features of a row (:mod:`eval.linear.pooled`), n images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dino_xcit import distributed
from dino_xcit.data import Source, Subset
from dino_xcit.transform import EvalTransform
from eval.features import Features, cached, find_kept
from eval.linear.pooled import Labelled, PooledBackbone


@dataclass(frozen=True)
class FixedFeatures:
    """Extracts rows, or takes them from where they were kept. With several processes, all call alike."""

    pooled: PooledBackbone
    weights: str
    """Identifies what makes a row of an image."""
    transform: EvalTransform
    device: torch.device
    kept: Path | None
    """Where features are kept; None: nowhere."""
    batch_size: int
    num_workers: int

    def rows(self, source: Source) -> Features:
        """Of every image: [n, W], memory-mapped where they are kept."""
        return cached(
            self.pooled,
            self.weights,
            source,
            self.transform,
            self.device,
            self.kept,
            self.batch_size,
            self.num_workers,
        )

    def labelled(self, source: Source) -> Labelled:
        """Every image of a source with labels, as each choice of features sees it."""
        assert source.labels is not None
        return Labelled.of(self.rows(source).features, source.labels, self.pooled.columns)

    def some(self, source: Source, chosen: NDArray[np.int64], fingerprint: str) -> Labelled:
        """The ``chosen`` images of a source alone, from its kept features if there are such.

        Args:
            fingerprint: of ``source``.
        """
        assert source.labels is not None
        width = self.pooled.embed_dim
        if not len(chosen):
            return Labelled.of(np.empty((0, width), dtype=np.float32), source.labels[:0], self.pooled.columns)
        whole = find_kept(self.weights, fingerprint, (len(source), width), self.transform, self.kept)
        # One process looks, and all do as it says: they must not disagree about whether there is work to share.
        if distributed.main_decides("no" if whole is None else None) or whole is None:
            return self.labelled(Subset(source, chosen))
        return Labelled.of(whole, source.labels, self.pooled.columns, chosen)
