"""State dicts of one module with several networks in it: lightly, solo-learn, MoCo, DINOv2; or with one backbone.

They are told apart by the first words of their keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.weights.names import backbone_names, head_names, unwrapped
from dino_xcit.weights.printing import first
from dino_xcit.weights.stored_network import NETWORKS, ONLY, Layout, StoredNetwork, by_part, refuse_absent


@dataclass(frozen=True)
class _Module:
    """A module that holds student and teacher: the first words of each one's (backbone, head)."""

    layout: Layout
    teacher: tuple[str, str]
    student: tuple[str, str]
    tells_alone: bool = False
    """Whether one of the two words is enough to know the layout: no other program uses it."""
    heads: Mapping[int, int] = field(default_factory=dict)
    """A transformer's heads by its width, where the program has them in its code."""


_MODULES = (
    _Module(Layout.LIGHTLY, ("teacher_backbone", "teacher_head"), ("student_backbone", "student_head"), True),
    # lightly's benchmarks call the teacher "backbone", its momentum methods the student. In its MoCo v2 (benchmarks of
    # ImageNet, mocov2.py) the "backbone" encodes the keys and follows the query_backbone's average.
    _Module(Layout.LIGHTLY, ("backbone", "projection_head"), ("student_backbone", "student_projection_head")),
    _Module(Layout.LIGHTLY, ("backbone", "projection_head"), ("query_backbone", "query_projection_head")),
    _Module(Layout.LIGHTLY, ("backbone_momentum", "projection_head_momentum"), ("backbone", "projection_head")),
    _Module(Layout.SOLO_LEARN, ("momentum_backbone", "momentum_head"), ("backbone", "head")),
    # Its projector takes the place of the encoder's own head or fc. Of its transformers (facebookresearch/moco-v3,
    # vits.py) the small one has twice the heads of everybody else's.
    _Module(
        Layout.MOCO_V3, ("momentum_encoder", ""), ("base_encoder", ""), True, {384: 12, 768: 12, 1024: 16, 1280: 16}
    ),
    _Module(Layout.MOCO, ("encoder_k", ""), ("encoder_q", ""), True),
)


def read_module(state: Mapping[str, Tensor], network: str, where: str) -> StoredNetwork | None:
    """The network asked for; None where the state dict is of no such module.

    Raises:
        InputError: the module does not hold that network, or holds several of which none is known to be the student.
    """
    parts = by_part(unwrapped(state))

    def has(word: str) -> bool:
        return len(parts.get(word, ())) > 1

    whole = [row for row in _MODULES if has(row.teacher[0]) and has(row.student[0])]
    half = [row for row in _MODULES if row.tells_alone and (has(row.teacher[0]) or has(row.student[0]))]
    if whole or half:
        row = (whole or half)[0]
        words = {"teacher": row.teacher, "student": row.student}
        refuse_absent(network, [name for name in NETWORKS if has(words[name][0])], where)
        backbone, head = words[network]
        layout, chosen, heads = row.layout, network, row.heads
    elif has("backbone"):
        # Without its partner a plain "backbone" is the only network, not a student or a teacher.
        others = [word for word in parts if word != "backbone" and "backbone" in word and has(word)]
        if others and network == "student":
            raise InputError(
                f"{where} holds backbone and {first(others, 3)}, and no program known here names them so: leave out "
                "--network student to take backbone, or save the other by itself"
            )
        layout, chosen, backbone, heads = Layout.MODULE, ONLY, "backbone", {}
        head = next((name for name in ("head", "projection_head") if head_names(parts.get(name, {}))), "head")
    else:
        return None
    found = backbone_names(parts.pop(backbone))
    token = found.get("cls_token")
    return StoredNetwork(
        state=found,
        head=head_names(parts.get(head, {})),
        network=chosen,
        layout=layout,
        left_aside=tuple(parts),
        heads=heads.get(int(token.shape[-1]), 0) if token is not None and token.ndim else 0,
    )
