"""Data sets that torchvision downloads and decodes (``torchvision:FashionMNIST``)."""

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
        """``root``: folder of the files, also for downloads; default $TORCHVISION_DATA or ~/.cache/torchvision."""
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
        except Exception as error:  # RuntimeError, URLError, ValueError ..., depending on the data set
            raise InputError(
                f"torchvision cannot open {name} in {root}: {one_line(error)}; put its files there, or set "
                "TORCHVISION_DATA to their folder"
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
        except Exception as error:  # any exception, depending on the data set
            cause = one_line(error) or type(error).__name__
            remedy = "remove the files of the data set to download them again"
            raise UndecodableImage(f"{self.name(index)} cannot be read: {cause}; {remedy}", cause) from error
        return pixels, None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.url}/{range(len(self))[index]:06d}"

    def fingerprint(self) -> str:
        labels = [] if self.labels is None else self.labels.tolist()
        return hash_lines([self.url, str(len(self)), str(labels)])


def _class_numbers(targets: object, images: int) -> NDArray[np.int64] | None:
    """Return labels [images], or None if the targets are not class numbers (boxes, attributes, texts)."""
    try:
        labels = np.asarray(targets)
    except ValueError:  # ragged
        return None
    if labels.shape != (images,) or not images or labels.dtype.kind not in "iu":
        return None
    return labels.astype(np.int64) if 0 <= labels.min() <= labels.max() < MAX_CLASSES else None
