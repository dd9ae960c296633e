"""Training step: images per second and peak memory of this project, of facebookresearch/dino (the reference), and of a
plain step with timm's XCiT.

    python benchmarks/step.py [--reference DIR] [--device cuda] [--batch N] [--rounds 7] [--only ours-fp32,ours-bf16]
        [--quick] [--against DIR]
    python benchmarks/step.py --count [--batch 64]

``--reference`` is a folder with checkouts of facebookresearch/dino as ``dino/`` and of facebookresearch/xcit as
``xcit/``. First, all rows get the same weights and crops; if losses or gradients differ, the run ends with exit code 1.
Then each row builds its step in a separate process, and the processes take turns, one step per round. Ratios are
medians over the rounds. ``--against`` adds the steps of an earlier commit, in processes that run the code of its
checkout. OMP_NUM_THREADS sets the threads per process. On a CPU all processes keep freed memory, as run_pretrain.py
does.

The last line is one JSON object. ``ratio_fp32`` is the speed of ours-fp32 divided by the reference's,
``memory_ratio_fp32`` its memory divided by the reference's, ``over_timm_fp32`` its speed divided by timm-fp32's; the
other rows have the same figures. ``against_fp32`` and ``memory_against_fp32`` compare with the earlier commit.

``--count`` runs a step of XCiT-S12/16 in bf16 on fake CUDA tensors (fake_cuda.py) without timing. The last line is
``{"eager": {"launches": ..., "GB": ..., "update": ...}, "waits": ...}``: kernel launches, bytes touched, the launches
of clipping, optimizer, EMA and buffers, and operators or copies for which the host waits.

Dimensions: B batch, V views, D features, K prototypes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dino_xcit  # noqa: E402, F401  # isort: skip  (before torch: configures idle OpenMP threads)
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from against import commit_of, exit_on_sigterm, import_peer, in_a_process, peak_memory, process_group, spread  # noqa: E402
from fake_cuda import Ledger, fake_step  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from dino_xcit.config import PretrainConfig  # noqa: E402
from dino_xcit.data.loader import Batch  # noqa: E402
from dino_xcit.data.workers import usable_cores  # noqa: E402
from dino_xcit.errors import InputError, RunStopped, near_matches, run_main  # noqa: E402
from dino_xcit.models.xcit import XCIT_SIZES  # noqa: E402
from dino_xcit.optim import Schedules  # noqa: E402
from dino_xcit.runtime import distributed  # noqa: E402
from dino_xcit.runtime.memory import keep_freed_memory  # noqa: E402
from dino_xcit.train import build_state, train_step  # noqa: E402
from dino_xcit.transform import IMAGENET_MEAN, IMAGENET_STD, normalise  # noqa: E402
from eval.table import table  # noqa: E402

Precision = Literal["fp32", "bf16", "fp16"]
State = dict[str, Tensor]
Step = Callable[..., Tensor]
"""Runs one training step on crops and returns its loss."""


@dataclass(frozen=True)
class Settings:
    """Settings of a step, the same for all rows."""

    arch: str = "xcit_small_12_p16"
    """Name of an XCiT that timm has."""
    batch: int = 4
    """Images per step."""
    out_dim: int = 65536
    """Number of prototypes K."""
    local_crops: int = 8
    """Number of local crops."""
    global_size: int = 224
    """Side of global crops in pixels."""
    local_size: int = 96
    """Side of local crops in pixels."""
    head_hidden: int = 2048
    """Width of the head's hidden layers."""
    head_bottleneck: int = 256
    """Width of the head's output before the prototypes."""
    drop_path: float = 0.1
    """Stochastic depth rate of the student."""
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(views, side in pixels) of each crop size, global crops first; the backbone runs once per crop size."""
        if self.local_crops == 0 or self.local_size == self.global_size:
            return [(2 + self.local_crops, self.global_size)]
        return [(2, self.global_size), (self.local_crops, self.local_size)]


QUICK = Settings(arch="xcit_tiny_12_p16", batch=2, out_dim=1024, local_crops=2, global_size=64, local_size=32)
"""Smoke test; figures are meaningless. The smallest network that the reference can train in fp32."""


@dataclass(frozen=True)
class Row:
    """A row of the table. Workers of earlier commits depend on these fields."""

    key: str
    """Name in --only and the JSON object."""
    title: str
    project: str
    """reference, timm or ours."""
    precision: Precision
    checkpointing: bool = False
    """Activation checkpointing."""


def rows_for(device: str) -> list[Row]:
    """Return all rows. The reference uses its defaults: fp16 on a GPU, fp32 on a CPU."""
    theirs: Precision = "fp16" if device == "cuda" else "fp32"
    return [
        Row("reference", f"facebookresearch/dino + xcit, {theirs}", "reference", theirs),
        Row("timm-fp32", "timm's XCiT in a plain step, fp32", "timm", "fp32"),
        Row("timm-bf16", "timm's XCiT in a plain step, bf16", "timm", "bf16"),
        Row("ours-fp32", "ours, fp32", "ours", "fp32"),
        Row("ours-bf16", "ours, bf16", "ours", "bf16"),
        Row("ours-fp32-ckpt", "ours, fp32, checkpointing", "ours", "fp32", checkpointing=True),
        Row("ours-bf16-ckpt", "ours, bf16, checkpointing", "ours", "bf16", checkpointing=True),
    ]


DEFAULT = ("reference", "timm-fp32", "timm-bf16", "ours-fp32", "ours-bf16")
STEPS_A_TURN = {"cpu": 1, "cuda": 10}
"""Steps overlap on a GPU, so several are timed together."""


# ---- crops


def draw_crops(settings: Settings, number: int) -> list[Tensor]:
    """Draw noise in place of a loader's crops of step ``number``, the same in every process.

    Returns:
        One tensor per crop size, [views of that size * B, 3, size, size] uint8, view-major, on the CPU; pinned for a
        GPU.
    """
    rng = np.random.default_rng([number, settings.batch])
    crops = [
        torch.from_numpy(rng.integers(0, 256, (views * settings.batch, 3, size, size), dtype=np.uint8))
        for views, size in settings.groups
    ]
    return [crop.pin_memory() for crop in crops] if settings.device == "cuda" else crops


def normalised(crops: Sequence[Tensor]) -> list[Tensor]:
    """Normalise crops to float32, as the loaders of the reference and most others do."""
    floats = [normalise(crop, IMAGENET_MEAN, IMAGENET_STD) for crop in crops]
    return [new.pin_memory() if old.is_pinned() else new for new, old in zip(floats, crops, strict=True)]


def view_by_view(crops: Sequence[Tensor], settings: Settings) -> list[Tensor]:
    """Split crops into V tensors [B, 3, size, size], the input of the reference."""
    return [view.contiguous() for crop in crops for view in crop.split(settings.batch)]


# ---- the plain step: DINO as in the paper, from PyTorch's and timm's modules

STUDENT_TEMP, TEACHER_TEMP, CENTER_MOMENTUM, TEACHER_MOMENTUM = 0.1, 0.04, 0.9, 0.996
LR, WEIGHT_DECAY, CLIP = 1e-5, 0.04, 3.0
"""Chosen for finite losses over a few steps; they do not affect the cost of a step."""


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return an autocast context; a null context for fp32."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtypes[precision]) if precision in dtypes else nullcontext()


class PlainHead(nn.Module):
    """DINO's head, [rows, D] to [rows, K], with the published parameter names."""

    def __init__(self, in_dim: int, settings: Settings) -> None:
        super().__init__()
        hidden, bottleneck = settings.head_hidden, settings.head_bottleneck
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last_layer: Any = nn.Module()
        self.last_layer.weight_g = nn.Parameter(torch.ones(settings.out_dim, 1), requires_grad=False)
        self.last_layer.weight_v = nn.Parameter(torch.randn(settings.out_dim, bottleneck) * bottleneck**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """[rows, D] to [rows, K]."""
        prototypes = self.last_layer.weight_g * F.normalize(self.last_layer.weight_v, dim=1)
        return F.linear(F.normalize(self.mlp(features), dim=-1), prototypes)


class PlainNetwork(nn.Module):
    """timm's backbone, run once per crop size, and the head over all views."""

    def __init__(self, settings: Settings, drop_path: float) -> None:
        super().__init__()
        import timm  # not at the top, to exclude it from the memory of our rows

        if not timm.is_model(f"{settings.arch}_224"):
            raise InputError(f"--arch is {settings.arch}, expected an XCiT that timm has, such as xcit_small_12_p16")
        self.backbone: Any = timm.create_model(f"{settings.arch}_224", num_classes=0, drop_path_rate=drop_path)
        self.head = PlainHead(self.backbone.num_features, settings)  # type: ignore[arg-type]

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """One tensor per crop size, [views of that size * B, 3, size, size], to [V * B, K]."""
        return self.head(torch.cat([self.backbone(crop) for crop in crops]))


def plain_names(state: Mapping[str, Tensor], backbone: nn.Module) -> State:
    """Rename weights or gradients of a network from the official names to those of :class:`PlainNetwork`."""
    from timm.models.xcit import checkpoint_filter_fn

    official = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    head = {name: value for name, value in state.items() if name.startswith("head.")}
    return head | {f"backbone.{name}": value for name, value in checkpoint_filter_fn(official, backbone).items()}


def plain_loss(student_logits: Tensor, teacher_logits: Tensor, center: Tensor, views: int) -> Tensor:
    """Algorithm 1 of arXiv 2104.14294: mean cross-entropy over pairs of different views.

    Args:
        student_logits: [V * B, K], view-major, the global views first.
        teacher_logits: [2 * B, K].
        center: [1, K].
        views: V.
    """
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    log_p = F.log_softmax(student_logits.to(wide) / STUDENT_TEMP, dim=-1).chunk(views)
    targets = F.softmax((teacher_logits.to(wide) - center) / TEACHER_TEMP, dim=-1).chunk(2)
    pairs = [
        -(target * log_p[view]).sum(dim=-1).mean()
        for number, target in enumerate(targets)
        for view in range(views)
        if view != number
    ]
    return torch.stack(pairs).mean()


class PlainStep:
    """Student, teacher, center, optimizer, and one step over them."""

    def __init__(self, settings: Settings, precision: Precision) -> None:
        self.settings, self.precision, self.device = settings, precision, torch.device(settings.device)
        torch.manual_seed(0)
        self.student = PlainNetwork(settings, settings.drop_path).to(self.device)
        self.teacher = PlainNetwork(settings, 0.0).to(self.device)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.center = torch.zeros(1, settings.out_dim, device=self.device)
        matrices, vectors = ([p for p in self.student.parameters() if (p.ndim > 1) is wide] for wide in (True, False))
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR)

    def loss(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss of float crops, and the teacher's logits [2 * B, K]."""
        with autocast(self.device, self.precision):
            with torch.no_grad():
                teacher_logits = self.teacher([crops[0][: 2 * self.settings.batch]])
            student_logits = self.student(crops)
        return plain_loss(student_logits, teacher_logits, self.center, 2 + self.settings.local_crops), teacher_logits

    def __call__(self, crops: Sequence[Tensor]) -> Tensor:
        """Run one training step over float crops and return its loss."""
        loss, teacher_logits = self.loss([crop.to(self.device, non_blocking=True) for crop in crops])
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():  # clip each by its own norm, as the reference does
            if parameter.grad is not None:
                nn.utils.clip_grad_norm_(parameter, CLIP)
        self.optimizer.step()
        with torch.no_grad():
            for kept, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                kept.lerp_(new, 1 - TEACHER_MOMENTUM)
            mean_logits = teacher_logits.to(self.center.dtype).mean(dim=0, keepdim=True)
            self.center.lerp_(mean_logits, 1 - CENTER_MOMENTUM)
        return loss.detach()


# ---- the reference: the code of facebookresearch/dino with facebookresearch/xcit

EPOCH, EPOCHS = 1, 100
"""The last layer is frozen in epoch 0 only."""


class ReferenceStep:
    """Student, teacher, loss, optimizer, and the body of the loop in ``train_one_epoch``.

    On a CPU, BatchNorm replaces SyncBatchNorm, which has no CPU kernel. The original also wraps the student in
    DistributedDataParallel, which adds work in a single process; it is omitted here.
    """

    def __init__(self, folder: Path, settings: Settings, precision: Precision, seed: int = 0) -> None:
        xcit, main_dino = import_peer(folder, "xcit/xcit.py"), import_peer(folder, "dino/main_dino.py")
        self.utils = main_dino.utils
        self.settings, self.precision, self.device = settings, precision, torch.device(settings.device)
        if not dist.is_initialized():  # its loss always calls all_reduce
            store = f"file://{tempfile.mkdtemp()}/store"
            dist.init_process_group("nccl" if settings.device == "cuda" else "gloo", store, rank=0, world_size=1)

        def network(drop_path: float) -> nn.Module:
            if hasattr(xcit, settings.arch):
                backbone = getattr(xcit, settings.arch)(pretrained=False, drop_path_rate=drop_path)
            else:  # one of this project's own sizes
                name, _, patch = settings.arch.rpartition("_p")
                size = XCIT_SIZES[name]
                backbone = xcit.XCiT(
                    patch_size=int(patch), embed_dim=size.dim, depth=size.depth, num_heads=size.heads, qkv_bias=True,
                    eta=size.layer_scale, tokens_norm=size.tokens_norm, drop_path_rate=drop_path,
                )  # fmt: skip
            widths = {"hidden_dim": settings.head_hidden, "bottleneck_dim": settings.head_bottleneck}
            head = main_dino.DINOHead(backbone.embed_dim, settings.out_dim, **widths)
            return self.utils.MultiCropWrapper(backbone, head).to(self.device)

        torch.manual_seed(seed)
        if settings.device == "cpu":
            nn.SyncBatchNorm = nn.BatchNorm2d  # type: ignore[misc, assignment]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch deprecates weight_norm
            self.student, self.teacher = network(settings.drop_path), network(0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        views = 2 + settings.local_crops
        self.dino_loss = main_dino.DINOLoss(settings.out_dim, views, TEACHER_TEMP, TEACHER_TEMP, 0, EPOCHS)
        self.dino_loss.to(self.device)
        groups = self.utils.get_params_groups(self.student)
        self.optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY)
        self.momentum = TEACHER_MOMENTUM
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def set_rates(self, lr: float, weight_decay: float, momentum: float) -> None:
        """Set the rates of the next step; only the first group is regularised."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.param_groups[0]["weight_decay"] = weight_decay
        self.momentum = momentum

    def loss(self, images: Sequence[Tensor]) -> Tensor:
        """Return the loss of V tensors [B, 3, size, size]; also updates the center."""
        with autocast(self.device, self.precision):
            teacher_output = self.teacher(list(images[:2]))
            return self.dino_loss(self.student(list(images)), teacher_output, EPOCH)

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """Run one training step and return its loss."""
        loss = self.loss([image.to(self.device, non_blocking=True) for image in images])
        value = loss.item()  # as in the original, which checks that the loss is finite
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self.utils.clip_gradients(self.student, CLIP)
        self.utils.cancel_gradients_last_layer(EPOCH, self.student, 1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for new, kept in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                kept.data.mul_(self.momentum).add_((1 - self.momentum) * new.detach().data)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return torch.tensor(value)


# ---- ours: the step of run_pretrain.py


class OurStep:
    """The state of a run, and one step of it."""

    def __init__(self, settings: Settings, row: Row, **changes: Any) -> None:
        """``changes``: further settings of the run."""
        self.views = [count for count, _ in settings.groups]
        self.config = PretrainConfig(
            arch=settings.arch, out_dim=settings.out_dim, drop_path_rate=settings.drop_path,
            head_hidden_dim=settings.head_hidden, head_bottleneck_dim=settings.head_bottleneck,
            local_crops_number=settings.local_crops, batch_size_per_gpu=settings.batch,
            global_crops_size=settings.global_size, local_crops_size=settings.local_size,
            precision=row.precision, device=settings.device,
            activation_checkpointing="on" if row.checkpointing else "off",
            warmup_epochs=0.0, freeze_last_layer=0,  # as in all epochs after the first
            **changes,
        )  # fmt: skip
        self.schedules = Schedules.of(self.config, 1000, settings.batch)
        self.state = build_state(self.config, torch.device(settings.device))

    def __call__(self, crops: Sequence[Tensor], passes: int = 1) -> Tensor:
        """Run one training step over ``passes`` copies of uint8 crops; return its loss on the device."""
        batch = Batch(list(crops), self.views, epoch=0, indices=torch.arange(self.config.batch_size_per_gpu))
        return train_step(self.state, [batch] * passes, self.schedules, self.config).loss


# ---- check that all rows compute the same

LOSS, GRADIENT, BF16 = 1e-4, 1e-3, 1.5
"""Maximum relative error of the loss and of each gradient in fp32; in bf16, maximum ratio to the plain step's error."""
NO_GRADIENT = ".attn.k.bias"
"""Bias of the keys in class attention. Softmax cancels it, so its gradient is zero up to rounding."""


def check(settings: Settings, rows: Sequence[Row], reference: str) -> list[tuple[str, float, float]]:
    """Compare the rows with the plain step in float64, on the same weights and crops without drop-path.

    Returns:
        (name, relative error, limit) of each comparison.
    """
    torch.backends.cudnn.allow_tf32 = False
    settings = dataclasses.replace(settings, batch=min(2, settings.batch), drop_path=0.0)
    generator = torch.Generator().manual_seed(0)

    def with_noise(state: Mapping[str, Tensor]) -> State:
        """Add noise: initial biases are 0 and initial LayerScales may be 1e-5, which would hide errors."""
        new = {name: value.cpu().clone() for name, value in state.items()}
        for name, value in new.items():
            if value.is_floating_point() and not name.endswith(("running_mean", "running_var", "weight_g")):
                value += 0.02 * torch.randn(value.shape, generator=generator)
        return new

    student = with_noise(OurStep(settings, Row("", "", "ours", "fp32")).state.method.state_dict()["student"])
    teacher = with_noise(student)
    crops = draw_crops(settings, 0)

    def plain(precision: Precision, dtype: torch.dtype = torch.float32) -> tuple[float, State, nn.Module]:
        step = PlainStep(settings, precision)
        for network, state in ((step.student, student), (step.teacher, teacher)):
            network.load_state_dict(plain_names(state, network.backbone))
            network.to(dtype)
        step.center = step.center.to(dtype)
        loss, _ = step.loss([crop.to(step.device, dtype) for crop in normalised(crops)])
        loss.backward()
        gradients = {name: p.grad.cpu().double() for name, p in step.student.named_parameters() if p.grad is not None}
        return float(loss.detach()), gradients, step.student.backbone

    exact_loss, exact, backbone = plain("fp32", torch.float64)

    def ours(row: Row) -> tuple[float, State]:
        step = OurStep(settings, row)
        method, found = step.state.method, State()
        method.load_state_dict(method.state_dict() | {"student": student, "teacher": teacher})
        for name, parameter in method.trained.named_parameters():
            if parameter.requires_grad:  # read gradients before the step clips them
                parameter.register_post_accumulate_grad_hook(
                    lambda p, name=name: found.update({name: p.grad.cpu().double()})  # type: ignore[misc]
                )
        return float(step(crops)), plain_names(found, backbone)

    def loss_error(loss: float) -> float:
        return abs(loss - exact_loss) / abs(exact_loss)

    found = []
    if reference:
        theirs = ReferenceStep(Path(reference), settings, "fp32")
        theirs.student.load_state_dict(student)
        theirs.teacher.load_state_dict(teacher)
        views = [view.to(theirs.device) for view in view_by_view(normalised(crops), settings)]
        found.append(("reference, loss", loss_error(float(theirs.loss(views).detach())), LOSS))
    plain_error = mean(relative_errors(plain("bf16")[1], exact).values())
    for row in rows:
        loss, gradients = ours(row)
        errors = relative_errors(gradients, exact)
        if row.precision == "fp32":
            worst = max(errors, key=errors.__getitem__)
            found.append((f"{row.key}, loss", loss_error(loss), LOSS))
            found.append((f"{row.key}, gradient of {worst}", errors[worst], GRADIENT))
        else:
            found.append((f"{row.key}, gradients on average", mean(errors.values()), BF16 * plain_error))
    return found


def relative_errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Return |found - expected| / |expected| of each gradient; infinite if it is missing in one of the two."""
    errors = dict.fromkeys(found.keys() ^ expected.keys(), float("inf"))
    for name in found.keys() & expected.keys():
        errors[name] = float((found[name] - expected[name]).norm() / expected[name].norm())
    return {name: error for name, error in errors.items() if not name.endswith(NO_GRADIENT)}


# ---- one worker process per row


def build(row: Row, settings: Settings, reference: str) -> tuple[Step, list[list[Tensor]]]:
    """Return the step of a row, and two batches of crops in the format of its loader."""
    batches = [draw_crops(settings, number) for number in range(2)]
    if row.project == "ours":
        return OurStep(settings, row), batches
    floats = [normalised(crops) for crops in batches]
    if row.project == "timm":
        return PlainStep(settings, row.precision), floats
    step = ReferenceStep(Path(reference), settings, row.precision)
    return step, [view_by_view(crops, settings) for crops in floats]


def serve(task: Mapping[str, Any]) -> None:
    """Answer each JSON line on stdin with one on stdout; redirect other output to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    row, settings, done = Row(**task["row"]), Settings(**task["settings"]), 0
    cuda = settings.device == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    if cuda:  # as in run_pretrain.py; here for all rows
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    distributed.start(torch.device(settings.device))  # in scaling.py the workers are ranks
    gpu = torch.cuda.get_device_name() if cuda else ""
    answer(threads=torch.get_num_threads(), torch=torch.__version__, timm=version("timm"), gpu=gpu)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "build":
            step, batches = build(row, settings, task["reference"])
            answer()
        elif order["do"] == "steps":
            for number in range(order["warm_up"] + order["count"]):
                if number == order["warm_up"]:
                    wait()
                    began = perf_counter()
                loss = step(batches[done % 2], **order.get("arguments", {}))
                done += 1
            wait()
            seconds = (perf_counter() - began) / order["count"]
            if cuda:
                torch.cuda.empty_cache()  # the other rows need the memory; the next turn warms up again
            answer(seconds=seconds, loss=float(loss))
        elif order["do"] == "report":
            answer(peak=torch.cuda.max_memory_allocated() if cuda else peak_memory())


class Worker:
    """Handle of a row's process; ``ready`` waits until it has built its step.

    Args:
        group: process group.
        root: checkout whose code it runs.
        environment: additional environment variables.
    """

    def __init__(
        self, row: Row, settings: Settings, reference: str, group: int, root: Path = ROOT, environment: Any = None
    ) -> None:
        mark = "" if root == ROOT else f", {commit_of(root)}"
        self.row, self.key, self.name = row, row.key + mark, row.title + mark
        task = {"row": dataclasses.asdict(row), "settings": dataclasses.asdict(settings), "reference": reference}
        script = root / "benchmarks" / "step_worker.py"  # in version 0.1
        words = [str(script)] if script.is_file() else [str(root / "benchmarks" / "step.py"), "--worker"]
        own = {"PYTHONPATH": str(root), "KMP_BLOCKTIME": "0"}  # Intel's OpenMP: idle threads sleep
        self.process = subprocess.Popen(
            [sys.executable, *words, json.dumps(task)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | own | (environment or {}), process_group=group,
        )  # fmt: skip
        self.about: dict[str, Any] = {}
        """Threads, versions and the name of the GPU."""
        self.seconds: list[float] = []
        """Seconds per step of each round."""
        self.peak = 0
        """Peak memory in bytes: resident, or allocated on the GPU."""
        self.send("build")

    def send(self, do: str, **values: object) -> None:
        """Send a command; read its answer with :meth:`answer`."""
        assert self.process.stdin
        print(json.dumps({"do": do, **values}), file=self.process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer.

        Raises:
            InputError, RunStopped: the worker failed.
        """
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RunStopped(1, f"error: the process of {self.name!r} ended with code {code} (-9: out of memory?)")
        values: dict[str, Any] = json.loads(line)
        if "error" in values:
            raise InputError(values["error"])
        return values

    def ready(self) -> None:
        """Wait until the step is built."""
        self.about = self.answer()
        self.answer()

    def ask(self, do: str, **values: object) -> dict[str, Any]:
        """Send a command and wait for the answer."""
        self.send(do, **values)
        return self.answer()


def take_turns(workers: Sequence[Worker], rounds: int, device: str) -> None:
    """Time the rows; each takes one turn per round."""
    for row in workers:
        row.ready()
    for row in workers:
        row.ask("steps", warm_up=1, count=1)
    for number in range(rounds):
        print(f"  round {number + 1} of {rounds}", flush=True)
        for row in workers:
            # On a GPU, one untimed step allocates the memory that the other rows used in between.
            turn = row.ask("steps", warm_up=int(device == "cuda"), count=STEPS_A_TURN[device])
            row.seconds.append(turn["seconds"])
    for row in workers:
        row.peak = row.ask("report")["peak"]


# ---- command line


def report(workers: Sequence[Worker], batch: int) -> dict[str, Any]:
    """Print two tables and return their figures for the JSON object."""
    lines, comparisons = [], []
    by_key = {worker.key: worker for worker in workers}
    figures: dict[str, Any] = {"rows": {}}
    for worker in workers:
        speed, peak = batch / median(worker.seconds), worker.peak / 1e6
        lines.append([worker.name, f"{speed:.3g}", spread(worker.seconds), f"{peak:,.0f}"])
        figures["rows"][worker.key] = {"img_per_s": speed, "step_s": worker.seconds, "peak_MB": peak}
        if worker.row.project != "ours" or worker.key != worker.row.key:  # another project or the earlier commit
            continue
        name = worker.key.removeprefix("ours-").replace("-", "_")
        peers = {"ratio": by_key.get("reference"), "over_timm": by_key.get(f"timm-{worker.row.precision}")}
        peers["against"] = next((other for other in workers if other.row == worker.row and other is not worker), None)
        for label, peer in peers.items():
            if peer:
                rounds = [theirs / own for theirs, own in zip(peer.seconds, worker.seconds, strict=True)]
                speed, memory = median(rounds), worker.peak / peer.peak
                comparisons.append([f"{worker.name} / {peer.name}", spread(rounds), f"{memory:.3f}"])
                figures |= {f"{label}_{name}": speed, f"memory_{label}_{name}": memory}
    print(f"\n{table(['', 'images/s', 'seconds per step', 'peak MB'], lines)}\n")
    if comparisons:
        print(f"{table(['', 'speed', 'memory'], comparisons)}\n")
    return figures


def chosen_rows(only: str | None, device: str, reference: bool) -> list[Row]:
    """Return the rows in --only, or the default ones; without the reference unless --reference is given.

    Raises:
        InputError: --only has an unknown row.
    """
    rows = {row.key: row for row in rows_for(device)}
    names = only.split(",") if only else list(DEFAULT)
    for name in names:
        if name not in rows:
            raise InputError(f"--only has an unknown row {name!r}{near_matches(name, rows)} (known: {', '.join(rows)})")
    if "reference" in names and not reference:
        print("the reference is not measured: give --reference DIR, a folder with its checkouts")
        names.remove("reference")
    return [row for key, row in rows.items() if key in names]


def count(batch: int, arch: str) -> None:
    """Count the launches, bytes and peak memory of a step on a GPU, and print."""
    found: dict[str, Any] = {}
    rows, waits = [], []
    for kernels in ("eager", "fused"):
        ledger = Ledger()
        with ledger:
            state = fake_step(kernels, batch=batch, arch=arch)
        networks = filter(None, (state.method.trained, state.method.teacher))
        kept = tree_leaves([*(one.state_dict() for one in networks), state.optimizer.state_dict()["state"]])
        peak = (ledger.peak + sum(one.nbytes for one in kept)) / 1e9
        totals = {phase or "all": ledger.total(phase) for phase in (*ledger.bytes, "")}
        rows += [[kernels, phase, str(launches), f"{gb:.1f}"] for phase, (launches, gb) in totals.items()]
        waits += [*ledger.waits, *ledger.blocking_copies]
        launches, gb = totals["all"]
        found[kernels] = {"launches": launches, "GB": round(gb, 1), "update": totals["update"][0]}
        found[kernels]["peak_GB"] = round(peak, 1)
    print(table(["kernels", "phase", "launches", "GB"], rows))
    print(*waits, sep="\n", end="\n" * bool(waits))
    print(json.dumps(found | {"waits": len(waits)}))


def main() -> None:
    """Check the rows, time them and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="folder with the checkouts dino/ and xcit/")
    parser.add_argument("--against", type=Path, metavar="DIR", help="an earlier commit's checkout")
    parser.add_argument("--only", help=f"rows: {', '.join(row.key for row in rows_for('cpu'))}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="smoke test with tiny networks; figures are meaningless")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--arch", help="such as xcit_small_12_p8")
    parser.add_argument("--batch", type=int, help="images per step; default: 4 on a CPU, 64 on a GPU")
    for name in ("--out-dim", "--local-crops", "--global-size", "--local-size"):
        parser.add_argument(name, type=int)
    parser.add_argument("--count", action="store_true", help="count launches and bytes on fake CUDA tensors")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return serve(json.loads(given.worker))
    if given.count:
        return count(given.batch or 64, given.arch or "xcit_small_12_p16")
    if given.rounds < 1:
        raise InputError(f"--rounds is {given.rounds}, expected at least 1")
    if given.against and not (given.against / "benchmarks" / "step.py").is_file():
        raise InputError(f"--against {given.against} has no benchmarks/step.py: git worktree add DIR COMMIT")
    start = QUICK if given.quick else Settings(batch=64 if given.device == "cuda" else 4)
    fields = [field.name for field in dataclasses.fields(Settings)]
    changes = {name: value for name, value in vars(given).items() if name in fields and value is not None}
    settings = dataclasses.replace(start, **changes)
    rows = chosen_rows(given.only, given.device, bool(given.reference))
    reference = str(given.reference.resolve()) if "reference" in [row.key for row in rows] else ""
    if os.getloadavg()[0] > 0.25 * usable_cores():
        print("warning: the machine is busy: figures vary more than on an idle machine", file=sys.stderr)
    print(f"{settings}\n")
    ours = [row for row in rows if row.project == "ours"]
    checks = in_a_process(check, settings, ours, reference)
    for name, error, limit in checks:
        print(f"  {name}: relative error {error:.1e}, at most {limit:.1e}", flush=True)
        if not error <= limit:
            raise RunStopped(1, f"error: {name}: relative error {error:.1e}, expected at most {limit:.1e}")
    exit_on_sigterm()
    with process_group() as group:
        workers = []
        for row in rows:
            workers.append(Worker(row, settings, reference, group))
            if given.against and row.project == "ours":
                workers.append(Worker(row, settings, reference, group, given.against.resolve()))
        take_turns(workers, given.rounds, settings.device)
    result = {"commits": [commit_of(root) for root in (ROOT, given.against) if root], "rounds": given.rounds}
    result |= {"settings": dataclasses.asdict(settings), "machine": workers[0].about, "checks": checks}
    print(json.dumps(result | report(workers, settings.batch)))
    return None


if __name__ == "__main__":
    run_main(main)
