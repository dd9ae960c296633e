"""Data sets by URL: training and validation parts, subsets, and fingerprints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_fixtures import labels, names, odd_tree, parts_tree, write_image
from numpy.typing import NDArray

from dino_xcit.data import ArraySource, Source, Subset, open_parts, open_source
from dino_xcit.data.open import has_validation
from dino_xcit.data.source import split_part
from dino_xcit.errors import InputError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return odd_tree(tmp_path)


# ---- training and validation parts


@pytest.mark.parametrize("given", ["", "/train", "/val", "/train/"])
def test_open_parts_finds_both_parts_from_folder_or_one_part(tmp_path: Path, given: str) -> None:
    parts_tree(tmp_path, ("a", "b"), ("a", "b"))
    both = open_parts(f"{tmp_path}{given}", None, None)
    assert [Path(part.name(0)).parents[1] for part in both] == [tmp_path / "train", tmp_path / "val"]


def test_open_parts_numbers_classes_as_in_training_part(tmp_path: Path) -> None:
    train, val = open_parts(str(parts_tree(tmp_path, ("ape", "bee", "cow"), ("bee", "cow"))), None, None)
    assert train.classes == val.classes == ("ape", "bee", "cow")
    assert labels(val) == [val.read(index)[1] for index in range(2)] == [1, 2]


def test_open_parts_refuses_validation_class_missing_from_training(tmp_path: Path) -> None:
    parts_tree(tmp_path, ("ape",), ("ape", "yak"))
    with pytest.raises(InputError, match="yak"):
        open_parts(str(tmp_path), None, None)


def test_open_parts_accepts_parts_in_separate_locations(tmp_path: Path) -> None:
    one, two = (parts_tree(tmp_path / name, ("a",), ("a",)) for name in ("one", "two"))
    for given, expected in (
        ((str(one), None, str(two / "val")), (one / "train", two / "val")),
        ((None, str(two / "train"), str(one / "val")), (two / "train", one / "val")),
    ):
        assert [Path(part.name(0)).parents[1] for part in open_parts(*given)] == list(expected)


@pytest.mark.parametrize("given", [
    (None, "sample:fashion-mnist", "sample:fashion-mnist"), ("sample:fashion-mnist/train", None, None),
    ("sample:fashion-mnist/train/", None, None), ("sample:fashion-mnist/val", None, None),
])  # fmt: skip
def test_open_parts_finds_both_parts_of_named_data_set(given: tuple[str | None, ...]) -> None:
    assert [len(part) for part in open_parts(*given)] == [12_000, 3_000]


def test_has_validation_agrees_with_open_parts(tmp_path: Path) -> None:
    parts_tree(tmp_path / "parts", ("a",), ("a",))
    for url, expected in (
        (tmp_path / "parts", True), (tmp_path / "parts" / "train", False), ("sample:fashion-mnist", True),
        ("tar:shards-*.tar", False), ("parquet:images-*.parquet", False),
    ):  # fmt: skip
        assert has_validation(str(url)) == expected, url


def test_open_parts_refuses_missing_parts_and_missing_labels(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no train data"):
        open_parts(None, None, None)
    write_image(tmp_path / "train" / "a" / "0.png")
    with pytest.raises(InputError, match="has no folder 'val'"):
        open_parts(str(tmp_path), None, None)
    write_image(tmp_path / "val" / "loose.png")
    with pytest.raises(InputError, match="no labels"):
        open_parts(str(tmp_path), None, None)


# ---- subsets and fingerprints


def test_subset_selects_and_reorders_items_and_labels(tree: Path) -> None:
    source = open_source(str(tree))
    subset = Subset(source, np.array([4, 1]))
    assert isinstance(subset, Source)
    assert len(subset) == 2
    assert names(subset) == [source.name(4), source.name(1)]
    assert labels(subset) == [2, 1]
    assert subset.read(0) == source.read(4)
    assert subset.classes == source.classes


def test_fingerprint_changes_with_items_order_labels_and_content(tree: Path) -> None:
    source = open_source(str(tree))
    found = [
        source.fingerprint(),
        Subset(source, np.array([0, 1])).fingerprint(),
        Subset(source, np.array([1, 0])).fingerprint(),
        Subset(source, np.arange(5), np.array([1, 0, 2]), ("cat", "ant", "dog")).fingerprint(),
    ]
    assert open_source(str(tree)).fingerprint() == found[0]
    for change in (
        lambda: write_image(tree / "dog" / "a.jpg", shade=30, size=(9, 9)),
        lambda: write_image(tree / "dog" / "z.jpg"),
        lambda: (tree / "dog" / "b.png").unlink(),
        lambda: (tree / "ant").rename(tree / "bat"),
    ):
        change()
        found.append(open_source(str(tree)).fingerprint())
    assert len(set(found)) == 8


def test_array_source_fingerprint_depends_on_pixels_and_labels() -> None:
    def fingerprint(images: NDArray[np.uint8], *labels: int) -> str:
        return ArraySource("x", images, np.array(labels), ("a", "b")).fingerprint()

    images = np.zeros((3, 2, 2), np.uint8)
    other = images.copy()
    other[1, 0, 0] = 1
    first = fingerprint(images, 0, 1, 0)
    others = {fingerprint(other, 0, 1, 0), fingerprint(images, 0, 1, 1), fingerprint(images[:2], 0, 1)}
    assert len({first, *others}) == 4
    assert fingerprint(images.copy(), 0, 1, 0) == first


@pytest.mark.parametrize(("url", "name", "part"), [
    ("hf:DIR", "hf:DIR", None), ("hf:DIR/train", "hf:DIR", "train"), ("hf:DIR/val//", "hf:DIR", "val"),
    ("hf:DIR/train/?label=none", "hf:DIR?label=none", "train"),
    ("hf:train/val", "hf:train", "val"), ("imagenet:/a?/train", "imagenet:/a?", "train"), ("/train", "/train", None),
    ("sample:trains", "sample:trains", None),
])  # fmt: skip
def test_split_part_separates_part_from_url(url: str, name: str, part: str | None) -> None:
    assert split_part(url) == (name, part)


@pytest.mark.parametrize("data", ["absent", "absent/train", "absent.txt"])
def test_open_parts_reports_nonexistent_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no such file"):
        open_parts(data, None, None)
