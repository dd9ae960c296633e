"""Helpers of the tests of run_pretrain.py: run it, generate images, and record the files of a folder."""

from __future__ import annotations

import hashlib
import io
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image
from run_here import Outcome

SMALL = [
    "--recipe", "dino",
    "--arch", "xcit_pico_4_p4", "--out-dim", "16", "--head-hidden-dim", "16", "--head-bottleneck-dim", "8",
    "--global-crops-size", "16", "--local-crops-size", "8", "--local-crops-number", "1", "--batch-size-per-gpu", "4",
    "--epochs", "3", "--num-workers", "0", "--device", "cpu", "--knn-every", "0", "--log-every", "1",
    "--no-report-pictures",
]  # fmt: skip
STEPS_AN_EPOCH = 4


def pretrain_here(*words: object) -> Outcome:
    """Run the console entry of run_pretrain.py in this process."""
    import run_pretrain

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", ["run_pretrain.py", *map(str, words)]),
        patch.object(run_pretrain, "set_numerics"),  # its settings would affect all later tests
    ):
        try:
            run_pretrain.command()
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def two_classes(folder: Path) -> Path:
    """Create DIR/train and DIR/val with two classes: 16 and 4 images."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for number, name in enumerate(("dark", "bright")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(120 * number, 120 * number + 120, (24, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.png")
    return folder


def files_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Return hash and modification time of every file below a folder, except lock and start markers."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", ".starts-anew")
    }


@dataclass
class Stopped:
    """A run stopped after two steps."""

    folder: Path
    flags: list[Any]
    ended: Outcome

    def copy(self, to: Path) -> tuple[Path, list[Any]]:
        """Copy the run to another directory; return the directory and the flags that resume the run there."""
        shutil.copytree(self.folder, to)
        return to, [*self.flags[:-1], to]
