"""What tests of runners share: images, weights that were trained on them, and words of a command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from eval_fixtures import CLASSES, image_tree, tiny_checkpoint
from run_here import Outcome

COUNT = 8 * len(CLASSES)
"""Training images."""


class Place(NamedTuple):
    """Where images and weights are."""

    data: Path
    weights: Path


def new_place(folder: Path, train: int = 8, val: int = 3) -> Place:
    """A labelled image tree, and weights that were trained on it."""
    tree = image_tree(folder / "photos", train, val)
    return Place(tree, tiny_checkpoint(folder / "run", tree))


def words(place: Place, *more: object, data: object = None) -> tuple[object, ...]:
    """Flags that every extraction has: small parts, nothing kept."""
    return (
        "--weights", place.weights, "--data-path", data or place.data / "train", "--no-cache", "--batch-size", 2,
        "--shard-images", 4, "--num-workers", 0, *more,
    )  # fmt: skip


def content(folder: Path) -> dict[str, Any]:
    """All files by name, the card without what tells the time."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    card = json.loads(files["card.json"])
    del card["date"]
    return files | {"card.json": card}


def done(outcome: Outcome) -> Outcome:
    """A command's outcome, if it ended well."""
    assert outcome.code == 0, outcome.out + outcome.err
    return outcome
