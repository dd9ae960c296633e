"""Pretraining on images of one, three and five channels: k-NN of the same objects.

    python benchmarks/channels.py OUT [--images 6000] [--epochs 4] [--seeds 2]

Writes the embedded sample of Fashion-MNIST as RGB PNGs, as PNGs of one channel with 16 bits, and as arrays of five
channels with 16 bits: grey, its negative, its horizontal and vertical differences, and noise. Pretraining uses
one thread. run_knn.py (k = 10) evaluates the trained network, the untrained one and raw pixels on 2,000 other images.
Finished pretraining runs in OUT are reused.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from against import pretrain_once  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from PIL import Image  # noqa: E402

from dino_xcit.data import open_source  # noqa: E402
from eval.table import table  # noqa: E402

HELD_OUT = 2000
Pixels = NDArray[Any]


def five(grey: Pixels) -> Pixels:
    """Return five channels [height, width, 5] of 16 bits of an image of 8 bits."""
    wide = grey.astype(np.uint16) * 257
    noise = np.random.default_rng(int(wide.sum())).integers(0, 65536, wide.shape, dtype=np.uint16)
    differences = (np.abs(np.diff(wide.astype(np.int32), axis=axis, prepend=0)).astype(np.uint16) for axis in (1, 0))
    return np.stack([wide, 65535 - wide, *differences, noise], axis=2)


SETS: dict[int, tuple[str, Callable[[Path, Pixels], None]]] = {
    3: ("RGB, 8 bits", lambda path, grey: Image.fromarray(grey).convert("RGB").save(path.with_suffix(".png"))),
    1: ("1 channel, 16 bits", lambda path, grey: Image.fromarray(grey.astype(np.uint16) * 257).save(f"{path}.png")),
    5: ("5 channels, 16 bits", lambda path, grey: np.save(path.with_suffix(".npy"), five(grey))),
}


def write(folder: Path, images: int, save: Callable[[Path, Pixels], None]) -> None:
    """Write the first images to train/ and the next 2,000 to val/, one folder per class."""
    source = open_source("sample:fashion-mnist", "train")
    for index in range(images + HELD_OUT):
        pixels, label = source.read(index)
        path = folder / ("train" if index < images else "val") / str(label) / f"{index:05d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, np.asarray(pixels))


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    rows = []
    for channels, (title, save) in SETS.items():
        data = given.out.resolve() / f"images-{channels}-{given.images}"
        if not data.exists():
            write(data, given.images, save)
        found: dict[str, list[float]] = {}
        for seed in range(given.seeds):
            flags = f"--arch xcit_pico_4_p4 --global-crops-size 28 --local-crops-size 16 --epochs {given.epochs}"
            flags += f" --data-path {data} --channels {channels} --seed {seed} --knn-every 0 --knn-holdout 0"
            run = pretrain_once(given.out.resolve() / f"run-{channels}-{seed}", flags)
            command = [sys.executable, ROOT / "run_knn.py", "--weights", run / "checkpoint.pth", "--data-path", data]
            subprocess.run([*command, "--ks", "10", "--baselines", "--json", run / "knn.json"], check=True)
            for row in json.loads((run / "knn.json").read_text())["results"]:
                found.setdefault(row["model"], []).append(row["top1"])
        rows.append(
            [title, *(", ".join(f"{one:.1f}" for one in found[model]) for model in ("trained", "untrained", "pixels"))]
        )
    print(table(["images", "k-NN by seed", "untrained", "raw pixels"], rows))


if __name__ == "__main__":
    main()
