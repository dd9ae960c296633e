"""Settings and recipes of run_finetune.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

from dino_xcit.bounds import Group
from dino_xcit.config import ResumeSafe
from dino_xcit.errors import InputError
from dino_xcit.recipes import Recipe
from supervised.config import SupervisedConfig


@dataclass(frozen=True)
class FinetuneConfig(SupervisedConfig):
    """Train a backbone with labels: from pretrained weights, or from scratch."""

    recipe: Annotated[str, ResumeSafe, Group("data")] = ""
    """Named set of settings: finetune-100ep (the default), finetune-384 (a classifier of 224 pixels, 30 epochs more at
    384), low-shot-1pct, low-shot-10pct, own-data (thousands of images), xcit-supervised-400ep (from scratch)."""
    data_path: str = ""
    """Labelled images with a training and a validation part, in any format that run_knn.py reads."""
    train_data: Annotated[str, Group("data")] = ""
    """Labelled training images. Default: DATA_PATH/train."""
    val_data: str = ""
    """Labelled validation images. Default: DATA_PATH/val."""
    train_share: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of the training images of each class to train on, at least one; chosen by --seed."""
    drop_path_rate: Annotated[float, Ge(0), Lt(1), Group("model")] = 0.1
    """Stochastic depth rate of the backbone."""
    epochs: Annotated[int, Ge(1), Group("optimisation")] = 100
    """Number of epochs."""
    lr: Annotated[float, Ge(0)] = 1e-3
    """Peak learning rate for a global batch of lr_reference_batch images; scaled linearly with the global batch."""
    lr_reference_batch: Annotated[int, Ge(0)] = 1024
    """Global batch size to which lr refers; 0: do not scale lr."""
    warmup_epochs: Annotated[float, Ge(0)] = 5.0
    """Epochs of linear learning-rate warm-up."""
    weight_decay: Annotated[float, Ge(0)] = 0.05
    """Weight decay."""
    layer_decay: Annotated[float, Gt(0), Le(1)] = 0.75
    """Factor of the learning rate from each layer of the backbone to the layer below; 1: the same rate for all."""
    label_smoothing: Annotated[float, Ge(0), Lt(1), Group("optimisation")] = 0.1
    """Share of the target that is spread over all classes."""
    image_size: Annotated[int, Ge(0), Group("crops")] = 0
    """Side of the training crop and of the test crop in pixels; 0: from the weights."""
    eval_crop_ratio: Annotated[float, Gt(0), Le(1)] = 0.875
    """Side of the test crop as a share of the shorter side of the resized image."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Minimum and maximum share of the image area in a training crop."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Minimum and maximum aspect ratio (width / height) of a training crop."""
    flip: Annotated[float, Ge(0), Le(1)] = 0.5
    """Probability of a horizontal flip."""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of an augmentation policy, which replaces colour jitter; empty: none."""
    color_jitter: Annotated[float, Ge(0)] = 0.4
    """Strength of colour jitter, without --auto-augment."""
    erasing: Annotated[float, Ge(0), Le(1)] = 0.25
    """Probability of erasing a rectangle."""
    mixup: Annotated[float, Ge(0)] = 0.8
    """Parameter of mixup's beta distribution; 0: no mixup. Every batch has mixup or cutmix."""
    cutmix: Annotated[float, Ge(0)] = 1.0
    """Parameter of cutmix's beta distribution; 0: no cutmix."""
    repeated_augmentation: Annotated[int, Ge(1)] = 1
    """Differently augmented copies of an image in a step; an epoch keeps its number of steps."""
    best_metric: Annotated[str, ResumeSafe, Group("evaluation")] = "top1"
    """Evaluator metric that selects best.pth; higher is better."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mixup or self.cutmix) and self.batch_size_per_gpu % 2:
            raise InputError(
                f"batch_size_per_gpu is {self.batch_size_per_gpu}, expected an even number: mixup and cutmix pair the "
                "images of a batch; or give --mixup 0 --cutmix 0"
            )
        for name in ("crop_scale", "crop_ratio"):
            least, most = getattr(self, name)
            if not 0 < least <= most:
                raise InputError(f"{name} is {least:g} {most:g}, expected 0 < least <= most, such as 0.08 1")


_NOT_MEASURED = "not measured"
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "finetune-100ep",
            "self-supervised weights on ImageNet-1k, 100 epochs (MAE's and iBOT's settings)",
            "torchrun --nproc-per-node 8 run_finetune.py --weights ckpt.pth --data-path /imagenet",
            _NOT_MEASURED,
            {"batch_size_per_gpu": 128},
        ),
        Recipe(
            "finetune-384",
            "30 more epochs at 384 pixels, from a classifier trained at 224 (DeiT's settings)",
            "torchrun --nproc-per-node 8 run_finetune.py --recipe finetune-384 --weights runs/224/checkpoint.pth "
            "--data-path /imagenet",
            _NOT_MEASURED,
            {
                "image_size": 384, "epochs": 30, "lr": 5e-6, "lr_reference_batch": 512, "warmup_epochs": 0.0,
                "weight_decay": 1e-8, "layer_decay": 1.0, "eval_crop_ratio": 1.0,
            },
        ),
        Recipe(
            "low-shot-1pct",
            "1% of the labels of ImageNet-1k",
            "torchrun --nproc-per-node 8 run_finetune.py --recipe low-shot-1pct --weights ckpt.pth --data-path "
            "/imagenet",
            _NOT_MEASURED,
            {
                "train_share": 0.01, "epochs": 1000, "lr": 5e-4, "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0,
                "eval_every": 50,
            },
        ),
        Recipe(
            "low-shot-10pct",
            "10% of the labels of ImageNet-1k",
            "torchrun --nproc-per-node 8 run_finetune.py --recipe low-shot-10pct --weights ckpt.pth --data-path "
            "/imagenet",
            _NOT_MEASURED,
            {"train_share": 0.1, "epochs": 200, "lr": 5e-4, "eval_every": 10},
        ),
        Recipe(
            "own-data",
            "thousands of labelled images of your own",
            "python run_finetune.py --recipe own-data --weights ckpt.pth --data-path photos/",
            _NOT_MEASURED,
            {"epochs": 50, "mixup": 0.0, "cutmix": 0.0, "crop_scale": (0.25, 1.0), "eval_every": 5},
        ),
        Recipe(
            "xcit-supervised-400ep",
            "the paper's supervised training from scratch: 400 epochs at batch 1024",
            "torchrun --nproc-per-node 8 run_finetune.py --recipe xcit-supervised-400ep --weights none --arch "
            "xcit_small_12_p16 --drop-path-rate 0.05 --data-path /imagenet",
            "not measured (published for S12/16: 82.0)",
            {
                "batch_size_per_gpu": 128, "epochs": 400, "lr": 5e-4, "lr_reference_batch": 512, "min_lr": 1e-5,
                "warmup_start_lr": 1e-6, "layer_decay": 1.0, "drop_path_rate": 0.05, "repeated_augmentation": 3,
                "eval_crop_ratio": 1.0, "eval_every": 10,
            },
        ),
    )
}  # fmt: skip
DEFAULT_RECIPE = "finetune-100ep"
