"""The embedded sample, the full set it is of, and torchvision's sets."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import names
from numpy.typing import NDArray

import dino_xcit.data
from dino_xcit.data import ArraySource, decode, open_parts, open_source
from dino_xcit.data.sample import CLASSES, EMBEDDED
from dino_xcit.errors import InputError


def test_the_sample_is_balanced_and_small_and_comes_with_its_licence() -> None:
    train, val = open_source("sample:fashion-mnist", "train"), open_source("sample:fashion-mnist", "val")
    for source, count in ((train, 12_000), (val, 3_000)):
        assert len(source) == count
        assert source.labels is not None
        assert np.bincount(source.labels).tolist() == [count // 10] * 10
        assert source.classes == CLASSES
        item, label = source.read(count - 1)
        assert isinstance(item, np.ndarray)
        assert (item.shape, item.dtype) == ((28, 28), np.dtype(np.uint8))
        assert label == source.labels[-1]
    assert EMBEDDED.stat().st_size <= 8e6
    licence = (Path(dino_xcit.data.__file__).parent / "SAMPLE_LICENSE.txt").read_text()
    assert "MIT" in licence
    assert "Zalando" in licence


def test_the_sample_holds_different_pictures_of_different_classes() -> None:
    train = open_source("sample:fashion-mnist", "train")
    val = open_source("sample:fashion-mnist/val")
    assert isinstance(train, ArraySource)
    assert isinstance(val, ArraySource)
    seen = {image.tobytes() for image in train.images}
    assert len(seen) > 11_990
    assert sum(image.tobytes() in seen for image in val.images) < 5
    # trousers and ankle boots differ in the mean
    means = [train.images[train.labels == label].mean(axis=0) for label in (1, 9)]
    assert np.abs(means[0] - means[1]).max() > 50


def idx(array: NDArray[np.uint8]) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


@pytest.fixture
def full_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A little Fashion-MNIST in the files of Debian's package."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 30), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path))
    return tmp_path


def test_the_full_set_is_read_from_idx_files(full_set: Path) -> None:
    train, val = open_parts("sample:fashion-mnist-full", None, None)
    assert (len(train), len(val)) == (30, 20)
    first = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)[0]
    item, label = train.read(0)
    np.testing.assert_array_equal(np.asarray(item), first)
    assert label == 0
    assert train.labels is not None
    assert train.labels.tolist() == [i % 10 for i in range(30)]
    assert train.classes == CLASSES
    assert decode(train.read(3)[0], "x").size == (28, 28)


def test_a_full_set_that_is_absent_or_damaged_is_named(full_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = full_set / "train-images-idx3-ubyte.gz"
    good = images.read_bytes()
    for damage in (
        good[:300],
        b"no gzip at all",
        gzip.compress(b"PNG"),
        gzip.compress(gzip.decompress(good)[:-5]),
        b"",
    ):
        images.write_bytes(damage)
        with pytest.raises(InputError, match="train-images-idx3"):
            open_source("sample:fashion-mnist-full")
    monkeypatch.setenv("FASHION_MNIST_DIR", str(full_set / "absent"))
    with pytest.raises(InputError, match="FASHION_MNIST_DIR"):
        open_source("sample:fashion-mnist-full")


def test_files_that_are_not_the_full_set_are_refused_whatever_they_claim(full_set: Path) -> None:
    images, labels = (full_set / f"train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    whole = images.read_bytes(), labels.read_bytes()
    for damaged, data in (
        (images, b"\0\0\x08"),
        (images, bytes([0, 0, 8, 255]) + b"\0\0\0\1" * 255 + b"\0"),
        (images, idx(np.zeros((31, 28, 28), np.uint8))),
        (images, idx(np.zeros(30, np.uint8))),
        (images, idx(np.zeros((0, 28, 28), np.uint8))),
        (labels, idx(np.full(30, 10, np.uint8))),
        (images, bytes(200_000_000)),
    ):
        damaged.write_bytes(gzip.compress(data, 1))
        with pytest.raises(InputError, match=r"fetch (it|them) anew"):
            open_source("sample:fashion-mnist-full")
        for path, content in zip((images, labels), whole, strict=True):
            path.write_bytes(content)
    assert len(open_source("sample:fashion-mnist-full")) == 30


def test_unknown_samples_and_parts_are_refused() -> None:
    with pytest.raises(InputError, match="fashion-mnist"):
        open_source("sample:mnist")
    with pytest.raises(InputError, match="unknown sample"):
        open_source("sample:fashion-mnist/test")


def test_a_torchvision_set_is_read_without_a_network_where_its_files_are(
    tmp_path: Path, full_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "tv" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in full_set.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    monkeypatch.setenv("TORCHVISION_DATA", str(tmp_path / "tv"))
    train, val = open_parts("torchvision:FashionMNIST", None, None)
    assert (len(train), len(val)) == (30, 20)
    full, _ = open_parts("sample:fashion-mnist-full", None, None)
    for index in (0, 7, 29):
        assert decode(train.read(index)[0], "x").tobytes() == decode(full.read(index)[0], "x").tobytes()
        assert train.read(index)[1] == full.read(index)[1]
    assert train.classes is not None
    assert len(train.classes) == 10
    assert train.fingerprint() != val.fingerprint()
    assert len(set(names(train))) == 30


def test_unknown_torchvision_sets_are_refused_with_near_matches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHVISION_DATA", str(tmp_path))
    with pytest.raises(InputError, match="FashionMNIST"):
        open_source("torchvision:FashonMNIST")
    with pytest.raises(InputError, match="no data set"):
        open_source("torchvision:folder")
    with pytest.raises(InputError, match="could not open ImageFolder"):
        open_source("torchvision:ImageFolder")
