"""Every setting of the runners that measure, with its default: the only place that has them."""

from __future__ import annotations

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
"""The tokens that an image's vector is made of, see :class:`eval.pooling.Descriptor`."""
PAPER_EPOCHS = 100
"""Epochs of the published linear probes."""
SMALL_EPOCHS = 8
"""Epochs of a probe on pictures of at most SMALL_CROP pixels, when nobody says otherwise: a minute on a CPU
(xcit_micro_4_p16 on the sample, held-out training images: 81.0 after 8 epochs, 80.3 after 16)."""
PAPER_CROP_SCALE = (0.08, 1.0)
"""Crops of the published linear probes (torchvision's default)."""
SMALL_CROP_SCALE = (1.0, 1.0)
"""Pictures of at most SMALL_CROP pixels are not cropped, when nobody says otherwise: an eighth of such a picture
shows nothing (xcit_micro_4_p16 on the sample, top-1 on held-out training images: 78.5 with least area 0.6, 81.0 with
0.8, 82.5 with 0.95, 83.2 uncropped)."""
SMALL_CROP = 64


class IsOutput:
    """Mark of a file that is written at the end of a run: it is tried before."""


@dataclass(frozen=True)
class BackboneConfig:
    """Which backbone is measured, and on what machine: the settings that all three runners share."""

    weights: Annotated[FilePath, Group("model")] = ""
    """What to measure: a checkpoint of this project, DINO, DINOv2, iBOT, MoCo, MAE, XCiT, VISSL, lightly, solo-learn,
    timm or torchvision, a .safetensors file, a folder or hf-hub:ORG/NAME of timm or transformers, or timm:NAME with
    timm's pretrained tag or without; docs/checkpoints.md."""
    network: Literal["teacher", "student"] = "teacher"
    """Which network of a checkpoint that holds both."""
    arch: str = ""
    """Architecture, where the file neither says nor shows it."""
    allow_missing: tuple[str, ...] = ()
    """Keys of the backbone that the file may lack, by name or by their beginning and *: they keep untrained values."""
    allow_unexpected: tuple[str, ...] = ()
    """Keys of the file that the backbone may lack, likewise: they are left aside."""
    data_path: Annotated[str, Group("data")] = ""
    """Images: a folder, a .txt list, tar:PATTERN, parquet:PATTERN, hf:NAME_OR_DIR, imagenet:DIR, sample:fashion-mnist,
    torchvision:NAME; see docs/data.md. Default: what the checkpoint was trained on."""
    eval_resize: Annotated[int, Ge(0)] = 0
    """Shorter side that images are resized to; 0: as the checkpoint says, else 8/7 of the crop."""
    eval_crop: Annotated[int, Ge(0)] = 0
    """Centre crop; 0: as the checkpoint says, else 224."""
    white_level: Annotated[int, Ge(0), Le(WHITE)] = 0
    """Value of 16-bit grey images that is white, such as 4095; 0: as the checkpoint says, else 65535."""
    batch_size_per_gpu: Annotated[int, Ge(1), Group("machine")] = 128
    """Images in one forward pass of one process (--batch-size is the same)."""
    num_workers: Annotated[int, Ge(-1)] = -1
    """Loader processes a rank; -1: chosen from the cores at hand."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: a GPU if there is one."""
    cache: bool = True
    """Keep extracted features, and use those that were kept. --no-cache: neither."""
    cache_dir: FilePath = ""
    """Where features are kept. Default: features/ beside the weights."""
    json: Annotated[FilePath, IsOutput, Group("evaluation")] = ""
    """Write the figures, and how they were measured, to this file."""

    def check(self) -> None:
        """Check how the settings go together; :func:`dino_xcit.cli.parse` calls it after the bounds.

        Raises:
            InputError: names the field, its value and what is expected.
        """
        from dino_xcit.weights import Allowed  # imports PyTorch: a command reads its flags before

        Allowed(self.allow_missing, self.allow_unexpected).check()
        if not self.cache:
            refuse_changed(self, ("cache_dir",), "with --no-cache")

    def written(self) -> dict[str, str]:
        """The files that are written at the end, by the names of their settings; those not asked for are empty."""
        return {name: getattr(self, name) for name in marked(type(self), IsOutput)}


