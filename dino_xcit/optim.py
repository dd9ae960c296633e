"""Parameter groups, optimizers and gradient clipping, none of which waits for the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dino_xcit.errors import InputError


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups: with weight decay, and without it for biases and 1-D tensors (norms, LayerScale).

    The class token, XCA's temperature and a trainable prototype length are not 1-D, so they decay, as in the
    reference.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (exempt if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed, "decays": True}, {"params": exempt, "decays": False, "weight_decay": 0.0}]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888) with momentum, as DINO's ``--optimizer lars``.

    Tensors of more than one dimension get weight decay and a rate scaled by eta * |w| / |gradient|; the others
    neither. ``found_inf``, a device scalar, makes a step a no-op, as in PyTorch's fused optimizers.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 1e-3,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; there is no use for a closure here."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1:
                    update = update + group["weight_decay"] * parameter
                    length, update_length = parameter.norm(), update.norm()
                    scaled = (length > 0) & (update_length > 0)
                    update = update * torch.where(scaled, group["eta"] * length / update_length, 1.0)
                state = self.state[parameter]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(parameter)
                mu = state["mu"] * group["momentum"] + update
                moved = parameter - group["lr"] * mu
                if self.found_inf is not None:
                    rejected = self.found_inf.bool()
                    mu = torch.where(rejected, state["mu"], mu)
                    moved = torch.where(rejected, parameter, moved)
                state["mu"].copy_(mu)
                parameter.copy_(moved)


OPTIMIZERS = ("adamw", "sgd", "lars")


def build_optimizer(name: str, module: nn.Module) -> torch.optim.Optimizer:
    """``adamw``, ``sgd`` (momentum 0.9) or ``lars`` over :func:`parameter_groups`; rates are set at each step.

    The fused kernels take ``found_inf``, so that a bad step is skipped without asking the device.
    """
    groups = parameter_groups(module)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
        for group in groups:
            for parameter in group["params"]:
                # A first step that is rejected would leave the buffer unset; zero gives the same first update.
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    if name == "lars":
        return LARS(groups)
    raise InputError(f"optimizer is {name!r}, expected one of {', '.join(OPTIMIZERS)}")


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate for all groups, and weight decay for those that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decays"]:
            group["weight_decay"] = weight_decay


CLIP_MODES = ("per-parameter", "global")


@torch.no_grad()
def clip_gradients(gradients: Sequence[Tensor], norms: Sequence[Tensor], limit: float, mode: str) -> None:
    """Scale gradients in place so that no norm exceeds ``limit``.

    Args:
        gradients: one a parameter.
        norms: their L2 norms, 0-d.
        limit: the largest norm allowed; 0 or less leaves the gradients as they are.
        mode: ``per-parameter``: each gradient by its own norm (the reference's way); ``global``: all by the norm of
            all together.
    """
    if limit <= 0 or not gradients:
        return
    if mode == "global":
        total = torch.linalg.vector_norm(torch.stack(list(norms)))
        factors = [(limit / (total + 1e-6)).clamp(max=1.0)] * len(gradients)
    elif mode == "per-parameter":
        factors = list((limit / (torch.stack(list(norms)) + 1e-6)).clamp(max=1.0).unbind(0))
    else:
        raise InputError(f"clip_mode is {mode!r}, expected one of {', '.join(CLIP_MODES)}")
    torch._foreach_mul_(list(gradients), factors)
