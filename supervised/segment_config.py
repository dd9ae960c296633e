"""Settings and recipes of run_segment.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from dino_xcit.bounds import FilePath, Group, IsPath, refuse_changed, shown
from dino_xcit.config import ResumeSafe, StateField
from dino_xcit.errors import InputError
from dino_xcit.recipes import Recipe
from supervised.config import SupervisedConfig


@dataclass(frozen=True)
class SegmentConfig(SupervisedConfig):
    """Train a backbone and a head to segment images, or segment your own pictures (--predict)."""

    recipe: Annotated[str, ResumeSafe, Group("data")] = ""
    """Named set of settings: semantic-fpn-80k (the default), upernet-160k, linear-40k (frozen backbone), own-data
    (hundreds to thousands of images)."""
    data_path: FilePath = ""
    """Folder with images and masks: ADE20k, VOC, or images/train, masks/train, images/val and masks/val (or
    train/images, train/masks ...), with masks as PNGs of labels named like their images. classes.txt in it, one name
    per line, is optional."""
    layout: Annotated[Literal["auto", "ade20k", "voc", "folder"], Group("data")] = "auto"
    """Layout of DATA_PATH."""
    classes: Annotated[int, Ge(0), Le(254), StateField] = 0
    """Number of classes; 0: that of ADE20k, VOC or classes.txt, else the largest label in the training masks + 1."""
    ignore_label: Annotated[int, Ge(0), Le(255)] = 255
    """Label of pixels that count neither in training nor in evaluation; with 0, label 0 is no class."""
    predict: Annotated[tuple[str, ...], IsPath, ResumeSafe] = ()
    """Image files and folders to segment, without training; --weights is a checkpoint of run_segment.py. Uses the head,
    the image sizes and the test mode of the checkpoint."""
    out: Annotated[FilePath, ResumeSafe] = ""
    """Folder for the results of --predict. Default: predictions, beside the weights."""
    drop_path_rate: Annotated[float, Ge(0), Lt(1), Group("model")] = 0.05
    """Stochastic depth rate of the backbone. Published: 0 for XCiT-T12, 0.05 for S12, 0.1 for S24, 0.2 for M24 (with
    UperNet 0.15)."""
    head: Annotated[Literal["auto", "semantic-fpn", "upernet", "linear"], StateField, Group("model")] = "auto"
    """Head: Semantic FPN (arXiv 1901.02446) or UperNet (arXiv 1807.10221) on a feature pyramid, or BatchNorm and a
    linear layer on the last patch tokens. auto: linear with --frozen, else semantic-fpn."""
    frozen: Annotated[bool, StateField] = False
    """Train the linear head only, on a frozen backbone in eval mode."""
    head_width: Annotated[int, Ge(0), StateField] = 0
    """Width of the head; 0: 128 for semantic-fpn, 512 for upernet (whose auxiliary head has half of it)."""
    fpn_width: Annotated[int, Ge(0), StateField] = 0
    """Width of the FPN of semantic-fpn; 0: that of the backbone."""
    steps: Annotated[int, Ge(0), Group("optimisation")] = 80_000
    """Length of the run in optimizer steps; 0: --epochs."""
    batch_size_per_gpu: Annotated[int, Ge(1), ResumeSafe] = 2
    """Images per forward pass and rank."""
    lr: Annotated[float, Ge(0)] = 6e-5
    """Peak learning rate for a global batch of lr_reference_batch images; scaled linearly with the global batch."""
    lr_reference_batch: Annotated[int, Ge(0)] = 16
    """Global batch size to which lr refers; 0: do not scale lr."""
    lr_schedule: Literal["cosine", "linear", "step"] = "linear"
    """Learning rate after the warm-up: a cosine or a line to --min-lr, or steps by a factor of 0.1 at --lr-drops."""
    min_lr: Annotated[float, Ge(0)] = 0.0
    """Learning rate at the end of the run."""
    warmup_steps: Annotated[int, Ge(0)] = 1500
    """Length of the learning-rate warm-up in steps; 0: --warmup-epochs."""
    warmup_start_lr: Annotated[float, Ge(0)] = 1e-6
    """Learning rate of the first step."""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """Weight decay."""
    short_side: Annotated[int, Ge(16), Group("crops")] = 512
    """Shorter side of a resized image in pixels, in evaluation and before the random scale in training."""
    scale: Annotated[tuple[float, float], Gt(0)] = (0.5, 2.0)
    """Minimum and maximum of the random scale of training images."""
    crop_size: Annotated[int, Ge(16)] = 512
    """Side of training crops, and of the window of --test slide."""
    max_class_share: Annotated[float, Gt(0), Le(1)] = 0.75
    """A training crop in which one class covers more is drawn again, up to 10 times."""
    flip: Annotated[float, Ge(0), Le(1)] = 0.5
    """Probability of a horizontal flip."""
    photometric: Annotated[float, Ge(0), Le(1)] = 0.5
    """Probability of changing each of brightness, contrast, saturation and hue."""
    saveckp_freq: Annotated[int, Ge(0), ResumeSafe, Group("checkpoints")] = 0
    """Epochs between checkpoints that are kept permanently (one is written every epoch); 0: none."""
    eval_every: Annotated[int, Ge(0), ResumeSafe, Group("evaluation")] = 10
    """Epochs between evaluations, besides the one at the end of the run; 0: only at the end."""
    test: Annotated[Literal["whole", "slide"], ResumeSafe, Group("evaluation")] = "whole"
    """Segment whole images, or overlapping windows of crop_size and average their scores."""
    test_stride: Annotated[int, Ge(0), ResumeSafe] = 0
    """Pixels between windows of --test slide; 0: two thirds of crop_size (341 for 512)."""
    masks_out: Annotated[FilePath, ResumeSafe] = ""
    """Folder for the predicted masks of all validation images, in the labels of the data; written at each
    evaluation."""
    best_metric: Annotated[str, ResumeSafe] = "miou"
    """Evaluator metric that selects best.pth; higher is better."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head != "auto" and self.frozen != (self.head == "linear"):
            raise InputError(
                f"head is {self.head} and frozen is {shown(self.frozen)}, expected --head linear with --frozen, or "
                "another head without it: a feature pyramid needs training"
            )
        if self.frozen:
            refuse_changed(self, ("head_width", "fpn_width"), "with --frozen")
        least, most = self.scale
        if least > most:
            raise InputError(f"scale is {least:g} {most:g}, expected least <= most, such as 0.5 2")
        if self.test_stride > self.crop_size:
            raise InputError(f"test_stride is {self.test_stride}, expected at most crop_size, {self.crop_size}")
        if self.out and not self.predict:
            raise InputError("out is for --predict: add --predict photos/, or use --masks-out for validation images")


