"""Anybody's weights to a frozen backbone: which file, which network in it, which architecture, all said.

docs/checkpoints.md lists what is known. Reading executes nothing, and keys that are missing or left over are an error
unless they were allowed by name. :func:`~dino_xcit.weights.load.read_weights` tells the whole way in order:
:mod:`~dino_xcit.weights.locate` (where the file is, what lies beside it), :mod:`~dino_xcit.weights.layouts` (which
network in it, of what architecture), :mod:`~dino_xcit.weights.names` (its keys),
:mod:`~dino_xcit.weights.transforms` (how its images are prepared).
"""

from dino_xcit.weights.layouts import NETWORKS, ONLY, Layout
from dino_xcit.weights.load import Allowed, LoadedBackbone, StoredWeights, hash_state, load_backbone, read_weights

__all__ = [
    "NETWORKS", "ONLY", "Allowed", "Layout", "LoadedBackbone", "StoredWeights", "hash_state", "load_backbone",
    "read_weights",
]  # fmt: skip
