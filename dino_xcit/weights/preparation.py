"""How images are prepared for a file's weights, and who says so."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dino_xcit.errors import InputError, one_line, printable
from dino_xcit.models.vit import vit_shape
from dino_xcit.transform import EvalTransform
from dino_xcit.weights.files import EXCEPTION, WeightsFile
from dino_xcit.weights.transformers_config import TransformersFolder

_LONGEST_CLAUSE = 200


@dataclass(frozen=True)
class Preparation:
    """A transform, and either who says that it is the one or, where nobody does, why it was taken."""

    transform: EvalTransform
    said_by: str = ""
    exception: str = ""
    """A clause that belongs after ``said_by``, on what of their word the transform cannot express."""
    guess: str = ""


def preparation(file: WeightsFile, arch: str, where: str, settings: TransformersFolder | None) -> Preparation:
    """What the file says; else what lies beside it; else a guess by the architecture.

    Args:
        where: the file, for messages.
        settings: of the folder that the file lies in, if it is one of transformers' and the weights are too.

    Raises:
        InputError: what is said cannot be read.
    """
    if "eval_transform" in file.content:
        try:
            transform = EvalTransform.from_dict(file.content["eval_transform"])
        except InputError as error:
            raise InputError(f"{where}: {one_line(error)}") from error
        return Preparation(transform, "the checkpoint's", _clause(file.content.get(EXCEPTION)))
    if file.transform:
        return Preparation(file.transform, file.transform_from, file.transform_exception)
    if settings is not None:
        found, exception = settings.transform()
        if found is not None:
            return Preparation(found, f"preprocessor_config.json's of {where}", exception)
    return _guess(arch)


def _clause(stored: object) -> str:
    """The words of an export's metadata, of which nothing is believed but that they are some."""
    return printable(stored[:_LONGEST_CLAUSE]) if isinstance(stored, str) else ""


def _guess(arch: str) -> Preparation:
    shape = vit_shape(arch)
    if shape is not None and shape.layer_scale and shape.patch == 14:
        # Its last weeks of training are at 518 pixels, its evaluations are not (arXiv 2304.07193, and
        # facebookresearch/dinov2, dinov2/eval: resize 256, centre crop 224).
        return Preparation(EvalTransform(), guess="ImageNet's way, as in DINOv2's evaluations")
    if shape is not None and shape.side != 224:
        transform = dataclasses.replace(EvalTransform(), resize=round(shape.side * 8 / 7), crop=shape.side)
        return Preparation(transform, guess=f"ImageNet's way for {shape.side} pixels, as its positions")
    return Preparation(EvalTransform(), guess="ImageNet's way")
