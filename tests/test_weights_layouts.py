"""Checkpoint layouts: the loaded network must reproduce the output of the original network."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import foreign_checkpoints as files
import pytest
import torch
import torchvision
from tiny_run import differing_bits
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.weights import ONLY, Layout, LoadedBackbone, load_backbone, read_weights
from dino_xcit.weights.layouts import architecture_of
from dino_xcit.weights.load import CLASSIFIERS, OF_TRAINING

IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(5))
VIT, XCIT, RESNET = "vit_tiny_2_p16_64", "xcit_pico_4_p8", "timm:resnet18"


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "file.pth")
    return folder / "file.pth"


@torch.no_grad()
def output(network: nn.Module, side: int = 64) -> Tensor:
    """Return the output [3, D] of a network, ours or the original, for three images."""
    found: Any = network(IMAGES[:, :, :side, :side])
    return (found if isinstance(found, Tensor) else found.cls_token).flatten(1)


def assert_same_output(loaded: LoadedBackbone, original: nn.Module, side: int = 64) -> None:
    ours, theirs = output(loaded.backbone, side), output(original, side)
    assert ours.shape == theirs.shape
    assert float((theirs[0] - theirs[1]).norm() / theirs[0].norm()) > 1e-3  # finite, and different for each image
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6 * float(theirs.abs().max()))


# ---- files with both networks


BOTH: dict[str, tuple[Callable[[int], nn.Module], Callable[[nn.Module, nn.Module], Any], str, Layout, str]] = {
    "dino-vit": (files.vit, partial(files.dino, width=192), VIT, Layout.DINO, "head student"),
    "dino-xcit": (files.xcit, partial(files.dino, width=64, teacher_wrapped=True), XCIT, Layout.DINO, "head student"),
    "dino-resnet": (files.resnet, partial(files.dino, width=512), RESNET, Layout.DINO, "head student"),
    "ibot": (files.vit, files.ibot, VIT, Layout.DINO, "head student"),
    "vissl": (files.xcit, files.vissl_dino, XCIT, Layout.VISSL, "student"),
    "lightly-example": (files.resnet, files.lightly_example, RESNET, Layout.LIGHTLY, "student_backbone"),
    "lightly-benchmark": (files.vit, files.lightly_benchmark, VIT, Layout.LIGHTLY, "criterion"),
    "lightly-moco": (files.xcit, files.lightly_moco, XCIT, Layout.LIGHTLY, "query_backbone"),
    "lightly-momentum": (files.vit, files.lightly_momentum, VIT, Layout.LIGHTLY, "backbone"),
    "solo-learn": (files.vit, partial(files.solo_learn, width=192), VIT, Layout.SOLO_LEARN, "backbone classifier"),
    "moco-v3-vit": (files.vit, files.moco_v3, VIT, Layout.MOCO_V3, "head predictor base_encoder"),
    "moco-v3-resnet": (files.resnet, partial(files.moco_v3, projector="fc"), RESNET, Layout.MOCO_V3, "fc"),
    "moco": (files.resnet, files.moco, RESNET, Layout.MOCO, "fc"),
}
HEADS = {"dino-vit": 2, "dino-xcit": 2, "ibot": 2, "lightly-example": 0, "lightly-benchmark": 0, "solo-learn": 0}
"""Seeds of the teachers' DINO heads, for files that have one."""


@pytest.mark.parametrize("name", BOTH)
def test_student_and_teacher_match_original_outputs(tmp_path: Path, name: str) -> None:
    make, write, arch, layout, left_aside = BOTH[name]
    networks = {"student": make(1), "teacher": make(2)}
    path = saved(tmp_path, write(*networks.values()))
    for which, network in networks.items():
        read = load_backbone(path, which)
        assert_same_output(read, network)
        assert (read.arch, read.layout, read.network) == (arch, layout, which)
    assert (read.network, read.classifiers) == ("teacher", ())
    assert set(read.left_aside) >= set(left_aside.split())
    if name in HEADS:
        head = files.head(output(networks["teacher"]).shape[1], HEADS[name])
        assert not differing_bits(read_weights(path).head, head)
    elif "moco" in name:
        assert read_weights(path).head == {}


def test_file_with_student_only_names_network_flag(tmp_path: Path) -> None:
    student = files.resnet(1)
    path = saved(tmp_path, files.moco(student, None))
    with pytest.raises(InputError, match="--network student"):
        load_backbone(path)
    assert_same_output(load_backbone(path, "student"), student)


