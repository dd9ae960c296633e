"""Result files for tests of eval.compare, with chosen hits and all other fields as the evaluators write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_fixtures import SMALL, noise_source
from numpy.typing import NDArray
from torch import nn

from dino_xcit.data import Source
from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import LoadedBackbone
from eval.compare import main
from eval.results import KNN_PROTOCOL, Metric, data_metadata, images_metadata, metric, result_content, write_json

IMAGES = 400
KNN: dict[str, object] = {"name": KNN_PROTOCOL, "ks": [20], "temperatures": [0.07]}


def hits(right: int, seed: int = 0, images: int = IMAGES) -> NDArray[np.bool_]:
    """Return hits [images] of which ``right`` are True, in random order."""
    return np.random.default_rng(seed).permutation(np.arange(images) < right)


def knn_metric(k: int, found: NDArray[np.bool_], temperature: float = 0.07, model: str = "trained") -> Metric:
    settings = {"model": model, "k": k, "T": temperature}
    return metric(f"{model} k={k} T={temperature:g} top-1", settings, found, baseline=model != "trained")


def write_result(
    path: Path,
    *metrics: Metric,
    measure: str = "knn",
    protocol: Mapping[str, object] = KNN,
    weights: str = "",
    transform: EvalTransform = SMALL,
    train: Source | None = None,
    val: Source | None = None,
) -> Path:
    """Write a result file. ``weights`` is the hash of the weights. Default: the stem of the file name."""
    parts = {"train": train or noise_source(30, seed=1), "val": val or noise_source(IMAGES)}
    loaded = LoadedBackbone(
        backbone=nn.Identity(),
        arch="xcit_pico_4_p4",
        network="teacher",
        path=path.with_suffix(".pth"),
        hash=weights or path.stem,
        transform=transform,
        data=None,
    )
    data = {name: data_metadata(part, part.fingerprint()) | images_metadata(part) for name, part in parts.items()}
    plain = [one.to_dict() for one in metrics]
    write_json(path, result_content(measure, protocol, [], loaded, data, transform, torch.device("cpu"), 1.0, plain))
    return path


def change(path: Path, value: object, *keys: Any) -> Path:
    """Replace the value at ``keys`` in a result file."""
    metadata = json.loads(path.read_text())
    place = metadata
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(metadata))
    return path


def compared(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, list[dict[str, Any]]]:
    """Run python -m eval.compare and return its output and its comparisons."""
    capsys.readouterr()
    main([*map(str, words), "--json", str(tmp_path / "out.json")])
    return capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())["comparisons"]


def refusal(*words: object) -> list[str]:
    """Return the lines of the error with which python -m eval.compare refuses its input."""
    with pytest.raises(InputError) as error:
        main([str(word) for word in words])
    return str(error.value).split("\n")
