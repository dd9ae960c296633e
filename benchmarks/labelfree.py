"""Which metric that needs no labels follows k-NN accuracy over the epochs of a run?

    python benchmarks/labelfree.py OUT [--only NAME ...] [--epochs 5] [--jobs 2]

Pretrains on 2,000 images of the embedded sample with different settings, healthy and harmful, and measures k-NN on
4,000 others and all metrics of docs/monitoring.md after each epoch. Runs that are in OUT are not repeated. For each
metric the table has Spearman's correlation with k-NN within a run, and the accuracy lost when its highest value selects
the epoch, or its lowest if the mean correlation in these runs is negative.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dino_xcit.metrics import read_metrics  # noqa: E402
from eval.table import table  # noqa: E402

PLAIN: dict[str, object] = {"centering": "centering", "koleo_weight": 0}
SIMDINO = PLAIN | {"method": "simdino"}
RUNS: dict[str, dict[str, object]] = {
    "sample": {},
    "no KoLeo": {"koleo_weight": 0},
    "strong KoLeo": {"koleo_weight": 1},
    "centring": PLAIN,
    "centring, momentum 0.9": PLAIN | {"momentum_teacher": 0.9},
    "centring, temperature 0.07": PLAIN | {"teacher_temp": 0.07, "warmup_teacher_temp": 0.07},
    "lr 5e-4": {"lr": 5e-4},
    "lr 3e-2": {"lr": 3e-2},
    "momentum 0.996": {"momentum_teacher": 0.996},
    "SimDINO": SIMDINO,
    "SimDINO, coding rate 0.1": SIMDINO | {"coding_rate_weight": 0.1},
    "small crops": {"global_crops_scale": (0.14, 0.4), "local_crops_scale": (0.05, 0.14)},
}
KNN = "knn_top1"


def train(name: str, folder: Path, epochs: int) -> None:
    """Train one run on one thread, with all metrics after each epoch."""
    import torch

    from dino_xcit.cli import flags_of
    from dino_xcit.data import Source, Subset, open_source, register_source
    from dino_xcit.recipes import parse_pretrain
    from dino_xcit.representation import build_evaluator
    from eval.knn.online import build_evaluators
    from run_pretrain import train

    if (folder / "metrics.jsonl").exists() and read_metrics(folder / "metrics.jsonl")[-1].get("epoch") == epochs - 1:
        return

    def every_sixth(_rest: str, part: str | None) -> Source:
        whole = open_source("sample:fashion-mnist", "train")
        chosen = np.arange(len(whole))
        return Subset(whole, chosen[chosen % 3 == 1] if part == "val" else chosen[chosen % 6 == 0])

    register_source("every-sixth", every_sixth)
    torch.set_num_threads(1)
    own = {
        "arch": "xcit_pico_4_p8",
        "epochs": epochs,
        "knn_every": 1,
        "knn_holdout": 0,
        "data_path": "every-sixth:sample",
        "recipe": "sample",
        "num_workers": 0,
        "save_every": 0,
    }
    settings = own | {"resume": "never", "quiet": True, "report_pictures": False, "output_dir": folder} | RUNS[name]
    config, device = parse_pretrain(flags_of(settings)).config, torch.device("cpu")
    source = open_source(config.data_path, "train")
    metrics = build_evaluator(config, source, device)._replace(every=1)
    train(config, device, [metrics, *build_evaluators(config, source, device, None)])


def compare(runs: Sequence[Sequence[Mapping[str, float]]]) -> list[list[str]]:
    """Return a row for each metric, smallest loss first: correlations with k-NN, and k-NN accuracy lost."""
    found = list[tuple[float, list[str]]]()
    for name in sorted({name for run in runs for row in run for name in row} - {KNN, "epoch", "step"}):
        pairs = [np.array([(row[name], row[KNN]) for row in run if name in row]) for run in runs]
        pairs = [one for one in pairs if len(one) > 2 and np.ptp(one[:, 0]) > 0]
        if len(pairs) < len(runs) / 2:
            continue
        correlations = [float(spearmanr(one[:, 0], one[:, 1]).statistic) for one in pairs]
        sign = 1 if np.mean(correlations) > 0 else -1
        lost = [float(one[:, 1].max() - one[np.argmax(sign * one[:, 0]), 1]) for one in pairs]
        span = f"{min(correlations):.2f} to {max(correlations):.2f}"
        columns = [f"{np.mean(correlations):.2f}", span, f"{np.mean(lost):.2f}", f"{max(lost):.1f}"]
        found.append((float(np.mean(lost)), [name, str(len(pairs)), *columns]))
    return [row for _, row in sorted(found)]


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    folders = [given.out / name.replace(" ", "-").replace(",", "") for name in given.only]
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        list(pool.map(partial(train, epochs=given.epochs), given.only, folders))
    runs = []
    for name, folder in zip(given.only, folders, strict=True):
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "epoch"]
        runs.append([{key: value for key, value in row.items() if isinstance(value, int | float)} for row in rows])
        print(f"{name}: k-NN {', '.join(f'{row[KNN]:.1f}' for row in rows)}")
    last = [max(row[KNN] for row in run) - run[-1][KNN] for run in runs]
    heads = ["metric", "runs", "mean correlation", "range", "mean k-NN lost", "largest"]
    print(
        table(
            heads,
            [*compare(runs), ["last epoch", str(len(runs)), "-", "-", f"{np.mean(last):.2f}", f"{max(last):.1f}"]],
        )
    )


if __name__ == "__main__":
    main()
