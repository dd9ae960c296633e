"""--resolution-schedule: k-NN accuracy and training time, with and without smaller crops at first.

    python benchmarks/resolution_schedule.py OUT [--only SET ...] [--seeds 3] [--jobs 2]

The sets are the embedded sample of Fashion-MNIST, scaled to 64 pixels, and 4,000 colour images of its objects on
textures. Each run has one thread. The time is that of the steps at the median speed of each epoch; k-NN (k = 20) is
measured on 2,000 and 500 images that are no neighbours. Runs that are in OUT are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from against import pretrain_once  # noqa: E402

from dino_xcit.metrics import read_metrics  # noqa: E402
from eval.table import table  # noqa: E402

ARCH, SIZES = "xcit_pico_4_p8", "--global-crops-size 64 --local-crops-size 32"
SETS = {
    "fashion": f"--recipe sample --epochs 4 {SIZES} --eval-resize 64 --eval-crop 64 --blur-radius 0.2 1.8",
    "colour": f"--recipe scenes --data-path sample:scene-objects --epochs 6 {SIZES} --knn-holdout 0",
}
SCHEDULES = {
    "64": "",
    "32 in three quarters": "0:32/16 0.75:64/32",
    "32 in half": "0:32/16 0.5:64/32",
    "48 in three quarters": "0:48/24 0.75:64/32",
}


def measure(folder: Path, flags: str) -> tuple[float, float]:
    """Train a run; return k-NN accuracy in percent, and seconds of training at the median speed of each epoch."""
    rows = read_metrics(pretrain_once(folder, flags) / "metrics.jsonl")
    batch = next(row["settings"]["batch_size_per_gpu"] for row in rows if row["kind"] == "run")
    steps = [row for row in rows if row["kind"] == "step"]
    seconds = 0.0
    for epoch in sorted({row["epoch"] for row in steps}):
        speed = median(row["images_per_s"] for row in steps if row["epoch"] == epoch)
        seconds += steps[0]["steps_per_epoch"] * batch / speed
    return next(row["knn_top1"] for row in reversed(rows) if "knn_top1" in row), seconds


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    runs = [(name, how, seed) for name in given.only for seed in range(given.seeds) for how in SCHEDULES]
    folders = {run: given.out.resolve() / f"{run[0]}-{list(SCHEDULES).index(run[1])}-{run[2]}" for run in runs}

    def train(run: tuple[str, str, int]) -> tuple[float, float]:
        name, how, seed = run
        flags = f"{SETS[name]} --arch {ARCH} --seed {seed} --knn-every 1000 --save-every 0"
        return measure(folders[run], f"{flags} --resolution-schedule '{SCHEDULES[how]}'")

    with ThreadPoolExecutor(given.jobs) as pool:
        found = dict(zip(runs, pool.map(train, runs), strict=True))
    rows = []
    for name in given.only:
        for how in SCHEDULES:
            pairs = [found[name, how, seed] for seed in range(given.seeds)]
            ratios = [seconds / found[name, "64", seed][1] for seed, (_, seconds) in enumerate(pairs)]
            each = ", ".join(f"{accuracy:.1f}" for accuracy, _ in pairs)
            rows.append([name, how, f"{mean(accuracy for accuracy, _ in pairs):.2f} ({each})", f"{mean(ratios):.2f}"])
    print(table(["set", "global crops, pixels", "k-NN (seeds)", "share of the time"], rows))
    print(json.dumps({" ".join(map(str, run)): [round(one, 2) for one in pair] for run, pair in found.items()}))


if __name__ == "__main__":
    main()
