"""Every setting of the runners that evaluate, with its default: the only place that has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dino_xcit.errors import InputError
from dino_xcit.weights.fit import Allowed
from eval.command_line import settings as settings
from eval.pooled import blocks_of
from eval.pooling import Descriptor, Pooling

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


@dataclass(frozen=True)
class BackboneConfig:
    """Which backbone is measured, and on what machine: the settings that all three runners share."""

    weights: str = ""
    """What to measure: a checkpoint of this project, DINO, XCiT, VISSL, lightly or solo-learn, a .safetensors file,
    hf-hub:ORG/NAME, or timm:NAME with timm's pretrained tag or without; docs/checkpoints.md."""
    network: Literal["teacher", "student"] = "teacher"
    """Which network of a checkpoint that holds both."""
    arch: str = ""
    """Architecture, where the file neither says nor shows it."""
    allow_missing: tuple[str, ...] = ()
    """Keys of the backbone that the file may lack, by name or by their beginning and *: they keep untrained values."""
    allow_unexpected: tuple[str, ...] = ()
    """Keys of the file that the backbone may lack, likewise: they are left aside."""
    data_path: str = ""
    """Images: a folder, a .txt list, tar:PATTERN, parquet:PATTERN, imagenet:DIR, sample:fashion-mnist,
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
        _at_least("batch_size_per_gpu", self.batch_size_per_gpu, 1)
        _at_least("num_workers", self.num_workers, -1)
        _at_least("eval_resize", self.eval_resize, 0)
        _at_least("eval_crop", self.eval_crop, 0)


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
    per_class: str = ""
    """Write a table of the classes to this .csv file: images, top-1, most confused with; at the first of --ks and
    --temperatures."""
    confusion: str = ""
    """Draw which classes are taken for which into this .png file; at the first of --ks and --temperatures."""
    approximate: Literal["no", "ivf", "hnsw", "pq"] = "no"
    """Search approximately: ivf (lists), hnsw (a graph), pq (lists of codes). The recall against exact search is
    measured and reported."""
    probes: int = 0
    """How much an approximate search looks at: lists (ivf, pq) or candidates (hnsw); 0: by the number of images."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        if not self.ks or min(self.ks) < 1:
            raise InputError(f"ks is {_words(self.ks)}, expected whole numbers of at least 1, such as 10 20 100 200")
        if not self.temperatures or not min(self.temperatures) > 0:
            raise InputError(f"temperatures is {_words(self.temperatures)}, expected numbers above 0, such as 0.07")
        if self.few_shot and min(self.few_shot) < 1:
            raise InputError(f"few_shot is {_words(self.few_shot)}, expected images a class, such as 1 2 5 10")
        _at_least("draws", self.draws, 1)
        _at_least("seed", self.seed, 0)
        _at_least("probes", self.probes, 0)
        for name, given, other in (
            ("draws", self.few_shot, "--few-shot 1 2 5 10"),
            ("probes", self.approximate != "no", "--approximate ivf"),
        ):
            if not given and _changed(self, (name,)):
                raise InputError(
                    f"{name} is {getattr(self, name)}, which decides nothing without {other.split()[0]}: add {other}, "
                    f"or leave --{name} out"
                )
        for name, path, ending in (("per_class", self.per_class, ".csv"), ("confusion", self.confusion, ".png")):
            if path and not path.lower().endswith(ending):
                raise InputError(f"{name} is {path}, expected a file that ends in {ending}")


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
    """auto: carry on if output_dir holds this probe, refuse if it holds another; never: start anew and overwrite."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        _at_least("epochs", self.epochs, 0)
        _at_least("seed", self.seed, 0)
        for name, rates in (("lr", (self.lr,)), ("lrs", self.lrs)):
            if any(not 0 < rate < float("inf") for rate in rates):
                raise InputError(f"{name} is {_words(rates)}, expected numbers above 0, such as 0.001")
        if not 0 <= self.holdout < 1:
            raise InputError(f"holdout is {self.holdout}, expected a share of 0 or more and below 1, such as 0.1")
        self._check_choices()
        least, most = self.crop_scale
        if not (0 < least <= most <= 1 or least == most == 0):
            raise InputError(f"crop_scale is {least} {most}, expected 0 < least <= most <= 1, such as 0.08 1")

    def _check_choices(self) -> None:
        for name in self.features:
            blocks_of(name)
        for name, words in (("features", self.features), ("also", tuple(word.split(":")[0] for word in self.also))):
            if len(set(words)) < len(words):
                raise InputError(f"{name} is {' '.join(words)}, expected each once")
        _at_least("cached_epochs", self.cached_epochs, 1)
        _at_least("logreg_iterations", self.logreg_iterations, 1)
        if not self.logreg_cs or any(not 0 < c < float("inf") for c in self.logreg_cs):
            raise InputError(f"logreg_cs is {_words(self.logreg_cs)}, expected numbers above 0, such as 0.1 1 10")
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
        if self.logreg and not self.holdout and len(self.logreg_cs) * len(self.features) > 1:
            raise InputError(
                "holdout is 0, but the logistic regression's C and features are chosen on held-out images: raise it, "
                "or give one of --logreg-cs and one of --features"
            )


@dataclass(frozen=True)
class ExtractConfig(BackboneConfig):
    """Settings of run_extract.py: write vectors (--output-dir), look images up in some written before (--query), or
    learn a whitening from some (--learn-whitening)."""

    output_dir: str = ""
    """Folder for vectors.npy, paths.txt, index.faiss and card.json."""
    normalise: bool = True
    """Scale each vector to length 1, so that inner products are cosine similarities."""
    pooling: Pooling = "cls"
    """What an image's vector is: the class token, the mean or generalised mean (gem) of the patch tokens, or class
    token and mean one behind the other."""
    gem_p: float = 3.0
    """Exponent of the generalised mean: 1 is the mean, the greater the nearer to the maximum."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes at which an image is looked at, as factors on its sides, such as 1 0.7071 1.4142; the vectors of length 1
    are averaged."""
    whiten: str = ""
    """Whitening to apply: a file that --learn-whitening wrote."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Numbers in which vectors are kept; fp16 halves the folder."""
    index_type: Literal["flat", "hnsw", "ivfpq"] = "flat"
    """flat: exact search. hnsw (a graph) and ivfpq (codes, half a byte for two numbers) look at a part of the vectors;
    their recall is measured and written into the card."""
    shard_images: int = 2048
    """About how many images make a part of the work: a kill costs at most the parts under way."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """What becomes of an image that cannot be read: the run ends and names it, or it is left out and listed."""
    overwrite: bool = False
    """Replace another extraction in output_dir."""
    add: bool = False
    """Add the images of data_path to the extraction in output_dir, which has to have the same weights and settings."""
    learn_whitening: str = ""
    """File to write: PCA whitening of the vectors in INDEX."""
    whiten_dim: int = 0
    """Dimensions that learned whitening keeps; 0: all that the vectors have."""
    query: tuple[str, ...] = ()
    """Image files to look up."""
    index: str = ""
    """Folder that an earlier run wrote, to look them up in. Default: OUTPUT_DIR."""
    top: int = 10
    """How many of the nearest images to show."""
    sheet: str = ""
    """Picture of the query and the images found. Default: contact_sheet.png in the index folder."""

    def descriptor(self) -> Descriptor:
        """How an image's vector is made."""
        return Descriptor(self.pooling, self.gem_p, self.scales)

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        self.descriptor().check()
        _at_least("top", self.top, 1)
        _at_least("shard_images", self.shard_images, 1)
        _at_least("whiten_dim", self.whiten_dim, 0)
        if self.whiten_dim and not self.learn_whitening:
            raise InputError(
                f"whiten_dim is {self.whiten_dim}, but nothing is learned: give it with --learn-whitening FILE"
            )
        if len(self.scales) > 1 and not self.normalise:
            raise InputError(
                f"scales is {_words(self.scales)}, whose vectors are averaged at length 1: leave out --no-normalise, "
                "or give one scale"
            )
        if self.query and not self.learn_whitening:
            for name in _changed(self, _OF_THE_CARD):
                raise InputError(
                    f"{name} is {_shown(getattr(self, name))}, which decides nothing for --query: the collection is as "
                    "its card says; leave it out"
                )
        if self.add and self.overwrite:
            raise InputError("both --add and --overwrite are given: one keeps what is there, the other replaces it")