def test_backbone_with_unknown_prefix_is_not_taken_as_student(tmp_path: Path) -> None:
    first, second = files.xcit(1), files.xcit(2)
    both = files.prefixed("backbone.", first.state_dict()) | files.prefixed("target_backbone.", second.state_dict())
    path = saved(tmp_path, files.lightning(both))
    assert_same_output(load_backbone(path), first)
    with pytest.raises(InputError, match="target_backbone"):
        load_backbone(path, "student")


# ---- files with one network


def with_classifier(network: nn.Module, name: str) -> dict[str, Tensor]:
    return dict(network.state_dict()) | {f"{name}.weight": torch.randn(9, 5), f"{name}.bias": torch.zeros(9)}


ONE: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], str, Layout, str]] = {
    "bare": (files.vit, nn.Module.state_dict, VIT, Layout.BARE, ""),
    "xcit": (files.xcit, lambda net: {"model": with_classifier(net, "head"), "model_ema": {}}, XCIT, Layout.MODEL,
             "head model_ema"),
    "resnet": (files.resnet, lambda net: with_classifier(net, "fc"), RESNET, Layout.BARE, "fc"),
    "mae": (files.vit, files.mae, VIT, Layout.MAE,
            "mask_token decoder_pos_embed decoder_embed decoder_blocks decoder_norm decoder_pred"),
    "vissl": (files.resnet, files.vissl_resnet, RESNET, Layout.VISSL, "heads"),
    "module": (files.xcit, files.lightly_module, XCIT, Layout.MODULE, "projection_head"),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE)
def test_only_network_matches_original_output(tmp_path: Path, name: str) -> None:
    make, write, arch, layout, left_aside = ONE[name]
    network = make()
    read = load_backbone(saved(tmp_path, write(network)))
    assert (read.arch, read.layout, read.network) == (arch, layout, ONLY)
    assert read.left_aside == tuple(left_aside.split())
    assert read.classifiers == tuple({"head", "fc"} & set(read.left_aside))
    assert_same_output(read, network)


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "backbone.", "model."])
def test_wrapper_prefix_of_bare_backbone_is_removed(tmp_path: Path, prefix: str) -> None:
    network = files.xcit()
    read = load_backbone(saved(tmp_path, files.prefixed(prefix, network.state_dict())))
    assert not differing_bits(read.backbone.state_dict(), network.state_dict())


# ---- DINOv2


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_backbone_is_read_with_original_and_timm_names(tmp_path: Path, registers: int) -> None:
    network, state = files.dinov2_vit(registers=registers)
    assert state["pos_embed"].shape == (1, 1 + 16, 192)
    read = load_backbone(saved(tmp_path, state))
    assert_same_output(read, network, 56)
    assert read.arch == "vit_tiny_4_p14_56_ls" + ("_reg4" if registers else "")
    assert read.left_aside == ("mask_token",)
    assert_same_output(load_backbone(saved(tmp_path, network.state_dict())), network, 56)


def test_dinov2_training_checkpoint_with_chunked_blocks_is_read(tmp_path: Path) -> None:
    networks = {name: files.dinov2_vit(seed) for name, seed in (("student", 1), ("teacher", 2))}
    parts = {name: files.dinov2_network(files.chunked(state), seed=2) for name, (_, state) in networks.items()}
    assert {"backbone.blocks.0.0.norm1.weight", "backbone.blocks.1.3.norm1.weight"} <= parts["teacher"].keys()
    whole = files.prefixed("student.", parts["student"]) | files.prefixed("teacher.", parts["teacher"])
    path = saved(tmp_path, {"model": whole | {"dino_loss.center": torch.zeros(1, 12)}, "optimizer": {}})
    for name, (network, _) in networks.items():
        assert_same_output(load_backbone(path, name), network, 56)
    read = load_backbone(saved(tmp_path, {"teacher": parts["teacher"]}))
    assert_same_output(read, networks["teacher"][0], 56)
    assert (read.network, read.layout) == ("teacher", Layout.DINOV2)
    assert read.left_aside == ("mask_token", "dino_head", "ibot_head")
    assert not differing_bits(read_weights(path).head, files.head(192, 2))


@pytest.mark.parametrize(
    ("shape", "registers"), [((1, 1), 0), ((1, 17, 192, 1), 4), ((1, 17, 8), 4), ((1, 21, 192), 4), ((), 0)]
)
def test_mismatched_position_embedding_is_refused(tmp_path: Path, shape: tuple[int, ...], registers: int) -> None:
    state = files.dinov2_vit(registers=registers)[1] | {"pos_embed": torch.zeros(shape)}
    with pytest.raises(InputError) as caught:
        load_backbone(saved(tmp_path, state))
    assert "\n" not in str(caught.value)


