"""Settings of ``python -m eval.dense``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from dino_xcit.bounds import FilePath, Group, Seed, Suffix, refuse_changed
from dino_xcit.errors import InputError
from eval.config import BackboneConfig, IsOutput

UNUSED = ("eval_resize", "eval_crop", "cache", "cache_dir", "batch_size_per_gpu")
"""Settings of other evaluations: here images are resized as a whole, and pass the backbone one by one."""


@dataclass(frozen=True)
class PatchKnnConfig(BackboneConfig):
    """Evaluate frozen patch features by k-NN segmentation (Hummingbird, arXiv 2306.01667)."""

    data_path: Annotated[FilePath, Group("data")] = ""
    """Folder with images and masks: ADE20k, VOC, or images/train, masks/train, images/val and masks/val (or
    train/images, train/masks ...), with masks as PNGs of labels named like their images. classes.txt in it, one name
    per line, is optional."""
    layout: Literal["auto", "ade20k", "voc", "folder"] = "auto"
    """Layout of DATA_PATH."""
    classes: Annotated[int, Ge(0), Le(254)] = 0
    """Number of classes; 0: that of ADE20k, VOC or classes.txt, else the largest label in the training masks + 1."""
    ignore_label: Annotated[int, Ge(0), Le(255)] = 255
    """Label of pixels that do not count; with 0, label 0 is no class."""
    size: Annotated[int, Ge(16), Group("evaluation")] = 512
    """Height and width of the resized images in pixels, a multiple of the patch size. The aspect ratio is not kept."""
    memory: Annotated[int, Ge(1)] = 102_400
    """Number of training patches to search, drawn from all images in equal shares."""
    k: Annotated[int, Ge(1)] = 30
    """Number of neighbours of a patch."""
    temperature: Annotated[float, Gt(0)] = 0.02
    """Temperature T of the neighbours' weights, softmax(cosine similarity / T)."""
    baselines: bool = False
    """Also evaluate the untrained architecture."""
    seed: Seed = 0
    """Seed of the draw of training patches."""
    out: Annotated[FilePath, IsOutput, Suffix(".png")] = ""
    """Draw some images with their prediction and their mask to this .png file."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        refuse_changed(self, UNUSED, "for dense evaluations")


@dataclass(frozen=True)
class VideoConfig(BackboneConfig):
    """Evaluate frozen patch features by propagating objects through videos (DAVIS 2017, DINO's protocol)."""

    data_path: Annotated[FilePath, Group("data")] = ""
    """DAVIS 2017 (with JPEGImages and Annotations), or a folder with the frames of one video in the order of their
    names, and their masks in its subfolder masks; only the first frame needs one."""
    first_mask: FilePath = ""
    """Mask of the first frame of a folder of frames: object numbers as a palette or greyscale PNG."""
    out: FilePath = ""
    """Write masks, overlays and an animation of each video to this folder."""
    size: Annotated[int, Ge(16), Group("evaluation")] = 480
    """Shorter side of the resized frames in pixels; the longer side is rounded down to a multiple of 64."""
    previous: Annotated[int, Ge(0)] = 7
    """Number of previous frames, besides the first, from which labels propagate."""
    radius: Annotated[int, Ge(0)] = 12
    """Patches propagate over at most this distance, in rows and in columns of patches."""
    k: Annotated[int, Ge(1)] = 5
    """Number of patches that give a patch its label."""
    temperature: Annotated[float, Gt(0)] = 0.1
    """Temperature T of their weights, exp(cosine similarity / T)."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        refuse_changed(self, (*UNUSED, "num_workers"), "for videos")
        if not self.data_path:
            raise InputError("no data given: add --data-path DIR, the folder of DAVIS 2017 or of a video's frames")
