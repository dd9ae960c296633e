"""Data sets that torchvision knows how to fetch and read (``torchvision:FashionMNIST``)."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets

from dino_xcit.data.source import Item, hash_lines
from dino_xcit.errors import InputError, near_matches


class TorchvisionSource:
    """A labelled torchvision data set; images are decoded by torchvision."""

    def __init__(self, name: str, part: str, root: Path | None = None) -> None:
        """``root``: where the files are or shall go; default $TORCHVISION_DATA or ~/.cache/torchvision."""
        factory: Any = getattr(torchvision.datasets, name, None)
        if factory is None or not inspect.isclass(factory):
            raise InputError(f"torchvision has no data set {name!r}{near_matches(name, torchvision.datasets.__all__)}")
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
                f"torchvision could not open {name} in {root}: {error} (put its files there, or name another folder "
                "in TORCHVISION_DATA)"
            ) from error
        self.url = f"torchvision:{name}/{part}"
        targets = getattr(self._data, "targets", getattr(self._data, "labels", getattr(self._data, "_labels", None)))
        self.labels = None if targets is None else np.asarray(targets, dtype=np.int64)
        names = getattr(self._data, "classes", None)
        if self.labels is None:
            self.classes: tuple[str, ...] | None = None
        else:
            self.classes = tuple(names) if names else tuple(str(label) for label in range(int(self.labels.max()) + 1))

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> tuple[Item, int | None]:
        image, label = self._data[index][:2]
        return np.asarray(image.convert("RGB")), None if self.labels is None else int(label)

    def name(self, index: int) -> str:
        return f"{self.url}/{range(len(self))[index]:06d}"

    def fingerprint(self) -> str:
        labels = [] if self.labels is None else self.labels.tolist()
        return hash_lines([self.url, str(len(self)), str(labels)])
