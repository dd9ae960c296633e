"""Figures that others published, to hold results against: without intervals, as nobody has their hits."""

from __future__ import annotations

from dataclasses import dataclass

from dino_xcit.errors import InputError, near_matches
from dino_xcit.transform import EvalTransform
from eval.compare.result_file import Result
from eval.config import PAPER_CROP_SCALE, PAPER_EPOCHS
from eval.figures import Figure, Setting
from eval.protocol import KNN_PROTOCOL, transform_card

PREFIX = "published:"

IMAGENET_CLASSES, IMAGENET_TRAIN, IMAGENET_VAL = 1000, 1_281_167, 50_000

K, TEMPERATURE = 20, 0.07
"""The published k-NN figures do not name their k; the DINO paper's evaluation protocol settles on 20."""


@dataclass(frozen=True)
class Published:
    """Top-1 on ImageNet-1k's validation images, percent."""

    knn: float
    linear: float
    source: str
    features: str = ""
    """What the linear figure is of, where that is not the class token after the last block."""


_DINO = "facebookresearch/dino, README, table of pretrained models"

PUBLISHED = {
    "xcit_small_12_p16": Published(76.0, 77.8, f"{_DINO} (300 epochs)"),
    "xcit_small_12_p8": Published(77.1, 79.2, f"{_DINO} (300 epochs)"),
    "xcit_medium_24_p16": Published(76.4, 78.8, f"{_DINO} (300 epochs)"),
    "xcit_medium_24_p8": Published(77.9, 80.3, f"{_DINO} (300 epochs)"),
    # DINO's eval_linear.py joins the class tokens of a ViT-S's last 4 blocks (--n_last_blocks 4).
    "vit_small_p16_100ep": Published(
        69.3, 74.0, "facebookresearch/dino, README, ViT-S/16 of 100 epochs on 8 GPUs", "last4"
    ),
}


def published_result(word: str, measure: str) -> Result:
    """``published:NAME`` as if it had been measured, with what is known of how.

    Args:
        measure: ``knn`` or ``linear``: which of its figures.

    Raises:
        InputError: there is no such figure.
    """
    name = word.removeprefix(PREFIX)
    if name not in PUBLISHED:
        raise InputError(
            f"nothing was published as {name!r}{near_matches(name, PUBLISHED)}; expected {PREFIX}NAME with one of "
            f"{', '.join(PUBLISHED)}"
        )
    found = PUBLISHED[name]
    if measure == "knn":
        settings: dict[str, Setting] = {"model": "trained", "k": K, "T": TEMPERATURE}
        figure = Figure(f"trained k={K} T={TEMPERATURE:g} top-1", settings, found.knn, None)
        protocol: dict[str, object] = {"name": KNN_PROTOCOL}
    elif measure == "linear":
        # Published linear figures are those of the best epoch on the validation images.
        settings = {"classifier": "paper", "epoch": "best"}
        if found.features:  # run_linear.py's "paper" is of the class token alone: no figure of its has this setting
            settings["features"] = found.features
        figure = Figure("paper, best epoch, top-1", settings, found.linear, None)
        protocol = {"epochs": PAPER_EPOCHS, "lr": 0.001, "crop_scale": list(PAPER_CROP_SCALE), "cached": None}
    else:
        raise InputError(f"{word} has k-NN and linear figures, no {measure}")
    data = {
        part: {"images": images, "classes": IMAGENET_CLASSES}
        for part, images in (("train", IMAGENET_TRAIN), ("val", IMAGENET_VAL))
    }
    transform = transform_card(EvalTransform())
    return Result(word, measure, protocol, transform, "", data, (figure,), {}, found.source)
