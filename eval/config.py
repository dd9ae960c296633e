"""Every setting of the runners that measure, with its default: the only place that has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dino_xcit.errors import InputError
from dino_xcit.weights.load import Allowed
from eval.command_line import settings as settings
from eval.linear.imagenet_variants import split
from eval.linear.pooled import blocks_of

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
LARGEST_SEED = 2**63 - 1
"""What all generators of random numbers take."""


@dataclass(frozen=True)
class BackboneConfig:
    """Which backbone is measured, and on what machine: the settings that all three runners share."""

    weights: str = ""
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
    data_path: str = ""
    """Images: a folder, a .txt list, tar:PATTERN, parquet:PATTERN, hf:NAME_OR_DIR, imagenet:DIR, sample:fashion-mnist,
    torchvision:NAME; see docs/data.md. Default: what the checkpoint was trained on."""
    eval_resize: int = 0
    """Shorter side that images are resized to; 0: as the checkpoint says, else 8/7 of the crop."""
    eval_crop: int = 0
    """Centre crop; 0: as the checkpoint says, else 224."""
    batch_size_per_gpu: int = 128
    """Images in one forward pass of one process (--batch-size is the same)."""
    num_workers: int = -1
    """Loader processes a rank; -1: chosen from the cores at hand."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: a GPU if there is one."""
    cache: bool = True
    """Keep extracted features, and use those that were kept. --no-cache: neither."""
    cache_dir: str = ""
    """Where features are kept. Default: features/ beside the weights."""
    json: str = ""
    """Write the figures, and how they were measured, to this file."""

    def check(self) -> None:
        """Check every value. Not in ``__post_init__``: tyro would draw a box around the sentence.

        Raises:
            InputError: naming the field, the value, and what would do.
        """
        Allowed(self.allow_missing, self.allow_unexpected).check()
        at_least("batch_size_per_gpu", self.batch_size_per_gpu, 1)
        at_least("num_workers", self.num_workers, -1)
        at_least("eval_resize", self.eval_resize, 0)
        at_least("eval_crop", self.eval_crop, 0)

    def written(self) -> dict[str, str]:
        """The files that are written at the end, by the names of their settings; those not asked for are empty."""
        return {"json": self.json}


@dataclass(frozen=True)
class KnnConfig(BackboneConfig):
    """Settings of run_knn.py."""

    train_data: str = ""
    """Labelled images that vote, where not DATA_PATH/train."""
    val_data: str = ""
    """Labelled images that are classified, where not DATA_PATH/val."""
    ks: tuple[int, ...] = (10, 20, 100, 200)
    """How many neighbours vote; each is measured, all with one search."""
    temperatures: tuple[float, ...] = (0.07,)
    """Vote weight exp(cosine similarity / T); each is measured."""
    baselines: bool = False
    """Also measure the same architecture untrained, and raw pixels."""
    few_shot: tuple[int, ...] = ()
    """Also measure with so many labelled images a class, such as 1 2 5 10, drawn at random --draws times."""
    draws: int = 5
    """How many times --few-shot draws its images; the mean and the deviation over the draws are reported."""
    seed: int = 0
    """Seed of what is drawn: the few-shot images, and the queries that recall is measured on."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """What becomes of an image that cannot be read: the run ends and names it, or it is left out and counted."""
    per_class: str = ""
    """Write a table of the classes to this .csv file: images, top-1, most confused with; at the first of --ks and
    --temperatures."""
    confusion: str = ""
    """Draw which classes are taken for which into this .png file; at the first of --ks and --temperatures."""
    approximate: Literal["no", "ivf", "hnsw", "pq"] = "no"
    """Search approximately: ivf (lists), hnsw (a graph), pq (lists of codes). The recall against exact search is
    measured and reported."""
    probes: int = 0
    """How much an approximate search looks at: lists (ivf, pq) or candidates (hnsw, never fewer than the largest of
    --ks); 0: chosen by the number of images."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        if not self.ks or min(self.ks) < 1:
            raise InputError(f"ks is {shown(self.ks)}, expected whole numbers of at least 1, such as 10 20 100 200")
        if not self.temperatures or any(not 0 < one < float("inf") for one in self.temperatures):
            raise InputError(f"temperatures is {shown(self.temperatures)}, expected numbers above 0, such as 0.07")
        if self.few_shot and min(self.few_shot) < 1:
            raise InputError(f"few_shot is {shown(self.few_shot)}, expected images a class, such as 1 2 5 10")
        for name in ("ks", "temperatures", "few_shot"):
            values = shown(getattr(self, name))
            if len(set(values.split())) < len(getattr(self, name)):  # as shown: figures are known by their names
                raise InputError(f"{name} is {values}, expected each once")
        at_least("draws", self.draws, 1)
        check_seed(self.seed)
        at_least("probes", self.probes, 0)
        few_shot, approximate = bool(self.few_shot), self.approximate != "no"
        for name, given, without, add in (
            ("draws", few_shot, "--few-shot", "--few-shot 1 2 5 10"),
            ("probes", approximate, "--approximate", "--approximate ivf"),
            ("seed", few_shot or approximate, "--few-shot or --approximate", "one of them"),
        ):
            if not given and changed(self, (name,)):
                raise InputError(
                    f"{name} is {getattr(self, name)}, which decides nothing without {without}: add {add}, or leave "
                    f"--{name} out"
                )
        for name, path, ending in (("per_class", self.per_class, ".csv"), ("confusion", self.confusion, ".png")):
            if path and not path.lower().endswith(ending):
                raise InputError(f"{name} is {path}, expected a file that ends in {ending}")

    def written(self) -> dict[str, str]:
        """See :meth:`BackboneConfig.written`."""
        return super().written() | {"per_class": self.per_class, "confusion": self.confusion}


