"""Multi-crop augmentation: what is drawn for a sample's views, and the views made of it."""

from dino_xcit.augment.multicrop import MultiCropAugmentation, group_by_size
from dino_xcit.augment.parameters import ViewKind, ViewParameters
from dino_xcit.augment.views import ViewMaker

__all__ = ["MultiCropAugmentation", "ViewKind", "ViewMaker", "ViewParameters", "group_by_size"]
