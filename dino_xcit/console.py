"""Console scripts: each runs the runner of its name as a program, which checks the flags before it imports PyTorch."""

from __future__ import annotations

import runpy
from collections.abc import Callable


def _program(module: str) -> Callable[[], None]:
    def run() -> None:  # returns None: the script passes the result to sys.exit
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    return run


pretrain = _program("run_pretrain")
finetune = _program("run_finetune")
detect = _program("run_detect")
segment = _program("run_segment")
knn = _program("run_knn")
linear = _program("run_linear")
extract = _program("run_extract")
retrieval = _program("run_retrieval")
slurm = _program("run_slurm")