_OF_THE_CARD = (
    "pooling", "gem_p", "scales", "whiten", "normalise", "dtype", "index_type", "eval_crop", "eval_resize", "add",
    "overwrite",
)  # fmt: skip
"""run_extract.py's settings that mean nothing for --query: the collection's card says how vectors are made."""


_OF_PROTOCOLS = {
    **dict.fromkeys(("ground_truth", "queries"), ("oxford", "paris")),
    **dict.fromkeys(("distractors",), ("copydays",)),
    **dict.fromkeys(("ks", "index"), ("folder",)),
    **dict.fromkeys(("data_path",), ("oxford", "paris", "copydays", "folder")),
    **dict.fromkeys(("first", "second", "threshold", "most_pairs", "csv", "sheet"), ("duplicates",)),
}
"""run_retrieval.py's settings that mean nothing for other protocols: given there, they are a mistake."""
_OF_IMAGES = ("weights", "pooling", "gem_p", "scales", "whiten", "fit", "image_size", "eval_crop", "eval_resize")
"""run_retrieval.py's settings that mean nothing where collections are measured."""


@dataclass(frozen=True)
class RetrievalConfig(BackboneConfig):
    """Settings of run_retrieval.py. DATA_PATH is the folder of the benchmark (oxford, paris, copydays: as published)
    or the labelled images (folder)."""

    protocol: Literal["", "oxford", "paris", "copydays", "folder", "duplicates"] = ""
    """What to measure; the first word of the command line does as well. oxford, paris: Revisited Oxford and Paris.
    copydays: copies find their original. folder: leave-one-out among labelled images. duplicates: what two sets
    share."""
    fit: Literal["auto", "centre", "whole", "square"] = "auto"
    """How an image is fitted. centre: as the checkpoint says. whole: in its proportions, the longer side reduced to
    image_size. square: squeezed to image_size. auto: whole for oxford and paris, square for copydays, else centre."""
    image_size: int = 0
    """Pixels for whole and square (--imsize is the same); 0: 224 for whole, 320 for square, as in DINO's scripts."""
    pooling: Pooling = "cls"
    """What an image's vector is: the class token, the mean or generalised mean (gem) of the patch tokens, or class
    token and mean one behind the other."""
    gem_p: float = 3.0
    """Exponent of the generalised mean."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes at which an image is looked at, as factors on its sides, such as 1 0.7071 0.5."""
    whiten: str = ""
    """Whitening to apply: a file that run_extract.py --learn-whitening wrote."""
    ground_truth: str = ""
    """For oxford and paris: the file that says what is right, where not DATA_PATH/gnd_roxford5k.pkl and the like."""
    queries: Literal["box", "whole"] = "box"
    """For oxford and paris: queries cut to their box, as the benchmark says, or whole, as DINO's script has them."""
    distractors: str = ""
    """For copydays: more images that belong to nothing, whatever --data-path takes."""
    ks: tuple[int, ...] = (1, 2, 4, 8)
    """For folder: recall at each of these."""
    index: str = ""
    """For folder: measure the vectors of this collection, which run_extract.py wrote, instead of extracting."""
    first: str = ""
    """For duplicates: one set, such as the training images; or a collection that run_extract.py wrote."""
    second: str = ""
    """For duplicates: the other set, such as the test images. Without it: pairs within FIRST."""
    threshold: float = 0.95
    """For duplicates: cosine similarity from which two images count as a pair."""
    most_pairs: int = 1_000_000
    """For duplicates: more pairs than this end the run."""
    csv: str = ""
    """For duplicates: write the pairs to this file."""
    sheet: str = ""
    """For duplicates: draw the most similar pairs into this PNG."""

    def descriptor(self) -> Descriptor:
        """How an image's vector is made."""
        return Descriptor(self.pooling, self.gem_p, self.scales)

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        if not self.protocol:
            raise InputError(
                "no protocol given: expected oxford, paris, copydays, folder or duplicates, such as python "
                "run_retrieval.py oxford --weights FILE --data-path DIR"
            )
        for name, protocols in _OF_PROTOCOLS.items():
            if self.protocol not in protocols and getattr(self, name) != getattr(RetrievalConfig, name):
                whose = " and ".join(protocols)
                raise InputError(f"{name} is a setting of {whose}, not of {self.protocol}: leave it out")
        if self.index and self.data_path:
            raise InputError("both index and data_path are given: --index measures a collection, --data-path images")
        if self.index:
            self.check_for_collections()
        _at_least("image_size", self.image_size, 0)
        _at_least("most_pairs", self.most_pairs, 1)
        self.descriptor().check()
        if not self.ks or min(self.ks) < 1:
            raise InputError(f"ks is {_words(self.ks)}, expected whole numbers of at least 1, such as 1 2 4 8")
        if not -1 <= self.threshold <= 1:
            raise InputError(f"threshold is {self.threshold:g}, expected a cosine from -1 to 1, such as 0.95")

    def check_for_collections(self) -> None:
        """Refuse what decides how vectors are made, where finished ones are measured.

        Raises:
            InputError: naming the field and the value.
        """
        for name in _changed(self, _OF_IMAGES):
            raise InputError(
                f"{name} is {_shown(getattr(self, name))}, which decides nothing for a finished collection: its "
                "vectors are as its card says; leave it out"
            )


@dataclass(frozen=True)
class CompareConfig:
    """Settings of python -m eval.compare."""

    files: tuple[str, ...] = ()
    """Result files (--json of run_knn.py, run_linear.py) and published:NAME; the others are held against the first.
    --files may be left out before them."""
    allow: tuple[str, ...] = ()
    """Differences to let pass, by the names that a refusal gives them: transform, train, val, order, k, T ..."""
    figure: str = ""
    """Compare only the figures with these words in their names, such as k=20, or "grid last"."""
    json: str = ""
    """Write the comparison to this file."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        if len(self.files) < 2:
            raise InputError(
                f"{len(self.files) or 'no'} result file{'s' * (not self.files)} given, expected two or more: "
                "python -m eval.compare a.json b.json"
            )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name} is {value}, expected at least {least}")


def _changed(config: BackboneConfig, names: Sequence[str]) -> list[str]:
    """Those of the settings that are not as they are by default."""
    return [name for name in names if getattr(config, name) != getattr(type(config), name)]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _words(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values) or "empty"
