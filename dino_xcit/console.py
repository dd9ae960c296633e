"""Console scripts: each runs the runner of its name as a program, which checks the flags before it imports PyTorch."""

from __future__ import annotations

import runpy
from functools import partial

_run = partial(runpy.run_module, run_name="__main__", alter_sys=True)

pretrain = partial(_run, "run_pretrain")
knn = partial(_run, "run_knn")
linear = partial(_run, "run_linear")
extract = partial(_run, "run_extract")
retrieval = partial(_run, "run_retrieval")
slurm = partial(_run, "run_slurm")
