"""Fashion-MNIST: the subset in this package, and the full set from Debian's package.

70,000 grey images of clothes, 28x28, ten classes (arXiv 1708.07747, MIT licence, see SAMPLE_LICENSE.txt).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data.source import Item
from dino_xcit.data.storage import read_file
from dino_xcit.errors import InputError, one_line

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
EMBEDDED = Path(__file__).parent / "fashion_mnist_sample.npz"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_MAX_BYTES = 1 << 27
"""Maximum size of a file of the full set, packed or not: the largest has 47 MB."""


class ArraySource:
    """Decoded images in memory."""

    def __init__(
        self, url: str, images: NDArray[np.uint8], labels: NDArray[np.int64], classes: tuple[str, ...]
    ) -> None:
        """``images`` [count, height, width] or [count, height, width, 3]; ``labels`` [count]."""
        self.url = url
        self.images = images
        self.labels: NDArray[np.int64] | None = labels
        self.classes: tuple[str, ...] | None = classes

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Item, int | None]:
        assert self.labels is not None
        return self.images[index], int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.url}/{range(len(self))[index]:05d}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.url.encode())
        digest.update(np.ascontiguousarray(self.images).tobytes())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        return digest.hexdigest()


def open_sample(name: str, part: str) -> ArraySource:
    """Open Fashion-MNIST.

    Args:
        name: ``fashion-mnist``: 12,000 training and 3,000 test images, class-balanced, from this package.
            ``fashion-mnist-full``: 60,000 and 10,000 images, from Debian's package dataset-fashion-mnist.
        part: ``train`` or ``val`` (the test images).

    Raises:
        InputError: The name is unknown, or a file is missing or damaged.
    """
    url = f"sample:{name}/{part}"
    if name == "fashion-mnist":
        with np.load(EMBEDDED) as arrays:
            return ArraySource(url, arrays[f"{part}_images"], arrays[f"{part}_labels"].astype(np.int64), CLASSES)
    if name == "fashion-mnist-full":
        folder = Path(os.environ.get("FASHION_MNIST_DIR", DEBIAN_FOLDER))
        prefix = {"train": "train", "val": "t10k"}[part]
        images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        fits = images.ndim == 3 and images.size and labels.shape == images.shape[:1] and labels.max() < len(CLASSES)
        if not fits:
            raise InputError(f"the files {prefix}-* in {folder} are not Fashion-MNIST: download them again")
        return ArraySource(url, images, labels.astype(np.int64), CLASSES)
    raise InputError(f"unknown sample {name!r}: expected sample:fashion-mnist or sample:fashion-mnist-full")


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes (MNIST's format): two zero bytes, type 8, rank, big-endian sizes, data."""
    if not path.is_file():
        raise InputError(
            f"the full Fashion-MNIST is not in {path.parent}: install Debian's package dataset-fashion-mnist, set "
            "FASHION_MNIST_DIR to the folder of the four .gz files, or use torchvision:FashionMNIST to download it"
        )
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(read_file(str(path), _MAX_BYTES))) as file:
            data = file.read(_MAX_BYTES)  # a small file could unpack to any size
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}; download it again") from error
    if data[:3] != b"\x00\x00\x08" or data[3:4] not in (b"\1", b"\3") or len(data) < 4 + 4 * data[3]:
        raise InputError(f"{path} is not an IDX file of unsigned bytes: download it again")
    rank = data[3]
    shape = [int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(rank)]
    values = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank)
    if len(values) != math.prod(shape):
        raise InputError(f"{path} has {len(values)} bytes, expected {shape} from its header; download it again")
    return values.reshape(shape)
