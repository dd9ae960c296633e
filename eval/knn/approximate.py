"""Approximate search for k-NN, and how many of the exact neighbours it finds.

N training images, D features, k neighbours. :mod:`eval.retrieval.index` knows the indices; here they are held
against the exact search on some of the validation images.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from eval.retrieval import index as faiss_index
from eval.retrieval.index import Index, UnitRows, WithVectors, build_index, search

Kind = Literal["ivf", "hnsw", "pq"]
_AS_FAISS_INDEX: dict[Kind, faiss_index.Kind] = {"ivf": "ivf", "hnsw": "hnsw", "pq": "ivfpq"}

LEAST = 1000
"""Training images below which there is nothing to approximate: the exact search takes milliseconds."""
SAMPLED = 1000
"""Queries that recall is measured on."""


@dataclass(frozen=True)
class Approximate:
    """An index, what it is, and what it finds."""

    index: WithVectors
    settings: dict[str, int | str]
    """``index`` in faiss's short form, ``probes``, ``vector_bytes`` (of memory; links and row numbers come on top)."""
    recall: dict[int, float]
    """Percent of the exact k nearest rows that it finds, for each k: the mean over the sampled queries."""
    queries: int
    """Queries that recall was measured on."""
    short: int
    """Those of them for which it found fewer neighbours than the largest k."""
    build_seconds: float
    speedup: float
    """Seconds that the exact search took for these queries, over those of this one."""

    def describe(self, model: str) -> str:
        """A line for the screen."""
        found = ", ".join(f"{percent:.1f} % of the {k} nearest" for k, percent in self.recall.items())
        return (
            f"approximate search ({model}): {self.settings['index']}, {self.settings['probes']} probes, built in "
            f"{self.build_seconds:.0f} s, {self.speedup:.1f} times the exact search's speed; for {self.queries:,} "
            f"queries it finds {found}"
        )

    def notices(self, asked_for: int) -> list[str]:
        """What of this is not as it was asked for.

        Args:
            asked_for: probes; 0: chosen here.
        """
        said, probes, k = [], int(self.settings["probes"]), max(self.recall)
        if probes > asked_for > 0:
            said.append(
                f"probes is {asked_for}, fewer candidates than the {k} neighbours that are looked for: {probes} are "
                "looked at"
            )
        elif probes < asked_for:
            said.append(f"probes is {asked_for:,}, but there are {probes:,} lists: all are looked into")
        if self.short:
            said.append(
                f"for {self.short:,} of {self.queries:,} queries fewer than {k} neighbours were found, and those vote "
                "alone: give more --probes, or smaller --ks"
            )
        return said

    def to_card(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            **self.settings,
            "recall_percent": {str(k): percent for k, percent in self.recall.items()},
            "recall_queries": self.queries,
            "queries_with_fewer_than_k": self.short,
            "build_seconds": round(self.build_seconds, 2),
            "speedup": round(self.speedup, 2),
        }


def approximate_index(
    features: NDArray[np.float32],
    queries: NDArray[np.float32],
    kind: Kind,
    ks: Sequence[int],
    probes: int = 0,
    seed: int = 0,
) -> Approximate:
    """Build an index and measure it against the exact search on some of the queries.

    The exact index is gone before the other is built: there is never more than one in memory.

    Args:
        features: [N, D], not necessarily normalised; may be memory-mapped.
        queries: [test images, D], of which at most :data:`SAMPLED` are searched exactly.
        ks: neighbours to measure recall for, each from 1 to N.
        probes: lists (``ivf``, ``pq``) or candidates (``hnsw``, at least the largest k) a query looks at; 0: chosen,
            see :func:`eval.retrieval.index.build`.
        seed: chooses the queries.

    Raises:
        InputError: so few training images that there is nothing to approximate, or features that are not finite.
    """
    refuse_few(kind, len(features))
    vectors, most = UnitRows(features), max(ks)
    sampled = np.random.default_rng([seed, 2]).permutation(len(queries))[:SAMPLED]
    sample = np.asarray(queries[np.sort(sampled)])
    exact, exact_seconds = _neighbours(build_index(features), sample, most)
    started = time.perf_counter()
    built = faiss_index.build(_AS_FAISS_INDEX[kind], vectors, probes, most)
    build_seconds = time.perf_counter() - started
    index = WithVectors(built, vectors)
    found, seconds = _neighbours(index, sample, most)
    unit = UnitRows(sample)[:]
    recall = {k: faiss_index.percent_found(vectors, unit, exact[:, :k], found[:, :k]) for k in ks}
    short = int((found < 0).any(axis=1).sum())
    settings = _settings(kind, built, vectors.shape)
    return Approximate(index, settings, recall, len(sample), short, build_seconds, exact_seconds / seconds)


def refuse_few(kind: Kind, rows: int) -> None:
    """Raises:
    InputError: so few training images that there is nothing to approximate.
    """
    if rows < LEAST:
        raise InputError(
            f"approximate is {kind}, but {rows} training images are searched exactly in no time: leave --approximate "
            f"out, or give {LEAST:,} images or more"
        )


def _settings(kind: Kind, index: Any, shape: tuple[int, int]) -> dict[str, int | str]:
    rows, dim = shape
    if kind == "hnsw":
        return {
            "index": f"HNSW{faiss_index.LINKS},Flat", "probes": index.hnsw.efSearch, "vector_bytes": 4 * rows * dim,
        }  # fmt: skip
    codes = f"PQ{index.pq.M}x{index.pq.nbits}" if kind == "pq" else "Flat"
    held = rows * (index.pq.code_size if kind == "pq" else 4 * dim)
    return {"index": f"IVF{index.nlist},{codes}", "probes": index.nprobe, "vector_bytes": held}


def _neighbours(index: Index | faiss.Index, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], float]:
    started = time.perf_counter()
    rows = np.concatenate([rows for _, rows in search(index, queries, k)])
    return rows, time.perf_counter() - started
