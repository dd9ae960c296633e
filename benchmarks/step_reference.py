"""The training step of facebookresearch/dino over facebookresearch/xcit, by their own code. B batch, V views.

Nothing of theirs is changed but what keeps it from starting: import paths that PyTorch and timm have given up, a list
of names that it would fetch from the network, and on a CPU SyncBatchNorm, which has no kernel there. Theirs stands in
DistributedDataParallel; without it, as here, one process has less to do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step_plain import CLIP, LR, TEACHER_MOMENTUM, TEACHER_TEMP, WEIGHT_DECAY, autocast
from step_settings import Precision, Settings
from torch import Tensor, nn

from dino_xcit.errors import InputError, near_matches
from dino_xcit.models.xcit import XCIT_SIZES

EPOCH, EPOCHS = 1, 100
"""Its last layer is frozen in epoch 0 alone, so epoch 1 is what the 98 after it are."""


def _module(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def import_reference(folder: Path) -> tuple[Any, Any, Any]:
    """Their modules ``xcit``, ``main_dino`` and ``utils``.

    Raises:
        InputError: the checkouts are not there.
    """
    for file in (folder / "dino" / "main_dino.py", folder / "xcit" / "xcit.py"):
        if not file.is_file():
            raise InputError(
                f"no {file}: --reference is a folder that holds checkouts of facebookresearch/dino as dino/ and of "
                "facebookresearch/xcit as xcit/"
            )
    shim: Any = types.ModuleType("torch._six")
    shim.inf = float("inf")
    sys.modules.setdefault("torch._six", shim)
    torch.hub.list = lambda *_, **__: []  # noqa: TID251
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's about the old paths
        import timm.models.layers
        import timm.models.registry  # noqa: F401

        xcit = _module("reference_xcit", folder / "xcit" / "xcit.py")
    sys.path.insert(0, str(folder / "dino"))
    try:
        main_dino = _module("main_dino", folder / "dino" / "main_dino.py")
    finally:
        sys.path.remove(str(folder / "dino"))
    return xcit, main_dino, sys.modules["utils"]


@contextlib.contextmanager
def _batch_norm_for(device: torch.device) -> Iterator[None]:
    """While networks are built: on a CPU BatchNorm in the place of SyncBatchNorm, which they name outright."""
    synchronised = nn.SyncBatchNorm
    if device.type == "cpu":
        nn.SyncBatchNorm = nn.BatchNorm2d  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        nn.SyncBatchNorm = synchronised  # type: ignore[misc]


class ReferenceStep:
    """Student, teacher, loss, optimizer, and one pass of the body of their loop (``train_one_epoch``)."""

    def __init__(self, modules: tuple[Any, Any, Any], settings: Settings, precision: Precision) -> None:
        xcit, main_dino, self.utils = modules
        self.settings, self.precision, self.device = settings, precision, torch.device(settings.device)
        known = [name for name in vars(xcit) if name.startswith("xcit_")]
        if settings.arch not in known:
            raise InputError(
                f"the reference has no {settings.arch}{near_matches(settings.arch, known)}: give another --arch, or "
                "leave --reference out"
            )
        if precision == "fp32" and not XCIT_SIZES[settings.arch.rpartition("_p")[0]].tokens_norm:
            raise InputError(
                f"the reference cannot train {settings.arch} in fp32: it writes into a tensor that its backward pass "
                "needs; give another --arch, or leave --reference out"
            )
        if not dist.is_initialized():  # its loss adds up over processes without asking how many there are
            store = f"file://{tempfile.mkdtemp()}/store"
            dist.init_process_group("nccl" if settings.device == "cuda" else "gloo", store, rank=0, world_size=1)

        def network(drop_path: float) -> nn.Module:
            backbone = getattr(xcit, settings.arch)(pretrained=False, drop_path_rate=drop_path)
            head = main_dino.DINOHead(
                backbone.embed_dim,
                settings.out_dim,
                hidden_dim=settings.head_hidden,
                bottleneck_dim=settings.head_bottleneck,
            )
            return self.utils.MultiCropWrapper(backbone, head).to(self.device)

        torch.manual_seed(0)
        with _batch_norm_for(self.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's about weight_norm
            self.student, self.teacher = network(settings.drop_path), network(0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.dino_loss = main_dino.DINOLoss(settings.out_dim, settings.views, TEACHER_TEMP, TEACHER_TEMP, 0, EPOCHS).to(
            self.device
        )
        self.optimizer = torch.optim.AdamW(self.utils.get_params_groups(self.student))
        self.scaler = torch.amp.GradScaler(self.device.type) if precision == "fp16" else None

    def load_official(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Take weights under the published names, strictly."""
        self.student.load_state_dict(dict(student))
        self.teacher.load_state_dict(dict(teacher))

    def loss(self, images: Sequence[Tensor]) -> Tensor:
        """Of V tensors [B, 3, size, size]; their loss moves its centre by itself."""
        with autocast(self.device.type, self.precision):
            teacher_output = self.teacher(list(images[:2]))
            student_output = self.student(list(images))
            return self.dino_loss(student_output, teacher_output, EPOCH)

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """One training step; its loss."""
        for number, group in enumerate(self.optimizer.param_groups):
            group["lr"] = LR
            if number == 0:
                group["weight_decay"] = WEIGHT_DECAY
        loss = self.loss([image.to(self.device, non_blocking=True) for image in images])
        value = loss.item()  # as theirs: it ends a run whose loss is not finite
        self.optimizer.zero_grad()
        if self.scaler is None:
            loss.backward()
            self._clip()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            self._clip()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        with torch.no_grad():
            for new, kept in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                kept.data.mul_(TEACHER_MOMENTUM).add_((1 - TEACHER_MOMENTUM) * new.detach().data)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return torch.tensor(value)

    def _clip(self) -> None:
        self.utils.clip_gradients(self.student, CLIP)
        self.utils.cancel_gradients_last_layer(EPOCH, self.student, 1)
