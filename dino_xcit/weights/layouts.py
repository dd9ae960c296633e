"""What a file of weights is made of: which of its parts is the backbone, which the head, and which network that is.

Each layout is recognised by its keys, as its program writes them: DINO and this project (``student``, ``teacher``),
VISSL (``classy_state_dict``), lightly and solo-learn (``state_dict`` of a module with several parts), supervised XCiT
and others (``model``), and a backbone by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.weights.names import backbone_names, head_names, unwrapped

NETWORKS = ("teacher", "student")
ONLY = "the only network"


@dataclass
class StoredNetwork:
    """One network of a file, under the names used here."""

    state: dict[str, Tensor]
    """The backbone's."""
    head: dict[str, Tensor]
    """Its DINO head's; empty where the file has none."""
    network: str
    """``teacher``, ``student`` or :data:`ONLY`."""
    layout: str
    """Whose layout it is, in words."""
    left_aside: tuple[str, ...]
    """Parts of the file that are not the backbone: ``head``, ``classifier``, the other network."""


@dataclass(frozen=True)
class _Parts:
    """A state dict of a module that holds student and teacher: prefixes of (backbone, head)."""

    layout: str
    teacher: tuple[str, str]
    student: tuple[str, str]


_MODULES = (
    _Parts("lightly", ("teacher_backbone.", "teacher_head."), ("student_backbone.", "student_head.")),
    # lightly's benchmarks call the teacher "backbone", its momentum methods the student.
    _Parts("lightly", ("backbone.", "projection_head."), ("student_backbone.", "student_projection_head.")),
    _Parts("lightly", ("backbone_momentum.", "projection_head_momentum."), ("backbone.", "projection_head.")),
    _Parts("solo-learn", ("momentum_backbone.", "momentum_head."), ("backbone.", "head.")),
)


_UNREAD = {"base_encoder": "MoCo v3", "encoder_q": "MoCo"}
"""First words of the keys of layouts that are known and not read."""


def read_network(content: Mapping[str, Any], network: str, where: str) -> StoredNetwork:
    """The network asked for.

    Args:
        content: of a file, as it was read.
        network: ``teacher`` or ``student``; a file with one network gives that.
        where: the file, for messages.

    Raises:
        InputError: the file is of no known layout, or does not hold that network.
    """
    if network not in NETWORKS:
        raise InputError(f"network is {network!r}, expected one of {', '.join(NETWORKS)}")
    if isinstance(content.get("classy_state_dict"), Mapping):
        return _vissl(content, network, where)
    if any(isinstance(content.get(name), Mapping) for name in NETWORKS):
        return _dino(content, network, where)
    for key, layout in (("state_dict", "a state_dict"), ("model", "a model"), ("", "a backbone by itself")):
        inner = content.get(key) if key else content
        if isinstance(inner, Mapping) and inner and any(isinstance(value, Tensor) for value in inner.values()):
            state = _tensors(inner, f"{key} in {where}" if key else where)
            averaged = [f"{name}_ema" for name in (key,) if isinstance(content.get(f"{name}_ema"), Mapping)]
            return _module(state, network, where) or StoredNetwork(
                backbone_names(state), {}, ONLY, layout, tuple(averaged)
            )
    raise InputError(f"{where} is no checkpoint of a known kind: its keys are {shown(list(content)[:5])} ...")


def _dino(content: Mapping[str, Any], network: str, where: str) -> StoredNetwork:
    """DINO's full checkpoints, and this project's: each network a ``backbone`` and a ``head``."""
    present = [name for name in NETWORKS if isinstance(content.get(name), Mapping)]
    _refuse_absent(network, present, where)
    state = unwrapped(_tensors(content[network], f"the {network} in {where}"))
    parts = _by_part(state)
    if "backbone" not in parts:
        raise InputError(f"the {network} in {where} has no keys that start with 'backbone.': not a DINO checkpoint")
    return StoredNetwork(
        state=backbone_names(parts.pop("backbone")),
        head=head_names(parts.get("head", {})),
        network=network,
        layout="a DINO checkpoint",
        left_aside=(*parts, *(name for name in present if name != network)),
    )


