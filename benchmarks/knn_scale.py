"""k-NN at ImageNet's size beside the way of facebookresearch/dino's eval_knn.py: time, memory, the same neighbours.

    python benchmarks/knn_scale.py [--rows 1281167] [--queries 50000] [--rounds 1] [--only ours] [--against DIR]

Features of 384 numbers around 1,000 class centres, read from a file. Ours is one search that serves every k; the
reference's way, written down here from what it computes, is a matrix product, ``topk`` and a one-hot table of votes for
each k anew. Each runs in a process of its own, in turn, so that each has its own peak of memory. What is not timed: for
both, making the file; for the reference's way, reading it and scaling to length 1, which ours does within ``build``.
``cpu_`` is the processor's time, which other work on the machine changes little; waiting threads spend it too.

Neighbours are compared for the first queries; where two differ, their similarities in float64 tell whether more than
float32's rounding lies between them. The last line is one JSON object. ``--against`` instead runs this script
and that of an earlier commit's checkout in turn, with the same arguments (against.py).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import faiss  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from against import Figures, add_arguments, compare_commits  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from process_group import clean_up_on_sigterm, process_group  # noqa: E402

from dino_xcit.errors import run_main  # noqa: E402
from eval.knn import knn_predict  # noqa: E402
from eval.retrieval.index import build_index, search, unit_rows  # noqa: E402

CLASSES = 1000
TEMPERATURE = 0.07
COMPARED = 500
"""Queries whose neighbours are compared."""
CHUNK = 500
"""Queries at a time of the reference's way: a hundredth of ImageNet's validation images."""
CENTRES = 0.35
"""How far the class centres lie from zero, in lengths of the noise: the right class is found now and then."""
ROWS_AT_ONCE = 65_536
AGAINST: Figures = {
    "build, s": (("ours_build",), "less"),
    "build, processor's s": (("ours_cpu_build",), "less"),
    "every k, s": (("ours_every_k",), "less"),
    "every k, processor's s": (("ours_cpu_every_k",), "less"),
    "peak GiB": (("ours_peak_gib",), "less"),
    "reference's peak GiB": (("reference_peak_gib",), "less"),
}
"""What --against looks at."""


def write_features(path: Path, labels: NDArray[np.int64], dim: int, seed: int) -> None:
    """A .npy file of class centres and normal noise, a piece at a time."""
    centres = np.random.default_rng(0).standard_normal((CLASSES, dim), dtype=np.float32)
    rng = np.random.default_rng(seed)
    features = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(labels), dim))
    for start in range(0, len(labels), ROWS_AT_ONCE):
        piece = labels[start : start + ROWS_AT_ONCE]
        noise = rng.standard_normal((len(piece), dim), dtype=np.float32)
        features[start : start + len(piece)] = CENTRES * centres[piece] + noise
    features.flush()


class Clock:
    """Seconds since the last stop, by the wall and of the processor, of all threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter(), time.process_time()

    def stop(self, name: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.seconds[name], self.seconds[f"cpu_{name}"] = (
            end - start for end, start in zip(now, self._last, strict=True)
        )
        self._last = time.perf_counter(), time.process_time()


def ours(folder: Path, ks: list[int]) -> dict[str, float]:
    """What run_knn.py does with kept features. Leaves predictions and neighbours in the folder; seconds by name."""
    train, labels, queries = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "labels", "queries"))
    clock = Clock()
    index = build_index(train)
    clock.stop("build")
    found = knn_predict(train, np.asarray(labels), queries, ks, [TEMPERATURE], progress=True, index=index)
    clock.stop("every_k")
    peak = peak_gib()
    rows = np.concatenate([rows for _, rows in search(index, queries[:COMPARED], max(ks))])
    keep(folder / "ours.npz", {k: found[k, TEMPERATURE] for k in ks}, rows)
    return {**clock.seconds, "peak_gib": peak}


def reference(folder: Path, ks: list[int]) -> dict[str, float]:
    """The reference's way, with its features in memory. Leaves and returns the same."""
    train, queries = (torch.from_numpy(unit_rows(np.load(folder / f"{name}.npy"))) for name in ("train", "queries"))
    labels = torch.from_numpy(np.load(folder / "labels.npy"))
    clock, predictions, nearest = Clock(), {}, np.empty(0, dtype=np.int64)
    for k in ks:
        guesses, rows = classify(train.t(), labels, queries, k)
        clock.stop(f"k_{k}")
        predictions[k], nearest = guesses.numpy(), rows[:COMPARED].numpy()
    keep(folder / "reference.npz", predictions, nearest)
    return {**clock.seconds, "peak_gib": peak_gib()}


