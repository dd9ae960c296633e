"""Every setting of python -m eval.attention and python -m eval.pca, with its default: the only place that has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Lt, MinLen

from dino_xcit.bounds import FilePath, IsPath, Positional, Repeatable, Suffix, refuse_changed
from dino_xcit.errors import InputError
from eval.config import BackboneConfig


@dataclass(frozen=True)
class LookConfig(BackboneConfig):
    """Which photographs are looked at, and the picture that comes of it: what attention and PCA share."""

    images: Annotated[tuple[str, ...], MinLen(1), IsPath, Positional, Repeatable] = ()
    """Image files; --images may be left out before them."""
    size: int = 480
    """Pixels that an image's shorter side is resized to; 0: as it is. Finer than in training is fine."""
    out: Annotated[FilePath, Suffix(".png")] = ""
    """The picture, a .png file. Default: attention.png or pca.png in this folder."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        refuse_changed(self, ("data_path", "eval_resize", "eval_crop", "cache_dir", "json"), "on a picture")
        if self.size and not 16 <= self.size <= 8192:
            raise InputError(f"size is {self.size}, expected 16 to 8192 pixels, or 0 for images as they are")


@dataclass(frozen=True)
class AttentionConfig(LookConfig):
    """Settings of python -m eval.attention."""

    block: int = -1
    """Which block with class attention, counted from 0, or from -1 backwards: the last."""


@dataclass(frozen=True)
class PcaConfig(LookConfig):
    """Settings of python -m eval.pca."""

    foreground: Literal["all", "above", "below"] = "all"
    """Colour all patches, or only those whose first component lies above (or below) the threshold; which of the two
    is the foreground, the first component does not tell."""
    threshold: Annotated[float, Gt(0), Lt(1)] = 0.5
    """Where the first component is cut, on a scale from its least (0) to its greatest value (1)."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        if self.foreground == "all":
            refuse_changed(self, ("threshold",), "without a --foreground")
