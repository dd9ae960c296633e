"""Load weights of this and other projects into a frozen backbone.

docs/checkpoints.md lists the supported layouts. Loading executes no code from files. Missing and unexpected keys are
errors unless allowed by name. :func:`~dino_xcit.weights.load.read_weights` uses, in order:
:mod:`~dino_xcit.weights.locate` (the file and its neighbours), :mod:`~dino_xcit.weights.layouts` (the network and its
architecture), :mod:`~dino_xcit.weights.names` (the keys), :mod:`~dino_xcit.weights.transforms` (the evaluation
transform).
"""

from dino_xcit.weights.layouts import NETWORKS, ONLY, Layout
from dino_xcit.weights.load import Allowed, LoadedBackbone, StoredWeights, hash_state, load_backbone, read_weights

__all__ = [
    "NETWORKS", "ONLY", "Allowed", "Layout", "LoadedBackbone", "StoredWeights", "hash_state", "load_backbone",
    "read_weights",
]  # fmt: skip
