"""Evaluate frozen patch features without training.

    python -m eval.dense knn --weights ckpt.pth --data-path /data/ade20k --json knn.json --out overlays.png
    python -m eval.dense video --weights ckpt.pth --data-path /data/DAVIS --json davis.json
    python -m eval.dense video --weights ckpt.pth --data-path frames/ --first-mask mask.png --out tracked/

``knn`` segments images by the labels of the nearest patches of training images (knn.py). ``video`` propagates the
objects of a video's first frame to its other frames (video.py).
"""

from __future__ import annotations

import importlib
import sys

from dino_xcit.cli import check_flags  # before torch: dino_xcit sets how OpenMP threads wait
from dino_xcit.errors import InputError, run_main
from eval.dense.config import PatchKnnConfig, VideoConfig

COMMANDS = {"knn": PatchKnnConfig, "video": VideoConfig}


def choose() -> str:
    """Take the name of the command from ``sys.argv``.

    Raises:
        InputError: the name is missing or unknown.
    """
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        sys.exit(0)
    if sys.argv[1:2] == [] or sys.argv[1] not in COMMANDS:
        found = f"found {sys.argv[1]!r}" if sys.argv[1:] else "found no command"
        raise InputError(f"{found}, expected: python -m eval.dense knn, or python -m eval.dense video (with --help)")
    return sys.argv.pop(1)


def command() -> None:
    """Run the chosen command."""
    chosen: list[str] = []
    run_main(lambda: chosen.append(choose()))
    name = chosen[0]
    check_flags(COMMANDS[name], f"python -m eval.dense {name}")
    importlib.import_module(f"eval.dense.{name}").command()  # imports torch, which takes seconds


if __name__ == "__main__":
    command()