def _vissl(content: Mapping[str, Any], network: str, where: str) -> StoredNetwork:
    """VISSL's: the model that was trained in ``base_model``, DINO's teacher as a part of the loss."""
    found: Any = content
    for key in ("classy_state_dict", "base_model", "model"):
        found = found.get(key) if isinstance(found, Mapping) else None
    trunk = found.get("trunk") if isinstance(found, Mapping) else None
    if not isinstance(trunk, Mapping) or not trunk:
        raise InputError(
            f"{where} has a classy_state_dict without base_model, model and trunk in it: not a VISSL checkpoint"
        )
    teacher = _vissl_teacher(content.get("loss"), where)
    student = {f"trunk.{key}": value for key, value in _tensors(trunk, f"the trunk in {where}").items()}
    if isinstance(found.get("heads"), Mapping):
        student |= {f"heads.{key}": value for key, value in _tensors(found["heads"], f"heads in {where}").items()}
    chosen = (teacher if network == "teacher" else student) if teacher else student
    parts = _by_part(chosen)
    if "trunk" not in parts:
        raise InputError(f"the {network} in {where} has no trunk: not a VISSL checkpoint")
    first = {key[2:]: value for key, value in parts.get("heads", {}).items() if key.startswith("0.")}
    return StoredNetwork(
        state=backbone_names(parts.pop("trunk")),
        head=head_names(first),
        network=network if teacher else ONLY,
        layout="a VISSL checkpoint",
        left_aside=(*parts, *([name for name in NETWORKS if name != network] if teacher else [])),
    )


def _vissl_teacher(loss: object, where: str) -> dict[str, Tensor]:
    prefix = "momentum_teacher."
    if not isinstance(loss, Mapping):
        return {}
    found = {key: value for key, value in loss.items() if isinstance(key, str) and key.startswith(prefix)}
    return unwrapped({key[len(prefix) :]: value for key, value in _tensors(found, f"the loss in {where}").items()})


def _module(state: dict[str, Tensor], network: str, where: str) -> StoredNetwork | None:
    """A module with a student and a teacher in it, or with one backbone; None where it has neither."""
    state = unwrapped(state)
    parts = _by_part(state)

    def has(prefix: str) -> bool:
        return prefix[:-1] in parts and len(parts[prefix[:-1]]) > 1

    whole = [row for row in _MODULES if has(row.teacher[0]) and has(row.student[0])]
    # Without its partner a plain "backbone" is the only network, not a student or a teacher.
    half = [row for row in _MODULES[:1] if has(row.teacher[0]) or has(row.student[0])]
    if whole or half:
        row = (whole or half)[0]
        prefixes = {"teacher": row.teacher, "student": row.student}
        _refuse_absent(network, [name for name in NETWORKS if has(prefixes[name][0])], where)
        backbone, head = (prefix[:-1] for prefix in prefixes[network])
        layout, chosen = f"a checkpoint of {row.layout}", network
    elif has("backbone."):
        layout, chosen, backbone = "a module's backbone", ONLY, "backbone"
        head = next((name for name in ("head", "projection_head") if head_names(parts.get(name, {}))), "head")
    elif unread := parts.keys() & _UNREAD.keys():
        word = min(unread)
        raise InputError(
            f"{where} has the layout of {_UNREAD[word]} ({word}. before the keys), which is not read here: save the "
            "weights of the encoder that is meant by themselves, without the words before their names"
        )
    else:
        return None
    return StoredNetwork(
        state=backbone_names(parts.pop(backbone)),
        head=head_names(parts.get(head, {})),
        network=chosen,
        layout=layout,
        left_aside=tuple(parts),
    )


def _refuse_absent(network: str, present: list[str], where: str) -> None:
    if network not in present:
        raise InputError(f"{where} holds no {network}, only {', '.join(present)}: use --network {present[0]}")


def _by_part(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """``{"head": {"mlp.0.weight": ...}}``: the first word of each key, and what is under it."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = value
    return parts


def _tensors(state: Mapping[Any, Any], holder: str) -> dict[str, Tensor]:
    wrong = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if wrong:
        raise InputError(f"{holder} holds besides tensors {shown(wrong[:3])}: not a checkpoint of a known kind")
    return dict(state)


def first(keys: Sequence[object], count: int) -> str:
    """The first so many keys of a file, and how many more there are."""
    return f"{shown(keys[:count])}{f' and {len(keys) - count} more' if len(keys) > count else ''}"


def shown(keys: Iterable[object]) -> str:
    """Keys of a file, which may be of any length and hold anything, in one line."""
    return ", ".join("".join(c if c.isprintable() else "?" for c in str(key)[:80]) for key in keys)
