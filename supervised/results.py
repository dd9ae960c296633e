"""The result file of a supervised run (:mod:`eval.results`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from dino_xcit.bounds import marked
from dino_xcit.config import ResumeSafe
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.train import TrainState
from dino_xcit.transform import EvalTransform
from eval.results import JsonObject, Metric, Result, now, transform_metadata, versions, write_json
from supervised.config import SupervisedConfig
from supervised.method import InitialWeights


def write_result(
    measure: str,
    config: SupervisedConfig,
    start: InitialWeights,
    state: TrainState,
    results: object,
    data: Mapping[str, JsonObject],
    transform: EvalTransform,
    seconds: float,
    metrics: Sequence[Metric],
) -> None:
    """Write ``config.json``, or results.json in the output directory; only on rank 0.

    The protocol has every setting that affects training, except for the weights and the data.

    Args:
        measure: ``finetune``, ``detect`` or ``segment``.
        results: as logged, plain values.
        data: ``train`` and ``val``: :func:`eval.results.data_metadata` and :func:`eval.results.images_metadata`.
    """
    if not distributed.is_main():
        return
    data_flags = {f"{part}_{what}" for part in ("train", "val") for what in ("data", "images", "annotations")}
    left_out = {*marked(type(config), ResumeSafe), "weights", "network", "arch", "data_path", *data_flags}
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}
    protocol: JsonObject = {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()}
    result = Result(
        measure=measure,
        protocol={"name": f"{measure}, recipe {config.recipe}", "completed_steps": state.step} | protocol,
        results=results,
        weights=start.metadata,
        data=dict(data),
        transform=transform_metadata(transform),
        metrics=tuple(metrics),
        device=distributed.device_name(state.skipped_steps.device),
        processes=distributed.world_size(),
        seconds=round(seconds, 2),
        date=now(),
        versions=versions(),
    )
    path = Path(config.json or Path(config.output_dir) / "results.json").expanduser()
    write_json(path, result.to_dict())
    log.info(f"written: {path}")
