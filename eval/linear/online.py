"""Linear probe during training: an observer for run_pretrain.py, measured with the k-NN of :mod:`eval.knn.online`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dino_xcit.data.loader import Batch
from dino_xcit.runtime import distributed
from dino_xcit.train import StepResult
from eval.stats import correct

LR = 1e-3
"""Learning rate of AdamW; the features have unit length times the square root of their dimension."""


class OnlineProbe:
    """Observer: trains a linear classifier on the teacher's features of each step, without gradients for the backbone.

    It follows features that change, on augmented views, so it usually stays below the linear probe of run_linear.py.
    All ranks hold the same classifier.
    """

    def __init__(self, dim: int, classes: int, device: torch.device, trained_on: NDArray[np.bool_]) -> None:
        """``dim``: dimension D of the features; ``trained_on``: [images], false for held-out images."""
        self._trained_on = torch.from_numpy(trained_on).to(device)
        self._classifier = nn.Linear(dim, classes, device=device)
        for parameter in self._classifier.parameters():
            nn.init.zeros_(parameter)  # the same on every rank
        self._optimizer = torch.optim.AdamW(self._classifier.parameters(), lr=LR, fused=True)
        self._loss: Tensor | None = None

    def on_step(self, result: StepResult, batch: Batch) -> None:
        if result.features is None or batch.labels is None:
            return
        views = len(result.features) // len(batch.labels)
        weights = self._trained_on[batch.indices].repeat(views).float()  # selecting rows would wait for the device
        losses = F.cross_entropy(self._scores(result.features), batch.labels.repeat(views), reduction="none")
        loss = losses @ weights
        gradients = torch.autograd.grad(loss, list(self._classifier.parameters()))
        total, rows = loss.detach(), weights.sum()
        distributed.all_reduce_sum([*gradients, total, rows])
        rows = rows.clamp_min(1)
        for parameter, gradient in zip(self._classifier.parameters(), gradients, strict=True):
            parameter.grad = gradient / rows
        self._optimizer.step()
        self._loss = total / rows

    def metrics(self) -> Mapping[str, float]:
        """Return ``probe_loss``, the cross-entropy of the last step on all ranks."""
        return {} if self._loss is None else {"probe_loss": float(self._loss)}

    @torch.no_grad()
    def top1(self, features: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
        """Return the accuracy in percent on features [rows, D]."""
        rows = torch.from_numpy(features).to(self._classifier.weight.device)
        return 100.0 * float(correct(self._scores(rows).topk(1).indices.cpu().numpy(), labels, 1).mean())

    def state_dict(self) -> dict[str, Any]:
        return {"classifier": self._classifier.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; the probe starts anew if the number of classes or features changed."""
        if state["classifier"]["weight"].shape != self._classifier.weight.shape:
            return
        self._classifier.load_state_dict(state["classifier"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _scores(self, features: Tensor) -> Tensor:
        unit = F.normalize(features.detach().float(), dim=1)
        return self._classifier(unit * unit.shape[1] ** 0.5)
