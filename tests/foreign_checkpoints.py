"""Checkpoints in the layouts of DINO, DINOv2, iBOT, MoCo, MAE, VISSL, lightly, solo-learn, timm and torchvision.

Those of Hugging Face transformers are in transformers_files.py.

The networks are small, or the smallest of torchvision. The key names follow the source code of facebookresearch/dino,
dinov2, moco, moco-v3, mae and vissl, bytedance/ibot, lightly-ai/lightly, vturrisi/solo-learn and timm 1.0.31.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit
from torch import Tensor, nn

from dino_xcit.models import DINOHead, build_backbone
from dino_xcit.transform import EvalTransform

State = dict[str, Tensor]


def vit(
    seed: int = 0, side: int = 64, patch: int = 16, width: int = 192, heads: int = 3, depth: int = 2, **more: Any
) -> VisionTransformer:
    """Build DINO's vit_tiny, by default with two blocks."""
    torch.manual_seed(seed)
    more |= {"num_classes": 0, "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    network = VisionTransformer(side, patch, embed_dim=width, depth=depth, num_heads=heads, **more)
    return shaken(network, seed)


def xcit(seed: int = 0) -> nn.Module:
    """Build this project's XCiT, which has the official key names of all published XCiT files."""
    torch.manual_seed(seed)
    return shaken(build_backbone("xcit_pico_4_p8"), seed)


def timm_xcit(seed: int = 0, classes: int = 0) -> Xcit:
    """Build timm's XCiT of the same size, with timm's key names."""
    torch.manual_seed(seed)
    return shaken(Xcit(patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=classes, tokens_norm=True), seed)


@cache
def resnet(seed: int = 0) -> nn.Module:
    """Build torchvision's smallest ResNet without its classifier, as DINO and solo-learn do."""
    torch.manual_seed(seed)
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    return shaken(network, seed)


def shaken(network: Any, seed: int) -> Any:
    """Move all weights, biases and statistics away from 0 and 1, so that each affects the output; use eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            if value.is_floating_point():
                value.mul_(0.9 + 0.2 * torch.rand(value.shape, generator=generator))
                if value.ndim == 1:  # biases and running means start at 0
                    value.add_(0.1 * torch.rand(value.shape, generator=generator))
    return network.eval()


def head(width: int, seed: int = 0) -> State:
    """Return the weights of a DINO head with hidden width 8, bottleneck width 6 and 12 prototypes."""
    torch.manual_seed(seed)
    return dict(DINOHead(width, 12, hidden_dim=8, bottleneck_dim=6).state_dict())


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def _with_head(wrapper: str, backbone: State, head: State) -> State:
    return prefixed(wrapper, prefixed("backbone.", backbone) | prefixed("head.", head))


def dino(student: nn.Module, teacher: nn.Module, width: int, teacher_wrapped: bool = False) -> dict[str, Any]:
    """Layout of main_dino.py: the student is in DistributedDataParallel, the teacher only if it has BatchNorm."""
    return {
        "student": _with_head("module.", dict(student.state_dict()), head(width, 1)),
        "teacher": _with_head("module." if teacher_wrapped else "", dict(teacher.state_dict()), head(width, 2)),
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_tiny", patch_size=16, out_dim=12),
        "dino_loss": {"center": torch.zeros(1, 12)},
    }


def dinov2_vit(seed: int = 0, registers: int = 0, side: int = 56) -> tuple[VisionTransformer, State]:
    """Return a ViT like DINOv2's, and its weights in the layout of ``..._pretrain.pth``."""
    more: dict[str, Any] = {"reg_tokens": registers, "no_embed_class": True} if registers else {}
    network = vit(seed, side=side, patch=14, depth=4, init_values=1.0, **more)
    state = dict(network.state_dict())
    if registers:  # DINOv2 stores the position of the class token separately; timm adds it to the token
        position = torch.rand(1, 1, 192, generator=torch.Generator().manual_seed(seed))
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"].clone()
        with torch.no_grad():
            network.cls_token.add_(position)  # type: ignore[union-attr]
    return network, state | {"mask_token": torch.zeros(1, 192)}


def chunked(state: State, blocks_a_chunk: int = 2) -> State:
    """Rename blocks as in DINOv2's training: in chunks, with block numbers that continue across chunks."""

    def name(key: str) -> str:
        _, number, rest = key.split(".", 2)
        return f"blocks.{int(number) // blocks_a_chunk}.{number}.{rest}"

    return {name(key) if key.startswith("blocks.") else key: value for key, value in state.items()}


def dinov2_network(state: State, seed: int) -> State:
    """Return the backbone, the DINO head and the iBOT head, as in teacher_checkpoint.pth."""
    heads = prefixed("dino_head.", head(192, seed=seed)) | prefixed("ibot_head.", head(192, seed=seed + 10))
    return prefixed("backbone.", state) | heads


def moco_v3(student: nn.Module, teacher: nn.Module, projector: str = "head") -> dict[str, Any]:
    """Layout of main_moco.py. ``projector`` is the encoder's name for its classifier, ``head`` or ``fc``."""
    layers = {"0.weight": torch.zeros(8, 4), "1.weight": torch.zeros(8), "1.running_mean": torch.zeros(8)}
    state = prefixed("module.predictor.", layers)
    for name, network in (("base_encoder", student), ("momentum_encoder", teacher)):
        state |= prefixed(f"module.{name}.", dict(network.state_dict()) | prefixed(f"{projector}.", layers))
    return {"epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": {}, "scaler": {}}


def moco(student: nn.Module, teacher: nn.Module | None) -> dict[str, Any]:
    """Layout of facebookresearch/moco, version 2. Its published files have only the student."""
    layer = {"fc.0.weight": torch.zeros(4, 512), "fc.0.bias": torch.zeros(4)}
    state = prefixed("module.encoder_q.", dict(student.state_dict()) | layer)
    if teacher is not None:
        state |= prefixed("module.encoder_k.", dict(teacher.state_dict()) | layer)
        state |= {"module.queue": torch.zeros(4, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {}}


def mae(network: nn.Module) -> dict[str, Any]:
    """Layout of a MAE with its decoder, as in mae_visualize_... and checkpoint-N.pth."""
    decoder = {
        "mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8),
        "decoder_embed.weight": torch.zeros(8, 192), "decoder_embed.bias": torch.zeros(8),
        "decoder_blocks.0.norm1.weight": torch.zeros(8), "decoder_blocks.0.attn.qkv.weight": torch.zeros(24, 8),
        "decoder_norm.weight": torch.zeros(8), "decoder_pred.weight": torch.zeros(768, 8),
    }  # fmt: skip
    return {"model": dict(network.state_dict()) | decoder, "epoch": 800, "args": argparse.Namespace(mask_ratio=0.75)}


def ibot(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """Layout of main_ibot.py: as DINO, with a second last layer for patches and the student's mask token."""

    second = {"last_layer2.weight_g": torch.ones(9, 1), "last_layer2.weight_v": torch.zeros(9, 6)}
    masked = dict(student.state_dict()) | {"masked_embed": torch.zeros(1, 192)}
    return {
        "student": _with_head("module.", masked, head(192, 1) | second),
        "teacher": _with_head("", dict(teacher.state_dict()), head(192, 2) | second),
        "epoch": 9,
        "args": argparse.Namespace(arch="vit_tiny", patch_size=16),
        "ibot_loss": {"center": torch.zeros(1, 12), "center2": torch.zeros(1, 1, 9)},
    }


def vissl(trunk: State, heads: State | None = None, teacher: State | None = None) -> dict[str, Any]:
    """Layout of VISSL. ``teacher`` is the teacher's trunk, stored in the state dict of the DINO loss."""
    model = {"model": {"trunk": trunk, "heads": heads or {}}, "meta": {"trunk": {}, "heads": []}}
    content = {"phase_idx": 9, "classy_state_dict": {"train": True, "base_model": model}}
    if teacher is not None:
        content["loss"] = {"center": torch.zeros(1, 12)} | prefixed("momentum_teacher.module.trunk.", teacher)
    return content


def vissl_resnet(network: nn.Module) -> dict[str, Any]:
    return vissl(prefixed("_feature_blocks.", network.state_dict()), {"0.clf.0.weight": torch.zeros(3, 512)})


def vissl_dino(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """Layout of VISSL's DINO with an XCiT; the first head of the student is a dino_head."""
    heads = {f"0.{key.replace('last_layer', 'prototypes0')}": value for key, value in head(64).items()}
    return vissl(dict(student.state_dict()), heads, dict(teacher.state_dict()))


def lightly_head(width: int) -> State:
    return {key.replace("mlp.", "layers."): value for key, value in head(width).items()}


def lightning(state: State) -> dict[str, Any]:
    other = {"pytorch-lightning_version": "2.1.0", "loops": {"fit_loop": {"state_dict": {}}}, "optimizer_states": []}
    return {"epoch": 1, "state_dict": state, "hyper_parameters": {"batch_size_per_device": 8}, **other}


def lightly_module(network: nn.Module) -> dict[str, Any]:
    return lightning(prefixed("backbone.", network.state_dict()) | {"projection_head.w": torch.ones(1)})


def lightly_example(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """Layout of lightly's DINO example: torchvision's ResNet as a Sequential without its last layer."""

    def cut(network: nn.Module) -> State:
        return dict(nn.Sequential(*list(network.children())[:-1]).state_dict())

    state = prefixed("student_backbone.", cut(student)) | prefixed("teacher_backbone.", cut(teacher))
    heads = prefixed("student_head.", lightly_head(512)) | prefixed("teacher_head.", lightly_head(512))
    return lightning(state | heads)


def lightly_benchmark(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """Layout of lightly's ImageNet benchmark: "backbone" is the teacher, and both networks wrap a timm ViT."""
    return lightning(
        prefixed("backbone.vit.", teacher.state_dict())
        | prefixed("projection_head.", lightly_head(192))
        | prefixed("student_backbone.vit.", student.state_dict())
        | prefixed("student_projection_head.", lightly_head(192))
        | {"criterion.center.center": torch.zeros(1, 12), "online_classifier.linear.weight": torch.zeros(9, 192)}
    )


def lightly_moco(query: nn.Module, key: nn.Module) -> dict[str, Any]:
    """Layout of lightly's MoCo v2 benchmark: "backbone" is the key encoder, which follows the query encoder."""
    layer = {"layers.0.weight": torch.zeros(4, 512), "layers.0.bias": torch.zeros(4)}
    return lightning(
        prefixed("backbone.", key.state_dict())
        | prefixed("projection_head.", layer)
        | prefixed("query_backbone.", query.state_dict())
        | prefixed("query_projection_head.", layer)
        | {"criterion.memory_bank.bank": torch.zeros(4, 16), "online_classifier.linear.weight": torch.zeros(9, 512)}
    )


def lightly_momentum(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """Layout of lightly's momentum methods, such as BYOL and MoCo."""
    both = prefixed("backbone.", student.state_dict()) | prefixed("backbone_momentum.", teacher.state_dict())
    return lightning(both | {"projection_head.layers.0.weight": torch.zeros(4, 512)})


def solo_learn(student: nn.Module, teacher: nn.Module, width: int) -> dict[str, Any]:
    return lightning(
        prefixed("backbone.", student.state_dict())
        | prefixed("classifier.", {"weight": torch.zeros(9, width), "bias": torch.zeros(9)})
        | prefixed("head.", head(width))
        | prefixed("momentum_backbone.", teacher.state_dict())
        | prefixed("momentum_head.", head(width))
        | {"dino_loss_func.center": torch.zeros(1, 12)}
    )


XCIT_CONFIG: dict[str, Any] = {
    "architecture": "xcit_nano_12_p16_224",
    "num_classes": 7,
    "pretrained_cfg": {
        "input_size": [3, 64, 64], "interpolation": "bilinear", "crop_pct": 0.8, "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "classifier": "head",
    },
}  # fmt: skip
"""Content of a config.json from timm."""
XCIT_TRANSFORM = EvalTransform(resize=80, crop=64, interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)


def save_safetensors(path: Path, state: Mapping[str, Tensor], said: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path, dict(said or {}))
    return path


def timm_folder(folder: Path, network: nn.Module, config: Mapping[str, Any]) -> Path:
    """Write a folder as ``timm.models.save_for_hf`` does: model.safetensors and config.json. Return the former."""
    path = save_safetensors(folder / "model.safetensors", network.state_dict())
    (folder / "config.json").write_text(json.dumps(config))
    return path


def hub_snapshot(cache: Path, repository: str) -> Path:
    """Return the snapshot folder of a repository in the cache of huggingface_hub, and write its ``refs/main``."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    return root / "snapshots" / ("0" * 40)
