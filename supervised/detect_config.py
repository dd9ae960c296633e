"""Settings and recipes of run_detect.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from dino_xcit.bounds import FilePath, Group, IsPath
from dino_xcit.config import ResumeSafe, StateField
from dino_xcit.errors import InputError
from dino_xcit.recipes import Recipe
from supervised.config import SupervisedConfig


@dataclass(frozen=True)
class DetectConfig(SupervisedConfig):
    """Train an object detector on a pretrained backbone, or detect objects on your own pictures (--predict)."""

    recipe: Annotated[str, ResumeSafe, Group("data")] = ""
    """Named set of settings: mask-rcnn-3x (the default; the paper's, 36 epochs), mask-rcnn-1x (12 epochs),
    self-supervised-1x (iBOT's for self-supervised weights, 12 epochs), own-data (hundreds to thousands of images)."""
    data_path: FilePath = ""
    """Folder in the layout of COCO: annotations/instances_train2017.json (or the only instances_train*.json) with the
    images in train2017, train, images/train2017 or images/train; the same for val."""
    train_images: Annotated[FilePath, Group("data")] = ""
    """Folder of the training images. Default: from DATA_PATH."""
    train_annotations: FilePath = ""
    """COCO annotations of the training images. Default: from DATA_PATH."""
    val_images: FilePath = ""
    """Folder of the validation images. Default: from DATA_PATH."""
    val_annotations: FilePath = ""
    """COCO annotations of the validation images. Default: from DATA_PATH."""
    empty_images: bool = False
    """Train on images without objects too, as examples of background; the paper leaves them out."""
    predict: Annotated[tuple[str, ...], IsPath, ResumeSafe] = ()
    """Image files and folders in which to detect objects, without training; --weights is a checkpoint of
    run_detect.py."""
    out: Annotated[FilePath, ResumeSafe] = ""
    """Folder for the results of --predict. Default: predictions, beside the weights."""
    model: Annotated[Literal["mask-rcnn", "faster-rcnn"], StateField, Group("model")] = "mask-rcnn"
    """Detector: boxes and masks (mask-rcnn), or boxes only (faster-rcnn)."""
    fpn_width: Annotated[int, Ge(1), StateField] = 256
    """Channels of the feature pyramid, the region proposal network and the mask head."""
    box_head_width: Annotated[int, Ge(1), StateField] = 1024
    """Channels of the two layers of the box head."""
    rois: Annotated[int, Ge(1)] = 512
    """Regions per image that train the box head; a quarter of them on objects."""
    proposals: Annotated[int, Ge(1)] = 1000
    """Regions per image that the region proposal network passes on."""
    epochs: Annotated[int, Ge(1), Group("optimisation")] = 36
    """Number of epochs."""
    batch_size_per_gpu: Annotated[int, Ge(1), ResumeSafe] = 2
    """Images per forward pass and rank."""
    lr: Annotated[float, Ge(0)] = 1e-4
    """Peak learning rate for a global batch of lr_reference_batch images; scaled linearly with the global batch."""
    lr_reference_batch: Annotated[int, Ge(0)] = 16
    """Global batch size to which lr refers; 0: do not scale lr."""
    lr_schedule: Literal["cosine", "linear", "step"] = "step"
    """Learning rate after the warm-up: a cosine or a line to --min-lr, or steps by a factor of 0.1 at --lr-drops."""
    warmup_steps: Annotated[int, Ge(0)] = 500
    """Length of the learning-rate warm-up in steps; 0: --warmup-epochs."""
    warmup_start_lr: Annotated[float, Ge(0)] = 1e-7
    """Learning rate of the first step."""
    weight_decay: Annotated[float, Ge(0)] = 0.05
    """Weight decay."""
    short_sides: Annotated[tuple[int, ...], Ge(16), MinLen(1), Group("crops")] = tuple(range(480, 801, 32))
    """Shorter side of a training image in pixels, one of these at random."""
    long_side: Annotated[int, Ge(16)] = 1333
    """Maximum of the longer side in pixels, for training and test."""
    crop_probability: Annotated[float, Ge(0), Le(1)] = 0.5
    """Probability of a random crop before the image is resized to one of --short-sides."""
    crop_short_sides: Annotated[tuple[int, ...], Ge(16), MinLen(1)] = (400, 500, 600)
    """Shorter side of an image in pixels before a random crop, one of these at random."""
    crop_sides: Annotated[tuple[int, int], Ge(16)] = (384, 600)
    """Minimum and maximum of the sides of a random crop in pixels."""
    flip: Annotated[float, Ge(0), Le(1)] = 0.5
    """Probability of a horizontal flip."""
    test_side: Annotated[int, Ge(16)] = 800
    """Shorter side of a test image in pixels."""
    best_metric: Annotated[str, ResumeSafe, Group("evaluation")] = "box_ap"
    """Evaluator metric that selects best.pth; higher is better: box_ap, box_ap50, mask_ap ..."""
    draw_score: Annotated[float, Gt(0), Lt(1), ResumeSafe, Group("evaluation")] = 0.5
    """Minimum score of a detection in a drawing; predictions.json has all above 0.05."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least, most = self.crop_sides
        if least > most:
            raise InputError(f"crop_sides is {least} {most}, expected least <= most, such as 384 600")
        if (longest := max(*self.short_sides, self.test_side)) > self.long_side:
            raise InputError(f"long_side is {self.long_side}, less than a shorter side of {longest}: raise --long-side")


_NOT_MEASURED = "not measured"
_1X: dict[str, object] = {"epochs": 12, "lr_drops": (8 / 12, 11 / 12)}
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "mask-rcnn-3x",
            "the XCiT paper's Mask R-CNN on COCO: 36 epochs at batch 16 (add its --drop-path-rate: 0.05 for S12)",
            "torchrun --nproc-per-node 8 run_detect.py --weights ckpt.pth --drop-path-rate 0.05 --data-path /coco",
            "not measured (published for supervised XCiT-S12/16: box AP 45.3, mask AP 40.8)",
        ),
        Recipe(
            "mask-rcnn-1x",
            "the same for 12 epochs",
            "torchrun --nproc-per-node 8 run_detect.py --recipe mask-rcnn-1x --weights ckpt.pth --data-path /coco",
            _NOT_MEASURED,
            _1X,
        ),
        Recipe(
            "self-supervised-1x",
            "iBOT's settings for self-supervised weights: 12 epochs, layer-wise learning rates",
            "torchrun --nproc-per-node 8 run_detect.py --recipe self-supervised-1x --weights ckpt.pth --data-path "
            "/coco",
            _NOT_MEASURED,
            _1X | {"layer_decay": 0.8, "drop_path_rate": 0.1},
        ),
        Recipe(
            "own-data",
            "hundreds to thousands of images of your own, one GPU",
            "python run_detect.py --recipe own-data --weights ckpt.pth --data-path my_coco/",
            _NOT_MEASURED,
            _1X
            | {
                "epochs": 50, "layer_decay": 0.8, "drop_path_rate": 0.1, "batch_size_per_gpu": 4, "eval_every": 5,
                "empty_images": True,
            },
        ),
    )
}  # fmt: skip
DEFAULT_RECIPE = "mask-rcnn-3x"
