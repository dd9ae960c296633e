"""The code that a GPU runs, on fake CUDA tensors: no device wait, no blocking copy, no mixed devices, few launches.

The backward pass needs a C++ compiler and a process of its own (benchmarks/fake_cuda.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_xcit.config import PretrainConfig
from dino_xcit.methods.student_teacher import choose_precision
from dino_xcit.models.xca import XCA
from dino_xcit.models.xcit import XCIT_SIZES, XCiTSize
from dino_xcit.runtime import distributed
from dino_xcit.train import build_state

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import fake_cuda  # noqa: E402

pytestmark = pytest.mark.process
CUDA = fake_cuda.CUDA
SMALL: dict[str, Any] = {"out_dim": 512, "head_hidden_dim": 64, "head_bottleneck_dim": 32, "local_crops_number": 2}

MAX_LAUNCHES, MAX_UPDATE_LAUNCHES, MAX_GB = 4187, 43, 159.1
"""Ceilings for a step of S12/16 at batch 64 in bf16. Lower them when the counts drop."""
MAX_FUSED_LAUNCHES, MAX_FUSED_GB = 1857, 95.0
"""The same with Triton kernels."""

AUGMENTATION_LAUNCHES = 28
"""Of the photometric part of a batch: a copy and 13 Triton kernels for each of two sizes; each also has a fill."""
MAX_FORWARD_LAUNCHES = {("gram path", "bf16"): 677, ("gram path", "fp32"): 511}


# ---- forward pass


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("arch", ["xcit_1_p16", "xcit_1_p8", "gram path", "vit_tiny_2_p16", "timm:resnet18"])
def test_forward_pass_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, arch: str, precision: str) -> None:
    monkeypatch.setitem(XCIT_SIZES, "xcit_1", XCiTSize(64, 1, 4, 1.0))
    name = "xcit_1_p8" if arch == "gram path" else arch
    config = PretrainConfig(arch=name, device="cuda", precision=precision, batch_size_per_gpu=4, **SMALL)
    ledger = fake_cuda.Ledger()
    with fake_cuda.fake_cuda():
        method = build_state(config, CUDA).method
        for module in method.student.modules():
            if isinstance(module, XCA):
                module.path = "gram" if arch == "gram path" else "auto"
        batch = fake_cuda.fake_batch(config)
        with ledger:
            student, teacher = method.forward(batch)
        devices = {one.device for one in (student.logits, teacher.logits, teacher.features)}
    assert (student.logits.shape, devices) == ((4 * 4, 512), {CUDA})
    assert [ledger.waits, ledger.blocking_copies, ledger.mixed_devices, ledger.slow_foreach] == [[], [], [], {}]
    assert 100 < ledger.total()[0] <= MAX_FORWARD_LAUNCHES.get((arch, precision), 1000)


# ---- whole steps, in processes of their own


def lines_of(program: str, *words: Any) -> list[dict[str, Any]]:
    """Run a program and return the JSON that it prints."""
    command = [sys.executable, "-c", program, str(BENCHMARKS.parent), str(BENCHMARKS), *map(json.dumps, words)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


CASES: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulation_steps": 2},
    "checkpointing": {"activation_checkpointing": "on"},
    "fp16": {"precision": "fp16"},
    "fp32": {"precision": "fp32"},
    "sgd": {"optimizer": "sgd", "clip_mode": "global"},
    "lars": {"optimizer": "lars"},
    "sinkhorn and koleo": {"centering": "sinkhorn_knopp", "koleo_weight": 0.1},
    "simdino": {"method": "simdino"},
    "BatchNorm in the head": {"use_bn_in_head": True, "norm_last_layer": False},
    "no drop path": {"drop_path_rate": 0.0},
    "gram path": {"arch": "xcit_nano_12_p8", "global_crops_size": 512, "local_crops_size": 384},
    "vit": {"arch": "vit_tiny_12_p16"},
    "resnet": {"arch": "timm:resnet18"},
    "fused": {"kernels": "fused"},
    "fused, eight ranks": {"kernels": "fused", "ranks": 8},
    "fused, checkpointing, fp16": {"kernels": "fused", "activation_checkpointing": "on", "precision": "fp16"},
    "eight ranks": {"ranks": 8},
    "eight ranks, timm": {"ranks": 8, "arch": "timm:resnet18"},
}
STEP = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import fake_cuda
fake_cuda.enable_backward()
for settings in json.loads(sys.argv[3]):
    ledger = fake_cuda.Ledger()
    with ledger:
        state = fake_cuda.fake_step(**settings)
    gradients = [
        [[stride for stride, size in zip(one.stride(), one.shape) if size > 1] for one in (parameter.grad, parameter)]
        for parameter in state.parameters.values() if parameter.grad is not None
    ]
    print(json.dumps({
        "clean": [ledger.waits, ledger.blocking_copies, ledger.mixed_devices, ledger.slow_foreach],
        "strides": [len(gradients), sum(one != other for one, other in gradients)],
        "total": ledger.total(), "update": ledger.total("update")[0],
    }))
"""

