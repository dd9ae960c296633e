"""Settings that all supervised tasks share."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from dino_xcit.bounds import FilePath, Group, check_bounds
from dino_xcit.config import ResumeSafe, StateField, TrainConfig
from dino_xcit.errors import InputError

SCRATCH = "none"
"""Value of ``weights`` that starts from random weights."""


@dataclass(frozen=True)
class SupervisedConfig(TrainConfig):
    """Settings of a supervised run that starts from a pretrained backbone."""

    weights_flag: ClassVar[str] = "--weights"
    weights: Annotated[FilePath, Group("model")] = ""
    """Pretrained weights: any file that run_knn.py reads, hf-hub:ORG/NAME or timm:NAME; see docs/checkpoints.md. none:
    random weights of --arch."""
    network: Literal["teacher", "student"] = "teacher"
    """Network to load if the checkpoint holds both."""
    arch: Annotated[str, StateField] = ""
    """Architecture. Default: inferred from the weights."""
    allow_missing: tuple[str, ...] = ()
    """Backbone keys that may be missing from the weights, by name or as PREFIX*; they keep their random values."""
    allow_unexpected: tuple[str, ...] = ()
    """Keys of the weights that may be missing from the backbone, by name or as PREFIX*; they are ignored."""
    drop_path_rate: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Stochastic depth rate of the backbone."""
    layer_decay: Annotated[float, Gt(0), Le(1), Group("optimisation")] = 1.0
    """Factor of the learning rate from each layer of the backbone to the layer below; 1: the same rate for all."""
    ema: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Momentum of an exponential moving average (EMA) of the weights, which is evaluated instead of them; 0: none."""
    clip_grad: Annotated[float, Ge(0)] = 0.0
    """Maximum gradient norm; 0: no clipping."""
    warmup_epochs: Annotated[float, Ge(0)] = 0.0
    """Epochs of linear learning-rate warm-up, unless --warmup-steps is given."""
    steps: Annotated[int, Ge(0)] = 0
    """Length of the run in optimizer steps; 0: --epochs."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Length of the learning-rate warm-up in steps; 0: --warmup-epochs."""
    lr_schedule: Literal["cosine", "linear", "step"] = "cosine"
    """Learning rate after the warm-up: a cosine or a line to --min-lr, or steps by a factor of 0.1 at --lr-drops."""
    lr_drops: Annotated[tuple[float, ...], Gt(0), Lt(1)] = (0.75, 11 / 12)
    """For --lr-schedule step: when the learning rate drops, as shares of the run."""
    output_dir: Annotated[FilePath, ResumeSafe, Group("checkpoints")] = ""
    """Directory for checkpoints, metrics and results. Default: a folder named like the recipe beside the weights, or
    runs/NAME-RECIPE for --weights none and weights from a hub."""
    eval_every: Annotated[int, Ge(0), ResumeSafe, Group("evaluation")] = 1
    """Epochs between evaluations, besides the one at the end of the run; 0: only at the end."""
    json: Annotated[FilePath, ResumeSafe] = ""
    """Write the results and the protocol to this file. Default: OUTPUT_DIR/results.json."""

    @property
    def evaluation_interval(self) -> int:
        """Epochs between evaluations; more than any run has if only its end is evaluated."""
        return self.eval_every or sys.maxsize

    def __post_init__(self) -> None:
        """Check all values.

        Raises:
            InputError: a value is out of bounds, or two settings conflict.
        """
        from dino_xcit.weights import Allowed  # imports PyTorch, which commands avoid while parsing flags

        check_bounds(self)
        Allowed(self.allow_missing, self.allow_unexpected).check()
        if self.weights == SCRATCH and not self.arch:
            raise InputError(f"weights is {SCRATCH}, but arch is empty: give --arch, such as xcit_small_12_p16")
