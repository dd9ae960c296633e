"""Data sets that torchvision knows how to fetch and read (``torchvision:FashionMNIST``)."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from numpy.typing import NDArray

from dino_xcit.data.decode import UndecodableImage
from dino_xcit.data.source import MAX_CLASSES, Item, hash_lines
from dino_xcit.errors import InputError, near_matches, one_line


class TorchvisionSource:
    """A labelled torchvision data set; images are decoded by torchvision."""

    def __init__(self, name: str, part: str, root: Path | None = None) -> None:
        """``root``: where the files are or shall go; default $TORCHVISION_DATA or ~/.cache/torchvision."""
        factory: Any = getattr(torchvision.datasets, name, None)
        if factory is None or not inspect.isclass(factory):
            near = near_matches(name, torchvision.datasets.__all__) or ": expected a name such as torchvision:CIFAR10"
            raise InputError(f"torchvision has no data set {name!r}{near}")
        root = root or Path(os.environ.get("TORCHVISION_DATA", Path.home() / ".cache" / "torchvision"))
        accepts = inspect.signature(factory).parameters
        options: dict[str, object] = {"root": str(root)}
        if "download" in accepts:
            options["download"] = True
        if "train" in accepts:
            options["train"] = part == "train"
        elif "split" in accepts:
            options["split"] = "train" if part == "train" else "test"
        try:
            self._data: Any = factory(**options)
        except Exception as error:  # each data set raises its own kinds: RuntimeError, URLError, ValueError ...
            raise InputError(
                f"torchvision could not open {name} in {root}: {one_line(error)}; put its files there, or name another "
                "folder in TORCHVISION_DATA"
            ) from error
        self.url = f"torchvision:{name}/{part}"
        targets = getattr(self._data, "targets", getattr(self._data, "labels", getattr(self._data, "_labels", None)))
        self.labels = _class_numbers(targets, len(self))
        self.classes: tuple[str, ...] | None = None
        if self.labels is not None:
            count = int(self.labels.max()) + 1
            names = tuple(str(name) for name in getattr(self._data, "classes", None) or ())
            self.classes = names if len(names) >= count else tuple(str(label) for label in range(count))

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> tuple[Item, int | None]:
        try:
            pixels = np.asarray(self._data[range(len(self))[index]][0].convert("RGB"))
        except Exception as error:  # of any class: torchvision reads, and decodes, in many ways
            cause = one_line(error) or type(error).__name__
            remedy = "remove the data set's files, so that they are fetched anew"
            raise UndecodableImage(f"{self.name(index)} cannot be read: {cause}; {remedy}", cause) from error
        return pixels, None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.url}/{range(len(self))[index]:06d}"

    def fingerprint(self) -> str:
        labels = [] if self.labels is None else self.labels.tolist()
        return hash_lines([self.url, str(len(self)), str(labels)])


def _class_numbers(targets: object, images: int) -> NDArray[np.int64] | None:
    """[images], or None where a set's targets are no numbers of classes: boxes, attributes, texts."""
    try:
        labels = np.asarray(targets)
    except ValueError:  # ragged
        return None
    if labels.shape != (images,) or not images or labels.dtype.kind not in "iu":
        return None
    return labels.astype(np.int64) if 0 <= labels.min() <= labels.max() < MAX_CLASSES else None
