"""Pretrain XCiT image encoders without labels: DINO, multi-crop, k-NN and linear evaluation."""

import os

# OpenMP reads this when PyTorch is loaded, so a program imports dino_xcit before torch. By default a thread that waits
# for its fellows burns its core for milliseconds, which on a CPU shared with loader processes costs five times the
# speed (docs/log.md). Somebody who has chosen a policy keeps it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.2.0"
