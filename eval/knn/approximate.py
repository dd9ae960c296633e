"""Approximate nearest neighbours (faiss), and how many of the exact ones they find.

N training images, D features, k neighbours.

- ``ivf``: vectors in lists around centres of k-means; a query looks into some of the lists. Full vectors.
- ``hnsw``: a graph of neighbours that a query walks along (Malkov and Yashunin, arXiv 1603.09320). Full vectors.
- ``pq``: lists as above, vectors as codes of D/4 bytes, a sixteenth of their size (product quantisation, Jégou et al.,
  TPAMI 2011). Similarities are those of the codes.

All search by Euclidean distance, which orders vectors of length 1 as their inner product does. Not by the inner
product itself: codes change the length of a vector too, and where features point nearly the same way (cosines of 0.999
are common) that error is larger than the differences that are looked for (measured: recall@10 of 1 % instead of 87 %).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from dino_xcit.console import progress_bar
from dino_xcit.errors import InputError
from eval.search import build_index, search, unit_rows

Kind = Literal["ivf", "hnsw", "pq"]

LEAST = 1000
"""Training images below which there is nothing to approximate: the exact search takes milliseconds."""
SAMPLED = 1000
"""Queries that recall is measured on."""

_ROWS_AT_ONCE = 16_384
_ROWS_A_LIST = 64
"""Vectors that k-means looks at for each of its centres; more cost time and hardly move them."""
_GRAPH_LINKS = 32


@dataclass(frozen=True)
class Approximate:
    """An index, what it is, and what it finds."""

    index: faiss.Index
    settings: dict[str, int | str]
    """``index`` in faiss's short form, ``probes``, ``vector_bytes`` (of memory; links and row numbers come on top)."""
    recall: dict[int, float]
    """Percent of the exact k nearest rows that it finds, for each k: the mean over the sampled queries."""
    queries: int
    """Queries that recall was measured on."""
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

    def to_card(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            **self.settings,
            "recall_percent": {str(k): percent for k, percent in self.recall.items()},
            "recall_queries": self.queries,
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
    progress: bool = False,
) -> Approximate:
    """Build an index and measure it against the exact search on some of the queries.

    The exact index is gone before the other is built: there is never more than one in memory.

    Args:
        features: [N, D], not necessarily normalised; may be memory-mapped.
        queries: [test images, D], of which at most :data:`SAMPLED` are searched exactly.
        ks: neighbours to measure recall for, each from 1 to N.
        probes: lists (``ivf``, ``pq``) or candidates (``hnsw``) a query looks at; 0: :func:`default_probes`.
        seed: chooses the queries.

    Raises:
        InputError: so few training images that there is nothing to approximate.
    """
    refuse_few(kind, len(features))
    sampled = np.random.default_rng([seed, 2]).permutation(len(queries))[:SAMPLED]
    sample = np.asarray(queries[np.sort(sampled)])
    exact, exact_seconds = _neighbours(build_index(features), sample, max(ks))
    started = time.perf_counter()
    index, settings = build_approximate(features, kind, probes, max(ks), progress)
    built = time.perf_counter() - started
    found, seconds = _neighbours(index, sample, max(ks))
    recall = {k: 100.0 * _overlap(exact[:, :k], found[:, :k]) for k in ks}
    return Approximate(index, settings, recall, len(sample), built, exact_seconds / seconds)


def refuse_few(kind: Kind, rows: int) -> None:
    """Raises:
    InputError: so few training images that there is nothing to approximate.
    """
    if rows < LEAST:
        raise InputError(
            f"approximate is {kind}, but {rows} training images are searched exactly in no time: leave --approximate "
            f"out, or give {LEAST:,} images or more"
        )


def build_approximate(
    features: NDArray[np.float32], kind: Kind, probes: int, k: int, progress: bool = False
) -> tuple[faiss.Index, dict[str, int | str]]:
    """An index of the rows at length 1, by inner product, and what it is."""
    rows, dim = features.shape
    lists = max(1, round(2 * rows**0.5))
    probes = probes or default_probes(kind, lists, k)
    index: Any  # faiss's own types have none of these attributes in common
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, _GRAPH_LINKS)
        index.hnsw.efSearch = probes
        name = f"HNSW{_GRAPH_LINKS},Flat"
    else:
        centres = faiss.IndexFlatL2(dim)
        if kind == "ivf":
            index, name = faiss.IndexIVFFlat(centres, dim, lists), f"IVF{lists},Flat"
        else:
            index, name = faiss.IndexIVFPQ(centres, dim, lists, _codes(dim), 8), f"IVF{lists},PQ{_codes(dim)}"
            codes = index.pq.cp
            codes.niter, codes.max_points_per_centroid, codes.min_points_per_centroid = 10, _ROWS_A_LIST, 1
        probes = index.nprobe = min(probes, lists)
        index.cp.niter = 10
        index.cp.min_points_per_centroid = 1  # no warning on a handful of rows: recall tells what came of it
        chosen = np.linspace(0, rows - 1, min(rows, _ROWS_A_LIST * lists)).astype(np.int64)
        index.train(unit_rows(features[chosen]))
    with progress_bar(rows, f"index {name}", shown=progress) as bar:
        for start in range(0, rows, _ROWS_AT_ONCE):
            piece = unit_rows(features[start : start + _ROWS_AT_ONCE])
            index.add(piece)
            bar.update(len(piece))
    held = rows * (_codes(dim) if kind == "pq" else 4 * dim)
    return index, {"index": name, "probes": probes, "vector_bytes": held}


def default_probes(kind: Kind, lists: int, k: int) -> int:
    """Lists: 16, or a sixty-fourth where that is more; in the graph: twice as many candidates as neighbours wanted."""
    return max(64, 2 * k) if kind == "hnsw" else max(16, lists // 64)


def _codes(dim: int) -> int:
    """Bytes a vector: the largest number that divides D, at most D/4."""
    return max(parts for parts in range(1, max(1, dim // 4) + 1) if dim % parts == 0)


def _neighbours(index: faiss.Index, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], float]:
    started = time.perf_counter()
    rows = np.concatenate([rows for _, rows in search(index, queries, k)])
    return rows, time.perf_counter() - started


def _overlap(exact: NDArray[np.int64], found: NDArray[np.int64]) -> float:
    """The share of each exact row that was found, in the mean."""
    shares = [np.isin(wanted, got).mean() for wanted, got in zip(exact, found, strict=True)]
    return float(np.mean(shares)) if shares else float("nan")
