"""Data sets: sources, decoding and loading."""

from dino_xcit.data.decode import UndecodableImage, decode
from dino_xcit.data.open import open_parts, open_source, register_source
from dino_xcit.data.sample import ArraySource
from dino_xcit.data.source import Source, Subset

__all__ = [
    "ArraySource",
    "Source",
    "Subset",
    "UndecodableImage",
    "decode",
    "open_parts",
    "open_source",
    "register_source",
]
