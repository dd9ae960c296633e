"""Ranks, collectives and process start-up. All functions also work in a single process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dino_xcit.errors import (
    LESS_MEMORY,
    LOST,
    MORE_SHARED_MEMORY,
    SHARED_MEMORY,
    STOP_SIGNALS,
    InputError,
    RunStopped,
    one_line,
    run_main,
)


def rank() -> int:
    """Return the rank of this process; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, which writes files and logs."""
    return rank() == 0


def processes_here() -> int:
    """Return the number of ranks on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def choose_device(wanted: str) -> torch.device:
    """Return the device of this rank for ``auto``, ``cpu`` or ``cuda``; LOCAL_RANK selects the GPU.

    Raises:
        InputError: there is no GPU, or fewer than ranks on this machine.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    queued = "SUBMITIT_EXECUTOR" in os.environ  # started by run_slurm.py
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = _unusable_gpu()
        if wanted == "auto":
            if why and local == 0:
                from dino_xcit.runtime import logging as log  # it imports this module

                log.warning(f"running on the CPU: {why}")
            return torch.device("cpu")
        slurm = ", or give run_slurm.py --gpus-per-node" if queued else ""
        reason = why or "PyTorch finds no GPU: use --device cpu, or install a CUDA build"
        raise InputError(f"device is cuda, but {reason}{slurm}")
    if local >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        remedy = (
            f"give run_slurm.py --gpus-per-node {local + 1} or more, or leave --tasks-per-node out"
            if queued
            else f"lower torchrun's --nproc-per-node to {count}"
        )
        raise InputError(f"local rank {local} has no GPU: PyTorch finds {count}; {remedy}")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def device_name(device: torch.device) -> str:
    """Describe a device, such as ``cuda (NVIDIA ...)`` or ``cpu (x86_64, 2 threads)``."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _unusable_gpu() -> str:
    """Return why PyTorch cannot use the NVIDIA GPUs of this machine; empty if there are none or they are hidden."""
    if not any(Path("/dev").glob("nvidia[0-9]*")) or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    if not torch.version.cuda:
        return (
            f"PyTorch {torch.__version__} is built without CUDA and cannot use this machine's GPU: install a CUDA "
            "build (pytorch.org), or give --device cpu"
        )
    try:
        torch.cuda.init()
    except Exception as error:  # the driver's version is part of the message
        cause = one_line(error)
        if "No CUDA GPUs are available" in cause:  # the job was given none
            return ""
    else:
        cause = "torch.cuda.is_available() is false"
    return (
        f"PyTorch {torch.__version__} cannot use this machine's GPU ({cause}): update the driver to one for CUDA "
        f"{torch.version.cuda}, install PyTorch for the driver's CUDA (pytorch.org), or give --device cpu"
    )


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed PyTorch's generators of the CPU and of this rank's GPU; ``torch.manual_seed`` seeds all GPUs."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


_store: Store | None = None


def start(device: torch.device, timeout: float = 1800.0) -> None:
    """Join the process group if torchrun started this process; NCCL on GPUs, gloo on CPUs.

    Args:
        timeout: seconds after which a collective fails.
    """
    global _store
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        limit = timedelta(seconds=timeout)
        # init_process_group could do this itself, but the watchdog also needs the store.
        _store, own_rank, world = next(rendezvous("env://", timeout=limit))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            _store = _fresh_store(_store, own_rank, world, timeout)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("run", _store),
            rank=own_rank,
            world_size=world,
            timeout=limit,
            device_id=device if device.type == "cuda" else None,
        )


def _fresh_store(shared: Store, own_rank: int, world: int, timeout: float) -> Store:
    """Return a store without keys of previous starts.

    When torchrun restarts the ranks (--max-restarts) it keeps its store, which contains the addresses of the dead
    ranks; gloo then tries to connect to them (PyTorch 2.15). The ranks of one start agree on a random prefix instead.
    The restart count cannot be the prefix, because each machine's torchrun has its own.

    Raises:
        RunStopped: the other ranks did not start within ``timeout`` seconds.
    """
    until = time.monotonic() + timeout
    own = uuid.uuid4().hex
    if own_rank > 0:
        shared.set(f"joins/{own_rank}", own)
    while time.monotonic() < until:
        if own_rank == 0:
            others = [f"joins/{number}" for number in range(1, world)]
            joined = [shared.get(key).decode() for key in others if shared.check([key])]
            shared.set("welcome", " ".join([own, *joined]))
            if shared.check([f"{own}/{number}" for number in range(1, world)]):
                return PrefixStore(own, shared)
        elif shared.check(["welcome"]):
            start, *joined = shared.get("welcome").decode().split()
            if own in joined:
                shared.set(f"{start}/{own_rank}", "here")
                return PrefixStore(start, shared)
        time.sleep(0.02)
    raise RunStopped(LOST, f"error: rank {own_rank} waited {timeout:g} s for the other {world - 1} ranks to start")


def store() -> Store | None:
    """Return the key-value store that the ranks share; None for a single process."""
    return _store


def stop() -> None:
    """Leave the process group if there is one."""
    global _store
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None


