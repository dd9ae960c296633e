"""Recipe auto against DINO's settings, at equal images seen: k-NN accuracy on small sets.

    python benchmarks/auto.py OUT [--only SET ...] [--weights CHECKPOINT] [--seeds 1] [--jobs 2]

The sets are 1,000, 10,000 and 60,000 images of Fashion-MNIST (Debian's dataset-fashion-mnist), evaluated on its test
images, and 4,000 colour images of its objects on textures. Both recipes get the same network, crop sizes and epochs,
and nothing else; on grey images auto has 2 local crops instead of 8, so it takes less time. With --weights, both
continue from a checkpoint of --arch. Runs that are in OUT are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from against import pretrain_once  # noqa: E402

from dino_xcit.data.sample import open_sample  # noqa: E402
from dino_xcit.metrics import read_metrics  # noqa: E402
from eval.table import table  # noqa: E402

FULL = "sample:fashion-mnist-full"
GREY = "--global-crops-size 28 --local-crops-size 16"
SETS = {
    "fashion-1000": f"--data-path fashion-1000 --train-data fashion-1000 --val-data fashion-test --epochs 8 {GREY}",
    "fashion-10000": f"--data-path fashion-10000 --train-data fashion-10000 --val-data fashion-test --epochs 2 {GREY}",
    "fashion-60000": f"--data-path {FULL} --epochs 1 {GREY}",
    "colour-4000": "--data-path sample:scene-objects --knn-holdout 2000 --epochs 6 --global-crops-size 64 "
    "--local-crops-size 32",
}
RECIPES = ("dino", "auto")


def write_sets(out: Path) -> None:
    """Write class-balanced parts of Fashion-MNIST as folders: 1,000 and 10,000 training images, all test images."""
    for name, part, count in (
        ("fashion-1000", "train", 1000),
        ("fashion-10000", "train", 10_000),
        ("fashion-test", "val", 10_000),
    ):
        if (out / name).exists():
            continue
        source = open_sample("fashion-mnist-full", part)
        assert source.labels is not None
        for label in range(10):
            folder = out / name / str(label)
            folder.mkdir(parents=True)
            for index in np.flatnonzero(source.labels == label)[: count // 10]:
                Image.fromarray(source.images[index]).save(folder / f"{index:05d}.png")


def train(folder: Path, name: str, recipe: str, more: str) -> float:
    """Train one run on one thread; return its k-NN accuracy in percent."""
    rows = read_metrics(
        pretrain_once(folder, f"--recipe {recipe} {SETS[name]} {more} --knn-every 1000") / "metrics.jsonl"
    )
    return next(row["knn_top1"] for row in reversed(rows) if "knn_top1" in row)


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--arch", default="xcit_micro_4_p16")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each recipe; the table has their mean and range")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    write_sets(out)
    more = f"--arch {given.arch}"
    if given.weights:
        more += f" --init-weights {given.weights.resolve()}"
    suffix = "-continued" if given.weights else ""

    def measure(run: tuple[str, int, str]) -> float:
        name, seed, recipe = run
        return train(out / f"{name}-{recipe}-{given.arch}{suffix}-{seed}", name, recipe, f"{more} --seed {seed}")

    runs = list(itertools.product(given.only, range(given.seeds), RECIPES))
    with ThreadPoolExecutor(given.jobs) as pool:
        found = dict(zip(runs, pool.map(measure, runs), strict=True))
    rows = []
    for name in given.only:
        columns = [[found[name, seed, recipe] for seed in range(given.seeds)] for recipe in RECIPES]
        gains = [auto - dino for dino, auto in zip(*columns, strict=True)]
        rows.append(
            [name, *(f"{fmean(values):.1f} ({min(values):.1f} - {max(values):.1f})" for values in (*columns, gains))]
        )
    print(table(["set", *RECIPES, "gain"], rows))
    print(json.dumps({" ".join(map(str, run)): round(accuracy, 2) for run, accuracy in found.items()}))


if __name__ == "__main__":
    main()
