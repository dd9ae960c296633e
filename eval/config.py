"""Settings of the evaluation commands: names, defaults, bounds and help texts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from dino_xcit.bounds import (
    FilePath,
    Group,
    IsPath,
    Positional,
    Repeatable,
    Seed,
    Suffix,
    Unique,
    marked,
    refuse_changed,
)
from dino_xcit.errors import InputError
from dino_xcit.transform import WHITE

Pooling = Literal["cls", "mean", "gem", "cls+mean", "cls+gem"]
"""Tokens that form the vector of an image, see :class:`eval.pooling.Descriptor`."""
PAPER_EPOCHS = 100
"""Epochs of the published linear probes."""
SMALL_EPOCHS = 8
"""Default number of epochs for images of at most SMALL_CROP pixels: one minute on a CPU. xcit_micro_4_p16 on the sample
reaches 81.0 on held-out training images after 8 epochs and 80.3 after 16."""
PAPER_CROP_SCALE = (0.08, 1.0)
"""Crop scale of the published linear probes (torchvision's default)."""
SMALL_CROP_SCALE = (1.0, 1.0)
"""Default crop scale for images of at most SMALL_CROP pixels: no cropping, as small crops lose the object.
xcit_micro_4_p16 on the sample, top-1 on held-out training images: 78.5 with a minimum area of 0.6, 81.0 with 0.8, 82.5
with 0.95, 83.2 without cropping."""
SMALL_CROP = 64


class IsOutput:
    """Marks an output file, which is checked for writability before the run."""


@dataclass(frozen=True)
class BackboneConfig:
    """Settings shared by all evaluation commands: backbone, data and machine."""

    weights: Annotated[FilePath, Group("model")] = ""
    """Weights to evaluate: a checkpoint of this project, DINO, DINOv2, iBOT, MoCo, MAE, XCiT, VISSL, lightly,
    solo-learn, timm or torchvision, a .safetensors file, a folder or hf-hub:ORG/NAME of timm or transformers, or
    timm:NAME with or without a pretrained tag; see docs/checkpoints.md."""
    network: Literal["teacher", "student"] = "teacher"
    """Network to evaluate if the checkpoint holds both."""
    arch: str = ""
    """Architecture. Default: inferred from the file."""
    allow_missing: tuple[str, ...] = ()
    """Backbone keys that may be missing from the file, by name or as PREFIX*; they keep their random weights."""
    allow_unexpected: tuple[str, ...] = ()
    """Keys of the file that may be missing from the backbone, by name or as PREFIX*; they are ignored."""
    data_path: Annotated[str, Group("data")] = ""
    """Images: a folder, a .txt list, tar:PATTERN, parquet:PATTERN, hf:NAME_OR_DIR, imagenet:DIR, sample:fashion-mnist,
    torchvision:NAME; see docs/data.md. Default: the training data of the checkpoint."""
    eval_resize: Annotated[int, Ge(0)] = 0
    """Length of the shorter side after resizing; 0: 8/7 of --eval-crop if that is given, else from the weights."""
    eval_crop: Annotated[int, Ge(0)] = 0
    """Size of the centre crop; 0: from the weights, see docs/checkpoints.md."""
    white_level: Annotated[int, Ge(0), Le(WHITE)] = 0
    """White value of 16-bit greyscale images, such as 4095 for 12-bit data; 0: from the checkpoint, else 65535."""
    batch_size_per_gpu: Annotated[int, Ge(1), Group("machine")] = 128
    """Images per forward pass and rank (alias: --batch-size)."""
    num_workers: Annotated[int, Ge(-1)] = -1
    """Loader workers per rank; -1: the available cores per rank, at most 10."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: a GPU if one is available."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the backbone's products (autocast); part of the feature cache's key and of the results."""
    cache: bool = True
    """Cache extracted features and reuse cached ones."""
    cache_dir: FilePath = ""
    """Folder of the feature cache. Default: features/ beside the weights."""
    json: Annotated[FilePath, IsOutput, Group("evaluation")] = ""
    """Write the results and the protocol to this file."""

    def check(self) -> None:
        """Check combinations of settings; :func:`dino_xcit.cli.parse` calls it after checking the bounds.

        Raises:
            InputError: with field name, value and expected value.
        """
        from dino_xcit.weights import Allowed  # imports PyTorch, which commands avoid while parsing flags

        Allowed(self.allow_missing, self.allow_unexpected).check()
        if not self.cache:
            refuse_changed(self, ("cache_dir",), "with --no-cache")

    def written(self) -> dict[str, str]:
        """Return the output files by setting name; empty strings for those not requested."""
        return {name: getattr(self, name) for name in marked(type(self), IsOutput)}


@dataclass(frozen=True)
class KnnConfig(BackboneConfig):
    """Evaluate frozen features by k-NN classification."""

    train_data: Annotated[str, Group("data")] = ""
    """Labelled images to search for neighbours. Default: DATA_PATH/train."""
    val_data: str = ""
    """Labelled images to classify. Default: DATA_PATH/val."""
    ks: Annotated[tuple[int, ...], Ge(1), MinLen(1), Unique, Group("evaluation")] = (10, 20, 100, 200)
    """Numbers of neighbours; one search serves all of them."""
    temperatures: Annotated[tuple[float, ...], Gt(0), MinLen(1), Unique] = (0.07,)
    """Temperatures T of the vote weight exp(cosine similarity / T)."""
    baselines: bool = False
    """Also evaluate the untrained architecture and raw pixels."""
    few_shot: Annotated[tuple[int, ...], Ge(1), Unique] = ()
    """Also evaluate with this many labelled images per class, such as 1 2 5 10, drawn at random --draws times."""
    draws: Annotated[int, Ge(1)] = 5
    """Random draws per value of --few-shot; the results are the mean and std over the draws."""
    seed: Seed = 0
    """Seed of the few-shot draws and of the queries for the recall of an approximate search."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """Handling of unreadable images: end the run with the image's name, or skip and count them."""
    per_class: Annotated[FilePath, IsOutput, Suffix(".csv")] = ""
    """Write number of images, top-1 and most frequent wrong class of each class to this .csv file, at the first of --ks
    and --temperatures."""
    confusion: Annotated[FilePath, IsOutput, Suffix(".png")] = ""
    """Draw the confusion matrix at the first of --ks and --temperatures to this .png file."""
    approximate: Literal["no", "ivf", "hnsw"] = "no"
    """Approximate search: ivf (inverted lists) or hnsw (graph). The recall against exact search is measured and
    reported."""
    probes: Annotated[int, Ge(0)] = 0
    """Lists (ivf) or candidates (hnsw, at least the largest of --ks) that an approximate search visits per query;
    0: chosen from the number of images."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        if not self.few_shot:
            refuse_changed(self, ("draws",), "without --few-shot")
        if self.approximate == "no":
            refuse_changed(self, ("probes",), "without --approximate")
            if not self.few_shot:
                refuse_changed(self, ("seed",), "without --few-shot or --approximate")


@dataclass(frozen=True)
class LinearConfig(BackboneConfig):
    """Evaluate frozen features by linear classification. The defaults are the published protocol and a grid of learning
    rates."""

    train_data: Annotated[str, Group("data")] = ""
    """Labelled training images. Default: DATA_PATH/train."""
    val_data: str = ""
    """Labelled validation images. Default: DATA_PATH/val."""
    epochs: Annotated[int, Ge(0), Group("optimisation")] = 0
    """Passes over the training images; 0: 100 as published, or 8 for images of at most 64 pixels."""
    lr: Annotated[float, Gt(0)] = 0.001
    """Learning rate of the paper's classifier for a global batch of 256; scaled linearly with the global batch."""
    lrs: Annotated[tuple[float, ...], Gt(0), Unique] = (
        1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0,
        2.0, 5.0,
    )  # fmt: skip
    """Grid of learning rates, scaled like --lr; their classifiers train on the same forward pass. The best is selected
    on held-out training images."""
    features: Annotated[tuple[str, ...], MinLen(1), Unique, Group("evaluation")] = ("cls",)
    """Input features of the grid and of the logistic regression: cls, cls+mean (class token and mean of the patch
    tokens), lastN such as last4 (class tokens of the last N blocks); see docs/linear.md. Several values share one
    forward pass. The paper's classifier always uses the class token."""
    holdout: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of the training images that is held out to select the best classifier; 0: no grid."""
    sgd: bool = True
    """Train the paper's classifier and the grid. --no-sgd: logistic regression only."""
    cached: bool = False
    """Cache the features of a few augmented epochs and train on them for --epochs: minutes instead of hours."""
    cached_epochs: Annotated[int, Ge(1)] = 4
    """Number of augmented epochs that --cached stores."""
    cached_precision: Literal["float16", "float32"] = "float16"
    """Type of the features that --cached stores."""
    logreg: bool = False
    """Also fit a logistic regression with L-BFGS on features of unaugmented images."""
    logreg_cs: Annotated[tuple[float, ...], Gt(0), MinLen(1), Unique] = tuple(
        float(f"{10 ** (step / 4 - 6):.3g}") for step in range(45)
    )
    """Inverse strengths of the L2 penalty (scikit-learn's C); the best is selected on held-out training images. The
    default is DINOv2's grid, four values per decade."""
    logreg_iterations: Annotated[int, Ge(1)] = 1000
    """Maximum number of L-BFGS iterations for each C."""
    also: tuple[str, ...] = ()
    """Variants of ImageNet's validation set on which to evaluate the classifier with the best held-out accuracy:
    imagenet-v2:DIR, imagenet-a:DIR, imagenet-r:DIR, sketch:DIR, real:FILE.json."""
    crop_scale: Annotated[tuple[float, float], Group("crops")] = (0.0, 0.0)
    """Minimum and maximum share of a training image's area in a crop; 0 0: 0.08 1 as published, or 1 1 for images of at
    most 64 pixels."""
    seed: Annotated[Seed, Group("machine")] = 0
    """Seed of the initial classifiers, the crops, the image order and the held-out images."""
    output_dir: Annotated[FilePath, Group("checkpoints")] = ""
    """Folder for linear.pth and logreg.pth. Default: linear/ beside the weights."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume if output_dir contains this probe, fail if it contains another; never: start from scratch and
    overwrite."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        from eval.linear.imagenet_variants import split

        super().check()
        for name in self.features:
            blocks_of(name)
        variants = [split(word)[0] for word in self.also]
        if len(set(variants)) < len(variants):
            raise InputError(f"also is {' '.join(variants)}, expected each variant once")
        if not self.sgd:
            refuse_changed(self, ("epochs", "lr", "lrs", "crop_scale", "cached"), "with --no-sgd")
        if not self.cached:
            refuse_changed(self, ("cached_epochs", "cached_precision"), "without --cached")
        if not self.logreg:
            refuse_changed(self, ("logreg_cs", "logreg_iterations"), "without --logreg")
            if not self.sgd:
                raise InputError("both sgd and logreg are off: add --logreg or omit --no-sgd")
            if not (self.holdout and self.lrs):
                refuse_changed(self, ("features",), "without a --holdout and --lrs for the grid, or --logreg")
        if self.cached and not self.cache:
            raise InputError("both --cached and --no-cache are given: omit one of them")
        if self.logreg and not self.holdout and len(self.logreg_cs) * len(self.features) > 1:
            raise InputError(
                "holdout is 0, but the C and the features of the logistic regression are chosen on held-out images: "
                "raise --holdout, or give a single value each for --logreg-cs and --features"
            )
        least, most = self.crop_scale
        if not (0 < least <= most <= 1 or least == most == 0):
            raise InputError(f"crop_scale is {least} {most}, expected 0 < least <= most <= 1, such as 0.08 1")


@dataclass(frozen=True)
class CompareConfig:
    """Compare result files with paired significance tests."""

    files: Annotated[tuple[str, ...], MinLen(2), IsPath, Positional, Repeatable] = ()
    """Result files (--json of an evaluation, or results.json of a run) and published:NAME. All are compared with
    the first. The flag --files itself may be omitted."""
    allow: tuple[str, ...] = ()
    """Differences to accept, by the names in the error message: transform, train, val, k, T, classifier ..."""
    metric: tuple[str, ...] = ()
    """Compare only metrics (results) with these words in their names, such as k=20 or "grid last". Give one value for
    all files, or one per file, such as grid logreg."""
    table: Literal["text", "markdown"] = "text"
    """Format of the table."""
    json: FilePath = ""
    """Write the comparison to this file."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        if len(self.metric) not in (0, 1, len(self.files)):
            raise InputError(
                f"metric has {len(self.metric)} values, expected one for all files or one for each of the "
                f"{len(self.files)} files: quote words that belong together, such as --metric 'grid last'"
            )


_FEATURES = re.compile(r"cls(\+mean)?|last([1-9]\d?)(\+mean)?")


def blocks_of(choice: str) -> int:
    """Return the number of last blocks that a choice needs: 0 for ``cls``, 1 for ``cls+mean``.

    Raises:
        InputError: the choice is unknown.
    """
    found = _FEATURES.fullmatch(choice)
    if found is None:
        raise InputError(
            f"features has {choice!r}, expected cls, cls+mean, or lastN such as last4 (for a ViT also last4+mean)"
        )
    return int(found[2] or bool(found[1]))
