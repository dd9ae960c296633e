"""``--init-weights`` loads the weights of a file, and nothing else of it, into student and teacher of a new run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foreign_checkpoints as files
import pytest
import timm
import torch
from tiny_run import CPU, differing_bits, run, tiny_config
from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.init_weights import initialise
from dino_xcit.train import TrainState, build_state

SMALL_HEAD: dict[str, Any] = {"out_dim": 12, "head_hidden_dim": 8, "head_bottleneck_dim": 6}
ARCH = "xcit_pico_4_p8"


def begun(path: Path | str, **settings: Any) -> tuple[TrainState, str]:
    """Return a fresh state initialised from ``path``, and the message."""
    config = tiny_config(**({"arch": ARCH, "init_weights": str(path)} | SMALL_HEAD | settings))
    state = build_state(config, CPU)
    return state, initialise(state.method, config)


def dino_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write a full DINO checkpoint to ``path``; return the backbones of student and teacher."""
    student, teacher = files.xcit(1), files.xcit(2)
    torch.save(files.dino(student, teacher, 64, teacher_wrapped=True), path)
    return dict(student.state_dict()), dict(teacher.state_dict())


def parts(state: TrainState) -> list[dict[str, Tensor]]:
    return [dict(network.backbone.state_dict()) for network in (state.method.student, state.method.teacher)]


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_init_weights_loads_chosen_network_into_student_and_teacher(tmp_path: Path, network: str) -> None:
    student, teacher = dino_file(tmp_path / "full.pth")
    state, said = begun(tmp_path / "full.pth", init_network=network)
    chosen, seed = (teacher, 2) if network == "teacher" else (student, 1)
    for part in (state.method.student, state.method.teacher):
        assert not differing_bits(part.backbone.state_dict(), chosen)
        assert not differing_bits(part.head.state_dict(), files.head(64, seed=seed))
    assert said.startswith(f"starting from {network} {ARCH} of {tmp_path / 'full.pth'} (a DINO checkpoint)")
    assert (state.step, state.optimizer.state_dict()["state"]) == (0, {})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"out_dim": 13}, "in the file last_layer.weight_g is 12 x 1, in this run 13 x 1"),
        ({"head_hidden_dim": 9}, "in the file mlp.0.weight is 8 x 64, in this run 9 x 64"),
        ({"use_bn_in_head": True}, "the file's has other layers"),
    ],
)
def test_init_weights_leaves_heads_fresh_if_shapes_differ(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    _, teacher = dino_file(tmp_path / "full.pth")
    state, said = begun(tmp_path / "full.pth", **settings)
    fresh = build_state(tiny_config(arch=ARCH, **SMALL_HEAD | settings), CPU)
    assert f"heads start fresh: {words}" in said
    assert not differing_bits(parts(state)[0], teacher)
    assert not differing_bits(state.method.student.head.state_dict(), fresh.method.student.head.state_dict())


def test_init_weights_reports_prototypes_frozen_at_other_norms(tmp_path: Path) -> None:
    student = files.xcit(1)
    content = files.dino(student, student, 64, teacher_wrapped=False)
    content["teacher"]["head.last_layer.weight_g"] *= 2
    torch.save(content, tmp_path / "full.pth")
    assert "frozen at norms other than 1" in begun(tmp_path / "full.pth")[1]
    assert "frozen at norms" not in begun(tmp_path / "full.pth", norm_last_layer=False)[1]


def test_init_weights_accepts_timm_weights(tmp_path: Path) -> None:
    small = {"global_crops_size": 32, "local_crops_size": 16}
    _, said = begun(files.timm_folder(tmp_path, files.timm_xcit(classes=7), files.XCIT_CONFIG))
    assert "trained with mean 0.5 0.5 0.5 and std 0.25 0.25 0.25, this run has" in said
    network = timm.create_model("test_vit", num_classes=5)
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    state, said = begun(tmp_path / "timm.pth", arch="timm:test_vit", **small)
    assert "heads start fresh: the file has no DINO head" in said
    own = {key.removeprefix("model."): value for key, value in parts(state)[0].items()}
    assert not differing_bits(own, {key: value for key, value in network.state_dict().items() if key in own})
    _, results = run(tiny_config(arch="timm:test_vit", **small, **SMALL_HEAD), 1, state)
    assert bool(results[0].accepted)


def test_init_weights_refuses_another_architecture_and_names_both(tmp_path: Path) -> None:
    dino_file(tmp_path / "full.pth")
    with pytest.raises(InputError, match=r"a xcit_pico_4_p8, but arch is xcit_pico_4_p4: give --arch xcit_pico_4_p8"):
        begun(tmp_path / "full.pth", arch="xcit_pico_4_p4")


def test_init_weights_refuses_missing_keys_unless_allowed(tmp_path: Path) -> None:
    state = dict(files.xcit().state_dict())
    del state["blocks.0.gamma1"], state["blocks.1.mlp.fc1.weight"]
    torch.save(state, tmp_path / "bare.pth")
    with pytest.raises(InputError, match=r"lacks blocks\.1\.mlp\.fc1\.weight"):
        begun(tmp_path / "bare.pth", allow_missing=("blocks.0.gamma1",))
    state, said = begun(tmp_path / "bare.pth", allow_missing=("blocks.0.gamma1", "blocks.1.mlp.*"))
    assert "missing blocks.0.gamma1, missing blocks.1.mlp.fc1.weight" in said
    assert not differing_bits(*parts(state))  # the missing keys too have equal initial values in student and teacher


def test_init_weights_refuses_invalid_settings() -> None:
    with pytest.raises(InputError, match="init_network is ema"):
        tiny_config(init_network="ema")
    with pytest.raises(InputError, match="take keys"):
        tiny_config(allow_unexpected=("*",))


def test_init_weights_takes_number_of_vit_heads_from_arch(tmp_path: Path) -> None:
    torch.save(files.vit().state_dict(), tmp_path / "bare.pth")
    small = {"global_crops_size": 32, "local_crops_size": 16}
    state, said = begun(tmp_path / "bare.pth", arch="vit_tiny_2_p16_64_h6", **small)
    assert "starting from the only network vit_tiny_2_p16_64_h6 of" in said
    assert state.method.student.backbone.model.blocks[0].attn.num_heads == 6
    with pytest.raises(InputError, match=r"a vit_tiny_2_p16_64, but arch is vit_tiny_2_p16_64_ls"):
        begun(tmp_path / "bare.pth", arch="vit_tiny_2_p16_64_ls", **small)
