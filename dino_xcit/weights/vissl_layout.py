"""VISSL's files: the model that was trained in ``base_model``, DINO's teacher as a part of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.weights.names import backbone_names, head_names, unwrapped
from dino_xcit.weights.stored_network import NETWORKS, ONLY, Layout, StoredNetwork, by_part, tensors

_TEACHER = "momentum_teacher."


def read_vissl(content: Mapping[str, Any], network: str, where: str) -> StoredNetwork:
    """The network asked for, of a file with a ``classy_state_dict``, as
    :func:`~dino_xcit.weights.layouts.read_network` has it.

    Raises:
        InputError: it is no checkpoint of VISSL's.
    """
    found: Any = content
    for key in ("classy_state_dict", "base_model", "model"):
        found = found.get(key) if isinstance(found, Mapping) else None
    trunk = found.get("trunk") if isinstance(found, Mapping) else None
    if not isinstance(trunk, Mapping) or not trunk:
        raise InputError(
            f"{where} has a classy_state_dict without base_model, model and trunk in it: not a VISSL checkpoint"
        )
    teacher = _teacher(content.get("loss"), where)
    student = {f"trunk.{key}": value for key, value in tensors(trunk, f"the trunk in {where}").items()}
    if isinstance(found.get("heads"), Mapping):
        student |= {f"heads.{key}": value for key, value in tensors(found["heads"], f"heads in {where}").items()}
    chosen = (teacher if network == "teacher" else student) if teacher else student
    parts = by_part(chosen)
    if "trunk" not in parts:
        raise InputError(f"the {network} in {where} has no trunk: not a VISSL checkpoint")
    head = {key[2:]: value for key, value in parts.get("heads", {}).items() if key.startswith("0.")}
    return StoredNetwork(
        state=backbone_names(parts.pop("trunk")),
        head=head_names(head),
        network=network if teacher else ONLY,
        layout=Layout.VISSL,
        left_aside=(*parts, *([name for name in NETWORKS if name != network] if teacher else [])),
    )


def _teacher(loss: object, where: str) -> dict[str, Tensor]:
    if not isinstance(loss, Mapping):
        return {}
    found = {key: value for key, value in loss.items() if isinstance(key, str) and key.startswith(_TEACHER)}
    return unwrapped({key[len(_TEACHER) :]: value for key, value in tensors(found, f"the loss in {where}").items()})