def classify(
    train: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The five classes with the most votes exp(similarity / T), and the k nearest rows; ``train`` is [D, N].

    From the formula of the DINO paper's protocol, with the operations that eval_knn.py is known for: mm, topk, a
    one-hot table [queries * k, C] filled by scatter, a product and a sum, a sort of all classes.
    """
    guesses, nearest = [], []
    for start in range(0, len(queries), CHUNK):
        similarity, rows = torch.mm(queries[start : start + CHUNK], train).topk(k)
        one_hot = torch.zeros(rows.numel(), CLASSES).scatter_(1, labels[rows].reshape(-1, 1), 1)
        votes = (one_hot.view(*rows.shape, CLASSES) * (similarity / TEMPERATURE).exp().unsqueeze(2)).sum(1)
        guesses.append(votes.sort(1, descending=True)[1][:, :5])
        nearest.append(rows)
    return torch.cat(guesses), torch.cat(nearest)


def keep(path: Path, predictions: dict[int, NDArray[np.int64]], rows: NDArray[np.int64]) -> None:
    """For the comparison."""
    arrays: dict[str, Any] = {f"k_{k}": guesses for k, guesses in predictions.items()}
    np.savez(path, rows=rows, **arrays)


def compare(folder: Path, ks: list[int]) -> dict[str, float]:
    """How alike the two ways' neighbours and figures are."""
    one, other = np.load(folder / "ours.npz"), np.load(folder / "reference.npz")
    train, queries = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "queries"))
    truth = np.load(folder / "truth.npy")
    places = np.argwhere(one["rows"] != other["rows"])
    gap = 0.0
    for query, place in places:
        pair = np.asarray(train[[one["rows"][query, place], other["rows"][query, place]]], dtype=np.float64)
        cosines = pair @ queries[query].astype(np.float64) / np.linalg.norm(pair, axis=1)
        gap = max(gap, float(abs(cosines[0] - cosines[1]) / np.linalg.norm(queries[query].astype(np.float64))))
    alike = {
        "neighbours_compared": one["rows"].size,
        "neighbours_elsewhere": len(places),
        "greatest_gap_there": gap,
    }
    for k in ks:
        for top in (1, 5):
            right = [(found[f"k_{k}"][:, :top] == truth[:, None]).any(axis=1) for found in (one, other)]
            alike[f"top{top}_k{k}"] = round(100 * float(right[0].mean()), 3)
            alike[f"top{top}_k{k}_images_that_differ"] = int((right[0] != right[1]).sum())
    return alike


def peak_gib() -> float:
    """Of this process so far, mapped pages of the file included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kibibytes on Linux


def worker(way: str, folder: Path, ks: list[int]) -> dict[str, float]:
    """One way in a process of its own."""
    words = [sys.executable, __file__, "--worker", way, "--folder", str(folder), "--k", *map(str, ks)]
    with process_group() as group:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, process_group=group)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Write the features, classify them both ways in turn, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=["ours", "reference"])
    parser.add_argument("--worker", choices=["ours", "reference"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    add_arguments(parser)
    given = parser.parse_args()
    if given.against:
        compare_commits("knn_scale.py", AGAINST, given)
        return
    clean_up_on_sigterm()
    ks = sorted(given.k)
    if given.worker:
        print(json.dumps({"ours": ours, "reference": reference}[given.worker](Path(given.folder), ks)))
        return
    ways = [given.only] if given.only else ["ours", "reference"]
    rounds: list[dict[str, dict[str, float]]] = []
    alike: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        labels, truth = (np.random.default_rng(3).integers(CLASSES, size=n) for n in (given.rows, given.queries))
        np.save(folder / "labels.npy", labels)
        np.save(folder / "truth.npy", truth)
        write_features(folder / "train.npy", labels, given.dim, seed=1)
        write_features(folder / "queries.npy", truth, given.dim, seed=2)
        for _ in range(given.rounds):
            rounds.append({way: worker(way, folder, ks) for way in ways})
        if len(ways) == 2:
            alike = compare(folder, ks)
    figures: dict[str, Any] = {"rows": given.rows, "dim": given.dim, "queries": given.queries, "ks": ks}
    figures |= {"threads": faiss.omp_get_max_threads(), "rounds": given.rounds}
    for way in ways:
        for key in rounds[0][way]:
            figures[f"{way}_{key}"] = round(statistics.median(one[way][key] for one in rounds), 2)
    if len(ways) == 2:
        for clock in ("", "cpu_"):
            for label, part in {f"k_{ks[-1]}_alone": ks[-1:], "every_k": ks}.items():
                found = [sum(one["reference"][f"{clock}k_{k}"] for k in part) for one in rounds]
                spent = [one["ours"][f"{clock}build"] + one["ours"][f"{clock}every_k"] for one in rounds]
                ratios = [theirs / own for theirs, own in zip(found, spent, strict=True)]
                figures[f"ratio_{clock}{label}"] = round(statistics.median(ratios), 2)
                figures[f"ratio_{clock}{label}_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
        figures["memory_ratio"] = round(figures["ours_peak_gib"] / figures["reference_peak_gib"], 2)
    figures |= alike
    for key, value in figures.items():
        print(f"{key:36} {str(value) if isinstance(value, list) else f'{value:,}':>20}")
    print(json.dumps(figures))


if __name__ == "__main__":
    run_main(main)
