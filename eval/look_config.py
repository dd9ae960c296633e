"""Every setting of python -m eval.attention and python -m eval.pca, with its default: the only place that has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_xcit.errors import InputError
from eval.config import BackboneConfig


@dataclass(frozen=True)
class LookConfig(BackboneConfig):
    """Which photographs are looked at, and the picture that comes of it: what attention and PCA share."""

    images: tuple[str, ...] = ()
    """Image files; --images may be left out before them."""
    size: int = 480
    """Pixels that an image's shorter side is resized to; 0: as it is. Finer than in training is fine."""
    out: str = ""
    """The picture, a .png file. Default: attention.png or pca.png in this folder."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        for name in ("data_path", "eval_resize", "eval_crop", "cache_dir", "json"):
            if getattr(self, name):
                raise InputError(f"{name} is {getattr(self, name)}, which decides nothing here: leave it out")
        if not self.images:
            raise InputError("no images given: name one or more image files, such as photo.jpg")
        if self.size and not 16 <= self.size <= 8192:
            raise InputError(
                f"size is {self.size}, expected 16 to 8192 pixels, such as 480, or 0 for images as they are"
            )
        if self.out and not self.out.lower().endswith(".png"):
            raise InputError(f"out is {self.out!r}, expected a name that ends in .png")


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
    threshold: float = 0.5
    """Where the first component is cut, on a scale from its least (0) to its greatest value (1)."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        if not 0 < self.threshold < 1:
            raise InputError(f"threshold is {self.threshold:g}, expected a number between 0 and 1, such as 0.5")
        if self.foreground == "all" and self.threshold != PcaConfig.threshold:
            raise InputError(
                f"threshold is {self.threshold:g}, which parts nothing without a foreground: add --foreground above "
                "(or below), or leave it out"
            )
