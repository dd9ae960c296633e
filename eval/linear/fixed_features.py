"""What classifiers are chosen and measured on: features of images as they are prepared for evaluation.

W features of a row (:mod:`eval.linear.pooled`), n images.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data import Source, Subset
from dino_xcit.runtime import distributed
from eval.features import Features, cached, find_kept
from eval.linear.pooled import Labelled
from eval.linear.setup import Probe, labels_of


class FixedFeatures:
    """Extracts the rows of a probe's sources, each once, or takes them from where they were kept.

    With several processes, all call alike.
    """

    def __init__(self, probe: Probe) -> None:
        """Nothing is extracted yet."""
        self._probe = probe
        self._found: dict[int, Features] = {}

    def rows(self, source: Source) -> Features:
        """Of every image of one of the probe's own sources: [n, W], memory-mapped where they are kept."""
        if id(source) not in self._found:  # the probe holds its sources: no other will ever have this id
            self._found[id(source)] = self._extract(source)
        return self._found[id(source)]

    def labelled(self, source: Source) -> Labelled:
        """Every image of such a source, as each choice of features sees it."""
        return Labelled.of(self.rows(source).features, labels_of(source), self._probe.pooled.columns)

    def held_out(self) -> Labelled:
        """The training images on which classifiers are chosen: of the whole training set's features if they are
        there, else extracted alone."""
        probe, columns = self._probe, self._probe.pooled.columns
        whole = self._rows_of_train()
        if whole is not None:
            return Labelled.of(whole, labels_of(probe.train), columns, probe.held)
        if not len(probe.held):
            return Labelled.of(np.empty((0, probe.pooled.embed_dim), np.float32), probe.held, columns)
        alone = Subset(probe.train, probe.held)
        return Labelled.of(self._extract(alone).features, labels_of(alone), columns)

    def _extract(self, source: Source) -> Features:
        probe, config = self._probe, self._probe.config
        return cached(
            probe.pooled, probe.row, source, probe.loaded.transform, probe.device, probe.kept,
            config.batch_size_per_gpu, config.num_workers,
        )  # fmt: skip

    def _rows_of_train(self) -> NDArray[np.float32] | None:
        """[n, W] of all training images, where it needs no extraction."""
        probe = self._probe
        if id(probe.train) in self._found:
            return self._found[id(probe.train)].features
        shape = (len(probe.train), probe.pooled.embed_dim)
        found = find_kept(probe.row, probe.identity["train"], shape, probe.loaded.transform, probe.kept)
        # One process looks, and all do as it says: they must not disagree about whether there is work to share.
        return None if distributed.broadcast_from_main("no" if found is None else None) else found
