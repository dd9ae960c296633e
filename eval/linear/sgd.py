"""Linear classifiers trained by SGD on augmented images: the paper's classifier and the grid.

Training is resumable: linear.pth is written after each epoch, and image order and crops depend only on the settings and
the epoch.

B batch size, D input features of a classifier, C classes, L classifiers, n images.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dino_xcit.data.workers import choose_workers
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import progress_bar
from eval.features import cached
from eval.linear.pooled import Rows
from eval.linear.probe import FILE_NAME, Probe, Record
from eval.linear.views import AugmentedEpoch, Views, kept_features, live_features
from eval.results import Metric, metric
from eval.stats import accuracy, correct, top_accuracies

MOMENTUM = 0.9
INIT_STD = 0.01
REFERENCE_BATCH = 256
"""Batch size to which learning rates refer (DINO, arXiv 2104.14294, appendix F.3)."""
_ROWS_AT_ONCE = 1024
_COLUMNS_AT_ONCE = 64
_VARIANCE_FLOOR = 1e-6


class LinearHeads:
    """L independent linear classifiers with a learning rate each, trained by SGD with momentum and no weight decay.

    All start with the same weights from N(0, 0.01^2) and zero biases.
    """

    def __init__(
        self, lrs: Sequence[float], classes: int, dim: int, seed: int, device: torch.device,
        standardise: Rows | None = None,
    ) -> None:  # fmt: skip
        """Initialise the classifiers.

        Args:
            lrs: [L] maximum learning rates, already scaled with the batch.
            standardise: n features whose mean and std standardise the input, like a BatchNorm without parameters. The
                classifiers remain linear (:meth:`folded`), but SGD converges on features that hardly differ from their
                mean.
        """
        start = torch.empty(classes, dim).normal_(0.0, INIT_STD, generator=torch.Generator().manual_seed(seed))
        shift, scale = np.zeros(dim), np.ones(dim)
        if standardise is not None:
            shift, variance = moments(standardise)
            scale = 1 / np.sqrt(variance + _VARIANCE_FLOOR)
        self.lrs = torch.tensor(list(lrs), dtype=torch.float32, device=device)
        self._state = {
            "weight": start.repeat(len(lrs), 1, 1).to(device),  # [L, C, D]
            "bias": torch.zeros(len(lrs), classes, device=device),
            "velocity_weight": torch.zeros(len(lrs), classes, dim, device=device),
            "velocity_bias": torch.zeros(len(lrs), classes, device=device),
            "shift": torch.as_tensor(shift, dtype=torch.float32).to(device),
            "scale": torch.as_tensor(scale, dtype=torch.float32).to(device),
        }

    def step(self, features: Tensor, labels: Tensor, taken: Tensor, lr_factor: float) -> Tensor:
        """Take one SGD step of all classifiers on the images of all ranks.

        Args:
            features: [B, D], without gradient.
            labels: [B].
            taken: [B], 1 for images to train on, 0 for others. The loss is the mean over the former.
            lr_factor: factor of the learning rates from the schedule.

        Returns:
            [L] mean cross-entropies before the step, on the device.
        """
        parameters = [self._state[name] for name in ("weight", "bias")]
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        logits = linear(self._standard(features), *leaves)
        each = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(self.lrs)), reduction="none")
        sums = (each.view(len(self.lrs), -1) * taken).sum(dim=1)
        gradients = list(torch.autograd.grad(sums.sum(), leaves))
        sums, count = sums.detach(), taken.sum()
        distributed.all_reduce_sum([*gradients, sums, count])
        count.clamp_(min=1)
        for name, parameter, gradient in zip(("weight", "bias"), parameters, gradients, strict=True):
            velocity = self._state[f"velocity_{name}"]
            velocity.mul_(MOMENTUM).add_(gradient / count)
            parameter.sub_(lr_factor * self.lrs.view(-1, *[1] * (parameter.ndim - 1)) * velocity)
        return sums / count

    def folded(self, head: int) -> tuple[Tensor, Tensor]:
        """Return weight [C, D] and bias [C] of one classifier for features without standardisation, on the CPU."""
        state = self.state_dict()
        weight = state["weight"][head].double() * state["scale"].double()
        bias = state["bias"][head].double() - weight @ state["shift"].double()
        return weight.float(), bias.float()

    def _standard(self, features: Tensor) -> Tensor:
        return (features - self._state["shift"]) * self._state["scale"]

    def guesses(self, features: Rows, heads: Sequence[int]) -> NDArray[np.int64]:
        """Predict the labels of features [n, D] with some classifiers, best first: [heads, n, min(5, C)]."""
        weight, bias = self._state["weight"][list(heads)], self._state["bias"][list(heads)]
        return guesses(lambda rows: linear(self._standard(rows), weight, bias), features, weight.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return parameters, momenta and standardisation on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self._state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of :meth:`state_dict`."""
        for name, target in self._state.items():
            target.copy_(state[name])