def raise_if_lost(error: Exception, where: str = "", remedy: str = "run the same command again") -> None:
    """Raise RunStopped with code LOST if the error means that a loader worker or another rank died.

    Args:
        where: added to the rank in the message, such as ``, step 7 (training step)``.
        remedy: the end of the message.
    """
    text = str(error).lower()
    # EOFError and ConnectionError: a worker died while sending a batch. BrokenPipeError: stdout is a closed pipe.
    lost_worker = isinstance(error, RuntimeError) and "dataloader worker (pid" in text
    if lost_worker or (isinstance(error, EOFError | ConnectionError) and not isinstance(error, BrokenPipeError)):
        advice = "if it ran out of memory, lower --num-workers"
        if "bus error" in text:
            advice = f"{SHARED_MEMORY} is full: {MORE_SHARED_MEMORY}, or lower --num-workers"
        why = f"{one_line(error) or type(error).__name__}; {advice}"
        raise RunStopped(LOST, f"error: rank {rank()}{where}: lost a loader worker ({why}); {remedy}") from error
    words = ("gloo", "nccl error", "connection closed by peer", "connection reset by peer", "broken pipe")
    lost_rank = isinstance(error, RuntimeError) and any(word in text for word in words)
    if "WORLD_SIZE" in os.environ and (lost_rank or isinstance(error, dist.DistError)):
        found = f"error: rank {rank()}{where}: lost another rank ({one_line(error)})"
        raise RunStopped(LOST, f"{found}; {remedy}") from error


def run_command(main: Callable[[], None], less_memory: str = LESS_MEMORY) -> None:
    """Run a command's ``main`` with :func:`dino_xcit.errors.run_main`, then leave the process group."""

    def run() -> None:
        try:
            main()
        except RuntimeError as error:
            raise_if_lost(error)
            if "deterministic implementation" in str(error):  # such as interpolated position embeddings on a GPU
                what = one_line(error).split(". ")[0]
                raise InputError(f"{what}: omit --deterministic, or use an XCiT (--arch xcit_small_12_p16)") from error
            raise

    try:
        run_main(run, less_memory)
    except BaseException as ending:
        code = ending.code if isinstance(ending, SystemExit) else 1
        if code and world_size() > 1:
            for number in STOP_SIGNALS:  # another signal would replace the exit code
                signal.signal(number, signal.SIG_IGN)
            # Destroying the process group would wait for ranks that may be dead.
            if not isinstance(ending, SystemExit):
                traceback.print_exc()
            end_children()
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
        raise
    finally:
        end_children()
        stop()


def end_children(only_daemons: bool = False) -> None:
    """Kill child processes: loader workers ignore SIGTERM, and Python waits for them when it exits."""
    children = [child for child in multiprocessing.active_children() if child.daemon or not only_daemons]
    if children and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise here
    for child in children:
        child.kill()


def barrier() -> None:
    """Wait for the other ranks."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Sum float tensors over all ranks in place, in one float32 message."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1).to(torch.float32) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows [n_r, ...] of all ranks in rank order, on every rank; n_r may differ."""
    if world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([rows.shape[0]], device=rows.device))
    most = max(int(count) for count in counts)
    padded = rows.new_zeros((most, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


T = TypeVar("T")


def broadcast_from_main(found: T) -> T:
    """Return rank 0's value on every rank."""
    if world_size() == 1:
        return found
    box = [found]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(work: Callable[[], T], cannot: str = "", remedy: str = "") -> T:
    """Run ``work`` on rank 0 and return its result on every rank. Must be called on every rank.

    Args:
        cannot, remedy: beginning and end of the InputError that replaces an OSError; empty: the OSError is raised.

    Raises:
        InputError: raised by ``work``, on every rank.
    """
    found: T | None = None
    refusal = None
    if is_main():
        try:
            found = work()
        except InputError as error:
            refusal = str(error)
        except OSError as error:
            if not cannot:
                raise
            refusal = f"{cannot}: {error.strerror or error}; {remedy}"
    refusal, found = broadcast_from_main((refusal, found))
    if refusal:
        raise InputError(refusal)
    return found  # type: ignore[return-value]


def gather_objects(own: T) -> list[T]:
    """Return the values of all ranks in rank order, on every rank."""
    if world_size() == 1:
        return [own]
    box: list[T] = [own] * world_size()
    dist.all_gather_object(box, own)
    return box


def ranks_without(path: Path) -> str:
    """Return the ranks that do not have rank 0's file, such as ``process 8 on node2 and 3 more``, or an empty string.

    Must be called on every rank; all get the same result. Compares the first 4 KB and waits up to 5 s for a network
    file system.
    """
    if world_size() == 1:
        return ""
    expected, until = broadcast_from_main(_first_bytes(path)), time.monotonic() + 5
    while (found := _first_bytes(path)) != expected and time.monotonic() < until:
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # refreshes the cache of a network file system
        time.sleep(0.1)
    own = f"process {rank()} on {socket.gethostname()}" if found != expected else ""
    missing = [name for name in gather_objects(own) if name]
    more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
    return missing[0] + more if missing else ""


def _first_bytes(path: Path) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read(4096)
    except OSError:
        return None


def wrap_ddp(module: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a module in DistributedDataParallel if there is more than one rank.

    Buffers are not broadcast: train_step averages the BatchNorm statistics in its own all-reduce.
    """
    if world_size() == 1:
        return module
    # Depthwise gradients differ in the stride of a dimension of size 1 only, so the layout is the same.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides", category=UserWarning)
    with warnings.catch_warnings():
        # PyTorch 2.15 renamed this argument to forward_sync_buffers, which 2.11 lacks.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        return nn.parallel.DistributedDataParallel(
            module,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def no_sync(module: nn.Module | None, skip: bool) -> AbstractContextManager[None]:
    """Return DDP's ``no_sync`` context if ``skip``, for all but the last forward pass of a step."""
    if skip and isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return nullcontext()
