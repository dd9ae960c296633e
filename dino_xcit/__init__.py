"""Pretrain XCiT image encoders without labels: DINO, multi-crop, k-NN and linear evaluation."""

import os

# Import dino_xcit before torch: OpenMP reads this when PyTorch loads. By default, idle threads of GNU OpenMP spin for
# milliseconds, which slows training several times on cores shared with loader workers.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.2.0"
