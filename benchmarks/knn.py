"""k-NN at ImageNet's size, compared with facebookresearch/dino's eval_knn.py; or approximate and exact search.

    python benchmarks/knn.py [--rows 1281167] [--queries 50000] [--rounds 1] [--only ours] [--against DIR]
    python benchmarks/knn.py --approximate ivf hnsw [--dimensions 32] [--rows 1281167] [--queries 1000]

Uses 384-dimensional features around 1,000 class centres, read from a file. ``cpu_`` is the CPU time of all threads,
which varies less with other load. The last line is one JSON object.

Without ``--approximate``: ours is one search for all k; the reference, written from its formula, computes a matrix
product, ``topk`` and a one-hot table of votes for each k. They take turns in separate processes, for separate peak
memory. ``build`` of ours includes reading the file and L2 normalisation; the reference's figures do not. The script
compares the neighbours and the accuracy of both. ``--against`` alternates with the script of an earlier commit's
checkout.

With ``--approximate``: builds each index once, as ``run_knn.py --approximate`` does, and searches it with 1, 2 and 4
times its default number of probes, in turn with the exact search. The noise around the centres has ``--dimensions``
dimensions: all 384 are the hardest case; features of networks vary in far fewer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import faiss  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from against import add_arguments, compare_commits, exit_on_sigterm, peak_memory, process_group, timed  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from dino_xcit.errors import run_main  # noqa: E402
from eval.knn import knn_predict  # noqa: E402
from eval.search_index import Kind, build, build_index, l2_normalised, percent_found, search  # noqa: E402
from eval.table import table  # noqa: E402

CLASSES = 1000
TEMPERATURE = 0.07
COMPARED = 500
"""Number of queries whose neighbours are compared."""
CHUNK = 500
"""Queries per chunk in the reference: a hundredth of ImageNet's validation images."""
CENTRES = 0.35
"""Norm of the class centres relative to the noise; chosen for a low but non-zero accuracy."""
ROWS_AT_ONCE = 65_536
AGAINST = dict.fromkeys(
    ("ours_build", "ours_cpu_build", "ours_every_k", "ours_cpu_every_k", "ours_peak_gib", "reference_peak_gib"), "less"
)


def write_features(path: Path, labels: NDArray[np.int64], dim: int, seed: int, noise_dim: int) -> None:
    """Write a .npy file of class centres plus normal noise in ``noise_dim`` dimensions, in chunks."""
    centres = np.random.default_rng(0).standard_normal((CLASSES, dim), dtype=np.float32)
    directions = np.random.default_rng(4).standard_normal((noise_dim, dim), dtype=np.float32)
    rng = np.random.default_rng(seed)
    features = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(labels), dim))
    for start in range(0, len(labels), ROWS_AT_ONCE):
        piece = labels[start : start + ROWS_AT_ONCE]
        noise = rng.standard_normal((len(piece), noise_dim), dtype=np.float32)
        if noise_dim < dim:
            noise = noise @ (directions / np.float32(noise_dim**0.5))
        features[start : start + len(piece)] = CENTRES * centres[piece] + noise
    features.flush()


# ---- comparison with the reference


def ours(folder: Path, ks: list[int]) -> dict[str, float]:
    """Classify as run_knn.py does with cached features; write predictions and neighbours, return times and memory."""
    train, labels, queries = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "labels", "queries"))
    index, build_s, cpu_build = timed(lambda: build_index(train))
    found, every_k, cpu_every_k = timed(
        lambda: knn_predict(train, np.asarray(labels), queries, ks, [TEMPERATURE], progress=True, index=index)
    )
    peak = peak_memory() / 2**30
    rows = np.concatenate([rows for _, rows in search(index, queries[:COMPARED], max(ks))])
    arrays = {f"k_{k}": found[k, TEMPERATURE][:, 0] for k in ks}
    np.savez(folder / "ours.npz", rows=rows, **arrays)  # type: ignore[arg-type]
    return {"build": build_s, "cpu_build": cpu_build, "every_k": every_k, "cpu_every_k": cpu_every_k, "peak_gib": peak}


