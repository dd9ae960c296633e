"""Reading checkpoints of any known kind: the right network, strictly, executing nothing."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import differing_bits, run, save, tensors_of, tiny_config
from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.models import build_backbone
from dino_xcit.models.xcit import XCIT_SIZES
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import hash_state, load_backbone

ARCH = "xcit_pico_4_p4"


def fresh_state(seed: int = 0, arch: str = ARCH) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return build_backbone(arch).state_dict()


def full_dino_file(path: Path, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file as DINO's trainer writes it for XCiT: DistributedDataParallel's prefix on both networks, the arguments
    as a Namespace, and learning rates as the NumPy numbers of its schedules. Returns (student, teacher)."""
    student, teacher = fresh_state(1), fresh_state(2)
    head = {"mlp.0.weight": torch.randn(4, 64), "last_layer.weight_g": torch.ones(9, 1)}

    def wrapped(backbone: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"module.backbone.{k}": v for k, v in backbone.items()} | {
            f"module.head.{k}": v for k, v in head.items()
        }

    schedule = np.linspace(0, 5e-4, 5)
    content = {
        "student": wrapped(student),
        "teacher": wrapped(teacher),
        "optimizer": {
            "state": {0: {"step": 7, "exp_avg": torch.zeros(2)}},
            "param_groups": [{"lr": schedule[3], "weight_decay": np.float64(0.04), "betas": (0.9, 0.9), "params": [0]}],
        },
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


def test_our_checkpoint_gives_the_network_asked_for(tmp_path: Path) -> None:
    config = tiny_config(output_dir=str(tmp_path), momentum_teacher=0.5, eval_crop=28, eval_resize=30)
    state, _ = run(config, 2)
    path = save(state, config)
    teacher = load_backbone(path)
    assert same(teacher.backbone.state_dict(), state.method.teacher.backbone.state_dict())
    assert same(loaded(path, network="student"), state.method.student.backbone.state_dict())
    assert teacher.network == "teacher"
    assert teacher.arch == ARCH
    assert teacher.data == "sample:fashion-mnist"
    assert teacher.transform == EvalTransform(30, 28, "bicubic", config.mean, config.std)
    assert teacher.training["out_dim"] == 48
    assert teacher.path == path
    assert "teacher" in teacher.describe()
    assert teacher.hash[:12] in teacher.describe()


def test_the_backbone_is_frozen_and_in_eval_mode(tmp_path: Path) -> None:
    torch.save(fresh_state(), tmp_path / "b.pth")
    backbone = load_backbone(tmp_path / "b.pth").backbone
    assert not backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_checkpoint_and_backbone_file_of_a_run_have_the_same_hash(tmp_path: Path) -> None:
    config = tiny_config(output_dir=str(tmp_path))
    path = save(run(config, 1)[0], config)
    whole, bare = load_backbone(path), load_backbone(tmp_path / "backbone.pth")
    assert whole.hash == bare.hash
    assert bare.network == "the only network"
    assert whole.hash != load_backbone(path, network="student").hash


def test_a_full_dino_file_gives_teacher_or_student(tmp_path: Path) -> None:
    student, teacher = full_dino_file(tmp_path / "full.pth")
    read = load_backbone(tmp_path / "full.pth")
    assert same(read.backbone.state_dict(), teacher)
    assert same(loaded(tmp_path / "full.pth", network="student"), student)
    assert not same(student, teacher)
    assert (read.arch, read.network, read.data) == (ARCH, "teacher", "/imagenet/train")
    assert read.transform == EvalTransform()
    assert read.training["lr"] == 0.0005


def test_a_full_dino_file_written_with_an_older_numpy_reads_too(tmp_path: Path) -> None:
    """Before NumPy 2 its numbers were pickled under numpy.core; every published file is of that time."""
    _, teacher = full_dino_file(tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        renamed = 0
        for entry in new.infolist():
            data = new.read(entry)
            if entry.filename.endswith("data.pkl"):
                renamed = data.count(b"numpy._core.multiarray")
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            old.writestr(entry, data)
    assert renamed or b"numpy.core.multiarray" in (tmp_path / "new.pth").read_bytes()
    assert same(loaded(tmp_path / "old.pth"), teacher)


def test_a_teacher_without_ddp_prefix_reads_as_well(tmp_path: Path) -> None:
    """DINO wraps the teacher only where it has BatchNorm."""
    _, teacher = full_dino_file(tmp_path / "full.pth")
    full_dino_file(tmp_path / "full.pth", teacher={f"backbone.{k}": v for k, v in teacher.items()})
    assert same(loaded(tmp_path / "full.pth"), teacher)


def test_a_file_with_one_network_says_which(tmp_path: Path) -> None:
    full_dino_file(tmp_path / "full.pth", teacher=None)
    with pytest.raises(InputError, match="--network student"):
        load_backbone(tmp_path / "full.pth")
    assert loaded(tmp_path / "full.pth", network="student")
    with pytest.raises(InputError, match="expected one of teacher, student"):
        load_backbone(tmp_path / "full.pth", network="ema")


@pytest.mark.parametrize("args", [None, 3, "text", [1], {}])
def test_arguments_of_another_kind_do_not_matter(tmp_path: Path, args: object) -> None:
    _, teacher = full_dino_file(tmp_path / "full.pth", args=args)
    read = load_backbone(tmp_path / "full.pth")
    assert same(read.backbone.state_dict(), teacher)
    assert read.data is None


@pytest.mark.parametrize(
    "arch",
    [
        "xcit_nano_12_p16",
        "xcit_nano_12_p8",
        "xcit_tiny_12_p16",
        "xcit_small_12_p4",
        "xcit_micro_4_p4",
        "xcit_pico_4_p16",
    ],
)
def test_the_architecture_is_read_off_the_shapes(tmp_path: Path, arch: str) -> None:
    torch.save(fresh_state(arch=arch), tmp_path / "b.pth")
    assert load_backbone(tmp_path / "b.pth").arch == arch


def test_no_two_architectures_have_the_same_shapes() -> None:
    shapes = {(size.dim, size.depth, size.heads) for size in XCIT_SIZES.values()}
    assert len(shapes) == len(XCIT_SIZES)


def test_a_timm_backbone_needs_its_name_or_a_checkpoint_that_says_it(tmp_path: Path) -> None:
    state = build_backbone("timm:test_vit").state_dict()
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(InputError, match="--arch"):
        load_backbone(tmp_path / "b.pth")
    assert same(loaded(tmp_path / "b.pth", arch="timm:test_vit"), state)
    full = {"teacher": {f"backbone.{k}": v for k, v in state.items()}, "args": {"arch": "timm:test_vit"}}
    torch.save(full, tmp_path / "full.pth")
    assert load_backbone(tmp_path / "full.pth").arch == "timm:test_vit"


# ---- what does not fit


@pytest.mark.parametrize(
    "lost", ["cls_token", "blocks.0.attn.temperature", "norm.bias", "blocks.3.local_mp.bn.running_var"]
)
def test_a_missing_key_is_named(tmp_path: Path, lost: str) -> None:
    state = fresh_state()
    del state[lost]
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(InputError, match=lost.replace(".", r"\.") if lost != "cls_token" else "--arch"):
        load_backbone(tmp_path / "b.pth")
    with pytest.raises(InputError, match=rf"lacks .*{lost}"):
        load_backbone(tmp_path / "b.pth", arch=ARCH)


def test_an_xcit_without_any_temperature_is_refused(tmp_path: Path) -> None:
    state = {key: value for key, value in fresh_state().items() if not key.endswith("temperature")}
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(InputError, match="temperature"):
        load_backbone(tmp_path / "b.pth")


def test_another_architecture_names_the_first_few_keys(tmp_path: Path) -> None:
    torch.save(fresh_state(), tmp_path / "b.pth")
    with pytest.raises(
        InputError, match=r"does not fit xcit_nano_12_p4, it looks like xcit_pico_4_p4: it lacks .*, .* and \d+ more"
    ) as caught:
        load_backbone(tmp_path / "b.pth", arch="xcit_nano_12_p4")
    assert "another shape" in str(caught.value)
    with pytest.raises(InputError, match="xcit_pico_4_p4"):
        load_backbone(tmp_path / "b.pth", arch="xcit_picco_4_p4")


def test_a_network_without_backbone_keys_is_refused(tmp_path: Path) -> None:
    torch.save({"teacher": {"head.weight": torch.zeros(1)}}, tmp_path / "b.pth")
    with pytest.raises(InputError, match="not a DINO checkpoint"):
        load_backbone(tmp_path / "b.pth")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {}}, {"model": 5}, [1], torch.zeros(3)])
