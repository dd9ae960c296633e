"""Shared fixtures of the runner tests: images, weights trained on them, and command-line flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from eval_fixtures import CLASSES, image_tree, tiny_checkpoint
from run_here import Outcome

COUNT = 8 * len(CLASSES)
"""Number of training images."""


class Place(NamedTuple):
    """Paths of the images and of the weights."""

    data: Path
    weights: Path


def new_place(folder: Path, train: int = 8, val: int = 3) -> Place:
    """Create a labelled image tree and weights trained on it; ``train`` and ``val`` count the images per class."""
    tree = image_tree(folder / "photos", train, val)
    return Place(tree, tiny_checkpoint(folder / "run", tree))


def words(place: Place, *more: object, data: object = None) -> tuple[object, ...]:
    """Return the flags common to all extractions: small shards, no feature cache."""
    return (
        "--weights", place.weights, "--data-path", data or place.data / "train", "--no-cache", "--batch-size", 2,
        "--shard-images", 4, "--num-workers", 0, *more,
    )  # fmt: skip


def content(folder: Path) -> dict[str, Any]:
    """Return the contents of all files by name; metadata.json is parsed and its date removed."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    metadata = json.loads(files["metadata.json"])
    del metadata["date"]
    return files | {"metadata.json": metadata}


def done(outcome: Outcome) -> Outcome:
    """Assert that a command succeeded and return its outcome."""
    assert outcome.code == 0, outcome.out + outcome.err
    return outcome
