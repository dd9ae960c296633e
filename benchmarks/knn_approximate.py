"""Approximate k-NN search beside the exact one: time to build, speed, recall at several k, by how much is looked at.

    python benchmarks/knn_approximate.py [--rows 1281167] [--queries 1000] [--dimensions 32] [--rounds 3]

Features of 384 numbers around 1,000 class centres, as ``knn_scale.py`` makes them, read from a file. Its noise fills
all 384 dimensions, in which everything is about equally far from everything, the hardest there is for an index;
features of networks vary in far fewer. ``--dimensions`` says in how many the noise lies (384: as there).

Each index is built once, and searched with several numbers of probes; in every round the exact search and all of these
take turns, and a speed is the median over the rounds of exact seconds over own seconds: by the clock, and of the
processor, whose time other work on the machine changes little (waiting threads spend it too). Building and searching
are what ``run_knn.py --approximate`` does. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import faiss  # noqa: E402
import numpy as np  # noqa: E402
from knn_scale import CENTRES, CLASSES, ROWS_AT_ONCE, write_features  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from eval.retrieval.index import Index, Kind, UnitRows, WithVectors, build, build_index, percent_found, search  # noqa: E402  # noqa: E402
from eval.table import table  # noqa: E402

KINDS: tuple[Kind, ...] = ("ivf", "hnsw", "ivfpq")
FACTORS = (1, 2, 4)
"""Probes, as multiples of the default."""


class Seconds(NamedTuple):
    """By the clock, and of the processor."""

    wall: float
    cpu: float


class Clock:
    """Running since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def read(self) -> Seconds:
        return Seconds(time.perf_counter() - self._started[0], time.process_time() - self._started[1])


@dataclass
class Way:
    """An index with some number of probes."""

    name: str
    probes: int
    build: Seconds
    use: Callable[[], Index]
    """Sets the probes and hands the index over."""
    searches: list[Seconds] = field(default_factory=list)
    recall: dict[int, float] = field(default_factory=dict)


def write_noise_in_few_dimensions(path: Path, labels: NDArray[np.int64], dim: int, seed: int, inner: int) -> None:
    """As knn_scale's features, but that the noise, of the same length in the mean, lies in ``inner`` dimensions."""
    centres = np.random.default_rng(0).standard_normal((CLASSES, dim), dtype=np.float32)
    spread = np.random.default_rng(4).standard_normal((inner, dim), dtype=np.float32) / np.float32(inner**0.5)
    rng = np.random.default_rng(seed)
    features = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(labels), dim))
    for start in range(0, len(labels), ROWS_AT_ONCE):
        piece = labels[start : start + ROWS_AT_ONCE]
        noise = rng.standard_normal((len(piece), inner), dtype=np.float32) @ spread
        features[start : start + len(piece)] = CENTRES * centres[piece] + noise
    features.flush()


def ways_of(kind: Kind, vectors: UnitRows, k: int) -> list[Way]:
    """The index of a kind, with each number of probes."""
    clock = Clock()
    index: Any = build(kind, vectors, k=k)
    seconds = clock.read()
    usual = index.hnsw.efSearch if kind == "hnsw" else index.nprobe

    def with_probes(probes: int) -> Index:
        if kind == "hnsw":
            index.hnsw.efSearch = probes
        else:
            index.nprobe = probes
        return WithVectors(index, vectors)

    most = len(vectors) if kind == "hnsw" else index.nlist
    counts = sorted({min(usual * factor, most) for factor in FACTORS})
    return [Way(kind, probes, seconds, lambda probes=probes: with_probes(probes)) for probes in counts]  # type: ignore[misc]


def neighbours(index: Index, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], Seconds]:
    """Rows [Q, k], and how long it took."""
    clock = Clock()
    rows = np.concatenate([rows for _, rows in search(index, queries, k)])
    return rows, clock.read()


def measure(folder: Path, kinds: list[Kind], ks: list[int], rounds: int) -> list[Way]:
    """The exact search first, then all others."""
    train, queries = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "queries"))
    clock = Clock()
    flat = build_index(train)
    ways = [Way("exact", len(train), clock.read(), lambda: flat)]
    vectors, unit = UnitRows(train), UnitRows(queries)[:]
    for kind in kinds:
        ways += ways_of(kind, vectors, max(ks))
        print(f"built: {kind}, {ways[-1].build.cpu:.0f} s", file=sys.stderr, flush=True)
    exact = np.empty((0, 0), dtype=np.int64)
    for number in range(rounds):
        for way in ways:
            rows, seconds = neighbours(way.use(), queries, max(ks))
            way.searches.append(seconds)
            if number == 0:
                exact = rows if way.name == "exact" else exact
                way.recall = {k: percent_found(vectors, unit, exact[:, :k], rows[:, :k]) for k in ks}
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return ways


def outcome(way: Way, exact: Way, queries: int) -> dict[str, Any]:
    """A row of the table; seconds are medians over the rounds, recall is percent at each k."""
    pairs = list(zip(exact.searches, way.searches, strict=True))
    return {
        "index": way.name,
        "probes": way.probes,
        "build_cpu_seconds": round(way.build.cpu, 1),
        "cpu_milliseconds_a_query": round(1000 * statistics.median(own.cpu for own in way.searches) / queries, 3),
        "times_exact_cpu": round(statistics.median(theirs.cpu / own.cpu for theirs, own in pairs), 2),
        "times_exact_wall": round(statistics.median(theirs.wall / own.wall for theirs, own in pairs), 2),
        "recall": {k: round(percent, 1) for k, percent in way.recall.items()},
    }


def main() -> None:
    """Write the features, build, search, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--dimensions", type=int, default=384, help="of the noise around the class centres")
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 200])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    given = parser.parse_args()
    ks = sorted(given.k)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, rows, seed in (("train", given.rows, 1), ("queries", given.queries, 2)):
            labels = np.random.default_rng(seed + 10).integers(CLASSES, size=rows)
            if given.dimensions < given.dim:
                write_noise_in_few_dimensions(folder / f"{part}.npy", labels, given.dim, seed, given.dimensions)
            else:
                write_features(folder / f"{part}.npy", labels, given.dim, seed)
        ways = measure(folder, given.kinds, ks, given.rounds)
    found = [outcome(way, ways[0], given.queries) for way in ways]
    header = [
        "index",
        "probes",
        "build, cpu s",
        "cpu ms a query",
        "x exact, cpu",
        "x exact, wall",
        *(f"recall@{k} %" for k in ks),
    ]
    print(table(header, [[*map(str, list(one.values())[:6]), *map(str, one["recall"].values())] for one in found]))
    settings = {name: getattr(given, name) for name in ("rows", "queries", "dim", "dimensions", "rounds")}
    print(json.dumps(settings | {"ks": ks, "threads": faiss.omp_get_max_threads(), "found": found}))


if __name__ == "__main__":
    main()