def test_files_of_no_known_kind_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "b.pth")
    with pytest.raises(InputError):
        load_backbone(tmp_path / "b.pth")


class Executes:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


class Evaluates(Executes):
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return eval, (f"__import__('os').mkdir({str(self.mark)!r})",)


@pytest.mark.parametrize("kind", [Executes, Evaluates])
@pytest.mark.parametrize("place", ["top", "args", "namespace", "number"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_execute_something_is_refused_unexecuted(
    tmp_path: Path, kind: type[Executes], place: str, zipped: bool
) -> None:
    mark = tmp_path / "ran"
    evil: Any = kind(mark)
    path = tmp_path / "evil.pth"
    if place == "top":
        torch.save(evil, path, _use_new_zipfile_serialization=zipped)
    else:
        changes = {
            "args": {"args": evil},
            "namespace": {"args": argparse.Namespace(arch=evil)},
            "number": {"epoch": np.array([evil], dtype=object)},
        }[place]
        content = {"teacher": {f"backbone.{k}": v for k, v in fresh_state().items()}, **changes}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"read safely: it holds .*could run a program") as caught:
        load_backbone(path)
    assert not mark.exists()
    assert "weights_only" not in str(caught.value)  # PyTorch's text tells how to run it all the same
    torch.load(path, weights_only=False)  # (the trap does spring where a file is trusted)
    assert mark.exists()


def test_allowing_dinos_namespace_ends_with_the_reading(tmp_path: Path) -> None:
    full_dino_file(tmp_path / "full.pth", optimizer={})
    load_backbone(tmp_path / "full.pth")
    with pytest.raises(pickle.UnpicklingError, match="Namespace"):
        torch.load(tmp_path / "full.pth", weights_only=True)


# ---- hashes


def test_the_hash_follows_names_types_shapes_and_values() -> None:
    base = {"a": torch.arange(6.0), "b": torch.tensor(3)}
    value = hash_state(base)
    assert hash_state({"b": torch.tensor(3), "a": torch.arange(6.0)}) == value  # order does not matter
    assert hash_state({"a": torch.arange(12.0)[::2] / 2, "b": torch.tensor(3)}) == value  # nor the strides
    others = [
        base | {"a": torch.arange(6.0) + 1e-6},
        base | {"a": torch.arange(6.0).view(2, 3)},
        base | {"a": torch.arange(6)},
        base | {"b": torch.tensor(4)},
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"]},
    ]
    assert len({value, *(hash_state(other) for other in others)}) == 7
