"""The embedded sample, the full Fashion-MNIST, and torchvision's data sets."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from data_fixtures import labels, names
from numpy.typing import NDArray
from PIL import Image

from dino_xcit.data import ArraySource, UndecodableImage, decode, open_parts, open_source
from dino_xcit.data.check import check
from dino_xcit.data.sample import CLASSES, EMBEDDED
from dino_xcit.data.torchvision_source import TorchvisionSource
from dino_xcit.errors import InputError


def test_sample_is_balanced_small_and_has_licence_file() -> None:
    for part, count in (("train", 12_000), ("val", 3_000)):
        source = open_source("sample:fashion-mnist", part)
        assert len(source) == count
        assert np.bincount(labels(source) or []).tolist() == [count // 10] * 10
        assert source.classes == CLASSES
        item, label = source.read(count - 1)
        assert isinstance(item, np.ndarray)
        assert (item.shape, item.dtype) == ((28, 28), np.uint8)
        assert label == (labels(source) or [])[-1]
    assert EMBEDDED.stat().st_size <= 8e6
    licence = EMBEDDED.with_name("SAMPLE_LICENSE.txt").read_text()
    assert "MIT" in licence
    assert "Zalando" in licence


def test_sample_has_few_duplicate_images() -> None:
    train, val = open_parts("sample:fashion-mnist", None, None)
    assert isinstance(train, ArraySource)
    assert isinstance(val, ArraySource)
    seen = {image.tobytes() for image in train.images}
    assert len(seen) > 11_990
    assert sum(image.tobytes() in seen for image in val.images) < 5


def idx(array: NDArray[np.uint8]) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


@pytest.fixture
def full_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Fashion-MNIST with the file names of Debian's package."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 30), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path))
    return tmp_path


def test_full_set_is_read_from_idx_files(full_set: Path) -> None:
    train, val = open_parts("sample:fashion-mnist-full", None, None)
    assert (len(train), len(val)) == (30, 20)
    first = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)[0]
    np.testing.assert_array_equal(np.asarray(train.read(0)[0]), first)
    assert labels(train) == [i % 10 for i in range(30)]
    assert train.classes == CLASSES
    assert decode(train.read(3)[0], "x").size == (28, 28)


PICTURES = idx(np.zeros((30, 28, 28), np.uint8))


@pytest.mark.parametrize(
    "data",
    [b"", b"no gzip at all", gzip.compress(PICTURES)[:-10], gzip.compress(b"PNG"), gzip.compress(PICTURES[:-5])],
    ids=["empty", "other format", "cut", "other content", "short"],
)
def test_damaged_idx_file_is_named_in_error(full_set: Path, data: bytes) -> None:
    (full_set / "train-images-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(InputError, match=r"train-images-idx3.*download (it|them) again"):
        open_source("sample:fashion-mnist-full")


@pytest.mark.parametrize(("kind", "data"), [
    ("images-idx3", b"\0\0\x08"), ("images-idx3", bytes([0, 0, 8, 255]) + b"\0\0\0\1" * 255 + b"\0"),
    ("images-idx3", idx(np.zeros((31, 28, 28), np.uint8))), ("images-idx3", idx(np.zeros(30, np.uint8))),
    ("images-idx3", idx(np.zeros((0, 28, 28), np.uint8))), ("images-idx3", bytes(200_000_000)),
    ("labels-idx1", idx(np.full(30, 10, np.uint8))),
])  # fmt: skip
def test_idx_file_with_wrong_content_is_refused(full_set: Path, kind: str, data: bytes) -> None:
    (full_set / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(data, 1))
    with pytest.raises(InputError, match=r"download (it|them) again"):
        open_source("sample:fashion-mnist-full")


def test_missing_full_set_names_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASHION_MNIST_DIR", "/absent")
    with pytest.raises(InputError, match="FASHION_MNIST_DIR"):
        open_source("sample:fashion-mnist-full")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sample:mnist", "fashion-mnist"),
        ("sample:fashion-mnist/test", "unknown sample"),
        ("torchvision:FashonMNIST", "FashionMNIST"),
        ("torchvision:folder", "no data set"),
        ("torchvision:ImageFolder", "cannot open ImageFolder"),
    ],
)
def test_unknown_data_set_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, words: str) -> None:
    monkeypatch.setenv("TORCHVISION_DATA", str(tmp_path))
    with pytest.raises(InputError, match=words):
        open_source(url)


def test_torchvision_set_is_read_from_local_files(full_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = full_set / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in full_set.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    monkeypatch.setenv("TORCHVISION_DATA", str(full_set))
    train, val = open_parts("torchvision:FashionMNIST", None, None)
    assert (len(train), len(val)) == (30, 20)
    full, _ = open_parts("sample:fashion-mnist-full", None, None)
    assert labels(train) == labels(full)
    for index in (0, 7, 29):
        assert decode(train.read(index)[0], "x").tobytes() == decode(full.read(index)[0], "x").tobytes()
        assert train.read(index)[1] == full.read(index)[1]
    assert len(train.classes or ()) == 10
    assert train.fingerprint() != val.fingerprint()
    assert len(set(names(train))) == 30


class OneBroken(torch.utils.data.Dataset[Any]):
    """A torchvision data set with a damaged file. The class of the exception depends on the data set."""

    targets: object = (2, 0, 1)
    classes = ("a", "b", "c")

    def __init__(self, root: str, train: bool = True) -> None:
        pass

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 1:
            raise OSError("image file is truncated\n(3 bytes not processed)")
        return Image.new("L", (4, 3), 50 * index), index


def test_broken_torchvision_image_raises_undecodable_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "OneBroken", OneBroken, raising=False)
    source = TorchvisionSource("OneBroken", "train", tmp_path)
    assert source.read(2)[1] == 1
    with pytest.raises(UndecodableImage, match=r"^torchvision:OneBroken/train/000001 cannot be read: image") as caught:
        source.read(1)
    assert caught.value.cause == "image file is truncated (3 bytes not processed)"
    report = check(source, workers=0)
    assert [name for name, _ in report.broken] == ["torchvision:OneBroken/train/000001"]


@pytest.mark.parametrize(
    "targets", [["a", "b", "c"], [[1, 2], [3], []], [0, 1], [0, -1, 1], [0, 10**6, 1], [{}, {}, {}]]
)
def test_targets_other_than_class_numbers_give_no_labels(
    targets: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(OneBroken):
        def __init__(self, root: str) -> None:
            super().__init__(root)
            self.targets = targets

    monkeypatch.setattr(torchvision.datasets, "Odd", Odd, raising=False)
    source = TorchvisionSource("Odd", "train", tmp_path)
    assert (source.labels, source.classes, source.read(0)[1]) == (None, None, None)
