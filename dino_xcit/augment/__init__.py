"""Multi-crop augmentation: random parameters of the views, and their application."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_xcit.augment.multicrop import MultiCropAugmentation, group_by_size
    from dino_xcit.augment.parameters import ViewKind, ViewParameters
    from dino_xcit.augment.views import ViewMaker

__all__ = ["MultiCropAugmentation", "ViewKind", "ViewMaker", "ViewParameters", "group_by_size"]


def __getattr__(name: str) -> Any:
    """Import lazily: Numba takes a second to import, and ``--help`` does not need it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = {"ViewMaker": "views", "ViewKind": "parameters", "ViewParameters": "parameters"}.get(name, "multicrop")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