_ADE = "run_segment.py --weights ckpt.pth --data-path /data/ADEChallengeData2016 --recipe"
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "semantic-fpn-80k", "Semantic FPN on ADE20k, 80,000 steps of 16 images (XCiT's settings)",
            f"torchrun --nproc-per-node 8 {_ADE} semantic-fpn-80k",
            "not measured (published for S12/16 from supervised weights: 43.9)",
        ),
        Recipe(
            "upernet-160k", "UperNet on ADE20k, 160,000 steps of 16 images (XCiT's settings)",
            f"torchrun --nproc-per-node 8 {_ADE} upernet-160k",
            "not measured (published for S12/16 from supervised weights: 45.9)",
            {"head": "upernet", "steps": 160_000},
        ),
        Recipe(
            "linear-40k", "a linear layer on a frozen backbone, 40,000 steps of 16 images (DINOv2's settings)",
            f"torchrun --nproc-per-node 8 {_ADE} linear-40k", "not measured",
            {"frozen": True, "steps": 40_000, "lr": 1e-3, "weight_decay": 1e-4,
             "drop_path_rate": 0.0, "test": "slide"},
        ),
        Recipe(
            "own-data", "hundreds to thousands of images with masks of your own",
            "python run_segment.py --recipe own-data --weights ckpt.pth --data-path photos/", "not measured",
            {"steps": 0, "epochs": 50, "warmup_steps": 0, "warmup_epochs": 2.0, "batch_size_per_gpu": 8, "lr": 2e-4,
             "eval_every": 5},
        ),
    )
}  # fmt: skip
DEFAULT_RECIPE = "semantic-fpn-80k"
