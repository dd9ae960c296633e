"""Reads a batch through two loader processes, then ends as it is told: ``well``, or ``killed``."""

from __future__ import annotations

import os
import signal
import sys

from tiny_run import CPU, sampler_of, tiny_config, tiny_source

from dino_xcit.data.loader import build_loader


def main() -> None:
    """With the temporary folder of the environment."""
    config = tiny_config()
    sampler = sampler_of(config)
    sampler.start_step, sampler.stop_step = 0, 6
    loader = build_loader(tiny_source(), config.augmentation(), sampler, 0, 2, CPU)
    next(loader)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    loader.close()


if __name__ == "__main__":
    main()