@dataclass(frozen=True)
class KnnConfig(BackboneConfig):
    """Settings of run_knn.py."""

    train_data: Annotated[str, Group("data")] = ""
    """Labelled images that vote, where not DATA_PATH/train."""
    val_data: str = ""
    """Labelled images that are classified, where not DATA_PATH/val."""
    ks: Annotated[tuple[int, ...], Ge(1), MinLen(1), Unique, Group("evaluation")] = (10, 20, 100, 200)
    """How many neighbours vote; each is measured, all with one search."""
    temperatures: Annotated[tuple[float, ...], Gt(0), MinLen(1), Unique] = (0.07,)
    """Vote weight exp(cosine similarity / T); each is measured."""
    baselines: bool = False
    """Also measure the same architecture untrained, and raw pixels."""
    few_shot: Annotated[tuple[int, ...], Ge(1), Unique] = ()
    """Also measure with so many labelled images a class, such as 1 2 5 10, drawn at random --draws times."""
    draws: Annotated[int, Ge(1)] = 5
    """How many times --few-shot draws its images; the mean and the deviation over the draws are reported."""
    seed: Seed = 0
    """Seed of what is drawn: the few-shot images, and the queries that recall is measured on."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """What becomes of an image that cannot be read: the run ends and names it, or it is left out and counted."""
    per_class: Annotated[FilePath, IsOutput, Suffix(".csv")] = ""
    """Write a table of the classes to this .csv file: images, top-1, most confused with; at the first of --ks and
    --temperatures."""
    confusion: Annotated[FilePath, IsOutput, Suffix(".png")] = ""
    """Draw which classes are taken for which into this .png file; at the first of --ks and --temperatures."""
    approximate: Literal["no", "ivf", "hnsw", "pq"] = "no"
    """Search approximately: ivf (lists), hnsw (a graph), pq (lists of codes). The recall against exact search is
    measured and reported."""
    probes: Annotated[int, Ge(0)] = 0
    """How much an approximate search looks at: lists (ivf, pq) or candidates (hnsw, never fewer than the largest of
    --ks); 0: chosen by the number of images."""

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
    """Settings of run_linear.py. The defaults are the published protocol's, with a grid of learning rates beside it."""

    train_data: Annotated[str, Group("data")] = ""
    """Labelled images to learn from, where not DATA_PATH/train."""
    val_data: str = ""
    """Labelled images to measure on, where not DATA_PATH/val."""
    epochs: Annotated[int, Ge(0), Group("optimisation")] = 0
    """Passes over the training images; 0: 100 as published, or 8 for images of at most 64 pixels."""
    lr: Annotated[float, Gt(0)] = 0.001
    """The paper's learning rate, for a batch of 256 over all processes; scaled linearly with the batch."""
    lrs: Annotated[tuple[float, ...], Gt(0), Unique] = (
        1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0,
        2.0, 5.0,
    )  # fmt: skip
    """Grid of learning rates (scaled likewise), trained on the same forward pass; the best is chosen on held-out
    training images."""
    features: Annotated[tuple[str, ...], MinLen(1), Unique, Group("evaluation")] = ("cls",)
    """What the grid's classifiers and the logistic regression see, each of these side by side on the same forward pass:
    cls, cls+mean (the mean of the patch tokens beside it), lastN such as last4 (of the last N blocks); see
    docs/linear.md. The paper's classifier sees the class token."""
    holdout: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of the training images that the grid does not learn from and is chosen on; 0: no grid."""
    sgd: bool = True
    """Train the paper's classifier and the grid. --no-sgd: the logistic regression alone."""
    cached: bool = False
    """Keep the features of a few augmented epochs, and train on those as often as --epochs says: minutes, not hours."""
    cached_epochs: Annotated[int, Ge(1)] = 4
    """How many augmented epochs --cached keeps."""
    cached_precision: Literal["float16", "float32"] = "float16"
    """How --cached keeps them: 2 or 4 bytes a feature."""
    logreg: bool = False
    """Also fit a logistic regression by L-BFGS on unaugmented features."""
    logreg_cs: Annotated[tuple[float, ...], Gt(0), MinLen(1), Unique] = tuple(
        float(f"{10 ** (step / 4 - 6):.3g}") for step in range(45)
    )
    """Inverse strengths of its L2 penalty (scikit-learn's C), of which held-out training images choose one. Default:
    DINOv2's 45 from 1e-6 to 1e5, four a decade."""
    logreg_iterations: Annotated[int, Ge(1)] = 1000
    """Iterations of L-BFGS at most, for each C."""
    also: tuple[str, ...] = ()
    """Variants of ImageNet's validation images to measure the recommended classifier on: imagenet-v2:DIR,
    imagenet-a:DIR, imagenet-r:DIR, sketch:DIR, real:FILE.json."""
    crop_scale: Annotated[tuple[float, float], Group("crops")] = (0.0, 0.0)
    """Share of a training image's area that a crop covers: least, most; 0 0: 0.08 1 as published, or 1 1 for images
    of at most 64 pixels."""
    seed: Annotated[Seed, Group("machine")] = 0
    """Seed of the classifiers, the crops, the order of the images and the held-out part."""
    output_dir: Annotated[FilePath, Group("checkpoints")] = ""
    """Where linear.pth goes. Default: linear/ beside the weights."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume if output_dir holds this probe, refuse if it holds another; never: start anew and overwrite."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        from eval.linear.imagenet_variants import split
        from eval.linear.pooled import blocks_of

        super().check()
        for name in self.features:
            blocks_of(name)
        variants = [split(word)[0] for word in self.also]
        if len(set(variants)) < len(variants):
            raise InputError(f"also is {' '.join(variants)}, expected each once")
        if not self.sgd:
            refuse_changed(self, ("epochs", "lr", "lrs", "crop_scale", "cached"), "with --no-sgd")
        if not self.cached:
            refuse_changed(self, ("cached_epochs", "cached_precision"), "without --cached")
        if not self.logreg:
            refuse_changed(self, ("logreg_cs", "logreg_iterations"), "without --logreg")
            if not self.sgd:
                raise InputError("sgd is off, and so is logreg: add --logreg, or leave --no-sgd out")
            if not (self.holdout and self.lrs):
                refuse_changed(self, ("features",), "without a --holdout and --lrs for the grid, or --logreg")
        if self.cached and not self.cache:
            raise InputError("cached needs a folder for its features: leave --no-cache out, or --cached")
        if self.logreg and not self.holdout and len(self.logreg_cs) * len(self.features) > 1:
            raise InputError(
                "holdout is 0, but the logistic regression's C and features are chosen on held-out images: raise it, "
                "or give one of --logreg-cs and one of --features"
            )
        least, most = self.crop_scale
        if not (0 < least <= most <= 1 or least == most == 0):
            raise InputError(f"crop_scale is {least} {most}, expected 0 < least <= most <= 1, such as 0.08 1")


@dataclass(frozen=True)
class CompareConfig:
    """Settings of python -m eval.compare."""

    files: Annotated[tuple[str, ...], MinLen(2), IsPath, Positional, Repeatable] = ()
    """Result files (--json of run_knn.py, run_linear.py, run_retrieval.py) and published:NAME; the others are held
    against the first. --files may be left out before them."""
    allow: tuple[str, ...] = ()
    """Differences to let pass, by the names that a refusal gives them: transform, train, val, k, T, classifier ..."""
    figure: tuple[str, ...] = ()
    """Compare only the figures with these words in their names, such as k=20, or "grid last"; or one for each file,
    such as grid logreg."""
    table: Literal["text", "markdown"] = "text"
    """How the table is printed: for the screen, or for GitHub."""
    json: FilePath = ""
    """Write the comparison to this file."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        if len(self.figure) not in (0, 1, len(self.files)):
            raise InputError(
                f"figure has {len(self.figure)} values, expected one for all files or one for each of the "
                f"{len(self.files)}: quote words that belong together, such as --figure 'grid last'"
            )
