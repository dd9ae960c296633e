"""Training steps on fake CUDA tensors: no GPU, no memory, no arithmetic; counts launches, bytes, waits and copies.

``FakeTensorMode`` runs the code that a GPU would run and propagates shapes, dtypes, strides and devices only.

Counting rule: each dispatched operator that is not a view is one launch, or the number in :data:`LAUNCHES` (estimated
from ATen's CUDA sources). Foreach and fused operators count one launch per chunk of their lists, or one per tensor on
the slow path. Bytes are those of inputs and outputs, broadcast dimensions once, outputs of in-place operators twice.

A CUDA build of PyTorch without a driver refuses the backward pass, because autograd asks for the device's context.
:func:`enable_backward` answers that question with a small C library, loaded before PyTorch.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.cuda.amp.common
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from dino_xcit import transform
from dino_xcit.augment import group_by_size
from dino_xcit.augment.parameters import PLAN_COLUMNS
from dino_xcit.config import PretrainConfig
from dino_xcit.data.loader import Batch
from dino_xcit.errors import RunStopped
from dino_xcit.methods.student_teacher import StudentTeacher
from dino_xcit.models import xcit
from dino_xcit.optim import Schedules
from dino_xcit.runtime import distributed, sync_batch_norm
from dino_xcit.train import TrainState, build_state, train_step

CUDA = torch.device("cuda", 0)

VIEWS = frozenset({
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select",
    "split", "split_with_sizes", "chunk", "unbind", "detach", "alias", "as_strided", "unfold", "diagonal", "narrow",
    "lift_fresh", "lift", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty",
    "new_empty_strided", "view_as", "is_same_size", "sym_size", "sym_stride", "sym_numel", "is_pinned",
    "record_stream", "set_", "resize_", "device", "_has_compatible_shallow_copy_type", "stride", "size", "mT",
    "broadcast_tensors",
})  # fmt: skip
WAITS = frozenset({
    "_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "is_nonzero", "item",
    "bincount", "repeat_interleave", "allclose",
})  # fmt: skip
"""Operators whose result the host waits for."""
UPDATE = frozenset({
    ("optim.py", "gradient_norms"), ("optim.py", "clip_gradients"), ("optimizer.py", "wrapper"), ("optim.py", "step"),
    ("student_teacher.py", "__call__"), ("train.py", "read"), ("train.py", "write"),
})  # fmt: skip
"""Functions of clipping, optimizer, EMA and buffers."""
LAUNCHES = {
    "native_layer_norm_backward": 2, "convolution_backward": 3, "native_batch_norm": 4,
    "native_batch_norm_backward": 2, "_native_batch_norm_legit": 4, "topk": 2, "sort": 2, "index_put_": 2,
}  # fmt: skip
"""Number of launches of operators that launch several kernels."""


class Ledger(TorchDispatchMode):
    """Counts what the operators of a step on CUDA tensors would cost."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: collections.Counter[tuple[str, str]] = collections.Counter()
        """By phase (forward, backward, update, other) and operator; update: clipping, optimizer, EMA, buffers."""
        self.bytes: collections.Counter[str] = collections.Counter()
        """By phase."""
        self.waits: list[str] = []
        """Operators whose result the host waits for, and the code that called them."""
        self.blocking_copies: list[str] = []
        self.mixed_devices: list[str] = []
        """Operators with tensors on the CPU and on the GPU."""
        self.slow_foreach: collections.Counter[str] = collections.Counter()
        """Tensors of foreach operators that launch one kernel per tensor."""
        self.peak = 0
        """Largest sum of the bytes that the operators have allocated and not yet freed."""
        self._allocated: dict[int, int] = {}
        """Bytes by storage."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in WAITS:
            self.waits.append(f"{name} {_caller()}")
        _triton.count = 0
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if not any(tensor.is_cuda for tensor in given + made):
            return result
        self._check_devices(func, name, args, kwargs, given, made)
        self._allocate(given, made)
        if name in VIEWS or func.namespace == "prim":
            return result
        phase = _phase()
        self.launches[phase, name] += _triton.count if func.namespace == "dino_xcit" else self._launches_of(name, args)
        in_place = args[0] if name.endswith("_") and isinstance(args[0], list | tuple) else args[:1]
        twice = [x for x in in_place if isinstance(x, Tensor)] if name.endswith("_") else []
        touched = {id(tensor): tensor for tensor in given + made if tensor.is_cuda}.values()
        self.bytes[phase] += sum(map(_bytes, touched)) + sum(map(_bytes, twice))
        return result

    def _allocate(self, given: list[Tensor], made: list[Tensor]) -> None:
        existing = {one.untyped_storage()._cdata for one in given} | self._allocated.keys()
        for storage in {one.untyped_storage()._cdata: one.untyped_storage() for one in made if one.is_cuda}.values():
            if storage._cdata not in existing:
                self._allocated[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._allocated.pop, storage._cdata)
        self.peak = max(self.peak, sum(self._allocated.values()))

    def _check_devices(self, func: Any, name: str, args: Any, kwargs: Any, given: list[Any], made: list[Any]) -> None:
        if name in ("copy_", "_to_copy", "to"):  # "to" is not decomposed in inference mode
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], made[0])
            asynchronous = kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
            if source.device != target.device and not asynchronous:
                self.blocking_copies.append(f"{tuple(source.shape)} {source.device} to {target.device} {_caller()}")
        elif on_cpu := [tuple(tensor.shape) for tensor in given if not tensor.is_cuda and tensor.dim()]:  # no scalars
            self.mixed_devices.append(f"{func} with {on_cpu} on the CPU {_caller()}")

    def _launches_of(self, name: str, args: Any) -> int:
        if not name.startswith(("_foreach", "_fused")):
            return LAUNCHES.get(name, 1)
        lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
        count = len(lists[0])
        if name.startswith("_fused") or name == "_foreach_norm":
            elements = sum(tensor.numel() for tensor in lists[0])
            return max(1, -(-elements // (65536 * 320))) + count // 110 + (2 if name == "_foreach_norm" else 0)
        same_layout = all(_layout(a) == _layout(b) for one in lists[1:] for a, b in zip(lists[0], one, strict=True))
        if same_layout and len({tensor.dtype for tensors in lists for tensor in tensors}) == 1:
            return count // 110 + 1
        self.slow_foreach[name] += count
        return count

    def total(self, phase: str = "") -> tuple[int, float]:
        """Return launches and GB, of one phase or of all."""
        launches = sum(count for (where, _), count in self.launches.items() if phase in ("", where))
        return launches, sum(count for where, count in self.bytes.items() if phase in ("", where)) / 1e9


def _layout(tensor: Tensor) -> list[tuple[int, int]]:
    """Return size and stride of each dimension that has more than one element."""
    return [pair for pair in zip(tensor.shape, tensor.stride(), strict=True) if pair[0] > 1]


def _bytes(tensor: Tensor) -> int:
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size < 2 or stride)
    count = tensor.element_size()
    for size in sizes:
        count *= size
    return count


def _frames() -> Iterator[Any]:
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _phase() -> str:
    """Return the phase of the step by the functions on the stack."""
    names = {(Path(frame.f_code.co_filename).name, frame.f_code.co_name) for frame in _frames()}
    if ("graph.py", "_engine_run_backward") in names:
        return "backward"
    if any(name == "forward_backward" for _, name in names):
        return "forward"
    return "update" if names & UPDATE else "other"


def _caller() -> str:
    """Return the innermost lines of this project on the stack."""
    places = [(frame.f_code.co_filename, frame.f_lineno) for frame in _frames()]
    own = [f"{Path(file).name}:{line}" for file, line in places if "/dino_xcit/" in file or "/eval/" in file]
    return "at " + " < ".join(own[:2])


# ---- a CUDA device that does not exist


class _Triton:
    """Counts launches of Triton's kernels instead of running them."""

    count = 0
    """Launches since it was set to 0."""
    launches: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] | None = None
    """The kernel and the arguments of the last launch, by name of the kernel; None: not wanted."""

    def __call__(self, kernel: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.count += 1
            if self.launches is not None:
                self.launches[kernel.fn.__name__] = kernel, args, options

        return collections.defaultdict(lambda: launch)  # any grid


_triton = _Triton()


@contextlib.contextmanager
def launches_of_triton() -> Iterator[dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Collect kernels of Triton by name, each with the arguments and the options of a launch."""
    enable_backward()
    _triton.launches = {}
    try:
        yield _triton.launches
    finally:
        _triton.launches = None


def _to(self: nn.Module, device: Any = None, *args: Any, **kwargs: Any) -> nn.Module:
    """``nn.Module.to`` for fake tensors, whose data PyTorch cannot swap in place."""
    done: dict[int, nn.Parameter] = {}
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
                module._parameters[name] = done.setdefault(id(parameter), moved)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return self


def _evenly(rate: float, depths: int, stagewise: bool = False) -> list[float]:
    """timm's drop path rates, which it reads from a tensor."""
    return [rate * block / max(1, depths - 1) for block in range(depths)]


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Enter a mode in which the device ``cuda`` exists. The backward pass needs :func:`enable_backward`."""
    from timm.models import vision_transformer

    with contextlib.ExitStack() as stack:
        for target, name, replacement in (
            (torch.nn.Module, "to", _to),
            (torch.nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor),  # reads the numbers that it draws
            (vision_transformer, "calculate_drop_path_rates", _evenly),
            (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),  # else autocast is off
            (torch.autograd.graph, "_engine_run_backward", _run_backward),
            (torch.autograd, "_engine_run_backward", _run_backward),
        ):
            stack.enter_context(patch.object(target, name, replacement))
        if importlib.util.find_spec("triton"):  # missing beside CPU builds of PyTorch
            stack.enter_context(patch("dino_xcit.kernels.wrap_triton", _triton))
        stack.enter_context(_meta_functions())
        for cached in (transform._scale_and_shift, sync_batch_norm._counts, xcit._waves):
            cached.cache_clear()  # tensors of another mode
            stack.callback(cached.cache_clear)
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield mode


@contextlib.contextmanager
def _meta_functions() -> Iterator[None]:
    """Register shape functions that PyTorch lacks."""

    def like_channels(count: int) -> Any:
        def shapes(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
            wide = torch.promote_types(x.dtype, torch.float32)
            return tuple(x.new_empty(x.shape[1], dtype=wide) for _ in range(count))

        return shapes

    library = torch.library.Library("aten", "IMPL", "Meta")
    try:
        for name, shapes in {
            "batch_norm_stats": like_channels(2),
            "batch_norm_gather_stats_with_counts": like_channels(2),
            "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
            "batch_norm_backward_reduce": like_channels(4),
            "batch_norm_backward_elemt": lambda _, x, *__: torch.empty_like(x),
            "_fused_sgd_": lambda *_, **__: None,
        }.items():
            library.impl(name, shapes)
        yield
    finally:
        library._destroy()


@contextlib.contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """Enter rank 0 of ``count`` processes whose collectives do nothing. The student is not wrapped: DDP needs data."""
    if count == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        with patch.object(distributed, "wrap_ddp", lambda module, device: module):
            yield
    finally:
        dist.destroy_process_group()


# ---- the backward pass

_CONTEXT = """
#include <cstdint>
extern "C" { int devices = 0; void set_fake_cuda_devices(int count) { devices = count; } }
namespace c10 { namespace cuda {
__attribute__((visibility("default"))) int8_t device_count() noexcept { return (int8_t)devices; }
__attribute__((visibility("default"))) bool hasPrimaryContext(int8_t) { return false; }
}}
"""
"""Replaces two functions of PyTorch: autograd compares the index of a device with the number of devices."""
_DRIVER = (
    "cuCtxGetCurrent", "cuCtxSetCurrent", "cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetCount",
    "cuDevicePrimaryCtxGetState", "cuDevicePrimaryCtxRetain", "cuFuncGetAttribute", "cuFuncSetAttribute",
    "cuFuncSetCacheConfig", "cuGetErrorString", "cuInit", "cuLaunchCooperativeKernel", "cuLaunchKernel",
    "cuLinkAddData_v2", "cuLinkComplete", "cuLinkCreate_v2", "cuModuleGetFunction", "cuModuleLoad",
    "cuModuleLoadData", "cuModuleLoadDataEx", "cuModuleUnload", "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuPointerGetAttribute", "cuTensorMapEncodeTiled",
)  # fmt: skip
"""Functions that PyTorch looks up in the driver's library; none is called."""
_LIBRARY = "libfake_cuda_devices.so"
_MANY = 100
"""More devices than any index that autograd asks for."""
_real_run_backward = torch.autograd.graph._engine_run_backward


def enable_backward() -> None:
    """Restart this process with the C library, unless it is loaded or PyTorch needs none.

    Raises:
        RunStopped: there is no C++ compiler.
    """
    if not torch.version.cuda or torch.cuda.is_available() or _LIBRARY in os.environ.get("LD_PRELOAD", ""):
        return
    os.environ.pop("TRITON_INTERPRET", None)  # fake tensors have no data to compute with
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | environment())


def compiler() -> str | None:
    """Return the C++ compiler, if there is one."""
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def environment() -> dict[str, str]:
    """Build the library and return the variables that load it into a process.

    Raises:
        RunStopped: there is no C++ compiler.
    """
    program = compiler()
    if program is None:
        raise RunStopped(2, "found no C++ compiler, which the backward pass on fake CUDA tensors needs: install g++")
    folder = Path(tempfile.gettempdir(), f"dino-xcit-fake-cuda-{os.getuid()}")
    library, driver = folder / _LIBRARY, folder / "libcuda.so.1"
    if not driver.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            source, built = Path(name, "source.cpp"), Path(name, "built.so")
            for path, text in (
                (library, _CONTEXT),
                (driver, "".join(f'extern "C" int {function}() {{ return 0; }}\n' for function in _DRIVER)),
            ):
                source.write_text(text)
                soname = f"-Wl,-soname,{path.name}"
                subprocess.run([program, "-shared", "-fPIC", soname, "-o", built, source], check=True)
                built.replace(path)
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": os.pathsep.join(paths)}


class _Devices(TorchDispatchMode):
    """Reports no device to operators; only autograd's engine sees one."""

    def __init__(self, count: Any) -> None:
        super().__init__()
        self._count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._count(0)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._count(_MANY)


def _run_backward(*args: Any, **kwargs: Any) -> Any:
    preloaded = os.environ.get("LD_PRELOAD", "")
    if _LIBRARY not in preloaded:
        return _real_run_backward(*args, **kwargs)
    count = ctypes.CDLL(preloaded).set_fake_cuda_devices
    count(_MANY)
    try:
        with _Devices(count):
            return _real_run_backward(*args, **kwargs)
    finally:
        count(0)


# ---- one step


def fake_batch(config: PretrainConfig, finished: bool = True) -> Batch:
    """Return the crops of one forward pass, ``finished`` or not; must be called in :func:`fake_cuda`."""
    sizes, images = [view.size for view in config.augmentation().views], config.batch_size_per_gpu
    groups = group_by_size(sizes)
    sides = [sizes[group[0]] for group in groups]
    crops = [
        torch.empty(len(group) * images, 3, side, side, dtype=torch.uint8, device=CUDA)
        for group, side in zip(groups, sides, strict=True)
    ]
    transform.normalise(crops[0], config.mean, config.std)  # copies its constants to the device once per process
    indices = torch.empty(images, dtype=torch.int64, device=CUDA)
    plans = None if finished else [torch.empty(len(crop), PLAN_COLUMNS) for crop in crops]
    return Batch(crops, list(map(len, groups)), epoch=0, indices=indices, plans=plans)


def fake_step(kernels: str = "eager", batch: int = 64, ranks: int = 1, **settings: Any) -> TrainState:
    """Run a training step of XCiT-S12/16 in bf16 under the dispatch modes that the caller has entered.

    The optimizer's state and cached constants exist before, as in all steps but the first.

    Args:
        kernels: ``eager`` or ``fused``.
        ranks: number of processes.
        settings: settings of the run that differ.
    """
    enable_backward()
    values: dict[str, Any] = {
        "arch": "xcit_small_12_p16",
        "precision": "bf16",
        "freeze_last_layer": 0,
        "kernels": kernels,
    }
    config = PretrainConfig(**(values | settings | {"device": "cuda", "batch_size_per_gpu": batch}))
    modes: Sequence[Any] = _get_current_dispatch_mode_stack()
    with _disable_current_modes(), fake_cuda(), fake_ranks(ranks):
        state, schedules = build_state(config, CUDA), Schedules.of(config, 1000, batch)
        batches = [fake_batch(config) for _ in range(config.accumulation_steps)]
        for parameter in state.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        state.optimizer.step()
        assert isinstance(state.method, StudentTeacher)
        with torch.no_grad():
            state.method.forward(batches[0])  # computes constants, which later steps keep
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            train_step(state, batches, schedules, config)
    return state


def fake_augmentation(images: int) -> None:
    """Move a batch of unfinished crops to the GPU, which finishes them, under the dispatch modes of the caller."""
    modes: Sequence[Any] = _get_current_dispatch_mode_stack()
    with _disable_current_modes(), fake_cuda(), contextlib.ExitStack() as stack:
        unfinished = fake_batch(PretrainConfig(device="cuda", batch_size_per_gpu=images), finished=False)
        for mode in modes:
            stack.enter_context(mode)
        unfinished.to(CUDA)