needs_compiler = pytest.mark.skipif(
    torch.version.cuda is not None and fake_cuda.compiler() is None, reason="no C++ compiler for the backward pass"
)


def steps(*settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a step with each of these settings in one process."""
    return lines_of(STEP, list(settings))


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    """A step of S12/16 with AdamW, one of a small network with LARS, and one of S12/16 with Triton kernels."""
    return steps({}, {"batch": 2, "arch": "xcit_pico_4_p16", "optimizer": "lars"} | SMALL, {"kernels": "fused"})


@needs_compiler
def test_step_of_s12_is_clean_and_stays_below_its_ceilings(measured: list[dict[str, Any]]) -> None:
    found = measured[0]
    assert found["clean"] == [[], [], [], {}]
    assert found["strides"][0] > 300
    assert found["strides"][1] == 0
    launches, gigabytes = found["total"]
    assert (launches <= MAX_LAUNCHES, gigabytes <= MAX_GB + 0.05) == (True, True), found
    assert 30 <= found["update"] <= MAX_UPDATE_LAUNCHES


@needs_compiler
def test_step_with_triton_kernels_is_clean_and_stays_below_its_ceilings(measured: list[dict[str, Any]]) -> None:
    found = measured[2]
    assert (found["clean"], found["strides"][1]) == ([[], [], [], {}], 0)
    launches, gigabytes = found["total"]
    assert (launches <= MAX_FUSED_LAUNCHES, gigabytes <= MAX_FUSED_GB + 0.05) == (True, True), found


@needs_compiler
def test_lars_launches_do_not_grow_with_the_number_of_tensors(measured: list[dict[str, Any]]) -> None:
    assert measured[1]["clean"] == [[], [], [], {}]
    assert 30 < measured[1]["update"] < 100


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_step_is_clean_in_every_setting(case: str) -> None:
    (found,) = steps({"batch": 4, "arch": "xcit_nano_12_p16"} | SMALL | CASES[case])
    assert found["clean"] == [[], [], [], {}]
    assert found["strides"][1] == 0
    assert 20 < found["update"] < 160


# ---- augmentation

AUGMENTATION = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import fake_cuda, kernels
with fake_cuda.launches_of_triton() as launches, fake_cuda.Ledger() as ledger:
    fake_cuda.fake_augmentation(64)
ptx = kernels.compiled(launches["colour_kernel"], 90).asm["ptx"]
print(json.dumps({
    "clean": [ledger.waits, ledger.blocking_copies, ledger.mixed_devices], "launches": ledger.total()[0],
    "instructions": [word for word in ("fma.", "div.full", "div.approx", "div.rn.f32") if word in ptx],
}))
"""


@needs_compiler
def test_augmentation_on_the_device_has_few_launches_and_rounds_like_the_host() -> None:
    pytest.importorskip("triton")
    [found] = lines_of(AUGMENTATION)
    assert found["clean"] == [[], [], []]
    assert found["launches"] == AUGMENTATION_LAUNCHES
    assert found["instructions"] == ["div.rn.f32"], "others round differently"


# ---- evaluation

EVALUATION = """
import contextlib, json, sys
sys.path[:0] = sys.argv[1:3]
import fake_cuda, numpy as np, torch
import eval.features
from dino_xcit.config import PretrainConfig
from dino_xcit.data import Subset, open_source
from dino_xcit.train import build_state
from eval.features import feature_rows
from eval.knn.online import build_evaluators
from eval.linear.sgd import LinearHeads
from eval.linear.views import kept_features
from eval.pooling import Descriptor
from torch._subclasses.fake_tensor import DataDependentOutputException

fake_cuda.enable_backward()
CUDA = fake_cuda.CUDA

def batches(source, transform, chunks, *_):  # a DataLoader draws a seed, which a fake tensor does not have
    for chunk in chunks:
        pixels = torch.zeros(len(chunk), 3, transform.crop, transform.crop, dtype=torch.uint8)
        yield pixels, list(range(len(chunk))), None

eval.features.image_batches = batches
pinned = []
torch.Tensor.pin_memory = lambda self: pinned.append(self.shape) or self
torch.Tensor.numpy = lambda self: np.zeros(self.shape, "f4" if self.is_floating_point() else "i8")

def probe(method):
    heads = LinearHeads([0.1, 0.2], 5, 16, 0, CUDA)
    labels, taken = torch.zeros(20, dtype=torch.int64, device=CUDA), torch.ones(20, device=CUDA)
    yield
    for rows, chosen in kept_features([np.zeros((20, 16), np.float16)], [[(0, 3), (0, 4)]], CUDA):
        heads.step(rows, labels[chosen], taken[chosen], 0.5)

def extraction(method):
    source = Subset(open_source("sample:fashion-mnist", "val"), np.arange(10))
    how, transform = Descriptor(precision="bf16"), config.eval_transform()
    yield
    chunks = feature_rows(method.eval_backbone, source, transform, CUDA, 4, 0, False, "skip", how)
    assert [len(rows) for rows, _ in chunks] == [4, 4, 2]

def knn(method):
    (evaluator,) = build_evaluators(config, open_source("sample:fashion-mnist", "train"), CUDA)
    yield
    with contextlib.suppress(DataDependentOutputException):  # the result is read at the end
        evaluator.measure(method)

config = PretrainConfig(
    arch="xcit_pico_4_p4", device="cuda", data_path="sample:fashion-mnist", knn_every=1, knn_max_images=300,
    knn_holdout=200,
)
for run in (probe, extraction, knn):
    ledger = fake_cuda.Ledger()
    with fake_cuda.fake_cuda():
        method = build_state(config, CUDA).method
        fake_cuda.fake_batch(config)
        steps = run(method)
        next(steps)
        with ledger:
            next(steps, None)
    print(json.dumps([ledger.waits, ledger.blocking_copies, ledger.mixed_devices, len(pinned)]))
"""


@needs_compiler
@pytest.mark.slow
def test_evaluation_waits_for_the_device_once_per_batch() -> None:
    probe, extraction, knn = lines_of(EVALUATION)
    assert probe == [[], [], [], 2]
    assert extraction[0] == extraction[2] == []
    assert len(extraction[1]) == 3, "one copy of the features of each batch"
    assert all("cuda:0 to cpu" in copy for copy in extraction[1])
    assert len(knn[0]) == 1, "the result"
    assert "online.py" in knn[0][0]
    assert knn[2] == []


def test_peak_is_the_memory_that_lives_at_once() -> None:
    ledger = fake_cuda.Ledger()
    with fake_cuda.fake_cuda(), ledger:
        first = torch.empty(1000, dtype=torch.uint8, device="cuda")
        second = first + 1
        del first
        third = second.view(10, 100).mul_(2) + 1
        assert ledger.peak == 2000
        both = second.sum(dtype=torch.int64), third + 1
    assert len(both) == 2
    assert ledger.peak == 3008


def test_count_without_compiler_ends_with_one_sentence() -> None:
    words = [sys.executable, str(BENCHMARKS / "step.py"), "--count"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, env={"PATH": "/nonexistent"})
    if torch.version.cuda is None:
        pytest.skip("a CPU build needs no compiler")
    assert (ended.returncode, "found no C++ compiler" in ended.stderr) == (2, True), ended.stderr


# ---- what depends on the device


def test_gpu_that_emulates_bfloat16_trains_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turing (T4, RTX 20) supports bfloat16 only by emulation."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose_precision("auto", CUDA) is torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_precision("auto", CUDA) is torch.bfloat16


def test_seed_generators_seeds_only_the_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds every GPU"))
    distributed.seed_generators(7, CUDA)
    assert seeded == [7]
    assert torch.initial_seed() == 7
