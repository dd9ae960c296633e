"""The processes of a run: who am I, what do we share. One process needs none of it, and every call still works."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino_xcit.errors import InputError, run_main


def rank() -> int:
    """This process's number, 0-based; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes the run has; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


def processes_here() -> int:
    """How many processes of this run share this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def say(text: str) -> None:
    """Print a line, once a run."""
    if is_main():
        print(text, flush=True)


def choose_device(wanted: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` to this process's device; on a GPU, the one that torchrun's LOCAL_RANK names.

    Raises:
        InputError: a GPU was asked for, or more of them than there are.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("device is cuda, but PyTorch sees no GPU: use --device cpu, or install a CUDA build")
    if local >= torch.cuda.device_count():
        raise InputError(
            f"process {local} on this machine has no GPU: PyTorch sees {torch.cuda.device_count()}; lower "
            "--nproc-per-node to that"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def start(device: torch.device) -> None:
    """Join the other processes if torchrun started this one; NCCL between GPUs, gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def run_command(main: Callable[[], None]) -> None:
    """Run a console command's ``main``: the user's mistakes become one sentence and exit code 2, and the process group
    is left however it ends."""
    try:
        run_main(main)
    finally:
        stop()


def barrier() -> None:
    """Wait for the other processes."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Sum float tensors over all processes, in place, in one message."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1).to(torch.float32) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def gather_rows(rows: Tensor) -> Tensor:
    """All processes' rows [n_r, ...] one below the other in rank order, on every process; n_r may differ."""
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


def main_decides(error: str | None) -> str | None:
    """What the main process found (an error's sentence, or None), on every process."""
    if world_size() == 1:
        return error
    box: list[str | None] = [error]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """SyncBatchNorm where it can run (CUDA, more than one process); elsewhere the module as it is."""
    if device.type == "cuda" and world_size() > 1:
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return module


def share_gradients(module: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a module in DistributedDataParallel where there is more than one process.

    Buffers are not broadcast: the training step averages the BatchNorm statistics itself, with the centre.
    """
    if world_size() == 1:
        return module
    return nn.parallel.DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def without_sharing(module: nn.Module, skip: bool) -> AbstractContextManager[None]:
    """A context in which a wrapped module keeps its gradients to itself, if ``skip`` (all but the last of a step's
    forward passes)."""
    if skip and isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return nullcontext()
