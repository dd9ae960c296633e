"""DINOv2's files: bare backbones, training states, chunks of blocks, registers; and how their images are prepared."""

from __future__ import annotations

from pathlib import Path

import foreign_checkpoints as files
import pytest
import torch
from test_weights_layouts import saved
from tiny_run import differing_bits
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import load_backbone, read_weights

IMAGES = torch.rand(3, 3, 56, 56, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def assert_same(path: Path, network: nn.Module, which: str = "teacher") -> None:
    expected: Tensor = network(IMAGES)
    assert float((expected[0] - expected[1]).norm() / expected[0].norm()) > 1e-3
    torch.testing.assert_close(load_backbone(path, which).backbone(IMAGES).cls_token, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("registers", [0, 4])
def test_a_bare_backbone_is_read_with_layer_scale_and_registers(tmp_path: Path, registers: int) -> None:
    network, state = files.dinov2_vit(registers=registers)
    assert state["pos_embed"].shape == (1, 1 + 16, 192)
    assert {"blocks.3.ls2.gamma", "mask_token"} <= state.keys()
    path = saved(tmp_path, state)
    assert_same(path, network)
    read = load_backbone(path)
    assert read.arch == "vit_tiny_4_p14_56_ls" + ("_reg4" if registers else "")
    assert read.left_aside == ("mask_token",)


@pytest.mark.parametrize("registers", [0, 4])
def test_the_published_sizes_have_518_pixels_and_are_evaluated_at_224(tmp_path: Path, registers: int) -> None:
    state = files.dinov2_vit(registers=registers, side=518)[1]
    assert state["pos_embed"].shape == (1, 1370, 192)
    read = load_backbone(saved(tmp_path, state))
    assert read.arch == "vit_tiny_4_p14_518_ls" + ("_reg4" if registers else "")
    assert (read.transform, read.transform_from) == (EvalTransform(256, 224), "")
    assert read.transform_guess == "ImageNet's way, as in DINOv2's evaluations"
    out = read.backbone(torch.rand(1, 3, 224, 224))
    assert out.grid == (16, 16)
    assert out.patch_tokens.shape == (1, 256, 192)


def test_the_teacher_of_a_training_checkpoint_is_read_though_its_blocks_lie_in_chunks(tmp_path: Path) -> None:
    network, state = files.dinov2_vit(3)
    chunks = files.chunked(state)
    assert {"blocks.0.0.norm1.weight", "blocks.1.3.norm1.weight"} <= chunks.keys()
    path = saved(tmp_path, {"teacher": files.dinov2_network(chunks, seed=2)})
    assert_same(path, network)
    read = load_backbone(path)
    assert (read.network, read.layout) == ("teacher", "a DINOv2 training checkpoint")
    assert read.left_aside == ("mask_token", "dino_head", "ibot_head")
    assert not differing_bits(read_weights(path).head, files.head(192, seed=2))
    with pytest.raises(InputError, match="holds no student, only teacher"):
        load_backbone(path, "student")


def test_a_whole_training_state_gives_student_and_teacher(tmp_path: Path) -> None:
    networks = {name: files.dinov2_vit(seed) for name, seed in (("student", 1), ("teacher", 2))}
    model = {"dino_loss.center": torch.zeros(1, 12), "ibot_patch_loss.center": torch.zeros(1, 1, 12)}
    for name, (_, state) in networks.items():
        model |= files.prefixed(f"{name}.", files.dinov2_network(files.chunked(state), seed=1))
    path = saved(tmp_path, {"model": model, "optimizer": {}, "iteration": 9})
    for name, (network, _) in networks.items():
        assert_same(path, network, name)
        assert load_backbone(path, name).layout == "a DINOv2 training checkpoint"


def test_chunks_whose_numbers_repeat_are_refused_by_their_names(tmp_path: Path) -> None:
    state = files.chunked(files.dinov2_vit()[1])
    state["blocks.0.2.norm1.weight"] = state["blocks.1.2.norm1.weight"]
    with pytest.raises(InputError, match=r"has besides blocks\.0\.0\."):
        load_backbone(saved(tmp_path, state))


def test_the_giants_swiglu_is_refused_by_name(tmp_path: Path) -> None:
    state = {key.replace("mlp.fc1", "mlp.w12"): value for key, value in files.dinov2_vit()[1].items()}
    with pytest.raises(InputError, match=r"SwiGLU layers, such as DINOv2's giant, .*timm:vit_giant_patch14_dinov2"):
        load_backbone(saved(tmp_path, state))


def test_timms_copy_of_a_dinov2_file_is_the_same_network(tmp_path: Path) -> None:
    for registers in (0, 4):
        network = files.dinov2_vit(registers=registers)[0]
        assert_same(saved(tmp_path, network.state_dict()), network)


@pytest.mark.parametrize("shape", [(1, 1), (1, 17, 192, 1), (1, 17, 8), ()])
def test_positions_that_do_not_fit_the_class_token_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    state = files.dinov2_vit(registers=4)[1] | {"pos_embed": torch.zeros(shape)}
    with pytest.raises(InputError) as caught:
        load_backbone(saved(tmp_path, state))
    assert "\n" not in str(caught.value)