@dataclass(frozen=True)
class LinearConfig(BackboneConfig):
    """Settings of run_linear.py. The defaults are the published protocol's, with a grid of learning rates beside it."""

    train_data: str = ""
    """Labelled images to learn from, where not DATA_PATH/train."""
    val_data: str = ""
    """Labelled images to measure on, where not DATA_PATH/val."""
    epochs: int = 0
    """Passes over the training images; 0: 100 as published, or 8 for images of at most 64 pixels."""
    lr: float = 0.001
    """The paper's learning rate, for a batch of 256 over all processes; scaled linearly with the batch."""
    lrs: tuple[float, ...] = (
        1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0,
        2.0, 5.0,
    )  # fmt: skip
    """Grid of learning rates (scaled likewise), trained on the same forward pass; the best is chosen on held-out
    training images."""
    features: tuple[str, ...] = ("cls",)
    """What the grid's classifiers and the logistic regression see, each of these side by side on the same forward pass:
    cls, cls+mean (the mean of the patch tokens beside it), lastN such as last4 (of the last N blocks); see
    docs/linear.md. The paper's classifier sees the class token."""
    holdout: float = 0.1
    """Share of the training images that the grid does not learn from and is chosen on; 0: no grid."""
    sgd: bool = True
    """Train the paper's classifier and the grid. --no-sgd: the logistic regression alone."""
    cached: bool = False
    """Keep the features of a few augmented epochs, and train on those as often as --epochs says: minutes, not hours."""
    cached_epochs: int = 4
    """How many augmented epochs --cached keeps."""
    cached_precision: Literal["float16", "float32"] = "float16"
    """How --cached keeps them: 2 or 4 bytes a feature."""
    logreg: bool = False
    """Also fit a logistic regression by L-BFGS on unaugmented features."""
    logreg_cs: tuple[float, ...] = tuple(float(f"{10 ** (step / 4 - 6):.3g}") for step in range(45))
    """Inverse strengths of its L2 penalty (scikit-learn's C), of which held-out training images choose one. Default:
    DINOv2's 45 from 1e-6 to 1e5, four a decade."""
    logreg_iterations: int = 1000
    """Iterations of L-BFGS at most, for each C."""
    also: tuple[str, ...] = ()
    """Variants of ImageNet's validation images to measure the recommended classifier on: imagenet-v2:DIR,
    imagenet-a:DIR, imagenet-r:DIR, sketch:DIR, real:FILE.json."""
    crop_scale: tuple[float, float] = (0.0, 0.0)
    """Share of a training image's area that a crop covers: least, most; 0 0: 0.08 1 as published, or 1 1 for images
    of at most 64 pixels."""
    seed: int = 0
    """Seed of the classifiers, the crops, the order of the images and the held-out part."""
    output_dir: str = ""
    """Where linear.pth goes. Default: linear/ beside the weights."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume if output_dir holds this probe, refuse if it holds another; never: start anew and overwrite."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        at_least("epochs", self.epochs, 0)
        check_seed(self.seed)
        for name, rates in (("lr", (self.lr,)), ("lrs", self.lrs)):
            if any(not 0 < rate < float("inf") for rate in rates):
                raise InputError(f"{name} is {shown(rates)}, expected numbers above 0, such as 0.001")
        if not 0 <= self.holdout < 1:
            raise InputError(f"holdout is {self.holdout}, expected a share of 0 or more and below 1, such as 0.1")
        self._check_choices()
        self._refuse_what_decides_nothing()
        least, most = self.crop_scale
        if not (0 < least <= most <= 1 or least == most == 0):
            raise InputError(f"crop_scale is {least} {most}, expected 0 < least <= most <= 1, such as 0.08 1")

    def _check_choices(self) -> None:
        for name in self.features:
            blocks_of(name)
        variants = tuple(split(word)[0] for word in self.also)
        for name, words in (("features", self.features), ("also", variants), ("lrs", self.lrs),
                            ("logreg_cs", self.logreg_cs)):  # fmt: skip
            if len(set(words)) < len(words):
                raise InputError(f"{name} is {shown(words)}, expected each once")
        at_least("cached_epochs", self.cached_epochs, 1)
        at_least("logreg_iterations", self.logreg_iterations, 1)
        if not self.logreg_cs or any(not 0 < c < float("inf") for c in self.logreg_cs):
            raise InputError(f"logreg_cs is {shown(self.logreg_cs)}, expected numbers above 0, such as 0.1 1 10")
        grid = self.sgd and self.holdout > 0 and len(self.lrs) > 0
        if not self.features or (self.features != ("cls",) and not grid and not self.logreg):
            raise InputError(
                f"features is {' '.join(self.features) or 'empty'}, but nothing would see them: give cls, a --holdout "
                "and --lrs for the grid, or --logreg"
            )
        if not self.sgd and not self.logreg:
            raise InputError(
                "sgd is off, and so is logreg: there is nothing to do; add --logreg, or leave --no-sgd out"
            )
        if self.cached and not self.cache:
            raise InputError(
                "cached needs a folder to keep features in: give --cache-dir DIR, and no --no-cache; or leave --cached "
                "out"
            )
        if self.logreg and not self.holdout and len(self.logreg_cs) * len(self.features) > 1:
            raise InputError(
                "holdout is 0, but the logistic regression's C and features are chosen on held-out images: raise it, "
                "or give one of --logreg-cs and one of --features"
            )

    def _refuse_what_decides_nothing(self) -> None:
        for names, meant, without in (
            (("epochs", "lr", "lrs", "crop_scale", "cached"), self.sgd, "with --no-sgd: leave one of the two out"),
            (("cached_epochs", "cached_precision"), self.cached, "without --cached: add it, or leave this out"),
            (("logreg_cs", "logreg_iterations"), self.logreg, "without --logreg: add it, or leave this out"),
        ):
            for name in () if meant else changed(self, names):
                raise InputError(f"{name} is {shown(getattr(self, name))}, which decides nothing {without}")


@dataclass(frozen=True)
class CompareConfig:
    """Settings of python -m eval.compare."""

    files: tuple[str, ...] = ()
    """Result files (--json of run_knn.py, run_linear.py, run_retrieval.py) and published:NAME; the others are held
    against the first. --files may be left out before them."""
    allow: tuple[str, ...] = ()
    """Differences to let pass, by the names that a refusal gives them: transform, train, val, names, order, k, T,
    classifier ..."""
    figure: tuple[str, ...] = ()
    """Compare only the figures with these words in their names, such as k=20, or "grid last"; or one for each file,
    such as grid logreg."""
    table: Literal["text", "markdown", "latex"] = "text"
    """How the table is printed: for the screen, for GitHub, or as a LaTeX tabular (package booktabs)."""
    json: str = ""
    """Write the comparison to this file."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        if len(self.files) < 2:
            raise InputError(
                f"{len(self.files) or 'no'} result file{'s' * (not self.files)} given, expected two or more: "
                "python -m eval.compare a.json b.json"
            )
        if len(self.figure) not in (0, 1, len(self.files)):
            raise InputError(
                f"figure has {len(self.figure)} values, expected one for all files or one for each of the "
                f"{len(self.files)}: quote words that belong together, such as --figure 'grid last'"
            )


def at_least(name: str, value: int, least: int) -> None:
    """Refuse a setting below ``least``."""
    if value < least:
        raise InputError(f"{name} is {value}, expected at least {least}")


def check_seed(seed: int) -> None:
    """Refuse a seed that some generator of random numbers would not take."""
    at_least("seed", seed, 0)
    if seed > LARGEST_SEED:
        raise InputError(f"seed is {seed}, expected at most {LARGEST_SEED}")


def changed(config: BackboneConfig, names: Sequence[str]) -> list[str]:
    """Those of the settings that are not as they are by default."""
    return [name for name in names if getattr(config, name) != getattr(type(config), name)]


def shown(value: object) -> str:
    """A setting's value as it is typed."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in value) or "empty"
    return str(value)