@torch.no_grad()
def guesses(logits: Callable[[Tensor], Tensor], features: Rows, device: torch.device) -> NDArray[np.int64]:
    """Return the classes with the largest ``logits(rows [m, D]) -> [..., m, C]``, best first: [..., n, min(5, C)]."""
    found = []
    for start in range(0, max(1, len(features)), _ROWS_AT_ONCE):
        scores = logits(torch.from_numpy(features[start : start + _ROWS_AT_ONCE]).to(device))
        found.append(scores.topk(min(5, scores.shape[-1]), dim=-1).indices.cpu())
    return torch.cat(found, dim=-2).numpy()


def moments(features: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute mean [D] and variance [D] in float64, in chunks of columns to limit memory."""
    means, variances, first = np.zeros(features.width), np.zeros(features.width), features.columns.start
    for start in range(0, features.width, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, features.width)
        wide = Rows(features.matrix, slice(first + start, first + stop), features.chosen)[:].astype(np.float64)
        means[start:stop], variances[start:stop] = wide.mean(axis=0), wide.var(axis=0)
    return means, variances


def linear(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute the logits of L classifiers: [B, D], [L, C, D], [L, C] to [L, B, C]."""
    heads, classes, _ = weight.shape
    logits = features @ weight.flatten(0, 1).t() + bias.flatten()
    return logits.view(len(features), heads, classes).transpose(0, 1)


def cosine_factor(epoch: int, epochs: int) -> float:
    """Return the learning-rate factor of a 0-based epoch: a cosine from 1 towards 0, constant within an epoch."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def train_heads(probe: Probe, stored: Record | None) -> Record:
    """Train all epochs, or the remaining ones of an interrupted run.

    Args:
        stored: content of linear.pth from an earlier run.

    Returns:
        The final content of linear.pth; complete on rank 0 only.
    """
    config, device, sampler, columns = probe.config, probe.device, probe.sampler, probe.pooled.columns
    batch, epochs, steps = sampler.global_batch, config.epochs, sampler.steps_per_epoch
    held = probe.rows(probe.held_source) if probe.lrs else {}
    val, val_labels = probe.rows(probe.val), np.asarray(probe.val.labels)

    def heads_of(lrs: Sequence[float], features: str, standardise: Rows | None = None) -> LinearHeads:
        rates = [lr * batch / REFERENCE_BATCH for lr in lrs]
        return LinearHeads(rates, probe.classes, val[features].width, config.seed, device, standardise)

    paper = heads_of([config.lr], "cls")
    grids = {name: heads_of(probe.lrs, name, held[name]) for name in config.features if held}
    content: Record = {"epoch": 0, "history": [], "best_hits": None, "seconds": 0.0}
    if stored:
        content |= stored
        paper.load_state_dict(stored["paper"])
        for name, heads in grids.items():
            heads.load_state_dict((stored["grid"] or {}).get(name, {}))
        log.info(f"resuming {probe.folder} after epoch {stored['epoch']}")
    done, spent = int(content["epoch"]), float(content["seconds"])
    sampler.start_step, sampler.stop_step = done * steps, epochs * steps
    batches = _batches(probe)
    labels, for_paper = torch.from_numpy(probe.labels).to(device), torch.ones(config.batch_size_per_gpu, device=device)
    for_grid = torch.ones(len(labels), device=device)  # 0 for held-out images
    for_grid[torch.from_numpy(probe.held).to(device)] = 0
    images = steps * batch
    with progress_bar(epochs * images, "probe", shown=distributed.is_main(), done=done * images) as bar:
        for epoch in range(done, epochs):
            loss, factor = torch.zeros(1, device=device), cosine_factor(epoch, epochs)
            for _ in range(steps):
                features, chosen = next(batches)
                loss += paper.step(features[:, columns["cls"]], labels[chosen], for_paper, factor) / steps
                for name, heads in grids.items():
                    heads.step(features[:, columns[name]], labels[chosen], for_grid[chosen], factor)
                bar.update(batch)
            if not distributed.is_main():
                continue
            bar.clear()
            found = paper.guesses(val["cls"], [0])[0]
            top1, top5 = accuracy(found, val_labels, 1), accuracy(found, val_labels, 5) if probe.classes > 5 else None
            if not math.isfinite(loss.item()):
                raise InputError(f"lr {config.lr:g} is too high: the loss is not finite in epoch {epoch + 1}; lower it")
            if top1 > max((record["top1"] for record in content["history"]), default=-1.0):  # keep the first in a tie
                content["best_hits"] = torch.from_numpy(correct(found, val_labels, 1))
            content["history"].append({"epoch": epoch + 1, "loss": loss.item(), "top1": top1, "top5": top5})
            log.info(f"epoch {epoch + 1}/{epochs}: loss {loss.item():.4f}, top-1 {top1:.2f} with the paper's lr")
            content |= {
                "epoch": epoch + 1,
                "paper": paper.state_dict(),
                "grid": {name: heads.state_dict() for name, heads in grids.items()},
                "classes": list(probe.train.classes) if probe.train.classes else None,
                "seconds": spent + time.perf_counter() - probe.started,
            }
            if epoch + 1 == epochs:
                content |= final_results(probe, content, paper, grids)
            probe.write(FILE_NAME, content, probe.identity)
    return content


def _batches(probe: Probe) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features [B, W] and indices [B] of the training images of each step, extracted or from the cache."""
    config, transform, device = probe.config, probe.transform, probe.device
    views = Views(probe.train, transform, config.crop_scale, config.seed)
    if not config.cached:
        workers = choose_workers(config.num_workers, distributed.processes_here())
        return live_features(probe.pooled, views, probe.sampler, workers, device)
    # Augmented images already have the crop's size, and values from 0 to 1 if they are no RGB images.
    range_of_views = () if transform.channels == 3 else (0.0, 1.0)
    whole = dataclasses.replace(transform, resize=transform.crop, value_range=range_of_views)
    epochs = [
        cached(
            probe.pooled, probe.row_hash, AugmentedEpoch(views, epoch, probe.identity["train"]), whole, device,
            probe.cache, config.batch_size_per_gpu, config.num_workers, half=config.cached_precision == "float16",
        ).features
        for epoch in range(min(config.cached_epochs, config.epochs))
    ]  # fmt: skip
    return kept_features(epochs, probe.sampler, device)


def final_results(probe: Probe, content: Record, paper: LinearHeads, grids: Mapping[str, LinearHeads]) -> Record:
    """Compute the final results and choose the recommended classifier.

    Args:
        content: ``history``, a record of the paper's classifier for each epoch, and ``best_hits`` [n], its hits in the
            best epoch; None if an older version trained it.
        grids: classifiers of the grid by choice of features. The best is chosen on held-out training images; only this
            one is evaluated on the validation images.

    Returns:
        ``results`` and ``metrics`` (:meth:`Metric.to_dict`) for the result file, and ``classifier`` with weight
        [C, D] and bias [C] for features without standardisation: the best of the grid, or the paper's without a grid.
    """
    lr, history, best_hits = probe.config.lr, content["history"], content["best_hits"]
    val, labels = probe.rows(probe.val), np.asarray(probe.val.labels)
    metrics: list[Metric] = []

    def final(name: str, features: str, heads: LinearHeads, head: int) -> Record:
        found = heads.guesses(val[features], [head])[0]
        hits = correct(found, labels, 1)
        metrics.append(metric(f"{name}, last epoch, top-1", {"classifier": name, "epoch": "last"}, hits))
        tops = top_accuracies(found, labels, five=history[-1]["top5"] is not None)
        return {one: tops[one] for one in ("top1", "top1_interval", "top5")}

    best = max(history, key=lambda record: float(record["top1"]))
    results: Record = {
        "paper": {
            "lr": lr,
            "last_epoch": final("paper", "cls", paper, 0),
            "best_epoch": {**best, "chosen_on": "validation images, as published figures are"},
        }
    }
    settings = {"classifier": "paper", "epoch": "best"}
    hits = None if best_hits is None else best_hits.numpy()
    metrics.append(Metric("paper, best epoch, top-1", settings, float(best["top1"]), hits))
    features, (weight, bias) = "cls", paper.folded(0)
    if grids:
        held, answers, lrs = probe.rows(probe.held_source), probe.labels[probe.held], probe.lrs
        held_out = {
            name: [accuracy(found, answers, 1) for found in heads.guesses(held[name], range(len(lrs)))]
            for name, heads in grids.items()
        }
        features = max(held_out, key=lambda name: max(held_out[name]))
        winner = int(np.argmax(held_out[features]))
        lr = lrs[winner]
        results["grid"] = {
            "lr": lr,
            "features": features,
            "chosen_on": "held-out training images",
            "held_out_images": len(answers),
            "held_out_top1": held_out[features][winner],
            **final("grid", features, grids[features], winner),
            "held_out_top1_by_lr": [list(pair) for pair in zip(lrs, held_out[features], strict=True)],
            "held_out_top1_by_features": {name: max(found) for name, found in held_out.items()},
        }
        weight, bias = grids[features].folded(winner)
    return {
        "results": results,
        "metrics": [one.to_dict() for one in metrics],
        "classifier": {"weight": weight, "bias": bias, "lr": lr, "features": features},
    }
