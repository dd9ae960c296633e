"""Checkpoint reading: choice of the network, inferred architecture, strict comparison of keys, hash."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_checkpoints as files
import numpy as np
import pytest
import torch
from tiny_run import differing_bits, run, save, tensors_of, tiny_config
from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.models import build_backbone
from dino_xcit.runtime import logging as log
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import Allowed, hash_state, load_backbone

ARCH = "xcit_pico_4_p4"


def fresh_state(seed: int = 0, arch: str = ARCH) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return build_backbone(arch).state_dict()


def full_dino_file(path: Path, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write a file as DINO's trainer does for XCiT, and return (student, teacher).

    Both networks have the prefix of DistributedDataParallel, the arguments are a Namespace, and the learning rates are
    NumPy numbers from the schedules.
    """
    student, teacher = fresh_state(1), fresh_state(2)
    head = {"module.head.mlp.0.weight": torch.randn(4, 64), "module.head.last_layer.weight_g": torch.ones(9, 1)}
    rates = {"lr": np.linspace(0, 5e-4, 5)[3], "weight_decay": np.float64(0.04), "betas": (0.9, 0.9), "params": [0]}
    content = {
        "student": files.prefixed("module.backbone.", student) | head,
        "teacher": files.prefixed("module.backbone.", teacher) | head,
        "optimizer": {"state": {0: {"step": 7, "exp_avg": torch.zeros(2)}}, "param_groups": [rates]},
        "epoch": 12,
        "args": argparse.Namespace(
            arch="xcit_pico_4", patch_size=4, out_dim=9, lr=0.0005, use_fp16=True, global_crops_scale=(0.4, 1.0),
            data_path="/imagenet/train", gpu=0, dist_url="env://",
        ),
        "dino_loss": {"center": torch.zeros(1, 9)},
        "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3},
    }  # fmt: skip
    torch.save(content | changes, path)
    return student, teacher


def loaded(path: Path, **options: Any) -> dict[str, Tensor]:
    return load_backbone(path, **options).backbone.state_dict()


def same(a: Any, b: Any) -> bool:
    return differing_bits(tensors_of(dict(a)), tensors_of(dict(b))) == []


