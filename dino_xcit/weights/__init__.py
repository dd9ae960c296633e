"""Anybody's weights to a frozen backbone: which file, which network in it, which architecture, all said.

docs/checkpoints.md lists what is known. Reading executes nothing, and keys that are missing or left over are an error
unless they were allowed by name. :mod:`~dino_xcit.weights.reading` tells the whole way in order:

- where it is: :mod:`~dino_xcit.weights.files`, :mod:`~dino_xcit.weights.hub`; read by
  :mod:`~dino_xcit.weights.safetensors_file` or :mod:`dino_xcit.safe_load`; what lies beside it:
  :mod:`~dino_xcit.weights.timm_config`, :mod:`~dino_xcit.weights.transformers_config`,
  :mod:`~dino_xcit.weights.json_file`;
- which network in it, and whose layout: :mod:`~dino_xcit.weights.layouts`, :mod:`~dino_xcit.weights.module_layouts`,
  :mod:`~dino_xcit.weights.vissl_layout`, all of which give a :mod:`~dino_xcit.weights.stored_network`;
- its weights under our names: :mod:`~dino_xcit.weights.names`, :mod:`~dino_xcit.weights.dinov2_names`,
  :mod:`~dino_xcit.weights.transformers_names`;
- of what, and whether all of it is there: :mod:`~dino_xcit.weights.architecture`, :mod:`~dino_xcit.weights.fit`;
- how its images are prepared: :mod:`~dino_xcit.weights.preparation`;
- in a network: :mod:`~dino_xcit.weights.backbone`.
"""

from dino_xcit.weights.backbone import LoadedBackbone, hash_state, load_backbone
from dino_xcit.weights.fit import Allowed
from dino_xcit.weights.reading import StoredWeights, read_weights
from dino_xcit.weights.stored_network import NETWORKS, ONLY

__all__ = [
    "NETWORKS",
    "ONLY",
    "Allowed",
    "LoadedBackbone",
    "StoredWeights",
    "hash_state",
    "load_backbone",
    "read_weights",
]
