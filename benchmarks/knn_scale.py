"""k-NN at ImageNet's size: time and memory for 1.28 million features of 384 numbers, read from a file.

    python benchmarks/knn_scale.py [--rows 1281167] [--queries 50000]

The features are random: what an exact search costs does not depend on what it finds. Half of the queries are training
rows with a little noise, so that the right neighbour is known. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import faiss  # noqa: E402
import numpy as np  # noqa: E402

from eval.knn import accuracy, knn_predict  # noqa: E402

CLASSES = 1000
ROWS_AT_ONCE = 65_536


def write_features(path: Path, rows: int, dim: int, rng: np.random.Generator) -> None:
    """A .npy file of normal numbers, a piece at a time."""
    features = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, dim))
    for start in range(0, rows, ROWS_AT_ONCE):
        features[start : start + ROWS_AT_ONCE] = rng.standard_normal(
            (min(ROWS_AT_ONCE, rows - start), dim), dtype=np.float32
        )
    features.flush()


def main() -> None:
    """Write the features, search them, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200])
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.npy"
        write_features(path, given.rows, given.dim, rng)
        train = np.load(path, mmap_mode="r")
        labels = rng.integers(CLASSES, size=given.rows)
        known = given.queries // 2
        picked = np.sort(rng.choice(given.rows, known, replace=False))
        queries = rng.standard_normal((given.queries, given.dim), dtype=np.float32)
        queries[:known] = train[picked] + 0.1 * queries[:known]
        started = time.perf_counter()
        found = knn_predict(train, labels, queries, given.k, [0.07], progress=sys.stderr.isatty())
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kibibytes on Linux
    right = accuracy(found[given.k[0], 0.07][:known], labels[picked], 1)
    figures = {
        "rows": given.rows,
        "dim": given.dim,
        "queries": given.queries,
        "threads": faiss.omp_get_max_threads(),
        "seconds": round(seconds, 1),
        "queries_per_second": round(given.queries / seconds, 1),
        "peak_gib": round(peak, 2),
        "known_neighbours_found_percent": round(right, 2),
    }
    for name, value in figures.items():
        print(f"{name:32} {value:>12,}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
