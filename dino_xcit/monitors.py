"""Signals of collapse, from the last batch of logged steps. B batch, G global views, D features, K prototypes."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dino_xcit.data.loader import Batch
from dino_xcit.methods import Method
from dino_xcit.runtime import distributed
from dino_xcit.runtime.memory import peak_memory
from dino_xcit.train import StepResult

WINDOW = 10
"""Logged steps over which distinct prototypes are counted. A resumed run starts with an empty window."""


class StepMonitors:
    """Observer: measures prototypes, features and networks over the batches of all ranks.

    A method without prototypes, without a teacher or without features of global views lacks the metrics of these.
    """

    def __init__(self, method: Method) -> None:
        self._method = method
        self._last: tuple[StepResult, int] | None = None
        self._chosen: deque[Tensor] = deque(maxlen=WINDOW)

    def on_step(self, result: StepResult, batch: Batch) -> None:
        self._last = result, len(batch.indices)

    @torch.no_grad()
    def metrics(self) -> Mapping[str, float]:
        """Return the metrics of :func:`prototype_metrics`, :func:`feature_metrics`, :func:`teacher_distance` and
        :func:`gradient_norms_by_part`, and ``memory_gb``, the peak of this rank's process or GPU so far."""
        if self._last is None:
            return {}
        (result, images), method = self._last, self._method
        self._last = None  # a skipped step has no values of its own
        metrics: dict[str, Tensor | float] = {}
        if result.prototype_logits is not None:
            self._chosen.append(result.prototype_logits.argmax(dim=1))
            chosen = torch.cat(list(self._chosen))
            metrics |= prototype_metrics(result.prototype_logits, result.rates.teacher_temp, chosen)
        if result.features is not None:
            metrics |= feature_metrics(result.features, images)
        if method.teacher is not None:
            metrics |= teacher_distance(method.teacher, method.trained)
        metrics |= gradient_norms_by_part(result)
        metrics["memory_gb"] = peak_memory(result.loss.device) / 1e9
        return {name: float(value) for name, value in metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def prototype_metrics(logits: Tensor, teacher_temp: float, chosen: Tensor) -> dict[str, Tensor]:
    """Measure how the teacher uses its prototypes, over all ranks.

    The probabilities are the softmax of logits / T, without centering or Sinkhorn-Knopp, which keep the mean even in
    a collapsed run.

    Args:
        logits: [G * B, K], the teacher's.
        teacher_temp: T.
        chosen: the most probable prototype of each row of the last logged steps.

    Returns:
        ``prototype_perplexity``: exp H(mean row), 1 to K. ``mutual_information``: H(mean row) - mean H(row) in nats,
        0 in every collapse. ``distinct_prototypes``: the number of different values in ``chosen``.
    """
    log_p = (logits.float() / teacher_temp).log_softmax(dim=1)
    probabilities = log_p.exp()
    total, row_entropy = probabilities.sum(dim=0), -torch.dot(probabilities.flatten(), log_p.flatten())
    rows = total.new_tensor(float(len(probabilities)))
    used = torch.zeros_like(total).index_fill_(0, chosen, 1.0)
    distributed.all_reduce_sum([total, row_entropy, rows, used])
    mean_entropy = torch.special.entr(total / rows).sum()
    return {
        "prototype_perplexity": mean_entropy.exp(),
        "mutual_information": mean_entropy - row_entropy / rows,
        "distinct_prototypes": (used > 0).sum(),
    }


def feature_metrics(features: Tensor, images: int) -> dict[str, Tensor]:
    """Measure the unit features of all ranks.

    Args:
        features: [G * B, D], view-major.
        images: B.

    Returns:
        ``feature_dimensions``: the participation ratio (tr C)^2 / tr C^2 of the covariance C: the number of dimensions
        that vary, at most D and the number of rows. ``view_agreement``: mean cosine of two views of an image; only for
        two views.
    """
    unit = nn.functional.normalize(features.float(), dim=1)
    views = unit.unflatten(0, (2, images)) if len(unit) == 2 * images else None
    total, rows = unit.sum(dim=0), unit.new_tensor(float(len(unit)))
    agreement = views.prod(dim=0).sum() if views is not None else unit.new_zeros(())
    distributed.all_reduce_sum([total, rows, agreement])
    centred = unit.double() - total / rows  # float64: the rows of a collapsing network are nearly equal
    with torch.autocast(unit.device.type, enabled=False):
        covariance = centred.T @ centred / rows
    distributed.all_reduce_sum([covariance])
    dimensions = covariance.trace().square() / covariance.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return {"feature_dimensions": dimensions} | ({} if views is None else {"view_agreement": 2 * agreement / rows})


def teacher_distance(teacher: nn.Module, student: nn.Module) -> dict[str, Tensor]:
    """Return ``teacher_distance``, ||teacher - student|| / ||student|| over the matrices and kernels that both networks
    have; nothing if there are none."""
    own = {name: one.detach() for name, one in student.named_parameters() if one.ndim > 1}
    other = {name: one.detach() for name, one in teacher.named_parameters()}
    names = [name for name, one in own.items() if name in other and other[name].shape == one.shape]
    if not names:
        return {}
    students = [own[name] for name in names]
    differences = torch._foreach_sub([other[name] for name in names], students)
    norms = (torch.stack(torch._foreach_norm(tensors)).norm() for tensors in (differences, students))
    return {"teacher_distance": torch.div(*norms)}


def gradient_norms_by_part(result: StepResult) -> dict[str, Tensor]:
    """Return ``gradient_norm_stem``, ``_blocks`` and ``_head``, before clipping; the stem is all that is in the
    backbone but not in a block."""
    squares: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(result.gradient_names):
        part = "head" if not name.startswith("backbone.") else "blocks" if "blocks." in name else "stem"
        squares[part].append(index)
    return {f"gradient_norm_{part}": result.gradient_norms[indices].norm() for part, indices in squares.items()}