Written = Callable[[object], Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Return a function that saves its argument, always to the same path."""

    def write(content: object) -> Path:
        torch.save(content, tmp_path / "b.pth")
        return tmp_path / "b.pth"

    return write


def test_own_checkpoint_gives_requested_network(tmp_path: Path) -> None:
    config = tiny_config(output_dir=str(tmp_path), momentum_teacher=0.5, eval_crop=28, eval_resize=30)
    state, _ = run(config, 2)
    path = save(state, config)
    teacher, bare = load_backbone(path), load_backbone(tmp_path / "backbone.pth")
    assert same(teacher.backbone.state_dict(), state.method.teacher.backbone.state_dict())
    assert same(loaded(path, network="student"), state.method.student.backbone.state_dict())
    assert (teacher.network, teacher.arch, teacher.data) == ("teacher", ARCH, "sample:fashion-mnist")
    assert teacher.transform == EvalTransform(30, 28, "bicubic", config.mean, config.std)
    assert (bare.hash, bare.network) == (teacher.hash, "the only network")
    assert not teacher.backbone.training
    assert not any(parameter.requires_grad for parameter in teacher.backbone.parameters())


def test_full_dino_file_gives_teacher_and_training_settings(tmp_path: Path) -> None:
    _, teacher = full_dino_file(tmp_path / "full.pth")
    read = load_backbone(tmp_path / "full.pth")
    assert same(read.backbone.state_dict(), teacher)
    assert (read.data, read.transform, read.training["lr"]) == ("/imagenet/train", EvalTransform(), 0.0005)
    with pytest.raises(pickle.UnpicklingError):  # the permission for DINO's Namespace ends with the reading
        torch.load(tmp_path / "full.pth", weights_only=True)
    with pytest.raises(InputError, match="expected one of teacher, student"):
        load_backbone(tmp_path / "full.pth", network="ema")


def test_full_dino_file_from_older_numpy_is_read(tmp_path: Path) -> None:
    """NumPy before 2 pickles its numbers under numpy.core, as in every published file."""
    _, teacher = full_dino_file(tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for entry in new.infolist():
            old.writestr(entry, new.read(entry).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy.core.multiarray" in (tmp_path / "old.pth").read_bytes()
    assert same(loaded(tmp_path / "old.pth"), teacher)


@pytest.mark.parametrize("arch", ["xcit_nano_12_p16", "xcit_micro_4_p4", "xcit_pico_4_p8"])
def test_architecture_is_inferred_from_shapes(written: Written, arch: str) -> None:
    assert load_backbone(written(fresh_state(arch=arch))).arch == arch


def test_timm_backbone_requires_given_or_stored_architecture(written: Written) -> None:
    state = build_backbone("timm:test_vit").state_dict()
    with pytest.raises(InputError, match="--arch"):
        load_backbone(written(state))
    assert same(loaded(written(state), arch="timm:test_vit"), state)
    path = written({"teacher": files.prefixed("backbone.", state), "args": {"arch": "timm:test_vit"}})
    assert load_backbone(path).arch == "timm:test_vit"


def test_non_utf8_file_name_is_read_from_pth_and_refused_for_safetensors(tmp_path: Path) -> None:
    torch.save(fresh_state(), tmp_path / "caf\udce9.pth")
    log.info(load_backbone(tmp_path / "caf\udce9.pth").describe())
    files.save_safetensors(tmp_path / "a", fresh_state()).rename(tmp_path / "caf\udce9.safetensors")
    with pytest.raises(InputError, match="not valid UTF-8"):  # by the safetensors library
        load_backbone(tmp_path / "caf\udce9.safetensors")


# ---- mismatches


@pytest.mark.parametrize("name", ["cls_token", "blocks.3.mlp.fc1.weight"])
def test_missing_unexpected_and_mismatched_keys_are_named(written: Written, name: str) -> None:
    state = fresh_state()
    wrong: dict[str, dict[str, Tensor]] = {
        f"lacks {name}": {key: value for key, value in state.items() if key != name},
        f"has besides {name}2": state | {f"{name}2": torch.zeros(2)},
        f"another shape {name}": state | {name: torch.zeros(65, 1, 2)},
        f"another type {name}": state | {name: state[name].to(torch.int64)},
        f"not finite in {name}": state | {name: state[name] * float("nan")},
    }
    for words, content in wrong.items():
        for layout in ({"teacher": files.prefixed("backbone.", content)}, content):
            with pytest.raises(InputError, match=words):
                load_backbone(written(layout), arch=ARCH)


def test_non_finite_head_is_refused(written: Written) -> None:
    content = files.dino(files.xcit(), files.xcit(), 64)
    content["teacher"]["head.last_layer.weight_v"][0, 0] = float("inf")
    with pytest.raises(InputError, match="not finite in last_layer"):
        load_backbone(written(content))


def test_num_batches_tracked_may_be_missing_in_all_layers_but_not_in_one(written: Written) -> None:
    # Files from before PyTorch 0.4.1 have no num_batches_tracked.
    state = dict(files.resnet().state_dict())
    counts = [key for key in state if key.endswith("num_batches_tracked")]
    load_backbone(written({key: value for key, value in state.items() if key not in counts}))
    del state[counts[3]]
    with pytest.raises(InputError, match=f"lacks {counts[3]}"):
        load_backbone(written(state))


def test_architecture_mismatch_names_inferred_architecture(written: Written) -> None:
    with pytest.raises(InputError, match=r"xcit_nano_12_p4, it looks like xcit_pico_4_p4: it lacks .* and \d+ more"):
        load_backbone(written(fresh_state()), arch="xcit_nano_12_p4")


def test_allowed_mismatches_load_with_reproducible_initial_values(written: Written) -> None:
    state = fresh_state() | {"mask_token2": torch.zeros(2)}
    lost = sorted(key for key in state if key.startswith("cls_attn_blocks.1.mlp."))
    path = written({key: value for key, value in state.items() if key not in lost})
    allowed = Allowed(("cls_attn_blocks.1.mlp.*",), ("mask_token2",))
    first, second = (load_backbone(path, allowed=allowed) for _ in range(2))
    assert first.allowed == (*(f"missing {key}" for key in lost), "unexpected mask_token2")
    assert first.hash == second.hash
    assert "warning: allowed" in first.describe()
    for missing in ("cls_attn_blocks.1.mlp.fc1*", "cls_attn_blocks.1.mlp."):
        with pytest.raises(InputError, match=r"lacks cls_attn_blocks\.1\.mlp\.fc"):
            load_backbone(path, allowed=Allowed((missing,), ("mask_token2",)))
    with pytest.raises(InputError, match="another shape"):
        load_backbone(written(state | {"norm.bias": torch.zeros(65)}), allowed=Allowed(("norm*",), ("norm*", "mask*")))


@pytest.mark.parametrize("pattern", ["*", "", "a*b"])
def test_invalid_or_catch_all_allow_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match="take keys"):
        load_backbone("any.pth", allowed=Allowed(missing=(pattern,)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "not a checkpoint"), ({"epoch": 3}, "its keys are epoch"), ({"model": 5}, "keys are model"),
        ([1], "contains a list"),
        ({"teacher": {"head.weight": torch.zeros(1)}}, "not a DINO checkpoint"),
        ({"classy_state_dict": {}}, "VISSL"), ({"classy_state_dict": {"base_model": {"model": 3}}}, "VISSL"),
        ({"classy_state_dict": {"base_model": {"model": {"heads": {}}}}}, "VISSL"),
    ],
)  # fmt: skip
def test_unknown_file_is_refused_with_description_of_content(written: Written, content: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_backbone(written(content))


def test_lightly_train_checkpoint_is_refused_with_hint_to_exported_file(written: Written) -> None:
    content = {"state_dict": fresh_state(), "lightly_train": {"models": {"model": torch.nn.Linear(1, 1)}}}
    with pytest.raises(InputError, match=r"exported_last\.pt"):
        load_backbone(written(content))


def test_hash_state_depends_on_names_types_shapes_and_values() -> None:
    base = {"a": torch.arange(6.0), "b": torch.tensor(3)}
    value = hash_state(base)
    assert value == "fe1d46c25a7f12c257ef7aed3dfc4231a4c46a9cf7e97ed695e9f5f125826823"
    assert hash_state({"b": torch.tensor(3), "a": torch.arange(6.0)}) == value  # independent of the order
    assert hash_state({"a": torch.arange(12.0)[::2] / 2, "b": torch.tensor(3)}) == value  # independent of the strides
    values = (base["a"] + 1e-6, base["a"].view(2, 3), base["a"].long())
    others = [*(base | {"a": value} for value in values), {"a": base["a"]}, {"a": base["a"], "c": base["b"]}]
    assert len({value, *(hash_state(other) for other in others)}) == 6