def reference(folder: Path, ks: list[int]) -> dict[str, float]:
    """Classify as the reference does, with features in memory; write and return the same."""
    train, queries = (torch.from_numpy(l2_normalised(np.load(folder / f"{name}.npy"))) for name in ("train", "queries"))
    labels = torch.from_numpy(np.load(folder / "labels.npy"))
    figures: dict[str, float] = {}
    arrays: dict[str, NDArray[np.int64]] = {}
    for k in ks:
        run = partial(classify, train.t(), labels, queries, k)
        (guesses, rows), figures[f"k_{k}"], figures[f"cpu_k_{k}"] = timed(run)
        arrays |= {f"k_{k}": guesses[:, 0].numpy(), "rows": rows[:COMPARED].numpy()}
    np.savez(folder / "reference.npz", **arrays)  # type: ignore[arg-type]
    return figures | {"peak_gib": peak_memory() / 2**30}


def classify(
    train: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the five classes with the most votes exp(similarity / T), and the k nearest rows; ``train`` is [D, N].

    Follows the DINO paper's protocol with the operations of eval_knn.py: mm, topk, a one-hot table [queries * k, C]
    filled by scatter, a product and a sum, a sort of all classes.
    """
    guesses, nearest = [], []
    for start in range(0, len(queries), CHUNK):
        similarity, rows = torch.mm(queries[start : start + CHUNK], train).topk(k)
        one_hot = torch.zeros(rows.numel(), CLASSES).scatter_(1, labels[rows].reshape(-1, 1), 1)
        votes = (one_hot.view(*rows.shape, CLASSES) * (similarity / TEMPERATURE).exp().unsqueeze(2)).sum(1)
        guesses.append(votes.sort(1, descending=True)[1][:, :5])
        nearest.append(rows)
    return torch.cat(guesses), torch.cat(nearest)


def compare(folder: Path, truth: NDArray[np.int64], ks: list[int]) -> dict[str, float]:
    """Compare the neighbours and predictions of both.

    ``greatest_gap_there``: maximum difference of similarities in float64 between differing neighbours.
    """
    one, other = np.load(folder / "ours.npz"), np.load(folder / "reference.npz")
    train, queries = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "queries"))
    places = np.nonzero(one["rows"] != other["rows"])

    def cosines(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        found, wanted = train[rows[places]].astype(np.float64), queries[places[0]].astype(np.float64)
        return (found * wanted).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)

    gap = float(np.abs(cosines(one["rows"]) - cosines(other["rows"])).max(initial=0))
    alike = {"neighbours_compared": one["rows"].size, "neighbours_elsewhere": len(places[0]), "greatest_gap_there": gap}
    for k in ks:
        right = [found[f"k_{k}"] == truth for found in (one, other)]
        alike[f"top1_k{k}_images_that_differ"] = int((right[0] != right[1]).sum())
    return alike


def worker(way: str, folder: Path, ks: list[int]) -> dict[str, float]:
    """Run ours or the reference in a separate process."""
    words = [sys.executable, __file__, "--worker", way, "--folder", str(folder), "--k", *map(str, ks)]
    with process_group() as group:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, process_group=group)
    return json.loads(done.stdout.splitlines()[-1])


def beside_reference(
    folder: Path, truth: NDArray[np.int64], ks: list[int], rounds: int, ways: Sequence[str]
) -> dict[str, Any]:
    """Alternate between ours and the reference, compare and print; return the figures for the last line."""
    found = [{way: worker(way, folder, ks) for way in ways} for _ in range(rounds)]
    figures = {f"{way}_{key}": median(one[way][key] for one in found) for way in ways for key in found[0][way]}
    if len(ways) == 2:
        for clock in ("", "cpu_"):
            for label, part in {f"k_{ks[-1]}_alone": ks[-1:], "every_k": ks}.items():
                figures[f"ratio_{clock}{label}"] = median(
                    sum(one["reference"][f"{clock}k_{k}"] for k in part)
                    / (one["ours"][f"{clock}build"] + one["ours"][f"{clock}every_k"])
                    for one in found
                )
        figures["memory_ratio"] = figures["ours_peak_gib"] / figures["reference_peak_gib"]
        figures |= compare(folder, truth, ks)
    print(table(["", "seconds, GiB, ratios"], [[key, f"{value:,.4g}"] for key, value in figures.items()]))
    return figures


# ---- approximate search


def approximate(folder: Path, kinds: Sequence[Kind], ks: list[int], rounds: int) -> dict[str, Any]:
    """Build the indices, search them in turn and print; return the figures for the last line."""
    train, queries = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "queries"))
    vectors, unit = l2_normalised(train), l2_normalised(queries)
    flat, _, cpu = timed(lambda: build_index(train))
    ways: dict[tuple[str, int], Any] = {("exact", len(train)): flat}
    build_cpu = {"exact": cpu}
    for kind in kinds:
        index: Any
        index, _, build_cpu[kind] = timed(partial(build, kind, vectors, k=max(ks)))
        usual, most = (index.hnsw.efSearch, len(train)) if kind == "hnsw" else (index.nprobe, index.nlist)
        ways |= {(kind, min(usual * factor, most)): index for factor in (1, 2, 4)}
    seconds: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    recall: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for (name, probes), index in ways.items():
            if name == "hnsw":
                index.hnsw.efSearch = probes
            elif name != "exact":
                index.nprobe = probes
            found, _, cpu = timed(lambda index=index: list(search(index, queries, max(ks))))  # type: ignore[misc]
            seconds[name, probes].append(cpu)
            rows = np.concatenate([rows for _, rows in found])
            if name == "exact":
                exact = rows
            shares = [percent_found(vectors, unit, exact[:, :k], rows[:, :k]) for k in ks]
            recall[name, probes] = [round(share, 1) for share in shares]
    exact_seconds = next(iter(seconds.values()))
    keys = ["index", "probes", "build_cpu_seconds", "cpu_milliseconds_a_query", "times_exact_cpu"]
    figures = []
    for (name, probes), own in seconds.items():
        query_ms = round(1000 * median(own) / len(queries), 3)
        speed = round(median(theirs / cpu for theirs, cpu in zip(exact_seconds, own, strict=True)), 2)
        figures.append([name, probes, round(build_cpu[name], 1), query_ms, speed, *recall[name, probes]])
    header = [*keys, *(f"recall@{k} %" for k in ks)]
    print(table(header, [[str(value) for value in row] for row in figures]))
    return {"found": [dict(zip(header, row, strict=True)) for row in figures]}


def main() -> None:
    """Write the features, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--queries", type=int, help="50,000; with --approximate 1,000")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=["ours", "reference"])
    parser.add_argument("--approximate", choices=["ivf", "hnsw"], nargs="+", metavar="KIND")
    parser.add_argument("--dimensions", type=int, default=384, help="of the noise around the class centres")
    parser.add_argument("--worker", choices=["ours", "reference"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    add_arguments(parser)
    given = parser.parse_args()
    if given.against and given.approximate:
        parser.error("--against compares exact searches: leave --approximate out")
    if given.against:
        return compare_commits(["knn.py", "knn_scale.py"], AGAINST, given)
    exit_on_sigterm()
    ks = sorted(given.k)
    if given.worker:
        print(json.dumps({"ours": ours, "reference": reference}[given.worker](given.folder, ks)))
        return None
    queries = given.queries or (1000 if given.approximate else 50_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        labels, truth = (np.random.default_rng(3).integers(CLASSES, size=n) for n in (given.rows, queries))
        np.save(folder / "labels.npy", labels)
        for seed, (part, classes) in enumerate((("train", labels), ("queries", truth)), start=1):
            write_features(folder / f"{part}.npy", classes, given.dim, seed, min(given.dimensions, given.dim))
        if given.approximate:
            figures = approximate(folder, given.approximate, ks, given.rounds)
        else:
            ways = [given.only] if given.only else ["ours", "reference"]
            figures = beside_reference(folder, truth, ks, given.rounds, ways)
    settings = {"rows": given.rows, "queries": queries, "dim": given.dim, "dimensions": given.dimensions, "ks": ks}
    print(json.dumps(settings | {"rounds": given.rounds, "threads": faiss.omp_get_max_threads()} | figures))
    return None


if __name__ == "__main__":
    run_main(main)