# ---- architectures


@pytest.mark.parametrize(("side", "patch", "name"), [(64, 8, "vit_tiny_2_p8_64"), (224, 32, "vit_tiny_2_p32")])
def test_vit_patch_size_and_image_size_are_inferred(side: int, patch: int, name: str) -> None:
    assert architecture_of(files.vit(side=side, patch=patch).state_dict(), "") == name


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_resnet_depth_is_inferred(name: str) -> None:
    with torch.device("meta"):
        state = torchvision.models.get_model(name, weights=None).state_dict()
    assert architecture_of(state, "") == f"timm:{name}"
    with pytest.raises(InputError, match="blocks"):
        architecture_of({key: value for key, value in state.items() if not key.startswith("layer4.1.")}, "")


VIT_STATE, DINOV2_STATE = dict(files.vit().state_dict()), files.dinov2_vit()[1]


def renamed(old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): value for key, value in DINOV2_STATE.items()}


NOT_READ: dict[str, tuple[dict[str, Tensor], str]] = {
    "MoCo v3's stem": (renamed("patch_embed.proj.", "patch_embed.proj.0."), "vit_conv_"),
    "DINOv2's giant": (renamed("mlp.fc1", "mlp.w12"), "timm:vit_giant_patch14_dinov2.lvd142m"),
    "DINOv3": (renamed("pos_embed", "storage_tokens"), "DINOv3.*timm:vit_small_patch16_dinov3"),
    "DINOv3 of transformers": (renamed("mlp.fc1", "mlp.up_proj"), "DINOv3.*timm:"),
    "DINOv3's ConvNeXt": ({"downsample_layers.0.0.weight": torch.zeros(9, 3, 4, 4)}, "DINOv3.*timm:convnext"),
    "another width": (dict(files.vit(width=96, heads=2).state_dict()), "--arch timm:NAME"),
    "no block": ({k: v for k, v in VIT_STATE.items() if not k.startswith("blocks.")}, "0 layers"),
    "a norm of its own": (VIT_STATE | {"fc_norm.weight": torch.ones(192)}, "fc_norm"),
    "chunks that repeat": (
        files.chunked(DINOV2_STATE) | {"blocks.0.2.norm1.weight": torch.zeros(192)}, r"blocks\.0\.0\."
    ),
    "nothing known": ({"a\n\x1b": torch.zeros(1)}, r"first keys: a\?\?"),
    "a million wrappers": ({"module." * 1_000_000 + "x": torch.zeros(1)}, "cannot infer"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_READ)
def test_unsupported_network_is_refused_with_short_hint(tmp_path: Path, name: str) -> None:
    state, words = NOT_READ[name]
    with pytest.raises(InputError, match=words) as caught:
        load_backbone(saved(tmp_path, state))
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_unknown_number_of_heads_is_reported_as_assumed(tmp_path: Path) -> None:
    assert "heads assumed: 3" in load_backbone(saved(tmp_path, VIT_STATE)).describe()
    assert load_backbone(tmp_path / "file.pth", arch=VIT).heads_assumed == 0
    for named, heads in (("vit_tiny", 3), (f"{VIT}_h6", 6)):  # names in the settings of DINO and of this project
        network = files.vit(heads=heads)
        content = {"teacher": files.prefixed("backbone.", network.state_dict()), "args": {"arch": named}}
        read = load_backbone(saved(tmp_path, content))
        assert read.heads_assumed == 0
        assert_same_output(read, network)


def test_moco_v3_vit_small_has_twelve_heads(tmp_path: Path) -> None:
    network = files.vit(width=384, heads=12)
    read = load_backbone(saved(tmp_path, files.moco_v3(network, network)))
    assert (read.arch, read.heads_assumed) == ("vit_small_2_p16_64_h12", 0)
    assert_same_output(read, network)


# ---- docs/checkpoints.md


def test_documentation_names_every_layout_and_every_ignored_key() -> None:
    text = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    table = text.partition("## Layouts")[2].partition("## Architectures")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    assert {row[1].strip() for row in rows[2:]} == set(Layout)
    named = set(re.findall(r"`([\w.]+)`", text.partition("Ignored, and reported:")[2].partition("\n\n")[0]))
    for key in (*CLASSIFIERS, *OF_TRAINING):
        assert {key, key.rstrip("*"), key.rstrip(".*")} & named or key.startswith("decoder_"), key
