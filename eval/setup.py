"""Common setup of the evaluation commands: device, ranks, backbone, data and feature cache."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from dino_xcit.data import Source, open_parts
from dino_xcit.data.measure import choose_white_level
from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.transform import EvalTransform, require_rgb
from dino_xcit.weights import Allowed, LoadedBackbone, load_backbone
from dino_xcit.weights.locate import is_remote
from eval.config import BackboneConfig, KnnConfig, LinearConfig


def open_weights(config: BackboneConfig, rgb: bool = True) -> tuple[LoadedBackbone, torch.device]:
    """Join the other ranks and load the frozen backbone to this rank's device.

    Args:
        rgb: refuse weights for images of other than three channels.

    Raises:
        InputError: no weights are given, the weights are invalid, or an output file is not writable.
    """
    if not config.weights:
        raise InputError("no weights given: add --weights FILE, such as runs/.../checkpoint.pth, or hf-hub:ORG/NAME")
    device = distributed.choose_device(config.device)
    distributed.start(device)
    demand_writable(config.written())
    allowed = Allowed(config.allow_missing, config.allow_unexpected)
    loaded = load_backbone(config.weights, config.network, config.arch or None, allowed)
    if rgb:
        require_rgb(loaded.transform.pixel_format, config.weights)
    loaded.backbone.to(device)
    log.info(loaded.describe())
    return loaded, device


def open_backbone(
    config: BackboneConfig, fixed: EvalTransform | None = None, rgb: bool = True
) -> tuple[LoadedBackbone, torch.device]:
    """Load the backbone like :func:`open_weights` and resolve its transform.

    Args:
        fixed: transform that overrides those of the weights and the settings.
        rgb: see :func:`open_weights`.
    """
    loaded, device = open_weights(config, rgb)
    stored = loaded.transform
    crop = config.eval_crop or stored.crop
    resize = config.eval_resize or (round(crop * 8 / 7) if config.eval_crop else stored.resize)
    white_level = config.white_level or stored.white_level
    transform = fixed or dataclasses.replace(stored, resize=resize, crop=crop, white_level=white_level)
    as_stored = not fixed and transform == stored
    origin = f" ({loaded.transform_from})" if as_stored and loaded.transform_from else ""
    log.info(f"images: {transform.interpolation} resize to {transform.resize}, centre crop {transform.crop}{origin}")
    usual = transform == EvalTransform() and loaded.training  # the default is right for DINO's files
    if as_stored and not loaded.transform_from and not usual:
        log.warning(
            f"{loaded.path.name} stores no transform; this one is a guess: {loaded.transform_guess} "
            "(--eval-resize and --eval-crop override it)"
        )
    return dataclasses.replace(loaded, transform=transform), device


def labelled_parts(config: KnnConfig | LinearConfig, loaded: LoadedBackbone) -> tuple[Source, Source]:
    """Open the given training and validation parts, or those of the checkpoint's training data.

    Raises:
        InputError: a part is missing or has no labels.
    """
    data = config.data_path or None
    if data is None and not (config.train_data and config.val_data):
        data = loaded.data
        if data is None:
            raise InputError(f"{loaded.path} does not name its training data: give --data-path DIR")
        log.info(f"data: {data}, the training data of the checkpoint (--data-path overrides it)")
    train, val = open_parts(data, config.train_data or None, config.val_data or None)
    if loaded.transform.channels == 3:
        choose_white_level(train, loaded.transform.white_level)  # for its warning
    return train, val


def cache_folder(config: BackboneConfig) -> Path | None:
    """Return the folder of the feature cache; None with ``--no-cache``, or with a warning if it is not writable.

    Raises:
        InputError: ``--cache-dir`` is not writable.
    """
    if not config.cache:
        return None
    folder = beside_weights(config, config.cache_dir, "features")
    problem = distributed.on_main(partial(_why_not_writable, folder))
    if problem and config.cache_dir:
        raise InputError(f"cache_dir is {folder}, which cannot be written to: {problem}")
    if problem:
        log.warning(f"features are not cached: {folder} cannot be written to: {problem} (give another --cache-dir)")
    return None if problem else folder


def beside_weights(config: BackboneConfig, given: str, name: str) -> Path:
    """Return ``given``, else the folder ``name`` beside the weights, or below ``runs`` for weights from a hub."""
    if given:
        return Path(given).expanduser()
    if is_remote(config.weights):
        return Path("runs") / re.sub(r"[^\w.]+", "-", config.weights) / name
    return Path(config.weights).expanduser().parent / name


def demand_writable(files: Mapping[str, str]) -> None:
    """Create the folders of output files and check that the files are writable, before work that may take hours.

    Args:
        files: output files by setting name; empty strings are ignored.

    Raises:
        InputError: a file is not writable.
    """
    for name, file in files.items():
        path = Path(file).expanduser()
        is_new = not path.parent.exists()
        if file and (problem := distributed.on_main(partial(_why_not_writable, path.parent, path))):
            raise InputError(f"{name} is {file}, which cannot be written: {problem}; give another path")
        if file and is_new:
            log.info(f"created the folder {path.parent} for {name}")


def _why_not_writable(folder: Path, file: Path | None = None) -> str | None:
    """Create the folder and return why it, or ``file`` in it, is not writable; None if it is."""
    if file and file.exists() and not file.is_file():
        return "it is a folder" if file.is_dir() else "it is no regular file"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{file.name if file else ''}.", dir=folder):
            return None
    except OSError as error:
        return one_line(error)
