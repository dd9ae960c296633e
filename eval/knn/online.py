"""k-NN and the online probe during training: an evaluator for run_pretrain.py."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dino_xcit.config import PretrainConfig
from dino_xcit.data import Source, Subset, open_parts
from dino_xcit.data.source import evenly_spaced
from dino_xcit.errors import InputError
from dino_xcit.methods import Method
from dino_xcit.observers import Evaluator
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from eval.features import extract, unreadable_notice
from eval.knn.classify import knn_predict
from eval.linear.online import OnlineProbe
from eval.search_index import DeviceIndex, build_index
from eval.stats import correct

K, TEMPERATURE = 20, 0.07


def build_probe(config: PretrainConfig, source: Source, method: Method, device: torch.device) -> OnlineProbe | None:
    """Build the online probe, which does not train on held-out images; None without labels, if ``knn_every`` is 0, or
    if the k-NN has other training data, whose classes may differ."""
    if not config.knn_every or source.labels is None or config.train_data:
        return None
    trained_on = np.ones(len(source), dtype=np.bool_)
    if config.knn_holdout:
        trained_on[_held_out(len(source), config.knn_holdout, config.seed)] = False
    classes, dim = int(source.labels.max()) + 1, int(method.eval_backbone.embed_dim)  # type: ignore[arg-type]
    return OnlineProbe(dim, classes, device, trained_on)


def build_evaluators(
    config: PretrainConfig, source: Source, device: torch.device, probe: OnlineProbe | None = None
) -> list[Evaluator]:
    """Build the evaluator of ``knn_top1`` and, with a probe, ``probe_top1``; an empty list if ``knn_every`` is 0.

    With ``knn_holdout`` the queries are training images held out from the neighbours, so that settings can be chosen
    without the validation images. Unreadable images are skipped and reported at the first measurement.

    Raises:
        InputError: labels or the validation part are missing.
    """
    if not config.knn_every:
        return []
    if config.knn_holdout:
        train, val = _hold_out(source, config.knn_holdout, config.seed)
    else:
        train, val = open_parts(config.data_path, config.train_data or None, config.val_data or None)
    if len(train) > config.knn_max_images:
        train = Subset(train, np.array(evenly_spaced(len(train), config.knn_max_images)))
    transform, reported = config.eval_transform(), set[str]()

    def features(method: Method, name: str, part: Source) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        found = extract(method.eval_backbone, part, transform, device, progress=False, unreadable="skip", finite=False)
        assert found.labels is not None  # checked by open_parts and _hold_out
        if len(found.unreadable) and name not in reported:
            reported.add(name)
            log.warning(f"k-NN during training: {unreadable_notice(name, part, found.unreadable)}")
        finite = np.isfinite(found.features).all(axis=1)  # a diverged teacher gives NaN
        return found.features[finite], found.labels[finite]

    def measure(method: Method) -> dict[str, float]:
        neighbours, labels = features(method, "training", train)
        queries, answers = features(method, "validation", val)
        if not len(neighbours) or not len(queries):
            return {"knn_top1": float("nan")}
        on_gpu = device.type == "cuda"
        index = DeviceIndex(neighbours, device) if on_gpu else build_index(neighbours, distributed.processes_here())
        mine = slice(distributed.rank(), None, distributed.world_size())  # the ranks share the queries
        predicted = knn_predict(neighbours, labels, queries[mine], [K], [TEMPERATURE], index=index)
        hits = torch.tensor(float(correct(predicted[K, TEMPERATURE], answers[mine], 1).sum()), device=device)
        distributed.all_reduce_sum([hits])
        found = {"knn_top1": 100.0 * float(hits) / len(queries)}
        return found | ({"probe_top1": probe.top1(queries, answers)} if probe else {})

    return [Evaluator("knn", config.knn_every, measure)]


def _hold_out(source: Source, count: int, seed: int) -> tuple[Source, Source]:
    """Split off ``count`` images chosen by ``seed``: the remaining images, the held-out images."""
    if source.labels is None:
        raise InputError(f"knn_holdout is {count}, but {source.url} has no labels: give --knn-every 0")
    if count >= len(source):
        raise InputError(f"knn_holdout is {count}, but {source.url} has only {len(source)} images")
    held_out = _held_out(len(source), count, seed)
    return Subset(source, np.setdiff1d(np.arange(len(source)), held_out)), Subset(source, held_out)


def _held_out(images: int, count: int, seed: int) -> NDArray[np.int64]:
    # Another stream than the sampler's (seed, epoch): else the held-out images would begin its second epoch.
    return np.sort(np.random.default_rng([seed, 0, 1]).permutation(images)[:count])
