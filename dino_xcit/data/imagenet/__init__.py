"""ImageNet-1k as it is downloaded: its images (source), and which class each validation image has (truth)."""

from dino_xcit.data.imagenet.source import open_imagenet

__all__ = ["open_imagenet"]
